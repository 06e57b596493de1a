"""What a study shows: every method against the baseline at matched forgetting, tuned on other seeds; pure functions.

A trial has *forgotten* from the first scored step at which its forget score is at most the target (the mean score of
the gold models plus a margin). Three numbers are told of a trial that has: ``cross``, the utility where the line to
that step from the one before meets the target, ``post``, the mean utility from that step to the last (less noisy, so
it is what tuning looks at), and ``end``, the utility after the last step. A trial that never gets there counts as not
reached; it is never compared. Of those compared the forget score after the last step is told too: a run that had
forgotten may be above the target again.

**Tuning without peeking** (our decision): the seeds are dealt to two folds in turn. For each fold the point (alpha,
learning rate) of a method is the one with the best mean ``post`` over the *other* fold's seeds, among those that
reached the target on most of them; ties go to the fewer steps. So every reported number was made at a strength
chosen on other base models, for the baseline in exactly the same way. With ``bench.screening`` the point is chosen in
this way on the screening's seeds, and told on all others.

Intervals: 95 % of a paired bootstrap over seeds (percentile, the ratio of the two means; Efron & Tibshirani 1993,
chapter 13) and, beside it, Student's t of the paired differences. Few seeds make the bootstrap optimistic: read both.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.config.schema import Config
from trace_ds.reporting.intervals import LEVEL, NO_MEANS, Interval, t_interval
from trace_ds.studies import run_list
from trace_ds.studies.matched import Matched, matched, relative_gain
from trace_ds.studies.run_list import Point, Trial, label

BOOTSTRAP_DRAWS = 10_000


@dataclass(frozen=True)
class Curve:
    """A finished trial and, by utility metric, what :func:`matched` says; ``forget_end``: the last forget score."""

    seed: int
    loss: str
    method: str
    point: Point
    found: dict[str, Matched]
    diverged: bool
    forget_end: float = math.nan

    @property
    def step(self) -> int | None:
        return next(iter(self.found.values())).step if self.found else None


def metric_of(entry: Mapping[str, Any], name: str) -> float:
    """``'TASK METRIC'`` or ``'TASK METRIC SOURCES'`` of one entry of a curve (NaN when it has no value)."""
    task, metric, *pattern = name.split()
    if not pattern:
        value = entry["scores"].get(f"{task} {metric}")
        return math.nan if value is None else float(value)
    sources = entry["by_source"].get(task, {})
    chosen = [v for source, v in sources.items() if fnmatch.fnmatch(source, pattern[0])]
    count = sum(v["n"] for v in chosen)
    if not count or any(metric not in v for v in chosen):
        return math.nan
    if metric == "perplexity":  # of the tokens of all sources together
        return math.exp(math.fsum(v["n"] * math.log(v[metric]) for v in chosen) / count)
    return math.fsum(v["n"] * v[metric] for v in chosen) / count


def questions_of(entry: Mapping[str, Any], name: str) -> int | None:
    """How many questions a score of :func:`metric_of` is the mean of; None: not known, or no mean."""
    task, metric, *pattern = name.split()
    sources = {source: v for source, v in entry["by_source"].get(task, {}).items() if metric in v}
    count = sum(v["n"] for source, v in sources.items() if fnmatch.fnmatch(source, pattern[0] if pattern else "*"))
    return count if count and metric not in (*NO_MEANS, "perplexity") else None


def curve_of(trial: Trial, result: Mapping[str, Any], forget: str, utilities: Sequence[str], target: float) -> Curve:
    """The result of a trial at matched forgetting."""
    entries = result["curve"]
    steps = [int(entry["step"]) for entry in entries]
    forget_S = [metric_of(entry, forget) for entry in entries]
    found = {
        name: matched(steps, forget_S, [metric_of(entry, name) for entry in entries], target)
        for name in utilities
        if entries
    }
    diverged = result["diverged"] is not None
    last = forget_S[-1] if entries and not diverged else math.nan
    return Curve(trial.seed, trial.loss, trial.method, trial.point, {} if diverged else found, diverged, last)


def folds(seeds: Sequence[int]) -> tuple[list[int], list[int]]:
    """The seeds dealt in turn to two folds."""
    return list(seeds[0::2]), list(seeds[1::2])


def choose_point(curves: Sequence[Curve], seeds: Sequence[int], metric: str) -> Point | None:
    """The best point of one method's curves on ``seeds``; None when none ever reached the target there."""
    best: tuple[tuple[float, float, float], Point] | None = None
    for point in dict.fromkeys(curve.point for curve in curves):
        reached = [
            curve.found[metric] for curve in curves if curve.point == point and curve.seed in seeds and curve.step
        ]
        reached = [m for m in reached if m.post is not None and math.isfinite(m.post)]
        if not reached:
            continue
        posts = [float(m.post) for m in reached if m.post is not None]
        steps = [float(m.step) for m in reached if m.step is not None]
        rank = (float(len(reached)), math.fsum(posts) / len(posts), -math.fsum(steps) / len(steps))
        if best is None or rank > best[0]:
            best = (rank, point)
    return None if best is None else best[1]


