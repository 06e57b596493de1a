"""``RUN/curve.json``: the scores of an unlearning job on its way, as it wrote them of itself.

{"identity": …, "job": …, "made_with": {"device", "torch"}, "failed_after": null or a step,
 "curve": [{"step": 0, "rows": {…}, "scores": [{"task", "metric", "value", …}], "by_source": {task: {…}}}, …]}
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from trace_ds.config.sections.unlearning import EvaluateConfig
from trace_ds.errors import UserError
from trace_ds.run.foreign import read_object, typed

AGAIN = "make it again with `trace-ds unlearn CONFIG`"


def read_curve(path: Path) -> dict[str, Any]:
    """The whole file, its shape checked; :class:`UserError` where it is damaged, or holds no point."""
    raw = read_object(path, "the curve", AGAIN)
    try:
        typed(raw, {"identity": str, "made_with": dict, "curve": list})
        if raw.get("failed_after") is not None:
            typed(raw, {"failed_after": int})
        if not raw["curve"]:
            raise ValueError("it has no point")
        for point in raw["curve"]:
            _check_point(point)
        if any(later["step"] <= earlier["step"] for earlier, later in pairwise(raw["curve"])):
            raise ValueError("its steps do not increase")
    except ValueError as error:
        raise UserError(f"the curve is damaged: {error}", str(path), AGAIN) from None
    return raw


def _check_point(point: Any) -> None:
    if not isinstance(point, dict):
        raise ValueError("a point is no JSON object")
    typed(point, {"step": int})
    check_scores(point)


def check_scores(raw: dict[str, Any]) -> None:
    """``ValueError`` unless ``raw`` holds ``scores`` and ``by_source``, as a point of a curve and an evaluation do."""
    typed(raw, {"scores": list, "by_source": dict})
    for score in raw["scores"]:
        if not isinstance(score, dict):
            raise ValueError("a score is no JSON object")
        typed(score, {"task": str, "metric": str})
        require_number(score.get("value"))
    for sources in raw["by_source"].values():
        if not isinstance(sources, dict) or not all(isinstance(values, dict) for values in sources.values()):
            raise ValueError("by_source is no object of objects")
        for values in sources.values():
            typed(values, {"n": int})
            for value in values.values():
                require_number(value)


def require_number(value: Any) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"a score is {str(value)[:50]!r}")


def scores_of(point: Mapping[str, Any]) -> dict[str, float | None]:
    """All scores of a point of the curve, by the names that bounds use."""
    tasks = {f"{score['task']} {score['metric']}": score["value"] for score in point["scores"]}
    return {**point.get("rows", {}), **tasks}


def has_ended(settings: EvaluateConfig, point: Mapping[str, Any]) -> bool:
    """Whether a point of the curve meets all bounds of ``until``."""
    scores = scores_of(point)
    return bool(settings.until) and all(bound.holds(scores.get(bound.score)) for bound in settings.bounds("until"))
