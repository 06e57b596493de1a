"""From a checked task and a model to scores in the common form of a result.

The first score of a task is its headline. ``direction`` says which way is good for the task's role: a forget task
wants little knowledge left (accuracy lower, perplexity higher), a utility task the opposite.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trace_ds.errors import UserError
from trace_ds.evaluation import choice, perplexity, verbatim
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import LanguageModel

METRICS = {
    "choice": ("accuracy", "accuracy_norm", "exact_match"),
    "verbatim": ("rouge_l", "exact_tokens"),
    "perplexity": ("perplexity",),
}
KNOWLEDGE_GROWS = {"accuracy", "accuracy_norm", "exact_match", "rouge_l", "exact_tokens"}
CHANCES = {"accuracy": choice.CHANCE, "accuracy_norm": choice.CHANCE}


@dataclass(frozen=True)
class TaskResult:
    """Scores (as in the evaluation artefact), per-item logs, and metrics by source."""

    scores: list[dict[str, Any]]
    items: list[dict[str, Any]]
    by_source: dict[str, dict[str, float]]


def direction(metric: str, role: str) -> str:
    """``lower`` or ``higher``: which way is good."""
    return "higher" if (metric in KNOWLEDGE_GROWS) == (role == "utility") else "lower"


def run_task(
    model: LanguageModel,
    task: Task,
    *,
    max_new_tokens: int,
    context_length: int,
    advance: Callable[[int], None] | None = None,
) -> TaskResult:
    """Score one model on one task."""
    items: Any = task.items
    where = task.config.path
    n = len(items)
    result: Any
    if task.config.type == "choice":
        result = choice.evaluate_choice(model, items, where, advance)
        metrics, logs = result.metrics(), choice.item_logs(items, result)
        sources = choice.by_source(items, result)
    elif task.config.type == "verbatim":
        result = verbatim.evaluate_verbatim(model, items, max_new_tokens, where, advance)
        metrics, logs = result.metrics(), verbatim.item_logs(items, result)
        sources = verbatim.by_source(items, result)
    else:
        result = perplexity.evaluate_perplexity(model, items, context_length, advance)
        n = int(result.tokens.sum())
        if not n:
            raise UserError("no document has two tokens", where, "a perplexity of nothing: add text")
        metrics, logs = {"perplexity": result.perplexity()}, perplexity.item_logs(result)
        sources = {
            source: {name: value for name, value in values.items() if math.isfinite(value)}
            for source, values in perplexity.by_source(result).items()
        }
    return TaskResult(score_records(task, metrics, n), logs, sources)


def score_records(task: Task, metrics: dict[str, float], n: int) -> list[dict[str, Any]]:
    """The scores of a task; ``value`` is None for a metric that is missing in ``metrics`` or not finite."""
    return [
        {
            "task": task.config.name,
            "metric": metric,
            "value": metrics[metric] if math.isfinite(metrics.get(metric, math.nan)) else None,
            "n": n,
            "role": task.config.role,
            "direction": direction(metric, task.config.role),
            "chance": CHANCES.get(metric),
        }
        for metric in METRICS[task.config.type]
    ]
