"""Reads everything a report shows from a run directory; what a stage has not written yet is None or empty.

A run has one *arm* per unlearned model: the run's own (label ``unlearned``) and one per variant (its name). Data and
statistics belong to the run, calibration, logs and evaluations to the arm.
"""

from __future__ import annotations

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
from trace_ds.run.curve import read_curve
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import named_by, read_object

MAIN_ARM = "unlearned"
BASE_MODEL = "base model"


@dataclass(frozen=True)
class Score:
    """One number of one model.

    Attributes:
        direction: which way is good.
        chance: what guessing gives.
        headline: whether it is its task's ``headline`` (where no task names one: the first metric of each, perplexities
            and scores that are best at a reference left out).
        by_seed: the values that it is the mean of, where several runs are averaged.
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
    tasks: dict[str, str]  # fingerprints of the tasks by name
    drift: dict[str, Any] | None
    attacks: dict[str, Any]  # as in the file: expert_forcing, relearning

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
    arrays: dict[str, np.ndarray]  # names end in _LE
    diagnosis: dict[str, Any]
    content: str  # fingerprint: equal for arms that were calibrated alike


@dataclass(frozen=True)
class Arm:
    label: str
    rule: str | None
    calibration: Calibration | None
    steps: int | None  # of the newest checkpoint
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
    job: dict[str, Any]  # world, ep, zero_stage, family, … of the newest checkpoint's manifest

    @property
    def calibrations(self) -> dict[str, Calibration]:
        """The different calibrations by the labels of the arms that use them (``unlearned, other``)."""
        made = {arm.calibration.content: arm.calibration for arm in self.arms if arm.calibration is not None}
        users = {
            key: [arm.label for arm in self.arms if arm.calibration and arm.calibration.content == key] for key in made
        }
        return {", ".join(users[key]): calibration for key, calibration in made.items()}

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
        """The name of the reference that never saw the forget set, whether or not it was scored: what the configuration
        calls it, else what ``finetune`` does."""
        named = (self.config.get("evaluation") or {}).get("retrained", "gold")
        return named if named in self.references else RETRAINED if RETRAINED in self.references else "gold"

    @property
    def versions(self) -> dict[str, str]:
        """Of the libraries that trained the newest checkpoint, and of a model from the hub."""
        source = (self.job.get("model") or {}).get("source")
        known = {str(key): str(value) for key, value in sorted((self.job.get("versions") or {}).items())}
        return known | ({BASE_MODEL: str(source)} if source else {})

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
    tasks = (config.get("evaluation") or {}).get("tasks") or []
    headline = [f"{task['name']} {task['headline']}" for task in tasks if task.get("headline")]
    evaluations = _evaluations(path / "evaluation", headline)
    references = {name: each for name, each in evaluations.items() if name != MAIN_ARM and _step_of(name) is None}
    rule = (config.get("calibration") or {}).get("rule")
    arms = [_arm(MAIN_ARM, path, rule, headline)]
    for base in sorted((path / "variants").glob("*")):
        if base.is_dir() and ".tmp-" not in base.name and ".old-" not in base.name:
            changes = (config.get("variants") or {}).get(base.name) or {}
            arms.append(_arm(base.name, base, changes.get("calibration.rule", rule), headline))
    arms = [arm for arm in arms if arm.calibration or arm.steps or arm.checkpoints or arm.final]
    if not (artefacts or references or arms):
        raise UserError(
            "nothing to report: no stage has written anything here", str(path), "run `trace-ds run CONFIG` first"
        )
    jobs = (_manifest(base) for base in [path, *sorted((path / "variants").glob("*"))])
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
        job=next(filter(None, jobs), {}),
    )


def _artefacts(run: RunDirectory) -> dict[str, Artefact]:
    """The artefacts of a run by name, verified by size and identity."""
    shared = run.data.parent
    places = {name: shared / name for name in ("data", "statistics/forget", "statistics/retain")}
    places["calibration"] = run.path / "calibration"
    return {
        name: load(directory, name.partition("/")[0], verify=False)
        for name, directory in places.items()
        if (directory / FILE_NAME).is_file()
    }


def _statistics(made: Artefact | None) -> RoutingStatistics | None:
    name = "statistics.safetensors"
    return RoutingStatistics.load(made.file(name)) if made is not None and name in made.files else None


def _arm(label: str, base: Path, rule: str | None, headline: list[str]) -> Arm:
    """``rule``: what the configuration asks for, where nothing is calibrated yet."""
    calibration = None
    if (base / "calibration" / FILE_NAME).is_file():
        made = load(base / "calibration", "calibration", verify=False)
        arrays = load_file(made.file("calibration.safetensors")) if "calibration.safetensors" in made.files else {}
        diagnosis = _read(made.file("diagnosis.json"), "calibrate") if "diagnosis.json" in made.files else {}
        calibration = Calibration(arrays, diagnosis, made.content)
        rule = diagnosis.get("rule") or rule
    evaluations = _evaluations(base / "evaluation", headline)
    checkpoints = {step: each for name, each in evaluations.items() if (step := _step_of(name)) is not None}
    checkpoints = dict(sorted((_curve(base, headline) | checkpoints).items()))
    return Arm(label, rule, calibration, _manifest(base).get("step"), checkpoints, evaluations.get(MAIN_ARM))


def _evaluations(directory: Path, headline: list[str]) -> dict[str, Evaluation]:
    found = {}
    for path in sorted(directory.glob("*.json")) if directory.is_dir() else []:
        raw = _read(path, "evaluate")
        if "scores" not in raw:
            continue
        found[path.stem] = Evaluation(
            path.stem,
            raw.get("model_fingerprint"),
            _scores(raw["scores"], path.stem, path, headline),
            {
                task: [item for item in logs if isinstance(item, dict)]
                for task, logs in (raw.get("items") or {}).items()
                if isinstance(logs, list)
            },
            raw.get("tasks") or {},
            raw.get("drift"),
            raw.get("attacks") or {},
        )
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
    # Where no task names one: perplexities have another scale, scores that are best at a reference no good direction.
    usual = [score for score in scores if "perplexity" not in score.metric and score.direction != "reference"]
    chosen = set(headline) or {
        f"{task} {metric}" for task, metric in {s.task: s.metric for s in reversed(usual)}.items()
    }
    return [replace(score, headline=f"{score.task} {score.metric}" in chosen) for score in scores]


def _curve(base: Path, headline: list[str]) -> dict[int, Evaluation]:
    """What an unlearning job scored of itself, by step, from its newest checkpoint, or RUN/curve.json."""
    points = (_manifest(base).get("cursor") or {}).get("curve") or []
    if not points and (base / "curve.json").is_file():
        points = read_curve(base / "curve.json")["curve"]
    found = {}
    for point in points:
        step, model = int(point["step"]), f"step_{point['step']}"
        if step and point["scores"]:  # at step 0 it is the original
            scores = _scores(point["scores"], model, base / "checkpoints", headline)
            found[step] = Evaluation(model, None, scores, {}, {}, None, {})
    return found


def _manifest(base: Path) -> dict[str, Any]:
    """Of the newest checkpoint; empty where there is none."""
    newest = named_by(base / "checkpoints", "latest")
    if newest is None or not (newest / "manifest.json").is_file():
        return {}
    return _read(newest / "manifest.json", "unlearn")


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
