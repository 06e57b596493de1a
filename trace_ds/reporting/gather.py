"""Reads everything a report shows from a run directory; what a stage has not written yet is None or empty.

A run has one *arm* per unlearned model: the run's own (label ``unlearned``) and one per variant (its name). Data and
statistics belong to the run, calibration, logs and evaluations to the arm.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from trace_ds.config.sections.calibration import CONTROL_RULES
from trace_ds.config.sections.training import RETRAINED
from trace_ds.errors import UserError
from trace_ds.reporting.shapes import (
    read_checkpoint_manifest,
    read_config,
    read_diagnosis,
    read_layers,
    read_points,
    read_result,
)
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run.artefact import FILE_NAME, Artefact, load_artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import reading

MAIN_ARM = "unlearned"
_SIDES = ("statistics/forget", "statistics/retain")
BASE_MODEL = "base model"


@dataclass(frozen=True)
class Score:
    """One number of one model."""

    model: str
    task: str
    metric: str
    value: float
    n: int | None
    role: str
    direction: str  # which way is good
    chance: float | None
    headline: bool = False  # see TaskConfig.headline


@dataclass(frozen=True)
class Evaluation:
    """The scores of one model, from ``evaluation/NAME.json`` or from a point of a job's curve; ``items`` by task."""

    model: str
    scores: list[Score]
    items: dict[str, list[dict[str, Any]]]
    drift: dict[str, Any] | None = None

    def headline(self, role: str) -> list[Score]:
        """The headline scores of a role, in the file's order."""
        return [score for score in self.scores if score.headline and score.role == role]

    def find(self, task: str, metric: str) -> Score | None:
        return next((s for s in self.scores if (s.task, s.metric) == (task, metric)), None)

    def value(self, task: str, metric: str) -> float | None:
        score = self.find(task, metric)
        return None if score is None else score.value


@dataclass(frozen=True)
class Calibration:
    """A calibration artefact: per-expert arrays and its diagnosis."""

    arrays: dict[str, np.ndarray]  # names end in _LE
    diagnosis: dict[str, Any]
    content: str  # fingerprint: equal for arms that were calibrated alike


@dataclass(frozen=True)
class Arm:
    """The run or one of its variants: how it was weighted, and its models, scored on the way and at the end."""

    label: str
    rule: str | None
    calibration: Calibration | None
    steps: int | None  # of the newest checkpoint
    checkpoints: dict[int, Evaluation]
    final: Evaluation | None
    name: str = ""  # the configuration's, for the run's own model where the run has variants

    @property
    def is_trace(self) -> bool:
        """Weights made by the method; False for uniform weights and the controls (or when the rule is unknown)."""
        return self.rule is not None and self.rule not in CONTROL_RULES

    @property
    def title(self) -> str:
        """The name as shown, with "(TRACE)" where the weights are the method's."""
        return f"{self.name or self.label}{' (TRACE)' if self.is_trace else ''}"


