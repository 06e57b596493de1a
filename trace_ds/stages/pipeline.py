"""Walking the stages: one verb alone, or all of them with their variants (``trace-ds run``).

    prepare → (finetune) → collect → calibrate → unlearn → convert → evaluate → report

Single-process stages run here; the distributed ones (finetune, collect, unlearn) run as a job of their own: in this
process when a launcher made it a rank, else in local processes that this one starts.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from trace_ds.config.load import dump_yaml, load_config, with_changes
from trace_ds.config.schema import Config
from trace_ds.errors import StopRequested, UserError
from trace_ds.parallel.environment import accelerator_count, launched
from trace_ds.run.directory import RunDirectory, lock_environment, locked
from trace_ds.run.log import BEGAN, already_done
from trace_ds.run.ours import require_apart
from trace_ds.stages.by_name import find_models, require_data_unmoved, with_places, with_sizes_here

STAGES = ("prepare", "finetune", "collect", "calibrate", "unlearn", "convert", "evaluate", "report")
DISTRIBUTED = ("finetune", "collect", "unlearn")
SHARED = ("prepare", "finetune", "collect")  # by a run and its variants: done by the run alone
REPLACE_INPUTS = ("run", *SHARED)
LAUNCHABLE = (*DISTRIBUTED, "evaluate")  # evaluate is a job of its own only when evaluation.nproc or a launcher says so


@dataclass(frozen=True)
class Request:
    """A configuration and the run directory it works in.

    Attributes:
        written: the configuration as the user wrote it, which is what config.yaml holds.
        places: directories of the models that it names on the hub (:meth:`located`), by their names.
    """

    written: Config
    run: RunDirectory
    places: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, config: str | Sequence[str], overrides: Sequence[str], run_dir: Path | None) -> Request:
        loaded, directory = load_config(config, overrides, run_dir)
        return cls(loaded, RunDirectory.at(directory, dump_yaml(loaded)))

    @property
    def config(self) -> Config:
        """The configuration for stages: models are directories, expert-parallel sizes numbers."""
        return with_sizes_here(with_places(self.written, self.places))

    def located(self, verb: str, *, download: bool) -> Request:
        """With directories for the models that ``verb`` needs; what is named on the hub and not in its cache is brought
        from there or, without ``download``, stays a name.

        A job under a launcher, a dry run and a look at a run (doctor, plan, submit) never download.
        """
        return replace(self, places=find_models(self.written, self.run, verb, download=download))

    def variant(self, name: str) -> Request:
        """The same run with the keys of ``variants.NAME`` changed, in ``RUN/variants/NAME``."""
        if name not in self.written.variants:
            known = ", ".join(self.written.variants) or "none"
            raise UserError(f"the configuration has no variant {name!r}", "--variant", f"use one of its own: {known}")
        changed = with_changes(self.written, self.written.variants[name], f"variants.{name}")
        changed = changed.model_copy(update={"variants": {}, "name": name})
        return Request(changed, self.run.variant(name, dump_yaml(changed)), self.places)

    def all(self) -> list[Request]:
        return [self, *(self.variant(name) for name in self.config.variants)]

    def seen_by(self, verb: str) -> Request:
        """The same run as a verb sees it: the model of the stages after `finetune` is the one that was made."""
        from trace_ds.stages.finetune import after_finetune

        return Request(after_finetune(self.config, self.run), self.run) if verb in STAGES[2:] else self

    @property
    def stages(self) -> list[str]:
        """What `run` runs, in order."""
        return [stage for stage in STAGES if stage != "finetune" or self.config.finetune is not None]

    def check_places(self) -> None:
        """Refuse a run directory that is not ours, or that lies in, on or around what the configuration reads."""
        for item in self.all():
            require_apart(self.run.outputs, inputs_of(item.config))
        self.run.require_ours()


def inputs_of(config: Config) -> dict[str, Path]:
    """Every file and directory that a configuration names, by its key."""
    named: dict[str, str | None] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    for side in config.data.sides:
        for i, entry in enumerate(getattr(config.data, side)):
            named |= {f"data.{side}[{i}].{key}": getattr(entry, key) for key in ("path", "dataset")}
    for task in config.evaluation.tasks:
        keys = ("dataset",) if task.dataset else ("path", "examples", "holdout", "include_path")
        named |= {f"evaluation.tasks {task.name} {key}": getattr(task, key) for key in keys}
    named |= {f"evaluation.models.{name}": path for name, path in config.evaluation.models.items()}
    named["unlearning.ds_config"] = config.unlearning.ds_config
    named["finetune.ds_config"] = config.finetune.ds_config if config.finetune is not None else None
    return {key: Path(path) for key, path in named.items() if path}


def run_verb(verb: str, request: Request, *, dry_run: bool = False) -> int:
    """Run one verb (or ``run``: all stages); returns the exit status."""
    if dry_run:
        stages = request.stages if verb == "run" else [verb]
        print(f"# run directory: {request.run.path}; would run: {', '.join(stages)}")
        for item in request.all()[1:] if verb == "run" else ():
            print(f"# variant {item.config.name}: {request.config.variants[item.config.name]}")
        try:
            check_early(verb, request.located(verb, download=False), download=False)
        except UserError as error:  # a recipe can be read before there is a model
            print(f"# not ready: {error.line()}")
        print(dump_yaml(request.written), end="")
        return 0
    if verb in LAUNCHABLE and launched():
        return _run_as_rank(verb, request)
    if verb != "report":  # it reads artefacts only
        request = request.located(verb, download=True)
        require_data_unmoved(request.written, request.run, verb)
    check_early(verb, request)
    with locked(request.run, replaces_inputs=verb in REPLACE_INPUTS) as lock:
        if verb == "run":
            return _run_all(request, lock)
        return _run_stage(verb, request, lock)


def check_early(verb: str, request: Request, world_size: int | None = None, *, download: bool = True) -> None:
    """Find what is wrong with the user's input before anything is written.

    Args:
        world_size: processes of the job when it is to run elsewhere; None: it runs here, as configured.
        download: bring data sets that are named into their cache, to look at them; False: what is not there is missing.
    """
    from trace_ds.corpora.sources import only_looking

    with contextlib.nullcontext() if download else only_looking():
        _check_early(verb, request, world_size, download=download)


def _check_early(verb: str, request: Request, world_size: int | None, *, download: bool) -> None:
    from trace_ds.corpora.read import check_files
    from trace_ds.corpora.sources import files_here
    from trace_ds.corpora.tokenizer import check_tokenizer
    from trace_ds.models.families import check_expert_parallel, inspect_model
    from trace_ds.parallel.launch import check_process_count
    from trace_ds.run import artefact
    from trace_ds.stages import finetune
    from trace_ds.stages.inputs import checked_model
    from trace_ds.tensors.model_files import read_model_config, read_model_directory

    if verb == "finetune":
        finetune.settings_of(request.config)
    for item in request.all() if verb == "run" else [request]:
        item.check_places()
    if verb in STAGES[2:-1]:
        finetune.require_models(request.config, request.run)
    request = request.seen_by(verb)
    config, run = request.config, request.run
    if run.parent is not None and verb in REPLACE_INPUTS:
        raise UserError(
            "this is the directory of a variant, which takes data, models and statistics from its run",
            str(run.path),
            f"use --run-dir {run.parent}, or another directory",
        )
    cores = accelerator_count(), os.cpu_count() or 1
    if verb in ("run", "evaluate"):
        nproc = world_size or config.evaluation.nproc
        if world_size is None:
            check_process_count(nproc, *cores, "evaluation.nproc")
        options, info = config.distributed.autoep.options, inspect_model(config.model.path)
        check_expert_parallel(info, config.evaluation.ep, nproc, "evaluation.ep", options)
    if verb in ("run", *DISTRIBUTED):
        nproc = world_size or process_count(config)
        if world_size is None:
            check_process_count(nproc, *cores)
        checked_model(config, nproc)
    if verb in STAGES[1:-1] and (verb != "evaluate" or config.evaluation.needs_data):
        artefact.load(run.data, "data", verify=False)
    if verb in ("run", "prepare", *LAUNCHABLE):
        vocabulary = read_model_config(config.model.path).get("vocab_size")
        check_tokenizer(config.model.tokenizer_path, vocabulary)
    if verb in ("run", "prepare"):
        for side in config.data.sides:
            check_files(getattr(config.data, side), f"data.{side}", download=download)
    if verb in ("run", "evaluate"):
        from trace_ds.evaluation.harness import require_data
        from trace_ds.evaluation.items import read_tasks

        for task in config.evaluation.tasks:
            if task.dataset and not download:
                files_here(task, "evaluation.tasks")
        read_tasks(config.evaluation.tasks)
        for task in config.evaluation.tasks:
            if task.type == "lm_eval" and not task.path:
                require_data(task, download=download)
    if verb == "run":  # and what only a late stage, or a variant, would stumble on
        from trace_ds.evaluation.subjects import named_models
        from trace_ds.stages.convert import check_convert
        from trace_ds.stages.unlearn import check_settings

        info = inspect_model(config.model.path)
        if config.finetune is not None:
            finetune.check_settings(config, info)
        for item in request.all():
            check_settings(item.config, info)
            check_convert(item.config, item.run)
        for path in named_models(config.model.path, config.evaluation).values():
            read_model_directory(path)


def process_count(config: Config, stage: str = "unlearn") -> int:
    """Local processes of a job started bare: as configured, else one per accelerator, else one."""
    return config.evaluation.nproc if stage == "evaluate" else config.distributed.nproc or accelerator_count() or 1


def _run_all(request: Request, lock: Sequence[int]) -> int:
    for stage in request.stages[:-1]:
        for item in request.all():
            if item.run.parent is not None and stage in SHARED:
                continue
            status = _run_stage(stage, item, lock, top=request.run)
            if status:
                return status
    return _run_stage("report", request, lock)


def _run_stage(stage: str, request: Request, lock: Sequence[int], *, top: RunDirectory | None = None) -> int:
    """Run one stage; config.yaml becomes this request's as soon as the stage has found nothing wrong with its input."""
    request.run.clear_leftovers()
    request = request.seen_by(stage)
    if stage in DISTRIBUTED or (stage == "evaluate" and request.config.evaluation.nproc > 1):
        return _launch(stage, request, lock, top or request.run)
    if stage == "report":  # it shows the configuration
        request.run.store_config()
    _function(stage)(request.config, request.run)
    request.run.store_config()
    return 0


