"""``trace-ds evaluate``: models → scores, plain transformers, on the CPU or the GPU, on one process or many.

Each model's result is one file, ``RUN/evaluation/NAME.json``, written atomically and kept while it is still
what would be computed: a killed evaluation goes on where it was. A variant takes the results of the models it shares
with its parent run from there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.config.sections.base import ORIGINAL, UNLEARNED
from trace_ds.corpora.tokenizer import load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.evaluation.items import Task, read_tasks
from trace_ds.evaluation.metrics import score_changes
from trace_ds.evaluation.subjects import (
    EVALUATION_FORMAT,
    Subject,
    find_subjects,
    has_identity,
    identity,
    named_models,
    read_scored,
    require_same_tokenizer,
    task_fingerprints,
)
from trace_ds.models.families import check_expert_parallel, inspect_model
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory, unwritable
from trace_ds.run.files import write_bytes, write_json
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import provenance
from trace_ds.run.log import Progress, StageLog, already_done, stage_log
from trace_ds.stages.inputs import check_vocabulary, checked_tasks
from trace_ds.tensors.model_files import read_model_directory

if TYPE_CHECKING:
    from trace_ds.evaluation.drift import RoutingSample
    from trace_ds.evaluation.language_model import LanguageModel
    from trace_ds.parallel.world import World


@dataclass(frozen=True)
class EvaluateJob:
    """A checked evaluation: models, tasks and what identifies each result.

    Attributes:
        place: the run directory.
        identities: of the results, by model name.
    """

    config: Config
    place: RunDirectory
    tasks: list[Task]
    subjects: list[Subject]
    identities: dict[str, str]
    data: artefact.Artefact | None

    def result_path(self, name: str) -> Path:
        return self.place.evaluation / f"{name}.json"

    def scored(self) -> list[str]:
        """The models whose result is there and still valid."""
        return [name for name, identity in self.identities.items() if has_identity(self.result_path(name), identity)]

    def strangers(self) -> list[Path]:
        """Results of models that this configuration does not name."""
        results = sorted(self.place.evaluation.glob("*.json"))
        return [p for p in results if p.stem not in self.identities and "scores" in (read_scored(p) or {})]

    def done(self) -> bool:
        refers = {"membership", "tofu"} & {task.config.type for task in self.tasks}  # to scores of another model
        return len(self.scored()) == len(self.identities) and not self.strangers() and not refers

    def run(self, world: World | None) -> None:
        """Score every model of the run (collectively: the batches of every task are shared out; the scores are those of
        one process). The main process alone writes."""
        assert world is not None
        try:
            world.run_on_main_and_broadcast(lambda: self.place.evaluation.mkdir(parents=True, exist_ok=True))
            with stage_log(self.place, "evaluate", enabled=world.is_main) as log:
                world.run_on_main_and_broadcast(lambda: _take_existing(self, log))
                scored = _score_missing(self, log, world)
                world.run_on_main_and_broadcast(lambda: _refer_to_retrained(self, log))
                if world.is_main and scored:
                    results = [read_object(self.result_path(name), "the result", "") for name in self.identities]
                    log.done(f"{len(results)} models: {score_changes(results, ORIGINAL, UNLEARNED) or 'no tasks'}")
                elif world.is_main:
                    already_done("evaluate", self.place)
        except OSError as error:
            raise unwritable(self.place.evaluation, error) from error


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    from trace_ds.corpora.sources import files_here
    from trace_ds.evaluation.harness import require_data

    info = inspect_model(config.model.path)
    check_expert_parallel(info, config.evaluation.ep, processes, "evaluation.ep")
    if run.parent is not None:
        return  # the tasks and models are those of the run, which were looked at there
    check_vocabulary(config)
    for task in config.evaluation.tasks:
        if task.dataset and not download:
            files_here(task, "evaluation.tasks")
    read_tasks(config.evaluation.tasks)
    for task in config.evaluation.tasks:
        if task.type == "lm_eval":
            require_data(task, download=download)
    for path in named_models(config.model.path, config.evaluation).values():
        read_model_directory(path)


def check(config: Config, run: RunDirectory, processes: int = 1) -> EvaluateJob:
    """Everything that can be wrong before a model is loaded; raises :class:`UserError`."""
    settings = config.evaluation
    if not settings.tasks and not settings.drift:
        raise UserError("there is nothing to evaluate", "evaluation.tasks", "add a task, or set evaluation.drift")
    info = inspect_model(config.model.path)
    reference = Path(config.model.tokenizer_path)
    fingerprint = tokenizer_fingerprint(reference)
    tasks, tokenizer = checked_tasks(settings.tasks, config), load_tokenizer(reference)
    for task in settings.tasks:
        if task.include_path is not None:
            from trace_ds.evaluation.harness import rehearse

            rehearse(task)
    data = artefact.load_artefact(run.data, "data", verify=False) if settings.needs_data else None
    if data is not None:
        data.require_same(tokenizer=fingerprint)
    subjects = find_subjects(config.model.path, settings, run, unlearned=config.unlearning.keep != 0)
    for subject in subjects:
        require_same_tokenizer(subject.path, reference, tokenizer)
    against = {"original": info.fingerprint} | ({"data": data.content} if data is not None else {})
    attacked = {
        **against,
        "relearning": settings.relearning and settings.relearning.model_dump(mode="json"),
        "seed": config.seed,
    }
    identities = {
        subject.name: identity(
            settings,
            config.data,
            config.model.dtype,
            subject,
            tasks,
            fingerprint,
            against if settings.drift and subject.name == UNLEARNED else None,
            attacked if subject.name in settings.attacked else None,
        )
        for subject in subjects
    }
    return EvaluateJob(config, run, tasks, subjects, identities, data)


def _refer_to_retrained(job: EvaluateJob, log: StageLog) -> None:
    """Complete the scores of membership and TOFU tasks that refer to the retrained model, once all are scored."""
    from trace_ds.evaluation.retrained import with_retrained

    kinds, settings = {task.config.type for task in job.tasks}, job.config.evaluation
    if kinds.isdisjoint(("membership", "tofu")):
        return
    retrained = read_scored(job.result_path(settings.retrained)) if settings.retrained in settings.models else None
    if retrained is None and "membership" in kinds:
        log.line("PrivLeak: no retrained model among evaluation.models, so its AUC is assumed to be 0.5")
    if retrained is None and "tofu" in kinds:
        log.line("TOFU: no retrained model among evaluation.models, so there is no forget quality")
    for subject in job.subjects:
        path = job.result_path(subject.name)
        result = read_scored(path)
        if result is not None and (changed := with_retrained(result, retrained)) != result:
            write_json(path, changed)


def _take_existing(job: EvaluateJob, log: StageLog) -> None:
    """Delete results of models that this configuration does not name (the report must not mix evaluations), and copy
    those of a variant that its run has."""
    for path in job.strangers():
        log.line(f"removed {path.name}: no model of this run has that name")
        path.unlink()
    if job.place.parent is None:
        return
    for name in job.identities.keys() - job.scored():
        source = RunDirectory(job.place.parent).evaluation / f"{name}.json"
        if has_identity(source, job.identities[name]):
            write_bytes(job.result_path(name), source.read_bytes())
            log.detail(f"{name}: taken from the parent run")


def _score_missing(job: EvaluateJob, log: StageLog, world: World) -> bool:
    """Score the models that have no valid result; returns whether there were any."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.evaluation import drift
    from trace_ds.evaluation.language_model import ModelSettings, Sharding, open_language_model
    from trace_ds.evaluation.relearning import attack, training_settings

    config, evaluation = job.config, job.config.evaluation
    scored = world.run_on_main_and_broadcast(job.scored)
    missing = [subject.name for subject in job.subjects if subject.name not in scored]
    if not missing:
        return False
    if scored:
        log.detail(f"already there: {', '.join(sorted(scored))}")
    settings = ModelSettings(config.model.dtype, config.data.add_bos, config.data.add_eos, evaluation.batch_rows)
    sharding = Sharding(evaluation.ep, evaluation.zero_stage)
    path = config.model.tokenizer_path
    tokenizer = world.run_on_main_first(lambda: load_tokenizer(path))
    attacked = {name for name in missing if name in evaluation.attacked}
    measures_drift = evaluation.drift and UNLEARNED in missing
    original_routing: dict[str, RoutingSample] = {}
    for subject in job.subjects:
        name = subject.name
        if name not in missing and not (name == ORIGINAL and measures_drift):
            continue
        trained = None
        if evaluation.relearning is not None and name in attacked:
            trained = training_settings(evaluation.relearning, 3 if sharding.zero_stage == 3 else 1)
        with open_language_model(str(subject.path), tokenizer, settings, world, sharding, trained) as model:
            result = _score(job, subject, model, log) if name in missing else None
            diverged = result is not None and result["diverged"]
            if measures_drift and name in (ORIGINAL, UNLEARNED) and not diverged:
                assert job.data is not None
                routing = drift.routing_samples(job.data, model, log)
                if name == ORIGINAL:
                    original_routing = routing
                elif result is not None and original_routing:
                    result["drift"] = drift.routing_drift(original_routing, routing)
            if result is not None and not diverged and name in attacked:
                assert job.data is not None
                forget = TokenDataset.open(job.data.file("forget.arrow"))
                length, seed = config.data.context_length, config.seed
                attack(model, result, evaluation, job.tasks, forget, context_length=length, seed=seed)
        if result is not None:
            world.run_on_main_and_broadcast(functools.partial(_write, job, name, result, log))
    return True


