"""The recorded routing of the retain corpus, by token (:class:`Trace`) and by row (:class:`RowSelections`).

The K selections of a token in a layer are never expanded to E zeros and ones: Σ_s θ_s a_s(t) is a table look-up and
Σ_t w_t a_s(t) a histogram. Where expert numbers are bytes and K is even, two adjacent selections are read as one 16-bit
number, which halves the time of both.

Shape legend: T tokens of a chunk or of the corpus (flat order: rows in order, tokens of a row in order), N tokens,
R rows, L MoE layers, E experts, K = top-k, G columns, V values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from trace_ds.corpora.dataset import FlatArray, TokenDataset, TokenMap
from trace_ds.errors import UserError
from trace_ds.run.files import open_mapped

A = TypeVar("A")
B = TypeVar("B")
BLOCK_VALUES = 1 << 22  # of row selections that are read at a time


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """The results of ``work`` in the order of the items: the same bits for any number of threads."""
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        yield from pool.map(work, items)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Packing:
    """How selections [N, L, K] of one corpus are looked up and counted."""

    layers: int
    top_k: int
    experts: int
    pairs: bool

    def columns(self, selected_NLK: np.ndarray) -> np.ndarray:
        """Unsigned [G, N], the columns of layer 0, then those of layer 1, …"""
        flat = np.ascontiguousarray(selected_NLK).reshape(len(selected_NLK), -1)
        return np.ascontiguousarray((flat.view("<u2") if self.pairs else flat).T)

    def tables(self, value_LE: np.ndarray) -> np.ndarray:
        """float64 [L, V]: what a column's value brings to a token's sum of ``value_LE``."""
        if not self.pairs:
            return value_LE
        values = np.zeros((self.layers, 256))
        values[:, : self.experts] = value_LE
        # little-endian: a pair reads as 256 times the second expert plus the first
        return (value_LE[:, :, None] + values[:, None, :]).reshape(self.layers, -1)

    def score(self, columns_GN: np.ndarray, tables_LV: np.ndarray) -> np.ndarray:
        """float64 [N]: the sum of the values of each token's selections, in the order of the columns."""
        score_N = np.zeros(columns_GN.shape[1])
        per_layer = len(columns_GN) // self.layers
        for number, column_N in enumerate(columns_GN):
            score_N += tables_LV[number // per_layer].take(column_N)
        return score_N

    def sums(self, columns_GN: np.ndarray, weight_N: np.ndarray | None) -> np.ndarray:
        """[L, E]: Σ of the weights of the tokens that select each expert, float64; without weights their number, int64.

        Raises:
            ValueError: a selection of an expert that there is not.
        """
        per_layer = len(columns_GN) // self.layers
        weights = None if weight_N is None else np.tile(weight_N, per_layer)
        counts = []
        for layer in range(self.layers):
            values = columns_GN[layer * per_layer : (layer + 1) * per_layer].reshape(-1)
            counts_V = np.bincount(values, weights, self.experts * (256 if self.pairs else 1))
            if self.pairs:
                counts_V = np.pad(counts_V, (0, -len(counts_V) % 256)).reshape(-1, 256)
                second, first = counts_V.sum(axis=1), counts_V.sum(axis=0)
                counts_V = np.pad(second, (0, max(256 - len(second), 0))) + first
            beyond = int(np.flatnonzero(counts_V).max(initial=0))
            if beyond >= self.experts:
                raise ValueError(f"the trace names expert {beyond} of {self.experts}")
            counts.append(counts_V[: self.experts])
        return np.stack(counts)


def read_token_map(path: Path, documents: int) -> TokenMap:
    """Rows and documents of a prepared corpus (``RUN/data/retain.arrow``), in place: memory is O(rows)."""
    dataset = TokenDataset.open(path)
    return TokenMap(dataset.row_starts_R1, dataset.document_ids_T, documents, dataset.loss_mask_T)


class Trace(FlatArray):
    """The routing trace of a corpus: parts ``[tokens of the part, L, K]`` of expert indices, in flat token order."""

    @property
    def layers(self) -> int:
        return int(self.parts[0].shape[1])

    @property
    def top_k(self) -> int:
        return int(self.parts[0].shape[2])

    def packing(self, experts: int) -> Packing:
        """How its selections are looked up and counted."""
        return Packing(self.layers, self.top_k, experts, self.parts[0].dtype == np.uint8 and self.top_k % 2 == 0)


def open_trace(paths: list[Path], layers: int, top_k: int, tokens: int, fix: str) -> Trace:
    """Memory-map the parts of a trace and check that they cover the corpus.

    Raises:
        UserError: a part is not an unsigned [tokens, L, K] array, or the parts do not cover the corpus.
    """
    parts = []
    for path in paths:
        try:
            part = open_mapped(path)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"this is not a trace part ({error})", str(path), fix) from None
        if part.dtype not in (np.uint8, np.uint16) or part.ndim != 3 or part.shape[1:] != (layers, top_k):
            raise UserError(
                f"the trace part holds {part.dtype} {list(part.shape)} instead of unsigned [tokens, {layers}, {top_k}]",
                str(path),
                fix,
            )
        parts.append(part)
    covered = sum(len(part) for part in parts)
    if not parts or covered != tokens:
        raise UserError(
            f"the trace covers {covered} tokens, the retain data has {tokens}",
            str(paths[0].parent) if paths else "",
            fix,
        )
    return Trace(tuple(parts))


