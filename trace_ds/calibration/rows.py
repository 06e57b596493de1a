"""Raking of whole rows: the same dual (raking.py) with one weight per row, so that the targets hold for row weights.

Shape legend: R rows with counted tokens, S constraints (layer, expert), T tokens, L MoE layers, E experts, K = top-k.

With w constant in each row, q_s(w) = Σ_r n_r w_r p_rs / Σ_r n_r w_r, where n_r are the row's counted tokens and p_rs
the share of them that selects expert s. Among all such weights those closest to uniform (a row counting n_r times) are
w_r ∝ exp(Σ_s θ_s p_rs): a row's features are shares in place of a token's zeros and ones. Taking the row means of
token weights instead loses much of the effect and can even turn its sign for some expert (our decision).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trace_ds.calibration.selections import in_order
from trace_ds.calibration.tokens import CHUNK_TOKENS, TokenMap, Trace
from trace_ds.calibration.units import DOUBLE_CONSTRAINTS
from trace_ds.run.files import new_spool

if TYPE_CHECKING:
    import torch

    from trace_ds.parallel.world import World

BLOCK_VALUES = 1 << 22
MOMENT_ROWS = 4096


@dataclass(frozen=True)
class Shares:
    """Features of a block of rows, float64 [N, S]."""

    share_NS: np.ndarray

    def score(self, tables: np.ndarray) -> np.ndarray:
        return np.einsum("ns,s->n", self.share_NS, tables)

    def fold(self, weight_N: np.ndarray) -> np.ndarray:
        return np.einsum("n,ns->s", weight_N, self.share_NS)


@dataclass(frozen=True)
class RowStore:
    """:class:`~trace_ds.calibration.units.Units` of rows.

    Attributes:
        scope_LE: bool, the constrained experts.
        counts_RS: unsigned counts of the row's counted tokens that select the expert (may be a memory map).
        sizes_R: float64, n_r > 0; the multiplicities (times ``scale_R``, when rows stand for more or less than one).
    """

    scope_LE: np.ndarray
    counts_RS: np.ndarray
    sizes_R: np.ndarray
    scale_R: np.ndarray | None = None

    @property
    def number(self) -> int:
        return len(self.sizes_R)

    @property
    def values(self) -> int:
        return max(self.counts_RS.shape[1], 1)

    @property
    def binary(self) -> bool:
        return False

    @property
    def blocks(self) -> list[tuple[int, int]]:
        step = max(1, BLOCK_VALUES // self.values)
        return [(at, min(at + step, self.number)) for at in range(0, self.number, step)]

    def tables(self, theta_S: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(theta_S)

    def read(self, block: tuple[int, int]) -> tuple[Shares, np.ndarray]:
        at = slice(*block)
        multiplicity_R = self.sizes_R[at] if self.scale_R is None else self.sizes_R[at] * self.scale_R[at]
        return Shares(self.counts_RS[at] / self.sizes_R[at, None]), multiplicity_R

    def sample(self, limit: int, world: World | None = None) -> RowStore:
        if self.number <= limit:
            return self
        place_R = ((np.arange(limit) + 0.5) * self.number / limit).astype(int)
        scale_R = np.full(limit, self.number / limit) * (1.0 if self.scale_R is None else self.scale_R[place_R])
        return replace(self, counts_RS=self.counts_RS[place_R], sizes_R=self.sizes_R[place_R], scale_R=scale_R)

    def dense(self, start: int, stop: int) -> torch.Tensor:
        import torch

        share_RS = self.counts_RS[start:stop].astype(np.float32)
        share_RS /= self.sizes_R[start:stop, None].astype(np.float32)
        return torch.from_numpy(share_RS)

    def moments(self, weight_N: np.ndarray, threads: int, device: str = "cpu") -> torch.Tensor:
        """Products of blocks of rows, tile by tile."""
        import torch

        size = self.values
        dtype = torch.float64 if size <= DOUBLE_CONSTRAINTS else torch.float32
        result = torch.zeros(size, size, dtype=dtype, device=device)
        tile = max(512, -(-size // 16))
        starts = range(0, size, tile)
        tiles = [(i, j) for i in starts for j in starts if j <= i]
        for at in range(0, len(weight_N), MOMENT_ROWS):
            stop = min(at + MOMENT_ROWS, len(weight_N))
            root_N = torch.from_numpy(np.sqrt(weight_N[at:stop]))
            scaled = (self.dense(at, stop).to(dtype) * root_N[:, None].to(dtype)).to(device)

            def product(place: tuple[int, int], scaled: torch.Tensor = scaled) -> None:
                i, j = place
                result[i : i + tile, j : j + tile] += scaled[:, i : i + tile].T @ scaled[:, j : j + tile]

            for _ in in_order(product, tiles, threads):
                pass
        for i, j in (place for place in tiles if place[0] != place[1]):
            result[j : j + tile, i : i + tile] = result[i : i + tile, j : j + tile].T
        return result.cpu()

    def scores(self, theta_S: np.ndarray) -> np.ndarray:
        """Σ_s θ_s share_s of every row, float64 [R]."""
        return np.concatenate([np.zeros(0), *(self.read(block)[0].score(theta_S) for block in self.blocks)])


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
        counts_RLE = new_spool(spool / "row_selections.bin", np.uint32, (tokens.rows, *everything_LE.shape))
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


def row_sizes(tokens: TokenMap) -> np.ndarray:
    """Counted tokens of every row, int64 [rows]."""
    return tokens.counted_per_row()


def build_row_store(trace: Trace, tokens: TokenMap, scope_LE: np.ndarray, spool: Path) -> RowStore:
    """One pass over the trace; the counts (2 bytes × rows × experts) in a file of ``spool``: memory is O(rows)."""
    sizes_R = row_sizes(tokens)
    sizes_R = sizes_R[sizes_R > 0]
    dtype = np.uint16 if sizes_R.max(initial=0) < 1 << 16 else np.uint32
    shape = (len(sizes_R), int(scope_LE.sum()))
    counts_RS = new_spool(spool / "row_counts.bin", dtype, shape)
    at = 0
    for _, found_RS, found_R in row_counts(trace, tokens, scope_LE):
        found_RS = found_RS[found_R > 0]
        counts_RS[at : at + len(found_RS)] = found_RS
        at += len(found_RS)
    return RowStore(scope_LE, counts_RS, sizes_R.astype(np.float64))


def count_by_row(scope_LE: np.ndarray, selected_TLK: np.ndarray, row_T: np.ndarray, rows: int) -> np.ndarray:
    """int64 [rows, S]: how many tokens of each row select each constrained expert."""
    counts = []
    experts = scope_LE.shape[1]
    for layer in np.flatnonzero(scope_LE.any(axis=1)):
        keys = row_T[:, None] * experts + selected_TLK[:, layer, :]
        table_RE = np.bincount(keys.ravel(), minlength=rows * experts).reshape(rows, experts)
        counts.append(table_RE[:, scope_LE[layer]])
    return np.concatenate(counts, axis=1) if counts else np.zeros((rows, 0), np.int64)
