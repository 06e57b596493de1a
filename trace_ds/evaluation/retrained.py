"""Scores that are about those of the model trained without the forget set, once all models are scored."""

from __future__ import annotations

from typing import Any

from trace_ds.evaluation.membership import priv_leak
from trace_ds.evaluation.metrics import ASSUMED_AUC, FORGET_QUALITY, MODEL_UTILITY, PRIV_LEAK
from trace_ds.evaluation.tofu import KNOWN, forget_quality, model_utility


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
    tofu = {task for task, metric in mine if metric in (FORGET_QUALITY, MODEL_UTILITY)}
    utility = [score for score in result["scores"] if score["task"] in tofu and score["role"] == "utility"]
    known = [score["value"] for score in utility if score["metric"] in KNOWN]

    def told(task: str, metric: str) -> dict[str, Any]:
        if metric.startswith("auc_"):
            return {"reference": theirs.get((task, metric), ASSUMED_AUC)}
        if metric == PRIV_LEAK:
            auc, reference = mine[task, "auc_min_k"], theirs.get((task, "auc_min_k"))
            used = ASSUMED_AUC if reference is None else reference
            note = "no retrained model was evaluated: its AUC is assumed to be 0.5"
            if retrained is not None and reference is not None:
                note = f"AUC of the retrained model {retrained['model']}: {used:.4f}"
            value = None if auc is None or used == 1 else priv_leak(auc, used)
            return {"value": value, "reference": 0.0, "note": note}
        if metric == MODEL_UTILITY:
            return {"value": None if None in known else model_utility(known)}
        if metric == FORGET_QUALITY:
            here, there = (_ratios(each, task) for each in (result, retrained))
            note = "no retrained model was evaluated"
            if retrained is not None and there:
                note = f"against the truth ratios of {retrained['model']}"
            return {"value": forget_quality(here, there) if here and there else None, "note": note}
        return {}

    return {**result, "scores": [score | told(score["task"], score["metric"]) for score in result["scores"]]}


def _ratios(result: dict[str, Any] | None, task: str) -> list[float]:
    items = result["items"].get(task, []) if result is not None else []
    return [item["truth_ratio"] for item in items]
