"""Raking (entropy balancing): the least change of the weights that moves expert frequencies towards their targets.

Shape legend: N units (tokens), S constraints (layer, expert).

Among all weights w ≥ 0 with mean 1, take the one closest to uniform in KL whose frequencies ``q_s(w) = Σ w a_s / Σ w``
are the targets ``t(λ) = p^R + λ d``, d = what is asked for less p^R. The dual is convex, with one unknown a constraint:

    minimise  D(θ) = log mean exp(θ·a) − θ·t(λ) + ½ e Σ_s v_s θ_s²   over |θ_s| ≤ LARGEST_THETA,     w ∝ exp(θ·a)

    gradient  q(θ) − t(λ) + e v θ,      Hessian  H = covariance of a under w  + e v,      v_s = p_s (1 − p_s)

(Deming & Stephan 1940; Deville & Särndal 1992, "raking ratio"; Hainmueller 2012, "entropy balancing"; that TRACE's
weights are made so is our decision). λ is the largest in [0, 1] that keeps the effective sample size
(Σw)²/(NΣw²) at or above a floor; it is found along with θ. Two terms keep what cannot be met from spoiling the rest:

* ``e``, the *ridge*, is the mean variance of the frequencies (clustered by document) over their token variance v, times
  (S/N)² at most 1. Each target is missed by e v θ: far below its standard error where there are more units than
  constraints, and of its order where there are not, when exact matching would fit the weights to noise;
* the *box*: an expert can change a weight by at most the factor exp(12). Its dual is the exact penalty 12 Σ|q_s − t_s|,
  so that an expert whose target no weights can meet with those of the others (it is only selected where another one
  is, say) is given up at that price, and named. λ is never taken back for it.

**Solver.** Quasi-Newton: the Hessian of a sample, factorised once or a few times, with L-BFGS pairs on top; the same
loop solves a sample of the units first, to find θ and λ within sampling error in many cheap passes, and then all units
in a few exact ones. Whenever the miss is small against what λ is still off, λ moves along
u(λ) = √log(1/ESS), which is proportional to λ where scores are normal; the next step then includes dθ/dλ = H⁻¹d.

**Converged** means: each frequency is within :data:`TOLERANCE` (1e-6) of its target, or within a thousandth of its
standard error where that is more (a difference that no data could show), and the floor is met. The solver aims at the
former, and at weights within :data:`WEIGHT_TOLERANCE` (root mean square, relative) of the solution's, estimated by the
Newton decrement. Where it ends short of that the weights stand as they are and say so.

Sums are in float64 over fixed blocks in a fixed order; matrices are factorised on one thread, or on the accelerator
where there is one: the result does not depend on the number of threads, and on that of ranks and on the device to
rounding.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from trace_ds.calibration.targets import offer
from trace_ds.calibration.units import Point, Units, evaluate

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

A = TypeVar("A")

LARGEST_THETA = 12.0
TOLERANCE, WEIGHT_TOLERANCE = 1e-6, 1e-4
STANDARD_ERRORS = 1e-3
FLOOR_WINDOW = 1e-3  # the effective sample size ends between the floor and this much more of it
LEAST_RIDGE = 1e-9
SAMPLE_UNITS, SAMPLE_VALUES = 1 << 19, 1 << 28  # of the sample: units; selections or counts
CURVATURE_UNITS, LEAST_CURVATURE_UNITS = 1 << 16, 1 << 14
WHOLE_UNITS = 1 << 16  # so many are solved on at once
MEMORY_PAIRS = 16
MAX_PASSES, MAX_SAMPLE_PASSES = 60, 300
MAX_REBUILDS = 4
EXACT_CONSTRAINTS, EXACT_PRODUCTS = 1024, 1 << 28


RakeArguments = tuple[np.ndarray, np.ndarray, float, float, np.ndarray | None]  # those of rake, in order


@dataclass(frozen=True)
class Context:
    """Who computes, and who hears of it.

    Attributes:
        threads: of this process. world: the ranks that take their shares of the passes (None: this process alone).
        device: of the main process's dense linear algebra; passes over the units are the processors'.
        say: hears lines of progress, on the main process; clock: seconds, for what they say of the time.
        begin: called before the ranks' common solve, on the main process, with the scope and the arguments that the
            others must call :func:`rake` with.
    """

    threads: int = 1
    world: World | None = None
    device: str = "cpu"
    say: Callable[[str], None] = field(default=lambda line: None)
    begin: Callable[[np.ndarray, RakeArguments], None] = field(default=lambda scope_LE, arguments: None)
    clock: Callable[[], float] = field(default=time.monotonic)

    def shared(self, make: Callable[[], A]) -> A:
        """What ``make`` gives on the main process, on every rank."""
        return make() if self.world is None else self.world.broadcast_agreed(make)


class Remaining:
    """What is left of a solve, in words, from the time its passes took and how fast it came closer.

    ``distance`` is the log of how many times too large the worst of what has to settle is. Over the later half of the
    passes it fell by so much a pass, and is taken to go on falling so. Where it did not fall there is only the limit of
    the passes to tell.
    """

    def __init__(self, most_passes: int, distance: float, clock: Callable[[], float]) -> None:
        self._most, self._clock, self._begun_s = most_passes, clock, clock()
        self._seen = [(0, distance)]  # after so many passes

    def __call__(self, passes: int, distance: float) -> str:
        if distance <= 0.0:
            return "settled"
        self._seen.append((passes, distance))
        then, distance_then = self._seen[(len(self._seen) - 1) // 2]
        pass_s, most = (self._clock() - self._begun_s) / max(passes, 1), max(self._most - passes, 0)
        if distance < distance_then:
            left = max(math.ceil(distance * (passes - then) / (distance_then - distance)), 1)
            if left < most:
                return f"about {left * pass_s:.0f} s left"
        return f"at most {most} passes of {pass_s:.1f} s left"


@dataclass(frozen=True)
class Aim:
    """What the dual is solved for: t(λ) = ``retain_S`` + λ ``shift_S`` with the ridge e, and the floor of the ESS."""

    retain_S: np.ndarray
    shift_S: np.ndarray
    ridge: float
    floor: float
    scope_LE: np.ndarray
    box: float = LARGEST_THETA

    @property
    def variance_S(self) -> np.ndarray:
        """Of a token's activations; 0 where they are all alike, and θ then stays 0."""
        variance_S = self.retain_S * (1.0 - self.retain_S)
        return np.where(variance_S > 1e-15, variance_S, 0.0)

    def target_S(self, strength: float) -> np.ndarray:
        return self.retain_S + strength * self.shift_S

    def gradient_S(self, point: Point, strength: float) -> np.ndarray:
        variance_S = self.variance_S
        gradient_S = point.frequency_S - self.target_S(strength) + self.ridge * variance_S * point.theta_S
        return balanced(self.scope_LE, np.where(variance_S > 0, gradient_S, 0.0), variance_S)

    def dual(self, point: Point, strength: float) -> float:
        theta_S = point.theta_S
        penalty = 0.5 * self.ridge * float((self.variance_S * theta_S**2).sum())
        return point.log_mean - float((theta_S * self.target_S(strength)).sum()) + penalty


