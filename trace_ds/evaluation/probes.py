"""What is measured of a loaded model besides its tasks: how it routes the corpora, and how it stands attacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.config.schema import EvaluationConfig
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

    def attack(self, model: LanguageModel, result: dict[str, Any], decisions: dict[str, attacks.Decisions]) -> None:
        """Add both attacks to a result; relearning comes last, since it changes the model."""
        tasks, relearning = self.forget_tasks(), self.settings.relearning
        records = []
        result["attacks"] = {}
        if self.settings.expert_forcing:
            critical_LE = critical_experts(self.run)
            found = attacks.forcing_attack(model, tasks, lambda t: self.score(model, t), critical_LE, decisions)
            result["attacks"]["expert_forcing"] = found
            records += attacks.score_records(result, "forced", attacks.worst_of(found))
        if relearning is not None:
            assert self.data is not None
            forget = TokenDataset.open(self.data.file("forget.arrow"))
            told = attacks.relearn(model, forget, relearning, self.seed, lambda: self.score(model, tasks))
            result["attacks"]["relearning"] = told
            records += attacks.score_records(result, "relearned", told["curve"][-1]["scores"])
        result["scores"] += records
