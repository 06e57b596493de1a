"""Token datasets: documents packed into rows of an Arrow file, memory-mapped, read by row or by flat position.

Packing keeps the order of documents, and the parts of a document are neighbours, so a contiguous range of rows holds
whole documents except at its two ends; the distributed statistics rely on this. Attention never crosses documents (the
position ids restart), so documents in one row do not influence each other. A document that is cut loses context, and
one counted token, at each cut.

Shape legend: B rows of a batch, S positions of a row, T tokens in flat order, R rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from trace_ds.run.foreign import reading

if TYPE_CHECKING:
    import torch

CHUNK_TOKENS = 1 << 16
ROWS_PER_BATCH = 1024
TEXT_START_READ, TEXT_START_CHARACTERS = 400, 160
ROW_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("document_ids", pa.list_(pa.int32()))])
MASKED_ROW_SCHEMA = ROW_SCHEMA.append(pa.field("loss_mask", pa.list_(pa.uint8())))
DOCUMENT_SCHEMA = pa.schema([("source", pa.string()), ("tokens", pa.int64()), ("text_start", pa.string())])


@dataclass
class PackingCounts:
    """Numbers of documents, tokens and rows packed; ``documents_split``: documents cut into several pieces."""

    documents: int = 0
    empty_documents: int = 0
    documents_split: int = 0
    tokens: int = 0
    counted_tokens: int = 0
    rows: int = 0


@dataclass(frozen=True)
class Tokens:
    """A tokenised document: ``ids`` int32; ``loss_mask`` bool, tokens that contribute to the loss; None: all."""

    ids: np.ndarray
    loss_mask: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, span: slice) -> Tokens:
        return Tokens(self.ids[span], None if self.loss_mask is None else self.loss_mask[span])


@dataclass
class PackedRow:
    """One row: ``input_ids`` and ``document_ids``, int32, and ``loss_mask`` (see :class:`Tokens`), of equal length;
    ``document_ids`` is non-decreasing."""

    input_ids: np.ndarray
    document_ids: np.ndarray
    loss_mask: np.ndarray | None = None


@dataclass
class _OpenRow:
    pieces: list[Tokens] = field(default_factory=list)
    documents: list[int] = field(default_factory=list)
    tokens: int = 0

    def add(self, piece: Tokens, document: int) -> None:
        self.pieces.append(piece)
        self.documents.append(document)
        self.tokens += len(piece)

    def close(self) -> PackedRow:
        lengths = [len(piece) for piece in self.pieces]
        masks = [piece.loss_mask for piece in self.pieces]
        row = PackedRow(
            np.concatenate([piece.ids for piece in self.pieces]),
            np.repeat(np.array(self.documents, dtype=np.int32), lengths),
        )
        if any(mask is not None for mask in masks):
            whole = (np.ones(n, dtype=bool) if mask is None else mask for n, mask in zip(lengths, masks, strict=True))
            row.loss_mask = np.concatenate(list(whole))
        self.pieces, self.documents, self.tokens = [], [], 0
        return row


def pack(
    documents: Iterable[Tokens | Sequence[int]],
    context_length: int,
    packing: str,
    counts: PackingCounts,
) -> Iterator[PackedRow]:
    """Yield the packed rows of tokenised documents, streaming.

    Args:
        documents: each tokenised, or its ids (there may be none; the document keeps its index).
        context_length: most tokens of a row.
        packing: ``dense`` (cut wherever a row ends), ``whole`` (never cut a document that fits into a row) or
            ``single`` (no row has tokens of two documents).
        counts: updated while rows are yielded.
    """
    row = _OpenRow()
    for index, document in enumerate(documents):
        tokens = document if isinstance(document, Tokens) else Tokens(np.asarray(document, dtype=np.int32))
        counts.documents += 1
        counts.empty_documents += not len(tokens)
        full = row.tokens == context_length or (packing == "whole" and row.tokens + len(tokens) > context_length)
        if row.tokens and len(tokens) and (full or packing == "single"):
            yield _counted(row.close(), counts)
        pieces = 0
        while len(tokens):
            if row.tokens == context_length:
                yield _counted(row.close(), counts)
            room = context_length - row.tokens
            row.add(tokens[:room], index)
            tokens, pieces = tokens[room:], pieces + 1
        counts.documents_split += pieces > 1
    if row.tokens:
        yield _counted(row.close(), counts)


def counted_positions(document_ids: np.ndarray, loss_mask: np.ndarray | None = None) -> np.ndarray:
    """Return the counted positions of rows (last axis), bool of the same shape.

    A position is counted if the next token exists, belongs to the same document, and ``loss_mask`` (None: all) includes
    that token. Losses and routing statistics use the same positions. A negative document id is padding.
    """
    counted = np.zeros(document_ids.shape, dtype=bool)
    counted[..., :-1] = (document_ids[..., 1:] == document_ids[..., :-1]) & (document_ids[..., 1:] >= 0)
    if loss_mask is not None:
        counted[..., :-1] &= loss_mask[..., 1:].astype(bool)
    return counted


def _counted(row: PackedRow, counts: PackingCounts) -> PackedRow:
    counts.rows += 1
    counts.tokens += len(row.input_ids)
    counts.counted_tokens += int(counted_positions(row.document_ids, row.loss_mask).sum())
    return row


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, padded on the right to the longest one.

    Attributes:
        input_ids_BS: int64 token ids.
        position_ids_BS: int64, restarting at 0 with each document (and in the padding), which keeps
            attention inside documents.
        counted_BS: bool, the positions of :func:`counted_positions`; False in the padding.
        document_ids_BS: int64 document index, -1 in the padding.
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    counted_BS: torch.Tensor
    document_ids_BS: torch.Tensor


class FlatArray:
    """Arrays concatenated along the first axis without a copy, sliced as one; ValueError if there are none."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        if not parts:
            raise ValueError("no parts")
        self.parts = tuple(parts)
        lengths = [len(part) for part in parts]
        self._ends = np.cumsum(lengths)
        self._starts = self._ends - lengths

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, span: slice | int) -> np.ndarray:
        """Return one item, or those of ``span`` (a view if they lie in one part, else a copy)."""
        if not isinstance(span, slice):
            return np.asarray(self[span : span + 1][0])
        begin, end, _ = span.indices(len(self))
        end = max(begin, end)
        first = min(int(np.searchsorted(self._ends, begin, side="right")), len(self.parts) - 1)
        last = max(int(np.searchsorted(self._ends, end, side="left")), first)
        cuts = ((max(begin - self._starts[n], 0), end - self._starts[n], n) for n in range(first, last + 1))
        pieces = [self.parts[n][low:high] for low, high, n in cuts]
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


