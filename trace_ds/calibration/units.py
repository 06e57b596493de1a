"""The units (tokens) that raking's dual is solved on, with features 0 or 1, one per constraint.

Shape legend: T tokens of a chunk, N units, S constraints = experts of ``scope_LE`` in order, L MoE layers, E experts,
K = top-k, G columns of a chunk.

The routing trace is read chunk by chunk, as it lies on disk: memory does not depend on the corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_ds.calibration.tokens import Packing, Trace, in_order
from trace_ds.corpora.dataset import CHUNK_TOKENS, TokenMap


@dataclass(frozen=True)
class Units:
    """The counted tokens of a trace, or selections in memory (``tokens`` None: all count), in fixed blocks.

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
        return len(self.trace) if self.tokens is None else self.tokens.counted_total()

    @property
    def blocks(self) -> list[tuple[int, int]]:
        total = len(self.trace)
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
        selected_NLK = self.trace[slice(*block)]
        if self.tokens is not None:
            selected_NLK = selected_NLK[self.tokens.counted(*block)]
        if self.multiplicity_N is None:
            return selected_NLK, np.ones(len(selected_NLK))
        return selected_NLK, self.multiplicity_N[slice(*block)]

    def sample(self, limit: int) -> Units:
        """At most about ``limit`` units in memory, spread evenly over the corpus and so over its documents; each stands
        for those left out around it. All units where there are no more, or where they are in memory already."""
        if self.tokens is None:
            return self
        counted = self.number
        if counted <= limit:
            return Units.of(np.concatenate([self.read(block)[0] for block in self.blocks]), self.scope_LE)
        selected, multiplicity = [], []
        for block in self.blocks:
            place_N = np.flatnonzero(self.tokens.counted(*block))
            take = -(-len(place_N) * limit // counted)
            if take:
                jitter = np.random.default_rng(block[0]).random(take)  # one token of each of ``take`` equal stretches
                chosen = np.minimum(((np.arange(take) + jitter) * len(place_N) / take).astype(int), len(place_N) - 1)
                selected.append(self.trace[slice(*block)][place_N[chosen]])
                multiplicity.append(np.full(take, len(place_N) / take))
        return Units.of(np.concatenate(selected), self.scope_LE, np.concatenate(multiplicity))


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
        # the number of units is not scaled, Σ w and the features once, Σ w² twice
        powers = np.full(len(self.moments), factor)
        powers[0], powers[2] = 1.0, factor**2
        return self.moments * powers


def evaluate(units: Units, theta_S: np.ndarray, threads: int = 1) -> Point:
    """One exact pass in float64; nothing overflows.

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
        # units that do not count may score above the top, which is that of the others: no overflow before their 0
        weight_N = np.exp(np.minimum(score_N - top, 0.0))
        counted_N = weight_N * multiplicity_N
        three = [multiplicity_N.sum(), counted_N.sum(), (counted_N * weight_N).sum()]
        return _Sums(top, np.concatenate([three, units.fold(columns_GN, counted_N)]))

    total = _Sums(-np.inf, np.zeros(3 + len(theta_S)))
    for sums in in_order(part, units.blocks, threads):
        if np.isfinite(sums.top):
            total = total + sums if np.isfinite(total.top) else sums
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
