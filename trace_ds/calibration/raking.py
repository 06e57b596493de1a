"""Raking (entropy balancing): the least change of the token weights that moves expert frequencies to their targets.

Shape legend: T tokens, S constraints (layer, expert), L MoE layers, E experts.

Among all weights w ≥ 0 with mean 1, take the one closest to uniform in KL that satisfies q_s(w) = target_s, where
``q_s(w) = Σ_t w_t a_s(t) / Σ_t w_t``. Its dual is smooth, convex and has one unknown per constraint:

    minimise  D(θ) = log mean_t exp(Σ_s θ_s a_s(t)) − θ·target,     w_t = exp(Σ_s θ_s a_s(t)) / mean,
    gradient  q(θ) − target,    Hessian = covariance of a under w

(Deming & Stephan 1940; Deville & Särndal 1992, "raking ratio"; Hainmueller 2012, "entropy balancing"; that TRACE's
weights are made so is our decision). For one constraint w is target/p where active and (1−target)/(1−p) elsewhere.

Solver: with few de-duplicated patterns, Newton with the full Hessian; otherwise L-BFGS whose initial metric is the
Hessian of a fixed sample of tokens with its diagonal corrected to the exact one. Function and gradient are always
exact (all tokens), so the sample only affects the speed. Linear algebra runs on one thread: the result does not depend
on the number of cores.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from trace_ds.calibration.patterns import Store

SAMPLE_TOKENS = 1 << 16
NEWTON_CONSTRAINTS = 512
DENSE_CONSTRAINTS = 1536
LARGEST_THETA = 200.0
MEMORY_PAIRS = 12


@contextlib.contextmanager
def single_thread() -> Iterator[None]:
    """Torch's linear algebra on one thread inside the block (restored afterwards): sums in one fixed order."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Point:
    """The dual at one θ: everything one pass over the patterns gives.

    Attributes:
        theta_S: float64.
        log_mean: log of the mean of exp(θ·a): w_t = exp(θ·a(t) − log_mean) has mean 1.
        frequency_S: float64, q_s(w).
        ess: effective sample size as a fraction, (Σ w)² / (T Σ w²).
        max_weight: largest w.
    """

    theta_S: np.ndarray
    log_mean: float
    frequency_S: np.ndarray
    ess: float
    max_weight: float


@dataclass(frozen=True)
class Solution:
    """A solved dual: ``point`` and how it was reached; ``error`` = max_s |q_s − target_s|."""

    point: Point
    target_S: np.ndarray
    iterations: int
    error: float
    converged: bool


def evaluate(store: Store, theta_S: np.ndarray) -> Point:
    """One exact pass in float64; the exponentials are rescaled by the running maximum, so nothing overflows."""
    top, total, square, seen = -np.inf, 0.0, 0.0, 0.0
    sums_S = np.zeros(len(theta_S))
    for score_T, multiplicity_T, fold in store.scored(theta_S):
        block_top = float(score_T.max())
        if block_top > top:
            factor = np.exp(top - block_top)
            total, square, sums_S, top = total * factor, square * factor**2, sums_S * factor, block_top
        weight_T = np.exp(score_T - top)
        counted_T = weight_T if multiplicity_T is None else weight_T * multiplicity_T
        total += float(counted_T.sum())
        square += float((counted_T * weight_T).sum())
        seen += float(len(score_T)) if multiplicity_T is None else float(multiplicity_T.sum())
        sums_S += fold(counted_T)
    if not seen:
        raise ValueError("there are no counted tokens to weight")
    return Point(theta_S, top + float(np.log(total / seen)), sums_S / total, total**2 / (seen * square), seen / total)


