"""``trace-ds evaluate``: models → scores, plain transformers, on the CPU or the GPU, on one process or many.

Everything the user can have got wrong (task files, model directories, tokenizers) is checked before a weight is
loaded. Each model's result is one file, ``RUN/evaluation/NAME.json``, written atomically and kept while it is still
what would be computed: a killed evaluation goes on where it was. A variant takes the results of the models it shares
with its parent run from there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.names import ORIGINAL, UNLEARNED
from trace_ds.config.schema import Config
from trace_ds.corpora.tokenizer import load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.evaluation.items import Task, read_tasks
from trace_ds.evaluation.subjects import (
    FORMAT,
    Subject,
    find_subjects,
    has_identity,
    identity,
    named_models,
    read_result,
    require_same_tokenizer,
    task_fingerprints,
)
from trace_ds.models.families import ModelInfo, check_expert_parallel, inspect_model
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory, unwritable
from trace_ds.run.files import write_bytes, write_json
from trace_ds.run.hub_names import provenance
from trace_ds.run.log import Progress, StageLog, already_done, stage_log
from trace_ds.stages.inputs import check_vocabulary, checked_tasks
from trace_ds.tensors.model_files import read_model_directory

if TYPE_CHECKING:
    from trace_ds.evaluation.attacks import Decisions
    from trace_ds.evaluation.drift import RoutingSample
    from trace_ds.evaluation.language_model import LanguageModel
    from trace_ds.parallel.world import World


@dataclass(frozen=True)
class EvaluateJob:
    """What is to be scored, checked.

    ``place``: the run directory; ``info``: of the original; ``identities``: by model name.
    """

    config: Config
    place: RunDirectory
    info: ModelInfo
    tasks: list[Task]
    subjects: list[Subject]
    identities: dict[str, str]
    data: artefact.Artefact | None

    def scored(self) -> list[str]:
        """The models whose result is there and still valid."""
        folder = self.place.evaluation
        return [name for name, value in self.identities.items() if has_identity(folder / f"{name}.json", value)]

    def strangers(self) -> list[Path]:
        """Results of models that this configuration does not name."""
        results = sorted(self.place.evaluation.glob("*.json"))
        return [p for p in results if p.stem not in self.identities and "scores" in (read_result(p) or {})]

    def done(self) -> bool:
        refers = {"membership", "tofu"} & {task.config.type for task in self.tasks}  # to scores of another model
        return len(self.scored()) == len(self.identities) and not self.strangers() and not refers

    def run(self, world: World | None = None) -> None:
        """Score every model of the run and print the table of scores.

        With a ``world`` (collectively, on every process) the batches of every task are shared out; the scores are those
        of one process. The main process alone writes.
        """
        evaluate(self, world)


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    from trace_ds.corpora.sources import files_here
    from trace_ds.evaluation.harness import require_data

    info, options = inspect_model(config.model.path), config.distributed.autoep
    check_expert_parallel(info, config.evaluation.ep, processes, "evaluation.ep", options)
    if run.parent is not None:
        return  # the tasks and models are those of the run, which were looked at there
    check_vocabulary(config)
    for task in config.evaluation.tasks:
        if task.dataset and not download:
            files_here(task, "evaluation.tasks")
    read_tasks(config.evaluation.tasks)
    for task in config.evaluation.tasks:
        if task.type == "lm_eval" and not task.path:
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
    data = artefact.load(run.data, "data", verify=False) if settings.needs_data else None
    if data is not None:
        data.require_same(tokenizer=fingerprint)
    if settings.expert_forcing:
        from trace_ds.evaluation.attacks import check_forcing

        check_forcing(info.path)
    subjects = find_subjects(config.model.path, settings, run, unlearned=config.unlearning.keep != 0)
    for subject in subjects:
        require_same_tokenizer(subject.path, reference, tokenizer)
    against = {"original": info.fingerprint} | ({"data": data.content} if data is not None else {})
    calibrated = settings.expert_forcing and (run.calibration / artefact.FILE_NAME).is_file()
    calibration = artefact.load(run.calibration, "calibration", verify=False) if calibrated else None
    attacked = {
        **against,
        "relearning": settings.relearning and settings.relearning.model_dump(mode="json"),
        "seed": config.seed,
        "expert_forcing": settings.expert_forcing,
        "calibration": calibration and calibration.content,
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
    return EvaluateJob(config, run, info, tasks, subjects, identities, data)


def look(config: Config, run: RunDirectory) -> None:
    unlearned = [] if config.unlearning.keep == 0 else [run.model]
    for path in (*named_models(config.model.path, config.evaluation).values(), *unlearned):
        read_model_directory(path)
    if config.evaluation.needs_data:
        artefact.load(run.data, "data", verify=False)
    read_tasks(config.evaluation.tasks)


def evaluate(job: EvaluateJob, world: World | None) -> None:
    config, run, is_main = job.config, job.place, world is None or world.is_main
    try:
        _on_main(world, lambda: run.evaluation.mkdir(parents=True, exist_ok=True))
        with _threads(config.distributed.threads), stage_log(run, "evaluate", enabled=is_main) as log:
            _on_main(world, lambda: _drop_others(job, log))
            _on_main(world, lambda: _copy_from_parent(job, run, log))
            scored = _score_missing(config, job, run, log, world)
            _on_main(world, lambda: _refer_to_retrained(config, job, run, log))
            if is_main and scored:
                _tell(job, run, log)
            elif is_main:
                already_done("evaluate", run)
    except OSError as error:
        raise unwritable(run.evaluation, error) from error


def _on_main(world: World | None, work: Callable[[], None]) -> None:
    """Let the main process do ``work`` (collective): a full disk there must not leave the others waiting."""
    if world is None:
        work()
    else:
        world.run_on_main_and_broadcast(work)


def _refer_to_retrained(config: Config, job: EvaluateJob, run: RunDirectory, log: StageLog) -> None:
    """Scores that are about the retrained model's (of membership and TOFU tasks), once all models are scored."""
    from trace_ds.evaluation.tasks import with_retrained

    kinds = {task.config.type for task in job.tasks}
    if kinds.isdisjoint(("membership", "tofu")):
        return
    named = config.evaluation.retrained in config.evaluation.models
    retrained = read_result(run.evaluation / f"{config.evaluation.retrained}.json") if named else None
    if retrained is None and "membership" in kinds:
        log.line("PrivLeak: no retrained model among evaluation.models, so its AUC is assumed to be 0.5")
    if retrained is None and "tofu" in kinds:
        log.line("TOFU: no retrained model among evaluation.models, so there is no forget quality")
    for subject in job.subjects:
        path = run.evaluation / f"{subject.name}.json"
        result = read_result(path)
        if result is not None and (changed := with_retrained(result, retrained)) != result:
            write_json(path, changed)


