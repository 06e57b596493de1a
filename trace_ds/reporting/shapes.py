"""What a report takes from each JSON and YAML file of a run, as types: a file of another shape is damaged.

Keys that no report reads may be anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import Required, TypedDict

from trace_ds.run.artefact import FILE_NAME, Artefact
from trace_ds.run.curve import read_curve
from trace_ds.run.foreign import named_by, read_bytes, read_object, reading

_Number = float | None
Count = Annotated[int, Field(ge=0)] | None
Rows = list[dict[str, bool | int | float | str | None]] | None  # of a table


class ScoreShape(TypedDict, total=False):
    task: Required[str]
    metric: Required[str]
    value: Required[_Number]
    n: Count
    role: Literal["forget", "utility"]
    direction: Literal["lower", "higher", "reference"]
    chance: _Number


class ItemShape(TypedDict, total=False):
    id: int | str
    prompt: str | None
    text: str | None
    reference: str | None
    continuation: str | None
    choices: list[str] | None
    correct: _Number | bool
    exact: _Number | bool
    member: _Number | bool
    rouge_l: _Number
    rouge_l_recall: _Number
    min_k: _Number
    nll: _Number
    tokens: Count


class SideShape(TypedDict, total=False):
    overlap: list[_Number]


class DriftShape(TypedDict, total=False):
    forget: SideShape | None
    retain: SideShape | None


class ResultShape(TypedDict, total=False):
    """``evaluation/NAME.json``."""

    scores: list[ScoreShape]
    items: dict[str, list[ItemShape]] | None
    tasks: dict[str, str] | None
    model_fingerprint: str | None
    drift: DriftShape | None


class DiagnosisShape(TypedDict, total=False):
    """``calibration/diagnosis.json``."""

    rule: str | None
    selected: Rows
    share_by_source: Rows
    top_documents: Rows
    warnings: list[str] | None


class CurvePointShape(TypedDict, total=False):
    step: Required[int]
    scores: Required[list[ScoreShape]]


class TrainerStateShape(TypedDict, total=False):
    curve: list[CurvePointShape] | None


class ManifestShape(TypedDict, total=False):
    """``checkpoints/step_N/manifest.json``."""

    step: int
    trainer_state: TrainerStateShape | None
    versions: dict[str, str] | None
    model: dict[str, str | None] | None


class TaskShape(TypedDict, total=False):
    name: Required[str]
    headline: str | None


class EvaluationShape(TypedDict, total=False):
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


def require_shape(value: Any, shape: Any) -> Any:
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
        require_shape(raw, shape)
    return raw


def read_config(path: Path) -> dict[str, Any]:
    """``config.yaml``; empty where there is none."""
    if not path.is_file():
        return {}
    with reading(path, "the configuration", "restore the file"):
        raw = yaml.safe_load(read_bytes(path).decode())
        return dict(require_shape(raw, RunShape))


def read_result(path: Path) -> dict[str, Any]:
    """``evaluation/NAME.json``."""
    raw = read(path, ResultShape, "evaluate")
    with reading(path, "the file", "make it again with `trace-ds evaluate`"):
        for items in (raw.get("items") or {}).values():
            for item in items:  # an answer is one of the choices
                indices = [item.get(key) for key in ("answer", "predicted")] if item.get("choices") else []
                _ = [item["choices"][index] for index in indices if isinstance(index, int)]
    return raw


def read_diagnosis(artefact: Artefact) -> dict[str, Any]:
    """``calibration/diagnosis.json``; empty where there is none."""
    name = "diagnosis.json"
    return read(artefact.file(name), DiagnosisShape, "calibrate") if name in artefact.files else {}


def read_layers(artefact: Artefact) -> list[int] | None:
    """The decoder layers that statistics are of."""
    with reading((artefact.path or Path()) / FILE_NAME, "the description of the artefact", artefact.fix):
        return require_shape(artefact.summary.get("layers"), list[int] | None)


def read_checkpoint_manifest(base: Path) -> dict[str, Any]:
    """The manifest of the newest checkpoint of a run or variant; empty where there is none."""
    newest = named_by(base / "checkpoints", "latest")
    if newest is None or not (newest / "manifest.json").is_file():
        return {}
    return read(newest / "manifest.json", ManifestShape, "unlearn")


def read_points(base: Path) -> list[dict[str, Any]]:
    """The curve of an unlearning job, a point for each evaluation, from its newest checkpoint or RUN/curve.json."""
    points = (read_checkpoint_manifest(base).get("trainer_state") or {}).get("curve") or []
    if not points and (base / "curve.json").is_file():
        points = read_curve(base / "curve.json")["curve"]
        with reading(base / "curve.json", "the curve", "make it again with `trace-ds unlearn`"):
            require_shape(points, list[CurvePointShape])
    return points