def _function(stage: str) -> Callable[..., object]:
    """What carries out a stage: the function of the module of its name."""
    return getattr(importlib.import_module(f"trace_ds.stages.{stage}"), stage)


def _launch(stage: str, request: Request, lock: Sequence[int], lock_owner: RunDirectory) -> int:
    """Check the job, skip it when it is done, else run it in local processes of its own."""
    from trace_ds.parallel.launch import run_processes

    began = {BEGAN: f"{time.time():.3f}"}
    nproc = process_count(request.config, stage)
    done = is_done(stage, request, nproc)
    request.run.store_config()
    if done:
        already_done(stage, request.run)
        return 0
    directory = request.run.path  # whose name may begin with a hyphen
    where = str(directory) if directory.is_absolute() else f"./{directory}"
    return run_processes(
        [stage, f"{where}/{request.run.config.name}", "--run-dir", where],
        nproc,
        lock_environment(lock_owner, lock) | began,
        lock,
        request.config.distributed.threads,
    )


def is_done(stage: str, request: Request, nproc: int, *, verify: bool = True) -> bool:
    """Whether a stage (all but convert and report) has nothing to do; raises :class:`UserError` where it would.

    ``verify``: whether ``unlearn`` proves what it is made from by its hashes.
    """
    if stage in ("prepare", "calibrate"):
        from trace_ds.run import artefact
        from trace_ds.stages import calibrate, prepare

        kind, place = ("data", request.run.data) if stage == "prepare" else ("calibration", request.run.calibration)
        if stage == "prepare":
            identity = artefact.identity_of("data", *prepare.asked(request.config))
        else:
            identity = calibrate.CalibrationInputs.read(request.config, request.run).identity
        return artefact.is_done(place, kind, identity)
    if stage == "finetune":
        from trace_ds.stages.finetune import check_finetune

        return all(
            job.is_done(request.config, request.run) for job in check_finetune(request.config, request.run, nproc)
        )
    if stage == "collect":
        from trace_ds.stages.collect import check_collect

        collection = check_collect(request.config, request.run, nproc)
        return len(collection.done(request.run)) == len(collection.inputs)
    if stage == "evaluate":
        from trace_ds.stages.evaluate import check_evaluate

        job = check_evaluate(request.config, request.run)
        return len(job.done(request.run)) == len(job.identities)
    from trace_ds.stages.unlearn import check_unlearn

    return check_unlearn(request.config, request.run, nproc, verify=verify).settled(request.config, request.run)


