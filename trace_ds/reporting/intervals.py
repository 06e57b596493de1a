"""How sure a number is: 95 % intervals of scores from their questions, and of differences from their pairs.

A score's interval says how much another draw of as many questions could move it, and nothing about another training
run: for that there are studies, over seeds by Student's t. Shape legend: I items.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import softmax

from trace_ds.evaluation.metrics import FORGET_QUALITY, MODEL_UTILITY

if TYPE_CHECKING:
    from trace_ds.reporting.gather import Evaluation, Score

LEVEL = 0.95
Z = 1.959964  # standard normal quantile of (1 + LEVEL) / 2
NO_MEANS = (FORGET_QUALITY, MODEL_UTILITY, "perplexity")  # no mean over questions
ITEM_VALUES: dict[str, Callable[[dict[str, Any]], Any]] = {  # of others the item holds the metric by its name
    "accuracy": lambda item: item["correct"],
    "acc": lambda item: item["correct"],
    "accuracy_norm": lambda item: item["predicted_norm"] == item["answer"],
    "exact_match": lambda item: item["exact"],
    "choice_probability": lambda item: softmax(item["log_prob"])[item["answer"]],
}


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def wilson(share: float, count: int) -> Interval:
    """Wilson's score interval of a share of ``count`` questions; for a mean of scores in 0 … 1 it is at most too wide
    (their variance is at most that of a share)."""
    spread = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2)
    middle, scale = share + Z**2 / (2 * count), 1 + Z**2 / count
    return Interval((middle - spread) / scale, (middle + spread) / scale)


def t_interval(values: Sequence[float]) -> Interval:
    """Student's t interval of the mean; ``ValueError`` for fewer than two values.

    Equal values have an interval without width; scipy warns there, or gives NaN.
    """
    from scipy import stats

    n = len(values)
    if n < 2:
        raise ValueError("an interval needs two differences")
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean - half, mean + half)


def of_score(score: Score) -> Interval | None:
    """Interval of a score, from the number of its questions; None for a score that is no mean over them."""
    if score.direction == "reference" or score.metric in NO_MEANS or not score.n or not 0 <= score.value <= 1:
        return None
    return wilson(score.value, score.n)


def of_difference(score: Score, evaluation: Evaluation, its: Evaluation) -> Interval | None:
    """Interval of a score minus that of another model on the same task."""
    return of_mixes([[evaluation], [its]], [score])


def of_mixes(sides: Sequence[Sequence[Evaluation]], scores: Sequence[Score]) -> Interval | None:
    """Normal interval of the mean, over the tasks of ``scores``, of the difference between two lists of models' means.

    Paired by question where the evaluations keep them. The curve of a job does not: then the variance is that of
    independent questions, p (1 - p) at most.
    """
    parts = []
    for score in scores:
        values_by_item = [[item_values(model, score.task, score.metric) for model in side] for side in sides]
        shared = [name for name in values_by_item[0][0] if all(name in one for side in values_by_item for one in side)]
        if len(shared) > 1:
            mine_I, base_I = (
                np.mean([[one[name] for name in shared] for one in side], axis=0) for side in values_by_item
            )
            parts.append((float((mine_I - base_I).mean()), float((mine_I - base_I).var(ddof=1)) / len(shared)))
            continue
        values = [[model.value(score.task, score.metric) for model in side] for side in sides]
        means = [math.fsum(math.nan if v is None else v for v in side) / len(side) for side in values]
        if not score.n or score.metric in NO_MEANS or not all(0 <= mean <= 1 for mean in means):
            return None
        parts.append((means[0] - means[1], math.fsum(mean * (1 - mean) for mean in means) / score.n))
    if not parts:
        return None
    mean, variance = (math.fsum(column) / len(parts) for column in zip(*parts, strict=True))
    half = Z * math.sqrt(variance / len(parts))
    return Interval(mean - half, mean + half)


def item_values(evaluation: Evaluation, task: str, metric: str) -> dict[str, float]:
    """A metric by question, where the evaluation keeps it."""
    read = ITEM_VALUES.get(metric, lambda item: item[metric])
    values = {}
    for item in evaluation.items.get(task) or []:
        with contextlib.suppress(KeyError, TypeError, IndexError, ValueError):
            values[str(item.get("id"))] = float(read(item))
    return values