@dataclass
class TokenMap:
    """Rows and documents of a flat token sequence: rows in order, the tokens of a row in order.

    Everything is read in chunks of :data:`CHUNK_TOKENS` *flat* tokens, regardless of how the files are chunked, so
    that every sum is taken in one order and results are bitwise independent of the sharding.

    Attributes:
        row_starts_R1: int64 [rows + 1], flat position of each row's first token; the last entry is the token total.
        document_ids_T: int32, document index of every token, non-decreasing (an array, a memory map or FlatArray).
        documents: number of documents.
        loss_mask_T: uint8 or bool, 1 for tokens that contribute to the loss; None: all.
    """

    row_starts_R1: np.ndarray
    document_ids_T: np.ndarray | FlatArray
    documents: int
    loss_mask_T: np.ndarray | FlatArray | None = None

    @property
    def tokens(self) -> int:
        """Tokens of all rows, counted or not."""
        return int(self.row_starts_R1[-1])

    @property
    def rows(self) -> int:
        return len(self.row_starts_R1) - 1

    def spans(self, start: int = 0, stop: int | None = None) -> list[tuple[int, int]]:
        """Return the chunks as (start, stop) in flat positions."""
        stop = self.tokens if stop is None else stop
        return [(at, min(at + CHUNK_TOKENS, stop)) for at in range(start, stop, CHUNK_TOKENS)]

    def counted(self, start: int, stop: int) -> np.ndarray:
        """Return :func:`counted_positions` of flat positions, bool [stop - start]."""
        span = slice(start, min(stop + 1, self.tokens))
        mask_T = None if self.loss_mask_T is None else self.loss_mask_T[span]
        result_T = counted_positions(self.document_ids_T[span], mask_T)
        if stop < self.tokens:  # one more token was read
            result_T = result_T[:-1]
        # the last token of a row predicts nothing, even if its document continues in the next row
        first = int(np.searchsorted(self.row_starts_R1, start + 1, side="left"))
        last = int(np.searchsorted(self.row_starts_R1, stop, side="right"))
        result_T[self.row_starts_R1[first:last] - 1 - start] = False
        return result_T

    def row_of(self, start: int, stop: int) -> np.ndarray:
        """Return the row of each token, int64 [stop - start]."""
        first, edges = self._edges(start, stop)
        return np.repeat(np.arange(first, first + len(edges) - 1), np.diff(edges))

    def counted_per_row(self) -> np.ndarray:
        """Return the number of counted tokens of each row, int64 [rows]; holds one chunk in memory at a time."""
        counted_R = np.zeros(self.rows, dtype=np.int64)
        for start, stop in self.spans():
            first, edges = self._edges(start, stop)
            totals = np.concatenate([[0], np.cumsum(self.counted(start, stop))])  # reduceat would miscount empty rows
            counted_R[first : first + len(edges) - 1] += np.diff(totals[edges])
        return counted_R

    def counted_total(self) -> int:
        return sum(int(self.counted(*span).sum()) for span in self.spans())

    def _edges(self, start: int, stop: int) -> tuple[int, np.ndarray]:
        """Return the first row of [start, stop), and the row boundaries in that span, relative to ``start``."""
        first = int(np.searchsorted(self.row_starts_R1, start, side="right")) - 1
        last = int(np.searchsorted(self.row_starts_R1, stop, side="left"))
        return first, np.clip(self.row_starts_R1[first : last + 1], start, stop) - start


