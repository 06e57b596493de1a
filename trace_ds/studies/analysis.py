"""What the curves of a study show: every method against the baseline at matched forgetting; pure functions.

A run has *forgotten* from the first scored step at which its forget score is at most the target. Three numbers are told
of it: ``cross``, the utility where the line to that step from the one before meets the target, ``post``, the mean
utility from that step to the last (less noisy, so strengths are chosen by it), and ``end``, the utility after the last
step. A run that never gets there, or diverges, is never compared; nor is a seed whose original model is at the target
already: there is nothing to forget.

**Tuning without peeking** (our decision): the seeds are dealt to two folds in turn. For each fold the strength of a
method is the one with the best mean ``post`` over the *other* fold's seeds, among those that reached the target on
most of them; ties go to the fewer steps. So every reported number was made at a strength chosen on other base models,
for the baseline in exactly the same way.

Intervals: 95 % of a paired bootstrap over seeds (percentile, the ratio of the two means; Efron & Tibshirani 1993,
chapter 13) and, beside it, Student's t of the paired differences. Few seeds make the bootstrap optimistic: read both.

Shape legend: S scored steps, N seeds, D draws.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.config.schema import Config
from trace_ds.reporting.intervals import LEVEL, Interval, t_interval
from trace_ds.run.curve import scores_of
from trace_ds.studies.matched import Matched, relative_gain
from trace_ds.studies.runs import recipe_trial, require_bench

BOOTSTRAP_DRAWS = 10_000
SAME = "same strength"
Measure = Callable[[list[int], list[float], list[float]], Matched]  # of steps, forget scores and utilities


@dataclass(frozen=True)
class Curve:
    """The scores of one run by step, ``scores`` [S] by metric (NaN where there is none); ``strength`` is its label."""

    seed: int
    loss: str
    method: str
    strength: str
    steps: list[int]
    scores: dict[str, list[float]]
    diverged: bool = False

    @property
    def settings(self) -> dict[str, str]:
        return settings_of(self.strength)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.loss}, {self.method}, {self.strength}"


def settings_of(strength: str) -> dict[str, str]:
    """``{"alpha": "16", "lr": "0.0005"}`` of ``alpha=16,lr=0.0005``."""
    return dict(part.split("=", 1) for part in strength.split(",") if part)


def metric_of(point: Mapping[str, Any], name: str) -> float:
    """``'TASK METRIC'`` or ``'TASK METRIC SOURCES'`` of an evaluation or a point of a curve; NaN without a value."""
    task, metric, *pattern = name.split()
    if not pattern:
        value = scores_of(point).get(f"{task} {metric}")
        return math.nan if value is None else float(value)
    sources = point["by_source"].get(task, {})
    chosen = [v for source, v in sources.items() if fnmatch.fnmatch(source, pattern[0])]
    count = sum(v["n"] for v in chosen)
    if not count or any(v.get(metric) is None for v in chosen):
        return math.nan
    if metric == "perplexity":  # of the tokens of all sources together
        return math.exp(math.fsum(v["n"] * math.log(v[metric]) for v in chosen) / count)
    return math.fsum(v["n"] * v[metric] for v in chosen) / count


class Comparison:
    """The curves of a study, each at matched forgetting.

    Args:
        config: the recipe, which names baseline, metrics, grid and the strength that all share.
        curves: of any methods and seeds, also ones that the recipe no longer has.
        measure: what is told of a curve, :func:`trace_ds.studies.matched.matched` at a target.
    """

    def __init__(self, config: Config, curves: Sequence[Curve], measure: Measure) -> None:
        self.config, self.bench = config, require_bench(config, config.name)
        self.curves = list(curves)
        self.seeds = sorted({curve.seed for curve in curves})
        scored = [metric for curve in self.curves for metric in curve.scores if metric != self.bench.forget]
        self.metrics = list(dict.fromkeys([*self.bench.utility, *scored]))
        self._matched = {
            (id(curve), metric): measure(curve.steps, curve.scores[self.bench.forget], curve.scores[metric])
            for curve in self.curves
            for metric in self.metrics
            if metric in curve.scores
        }

    def matched(self, curve: Curve, metric: str) -> Matched | None:
        """None where the run is not to be compared."""
        found = self._matched.get((id(curve), metric))
        return found if found is not None and found.step and not curve.diverged else None

    def step(self, curve: Curve) -> int | None:
        """The first scored step at which the target is met: 0 where the original model does, None where none does."""
        found = self._matched.get((id(curve), self.bench.utility[0]))
        return None if found is None else found.step

    @property
    def nothing_to_forget(self) -> list[int]:
        """Seeds whose original model is at the target."""
        return sorted({curve.seed for curve in self.curves if self.step(curve) == 0})

    def rows(self) -> list[dict[str, Any]]:
        """Every comparison, JSON-ready: by loss, strength, method, metric and moment."""
        return [
            {"loss": loss, "strength": kind, "method": method, "metric": metric, "at": at}
            | self.compare(chosen[method], chosen[self.bench.baseline], metric, at)
            for loss in dict.fromkeys(curve.loss for curve in self.curves)
            for kind, chosen in self.choices(loss)
            for method in chosen
            for metric in self.metrics
            for at in ("post", "cross", "end")
        ]

    def choices(self, loss: str) -> Iterator[tuple[str, dict[str, dict[int, Curve | None]]]]:
        """(what is tuned, method -> the curve it is told by for each seed): nothing, then the first key of the grid,
        then the first two, … as far as some method has several values of the last key."""
        mine = [curve for curve in self.curves if curve.loss == loss]
        methods = dict.fromkeys([*self.bench.methods, *(curve.method for curve in mine)])
        of_method = {method: [curve for curve in mine if curve.method == method] for method in methods}
        of_method = {method: curves for method, curves in of_method.items() if curves}
        own = {method: settings_of(recipe_trial(self.config, loss, method).label) for method in of_method}
        keys = [key.rsplit(".", 1)[-1] for key in self.bench.grid]
        for count in range(len(keys) + 1):
            free = keys[:count]
            if not free or any(len({c.settings.get(free[-1]) for c in curves}) > 1 for curves in of_method.values()):
                fixed = {method: {k: v for k, v in own[method].items() if k not in free} for method in of_method}
                yield (
                    f"own {', '.join(free)}" if free else SAME,
                    {method: self.tuned(curves, fixed[method], bool(free)) for method, curves in of_method.items()},
                )

    def tuned(self, curves: Sequence[Curve], fixed: Mapping[str, str], tune: bool) -> dict[int, Curve | None]:
        """For each seed the curve at the strength chosen on the other fold, among those with the ``fixed`` settings.

        None for a seed whose other fold gives no choice.
        """
        allowed = [c for c in curves if all(_same(c.settings.get(k), v) for k, v in fixed.items())]
        folds = list(self.seeds[0::2]), list(self.seeds[1::2])
        chosen: dict[int, Curve | None] = {}
        for mine, other in (folds, folds[::-1]):
            strength = self.best_strength(allowed, other) if tune else next((c.strength for c in allowed), None)
            for seed in mine:
                chosen[seed] = next((c for c in allowed if c.seed == seed and c.strength == strength), None)
        return {seed: chosen[seed] for seed in self.seeds}

    def best_strength(self, curves: Sequence[Curve], seeds: Sequence[int]) -> str | None:
        """None when none of the curves ever reached the target on ``seeds``."""
        best: tuple[tuple[float, float, float], str] | None = None
        for strength in dict.fromkeys(curve.strength for curve in curves):
            mine = [curve for curve in curves if curve.strength == strength and curve.seed in seeds]
            found = [self.matched(curve, self.bench.utility[0]) for curve in mine]
            reached = [(m.post, m.step) for m in found if m and m.post is not None and math.isfinite(m.post)]
            if reached:
                posts, steps = zip(*reached, strict=True)
                rank = (float(len(reached)), math.fsum(posts) / len(posts), -math.fsum(steps) / len(steps))
                if best is None or rank > best[0]:
                    best = (rank, strength)
        return None if best is None else best[1]

    def compare(
        self, chosen: Mapping[int, Curve | None], baseline: Mapping[int, Curve | None], metric: str, at: str
    ) -> dict[str, Any]:
        """One method against the baseline, paired by seed; ``at`` is post, cross or end."""

        def read(curve: Curve | None) -> tuple[Matched, float, float] | None:
            found = None if curve is None else self.matched(curve, metric)
            if curve is None or found is None:
                return None
            value = {"post": found.post, "cross": found.at_crossing, "end": found.end}[at]
            return found, math.nan if value is None else value, curve.scores[self.bench.forget][-1]

        both = {seed: (read(curve), read(baseline.get(seed))) for seed, curve in chosen.items()}
        reached = {seed: (a, b) for seed, (a, b) in both.items() if a is not None and b is not None}
        pairs = {seed: (a, b) for seed, (a, b) in reached.items() if math.isfinite(a[1]) and math.isfinite(b[1])}
        mine, theirs = ([sides[side][1] for sides in pairs.values()] for side in (0, 1))
        differences = [x - y for x, y in zip(mine, theirs, strict=True)]
        mean, mean_base = (math.fsum(v) / len(v) if v else None for v in (mine, theirs))
        several = len(pairs) > 1
        ratio = bootstrap_ratio(mine, theirs) if several else None
        return {
            "seeds": list(pairs),
            "value": mean,
            "value_t_interval": vars(t_interval(mine)) if several else None,
            "baseline": mean_base,
            "relative": None if mean is None or mean_base is None else relative_gain(mean, mean_base),
            "relative_interval": vars(ratio) if ratio is not None else None,
            "difference": math.fsum(differences) / len(differences) if differences else None,
            "difference_t_interval": vars(t_interval(differences)) if several else None,
            "by_seed": mine,
            "baseline_by_seed": theirs,
            "steps": [a[0].step for a, _ in pairs.values()],
            "baseline_steps": [b[0].step for _, b in pairs.values()],
            "steps_between_scores": max((m[0].spacing or 0 for sides in pairs.values() for m in sides), default=None),
            "forget_end": [finite(a[2]) for a, _ in pairs.values()],
            "baseline_forget_end": [finite(b[2]) for _, b in pairs.values()],
            "not_a_number": [seed for seed in reached if seed not in pairs],
            "not_reached": {
                "method": [seed for seed, (a, _) in both.items() if a is None],
                "baseline": [seed for seed, (_, b) in both.items() if b is None],
            },
            "strengths": {str(seed): None if curve is None else curve.strength for seed, curve in chosen.items()},
        }


def _same(one: str | None, other: str) -> bool:
    """Whether two settings in words are one value: ``16`` is ``16.0``."""
    try:
        return float(one or "") == float(other)
    except ValueError:
        return one == other


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


def finite(value: float) -> float | None:
    """The value, or None for JSON when it is not a number."""
    return value if math.isfinite(value) else None
