"""Raking of whole rows: the same dual (raking.py) with one weight per row, so that the targets hold for row weights.

Shape legend: R rows with counted tokens, S constraints (layer, expert), T tokens, L MoE layers, E experts, K = top-k.

With w constant in each row, q_s(w) = Σ_r n_r w_r p_rs / Σ_r n_r w_r, where n_r are the row's counted tokens and p_rs
the share of them that selects expert s. Among all such weights those closest to uniform (a row counting n_r times) are
w_r ∝ exp(Σ_s θ_s p_rs): a row's features are shares in place of a token's zeros and ones. Taking the row means of
token weights instead loses much of the effect and can even turn its sign for some expert (our decision).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_ds.calibration.patterns import MAX_UNIQUE_PATTERNS, Encoding
from trace_ds.calibration.raking import single_thread
from trace_ds.calibration.tokens import CHUNK_TOKENS, TokenMap, Trace
from trace_ds.run.files import new_spool

BLOCK_VALUES = 1 << 22
SAMPLE_BYTES = 1 << 28  # 65,536 rows of 512 experts in float64: what Newton needs whole


@dataclass(frozen=True)
class RowStore:
    """A :class:`~trace_ds.calibration.patterns.Store` of rows.

    Attributes:
        counts_RS: unsigned counts of the row's counted tokens that select the expert (may be a memory map).
        sizes_R: float64, n_r > 0; the multiplicities (times ``scale_R``, when rows stand for more or less than one).
    """

    encoding: Encoding
    counts_RS: np.ndarray
    sizes_R: np.ndarray
    scale_R: np.ndarray | None = None

    @property
    def multiplicity_R(self) -> np.ndarray:
        return self.sizes_R if self.scale_R is None else self.sizes_R * self.scale_R

    @property
    def tokens(self) -> int:
        return round(float(self.multiplicity_R.sum()))

    @property
    def exact(self) -> bool:
        return len(self.sizes_R) <= MAX_UNIQUE_PATTERNS

    def blocks(self) -> Iterator[slice]:
        step = max(1, BLOCK_VALUES // max(self.encoding.constraints, 1))
        yield from (slice(at, at + step) for at in range(0, len(self.sizes_R), step))

    def scored(
        self, theta_S: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, Callable[[np.ndarray], np.ndarray]]]:
        import torch

        multiplicity_R, theta = self.multiplicity_R, torch.from_numpy(np.ascontiguousarray(theta_S))
        for block in self.blocks():
            share = torch.from_numpy(self.counts_RS[block] / self.sizes_R[block, None])

            def fold(weights_R: np.ndarray, share: torch.Tensor = share) -> np.ndarray:
                with single_thread():
                    return (torch.from_numpy(weights_R) @ share).numpy()

            with single_thread():
                score_R = (share @ theta).numpy()
            yield score_R, multiplicity_R[block], fold

    def sample(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`~trace_ds.calibration.patterns.Store`. Whole and in float64 where that takes at most
        :data:`SAMPLE_BYTES`; else evenly spread rows in float32, as many as that holds: they only steer the solver."""
        rows, constraints = len(self.sizes_R), max(self.encoding.constraints, 1)
        if self.exact and rows * constraints * 8 <= SAMPLE_BYTES:
            return self.counts_RS / self.sizes_R[:, None], self.multiplicity_R
        step = max(-(-rows // max(min(limit, SAMPLE_BYTES // (4 * constraints)), 1)), 1)
        share_RS = self.counts_RS[::step].astype(np.float32)
        share_RS /= self.sizes_R[::step, None].astype(np.float32)
        return share_RS, self.multiplicity_R[::step]


def row_counts(trace: Trace, tokens: TokenMap, encoding: Encoding) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Yield (first row, counts int64 [rows, S], counted tokens int64 [rows]) of groups of whole rows, in order."""
    starts_R1, row = tokens.row_starts_R1, 0
    most = max(1, BLOCK_VALUES // max(encoding.constraints, 1))
    while row < tokens.rows:
        last = int(np.searchsorted(starts_R1, starts_R1[row] + CHUNK_TOKENS, side="right")) - 1
        last = max(row + 1, min(last, row + most))
        start, stop = int(starts_R1[row]), int(starts_R1[last])
        if start == stop:
            yield row, np.zeros((last - row, encoding.constraints), np.int64), np.zeros(last - row, np.int64)
        else:
            counted_T = tokens.counted(start, stop)
            local_T = tokens.row_of(start, stop)[counted_T] - row
            counts_RS = count_by_row(encoding, trace.read(start, stop)[counted_T], local_T, last - row)
            yield row, counts_RS, np.bincount(local_T, minlength=last - row)
        row = last


def row_sizes(tokens: TokenMap) -> np.ndarray:
    """Counted tokens of every row, int64 [rows]."""
    return tokens.counted_per_row()


def build_row_store(trace: Trace, tokens: TokenMap, constrained_LE: np.ndarray, spool: Path) -> RowStore:
    """One pass over the trace; the counts (2 bytes × rows × experts) in a file of ``spool``: memory is O(rows)."""
    encoding = Encoding.choose(constrained_LE, trace.top_k)
    sizes_R = row_sizes(tokens)
    sizes_R = sizes_R[sizes_R > 0]
    dtype = np.uint16 if sizes_R.max(initial=0) < 1 << 16 else np.uint32
    shape = (len(sizes_R), encoding.constraints)
    counts_RS = new_spool(spool / "row_counts.bin", dtype, shape)
    at = 0
    for _, found_RS, found_R in row_counts(trace, tokens, encoding):
        found_RS = found_RS[found_R > 0]
        counts_RS[at : at + len(found_RS)] = found_RS
        at += len(found_RS)
    return RowStore(encoding, counts_RS, sizes_R.astype(np.float64))


def count_by_row(encoding: Encoding, selected_TLK: np.ndarray, row_T: np.ndarray, rows: int) -> np.ndarray:
    """int64 [rows, S]: how many tokens of each row select each constrained expert."""
    counts_RS = np.empty((rows, encoding.constraints), np.int64)
    experts = encoding.experts
    for layer in encoding.slot_layers:
        keys = row_T[:, None] * experts + selected_TLK[:, layer, :]
        table_RE = np.bincount(keys.ravel(), minlength=rows * experts).reshape(rows, experts)
        members = np.nonzero(encoding.layer_S == layer)[0]
        counts_RS[:, members] = table_RE[:, encoding.expert_S[members]]
    return counts_RS
