"""What the curves of a study show: every method against the baseline at matched forgetting; pure functions.

Stopping earlier always looks better on utility, so methods are compared from where each has forgotten enough: the first
scored step at which the forget score is at most the target. Each run has two numbers: ``post``, the mean utility from
that step to the last (strengths are chosen by it), and ``end``, the utility after the last step. A run that never gets
there, or diverges, is not compared; nor is a seed whose original model is at the target: there is nothing to forget.

**Tuning without peeking** (our decision): the seeds are dealt to two folds in turn. For each fold the strength of a
method is the one with the best mean ``post`` over the *other* fold's seeds, among those that reached the target on
most of them; ties go to the fewer steps. So every reported number was made at a strength chosen on other base models,
for the baseline in exactly the same way.

Intervals are 95 % intervals over seeds by Student's t, of the paired log ratios and of the paired differences (our
decision: with four or five seeds a percentile bootstrap covers about .8 instead of .95).

Shape legend: S scored steps.
"""

from __future__ import annotations

import fnmatch
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trace_ds.config.schema import Config
from trace_ds.reporting.intervals import Interval, t_interval
from trace_ds.run.curve import scores_of
from trace_ds.studies.runs import recipe_trial, require_bench

SAME = "same strength"
_TOLERANCE = 1e-9  # of a score at the target


@dataclass(frozen=True)
class Matched:
    """One run at matched forgetting.

    Attributes:
        step: first scored step at the target; None when it was never reached.
        post: mean utility from ``step`` to the last scored step; None as ``step``.
        end: utility at the last scored step.
    """

    step: int | None
    post: float | None
    end: float


Measure = Callable[[list[int], list[float], list[float]], Matched]  # of steps, forget scores and utilities


def reached(forget_S: Sequence[float], target: float) -> int | None:
    """The index of the first forget score at the target; None where none is. NaN never is."""
    return next((index for index, score in enumerate(forget_S) if score <= target + _TOLERANCE), None)


def matched(steps_S: Sequence[int], forget_S: Sequence[float], utility_S: Sequence[float], target: float) -> Matched:
    """One run at a target; ``ValueError`` unless steps increase and all lengths agree."""
    if not (len(steps_S) == len(forget_S) == len(utility_S)) or not steps_S:
        raise ValueError(f"{len(steps_S)} steps, {len(forget_S)} forget scores, {len(utility_S)} utilities")
    if any(later <= earlier for earlier, later in pairwise(steps_S)):
        raise ValueError(f"the steps do not increase: {list(steps_S)}")
    first = reached(forget_S, target)
    if first is None:
        return Matched(None, None, float(utility_S[-1]))
    tail = [float(value) for value in utility_S[first:]]
    return Matched(int(steps_S[first]), math.fsum(tail) / len(tail), tail[-1])


@dataclass(frozen=True)
class Curve:
    """The scores of one run by step, ``scores`` [S] by metric (NaN where there is none); ``strength`` is its label."""

    seed: int
    method: str
    strength: str
    steps: list[int]
    scores: dict[str, list[float]]
    diverged: bool = False

    @property
    def settings(self) -> dict[str, str]:
        return _settings_of(self.strength)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.method}, {self.strength}"


