"""Raking (entropy balancing): the least change of the weights that moves expert frequencies towards their targets.

Shape legend: N units (tokens), S constraints (layer, expert).

a_s is 1 where a unit selects the expert of constraint s, else 0; p = p^R and p^F are the frequencies of the retain and
the forget corpus. Among all weights w ≥ 0 with mean 1, take the one closest to uniform in KL whose frequencies
``q_s(w) = Σ w a_s / Σ w`` are the targets ``t(λ) = p^R + λ (p^F − p^R)``. The dual is convex, with one unknown per
target:

    minimise  D(θ) = log mean exp(θ·a) − θ·t(λ) + ½ ρ Σ_s v_s θ_s²   over |θ_s| ≤ LARGEST_THETA,     w ∝ exp(θ·a)

    gradient  q(θ) − t(λ) + ρ v θ,      v_s = p_s (1 − p_s)

(Deming & Stephan 1940; Deville & Särndal 1992, "raking ratio"; Hainmueller 2012, "entropy balancing"; using it for
TRACE is our decision). λ is the largest in [0, 1] that keeps the effective sample size, as a share (Σw)²/(NΣw²) of N,
at or above a floor. Some targets cannot be reached by any weights (:data:`REASONS`). :func:`feasible_targets` replaces
those that can be identified before solving; for the rest, two limits protect the solution at any number of tokens:

* the *bounds*: an expert can change a weight by at most the factor exp(12). When targets conflict (identical experts
  with different targets, say) some experts stop at the bound and are reported as tied; λ is not lowered for them;
* the *ridge* ρ = Σ variances of the frequencies (clustered by document; by token if at_floor is only one) / Σ v, times
  min(1, S/N)². Targets are missed by ρ v θ: far below the standard errors if N is far above S, comparable to them
  where exact matching would fit the weights to noise.

**Solver.** L-BFGS-B (scipy) in the variable θ√v, on a sample of at least 2^18 units held in memory, inside a search
for λ along d(λ) = √log(1/ESS), which is nearly proportional to λ. On a larger corpus an exact pass measures by how
much frequencies and effective sample size differ from the sample's; the sample's targets and floor are shifted by
that and solved again (Shamir, Srebro & Zhang 2014, "DANE"), until the exact pass meets the tolerance.

**Converged** means: off the bounds, the gradient of every expert over all units is within :data:`TOLERANCE`, or a
thousandth of the standard error of its frequency where that is more; the floor is met; and λ is 1 or the effective
sample size is at the floor. Sums are in float64 over fixed blocks in a fixed order, so the result
does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.calibration.units import Point, Units, evaluate

REASONS = {  # why a target had to move
    "never": "no retain token selects it",
    "always": "every retain token selects it",
    "rare": "its target raises its retain frequency, or the share of tokens that do not select it, by more than the "
    "factor calibration.clip",
    "tied": "its target conflicts with other experts' targets",  # seen once the dual is solved
}
LARGEST_THETA = 12.0
TOLERANCE, STANDARD_ERRORS = 1e-6, 1e-3
ROUGH, FINE = 1e-4, 1e-7  # tolerances of the gradient over √v: while λ is far off; of the last solve
FLOOR_WINDOW = 2e-4  # relative excess of the effective sample size over the floor that the search accepts
LEAST_RIDGE = 1e-9
SAMPLE_UNITS, SAMPLE_UNITS_PER_CONSTRAINT = 1 << 18, 64
MAX_LBFGS_ITERATIONS = 2000  # iterations and evaluations of one L-BFGS-B minimisation
MAX_LAMBDAS = 60  # values of λ tried on the sample
MAX_EXACT_PASSES = 30  # exact passes over a corpus larger than the sample


def feasible_targets(
    scope_LE: np.ndarray, retain_S: np.ndarray, forget_S: np.ndarray, clip: float
) -> tuple[np.ndarray, list[str]]:
    """Return the targets without obvious conflicts, and for each the key of REASONS why it was changed, or ''.

    In a layer all of whose experts are constrained, one common shift of the log-odds of the experts without a reason
    makes the targets sum to K (experts per token) again: the Bernoulli-KL projection on Σ = K. Our decision.
    """
    target_S = np.asarray(forget_S, np.float64).copy()
    reason_S = [""] * len(target_S)

    def fix(mask_S: np.ndarray, value_S: np.ndarray, reason: str) -> None:
        for s in np.nonzero(mask_S)[0]:
            target_S[s], reason_S[s] = value_S[s], reason

    with np.errstate(invalid="ignore"):
        fix(forget_S > clip * retain_S, clip * retain_S, "rare")
        fix(1 - forget_S > clip * (1 - retain_S), 1 - clip * (1 - retain_S), "rare")
    fix((retain_S <= 0) & (forget_S > 0), np.zeros_like(target_S), "never")
    fix((retain_S >= 1) & (forget_S < 1), np.ones_like(target_S), "always")
    layer_S = np.nonzero(scope_LE)[0]
    for layer in np.flatnonzero(scope_LE.all(axis=1)):
        members = np.nonzero(layer_S == layer)[0]
        free = members[[reason_S[s] == "" and 0 < target_S[s] < 1 for s in members]]
        total = float(retain_S[members].sum() - target_S[members].sum() + target_S[free].sum())
        # frequencies lie between 0 and 1, so no shift reaches a sum outside 0 … len(free)
        if abs(total - float(target_S[free].sum())) > 1e-12 and 0 < total < len(free):
            target_S[free] = _shift_log_odds(target_S[free], total)
    return np.clip(target_S, 0.0, 1.0), reason_S


def _shift_log_odds(target: np.ndarray, total: float) -> np.ndarray:
    """The targets with one common constant added to their log-odds so that they sum to ``total`` (bisection)."""
    odds = np.log(target) - np.log1p(-target)
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        if float((1.0 / (1.0 + np.exp(-(odds + middle)))).sum()) < total:
            low = middle
        else:
            high = middle
    return 1.0 / (1.0 + np.exp(-(odds + (low + high) / 2)))


@dataclass(frozen=True)
class Problem:
    """Targets t(λ) = ``retain_S`` + λ ``shift_S`` for the experts of ``scope_LE``; ``ridge`` is e."""

    scope_LE: np.ndarray
    retain_S: np.ndarray
    shift_S: np.ndarray
    ridge: float

    @property
    def variance_S(self) -> np.ndarray:
        """Variance of an expert's activation at a token; 0 where it is constant, and θ then stays 0."""
        return _variance(self.retain_S)

    def residual_S(self, point: Point, lambda_: float) -> np.ndarray:
        """Absolute gradient of each expert; 0 where θ is at its bound."""
        gradient_S = point.frequency_S - self.retain_S - lambda_ * self.shift_S
        gradient_S += self.ridge * self.variance_S * point.theta_S
        return np.where((self.variance_S > 0) & ~at_bound(point.theta_S), np.abs(gradient_S), 0.0)