def covariance(
    active_NS: np.ndarray, multiplicity_N: np.ndarray, theta_S: np.ndarray, *, single: bool = False
) -> np.ndarray:
    """float64 [S, S]: covariance of the activations under the weights of θ; ``single``: products in float32."""
    import torch

    kind = torch.float32 if single else torch.float64
    step = max(1, (1 << 23) // max(active_NS.shape[1], 1))
    with single_thread():
        theta = torch.from_numpy(theta_S).to(kind)
        blocks = [torch.from_numpy(active_NS[i : i + step]).to(kind) for i in range(0, len(active_NS), step)]
        score_N = torch.cat([block @ theta for block in blocks]).to(torch.float64)
        weight_N = torch.exp(score_N - score_N.max()) * torch.from_numpy(multiplicity_N)
        weight_N /= weight_N.sum()
        weights = weight_N.to(kind).split(step)
        mean_S = sum(weight @ block for block, weight in zip(blocks, weights, strict=True))
        result = torch.zeros(len(theta), len(theta), dtype=torch.float64)
        for block, weight in zip(blocks, weights, strict=True):
            centred = (block - mean_S) * weight.sqrt()[:, None]
            result += (centred.T @ centred).to(torch.float64)
    return result.numpy()


def eigen(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues (ascending) and vectors (columns) of a symmetric float64 matrix."""
    import torch

    with single_thread():
        values, vectors = torch.linalg.eigh(torch.from_numpy(matrix))
    return values.numpy(), vectors.numpy()


class Metric:
    """Approximate inverse Hessian: a base (dense up to :data:`DENSE_CONSTRAINTS`, else one block per layer) and, unless
    the base is the exact Hessian, L-BFGS pairs on top. Kept from one λ to the next."""

    def __init__(self, store: Store, point: Point) -> None:
        self.exact = store.exact and store.encoding.constraints <= NEWTON_CONSTRAINTS
        self._active_NS, self._multiplicity_N = store.sample(SAMPLE_TOKENS)
        layer_S = store.encoding.layer_S
        if len(layer_S) <= DENSE_CONSTRAINTS:
            self._groups = [np.arange(len(layer_S))]
        else:
            self._groups = [np.nonzero(layer_S == layer)[0] for layer in np.unique(layer_S)]
        self.rebuild(point)

    def rebuild(self, point: Point) -> None:
        """The Hessian at ``point``; singular directions (a layer's experts sum to K) are pseudo-inverted."""
        self._inverses: list[np.ndarray] = []
        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        for group in self._groups:
            hessian = covariance(
                self._active_NS[:, group], self._multiplicity_N, point.theta_S[group], single=not self.exact
            )
            if not self.exact:
                variance = (point.frequency_S * (1.0 - point.frequency_S))[group]
                missing = np.maximum(variance - np.diag(hessian), 0.0)
                hessian += np.diag(missing + 1e-6 * max(float(variance.max(initial=0.0)), 1e-30))
            values, vectors = eigen(hessian)
            keep = values > 1e-13 * max(float(values.max(initial=0.0)), 1e-300)
            self._inverses.append((vectors[:, keep] / values[keep]) @ vectors[:, keep].T)

    def moved(self, old: Point, new: Point) -> None:
        """Learn from an accepted step: the Hessian at the new point, or one more pair."""
        if self.exact:
            self.rebuild(new)
            return
        step, change = new.theta_S - old.theta_S, new.frequency_S - old.frequency_S
        if float((step * change).sum()) > 0:
            self._pairs = [*self._pairs, (step, change)][-MEMORY_PAIRS:]

    def __call__(self, gradient_S: np.ndarray) -> np.ndarray:
        """The (quasi-)Newton direction, without the minus sign."""
        return _two_loop(gradient_S, self._pairs, self._base)

    def _base(self, gradient_S: np.ndarray) -> np.ndarray:
        result = np.zeros_like(gradient_S)
        for group, inverse in zip(self._groups, self._inverses, strict=True):
            result[group] = np.einsum("ij,j->i", inverse, gradient_S[group])
        return result


def _two_loop(
    gradient: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    metric: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """L-BFGS direction (Nocedal & Wright, *Numerical Optimization*, algorithm 7.4), without the minus sign."""
    q, alphas = gradient.copy(), []
    for step, change in reversed(pairs):
        alpha = float((step * q).sum() / (step * change).sum())
        q -= alpha * change
        alphas.append(alpha)
    r = metric(q)
    for (step, change), alpha in zip(pairs, reversed(alphas), strict=True):
        r += step * (alpha - float((change * r).sum() / (step * change).sum()))
    return r


def solve(
    store: Store,
    target_S: np.ndarray,
    *,
    start: Point | None = None,
    metric: Metric | None = None,
    tolerance: float | None = None,
    least_ess: float = 0.0,
    max_iterations: int = 200,
) -> Solution:
    """Minimise the dual at fixed targets.

    ``converged`` is False when the targets cannot be met: some θ runs beyond :data:`LARGEST_THETA`, the error stops
    falling above 1e-7, or the effective sample size drops below ``least_ess`` (no point in going on).

    Default tolerance on max |q − target|: for de-duplicated patterns (Newton) as far as rounding allows, else 1e-8.
    """
    target_S = np.asarray(target_S, np.float64)
    point = start if start is not None else evaluate(store, np.zeros(len(target_S)))
    metric = metric or Metric(store, point)
    goal = (0.0 if metric.exact else 1e-8) if tolerance is None else tolerance
    iterations = 0

    def error(at: Point) -> float:
        return float(np.abs(at.frequency_S - target_S).max(initial=0.0))

    def dual(at: Point) -> float:
        return at.log_mean - float((at.theta_S * target_S).sum())

    while error(point) > goal and iterations < max_iterations:
        iterations += 1
        gradient_S = point.frequency_S - target_S
        direction_S = metric(gradient_S)
        slope = float((gradient_S * direction_S).sum())
        step, found = min(1.0, 20.0 / max(float(np.abs(direction_S).max()), 1e-300)), None
        for _ in range(30):
            trial = evaluate(store, point.theta_S - step * direction_S)
            # Near the optimum the dual changes by less than its rounding error: then the gradient decides.
            flat = slope < 1e-11 * (1.0 + abs(dual(point)))
            better = error(trial) < (0.5 if metric.exact else 0.95) * error(point)
            if better if flat else dual(trial) <= dual(point) - 1e-4 * step * slope:
                found = trial
                break
            if flat:
                break
            step /= 2.0
        if found is None or float(np.abs(found.theta_S).max()) > LARGEST_THETA or found.ess < least_ess:
            break
        metric.moved(point, found)
        point = found
    return Solution(point, target_S, iterations, error(point), error(point) <= max(goal, 1e-7))