def _settings_of(strength: str) -> dict[str, str]:
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
        measure: :func:`matched` at a target.
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

    def matched(self, curve: Curve | None, metric: str) -> Matched | None:
        """A run at matched forgetting by one utility metric; None where it is not compared."""
        match = self._matched.get((id(curve), metric))
        return match if match and match.step and curve and not curve.diverged else None

    def step(self, curve: Curve) -> int | None:
        """The first scored step at which the target is met: 0 where the original model does, None where none does."""
        return self._matched[id(curve), self.bench.utility[0]].step

    @property
    def nothing_to_forget(self) -> list[int]:
        """Seeds whose original model is at the target."""
        return sorted({curve.seed for curve in self.curves if self.step(curve) == 0})

    def summary(self) -> dict[str, Any]:
        """The comparisons and what stands beside them in study.json, as far as the curves tell it."""
        never = [curve for curve in self.curves if self.step(curve) is None and not curve.diverged]
        return {
            "recipe": self.config.name,
            "seeds": self.seeds,
            "baseline": self.bench.baseline,
            "forget": self.bench.forget,
            "nothing_to_forget": self.nothing_to_forget,
            "diverged": [str(curve) for curve in self.curves if curve.diverged],
            "never_reached": [str(curve) for curve in never],
            "comparisons": self.rows(),
        }

    def rows(self) -> list[dict[str, Any]]:
        """Every comparison, JSON-ready: by strength, method, metric and moment; ``tuned``: method and baseline
        both are, where the strength is their own."""
        return [
            {"strength": kind, "method": method, "metric": metric, "at": at, "tuned": tuned}
            | self.compare(chosen[method], chosen[self.bench.baseline], metric, at)
            for kind, chosen in self.choices()
            for method in chosen
            for tuned in [kind == SAME or self._varies(kind.split()[-1], method, self.bench.baseline)]
            for metric in self.metrics
            for at in ("post", "end")
        ]

    def choices(self) -> Iterator[tuple[str, dict[str, dict[int, Curve | None]]]]:
        """(what is tuned, method -> its curve for each seed): nothing, then the first key of the grid, then the first
        two, … as far as some method has several values of the last key."""
        methods = dict.fromkeys([*self.bench.methods, *(curve.method for curve in self.curves)])
        of_method = {method: [curve for curve in self.curves if curve.method == method] for method in methods}
        of_method = {method: mine for method, mine in of_method.items() if mine}
        own = {method: _settings_of(recipe_trial(self.config, method).label) for method in of_method}
        keys = [key.rsplit(".", 1)[-1] for key in self.bench.grid]
        for count in range(len(keys) + 1):
            free = keys[:count]
            if not free or any(self._varies(free[-1], method) for method in of_method):
                fixed = {method: {k: v for k, v in own[method].items() if k not in free} for method in of_method}
                yield (
                    f"own {', '.join(free)}" if free else SAME,
                    {method: self.tuned(mine, fixed[method], bool(free)) for method, mine in of_method.items()},
                )

    def _varies(self, key: str, *methods: str) -> bool:
        """Whether each of the methods was run at several values of a key of the grid."""
        return all(len({c.settings.get(key) for c in self.curves if c.method == method}) > 1 for method in methods)

    def tuned(self, curves: Sequence[Curve], fixed: Mapping[str, str], tune: bool) -> dict[int, Curve | None]:
        """For each seed the curve at the strength chosen on the other fold, among those with the ``fixed`` settings;
        None where the other fold gives no choice."""
        allowed = [c for c in curves if all(_same(c.settings.get(k), v) for k, v in fixed.items())]
        folds = list(self.seeds[0::2]), list(self.seeds[1::2])
        chosen: dict[int, Curve | None] = {}
        for mine, other in (folds, folds[::-1]):
            strength = self.best_strength(allowed, other) if tune else next((c.strength for c in allowed), None)
            for seed in mine:
                chosen[seed] = next((c for c in allowed if c.seed == seed and c.strength == strength), None)
        return {seed: chosen[seed] for seed in self.seeds}

    def best_strength(self, curves: Sequence[Curve], seeds: Sequence[int]) -> str | None:
        """The strength with the highest utility at the target on ``seeds``; None when no curve reached it there."""
        ranks: dict[str, tuple[float, float, float]] = {}
        for strength in dict.fromkeys(curve.strength for curve in curves):
            mine = [curve for curve in curves if curve.strength == strength and curve.seed in seeds]
            matches = [self.matched(curve, self.bench.utility[0]) for curve in mine]
            done = [(m.post, m.step) for m in matches if m and m.post is not None and math.isfinite(m.post)]
            if done:
                posts, steps = zip(*done, strict=True)
                ranks[strength] = (float(len(done)), math.fsum(posts) / len(posts), -math.fsum(steps) / len(steps))
        return max(ranks, key=lambda strength: ranks[strength], default=None)

    def compare(
        self, chosen: Mapping[int, Curve | None], baseline: Mapping[int, Curve | None], metric: str, at: str
    ) -> dict[str, Any]:
        """One method against the baseline, paired by seed; ``at`` is post or end."""

        def read(curve: Curve | None) -> tuple[int, float, float] | None:
            """Step at the target, utility, forget score at the end; None where one of the first two is missing."""
            match = self.matched(curve, metric)
            value = None if match is None else getattr(match, at)
            if curve is None or match is None or match.step is None or value is None or not math.isfinite(value):
                return None
            return match.step, value, curve.scores[self.bench.forget][-1]

        both = {seed: (read(curve), read(baseline.get(seed))) for seed, curve in chosen.items()}
        pairs = {seed: (a, b) for seed, (a, b) in both.items() if a is not None and b is not None}
        mine, theirs = ([sides[side][1] for sides in pairs.values()] for side in (0, 1))
        differences = [x - y for x, y in zip(mine, theirs, strict=True)]
        mean, mean_base, difference = (math.fsum(v) / len(v) if v else None for v in (mine, theirs, differences))
        several = len(pairs) > 1
        ratio = ratio_interval(mine, theirs) if several else None
        return {
            "seeds": list(pairs),
            "value": mean,
            "baseline": mean_base,
            "relative": mean / mean_base - 1 if mean is not None and mean_base and mean_base > 0 else None,
            "relative_interval": vars(ratio) if ratio is not None else None,
            "difference": difference,
            "difference_t_interval": vars(t_interval(differences)) if several else None,
            "detectable": smallest_detectable(differences),
            "by_seed": mine,
            "baseline_by_seed": theirs,
            "steps": [a[0] for a, _ in pairs.values()],
            "baseline_steps": [b[0] for _, b in pairs.values()],
            "forget_end": [finite(a[2]) for a, _ in pairs.values()],
            "baseline_forget_end": [finite(b[2]) for _, b in pairs.values()],
            "strengths": {str(seed): None if curve is None else curve.strength for seed, curve in chosen.items()},
        }