@dataclass(frozen=True)
class RunData:
    """Everything a report shows of one run directory."""

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
    job: dict[str, Any]  # world, ep, zero_stage, family, … of the newest checkpoint's manifest

    def title_of(self, label: str) -> str:
        """How the model with a label is shown."""
        return next((arm.title for arm in self.arms if arm.label == label), label)

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """The different calibrations by the labels of the arms that use them (``unlearned, other``)."""
        each = [(arm.label, arm.calibration) for arm in self.arms if arm.calibration is not None]
        kinds = {calibration.content: calibration for _, calibration in each}
        return {", ".join(name for name, c in each if c.content == key): kinds[key] for key in kinds}

    @property
    def calibration(self) -> Calibration | None:
        """The run's calibration: its own, else the first variant's."""
        return next(iter(self.calibrations.values()), None)

    @property
    def baseline(self) -> Arm | None:
        """The arm with uniform weights, where its model has been scored."""
        return next((arm for arm in self.arms if arm.rule == "uniform" and arm.final is not None), None)

    @property
    def gold(self) -> str:
        """The name of the reference that never saw the forget set, whether or not it was scored."""
        return RETRAINED if RETRAINED in self.references else "gold"

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the libraries that trained the newest checkpoint, and the commit of a model from the hub."""
        source = (self.job.get("model") or {}).get("source")
        recorded = {str(key): str(value) for key, value in sorted((self.job.get("versions") or {}).items())}
        return recorded | ({BASE_MODEL: str(source)} if source else {})

    def evaluations(self) -> dict[str, Evaluation]:
        """Every model to compare, in the order of tables: references first (original, gold, ...), then the arms."""
        order = sorted(self.references, key=lambda name: ({"original": 0, self.gold: 1}.get(name, 2), name))
        models = {name: self.references[name] for name in order}
        for arm in self.arms:
            if arm.final is not None:
                models[arm.label if arm.label not in models else f"variants/{arm.label}"] = arm.final
        return models


def gather(path: Path) -> RunData:
    """Read a run directory.

    Raises:
        UserError: nothing is there to report, or an artefact is damaged.
    """
    if not path.is_dir():
        raise UserError("there is no such run directory", str(path), "give the directory that `trace-ds run` made")
    run = RunDirectory.at(path)
    config = read_config(run.config)
    artefacts = {
        name: load_artefact(place / name, name.partition("/")[0], verify=False)
        for place, names in ((run.data.parent, ("data", *_SIDES)), (run.path, ("calibration",)))
        for name in names
        if (place / name / FILE_NAME).is_file()
    }
    forget, retain = (
        RoutingStatistics.load(artefacts[name].file("statistics.safetensors")) if name in artefacts else None
        for name in _SIDES
    )
    tasks = (config.get("evaluation") or {}).get("tasks") or []
    headline = [f"{task['name']} {task['headline']}" for task in tasks if task.get("headline")]
    evaluations = _evaluations(path / "evaluation", headline)
    references = {name: each for name, each in evaluations.items() if name != MAIN_ARM}
    rule = (config.get("calibration") or {}).get("rule")
    bases = [b for b in sorted((path / "variants").glob("*")) if b.is_dir() and not re.search(r"\.(tmp|old)-", b.name)]
    changes = {base: (config.get("variants") or {}).get(base.name) or {} for base in bases}
    arms = [_arm(MAIN_ARM, path, rule, headline)]
    arms += [_arm(base.name, base, changes[base].get("calibration.rule", rule), headline) for base in bases]
    arms = [arm for arm in arms if arm.calibration or arm.steps or arm.checkpoints or arm.final]
    if not (artefacts or references or arms):
        raise UserError(
            "nothing to report: no stage has written anything here", str(path), "run `trace-ds run CONFIG` first"
        )
    name = str(config.get("name") or path.resolve().name)
    if len(arms) > 1 and name not in {arm.label for arm in arms}:  # "unlearned" are all
        arms = [replace(arm, name=name) if arm.label == MAIN_ARM else arm for arm in arms]
    some = retain or forget
    layers = next(filter(None, (read_layers(artefacts[side]) for side in _SIDES if side in artefacts)), None)
    return RunData(
        path=path,
        name=name,
        title=f"Unlearning report: {name}",
        config=config,
        artefacts=artefacts,
        forget=forget,
        retain=retain,
        decoder_layers=layers or list(range(some.counts_LE.shape[0] if some else 0)),
        references=references,
        arms=arms,
        job=next(filter(None, map(read_checkpoint_manifest, [path, *bases])), {}),
    )


def _arm(label: str, base: Path, rule: str | None, headline: list[str]) -> Arm:
    """``rule``: what the configuration asks for, where nothing is calibrated yet."""
    calibration = None
    if (base / "calibration" / FILE_NAME).is_file():
        artefact = load_artefact(base / "calibration", "calibration", verify=False)
        with reading(artefact.path or base, "the artefact", artefact.fix):
            arrays = (
                load_file(artefact.file("calibration.safetensors"))
                if "calibration.safetensors" in artefact.files
                else {}
            )
        diagnosis = read_diagnosis(artefact)
        calibration = Calibration(arrays, diagnosis, artefact.content)
        rule = diagnosis.get("rule") or rule
    evaluations = _evaluations(base / "evaluation", headline)
    steps, final = read_checkpoint_manifest(base).get("step"), evaluations.get(MAIN_ARM)
    return Arm(label, rule, calibration, steps, _curve(base, headline), final)


def _evaluations(directory: Path, headline: list[str]) -> dict[str, Evaluation]:
    evaluations = {}
    for path in sorted(directory.glob("*.json")):
        raw = read_result(path)
        if "scores" in raw:
            scores, items = _scores(raw["scores"], path.stem, headline), raw.get("items") or {}
            evaluations[path.stem] = Evaluation(path.stem, scores, items, raw.get("drift"))
    return evaluations


def _scores(entries: list[dict[str, Any]], model: str, headline: list[str]) -> list[Score]:
    """The scores in a file of ``evaluate``, or in a manifest of ``unlearn``."""
    scores = [
        Score(
            model, one["task"], one["metric"], math.nan if one["value"] is None else float(one["value"]),
            one.get("n"), one.get("role", "utility"), one.get("direction", "higher"), one.get("chance"),
        )
        for one in entries
    ]  # fmt: skip
    # Where no task names one: perplexities have another scale, scores that are best at a reference no good direction.
    usual = [score for score in scores if "perplexity" not in score.metric and score.direction != "reference"]
    first = {score.task: score.metric for score in reversed(usual)}
    chosen = set(headline) or {f"{task} {metric}" for task, metric in first.items()}
    return [replace(score, headline=f"{score.task} {score.metric}" in chosen) for score in scores]


def _curve(base: Path, headline: list[str]) -> dict[int, Evaluation]:
    """What an unlearning job scored of itself, by step, from its newest checkpoint, or RUN/curve.json."""
    models = {}
    for point in read_points(base):
        step, model = int(point["step"]), f"step_{point['step']}"
        if step and point["scores"]:  # at step 0 it is the original
            models[step] = Evaluation(model, _scores(point["scores"], model, headline), {})
    return models