def _write(job: EvaluateJob, name: str, result: dict[str, Any], log: StageLog) -> None:
    write_json(job.result_path(name), result)
    log.event("scored", model=name, scores=result["scores"])
    scores = {f"{name}/{score['task']}_{score['metric']}": score["value"] for score in result["scores"]}
    log.evaluation(0, **{score: value for score, value in scores.items() if value is not None})  # to TensorBoard


def _score(job: EvaluateJob, subject: Subject, model: LanguageModel, log: StageLog) -> dict[str, Any]:
    """The result of one model, without its drift; of a diverged model all values are None."""
    from trace_ds.evaluation.language_model import Diverged
    from trace_ds.evaluation.tasks import score_task_records, score_tasks

    tasks, new_tokens = job.tasks, job.config.evaluation.max_new_tokens
    progress = Progress(log, subject.name, sum(task.units for task in tasks), unit="item")
    result: dict[str, Any] = {
        "format": EVALUATION_FORMAT,
        "identity": job.identities[subject.name],
        "model": subject.name,
        "model_fingerprint": subject.fingerprint,
        **provenance(subject.path),
        "tasks": task_fingerprints(tasks, new_tokens),
        "drift": None,
        "diverged": False,
    }
    try:
        result |= score_tasks(model, tasks, new_tokens, job.config.data.context_length, progress.advance)
    except Diverged:
        scores = [record for task in tasks for record in score_task_records(task, {}, len(task.items))]
        log.line(
            f"warning: {subject.name} has diverged (its log-probabilities are not finite), so it has no scores: "
            "lower unlearning.optimizer.lr or the strength of the forget loss"
        )
        return result | {"scores": scores, "items": {}, "by_source": {}, "diverged": True}
    finally:
        progress.close()
    values = {f"{score['task']} {score['metric']}": score["value"] for score in result["scores"]}
    summary = ", ".join(f"{name} {'–' if value is None else f'{value:.4g}'}" for name, value in values.items())
    log.detail(f"{subject.name}: {summary or 'no tasks'}")
    return result
