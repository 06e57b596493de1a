"""Running the stages: one alone, or all of them with their variants (``trace-ds run``).

    prepare → (finetune) → collect → calibrate → unlearn → convert → evaluate → report

A stage (:mod:`trace_ds.stages.protocol`) is checked once, in the process that was started: the checked job then does
its work there or is handed to local ranks. Under a launcher every process is a rank already: the main one checks, and
all get the job from it.
"""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.load import dump_yaml, load_config, with_changes
from trace_ds.config.schema import Config
from trace_ds.errors import StopRequested, UserError
from trace_ds.parallel.environment import accelerator_count, launched
from trace_ds.run.directory import RunDirectory, lock_environment, locked
from trace_ds.run.log import BEGAN, already_done
from trace_ds.run.ours import require_apart
from trace_ds.stages.by_name import find_models, require_data_unmoved, with_places, with_sizes_here
from trace_ds.stages.protocol import STAGES, Job, Stage

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

STUDY_FILE = "study.json"
RUN = "run"  # the verb that is all stages
JOB_VARIABLE = "TRACE_DS_JOB_FD"  # descriptor of the memory file with the job that a rank is to do


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

    def seen_by(self, stage: Stage) -> Request:
        """The same run as a stage sees it: the model of the stages after `finetune` is the one that was made."""
        from trace_ds.stages.finetune import after_finetune

        return Request(after_finetune(self.config, self.run), self.run) if stage.of_finetuned else self

    @property
    def stages(self) -> list[str]:
        """What `run` runs, in order."""
        return [name for name, stage in STAGES.items() if not stage.optional or getattr(self.config, name) is not None]

    def check_places(self) -> None:
        """Refuse a run directory that is not ours, or that lies in, on or around what the configuration reads."""
        for item in self.all():
            require_apart(self.run.outputs, inputs_of(item.config))
        self.run.require_ours()


def inputs_of(config: Config) -> dict[str, Path]:
    """Every file and directory that a configuration names, by its key."""
    named: dict[str, str | None] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    for side in config.data.sides:
        for i, entry in enumerate(config.data.corpus(side)):
            named |= {f"data.{side}[{i}].{key}": getattr(entry, key) for key in ("path", "dataset")}
    for task in config.evaluation.tasks:
        keys = ("dataset",) if task.dataset else ("path", "examples", "holdout", "include_path")
        named |= {f"evaluation.tasks {task.name} {key}": getattr(task, key) for key in keys}
    named |= {f"evaluation.models.{name}": path for name, path in config.evaluation.models.items()}
    named["unlearning.ds_config"] = config.unlearning.ds_config
    return {key: Path(path) for key, path in named.items() if path}


def run_verb(verb: str, request: Request, *, dry_run: bool = False) -> int:
    """Run one stage, or all (``run``) with those of the variants; returns the exit status."""
    if dry_run:
        return _show_plan(verb, request)
    if launched() and verb in STAGES and STAGES[verb].section:
        return _run_as_rank(STAGES[verb], request)
    names = request.stages if verb == RUN else [verb]
    if not (verb in STAGES and STAGES[verb].of_all):  # the report reads artefacts only
        request = request.located(verb, download=True)
    require_data_unmoved(request.written, request.run, verb)
    check_early(verb, request)
    with locked(request.run, replaces_inputs=any(STAGES[name].shared for name in names)) as lock:
        for stage in map(STAGES.__getitem__, names):
            every = request.all() if verb == RUN and not stage.shared and not stage.of_all else [request]
            for item in every:
                if status := _run_stage(stage, item, lock, request.run):
                    return status
    return 0


def _show_plan(verb: str, request: Request) -> int:
    """``--dry-run``: what would run, what is in its way, and the resolved configuration."""
    whole = verb == RUN
    print(f"# run directory: {request.run.path}; would run: {', '.join(request.stages if whole else [verb])}")
    for item in request.all()[1:] if whole else ():
        print(f"# variant {item.config.name}: {request.config.variants[item.config.name]}")
    try:
        check_early(verb, request.located(verb, download=False), download=False)
    except UserError as error:  # a recipe can be read before there is a model
        print(f"# not ready: {error.line()}")
    print(dump_yaml(request.written), end="")
    return 0


def check_early(verb: str, request: Request, world_size: int | None = None, *, download: bool = True) -> None:
    """Find what is wrong with the user's input before anything is written.

    Args:
        world_size: processes of the job when it is to run elsewhere; None: it runs here, as configured.
        download: bring data sets that are named into their cache, to look at them; False: what is not there is missing.
    """
    from trace_ds.corpora.sources import only_looking

    whole = verb == RUN
    stages = [STAGES[name] for name in (request.stages if whole else [verb])]
    with contextlib.nullcontext() if download else only_looking():
        for item in request.all() if whole else [request]:
            item.check_places()
        for stage in stages:
            if request.run.parent is not None and stage.shared:
                raise UserError(
                    "this is the directory of a variant, which takes data, models and statistics from its run",
                    str(request.run.path),
                    f"use --run-dir {request.run.parent}, or another directory",
                )
            if not whole and stage.of_finetuned:
                from trace_ds.stages.finetune import require_models

                require_models(request.config, request.run)
            for item in [request] if stage.shared or not whole else request.all():
                # of a whole run the model that `finetune` makes is not there yet: it has the shape of the base model
                seen = item if whole else item.seen_by(stage)
                processes = stage.processes(seen.config) if world_size is None or not stage.section else world_size
                if world_size is None and stage.section:
                    _check_process_count(processes, stage)
                stage.module.preflight(seen.config, seen.run, processes, download=download)


