"""The expert selections of whole rows: what weights for drawing rows are made of.

Shape legend: R rows, S constraints (layer, expert), T tokens, L MoE layers, E experts, K = top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_ds.calibration.tokens import CHUNK_TOKENS, TokenMap, Trace
from trace_ds.run.files import new_array

BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class RowSelections:
    """What drawing rows needs to know of routing: the selections of each row, and the routing of a sample of tokens.

    ``collect`` records both; where there is a trace they are counted and taken from it.

    Attributes:
        parts: unsigned counts [rows of the part, L, E] of the row's counted tokens that select the expert.
        top_k: K. selected_NLK: experts of the sampled tokens, all of them counted. position_N: their flat positions.
    """

    parts: tuple[np.ndarray, ...]
    top_k: int
    selected_NLK: np.ndarray
    position_N: np.ndarray

    @classmethod
    def of_trace(cls, trace: Trace, tokens: TokenMap, experts: int, spool: Path, sample_tokens: int) -> RowSelections:
        """One pass over the trace; the counts in a file of ``spool``."""
        everything_LE = np.ones((trace.layers, experts), dtype=bool)
        counts_RLE = new_array(spool / "row_selections.bin", np.uint32, (tokens.rows, *everything_LE.shape))
        for first, found_RS, sizes_R in row_counts(trace, tokens, everything_LE):
            counts_RLE[first : first + len(sizes_R)] = found_RS.reshape(len(sizes_R), *everything_LE.shape)
        total, before = tokens.counted_total(), 0
        wanted = ((np.arange(min(sample_tokens, total)) + 0.5) * total / min(sample_tokens, total)).astype(np.int64)
        selected, position = [], []
        for start, stop in tokens.spans():
            place_N = np.flatnonzero(tokens.counted(start, stop))
            mine = wanted[slice(*np.searchsorted(wanted, (before, before + len(place_N))))] - before
            before += len(place_N)
            selected.append(trace.read(start, stop)[place_N[mine]])
            position.append(place_N[mine] + start)
        return cls((counts_RLE,), trace.top_k, np.concatenate(selected), np.concatenate(position))

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
        theta, experts, found_R = theta_LE.ravel(), theta_LE.shape[1], np.zeros(self.rows)
        for rows, counts in self.blocks():
            size = np.maximum(counts[:, :experts].sum(axis=1, dtype=np.int64) / self.top_k, 1)
            found_R[rows] = np.einsum("rs,s->r", counts.astype(np.float64), theta) / size
        return found_R

    def sums(self, weight_R: np.ndarray) -> np.ndarray:
        """Σ_r w_r counts_r, float64 [L, E]."""
        total = np.zeros(int(np.prod(self.parts[0].shape[1:])))
        for rows, counts in self.blocks():
            total += np.einsum("r,rs->s", weight_R[rows], counts.astype(np.float64))
        return total.reshape(self.parts[0].shape[1:])


def row_counts(trace: Trace, tokens: TokenMap, scope_LE: np.ndarray) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first row, counts int64 [rows, S], counted tokens int64 [rows]) of groups of whole rows, in order."""
    starts_R1, row = tokens.row_starts_R1, 0
    constraints = int(scope_LE.sum())
    most = max(1, BLOCK_VALUES // max(constraints, 1))
    while row < tokens.rows:
        last = int(np.searchsorted(starts_R1, starts_R1[row] + CHUNK_TOKENS, side="right")) - 1
        last = max(row + 1, min(last, row + most))
        start, stop = int(starts_R1[row]), int(starts_R1[last])
        if start == stop:
            yield row, np.zeros((last - row, constraints), np.int64), np.zeros(last - row, np.int64)
        else:
            counted_T = tokens.counted(start, stop)
            local_T = tokens.row_of(start, stop)[counted_T] - row
            counts_RS = count_by_row(scope_LE, trace.read(start, stop)[counted_T], local_T, last - row)
            yield row, counts_RS, np.bincount(local_T, minlength=last - row)
        row = last


def count_by_row(scope_LE: np.ndarray, selected_TLK: np.ndarray, row_T: np.ndarray, rows: int) -> np.ndarray:
    """int64 [rows, S]: how many tokens of each row select each constrained expert."""
    counts = []
    experts = scope_LE.shape[1]
    for layer in np.flatnonzero(scope_LE.any(axis=1)):
        keys = row_T[:, None] * experts + selected_TLK[:, layer, :]
        table_RE = np.bincount(keys.ravel(), minlength=rows * experts).reshape(rows, experts)
        counts.append(table_RE[:, scope_LE[layer]])
    return np.concatenate(counts, axis=1) if counts else np.zeros((rows, 0), np.int64)