def at_bound(theta_S: np.ndarray) -> np.ndarray:
    return np.abs(theta_S) > LARGEST_THETA - 1e-9


def _variance(frequency_S: np.ndarray) -> np.ndarray:
    variance_S = frequency_S * (1.0 - frequency_S)
    return np.where(variance_S > 1e-15, variance_S, 0.0)


def balanced(scope_LE: np.ndarray, change_S: np.ndarray, variance_S: np.ndarray) -> np.ndarray:
    """Make the changes of each fully constrained layer sum to 0, since its frequencies always sum to K: the excess is
    spread over its experts in proportion to their variance."""
    layer_S = np.nonzero(scope_LE)[0]
    excess_L, variance_L = (np.bincount(layer_S, x_S, len(scope_LE)) for x_S in (change_S, variance_S))
    constrained_L = scope_LE.all(axis=1) & (variance_L > 0)
    share_L = np.where(constrained_L, excess_L / np.where(variance_L > 0, variance_L, 1.0), 0.0)
    return change_S - variance_S * share_L[layer_S]


class SampleDual:
    """The dual on a sample, solved in place of the dual over all units.

    Each expert's change is scaled by the ratio of its variances in the sample and in the corpus, so that an
    expert selected by few sampled tokens gets a feasible target. An expert selected by none or all of them is treated
    as independent of the others, with the variance it has in the corpus.
    """

    def __init__(self, sample: Units, problem: Problem, threads: int, log: Callable[[str], None]) -> None:
        self._sample, self._problem, self._threads, self._log = sample, problem, threads, log
        start_S = evaluate(sample, np.zeros(len(problem.retain_S)), threads).frequency_S
        variance_S, sampled_S = problem.variance_S, _variance(start_S)
        self._unseen_S = (sampled_S == 0) & (variance_S > 0)
        self._variance_S = np.where(self._unseen_S, variance_S, np.where(variance_S > 0, sampled_S, 0.0))
        self._ratio_S = np.where(variance_S > 0, self._variance_S / np.where(variance_S > 0, variance_S, 1.0), 0.0)
        self._base_S = np.where(self._unseen_S, problem.retain_S, start_S)
        self._shift_S = balanced(problem.scope_LE, problem.shift_S * self._ratio_S, self._variance_S)

    def first_lambda(self, distance: float) -> float:
        """λ at which u would be ``distance`` for independent experts and normally distributed θ·a."""
        used_S = self._variance_S > 0
        slope = float(np.sqrt((self._shift_S[used_S] ** 2 / self._variance_S[used_S]).sum()))
        return min(1.0, distance / slope) if slope > 0 else 1.0

    def at(self, theta_S: np.ndarray) -> Point:
        point, unseen_S = evaluate(self._sample, theta_S, self._threads), self._unseen_S
        if not unseen_S.any():
            return point
        p_S, factor_S = self._problem.retain_S[unseen_S], np.exp(theta_S[unseen_S])
        mean_S = 1.0 + p_S * (factor_S - 1.0)
        frequency_S = point.frequency_S.copy()
        frequency_S[unseen_S] = p_S * factor_S / mean_S
        log_mean = point.log_mean + float(np.log(mean_S).sum())
        return Point(theta_S, log_mean, frequency_S, point.ess, point.max_weight)

    def minimize(self, theta_S: np.ndarray, lambda_: float, tolerance: float) -> Point:
        """Minimise the dual at one λ (``lambda_``), starting at ``theta_S``."""
        from scipy import optimize

        target_S, variance_S, ridge = self._base_S + lambda_ * self._shift_S, self._variance_S, self._problem.ridge
        free_S = variance_S > 0
        # In θ√v the diagonal of the Hessian at θ = 0 is about 1 for every expert, as L-BFGS's first step assumes.
        scale_S = np.sqrt(np.where(free_S, variance_S, 1.0))
        last: list[Point] = []

        def dual(scaled_S: np.ndarray) -> tuple[float, np.ndarray]:
            theta_S = scaled_S / scale_S
            point = self.at(theta_S)
            last[:] = [point]
            penalty_S = ridge * variance_S * theta_S
            value = point.log_mean - float(theta_S @ target_S) + 0.5 * float(theta_S @ penalty_S)
            return value, np.where(free_S, point.frequency_S - target_S + penalty_S, 0.0) / scale_S

        def report(_: np.ndarray) -> None:
            self._log(f"lambda {lambda_:.4f}, effective sample size {last[0].ess:.4f}")

        box_S = np.where(free_S, LARGEST_THETA * scale_S, 0.0)
        solution = optimize.minimize(
            dual,
            np.clip(theta_S * scale_S, -box_S, box_S),
            jac=True,
            method="L-BFGS-B",
            bounds=optimize.Bounds(-box_S, box_S),
            callback=report,
            # stop on the gradient alone: near the minimum, changes of D are below the precision of float64
            options={
                "maxcor": 20,
                "maxiter": MAX_LBFGS_ITERATIONS,
                "maxfun": MAX_LBFGS_ITERATIONS,
                "ftol": 0.0,
                "gtol": tolerance,
            },
        )
        theta_S = solution.x / scale_S
        return last[0] if np.array_equal(last[0].theta_S, theta_S) else self.at(theta_S)

    def temper(self, floor: float, theta_S: np.ndarray, lambda_: float) -> tuple[Point, float]:
        """Return the minimum at the largest λ that keeps the floor, and that λ; ``theta_S``, ``lambda_``: initial."""
        target = _distance(floor * (1.0 + FLOOR_WINDOW / 2))
        feasible_low, infeasible_high, tolerance = 0.0, np.inf, ROUGH
        for _ in range(MAX_LAMBDAS):
            point = self.minimize(theta_S, lambda_, tolerance)
            theta_S, distance = point.theta_S, _distance(point.ess)
            met = point.ess >= floor
            at_floor = met and (lambda_ == 1.0 or point.ess <= floor * (1.0 + FLOOR_WINDOW))
            if at_floor and tolerance == FINE:
                return point, lambda_
            if tolerance == ROUGH and (at_floor or abs(distance - target) < 0.1 * target):
                tolerance = FINE
            else:
                feasible_low, infeasible_high = (
                    (max(feasible_low, lambda_), infeasible_high)
                    if met
                    else (feasible_low, min(infeasible_high, lambda_))
                )
            if at_floor:
                continue
            # d is nearly proportional to λ; where that would leave the bracket, halve the bracket
            following = min(1.0, lambda_ * float(np.clip(target / max(distance, 1e-12), 0.3, 3.0)))
            if not feasible_low < following < infeasible_high and not (following == 1.0 and infeasible_high > 1.0):
                following = (feasible_low + min(infeasible_high, 1.0)) / 2.0
            if abs(following - lambda_) < 1e-9:
                break
            theta_S, lambda_ = theta_S * (following / lambda_), following
        return self.minimize(theta_S, feasible_low, FINE), feasible_low

    def residual_S(self, point: Point, lambda_: float) -> np.ndarray:
        """:meth:`Problem.residual_S` against the sample's own targets."""
        problem = Problem(self._problem.scope_LE, self._base_S, self._shift_S, self._problem.ridge)
        return problem.residual_S(point, lambda_)

    def correct(self, sampled: Point, exact: Point) -> None:
        """Shift the targets so that sample and corpus miss them by the same amount at this θ."""
        achieved_S = (exact.frequency_S - self._problem.retain_S) * self._ratio_S
        self._base_S = sampled.frequency_S - balanced(self._problem.scope_LE, achieved_S, self._variance_S)


