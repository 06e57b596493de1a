"""Packing: tokenised documents become rows of at most ``context_length`` tokens.

Documents keep their order and the pieces of a document are neighbours, so a contiguous range of rows holds whole
documents except at its two ends: what the distributed statistics rely on. Attention never crosses documents (the
position ids restart), so packing changes no number, only the padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class PackingCounts:
    """What packing saw; ``documents_split`` counts documents cut into more than one piece."""

    documents: int = 0
    empty_documents: int = 0
    documents_split: int = 0
    tokens: int = 0
    counted_tokens: int = 0
    rows: int = 0


@dataclass
class PackedRow:
    """One row: ``input_ids`` and ``document_ids``, int32, equal length; ``document_ids`` is non-decreasing."""

    input_ids: np.ndarray
    document_ids: np.ndarray


@dataclass
class _OpenRow:
    pieces: list[np.ndarray] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, piece: np.ndarray, document: int) -> None:
        self.pieces.append(piece)
        self.documents.append(document)
        self.tokens += len(piece)

    def close(self) -> PackedRow:
        lengths = [len(piece) for piece in self.pieces]
        row = PackedRow(
            np.concatenate(self.pieces).astype(np.int32),
            np.repeat(np.array(self.documents, dtype=np.int32), lengths),
        )
        self.pieces, self.documents, self.tokens = [], [], 0
        return row


def pack(
    documents: Iterable[Iterable[Sequence[int] | np.ndarray]],
    context_length: int,
    packing: str,
    counts: PackingCounts,
) -> Iterator[PackedRow]:
    """Yield the packed rows of tokenised documents, streaming.

    Args:
        documents: token ids of each document, in parts (there may be none; the document keeps its index). Each is used
            up before the next is asked for, and no more of it than a row and a part is in memory.
        context_length: most tokens of a row.
        packing: ``dense`` (cut wherever a row ends), ``whole`` (never cut a document that fits into a row) or
            ``single`` (one document a row).
        counts: filled while rows are yielded.
    """
    row = _OpenRow()
    for index, parts in enumerate(documents):
        counts.documents += 1
        pieces = (np.asarray(part, dtype=np.int32) for part in parts if len(part))
        begin, size = [], 0  # as much of the document as decides where it begins
        for piece in pieces:
            begin.append(piece)
            size += len(piece)
            if packing == "dense" or row.tokens + size > context_length:
                break
        if not begin:
            counts.empty_documents += 1
            continue
        full = row.tokens == context_length or (packing == "whole" and row.tokens + size > context_length)
        if row.tokens and (full or packing == "single"):
            yield _counted(row.close(), counts)
        rows = 1
        for tokens in itertools.chain(begin, pieces):
            while len(tokens):
                room = context_length - row.tokens
                if room == 0:
                    yield _counted(row.close(), counts)
                    rows += 1
                    continue
                row.add(tokens[:room], index)
                tokens = tokens[room:]
        counts.documents_split += rows > 1
    if row.tokens:
        yield _counted(row.close(), counts)


def counted_positions(document_ids: np.ndarray) -> np.ndarray:
    """Which positions of rows (last axis) are loss-bearing: the next token exists and belongs to the same document.

    Bool, of the same shape; a negative document is filling.
    """
    counted = np.zeros(document_ids.shape, dtype=bool)
    counted[..., :-1] = (document_ids[..., 1:] == document_ids[..., :-1]) & (document_ids[..., 1:] >= 0)
    return counted


def _counted(row: PackedRow, counts: PackingCounts) -> PackedRow:
    counts.rows += 1
    counts.tokens += len(row.input_ids)
    counts.counted_tokens += int(counted_positions(row.document_ids).sum())
    return row