class TokenDataset(TokenMap):
    """A memory-mapped file of packed rows: a :class:`TokenMap` with the token ids."""

    def __init__(self, table: pa.Table) -> None:
        ids, documents = (table.column(name).chunks for name in ROW_SCHEMA.names)
        lengths = [np.zeros(1, dtype=np.int64), *(np.diff(np.from_dlpack(chunk.offsets)) for chunk in ids)]
        document_ids_T = FlatArray([np.zeros(0, dtype=np.int32), *(_values(chunk) for chunk in documents)])
        last_document = int(document_ids_T[len(document_ids_T) - 1 :].max(initial=-1))
        mask_T: FlatArray | None = None
        if "loss_mask" in table.column_names:
            mask_T = FlatArray([np.zeros(0, np.uint8), *(_values(chunk) for chunk in table.column("loss_mask").chunks)])
        row_starts_R1 = np.cumsum(np.concatenate(lengths), dtype=np.int64)
        super().__init__(row_starts_R1, document_ids_T, last_document + 1, mask_T)
        self.input_ids_T = FlatArray([np.zeros(0, dtype=np.int32), *(_values(chunk) for chunk in ids)])

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        return cls(open_stream(path).read_all())

    def __len__(self) -> int:
        return self.rows

    def row(self, index: int) -> PackedRow:
        tokens = slice(*self.row_starts_R1[index : index + 2])
        mask = None if self.loss_mask_T is None else np.asarray(self.loss_mask_T[tokens], dtype=bool)
        return PackedRow(self.input_ids_T[tokens], np.asarray(self.document_ids_T[tokens]), mask)

    def batch(self, indices: Sequence[int], pad_id: int, length: int | None = None) -> Batch:
        """Return rows as one :class:`Batch`.

        Args:
            indices: row numbers; -1 gives an empty row (padding only), so that every process can take part in every
                collective step.
            pad_id: token id of the padding.
            length: S; default: the longest of the rows (at least 1).
        """
        return batch_of([self.row(index) if index >= 0 else None for index in indices], pad_id, length)


