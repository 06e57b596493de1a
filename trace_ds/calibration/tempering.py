"""Tempering: how far raking may go before a handful of tokens carries everything.

Shape legend: S constraints (layer, expert).

Exact matching of many experts can leave an effective sample size (Σw)²/(TΣw²) far below one per cent. Targets are
therefore (1−λ) retain + λ wanted, with the largest λ in [0, 1] that keeps the effective sample size at or above a floor
(our decision).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_ds.calibration.patterns import Store
from trace_ds.calibration.raking import Metric, Point, Solution, evaluate, solve


@dataclass(frozen=True)
class Tempered:
    """The result of :func:`temper`: ``strength`` is λ, ``solution`` the raking at (1−λ) p + λ target.

    ``iterations`` counts those of all the duals solved on the way. ``blocked_S``: None when the floor (or 1) decides λ;
    where already a λ just above it cannot be met by any weights, the θ at which that solve gave up: it runs off in
    the direction of the experts that stand in the way.
    """

    strength: float
    solution: Solution
    iterations: int
    blocked_S: np.ndarray | None = None


def temper(
    store: Store,
    retain_S: np.ndarray,
    target_S: np.ndarray,
    ess_floor: float,
    *,
    precision: float = 1e-4,
) -> Tempered:
    """The largest λ in [0, 1] whose raking to (1−λ) retain + λ target keeps the effective sample size ≥ the floor.

    ESS falls as λ grows (the KL of the solution grows with λ and bounds it from both sides only loosely, so this is
    checked at every step by bracketing, not assumed). To second order 1/ESS − 1 = λ² d'C⁻¹d with d = target − retain:
    this gives the first guess, and a secant on √(1/ESS − 1), which is nearly linear in λ, the next ones. A λ whose
    targets cannot be met counts as below the floor. Deterministic.
    """
    shift_S = np.asarray(target_S, np.float64) - retain_S
    origin = evaluate(store, np.zeros(len(shift_S)))
    nothing = Solution(origin, np.asarray(retain_S, np.float64), 0, 0.0, True)
    if not len(shift_S) or not np.abs(shift_S).max() > 0:
        return Tempered(1.0, nothing, 0)
    if ess_floor >= 1.0:
        return Tempered(0.0, nothing, 0)
    metric = Metric(store, origin)
    goal = float(np.sqrt(1.0 / ess_floor - 1.0))
    solved: list[tuple[float, Point]] = [(0.0, origin)]
    iterations, blocked_S = 0, None

    def attempt(strength: float, tolerance: float | None) -> tuple[Solution, float | None]:
        """(solution, √(1/ESS − 1) or None when the targets cannot be met), from the line through the last two."""
        nonlocal iterations, blocked_S
        start = origin
        if len(solved) > 1:
            (a, first), (b, second) = solved[-2:]
            start = evaluate(store, second.theta_S + (strength - b) / (b - a) * (second.theta_S - first.theta_S))
        found = solve(
            store,
            retain_S + strength * shift_S,
            start=start,
            metric=metric,
            tolerance=tolerance,
            least_ess=ess_floor / 20,
        )
        iterations += found.iterations
        if not found.converged:
            blocked_S = found.point.theta_S
            metric.rebuild(solved[-1][1])
            return found, None
        if solved[-1][0] == strength:
            solved.pop()  # the line through two solutions needs two different strengths
        solved.append((strength, found.point))
        if len(solved) == 2 and not metric.exact:
            metric.rebuild(found.point)
        return found, float(np.sqrt(max(1.0 / found.point.ess - 1.0, 0.0)))

    # The search needs the size of the weights to 1e-4 only; the last solve is to full accuracy.
    rough = None if metric.exact else 1e-6
    curvature = float((shift_S * metric(shift_S)).sum())
    low, low_value, high, high_value = 0.0, 0.0, None, None
    guess = min(1.0, goal / np.sqrt(curvature)) if curvature > 0 else 1.0
    for number in range(60):
        _, value = attempt(guess, rough)
        if value is not None and value <= goal:
            low, low_value = guess, value
        else:
            high, high_value = guess, value
        if low == 1.0 or (high is not None and high - low <= precision * high) or low_value >= goal * (1 - precision):
            break
        if high is None:
            guess = min(1.0, guess * max(1.05, (1 - precision / 2) * goal / max(low_value, 1e-12)))
        elif high_value is None:
            guess = (low + high) / 2.0
        else:
            slope = (high_value - low_value) / (high - low)
            inner = low + (goal * (1 - precision / 2) - low_value) / slope
            margin = 0.05 * (high - low) if number > 8 else 0.0
            guess = float(np.clip(inner, low + margin, high - margin))
            if not low < guess < high:
                guess = (low + high) / 2.0
    if high is None or high_value is not None or low_value >= goal * (1 - precision):
        blocked_S = None
    unmet_S = blocked_S
    for number in range(20):
        final, value = attempt(low, None) if low > 0 else (nothing, 0.0)
        if value is not None and value <= goal:
            return Tempered(low, final, iterations, unmet_S)
        low *= 1.0 - min(0.5, precision * 2.0**number)  # a little back; more if that was not enough
    return Tempered(0.0, nothing, iterations, unmet_S)
