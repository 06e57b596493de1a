"""How sure a number is: 95 % intervals of scores from their questions, and of differences from their pairs.

A score's interval says how much another draw of as many questions could move it, and nothing about another training
run: only several seeds do, by Student's t. Shape legend: I items.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.evaluation.metrics import FORGET_QUALITY, MODEL_UTILITY

if TYPE_CHECKING:
    from trace_ds.reporting.gather import Evaluation, Score

LEVEL = 0.95
Z = 1.959964  # standard normal quantile of (1 + LEVEL) / 2
NO_MEANS = (FORGET_QUALITY, MODEL_UTILITY)  # in 0 … 1, and no mean over questions
ITEM_KEYS = {"accuracy": "correct", "acc": "correct", "exact_match": "exact"}  # else an item's key is its metric's name


@dataclass(frozen=True)
class Interval:
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


def of_score(score: Score, evaluation: Evaluation) -> Interval | None:
    """From its seeds where there are several, else from its questions; None for a score that is no mean over them."""
    if len(score.by_seed) > 1:
        return t_interval(score.by_seed)
    if "perplexity" in score.metric:
        return _of_perplexity(evaluation.items.get(score.task) or [])
    if score.direction == "reference" or score.metric in NO_MEANS or not score.n or not 0 <= score.value <= 1:
        return None
    return wilson(score.value, score.n)


def of_mean(scores: Sequence[Score], evaluation: Evaluation) -> Interval | None:
    """Of the mean of several tasks' scores (the method of variance estimates recovery, Zou and Donner 2008)."""
    known = [(score.value, found) for score in scores if (found := of_score(score, evaluation)) is not None]
    if not known or len(known) < len(scores):
        return None
    middle = math.fsum(value for value, _ in known) / len(known)
    low = math.sqrt(math.fsum((value - found.low) ** 2 for value, found in known)) / len(known)
    high = math.sqrt(math.fsum((found.high - value) ** 2 for value, found in known)) / len(known)
    return Interval(middle - low, middle + high)


def of_difference(score: Score, evaluation: Evaluation, other: Score, its: Evaluation) -> Interval | None:
    """Of a score less that of another model on the same task: paired by seed, else by question."""
    if len(score.by_seed) > 1:
        return t_interval([a - b for a, b in zip(score.by_seed, other.by_seed, strict=True)])
    mine, theirs = (item_values(model, score.task, score.metric) for model in (evaluation, its))
    return of_paired_difference([np.array([value - theirs[name] for name, value in mine.items() if name in theirs])])


def item_values(evaluation: Evaluation, task: str, metric: str) -> dict[str, float]:
    """A metric by question, where the evaluation keeps it."""
    key = ITEM_KEYS.get(metric, metric)
    items = evaluation.items.get(task) or []
    if metric == "accuracy_norm":
        items = [{**item, key: item["predicted_norm"] == item["answer"]} for item in items if "predicted_norm" in item]
    return {str(item.get("id")): float(item[key]) for item in items if isinstance(item.get(key), (bool, int, float))}


def of_paired_difference(differences: Sequence[np.ndarray]) -> Interval | None:
    """Of the mean over tasks of mean differences [I] between two models on the same questions (normal)."""
    if not differences or any(len(found_I) < 2 for found_I in differences):
        return None
    mean = math.fsum(float(found_I.mean()) for found_I in differences) / len(differences)
    variance = math.fsum(float(found_I.var(ddof=1)) / len(found_I) for found_I in differences) / len(differences) ** 2
    return Interval(mean - Z * math.sqrt(variance), mean + Z * math.sqrt(variance))


def _of_perplexity(items: Sequence[dict[str, Any]]) -> Interval | None:
    """By documents: the mean loss per token is a ratio of two sums, whose error is that of its residuals."""
    pairs = [(item["nll"], item["tokens"]) for item in items if item.get("nll") is not None and item.get("tokens")]
    if len(pairs) < 2:
        return None
    nll_I, tokens_I = np.array(pairs, dtype=np.float64).T
    mean = nll_I.sum() / tokens_I.sum()
    error = math.sqrt(float(((nll_I - mean * tokens_I) ** 2).sum())) / tokens_I.sum()
    return Interval(math.exp(mean - Z * error), math.exp(mean + Z * error))
