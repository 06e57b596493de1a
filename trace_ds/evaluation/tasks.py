"""From a checked task and a model to scores in the common form of a result."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from trace_ds.evaluation import harness, kinds, retrained
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import LanguageModel, OnProgress
from trace_ds.evaluation.metrics import METRICS, ROLE_OF, TASK_METRICS, direction


@dataclass(frozen=True)
class TaskResult:
    """Scores (as in the evaluation artefact), per-item logs, and metrics by source."""

    scores: list[dict[str, Any]]
    items: list[dict[str, Any]]
    by_source: dict[str, dict[str, float]]


def run_task(
    model: LanguageModel,
    task: Task,
    *,
    max_new_tokens: int,
    context_length: int,
    progress: OnProgress | None = None,
) -> TaskResult:
    """Score one model on one task."""
    items: Any = task.items
    where, kind = task.config.place, task.config.type
    if kind == "lm_eval":
        metrics, logs = harness.evaluate_harness(model, task.config)
        return TaskResult(score_task_records(task, metrics, len(logs)), logs, {})
    if kind == "choice":
        outcome = kinds.evaluate_choice(model, items, where, progress)
    elif kind == "verbatim":
        outcome = kinds.evaluate_verbatim(model, items, max_new_tokens, where, progress)
    elif kind == "knowmem":
        outcome = kinds.evaluate_knowmem(model, items, list(task.examples), where, progress)
    elif kind == "tofu":
        outcome = retrained.evaluate_tofu(model, items, max_new_tokens, where, progress)
    elif kind == "membership":
        outcome = retrained.evaluate_membership(model, items, context_length, where, progress)
    else:
        outcome = kinds.evaluate_perplexity(model, items, context_length, where, progress)
    return TaskResult(score_task_records(task, outcome.metrics(), outcome.count()), outcome.logs, outcome.by_source())


def score_tasks(
    model: LanguageModel,
    tasks: list[Task],
    max_new_tokens: int,
    context_length: int,
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """``scores`` of all tasks, and by the task's name its ``items`` and ``by_source``, as in a result."""
    result: dict[str, Any] = {"scores": [], "items": {}, "by_source": {}}
    for task in tasks:
        outcome = run_task(model, task, max_new_tokens=max_new_tokens, context_length=context_length, progress=progress)
        result["scores"] += outcome.scores
        result["items"][task.config.name] = outcome.items
        result["by_source"][task.config.name] = outcome.by_source
    return result


def score_task_records(task: Task, metrics: dict[str, float], n: int) -> list[dict[str, Any]]:
    """The scores of a task; ``value`` is None for a metric that is missing in ``metrics`` or not finite.

    A metric of lm-eval that the task does not have is left out.
    """
    names = [
        name
        for name in TASK_METRICS[task.config.type]
        if (task.config.type != "lm_eval" or name in metrics or not metrics)
        and ROLE_OF.get(name, task.config.role) == task.config.role
    ]
    return [
        {
            "task": task.config.name,
            "metric": metric,
            "value": metrics[metric] if math.isfinite(metrics.get(metric, math.nan)) else None,
            "n": n,
            "role": task.config.role,
            "direction": direction(metric, task.config.role),
            "chance": METRICS[metric].chance,
        }
        for metric in names
    ]
