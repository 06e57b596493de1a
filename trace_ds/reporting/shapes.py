"""What a report takes from each JSON and YAML file of a run, as types: a file of another shape is damaged.

Keys that no report reads may be anything. ``read`` and ``check`` are the only way into such a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

from trace_ds.run.foreign import read_object, reading

Number = float | None
Count = Annotated[int, Field(ge=0)] | None
Values = dict[str, Number]
Rows = list[dict[str, bool | int | float | str | None]] | None  # of a table


class ScoreShape(TypedDict, total=False):
    task: Required[str]
    metric: Required[str]
    value: Required[Number]
    n: Count
    role: Literal["forget", "utility"]
    direction: Literal["lower", "higher", "reference"]
    chance: Number


class ItemShape(TypedDict, total=False):
    id: int | str
    prompt: str | None
    text: str | None
    reference: str | None
    continuation: str | None
    choices: list[str] | None
    correct: Number | bool
    exact: Number | bool
    member: Number | bool
    rouge_l: Number
    rouge_l_recall: Number
    extraction_strength: Number
    min_k: Number
    nll: Number
    tokens: Count


class SideShape(TypedDict, total=False):
    overlap: list[Number]
    kl: list[Number]


class DriftShape(TypedDict, total=False):
    forget: SideShape | None
    retain: SideShape | None


class PointShape(TypedDict, total=False):
    step: Required[int]
    scores: Required[Values]


class RelearningShape(TypedDict, total=False):
    curve: list[PointShape] | None


class AttacksShape(TypedDict, total=False):
    expert_forcing: dict[str, Values] | None
    relearning: RelearningShape | None


class ResultShape(TypedDict, total=False):
    """``evaluation/NAME.json``."""

    scores: list[ScoreShape]
    items: dict[str, list[ItemShape]] | None
    tasks: dict[str, str] | None
    model_fingerprint: str | None
    drift: DriftShape | None
    attacks: AttacksShape | None


class DiagnosisShape(TypedDict, total=False):
    """``calibration/diagnosis.json``."""

    rule: str | None
    selected: Rows
    share_by_source: Rows
    moved_targets: Rows
    top_documents: Rows
    warnings: list[str] | None


class CurvePointShape(TypedDict, total=False):
    step: Required[int]
    scores: Required[list[ScoreShape]]


class CursorShape(TypedDict, total=False):
    curve: list[CurvePointShape] | None


class ManifestShape(TypedDict, total=False):
    """``checkpoints/step_N/manifest.json``."""

    step: int
    cursor: CursorShape | None
    versions: dict[str, str] | None
    model: dict[str, str | None] | None


class TaskShape(TypedDict, total=False):
    name: Required[str]
    headline: str | None


class EvaluationShape(TypedDict, total=False):
    retrained: str
    tasks: list[TaskShape] | None


class RunShape(TypedDict, total=False):
    """``config.yaml``."""

    name: str | None
    seed: int
    model: dict[str, Any] | None
    calibration: dict[str, Any] | None
    unlearning: dict[str, Any] | None
    evaluation: EvaluationShape | None
    report: dict[str, Any] | None
    variants: dict[str, dict[str, Any] | None] | None


def check(value: Any, shape: Any) -> Any:
    """``value``, unless it is not of this shape: then ``ValueError`` with the place and the reason."""
    try:
        TypeAdapter(shape).validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ValueError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return value


def read(path: Path, shape: Any, verb: str) -> dict[str, Any]:
    """The JSON object in a file that ``trace-ds VERB`` wrote; :class:`UserError` where it is not of this shape."""
    fix = f"make it again with `trace-ds {verb}`"
    raw = read_object(path, "the file", fix)
    with reading(path, "the file", fix):
        check(raw, shape)
        for items in (raw.get("items") or {}).values() if shape is ResultShape else ():
            for item in items:  # an answer is one of the choices
                indices = [item.get(key) for key in ("answer", "predicted")] if item.get("choices") else []
                _ = [item["choices"][index] for index in indices if isinstance(index, int)]
    return raw