def _drop_others(job: EvaluateJob, log: StageLog) -> None:
    """Delete results of models that this configuration does not name: the report must not mix evaluations."""
    for path in job.strangers():
        log.line(f"removed {path.name}: no model of this run has that name")
        path.unlink()


def _copy_from_parent(job: EvaluateJob, run: RunDirectory, log: StageLog) -> None:
    if run.parent is None:
        return
    done = job.scored()
    for name, expected in job.identities.items():
        source = RunDirectory(run.parent).evaluation / f"{name}.json"
        if name not in done and has_identity(source, expected):
            write_bytes(run.evaluation / source.name, source.read_bytes())
            log.detail(f"{name}: taken from the parent run")


def _score_missing(config: Config, job: EvaluateJob, run: RunDirectory, log: StageLog, world: World | None) -> bool:
    """Whether there was anything to do."""
    from trace_ds.evaluation import drift
    from trace_ds.evaluation.attacks import Attacks, training_settings
    from trace_ds.evaluation.language_model import ModelSettings, Sharding, loaded

    settings = ModelSettings(config.model.dtype, config.data.add_bos, config.data.add_eos, config.evaluation.batch_rows)
    autoep = config.distributed.autoep  # DeepEP's buffers are as large as the batches of collect and unlearn
    options = {} if autoep.get("comm_backend") == "deepep" else autoep
    sharding = Sharding(config.evaluation.ep, config.evaluation.zero_stage, options)
    place = config.model.tokenizer_path
    tokenizer = load_tokenizer(place) if world is None else world.run_on_main_first(lambda: load_tokenizer(place))
    done = job.scored() if world is None else world.run_on_main_and_broadcast(job.scored)
    todo = [subject for subject in job.subjects if subject.name not in done]
    if not todo:
        return False
    if done:
        log.detail(f"already there: {', '.join(sorted(done))}")
    drifts = config.evaluation.drift and any(subject.name == UNLEARNED for subject in todo)
    attacks = Attacks(config.evaluation, config.data.context_length, config.seed, run, job.tasks, job.data)
    attacked = {subject.name for subject in todo} & set(config.evaluation.attacked)
    forcing = config.evaluation.expert_forcing and bool(attacked)
    before: dict[str, RoutingSample] = {}
    decisions: dict[str, Decisions] = {}
    for subject in job.subjects:
        wanted, trained = subject in todo, None
        if config.evaluation.relearning is not None and subject.name in attacked:
            trained = training_settings(config.evaluation.relearning, 3 if sharding.zero_stage == 3 else 1)
        if not wanted and not (subject.name == ORIGINAL and (drifts or forcing)):
            continue
        with loaded(str(subject.path), tokenizer, settings, world, sharding, trained) as model:
            result = _score(config, job, subject, model, log) if wanted else None
            diverged = result is not None and result["diverged"]
            if drifts and subject.name in (ORIGINAL, UNLEARNED) and not diverged:
                assert job.data is not None
                sample = drift.routing(job.data, model, log)
                if subject.name == ORIGINAL:
                    before = sample
                elif result is not None and before:
                    result["drift"] = drift.routing_drift(job.info, before, sample)
            if forcing and subject.name == ORIGINAL:
                decisions = attacks.decisions(model)
            if result is not None and not diverged and subject.name in attacked:
                attacks.attack(model, result, decisions)
        if result is not None:
            _on_main(world, lambda subject=subject, result=result: _write(run, subject, result, log))  # type: ignore[misc]
    return True