def _leave_together(kind: type[BaseException] | None, *_: object) -> None:
    """Close the process group when all ranks leave, also with an error that all know of.

    One that is still open when the interpreter ends can abort its process. After other errors peers may hang in it, so
    it is left alone.
    """
    from trace_ds.parallel.world import AgreedError, leave

    if kind is None or issubclass(kind, UserError | AgreedError | StopRequested):
        leave()


def _run_as_rank(verb: str, request: Request) -> int:
    """This process is one rank of a job: join it, and let the main process lock and prepare the run directory.

    A process that was in a group before, as one of a study that runs many jobs of one process, stays in it.
    """
    from trace_ds.corpora.sources import only_looking
    from trace_ds.parallel.world import is_joined, join

    distributed, stays = request.config.distributed, is_joined()
    world = join(distributed.threads, distributed.timeout_minutes)
    with contextlib.ExitStack() as stack:
        if not stays:
            stack.push(_leave_together)
        stack.enter_context(only_looking())
        request = world.agree_each(lambda _: request.located(verb, download=False))

        def enter() -> None:
            check_early(verb, request, world.size, download=False)
            require_data_unmoved(request.written, request.run, verb)
            stack.enter_context(locked(request.run, replaces_inputs=verb in REPLACE_INPUTS))
            request.run.clear_leftovers()

        world.agree(enter)
        request = request.seen_by(verb)
        _function(verb)(request.config, request.run, world)
        if world.is_main:
            request.run.store_config()
        world.barrier()
    return 0


def report_command(paths: list[Path]) -> int:
    """``trace-ds report RUN [RUN …]``: a run, with those that repeat it with other seeds."""
    from trace_ds.stages.report import report

    run = RunDirectory.at(paths[0])
    for path in paths:
        if not (path / "config.yaml").is_file():
            raise UserError("this is not a run directory (no config.yaml)", str(path), "give run directories")
    with locked(run):
        report(None, run, paths[1:])
    return 0