def _same(one: str | None, other: str) -> bool:
    """Whether two settings in words are one value: ``16`` is ``16.0``."""
    try:
        return float(one or "") == float(other)
    except ValueError:
        return one == other


def ratio_interval(values: Sequence[float], baselines: Sequence[float]) -> Interval | None:
    """Interval of value / baseline − 1 for paired positive numbers: Student's t of the mean log ratio, as a ratio.

    None where a number is not above zero, so that there is no ratio.
    """
    if min(*values, *baselines) <= 0:
        return None
    logs = t_interval([math.log(value / base) for value, base in zip(values, baselines, strict=True)])
    return Interval(math.expm1(logs.low), math.expm1(logs.high))


def smallest_detectable(differences: Sequence[float], power: float = 0.8, level: float = 0.05) -> float | None:
    """The smallest true difference that a paired t test finds with this power, at the seeds' number and spread."""
    from scipy import optimize, stats

    n, spread = len(differences), statistics.stdev(differences) if len(differences) > 1 else 0.0
    if not spread:
        return None
    edge = stats.t.ppf(1 - level / 2, n - 1)

    def missed(shift: float) -> float:  # shift: the difference in standard errors; the other side has no chance
        return float(stats.nct.cdf(edge, n - 1, shift)) - (1 - power)

    return float(optimize.brentq(missed, 0.0, 20.0)) * spread / math.sqrt(n)


def finite(value: float) -> float | None:
    """The value, or None for JSON when it is not a number."""
    return value if math.isfinite(value) else None
