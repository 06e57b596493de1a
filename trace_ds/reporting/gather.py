"""Reads everything a report shows from a run directory; what a stage has not written yet is None or empty.

A run has one *arm* per unlearned model: the run's own (label ``unlearned``) and one per variant (its name). Data and
statistics belong to the run, calibration, logs and evaluations to the arm.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from trace_ds.config.sections.calibration import CONTROL_RULES
from trace_ds.config.sections.finetune import RETRAINED
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run.artefact import FILE_NAME, Artefact, load
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import named_by, read_object
from trace_ds.run.mapped import open_mapped

MAIN_ARM = "unlearned"
BASE_MODEL = "base model"
TIMING = re.compile(r"time|per_s|(second|_s|_ms|bytes|memory)$")


@dataclass(frozen=True)
class Score:
    """One number of one model.

    Attributes:
        direction: which way is good.
        chance: what guessing gives.
        headline: whether it is one of ``report.headline`` (without that key: the first metric of its task, perplexities
            and scores that are best at a reference left out).
        by_seed: the values that it is the mean of, where several runs are told as one.
    """

    model: str
    task: str
    metric: str
    value: float
    n: int | None
    role: str
    direction: str
    chance: float | None
    headline: bool = False
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    model: str
    fingerprint: str | None
    scores: list[Score]
    items: dict[str, list[dict[str, Any]]]
    tasks: dict[str, str]  # fingerprints of the tasks by name; empty in results of older versions
    drift: dict[str, Any] | None
    attacks: dict[str, Any]  # expert_forcing: scores by way; relearning: the curve

    def headline(self, role: str) -> list[Score]:
        """The headline scores of a role, in the file's order."""
        return [score for score in self.scores if score.headline and score.role == role]

    def value(self, task: str, metric: str) -> float | None:
        return next((s.value for s in self.scores if (s.task, s.metric) == (task, metric)), None)


@dataclass(frozen=True)
class Calibration:
    arrays: dict[str, np.ndarray]  # names end in _LE
    diagnosis: dict[str, Any]
    weights_path: Path | None  # float32, one per retain token, 0 where no loss is counted
    content: str  # fingerprint: equal for arms that were calibrated alike


@dataclass(frozen=True)
class Arm:
    label: str
    rule: str | None
    calibration: Calibration | None
    log: list[dict[str, float]]
    step_s: float | None  # median time of a step
    checkpoints: dict[int, Evaluation]
    final: Evaluation | None

    @property
    def is_trace(self) -> bool:
        """Weights made by the method; False for uniform weights and the controls (or when the rule is unknown)."""
        return self.rule is not None and self.rule not in CONTROL_RULES

    @property
    def title(self) -> str:
        """What people read: the label, and that it is TRACE."""
        return f"{self.label} (TRACE)" if self.is_trace else self.label


@dataclass(frozen=True)
class RunData:
    path: Path
    name: str
    title: str
    config: dict[str, Any]
    artefacts: dict[str, Artefact]
    forget: RoutingStatistics | None
    retain: RoutingStatistics | None
    decoder_layers: list[int]
    references: dict[str, Evaluation]  # original, gold, ...
    arms: list[Arm]
    versions: dict[str, str]
    job: dict[str, Any]  # world, ep, zero_stage, family, … of the newest checkpoint's manifest
    model_fingerprint: str | None

    @property
    def calibration(self) -> Calibration | None:
        """The run's calibration: its own, else the first variant's."""
        return next((arm.calibration for arm in self.arms if arm.calibration is not None), None)

    @property
    def baseline(self) -> Arm | None:
        """The arm with uniform weights, where its model has been scored."""
        return next((arm for arm in self.arms if arm.rule == "uniform" and arm.final is not None), None)

    def calibrations(self) -> list[tuple[str, Calibration]]:
        """The different calibrations with the labels of the arms that use them (``unlearned, other``)."""
        labels: dict[str, list[str]] = {}
        found: dict[str, Calibration] = {}
        for arm in self.arms:
            if arm.calibration is not None:
                found.setdefault(arm.calibration.content, arm.calibration)
                labels.setdefault(arm.calibration.content, []).append(arm.label)
        return [(", ".join(labels[content]), calibration) for content, calibration in found.items()]

    @property
    def gold(self) -> str:
        """The name of the reference that never saw the forget set, whether or not it was scored: what the configuration
        calls it, else what ``finetune`` does."""
        named = (self.config.get("evaluation") or {}).get("retrained", "gold")
        return named if named in self.references else RETRAINED if RETRAINED in self.references else "gold"

    def evaluations(self) -> dict[str, Evaluation]:
        """Every model to compare, in the order of tables: references first (original, gold, ...), then the arms."""
        order = sorted(self.references, key=lambda name: ({"original": 0, self.gold: 1}.get(name, 2), name))
        found = {name: self.references[name] for name in order}
        for arm in self.arms:
            if arm.final is not None:
                found[arm.label if arm.label not in found else f"variants/{arm.label}"] = arm.final
        return found


