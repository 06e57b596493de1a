"""What a dual is solved on: units (tokens) with features 0 or 1, one per constraint.

Shape legend: T tokens of a chunk, N units, S constraints = experts of ``scope_LE`` in order, L MoE layers, E experts,
K = top-k, G columns of a chunk.

The routing trace is read chunk by chunk, as it lies on disk: memory does not depend on the corpus.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from trace_ds.calibration.tokens import CHUNK_TOKENS, Packing, TokenMap, Trace, in_order

if TYPE_CHECKING:
    import torch

    from trace_ds.parallel.world import World

A = TypeVar("A")


@dataclass(frozen=True)
class Units:
    """The counted tokens of a trace, or selections in memory (``tokens`` None: all count), in blocks: always the same
    ones in the same order.

    Attributes:
        trace: expert indices; scope_LE: bool, the constrained experts.
        multiplicity_N: float64 (None: 1 each), only without ``tokens``.
    """

    trace: Trace
    scope_LE: np.ndarray
    tokens: TokenMap | None = None
    multiplicity_N: np.ndarray | None = None

    @classmethod
    def of(cls, selected_NLK: np.ndarray, scope_LE: np.ndarray, multiplicity_N: np.ndarray | None = None) -> Units:
        return cls(Trace((selected_NLK,)), scope_LE, None, multiplicity_N)

    @property
    def packing(self) -> Packing:
        return self.trace.packing(self.scope_LE.shape[1])

    @property
    def number(self) -> int:
        """How many units there are (that count)."""
        return self.trace.tokens if self.tokens is None else self.tokens.counted_total()

    @property
    def values(self) -> int:
        """How many numbers a unit is described by."""
        return self.trace.layers * self.trace.top_k

    @property
    def blocks(self) -> list[tuple[int, int]]:
        total = self.trace.tokens
        return [(at, min(at + CHUNK_TOKENS, total)) for at in range(0, total, CHUNK_TOKENS)]

    def tables(self, theta_S: np.ndarray) -> np.ndarray:
        """θ in the form that :meth:`Packing.score` looks things up in."""
        value_LE = np.zeros(self.scope_LE.shape)
        value_LE[self.scope_LE] = theta_S
        return self.packing.tables(value_LE)

    def fold(self, columns_GN: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
        """Σ_n w_n feature_s, float64 [S]."""
        return self.packing.sums(columns_GN, weight_N)[self.scope_LE]

    def read(self, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """(selections of the counted tokens, their multiplicities float64 [N] ≥ 0: how many units each stands for)."""
        selected_NLK = self.trace.read(*block)
        if self.tokens is not None:
            selected_NLK = selected_NLK[self.tokens.counted(*block)]
        if self.multiplicity_N is None:
            return selected_NLK, np.ones(len(selected_NLK))
        return selected_NLK, self.multiplicity_N[slice(*block)]

    def sample(self, limit: int, world: World | None = None) -> Units:
        """About ``limit`` units at most, in memory: spread evenly over the corpus, so over its documents; always the
        same ones; each stands for as many as were left out around it. All units where there are no more than that."""
        if self.tokens is None:
            return self if self.number <= limit else self._thinned(limit)
        counted = self.number
        if counted <= limit:
            found = [self.read(block)[0] for block in self.blocks]
            return Units.of(np.concatenate(found), self.scope_LE)
        selected, multiplicity = [], []
        for block in _share(self.blocks, world):
            place_N = np.flatnonzero(self.tokens.counted(*block))
            take = -(-len(place_N) * limit // counted)
            if take:
                jitter = np.random.default_rng(block[0]).random(take)  # one token of each of ``take`` equal stretches
                chosen = np.minimum(((np.arange(take) + jitter) * len(place_N) / take).astype(int), len(place_N) - 1)
                selected.append(self.trace.read(*block)[place_N[chosen]])
                multiplicity.append(np.full(take, len(place_N) / take))
        empty = self.trace.read(0, 0)
        mine = np.concatenate([empty, *selected]), np.concatenate([np.zeros(0), *multiplicity])
        parts = [mine] if world is None else world.gather(mine)
        return Units.of(
            np.concatenate([part[0] for part in parts]), self.scope_LE, np.concatenate([part[1] for part in parts])
        )

    def _thinned(self, limit: int) -> Units:
        """Of selections in memory, ``limit`` evenly spread ones."""
        place_N = ((np.arange(limit) + 0.5) * self.number / limit).astype(int)
        multiplicity_N = np.ones(limit) if self.multiplicity_N is None else self.multiplicity_N[place_N]
        selected_NLK = self.trace.read(0, self.number)[place_N]
        return Units.of(selected_NLK, self.scope_LE, multiplicity_N * (self.number / limit))

    def dense(self, start: int, stop: int) -> torch.Tensor:
        """Features of units ``start … stop`` of a sample, float32 [N, S]."""
        import torch

        selected = torch.from_numpy(self.trace.read(start, stop).astype(np.int64))
        layers, experts = self.scope_LE.shape
        active = torch.zeros(stop - start, layers, experts, dtype=torch.float32).scatter_(2, selected, 1.0)
        return active.reshape(stop - start, -1)[:, torch.from_numpy(self.scope_LE.ravel())]

    def moments(self, weight_N: np.ndarray, threads: int) -> torch.Tensor:
        """Σ_n w_n feature_s feature_s', [S, S], over the units of a sample, in double precision if S is moderate.

        Joint histograms of all pairs of layers: L² K² / 2 additions a token; a dense product takes L² E² / 2.
        """
        import torch

        experts = self.scope_LE.shape[1]
        selected_NLK = self.trace.read(0, len(weight_N))
        top_k, used = selected_NLK.shape[2], np.flatnonzero(self.scope_LE.any(axis=1))
        chosen = [np.flatnonzero(self.scope_LE[layer]) for layer in used]
        starts = np.append(0, np.cumsum([len(c) for c in chosen]))
        size = int(starts[-1])
        result = torch.zeros(size, size, dtype=torch.float64 if size <= DOUBLE_CONSTRAINTS else torch.float32)

        def strip(i: int) -> None:
            total = np.zeros((len(used) - i, experts * experts))
            for at in range(0, len(weight_N), MOMENT_TOKENS):
                block = selected_NLK[at : at + MOMENT_TOKENS].astype(np.int64)
                weight = np.repeat(weight_N[at : at + MOMENT_TOKENS], top_k * top_k)
                first = block[:, used[i], :, None] * experts
                for j in range(i, len(used)):
                    keys = (first + block[:, used[j], None, :]).reshape(-1)
                    total[j - i] += np.bincount(keys, weight, experts * experts)
            for j in range(i, len(used)):
                tile = total[j - i].reshape(experts, experts)[np.ix_(chosen[i], chosen[j])]
                result[starts[i] : starts[i + 1], starts[j] : starts[j + 1]] = torch.from_numpy(tile)
                result[starts[j] : starts[j + 1], starts[i] : starts[i + 1]] = torch.from_numpy(tile.T)

        for _ in in_order(strip, range(len(used)), threads):
            pass
        return result


MOMENT_TOKENS = 4096
DOUBLE_CONSTRAINTS = 8192


@dataclass(frozen=True)
class Point:
    """The dual at one θ: everything one pass over the units gives.

    Attributes:
        theta_S: float64.
        log_mean: log of the mean of exp(θ·a): w = exp(θ·a − log_mean) has mean 1.
        frequency_S: float64, q_s(w).
        ess: effective sample size as a fraction, (Σ w)² / (n Σ w²).
        max_weight: largest w.
    """

    theta_S: np.ndarray
    log_mean: float
    frequency_S: np.ndarray
    ess: float
    max_weight: float


@dataclass(frozen=True)
class _Sums:
    """Σ of multiplicities, of weights, of their squares and of weighted features; weights are exp(score − top)."""

    top: float
    moments: np.ndarray

    def __add__(self, other: _Sums) -> _Sums:
        top = max(self.top, other.top)
        return _Sums(top, self.scaled(top) + other.scaled(top))

    def scaled(self, top: float) -> np.ndarray:
        if self.top == top:
            return self.moments
        factor = np.exp(self.top - top)
        powers = np.full(len(self.moments), factor)
        powers[0], powers[2] = 1.0, factor**2
        return self.moments * powers


def evaluate(units: Units, theta_S: np.ndarray, threads: int = 1, world: World | None = None) -> Point:
    """One exact pass in float64, each rank over its share of the blocks; nothing overflows.

    Raises:
        ValueError: no unit counts.
    """
    tables = units.tables(theta_S)

    def part(block: tuple[int, int]) -> _Sums:
        selected_NLK, multiplicity_N = units.read(block)
        counts = multiplicity_N > 0
        if not counts.any():
            return _Sums(-np.inf, np.zeros(3 + len(theta_S)))
        columns_GN = units.packing.columns(selected_NLK)
        score_N = units.packing.score(columns_GN, tables)
        top = float(score_N[counts].max())
        weight_N = np.exp(np.minimum(score_N - top, 0.0))
        counted_N = weight_N * multiplicity_N
        three = [multiplicity_N.sum(), counted_N.sum(), (counted_N * weight_N).sum()]
        return _Sums(top, np.concatenate([three, units.fold(columns_GN, counted_N)]))

    total = _Sums(-np.inf, np.zeros(3 + len(theta_S)))
    for sums in in_order(part, _share(units.blocks, world), threads):
        if np.isfinite(sums.top):
            total = total + sums if np.isfinite(total.top) else sums
    if world is not None and world.size > 1:
        top = max(world.gather(total.top))
        mine = total.scaled(top) if np.isfinite(total.top) else total.moments
        total = _Sums(top, world.sum_float64(mine))
    seen, weight, square = (float(x) for x in total.moments[:3])
    if not seen:
        raise ValueError("there are no counted tokens to weight")
    return Point(
        theta_S,
        total.top + float(np.log(weight / seen)),
        total.moments[3:] / weight,
        weight**2 / (seen * square),
        seen / weight,
    )


def _share(blocks: Sequence[A], world: World | None) -> Sequence[A]:
    """This rank's stretch of the blocks."""
    if world is None:
        return blocks
    return blocks[len(blocks) * world.rank // world.size : len(blocks) * (world.rank + 1) // world.size]
