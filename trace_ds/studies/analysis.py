"""What the curves of a study show: every method against the baseline at matched forgetting; pure functions.

Stopping earlier always looks better on utility, so methods are compared from where each has forgotten enough: the first
scored step at which the forget score is at most the target. Each run has three numbers: ``cross``, the utility where
the line to that step from the one before meets the target, ``post``, the mean utility from that step to the last (less
noisy, so strengths are chosen by it), and ``end``, the utility after the last step. A run that never gets there, or
diverges, is not compared; nor is a seed whose original model is at the target already: there is nothing to forget.

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
class Reached:
    """Where forget scores first meet the target: ``index`` of the scored step, and ``share`` of the way to it from the
    step before at which the straight line between the two does (1: there is none before)."""

    index: int
    share: float


@dataclass(frozen=True)
class Matched:
    """One run at matched forgetting.

    Attributes:
        step: first scored step at the target; None (as the next three) when it was never reached.
        spacing: steps since the scored step before it (0: there is none).
        at_crossing: utility where the line between the two meets the target.
        post: mean utility from ``step`` to the last scored step.
        end: utility at the last scored step.
    """

    step: int | None
    spacing: int | None
    at_crossing: float | None
    post: float | None
    end: float


Measure = Callable[[list[int], list[float], list[float]], Matched]  # of steps, forget scores and utilities


def reached(forget_S: Sequence[float], target: float) -> Reached | None:
    """Where the forget scores first are at the target; None where they never are. NaN never is."""
    index = next((number for number, score in enumerate(forget_S) if score <= target + _TOLERANCE), None)
    if index is None:
        return None
    before = forget_S[index - 1] if index else math.nan
    share = (before - target) / (before - forget_S[index]) if math.isfinite(before) else 1.0
    return Reached(index, min(share, 1.0))


def matched(steps_S: Sequence[int], forget_S: Sequence[float], utility_S: Sequence[float], target: float) -> Matched:
    """One run at a target; ``ValueError`` unless steps increase and all lengths agree."""
    if not (len(steps_S) == len(forget_S) == len(utility_S)) or not steps_S:
        raise ValueError(f"{len(steps_S)} steps, {len(forget_S)} forget scores, {len(utility_S)} utilities")
    if any(later <= earlier for earlier, later in pairwise(steps_S)):
        raise ValueError(f"the steps do not increase: {list(steps_S)}")
    end = float(utility_S[-1])
    first = reached(forget_S, target)
    if first is None:
        return Matched(None, None, None, None, end)
    tail = [float(value) for value in utility_S[first.index :]]
    step, spacing, crossing = int(steps_S[first.index]), 0, tail[0]
    if first.index:
        spacing, before = step - int(steps_S[first.index - 1]), float(utility_S[first.index - 1])
        crossing = before + first.share * (tail[0] - before) if first.share < 1 else tail[0]
    return Matched(step, spacing, crossing, math.fsum(tail) / len(tail), end)


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
        return _settings_of(self.strength)

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.loss}, {self.method}, {self.strength}"


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
        """(what is tuned, method -> its curve for each seed): nothing, then the first key of the grid, then the first
        two, … as far as some method has several values of the last key."""
        curves = [curve for curve in self.curves if curve.loss == loss]
        methods = dict.fromkeys([*self.bench.methods, *(curve.method for curve in curves)])
        of_method = {method: [curve for curve in curves if curve.method == method] for method in methods}
        of_method = {method: mine for method, mine in of_method.items() if mine}
        own = {method: _settings_of(recipe_trial(self.config, loss, method).label) for method in of_method}
        keys = [key.rsplit(".", 1)[-1] for key in self.bench.grid]
        for count in range(len(keys) + 1):
            free = keys[:count]
            if not free or any(len({c.settings.get(free[-1]) for c in mine}) > 1 for mine in of_method.values()):
                fixed = {method: {k: v for k, v in own[method].items() if k not in free} for method in of_method}
                yield (
                    f"own {', '.join(free)}" if free else SAME,
                    {method: self.tuned(mine, fixed[method], bool(free)) for method, mine in of_method.items()},
                )

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
        """One method against the baseline, paired by seed; ``at`` is post, cross or end."""
        field = {"post": "post", "cross": "at_crossing", "end": "end"}[at]

        def read(curve: Curve | None) -> tuple[int, float, float] | None:
            """Step at the target, utility, forget score at the end."""
            match = self.matched(curve, metric)
            if curve is None or match is None or match.step is None:
                return None
            value = getattr(match, field)
            return match.step, math.nan if value is None else value, curve.scores[self.bench.forget][-1]

        both = {seed: (read(curve), read(baseline.get(seed))) for seed, curve in chosen.items()}
        compared = {seed: (a, b) for seed, (a, b) in both.items() if a is not None and b is not None}
        pairs = {seed: (a, b) for seed, (a, b) in compared.items() if math.isfinite(a[1]) and math.isfinite(b[1])}
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
            "by_seed": mine,
            "baseline_by_seed": theirs,
            "steps": [a[0] for a, _ in pairs.values()],
            "baseline_steps": [b[0] for _, b in pairs.values()],
            "forget_end": [finite(a[2]) for a, _ in pairs.values()],
            "baseline_forget_end": [finite(b[2]) for _, b in pairs.values()],
            "not_a_number": [seed for seed in compared if seed not in pairs],
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


def ratio_interval(values: Sequence[float], baselines: Sequence[float]) -> Interval | None:
    """Interval of value / baseline − 1 for paired positive numbers: Student's t of the mean log ratio, as a ratio.

    None where a number is not above zero, so that there is no ratio.
    """
    if min(*values, *baselines) <= 0:
        return None
    logs = t_interval([math.log(value / base) for value, base in zip(values, baselines, strict=True)])
    return Interval(math.expm1(logs.low), math.expm1(logs.high))


def finite(value: float) -> float | None:
    """The value, or None for JSON when it is not a number."""
    return value if math.isfinite(value) else None
