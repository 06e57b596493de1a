"""From a checked task and a model to scores in the common form of a result."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trace_ds.errors import UserError
from trace_ds.evaluation import harness, kinds, membership, tofu
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.metrics import (
    ASSUMED_AUC,
    FORGET_QUALITY,
    METRICS,
    MODEL_UTILITY,
    PRIV_LEAK,
    ROLE_OF,
    TASK_METRICS,
    direction,
)


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
    advance: Callable[[int], None] | None = None,
) -> TaskResult:
    """Score one model on one task."""
    items: Any = task.items
    where, kind = task.config.place, task.config.type
    if kind == "lm_eval":
        metrics, logs = harness.evaluate_harness(model, task.config)
        return TaskResult(score_records(task, metrics, len(logs)), logs, {})
    if kind == "choice":
        outcome = kinds.evaluate_choice(model, items, where, advance)
    elif kind == "verbatim":
        outcome = kinds.evaluate_verbatim(model, items, max_new_tokens, where, advance)
    elif kind == "knowmem":
        outcome = kinds.evaluate_knowmem(model, items, list(task.examples), where, advance)
    elif kind == "tofu":
        outcome = tofu.evaluate_tofu(model, items, max_new_tokens, where, advance)
    elif kind == "membership":
        outcome = membership.evaluate_membership(model, items, context_length, where, advance)
    elif kind == "extraction":
        outcome = kinds.evaluate_extraction(model, items, context_length, where, advance)
    else:
        outcome = kinds.evaluate_perplexity(model, items, context_length, advance)
        if not outcome.count():
            raise UserError("no document has two tokens", where, "a perplexity of nothing: add text")
    return TaskResult(score_records(task, outcome.metrics(), outcome.count()), outcome.logs, outcome.by_source())


def score_records(task: Task, metrics: dict[str, float], n: int) -> list[dict[str, Any]]:
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


def with_retrained(result: dict[str, Any], retrained: dict[str, Any] | None) -> dict[str, Any]:
    """A result whose membership scores say what is best, the retrained model's AUC (else 0.5, assumed), with PrivLeak;
    and whose TOFU tasks have model utility and forget quality (None without a retrained model).

    Args:
        result: of one model, as in ``RUN/evaluation/NAME.json``.
        retrained: the result of the model trained without the forget set, or None.
    """
    mine, theirs = (
        {(score["task"], score["metric"]): score["value"] for score in (each or {"scores": []})["scores"]}
        for each in (result, retrained)
    )
    of_tofu = {task for task, metric in mine if metric in (FORGET_QUALITY, MODEL_UTILITY)}
    utility = [score for score in result["scores"] if score["task"] in of_tofu and score["role"] == "utility"]
    known = [score["value"] for score in utility if score["metric"] in tofu.KNOWN]

    def changes(task: str, metric: str) -> dict[str, Any]:
        if metric.startswith("auc_"):
            return {"reference": theirs.get((task, metric), ASSUMED_AUC)}
        if metric == PRIV_LEAK:
            auc, reference = mine[task, "auc_min_k"], theirs.get((task, "auc_min_k"))
            used = ASSUMED_AUC if reference is None else reference
            note = "no retrained model was evaluated: its AUC is assumed to be 0.5"
            if retrained is not None and reference is not None:
                note = f"AUC of the retrained model {retrained['model']}: {used:.4f}"
            value = None if auc is None or used == 1 else membership.priv_leak(auc, used)
            return {"value": value, "reference": 0.0, "note": note}
        if metric == MODEL_UTILITY:
            return {"value": None if None in known else tofu.model_utility(known)}
        if metric == FORGET_QUALITY:
            here, there = (_ratios(each, task) for each in (result, retrained))
            note = "no retrained model was evaluated"
            if retrained is not None and there:
                note = f"against the truth ratios of {retrained['model']}"
            return {"value": tofu.forget_quality(here, there) if here and there else None, "note": note}
        return {}

    return {**result, "scores": [score | changes(score["task"], score["metric"]) for score in result["scores"]]}


def _ratios(result: dict[str, Any] | None, task: str) -> list[float]:
    items = result["items"].get(task, []) if result is not None else []
    return [item["truth_ratio"] for item in items]