def _distance(ess: float) -> float:
    """d: how far weights of this effective sample size are from uniform ones."""
    return float(np.sqrt(max(-np.log(min(ess, 1.0)), 0.0)))


@dataclass(frozen=True)
class RakingResult:
    """The outcome of :func:`rake`.

    Attributes:
        theta_S, point: the solution over all units.
        target_S, full_target_S: the feasible targets at the final λ and at λ = 1; of experts at the bound, the
            frequency that was reached.
        reason_S: key of :data:`REASONS` for a target that was replaced, or '' (such a target may still have been
            shifted so that a layer sums to K).
        lambda_: λ.
        passes: number of passes over all units.
        residual: largest absolute gradient off the bounds.
        converged: see the module's docstring.
    """

    theta_S: np.ndarray
    point: Point
    target_S: np.ndarray
    full_target_S: np.ndarray
    reason_S: list[str]
    lambda_: float
    passes: int
    residual: float
    converged: bool


def rake(
    units: Units,
    forget_S: np.ndarray,
    retain_S: np.ndarray,
    clip: float,
    ess_floor: float,
    error_S: np.ndarray | None = None,
    threads: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> RakingResult:
    """The weights that move the frequencies of ``units`` towards ``forget_S``, as far as ``ess_floor`` lets them.

    Args:
        forget_S, retain_S: target frequencies, and those of the corpus at equal weights. ``units`` held in memory may
            be a sample of that corpus; nothing else is then read.
        clip: largest ratio between an expert's target and its retain frequency, and between the shares of tokens that
            do not select it.
        ess_floor: least effective sample size, as a share of the units.
        error_S: standard errors of the frequencies, clustered by document (None: 0; where not finite: by token).
        log: receives lines of progress.
    """
    retain_S, forget_S = np.asarray(retain_S, np.float64), np.asarray(forget_S, np.float64)
    full_target_S, reason_S = feasible_targets(units.scope_LE, retain_S, forget_S, clip)
    variance_S = _variance(retain_S)
    shift_S = balanced(units.scope_LE, full_target_S - retain_S, variance_S)
    nothing_S = np.zeros(len(retain_S))
    if not np.abs(shift_S).max(initial=0.0) > 1e-15 or ess_floor >= 1.0:
        lambda_ = 0.0 if ess_floor >= 1.0 else 1.0
        origin = evaluate(units, nothing_S, threads)
        return RakingResult(nothing_S, origin, retain_S, full_target_S, reason_S, lambda_, 1, 0.0, True)

    error_S = nothing_S if error_S is None else np.asarray(error_S, np.float64)
    error_S = np.where(np.isfinite(error_S), error_S, np.sqrt(variance_S / units.number))
    ridge = float((error_S**2).sum() / variance_S.sum()) * min(1.0, len(retain_S) / units.number) ** 2
    problem = Problem(units.scope_LE, retain_S, shift_S, max(ridge, LEAST_RIDGE))
    allowed_S = np.maximum(TOLERANCE, STANDARD_ERRORS * error_S)
    point, lambda_, residual_S, passes = _solve(units, problem, ess_floor, allowed_S, threads, log)

    bound_S = at_bound(point.theta_S)
    for s in np.flatnonzero(bound_S):
        reason_S[s] = reason_S[s] or "tied"
    target_S = np.where(bound_S, point.frequency_S, retain_S + lambda_ * shift_S)
    full_target_S = np.where(bound_S, point.frequency_S, retain_S + shift_S)
    at_limit = lambda_ == 1.0 or point.ess <= ess_floor * (1.0 + 2.0 * FLOOR_WINDOW)
    converged = bool((residual_S <= allowed_S).all()) and point.ess >= ess_floor and at_limit
    residual = float(residual_S.max(initial=0.0))
    return RakingResult(point.theta_S, point, target_S, full_target_S, reason_S, lambda_, passes, residual, converged)


def _solve(
    units: Units, problem: Problem, floor: float, allowed_S: np.ndarray, threads: int, log: Callable[[str], None]
) -> tuple[Point, float, np.ndarray, int]:
    """Return the solution over all units, λ, each expert's absolute gradient, and the number of exact passes."""
    sample = units.sample(max(SAMPLE_UNITS, SAMPLE_UNITS_PER_CONSTRAINT * len(problem.retain_S)))
    dual = SampleDual(sample, problem, threads, log)
    theta_S, lambda_, sample_floor = np.zeros(len(problem.retain_S)), dual.first_lambda(_distance(floor)), floor
    if sample.number == units.number:
        point, lambda_ = dual.temper(floor, theta_S, lambda_)
        return point, lambda_, dual.residual_S(point, lambda_), 1
    for passes in range(1, MAX_EXACT_PASSES + 1):
        sampled, lambda_ = dual.temper(sample_floor, theta_S, lambda_)
        exact = evaluate(units, sampled.theta_S, threads)
        residual_S = problem.residual_S(exact, lambda_)
        log(
            f"pass {passes} over all {units.number:,} tokens: target lambda_ (lambda) {lambda_:.4f}, "
            f"largest residual {residual_S.max():.1e}"
        )
        full = lambda_ == 1.0 or exact.ess <= floor * (1.0 + 2.0 * FLOOR_WINDOW)
        if exact.ess >= floor and full and (residual_S <= allowed_S).all():
            break
        dual.correct(sampled, exact)
        theta_S, sample_floor = sampled.theta_S, min(floor * sampled.ess / exact.ess, 1.0 - 1e-9)
    while exact.ess < floor:  # not converged: shrink θ until the floor is met
        smaller_S = exact.theta_S * (0.999 * _distance(floor) / _distance(exact.ess))
        exact, passes = evaluate(units, smaller_S, threads), passes + 1
    return exact, lambda_, problem.residual_S(exact, lambda_), passes