def tuned(
    curves: Sequence[Curve],
    seeds: Sequence[int],
    metric: str,
    free: Sequence[str],
    fixed: Mapping[str, Any],
    screening: Sequence[int] | None = None,
) -> dict[int, Curve | None]:
    """For each seed the curve at the point chosen on the other fold, or by a screening; keys not in ``free`` stay at
    ``fixed``.

    None for a seed whose other fold gives no choice.
    """
    chosen: dict[int, Curve | None] = {}
    for mine, other in ((seeds, screening),) if screening else (folds(seeds), folds(seeds)[::-1]):
        point = best_point(curves, other, metric, free, fixed)
        for seed in mine:
            chosen[seed] = next((c for c in curves if c.seed == seed and c.point == point), None)
    return {seed: chosen[seed] for seed in seeds}


def best_point(
    curves: Sequence[Curve], seeds: Sequence[int], metric: str, free: Sequence[str], fixed: Mapping[str, Any]
) -> Point | None:
    """:func:`choose_point` among the points whose keys are at ``fixed`` unless they are ``free``."""
    allowed = [c for c in curves if all(value == fixed[key] for key, value in c.point if key not in free)]
    return choose_point(allowed, seeds, metric) if free else next((c.point for c in allowed), None)


def choices(
    config: Config, curves: Sequence[Curve]
) -> Iterator[tuple[str, str, list[str], dict[str, dict[int, Curve | None]]]]:
    """By loss, then by :func:`told_kinds`: (loss, kind, free keys, method -> the curve it is told by for each seed)."""
    bench = run_list.require_bench(config, "bench")
    for loss in bench.losses:
        for kind, free in run_list.told_kinds(bench, loss):
            chosen = {
                method: tuned(
                    [curve for curve in curves if (curve.loss, curve.method) == (loss, method)],
                    bench.seeds,
                    bench.utility[0],
                    free,
                    dict(run_list.recipe_point(config, loss, method)),
                    bench.screening,
                )
                for method in bench.methods
            }
            yield loss, kind, free, chosen


def chosen_points(config: Config, screened: Sequence[Curve]) -> dict[tuple[str, str], list[Point]]:
    """By loss and method, the points that are run on the seeds that are told: the recipe's own, and what a screening
    chose."""
    bench = run_list.require_bench(config, "bench")
    found: dict[tuple[str, str], list[Point]] = {}
    for loss, method in itertools.product(bench.losses, bench.methods):
        mine = [curve for curve in screened if (curve.loss, curve.method) == (loss, method)]
        fixed = dict(run_list.recipe_point(config, loss, method))
        points = [
            best_point(mine, bench.screening or [], bench.utility[0], free, fixed)
            for _, free in run_list.told_kinds(bench, loss)
        ]
        found[loss, method] = list(dict.fromkeys(point for point in points if point is not None))
    return found