def gather(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        UserError: nothing is there to report, or an artefact is damaged.
    """
    if not path.is_dir():
        raise UserError("there is no such run directory", str(path), "give the directory that `trace-ds run` made")
    run = RunDirectory.at(path)
    config = _read_yaml(run.config)
    artefacts = _artefacts(run)
    forget, retain = (_statistics(artefacts.get(f"statistics/{side}")) for side in ("forget", "retain"))
    report = config.get("report") or {}
    headline = [str(name) for name in report.get("headline") or []]
    evaluations = _evaluations(path / "evaluation", headline)
    references = {
        key: evaluation for key, evaluation in evaluations.items() if key != MAIN_ARM and _step_of(key) is None
    }
    rule = (config.get("calibration") or {}).get("rule")
    arms = [_arm(MAIN_ARM, path, rule, evaluations, headline)]
    for base in sorted((path / "variants").glob("*")):
        if base.is_dir() and ".tmp-" not in base.name and ".old-" not in base.name:
            changes = (config.get("variants") or {}).get(base.name) or {}
            found = _evaluations(base / "evaluation", headline)
            arms.append(_arm(base.name, base, changes.get("calibration.rule", rule), found, headline))
    arms = [arm for arm in arms if arm.calibration or arm.log or arm.checkpoints or arm.final]
    if not (artefacts or references or arms):
        raise UserError(
            "nothing to report: no stage has written anything here",
            str(path),
            "run `trace-ds run CONFIG` first",
        )
    manifest = _manifest(path)
    name = str(config.get("name") or path.resolve().name)
    summary: dict[str, Any] = next((artefacts[k].summary for k in artefacts if k.startswith("statistics/")), {})
    some = retain or forget
    layers = summary.get("layers") or list(range(some.counts_LE.shape[0] if some else 0))
    return RunData(
        path=path,
        name=name,
        title=str(report.get("title") or f"Unlearning report: {name}"),
        config=config,
        artefacts=artefacts,
        forget=forget,
        retain=retain,
        decoder_layers=[int(layer) for layer in layers],
        references=references,
        arms=arms,
        versions=_versions(manifest),
        job=manifest,
        model_fingerprint=_model_fingerprint(artefacts, references),
    )


def weight_chunks(calibration: Calibration, chunk_tokens: int = 1 << 22) -> Iterator[np.ndarray]:
    """The retain weights in blocks (a corpus may be larger than memory); nothing when there are none."""
    if calibration.weights_path is not None:
        weights = open_mapped(calibration.weights_path)
        for start in range(0, weights.shape[0], chunk_tokens):
            yield np.asarray(weights[start : start + chunk_tokens], dtype=np.float64)


def _artefacts(run: RunDirectory) -> dict[str, Artefact]:
    """The artefacts of a run by name, verified by size and identity."""
    found = {}
    for name, kind in (
        ("data", "data"),
        ("statistics/forget", "statistics"),
        ("statistics/retain", "statistics"),
        ("calibration", "calibration"),
    ):
        directory = (run.path if kind == "calibration" else run.data.parent) / name
        if (directory / FILE_NAME).is_file():
            found[name] = load(directory, kind, verify=False)
    return found


def _statistics(made: Artefact | None) -> RoutingStatistics | None:
    name = "statistics.safetensors"
    return RoutingStatistics.load(made.file(name)) if made is not None and name in made.files else None


def _calibration(directory: Path) -> Calibration | None:
    if not (directory / FILE_NAME).is_file():
        return None
    found = load(directory, "calibration", verify=False)
    arrays = load_file(found.file("calibration.safetensors")) if "calibration.safetensors" in found.files else {}
    diagnosis = _read(found.file("diagnosis.json"), "calibrate") if "diagnosis.json" in found.files else {}
    weights = found.file("weights.npy") if "weights.npy" in found.files else None
    return Calibration(arrays, diagnosis, weights, found.content)


def _arm(label: str, base: Path, rule: str | None, evaluations: dict[str, Evaluation], headline: list[str]) -> Arm:
    """``rule``: what the configuration asks for, where nothing is calibrated yet."""
    calibration = _calibration(base / "calibration")
    checkpoints = {step: evaluation for key, evaluation in evaluations.items() if (step := _step_of(key)) is not None}
    checkpoints = _curve(base, headline) | checkpoints
    return Arm(
        label,
        (calibration and calibration.diagnosis.get("rule")) or rule,
        calibration,
        *_log(base / "logs" / "unlearn.jsonl"),
        dict(sorted(checkpoints.items())),
        evaluations.get(MAIN_ARM),
    )


def _evaluations(directory: Path, headline: list[str]) -> dict[str, Evaluation]:
    found = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else []:
        raw = _read(path, "evaluate")
        if "scores" not in raw:
            continue
        scores = _scores(raw["scores"], path.stem, path, headline)
        items = {
            task: [item for item in logs if isinstance(item, dict)]
            for task, logs in (raw.get("items") or {}).items()
            if isinstance(logs, list)
        }
        attacks = raw.get("attacks") or {}
        attacks = {
            "expert_forcing": attacks.get("expert_forcing") or {},
            "relearning": (attacks.get("relearning") or {}).get("curve") or [],
        }
        fingerprint, tasks = raw.get("model_fingerprint"), raw.get("tasks") or {}
        found[path.stem] = Evaluation(path.stem, fingerprint, scores, items, tasks, raw.get("drift"), attacks)
    return found


def _scores(entries: list[dict[str, Any]], model: str, path: Path, headline: list[str]) -> list[Score]:
    """The scores in a file of ``evaluate``, or in a manifest of ``unlearn``."""
    try:
        scores = [
            Score(
                model,
                str(entry["task"]),
                str(entry["metric"]),
                float(entry["value"]) if entry["value"] is not None else float("nan"),
                entry.get("n"),
                str(entry.get("role", "utility")),
                str(entry.get("direction", "higher")),
                entry.get("chance"),
            )
            for entry in entries
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the evaluation is damaged ({error!r})", str(path), "make it again with `trace-ds evaluate`"
        ) from None
    chosen = set(headline) or {f"{task} {metric}" for task, metric in _first_metrics(scores).items()}
    return [replace(score, headline=f"{score.task} {score.metric}" in chosen) for score in scores]


def _first_metrics(scores: list[Score]) -> dict[str, str]:
    """The headline of each task where ``report.headline`` names none: perplexities have another scale, and scores that
    are best at a reference no good direction."""
    usual = [score for score in scores if "perplexity" not in score.metric and score.direction != "reference"]
    return {score.task: score.metric for score in reversed(usual)}


def _curve(base: Path, headline: list[str]) -> dict[int, Evaluation]:
    """What an unlearning job scored of itself, by step, from its newest checkpoint."""
    newest = named_by(base / "checkpoints", "latest")
    if newest is None or not (newest / "manifest.json").is_file():
        return {}
    points = (_read(newest / "manifest.json", "unlearn").get("cursor") or {}).get("curve") or []
    found = {}
    for point in points:
        step, model = int(point["step"]), f"step_{point['step']}"
        if step:  # at step 0 it is the original
            found[step] = Evaluation(model, None, _scores(point["scores"], model, newest, headline), {}, {}, None, {})
    return found


def _log(path: Path) -> tuple[list[dict[str, float]], float | None]:
    """Numeric scalars by step, and the median time between two steps that follow each other.

    Timings are left out of the scalars (they differ between reruns); a resumed step replaces the old one. A half line
    at the end (a killed run) is skipped.
    """
    by_step: dict[int, dict[str, float]] = {}
    times_s: dict[int, float] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            raw = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(raw, dict) or raw.get("event", "step") != "step" or not isinstance(raw.get("step"), int):
            continue
        scalars = {
            key: float(value)
            for key, value in raw.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and not TIMING.search(key)
        }
        if len(scalars) > 1:
            by_step.setdefault(raw["step"], {}).update(scalars)
        if isinstance(raw.get("time_s"), (int, float)):
            times_s[raw["step"]] = float(raw["time_s"])
    gaps_s = [times_s[step + 1] - began_s for step, began_s in times_s.items() if step + 1 in times_s]
    return [by_step[step] for step in sorted(by_step)], float(np.median(gaps_s)) if gaps_s else None


def _manifest(path: Path) -> dict[str, Any]:
    """Of the newest checkpoint: the run's own, else a variant's."""
    for base in [path, *sorted((path / "variants").glob("*"))]:
        newest = named_by(base / "checkpoints", "latest")
        if newest is not None and (newest / "manifest.json").is_file():
            return _read(newest / "manifest.json", "unlearn")
    return {}


def _versions(manifest: dict[str, Any]) -> dict[str, str]:
    """Of the libraries that trained the newest checkpoint, and of a model from the hub."""
    versions, source = manifest.get("versions") or {}, (manifest.get("model") or {}).get("source")
    found = {str(key): str(value) for key, value in sorted(versions.items())}
    return found | ({BASE_MODEL: str(source)} if source else {})


def _model_fingerprint(artefacts: dict[str, Artefact], references: dict[str, Evaluation]) -> str | None:
    for name in ("statistics/retain", "statistics/forget"):
        if name in artefacts and "model" in artefacts[name].inputs:
            return artefacts[name].inputs["model"]
    return references["original"].fingerprint if "original" in references else None


def _step_of(stem: str) -> int | None:
    digits = stem.removeprefix("step_")
    return int(digits) if stem.startswith("step_") and digits.isdigit() else None


def _read(path: Path, verb: str) -> dict[str, Any]:
    return read_object(path, "the file", f"make it again with `trace-ds {verb}`")


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"not readable as YAML ({error})", str(path), "restore the file") from None
    return raw if isinstance(raw, dict) else {}
