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
from trace_ds.evaluation import choice, extraction, harness, knowmem, membership, perplexity, verbatim
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import LanguageModel

METRICS = {
    "choice": ("accuracy", "accuracy_norm", "exact_match"),
    "verbatim": ("rouge_l", "exact_tokens"),
    "perplexity": ("perplexity",),
    "knowmem": ("rouge_l",),
    "membership": (membership.PRIV_LEAK, *(f"auc_{attack}" for attack in membership.ATTACKS)),
    "extraction": ("extraction_strength",),
    "lm_eval": harness.METRICS,
}
KNOWLEDGE_GROWS = {"accuracy", "accuracy_norm", "exact_match", "rouge_l", "exact_tokens", "extraction_strength"}
KNOWLEDGE_GROWS |= set(harness.METRICS)
CHANCES = {"accuracy": choice.CHANCE, "accuracy_norm": choice.CHANCE, "acc": choice.CHANCE, "acc_norm": choice.CHANCE}
CHANCES |= {f"auc_{attack}": membership.ASSUMED_AUC for attack in membership.ATTACKS}


@dataclass(frozen=True)
class TaskResult:
    """Scores (as in the evaluation artefact), per-item logs, and metrics by source."""

    scores: list[dict[str, Any]]
    items: list[dict[str, Any]]
    by_source: dict[str, dict[str, float]]


def direction(metric: str, role: str) -> str:
    """Which way is good: ``lower``, ``higher``, or ``reference`` (nearest to the score's ``reference`` is best)."""
    if metric == membership.PRIV_LEAK or metric.startswith("auc_"):
        return "reference"
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
    sources: dict[str, dict[str, float]] = {}
    kind = task.config.type
    if kind == "choice":
        result = choice.evaluate_choice(model, items, where, advance)
        logs, sources = choice.item_logs(items, result), choice.by_source(items, result)
    elif kind == "verbatim":
        result = verbatim.evaluate_verbatim(model, items, max_new_tokens, where, advance)
        logs, sources = verbatim.item_logs(items, result), verbatim.by_source(items, result)
    elif kind == "knowmem":
        result = knowmem.evaluate_knowmem(model, items, list(task.examples), where, advance)
        logs, sources = knowmem.item_logs(items, result), knowmem.by_source(items, result)
    elif kind == "membership":
        result = membership.evaluate_membership(model, items, context_length, where, advance)
        logs = membership.item_logs(items, result)
    elif kind == "extraction":
        result = extraction.evaluate_extraction(model, items, context_length, where, advance)
        logs, n = extraction.item_logs(result), len(result.strength)
    elif kind == "lm_eval":
        found = harness.evaluate_harness(model, str(task.config.task), where)
        return TaskResult(score_records(task, found.metrics, found.items), found.logs, {})
    else:
        result = perplexity.evaluate_perplexity(model, items, context_length, advance)
        n = int(result.tokens.sum())
        if not n:
            raise UserError("no document has two tokens", where, "a perplexity of nothing: add text")
        logs = perplexity.item_logs(items, result)
        sources = {
            source: {name: value for name, value in values.items() if math.isfinite(value)}
            for source, values in perplexity.by_source(result).items()
        }
    return TaskResult(score_records(task, result.metrics(), n), logs, sources)


def score_records(task: Task, metrics: dict[str, float], n: int) -> list[dict[str, Any]]:
    """The scores of a task; ``value`` is None for a metric that is missing in ``metrics`` or not finite.

    A metric of lm-eval that the task does not have is left out.
    """
    names = [
        name for name in METRICS[task.config.type] if task.config.type != "lm_eval" or name in metrics or not metrics
    ]
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
        for metric in names
    ]
