"""What is measured of a loaded model besides its tasks: how it routes the corpora, and how it stands attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.config.sections.evaluation import EvaluationConfig
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.evaluation import attacks, drift
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import Diverged, LanguageModel
from trace_ds.evaluation.tasks import run_task
from trace_ds.models.families import ModelInfo
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import Progress, StageLog

SIDES = ("forget", "retain")
ATTACKABLE = ("choice", "verbatim", "knowmem")  # their score is what the model says or prefers


def critical_experts(run: RunDirectory) -> np.ndarray | None:
    """The forget-critical experts of the run's calibration, bool [L, E]; None without a calibration."""
    path = run.calibration / "calibration.safetensors"
    if not path.is_file():
        return None
    from safetensors.numpy import load_file

    return load_file(path)["selected_LE"].astype(bool)


def routing(
    settings: EvaluationConfig, data: Artefact, model: LanguageModel, log: StageLog
) -> dict[str, drift.RoutingSample]:
    """How a model routes the first rows of both corpora."""
    samples = {}
    for side in SIDES:
        dataset = TokenDataset.open(data.file(f"{side}.arrow"))
        rows = min(settings.drift_rows, len(dataset))
        progress = Progress(log, f"routing of {side} rows", rows, unit="row")
        samples[side] = drift.sample_routing(model, dataset, rows, settings.batch_rows, progress.advance)
        progress.close()
    return samples


def routing_drift(
    info: ModelInfo, before: dict[str, drift.RoutingSample], after: dict[str, drift.RoutingSample]
) -> dict[str, Any]:
    """Overlap and KL per layer on both corpora, as in a result."""
    return {
        "experts": info.experts,
        "top_k": info.top_k,
        **{side: drift.compare(before[side], after[side], info.experts) for side in SIDES},
    }


@dataclass(frozen=True)
class Attacks:
    """The attacks of a run, as configured, on its forget tasks."""

    settings: EvaluationConfig
    context_length: int
    seed: int
    run: RunDirectory
    tasks: list[Task]
    data: Artefact | None

    def score(self, model: LanguageModel, tasks: list[Task]) -> dict[str, float | None]:
        """``{"TASK METRIC": value}``; all None when the model under attack has diverged."""
        found: dict[str, float | None] = {}
        for task in tasks:
            try:
                outcome = run_task(
                    model,
                    task,
                    max_new_tokens=self.settings.max_new_tokens,
                    context_length=self.context_length,
                )
            except Diverged:
                continue
            found |= {f"{score['task']} {score['metric']}": score["value"] for score in outcome.scores}
        return found

    def forget_tasks(self) -> list[Task]:
        return [task for task in self.tasks if task.config.role == "forget" and task.config.type in ATTACKABLE]

    def decisions(self, model: LanguageModel) -> dict[str, attacks.Decisions]:
        """How the original model routes the questions of each choice task to forget."""
        found = {}
        for task in self.forget_tasks():
            if task.config.type == "choice":
                decisions = attacks.Decisions()
                with attacks.forced(model.model, decisions.record):
                    if self.score(model, [task]):  # nothing of a model that has diverged
                        found[task.config.name] = decisions
        return found

    def forced(
        self, model: LanguageModel, tasks: list[Task], original: dict[str, attacks.Decisions]
    ) -> dict[str, dict[str, float | None]]:
        """Scores by kind: unforced (``none``), and under every kind of forcing that can be done."""
        ways: dict[str, attacks.Decide] = {"without_first": attacks.without_first}
        critical_LE = critical_experts(self.run)
        if critical_LE is not None and critical_LE.any():
            ways["without_critical"] = attacks.without_experts(critical_LE)
        told = {"none": self.score(model, tasks)}
        for way, decide in ways.items():
            with attacks.forced(model.model, decide):
                told[way] = self.score(model, tasks)
        for task in tasks:  # each from its own beginning: a model that diverges stops in the middle of one
            if task.config.name in original:
                with attacks.forced(model.model, original[task.config.name].repeat()):
                    told.setdefault("original_routing", {}).update(self.score(model, [task]))
        return told

    def attack(self, model: LanguageModel, result: dict[str, Any], decisions: dict[str, attacks.Decisions]) -> None:
        """Add both attacks to a result; relearning comes last, since it changes the model."""
        tasks, relearning = self.forget_tasks(), self.settings.relearning
        attacked: dict[str, dict[str, float | None]] = {}
        result["attacks"] = {}
        if self.settings.expert_forcing:
            told = result["attacks"]["expert_forcing"] = self.forced(model, tasks, decisions)
            forced = [scores for way, scores in told.items() if way != "none"]
            attacked["forced"] = {
                name: max((value for scores in forced if (value := scores.get(name)) is not None), default=None)
                for name in told["none"]
            }
        if relearning is not None:
            assert self.data is not None
            forget = TokenDataset.open(self.data.file("forget.arrow"))
            learned = attacks.relearn(model, forget, relearning, self.seed, lambda: self.score(model, tasks))
            result["attacks"]["relearning"] = learned
            attacked["relearned"] = learned["curve"][-1]["scores"]
        result["scores"] += [
            {**score, "metric": f"{attack}_{score['metric']}", "value": values[key]}
            for attack, values in attacked.items()
            for score in result["scores"]
            if (key := f"{score['task']} {score['metric']}") in values
        ]