@dataclass(frozen=True)
class Solution:
    """The dual solved: ``strength`` is λ; ``passes`` over the units; ``settled``: it went as far as the solver aims,
    not only as far as it got."""

    point: Point
    strength: float
    passes: int
    settled: bool


def balanced(scope_LE: np.ndarray, change_S: np.ndarray, variance_S: np.ndarray) -> np.ndarray:
    """The change of frequencies without what none can give: the experts of a layer that is constrained whole sum to K.
    The excess is taken from each in proportion to its variance."""
    layer_S = np.nonzero(scope_LE)[0]
    excess_L, variance_L = (np.bincount(layer_S, x_S, len(scope_LE)) for x_S in (change_S, variance_S))
    share_L = np.where(
        scope_LE.all(axis=1) & (variance_L > 0), excess_L / np.where(variance_L > 0, variance_L, 1.0), 0.0
    )
    return change_S - variance_S * share_L[layer_S]


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


def unit_weights(units: Units, theta_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(w float64 [N] with sum 1 over the units of a sample, Σ w a [S])."""
    tables, packing = units.tables(theta_S), units.packing
    read = [units.read(block) for block in units.blocks]
    columns = [packing.columns(selected_NLK) for selected_NLK, _ in read]
    score_N = np.concatenate([packing.score(columns_GN, tables) for columns_GN in columns])
    multiplicity_N = np.concatenate([counts_N for _, counts_N in read])
    weight_N = multiplicity_N * np.exp(score_N - score_N[multiplicity_N > 0].max())
    weight_N /= weight_N.sum()
    mean_S = np.zeros(len(theta_S))
    for columns_GN, block in zip(columns, units.blocks, strict=True):
        mean_S += units.fold(columns_GN, weight_N[slice(*block)])
    return weight_N, mean_S


class Curvature:
    """(H + e v)⁻¹ from a sample, with L-BFGS pairs on top; kept from one θ and λ to the next.

    H is scaled to unit variances, so that rare experts count like frequent ones; the sampled variances are replaced by
    the exact ones. With fewer units than constraints (Woodbury) the matrix that is factorised is N × N.

    Attributes:
        whole: the sample is all there is. exact: it is made anew at each step, which costs less than a pass or so.
    """

    def __init__(self, sample: Units, whole: bool, aim: Aim, origin: Point, context: Context) -> None:
        self._sample, self._threads, self._device = sample, context.threads, context.device
        self._scale_S = np.sqrt(np.where(aim.variance_S > 0, aim.variance_S, 1.0))
        self._constant_S, self._scope_LE = aim.variance_S == 0, aim.scope_LE
        self._ridge, self.whole = aim.ridge, whole
        count, size = sample.number, len(self._scale_S)
        self._kernel = self._features() if count < size else None
        self._matrix: Any = None
        self._single = False
        cheap = size <= EXACT_CONSTRAINTS and count * sample.values**2 <= EXACT_PRODUCTS
        self.exact = (cheap and whole) or self._kernel is not None
        self.rebuild(origin)

    def _features(self) -> tuple[Any, Any]:
        """(scaled features float32 [N, S], their products [N, N]) for the form with fewer units than constraints."""
        import torch

        with single_thread():
            scaled = self._sample.dense(0, self._sample.number) / torch.from_numpy(self._scale_S).float()
            there = scaled.to(self._device)
            return scaled, (there @ there.T).cpu().double()

    def rebuild(self, point: Point) -> None:
        """The Hessian at a point, factorised."""
        import torch

        self._pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self._fixed: tuple[np.ndarray, Any, Any] | None = None
        weight_N, mean_S = unit_weights(self._sample, point.theta_S)
        mean = torch.from_numpy(mean_S / self._scale_S)
        with single_thread():
            if self._kernel is not None:
                features, products = self._kernel
                root = torch.from_numpy(np.sqrt(weight_N))
                cross = (features @ mean.float()).double()
                matrix = self._matrix = torch.sub(products, cross[:, None], out=self._matrix)
                matrix -= cross - (mean @ mean)
                matrix *= root[:, None]
                matrix *= root
                self._ridge_used = max(self._ridge, 1e-6)
                self._root, self._mean = root, mean
            else:
                matrix = self._sample.moments(weight_N, self._threads)
                self._single = matrix.dtype == torch.float32
                scale = torch.from_numpy(1.0 / self._scale_S).to(matrix.dtype)
                matrix *= scale[:, None]
                matrix *= scale[None, :]
                matrix.addr_(mean.to(matrix.dtype), mean.to(matrix.dtype), alpha=-1.0)
                self._ridge_used = max(self._ridge, 1e-6 if self._single else 1e-10)
                shrunk_S = np.ones(len(mean_S)) if self.whole else self._correct(matrix, point.frequency_S)
                self._lift(matrix, shrunk_S)
                # The inverse of a sampled covariance is too large by n / (n − S) on average (Wishart).
                fewer = 0.0 if self.whole else min(len(mean_S) * float((weight_N**2).sum()), 0.9)
                self._shrunk = 1.0 - fewer
                matrix.diagonal()[torch.from_numpy(self._constant_S)] = 1.0
            diagonal = matrix.diagonal()
            diagonal += self._ridge_used
            while True:
                factor, info = torch.linalg.cholesky_ex(matrix.to(self._device))
                if not int(info):
                    break
                diagonal += self._ridge_used * 9.0
                self._ridge_used *= 10.0
            self._factor = factor

    def _correct(self, matrix: Any, frequency_S: np.ndarray) -> np.ndarray:
        """What the sample gives is a correlation. The variances of zeros and ones are known exactly; an expert that
        no sampled unit selects (or all do) is taken to be independent of the others. Returns what undoes this."""
        import torch

        found_S = matrix.diagonal().double().numpy().copy()
        seen_S = found_S > 1e-12
        wanted_S = np.maximum(frequency_S * (1.0 - frequency_S) / self._scale_S**2, 1e-3)
        grown_S = np.sqrt(np.where(seen_S, wanted_S / np.where(seen_S, found_S, 1.0), 0.0))
        grown = torch.from_numpy(grown_S).to(matrix.dtype)
        matrix *= grown[:, None]
        matrix *= grown[None, :]
        matrix.diagonal().copy_(torch.from_numpy(wanted_S))
        return np.where(seen_S, 1.0 / np.where(seen_S, grown_S, 1.0), 0.0)

    def _lift(self, matrix: Any, shrunk_S: np.ndarray) -> None:
        """The sum of a layer's experts is K: that direction of curvature 0 gets the curvature 1. What it is asked for
        is 0 (:func:`balanced`), but for rounding."""
        import torch

        layer_S = np.nonzero(self._scope_LE)[0]
        for layer in np.flatnonzero(self._scope_LE.all(axis=1)):
            members = np.flatnonzero((layer_S == layer) & ~self._constant_S)
            along = (self._scale_S * shrunk_S)[members]
            if (along**2).sum() > 0:
                along = torch.from_numpy(along / np.sqrt((along**2).sum())).to(matrix.dtype)
                start, stop = int(members[0]), int(members[-1]) + 1
                whole = torch.zeros(stop - start, dtype=matrix.dtype)
                whole[torch.from_numpy(members - start)] = along
                matrix[start:stop, start:stop].addr_(whole, whole)

    def feasible(self, shift_S: np.ndarray) -> np.ndarray:
        """The part of a change of the frequencies that some weights can give (to first order, within the ridge), where
        all units and double precision can tell."""
        if not self.whole or self._single:
            return shift_S
        for _ in range(1 if self._kernel is not None else 2):  # once more, against rounding
            along_S = self._base(shift_S, np.zeros(len(shift_S), dtype=bool))
            shift_S = np.where(self._constant_S, 0.0, shift_S - self._ridge_used * self._scale_S**2 * along_S)
        return shift_S

    def moved(self, old: Point, new: Point, aim: Aim) -> None:
        """Learn from an accepted step."""
        step = new.theta_S - old.theta_S
        change = new.frequency_S - old.frequency_S + aim.ridge * aim.variance_S * step
        if float((step * change).sum()) > 1e-300:
            self._pairs = [*self._pairs, (step, change)][-MEMORY_PAIRS:]

    def __call__(self, gradient_S: np.ndarray, fixed_S: np.ndarray) -> np.ndarray:
        """The (quasi-)Newton direction, without the minus sign, 0 at the fixed constraints: L-BFGS (Nocedal & Wright,
        *Numerical Optimization*, algorithm 7.4) on the base."""
        q, alphas = np.where(fixed_S, 0.0, gradient_S), []
        for step, change in reversed(self._pairs):
            alpha = float((step * q).sum() / (step * change).sum())
            q = q - alpha * change
            alphas.append(alpha)
        r = self._base(np.where(fixed_S, 0.0, q), fixed_S)
        for (step, change), alpha in zip(self._pairs, reversed(alphas), strict=True):
            r = r + step * (alpha - float((change * r).sum() / (step * change).sum()))
        return np.where(fixed_S, 0.0, r)

    def _base(self, gradient_S: np.ndarray, fixed_S: np.ndarray) -> np.ndarray:
        """(H + e v)⁻¹ gradient over the constraints that are not fixed."""
        import torch

        with single_thread():
            g = torch.from_numpy(gradient_S / self._scale_S)
            if self._kernel is not None:
                features = self._kernel[0]
                spread = self._root * ((features @ g.float()).double() - self._mean @ g)
                inner = self._solve(spread[:, None])[:, 0] * self._root
                back = (inner.float() @ features).double() - inner.sum() * self._mean
                return ((g - back) / self._ridge_used).numpy() / self._scale_S
            found = self._solve(g[:, None]) * self._shrunk
            if fixed_S.any():
                if self._fixed is None or not np.array_equal(self._fixed[0], fixed_S):
                    place = torch.from_numpy(np.flatnonzero(fixed_S))
                    unit = torch.zeros(len(fixed_S), len(place), dtype=torch.float64)
                    unit[place, torch.arange(len(place))] = 1.0
                    columns = self._solve(unit) * self._shrunk
                    self._fixed = fixed_S.copy(), columns, torch.linalg.inv(columns[place])
                _, columns, inverse = self._fixed
                found = found - columns @ (inverse @ found[torch.from_numpy(np.flatnonzero(fixed_S))])
            return found[:, 0].numpy() / self._scale_S

    def _solve(self, right: Any) -> Any:
        import torch

        return torch.cholesky_solve(right.to(self._factor), self._factor).cpu().double()


def solve(
    units: Units,
    aim: Aim,
    curvature: Curvature | None,
    context: Context,
    point: Point,
    strength: float | None = None,
    tolerance: float = TOLERANCE,
    weight_tolerance: float = WEIGHT_TOLERANCE,
    max_passes: int = MAX_PASSES,
    window: float = FLOOR_WINDOW,
) -> Solution:
    """θ and λ (see the module's docstring) from a point of these units and a λ (by default the one at which the floor
    is met to second order). Without a floor (0) λ stays what it is given as. Only the main process has a curvature."""

    def uphill(gradient_S: np.ndarray, fixed_S: np.ndarray) -> np.ndarray:
        return context.shared(lambda: np.zeros(0) if curvature is None else curvature(gradient_S, fixed_S))

    goal = float(np.sqrt(-np.log(aim.floor * (1.0 + window / 2)))) if aim.floor else np.inf
    if strength is None:
        nothing_S = np.zeros(len(aim.shift_S), dtype=bool)
        slope = float((aim.shift_S * uphill(aim.shift_S, nothing_S)).sum())
        strength = min(1.0, goal / float(np.sqrt(slope))) if slope > 0 else 1.0
    reached = strength
    known: tuple[float, float] | None = None  # λ and u of the last solved dual
    exact = context.shared(lambda: curvature is not None and curvature.exact)
    passes, rebuilds, slow, last, exhausted = 0, 0, 0, np.inf, False

    def rebuild() -> None:
        nonlocal rebuilds
        rebuilds += 1
        if curvature is not None:
            curvature.rebuild(point)

    def floor_met() -> bool:
        full = reached == 1.0 or not aim.floor
        return point.ess >= aim.floor and (full or point.ess <= aim.floor * (1.0 + window))

    def look() -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        """(gradient, 0 on the box; the constraints on it; direction; Newton decrement)."""
        gradient_S = aim.gradient_S(point, reached)
        at_most_S, at_least_S = point.theta_S >= aim.box, point.theta_S <= -aim.box
        fixed_S = at_most_S & (gradient_S < 0) | at_least_S & (gradient_S > 0)
        direction_S = uphill(gradient_S, fixed_S)
        free_S = np.where(fixed_S, 0.0, gradient_S)
        return free_S, fixed_S, direction_S, float(np.sqrt(max((free_S * direction_S).sum(), 0.0)))

    def distance() -> float:
        floor_off = 0.0 if floor_met() else abs(point.ess / aim.floor - 1.0) / window
        error = float(np.abs(free_S).max(initial=0.0))
        return math.log(max(error / tolerance, decrement / weight_tolerance, floor_off, 1.0))

    free_S, fixed_S, direction_S, decrement = look()
    remaining = Remaining(max_passes, distance(), context.clock)
    while True:
        error = float(np.abs(free_S).max(initial=0.0))
        solved = exhausted or (error <= tolerance and decrement <= weight_tolerance)
        if solved and floor_met():
            return Solution(point, reached, passes, not exhausted or error <= TOLERANCE)
        u = float(np.sqrt(max(-np.log(min(point.ess, 1.0)), 0.0)))
        if not floor_met() and u > 0 and (solved or decrement <= 0.5 * abs(u - goal)):
            power = 1.0
            if known is not None and abs(np.log(reached / known[0])) > 1e-3:
                power = float(np.clip(np.log(u / known[1]) / np.log(reached / known[0]), 0.5, 4.0))
            if solved or decrement <= 0.2 * abs(u - goal):
                known = reached, u
            moved = min(1.0, reached * float(np.clip((goal / u) ** (1.0 / power), 0.3, 2.0)))
            if moved != reached:
                reached, exhausted, slow, last = moved, False, 0, np.inf
                free_S, fixed_S, direction_S, decrement = look()
        if passes >= max_passes or (exhausted and solved):
            return Solution(point, reached, passes, False)
        slow, last = (slow + 1 if decrement > 0.5 * last else 0), decrement
        if slow >= 3 and not exact and rebuilds < MAX_REBUILDS:
            rebuild()
            slow, last = 0, np.inf
            free_S, fixed_S, direction_S, decrement = look()
        # The decrement is by how much the step changes the log-weights (root mean square): never by more than e or so.
        value, step, found = aim.dual(point, reached), min(1.0, 1.0 / max(decrement, 1e-300)), None
        flat = float((free_S * direction_S).sum()) < 1e-11 * (1.0 + abs(value))
        while found is None and step > 1e-7:
            moved_S = np.clip(point.theta_S - step * direction_S, -aim.box, aim.box)
            trial = evaluate(units, moved_S, context.threads, context.world)
            passes += 1
            if flat:  # the dual changes by less than its rounding error: the gradient decides
                left_S = np.where(fixed_S, 0.0, aim.gradient_S(trial, reached))
                better, step = float(np.abs(left_S).max(initial=0.0)) < 0.5 * error, 0.0
            else:
                promised = float((free_S * (point.theta_S - moved_S)).sum())
                better, step = aim.dual(trial, reached) <= value - 1e-4 * promised, step / 2.0
            found = trial if better else None
        if found is None:  # no way down: pairs that mislead, a Hessian that is too far off, or as exact as it gets
            if flat or exact or rebuilds >= MAX_REBUILDS:
                exhausted = True
            else:
                rebuild()
        else:
            before, point = point, found
            if exact:
                rebuild()
            elif curvature is not None:
                curvature.moved(before, point, aim)
        free_S, fixed_S, direction_S, decrement = look()
        context.say(
            f"pass {passes}: lambda {reached:.4f}, effective sample size {point.ess:.4f}, "
            f"largest miss {float(np.abs(free_S).max(initial=0.0)):.1e}, weights off by {decrement:.1e}; "
            f"{remaining(passes, distance())}"
        )


@dataclass(frozen=True)
class Raked:
    """The outcome of :func:`rake`.

    Attributes:
        theta_S, point: the solution over all units. target_S: what was asked of each frequency in the end.
        offered_S: the closest feasible to the wanted ones; reason_S: why where that is another, or ''.
        strength: λ. passes: over all units. error: max |q − target| off the box. converged: see the module's docstring.
        limit: what set λ: 'floor', '' (it is 1), or 'passes' (the solve ended before the floor was met).
    """

    theta_S: np.ndarray
    point: Point
    target_S: np.ndarray
    offered_S: np.ndarray
    reason_S: list[str]
    strength: float
    passes: int
    error: float
    converged: bool
    limit: str


def rake(
    units: Units,
    forget_S: np.ndarray,
    retain_S: np.ndarray,
    clip: float,
    ess_floor: float,
    error_S: np.ndarray | None = None,
    context: Context | None = None,
) -> Raked:
    """Raking with everything that bounds it.

    Args:
        forget_S, retain_S: frequencies wanted, and those of the units at equal weights.
        clip: see targets.py. ess_floor: least effective sample size.
        error_S: standard errors of the frequencies, clustered by document (None: 0).
    """
    context = context or Context()
    retain_S, forget_S = np.asarray(retain_S, np.float64), np.asarray(forget_S, np.float64)
    offered_S, reason_S = offer(units.scope_LE, retain_S, forget_S, clip)
    shift_S = offered_S - retain_S
    if not np.abs(shift_S).max(initial=0.0) > 1e-15 or ess_floor >= 1.0:
        origin = evaluate(units, np.zeros(len(retain_S)), context.threads, context.world)
        limit = "floor" if ess_floor >= 1.0 else ""
        return Raked(origin.theta_S, origin, retain_S, offered_S, reason_S, float(not limit), 1, 0.0, True, limit)
    errors_S = np.zeros(len(retain_S)) if error_S is None else np.asarray(error_S, np.float64)
    found, aim = _solve_all(units, retain_S, shift_S, errors_S, ess_floor, context)
    point, reached_S = found.point, found.point.frequency_S
    feasible_S = aim.target_S(1.0)
    boxed_S = np.abs(point.theta_S) > aim.box - 1e-9
    for s in np.flatnonzero(boxed_S | (np.abs(feasible_S - offered_S) > np.maximum(errors_S, 1e-6))):
        reason_S[s] = reason_S[s] or ("tied" if boxed_S[s] else "dependent")
    target_S = np.where(boxed_S, reached_S, aim.target_S(found.strength))
    miss_S = np.abs(reached_S - target_S)
    met = found.settled or bool((miss_S <= np.maximum(TOLERANCE, STANDARD_ERRORS * errors_S)).all())
    floor_met = point.ess >= ess_floor
    return Raked(
        point.theta_S,
        point,
        target_S,
        np.where(boxed_S, reached_S, feasible_S),
        reason_S,
        found.strength,
        found.passes,
        float(miss_S.max(initial=0.0)),
        met and floor_met,
        "" if found.strength == 1.0 and floor_met else "floor" if found.settled else "passes",
    )


def rake_sample(
    sample: Units,
    forget_S: np.ndarray,
    retain_S: np.ndarray,
    clip: float,
    ess_floor: float,
    error_S: np.ndarray | None,
    context: Context,
) -> Raked:
    """:func:`rake` of a sample of the units that ``retain_S`` is of: the same, but for the sample's chance."""
    offered_S, reason_S = offer(sample.scope_LE, retain_S, forget_S, clip)
    sampled_S = evaluate(sample, np.zeros(len(retain_S)), context.threads).frequency_S
    aim = Aim(retain_S, offered_S - retain_S, 0.0, ess_floor, sample.scope_LE)
    made = rake(sample, sampled_S + sampled_shift(aim, sampled_S), sampled_S, clip, ess_floor, error_S, context)
    found = zip(reason_S, made.reason_S, strict=True)
    return replace(made, reason_S=[known or late for known, late in found])


def _solve_all(
    units: Units, retain_S: np.ndarray, shift_S: np.ndarray, error_S: np.ndarray, floor: float, context: Context
) -> tuple[Solution, Aim]:
    """(the solution over all units, what it was asked for): a sample of the units first, then all of them."""
    size, number = len(shift_S), units.number
    limit = min(SAMPLE_UNITS, max(number // 8, WHOLE_UNITS, 16 * size), max(SAMPLE_VALUES // units.values, 1))
    sample = units.sample(limit, context.world)
    alone = replace(context, world=None)
    nothing_S = np.zeros(size)
    variance_S = retain_S * (1.0 - retain_S)
    ridge = max(float((error_S**2).sum() / variance_S.sum()) * min(1.0, size / number) ** 2, LEAST_RIDGE)
    aim = Aim(retain_S, shift_S, ridge, floor, units.scope_LE, np.inf if number < size else LARGEST_THETA)
    curvature: Curvature | None = None
    core = sample.sample(max(min(8 * size, CURVATURE_UNITS), 4 * size, LEAST_CURVATURE_UNITS))

    def on_all() -> tuple[Solution, Aim]:
        origin = evaluate(sample, nothing_S, context.threads)
        curvature = Curvature(core, core.number == number, aim, origin, context)
        feasible = replace(aim, shift_S=curvature.feasible(shift_S))
        limits = (1e-13, 1e-11) if curvature.exact and number >= size else (TOLERANCE, WEIGHT_TOLERANCE)
        return solve(sample, feasible, curvature, alone, origin, None, *limits, MAX_SAMPLE_PASSES), feasible

    if sample.number == number:
        return context.shared(on_all)

    def on_sample() -> Solution:
        nonlocal curvature
        start = evaluate(sample, nothing_S, context.threads)
        curvature = Curvature(core, False, aim, start, context)
        near = replace(aim, retain_S=start.frequency_S, shift_S=sampled_shift(aim, start.frequency_S))
        first = f"first on a sample of {sample.number:,} of {number:,}, "
        told = replace(alone, say=lambda line: context.say(first + line))
        noise = 0.1 * float(np.sqrt(size / (sample.number * floor)))  # a tenth of what the sample leaves open
        rough = solve(sample, near, curvature, told, start, None, np.inf, noise, MAX_SAMPLE_PASSES, 0.01)
        curvature.rebuild(rough.point)
        return rough

    rough = context.shared(on_sample)
    point = evaluate(units, rough.point.theta_S, context.threads, context.world)
    return solve(units, aim, curvature, context, point, rough.strength), aim


def sampled_shift(aim: Aim, sampled_S: np.ndarray) -> np.ndarray:
    """What to ask of a sample's frequencies: the same change of the log-odds to first order, so that an expert of a few
    sampled tokens is asked for what they can give; the changes of a layer still sum to 0 where all its experts move."""
    variance_S, sampled_variance_S = aim.variance_S, sampled_S * (1.0 - sampled_S)
    ratio_S = np.where(variance_S > 0, sampled_variance_S / np.where(variance_S > 0, variance_S, 1.0), 0.0)
    return balanced(aim.scope_LE, aim.shift_S * ratio_S, sampled_variance_S)