@dataclass(frozen=True)
class RowSpread:
    """Values of rows as if they were an array over the tokens, float64; sliced, never made whole."""

    tokens: TokenMap
    value_R: np.ndarray

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.value_R[self.tokens.row_of(span.start, span.stop)]


def count_selections(
    trace: Trace, tokens: TokenMap, experts: int, weight_T: np.ndarray | RowSpread | None = None, threads: int = 1
) -> np.ndarray:
    """[L, E] selections by counted tokens, int64, or their weighted sums, float64, when ``weight_T`` is given.

    One pass. The unweighted counts of an honest trace equal the statistics' ``counts_LE`` exactly.

    Raises:
        ValueError: the trace names an expert ≥ ``experts``.
    """
    packing = trace.packing(experts)

    def part(span: tuple[int, int]) -> np.ndarray:
        counted_T = tokens.counted(*span)
        columns_GT = packing.columns(trace[slice(*span)][counted_T])
        return packing.sums(columns_GT, None if weight_T is None else np.asarray(weight_T[slice(*span)])[counted_T])

    result_LE = np.zeros((trace.layers, experts), dtype=np.int64 if weight_T is None else np.float64)
    for part_LE in in_order(part, tokens.spans(), threads):
        result_LE += part_LE
    return result_LE


@dataclass(frozen=True)
class RowSelections:
    """The selections of each row and the routing of a sample of tokens, as ``collect`` records them.

    Attributes:
        parts: unsigned counts [rows of the part, L, E] of the row's counted tokens that select the expert.
        top_k: K. selected_NLK: experts of the sampled tokens, all of them counted. position_N: their flat positions.
    """

    parts: tuple[np.ndarray, ...]
    top_k: int
    selected_NLK: np.ndarray
    position_N: np.ndarray

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.parts)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, counts [rows, L · E]) in order."""
        first = 0
        for part in self.parts:
            step = max(1, BLOCK_VALUES // max(int(np.prod(part.shape[1:])), 1))
            for at in range(0, len(part), step):
                counts = np.asarray(part[at : at + step])
                yield slice(first + at, first + at + len(counts)), counts.reshape(len(counts), -1)
            first += len(part)

    def scores(self, theta_LE: np.ndarray) -> np.ndarray:
        """Mean of Σ θ a over the row's counted tokens, float64 [R]; 0 for a row without any."""
        score_R = np.zeros(self.rows)
        for rows, counts in self.blocks():
            # a layer's selections are K a counted token
            sizes_R = np.maximum(counts[:, : theta_LE.shape[1]].sum(axis=1, dtype=np.int64) // self.top_k, 1)
            score_R[rows] = np.einsum("rs,s->r", counts.astype(np.float64), theta_LE.ravel()) / sizes_R
        return score_R

    def sums(self, weight_R: np.ndarray) -> np.ndarray:
        """Σ_r w_r counts_r, float64 [L, E]."""
        total = np.zeros(int(np.prod(self.parts[0].shape[1:])))
        for rows, counts in self.blocks():
            total += np.einsum("r,rs->s", weight_R[rows], counts.astype(np.float64))
        return total.reshape(self.parts[0].shape[1:])