def batch_of(rows: Sequence[PackedRow | None], pad_id: int, length: int | None = None) -> Batch:
    """Return rows as one :class:`Batch`; see :meth:`TokenDataset.batch`."""
    import torch

    length = length or max([len(row.input_ids) for row in rows if row is not None], default=1)
    ids = np.full((len(rows), length), pad_id, dtype=np.int64)
    documents = np.full((len(rows), length), -1, dtype=np.int64)
    mask = np.ones((len(rows), length), dtype=bool)
    for number, row in enumerate(rows):
        if row is not None:
            if row.loss_mask is not None:
                mask[number, : len(row.input_ids)] = row.loss_mask
            ids[number, : len(row.input_ids)] = row.input_ids
            documents[number, : len(row.input_ids)] = row.document_ids
    return Batch(
        torch.from_numpy(ids),
        torch.from_numpy(_restarting_positions(documents)),
        torch.from_numpy(counted_positions(documents, mask)),
        torch.from_numpy(documents),
    )


class ArrowWriter:
    """Writes rows to an Arrow IPC stream, :data:`ROWS_PER_BATCH` at a time (constant memory)."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema, self._sink = schema, pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, schema)
        self._pending: list[tuple[Any, ...]] = []

    def add(self, *row: Any) -> None:
        self._pending.append(row)
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        if self._pending:
            columns = zip(self._schema.types, zip(*self._pending, strict=True), strict=True)
            arrays = [pa.array(list(column), kind) for kind, column in columns]
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
            self._pending = []


def write_rows(path: Path, rows: Iterable[PackedRow], *, masked: bool = False) -> None:
    """Stream rows into a file that :meth:`TokenDataset.open` reads.

    Args:
        masked: write the column ``loss_mask``; without it the masks of rows are dropped.
    """
    with contextlib.closing(ArrowWriter(path, MASKED_ROW_SCHEMA if masked else ROW_SCHEMA)) as writer:
        for row in rows:
            mask = np.ones(len(row.input_ids), dtype=bool) if row.loss_mask is None else row.loss_mask
            writer.add(row.input_ids, row.document_ids, *([mask.view(np.uint8)] if masked else []))


def text_start(text: str) -> str:
    """Return the beginning of a document on one line (made of its first :data:`TEXT_START_READ` characters)."""
    return " ".join(text[:TEXT_START_READ].split())[:TEXT_START_CHARACTERS]


def open_stream(path: Path) -> pa.RecordBatchStreamReader:
    """Return a reader of a memory-mapped Arrow IPC stream; :class:`UserError` if the file is not one."""
    with reading(path, "the Arrow stream", "make it again with `trace-ds prepare CONFIG`"):
        return pa.ipc.open_stream(pa.memory_map(str(path)))


def _values(chunk: pa.ListArray) -> np.ndarray:
    """Return the concatenated values of a chunk's lists, a view of the file."""
    values = np.from_dlpack(chunk.values)  # no copy; Array.to_numpy would import pandas in every rank
    return values[chunk.offsets[0].as_py() : chunk.offsets[-1].as_py()]


def _restarting_positions(documents_BS: np.ndarray) -> np.ndarray:
    positions_S = np.arange(documents_BS.shape[1], dtype=np.int64)
    starts = np.ones_like(documents_BS, dtype=bool)
    starts[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    begin_BS = np.maximum.accumulate(np.where(starts, positions_S, 0), axis=1)
    return positions_S - begin_BS