def _write(run: RunDirectory, subject: Subject, result: dict[str, Any], log: StageLog) -> None:
    write_json(run.evaluation / f"{subject.name}.json", result)
    log.event("scored", model=subject.name, scores=result["scores"])
    _draw(log, subject, result)


def _draw(log: StageLog, subject: Subject, result: dict[str, Any]) -> None:
    """The scores as TensorBoard scalars, one point each."""
    scores = {f"{subject.name}/{score['task']}_{score['metric']}": score["value"] for score in result["scores"]}
    log.evaluation(0, **{name: value for name, value in scores.items() if value is not None})


def _score(config: Config, job: EvaluateJob, subject: Subject, model: LanguageModel, log: StageLog) -> dict[str, Any]:
    """The result of one model, without its drift; of a diverged model all values are None."""
    from trace_ds.evaluation.language_model import Diverged
    from trace_ds.evaluation.tasks import run_task, score_records

    progress = Progress(log, subject.name, sum(task.units for task in job.tasks), unit="item")
    result: dict[str, Any] = {
        "format": FORMAT,
        "identity": job.identities[subject.name],
        "model": subject.name,
        "model_fingerprint": subject.fingerprint,
        **provenance(subject.path),
        "tasks": task_fingerprints(job.tasks, config.evaluation.max_new_tokens),
        "scores": [],
        "items": {},
        "by_source": {},
        "drift": None,
        "diverged": False,
    }
    try:
        for task in job.tasks:
            outcome = run_task(
                model,
                task,
                max_new_tokens=config.evaluation.max_new_tokens,
                context_length=config.data.context_length,
                advance=progress.advance,
            )
            result["scores"] += outcome.scores
            result["items"][task.config.name] = outcome.items
            result["by_source"][task.config.name] = outcome.by_source
    except Diverged:
        scores = [record for task in job.tasks for record in score_records(task, {}, len(task.items))]
        result |= {"scores": scores, "items": {}, "by_source": {}, "diverged": True}
        log.line(
            f"warning: {subject.name} has diverged (its log-probabilities are not finite), so it has no scores: "
            "lower unlearning.optimizer.lr or the strength of the forget loss"
        )
    finally:
        progress.close()
    if not result["diverged"]:
        values = {f"{score['task']} {score['metric']}": score["value"] for score in result["scores"]}
        summary = ", ".join(f"{name} {'–' if value is None else f'{value:.4g}'}" for name, value in values.items())
        log.detail(f"{subject.name}: {summary or 'no tasks'}")
    return result


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Run with a fixed number of CPU threads (results depend on it bitwise) and put the former one back."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _tell(job: EvaluateJob, run: RunDirectory, log: StageLog) -> None:
    """Each task's first score before and after, in one line."""
    from trace_ds.evaluation.metrics import change

    results = [read_result(run.evaluation / f"{subject.name}.json") for subject in job.subjects]
    scored = [result for result in results if result is not None]
    log.done(f"{len(scored)} models: {change(scored, ORIGINAL, UNLEARNED) or 'no tasks'}")