def _check_process_count(processes: int, stage: Stage) -> None:
    from trace_ds.parallel.launch import check_process_count

    check_process_count(processes, accelerator_count(), os.cpu_count() or 1, f"{stage.section}.nproc")


def _run_stage(stage: Stage, request: Request, lock: Sequence[int], lock_owner: RunDirectory) -> int:
    """Check a stage and do its work, here or in local ranks; config.yaml becomes this request's as soon as nothing is
    wrong with the stage's input."""
    began_s = time.time()
    request.run.clear_leftovers()
    seen = request.seen_by(stage)
    config, run = seen.config, replace(seen.run, config_text=request.run.config_text)
    processes = stage.processes(config)
    job = stage.module.check(config, run, processes)
    if job.done():
        run.store_config()
        already_done(stage.name, run)
        return 0
    os.environ[BEGAN] = f"{began_s:.3f}"
    if not stage.section or (processes == 1 and not accelerator_count()):
        with _alone(config) if stage.needs_world else contextlib.nullcontext() as world:
            job.run(world)
        run.store_config()
        return 0
    run.store_config()
    return _launch(stage, job, processes, config, lock, lock_owner)


def run_stage(name: str, config: Config, run: RunDirectory, world: World | None = None) -> None:
    """Check a stage and do what is not done of it, in this process (with a ``world``: of every rank, collectively)."""
    stage = STAGES[name]
    if world is None:
        job = stage.module.check(config, run, 1)
        if job.done():
            already_done(name, run)
        else:
            job.run(None)
    else:
        _agreed_job(stage, config, run, world, lambda: stage.module.check(config, run, world.size)).run(world)


def _agreed_job(stage: Stage, config: Config, run: RunDirectory, world: World, check: Callable[[], Job]) -> Job:
    """What ``check`` returns on the main process, on every rank (collective); the others look whether they can see what
    the job reads."""

    job = world.run_on_main_first(lambda: check() if world.is_main else stage.module.look(config, run))
    return world.broadcast(job)  # type: ignore[return-value]


@contextlib.contextmanager
def _alone(config: Config) -> Iterator[World]:
    """A world of this process alone, for a stage that is written for many ranks.

    Starting Python, torch and DeepSpeed anew would take longer than small jobs do. With an accelerator a job has a
    process of its own all the same: what it leaves on the device goes with it.
    """
    import torch

    from trace_ds.parallel.world import join

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise StopRequested("stopped on request; run again to go on")

    variables, threads = dict(os.environ), torch.get_num_threads()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # the group stays: DeepSpeed keeps groups of experts that it made, and takes them again in the next stage
        yield join(config.distributed.threads, config.distributed.timeout_minutes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(variables)  # nothing says any more that this process is a rank
        gc.collect()


def _launch(
    stage: Stage, job: Job, processes: int, config: Config, lock: Sequence[int], lock_owner: RunDirectory
) -> int:
    """Do a checked job in local ranks. Each reads it from a file in memory that only they inherit."""
    from trace_ds.parallel.launch import run_processes

    content = pickle.dumps((stage.name, job, config.distributed.threads, config.distributed.timeout_minutes))
    file = os.memfd_create("trace_ds-job")
    try:
        os.pwrite(file, content, 0)
        os.set_inheritable(file, True)
        environment = lock_environment(lock_owner, lock) | {JOB_VARIABLE: str(file), BEGAN: os.environ.pop(BEGAN)}
        return run_processes(["rank"], processes, environment, [*lock, file], config.distributed.threads)
    finally:
        os.close(file)


def run_rank() -> int:
    """What a local rank does: the job that the process which started it has checked."""
    from trace_ds.parallel.world import join

    file = int(os.environ.pop(JOB_VARIABLE))
    # written by the parent process a moment ago, in memory that nobody else can reach: nothing from outside
    _, job, threads, timeout_minutes = pickle.loads(os.pread(file, os.fstat(file).st_size, 0))
    world = join(threads, timeout_minutes)
    with contextlib.ExitStack() as stack:
        stack.push(_leave_together)
        job.run(world)
        world.barrier()
    return 0


def _leave_together(kind: type[BaseException] | None, *_: object) -> None:
    """Close the process group when all ranks leave, also with an error that all know of.

    One that is still open when the interpreter ends can abort its process. After other errors peers may hang in it, so
    it is left alone.
    """
    from trace_ds.parallel.world import AgreedError, leave

    if kind is None or issubclass(kind, UserError | AgreedError | StopRequested):
        leave()


def _run_as_rank(stage: Stage, request: Request) -> int:
    """This process is one rank of a launched job: join it; the main process locks the run directory and checks the job,
    which all ranks get from it. The others only look whether what the job reads is there for them too."""
    from trace_ds.corpora.sources import only_looking
    from trace_ds.parallel.world import is_joined, join

    distributed, stays = request.config.distributed, is_joined()
    world = join(distributed.threads, distributed.timeout_minutes)
    with contextlib.ExitStack() as stack:
        if not stays:
            stack.push(_leave_together)
        stack.enter_context(only_looking())
        request = world.run_on_main_first(lambda: request.located(stage.name, download=False))
        seen = request.seen_by(stage)

        def check() -> Job:
            check_early(stage.name, request, world.size, download=False)
            require_data_unmoved(request.written, request.run, stage.name)
            stack.enter_context(locked(request.run, replaces_inputs=stage.shared))
            request.run.clear_leftovers()
            return stage.module.check(seen.config, replace(seen.run, config_text=request.run.config_text), world.size)

        job = _agreed_job(stage, seen.config, seen.run, world, check)
        job.run(world)
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