def bootstrap_ratio(
    values: Sequence[float], baselines: Sequence[float], draws: int = BOOTSTRAP_DRAWS
) -> Interval | None:
    """Percentile interval of mean(values) / mean(baselines) − 1 over paired resamples of the seeds (fixed seed 0).

    Not ``scipy.stats.bootstrap``: it draws other resamples, and the published intervals would move.

    None where a resample's baseline is not above zero, so that there is no ratio; ``ValueError`` for fewer than two
    pairs.
    """
    pairs_N2 = np.array([values, baselines], dtype=np.float64).T
    if len(pairs_N2) < 2:
        raise ValueError("a bootstrap needs two pairs")
    draw_DN = np.random.default_rng(0).integers(0, len(pairs_N2), (draws, len(pairs_N2)))
    means_D2 = pairs_N2[draw_DN].mean(1)
    if (means_D2[:, 1] <= 0).any():
        return None
    low, high = np.quantile(means_D2[:, 0] / means_D2[:, 1] - 1, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(low), float(high))


def compare(
    chosen: Mapping[int, Curve | None], baseline: Mapping[int, Curve | None], metric: str, value: str
) -> dict[str, Any]:
    """One method against the baseline, each at its chosen points, paired by seed; JSON-ready.

    Args:
        value: ``post``, ``cross`` or ``end``.
    """

    def at(curve: Curve) -> float:
        found = curve.found[metric]
        number = {"post": found.post, "cross": found.at_crossing, "end": found.end}[value]
        return math.nan if number is None else number

    sides = [(seed, chosen[seed], baseline[seed]) for seed in chosen]
    reached = [(s, a, b) for s, a, b in sides if a is not None and b is not None and a.step and b.step]
    pairs = [(s, a, b) for s, a, b in reached if math.isfinite(at(a)) and math.isfinite(at(b))]
    mine, theirs = [at(a) for _, a, _ in pairs], [at(b) for _, _, b in pairs]
    steps = [(int(a.step or 0), int(b.step or 0)) for _, a, b in pairs]
    differences = [x - y for x, y in zip(mine, theirs, strict=True)]
    mean, mean_base = (math.fsum(v) / len(v) if v else None for v in (mine, theirs))
    enough = len(pairs) > 1
    spacings = [c.found[metric].spacing or 0 for _, a, b in pairs for c in (a, b)]
    ratio = bootstrap_ratio(mine, theirs) if enough else None
    return {
        "seeds": [s for s, _, _ in pairs],
        "value": mean,
        "value_t_interval": vars(t_interval(mine)) if enough else None,
        "baseline": mean_base,
        "relative": None if mean is None or mean_base is None else relative_gain(mean, mean_base),
        "relative_interval": vars(ratio) if ratio is not None else None,
        "difference": math.fsum(differences) / len(differences) if differences else None,
        "difference_t_interval": vars(t_interval(differences)) if enough else None,
        "by_seed": mine,
        "baseline_by_seed": theirs,
        "steps": [a for a, _ in steps],
        "baseline_steps": [b for _, b in steps],
        "steps_between_scores": max(spacings, default=None),
        "forget_end": [finite(a.forget_end) for _, a, _ in pairs],
        "baseline_forget_end": [finite(b.forget_end) for _, _, b in pairs],
        "not_a_number": [s for s, a, b in reached if not (math.isfinite(at(a)) and math.isfinite(at(b)))],
        "not_reached": {
            "method": [s for s, a, _ in sides if a is None or not a.step],
            "baseline": [s for s, _, b in sides if b is None or not b.step],
        },
        "points": {str(s): None if a is None else label(a.point) for s, a, _ in sides},
        "baseline_points": {str(s): None if b is None else label(b.point) for s, _, b in sides},
    }


def finite(value: float) -> float | None:
    """The value, or None for JSON when it is not a number."""
    return value if math.isfinite(value) else None
