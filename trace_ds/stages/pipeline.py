"""Running the stages: one alone, or all of them (``trace-ds run``), also of variants that are chosen.

    prepare → (finetune) → collect → calibrate → unlearn → convert → evaluate → report

A stage is a module ``stages/NAME.py`` with two functions, which raise :class:`trace_ds.errors.UserError`:

    preflight(config, run, processes, *, download)   what can be wrong before earlier stages have run
    check(config, run, processes) -> Job             everything else that can be wrong before a weight is loaded

The job is checked once, in the process that was started: it then runs there or is handed to local ranks. Under a
launcher every process is a rank already: the main one checks, and all get the job from it.

To add a stage, write its module and give it a line in :data:`STAGES`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import signal
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trace_ds.config.load import dump_yaml, load_config, variants_of, with_changes
from trace_ds.config.schema import Config
from trace_ds.errors import AgreedError, StopRequested, UserError
from trace_ds.parallel.environment import accelerator_count, launched
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import require_apart
from trace_ds.run.log import already_done
from trace_ds.stages.fetch import find_models, with_model_paths
from trace_ds.stages.inputs import with_sizes_here

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

RUN = "run"  # the verb for all stages
JOB_VARIABLE = "TRACE_DS_JOB_FD"  # descriptor of the memory file with the job of a local rank


class Job(Protocol):
    """A checked job: it holds its configuration, run directory and inputs, and can be sent to the ranks that do it."""

    def done(self) -> bool:
        """Whether there is nothing to do. Artefacts are compared by their hashes."""
        ...

    def run(self, world: World | None) -> None:
        """Do what is not done yet; ``world`` is None for a stage of one process."""
        ...


@dataclass(frozen=True)
class Stage:
    """How a stage is run.

    Attributes:
        shared: its result belongs to a run and its variants; the run alone makes it.
        section: the section of the configuration whose ``nproc`` is its number of processes; "": one.
        after_finetune: it works on the model that ``finetune`` makes, where the configuration asks for that.
    """

    name: str
    shared: bool = False
    section: str = ""
    after_finetune: bool = True

    @property
    def module(self) -> Any:
        return importlib.import_module(f"trace_ds.stages.{self.name}")

    def processes(self, config: Config) -> int:
        """Local processes without a launcher: as configured, else one per accelerator, else one."""
        if not self.section:
            return 1
        return getattr(config, self.section).nproc or accelerator_count() or 1


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", shared=True, after_finetune=False),
        Stage("finetune", shared=True, section="distributed", after_finetune=False),
        Stage("collect", shared=True, section="distributed"),
        Stage("calibrate"),
        Stage("unlearn", section="distributed"),
        Stage("convert"),
        Stage("evaluate", section="evaluation"),
        Stage("report"),
    )
}


@dataclass(frozen=True)
class Request:
    """A configuration and the run directory it works in.

    Attributes:
        written: the merged and validated configuration, which is stored in config.yaml; models may be named by the hub.
        model_paths: directories of the models that it names on the hub (:meth:`located`), by their names.
        chosen: names of the variants that `run` does too (:meth:`with_variants`); none by default.
    """

    written: Config
    run: RunDirectory
    model_paths: Mapping[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] = ()

    @classmethod
    def load(cls, config: str | Sequence[str], overrides: Sequence[str], run_dir: Path | None) -> Request:
        loaded, directory = load_config(config, overrides, run_dir)
        variants_of(loaded)  # refuses changes that make no configuration, whether they are chosen or not
        return cls(loaded, RunDirectory.at(directory, dump_yaml(loaded)))

    @property
    def config(self) -> Config:
        """The configuration for stages: models are directories, expert-parallel sizes numbers."""
        return with_sizes_here(with_model_paths(self.written, self.model_paths))

    def located(self, verb: str, *, download: bool) -> Request:
        """The request with directories for the models that ``verb`` needs; without ``download``, a model that is not in
        the hub's cache stays a name.

        A job under a launcher, a dry run and a look at a run (doctor, plan, submit) never download.
        """
        return replace(self, model_paths=find_models(self.written, verb, download=download))

    def with_variants(self, names: str) -> Request:
        """The request with these variants chosen: ``all``, or names with commas between them; "" chooses none."""
        chosen = tuple(self.written.variants) if names == "all" else tuple(filter(None, names.split(",")))
        for name in chosen:
            self.variant(name)  # refuses a name that the configuration does not have
        return replace(self, chosen=chosen)

    @property
    def chosen_config(self) -> Config:
        """:attr:`config` with the chosen variants only: what the cost model counts."""
        variants = {name: self.written.variants[name] for name in self.chosen}
        return self.config.model_copy(update={"variants": variants})

    def variant(self, name: str) -> Request:
        """The same run with the keys of ``variants.NAME`` changed, in ``RUN/variants/NAME``."""
        if name not in self.written.variants:
            names = ", ".join(self.written.variants) or "none"
            raise UserError(f"the configuration has no variant {name!r}", "--variant", f"use one of its own: {names}")
        changed = with_changes(self.written, self.written.variants[name], f"variants.{name}")
        changed = changed.model_copy(update={"variants": {}, "name": name})
        return Request(changed, self.run.variant(name, dump_yaml(changed)), self.model_paths)

    def run_and_variants(self) -> list[Request]:
        """The run and its chosen variants."""
        return [self, *(self.variant(name) for name in self.chosen)]

    def work(self, verb: str) -> list[tuple[Stage, Request]]:
        """The stages that a verb runs, in order, each with the run or variant that it works on."""
        if verb != RUN:
            return [(STAGES[verb], self)]
        stages = [stage for name, stage in STAGES.items() if name != "finetune" or self.written.finetune is not None]
        return [
            (stage, request)
            for stage in stages
            for request in ([self] if stage.shared or stage.name == "report" else self.run_and_variants())
        ]

    def stage_names(self, verb: str) -> list[str]:
        return list(dict.fromkeys(stage.name for stage, _ in self.work(verb)))

    def seen_by(self, stage: Stage) -> Request:
        """The same run as a stage sees it: the model of the stages after `finetune` is the one that was made."""
        from trace_ds.stages.finetune import after_finetune

        return Request(after_finetune(self.config, self.run), self.run) if stage.after_finetune else self

    def check_run_directory(self) -> None:
        """Refuse a run directory that is not ours, or that lies in, on or around what the configuration reads."""
        for item in self.run_and_variants():
            require_apart(self.run.outputs, _inputs_of(item.config))
        self.run.require_ours()


def _inputs_of(config: Config) -> dict[str, Path]:
    """Every file and directory that a configuration names, by its key."""
    paths: dict[str, str | None] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    for side in config.data.sides:
        for i, entry in enumerate(config.data.corpus(side)):
            paths[f"data.{side}[{i}].path"] = entry.path
    for task in config.evaluation.tasks:
        keys = () if task.dataset else ("path", "examples", "holdout", "include_path")
        paths |= {f"evaluation.tasks {task.name} {key}": getattr(task, key) for key in keys}
    paths |= {f"evaluation.models.{name}": path for name, path in config.evaluation.models.items()}
    paths["unlearning.ds_config"] = config.unlearning.ds_config
    return {key: Path(path) for key, path in paths.items() if path}


def run_verb(verb: str, request: Request, *, dry_run: bool = False) -> int:
    """Run one stage, or all (``run``) with those of the chosen variants; returns the exit status."""
    work = request.work(verb)
    if dry_run:
        return _show_plan(verb, request)
    if launched() and verb != RUN and STAGES[verb].section:
        return _run_as_rank(STAGES[verb], request)
    if verb != "report":
        request = request.located(verb, download=True)
    check_early(verb, request)
    with locked(request.run, replaces_inputs=any(stage.shared for stage, _ in work)) as lock:
        for stage, item in request.work(verb):
            if status := run_stage(stage, item, lock):
                return status
    return 0


def _show_plan(verb: str, request: Request) -> int:
    """``--dry-run``: print the stages, what is in their way, and the resolved configuration."""
    print(f"# run directory: {request.run.path}; would run: {', '.join(request.stage_names(verb))}")
    for name in request.chosen if verb == RUN else ():
        print(f"# variant {name}: {request.written.variants[name]}")
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
    from trace_ds.corpora.sources import cache_only
    from trace_ds.parallel.launch import check_process_count
    from trace_ds.stages.finetune import require_models

    with contextlib.nullcontext() if download else cache_only():
        for item in request.run_and_variants() if verb == RUN else [request]:
            item.check_run_directory()
        for stage, item in request.work(verb):
            if stage.shared and item.run.parent is not None:
                raise UserError(
                    "this is the directory of a variant, which takes data, models and statistics from its run",
                    str(item.run.path),
                    f"use --run-dir {item.run.parent}, or another directory",
                )
            seen = item
            if verb != RUN:  # in a whole run the model of `finetune` is not there yet, and the base has its shape
                if stage.after_finetune:
                    require_models(item.config, item.run)
                seen = item.seen_by(stage)
            processes = stage.processes(seen.config)
            if stage.section and world_size is None:
                check_process_count(processes, accelerator_count(), os.cpu_count() or 1, f"{stage.section}.nproc")
            elif stage.section and world_size is not None:
                processes = world_size
            stage.module.preflight(seen.config, seen.run, processes, download=download)


def run_stage(stage: Stage, request: Request, lock: Sequence[int]) -> int:
    """Check a stage and do its work, here or in local ranks. Once its input is known to be right, config.yaml becomes
    that of this request."""
    request.run.clear_leftovers()
    seen = request.seen_by(stage)
    config, run = seen.config, seen.run
    processes = stage.processes(config)
    job = stage.module.check(config, run, processes)
    if job.done():
        run.store_config()
        already_done(stage.name, run)
        return 0
    if not stage.section or (processes == 1 and not accelerator_count()):
        with world_of_one(stage, config) if stage.section else contextlib.nullcontext() as world:
            job.run(world)
        run.store_config()
        return 0
    run.store_config()
    return _launch(job, processes, config, lock)


@contextlib.contextmanager
def world_of_one(stage: Stage, config: Config) -> Iterator[World]:
    """A world of this process alone, for a stage that is written for many ranks.

    Starting Python, torch and DeepSpeed anew would take longer than small jobs do. With an accelerator a job has a
    process of its own all the same, which frees the device's memory when it ends.
    """
    import torch

    from trace_ds.parallel.world import World, join

    def stop(number: int, frame: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise StopRequested("stopped on request; run again to go on")

    variables, threads = dict(os.environ), torch.get_num_threads()
    previous = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        if stage.section == "evaluation":  # a whole model needs no DeepSpeed, and no group
            torch.set_num_threads(config.distributed.threads)
            yield World(0, 1, torch.device("cpu"))
            return
        # the group stays: DeepSpeed keeps groups of experts that it made, and takes them again in the next stage
        yield join(config.distributed.threads, config.distributed.timeout_minutes)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        torch.set_num_threads(threads)
        os.environ.clear()
        os.environ.update(variables)  # without those of a rank
        gc.collect()


def _launch(job: Job, processes: int, config: Config, lock: Sequence[int]) -> int:
    """Do a checked job in local ranks. Each reads it from a file in memory that only they inherit."""
    from trace_ds.parallel.launch import run_processes

    content = pickle.dumps((job, config.distributed.threads, config.distributed.timeout_minutes))
    file = os.memfd_create("trace_ds-job")
    try:
        os.pwrite(file, content, 0)
        os.set_inheritable(file, True)
        variables = {JOB_VARIABLE: str(file)}
        return run_processes(["rank"], processes, variables, [*lock, file], config.distributed.threads)
    finally:
        os.close(file)


def run_rank() -> int:
    """Be a local rank: do the job that the parent process has checked."""
    from trace_ds.parallel.world import join

    file = int(os.environ.pop(JOB_VARIABLE))
    # written by the parent process a moment ago, in memory that nobody else can reach: nothing from outside
    job, threads, timeout_minutes = pickle.loads(os.pread(file, os.fstat(file).st_size, 0))
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
    from trace_ds.parallel.world import leave

    if kind is None or issubclass(kind, UserError | AgreedError | StopRequested):
        leave()


def _run_as_rank(stage: Stage, request: Request) -> int:
    """Be one rank of a launched job: join it; the main process locks the run directory and checks the job."""
    from trace_ds.corpora.sources import cache_only
    from trace_ds.parallel.world import is_joined, join

    distributed, stays = request.config.distributed, is_joined()
    world = join(distributed.threads, distributed.timeout_minutes)
    with contextlib.ExitStack() as stack:
        if not stays:
            stack.push(_leave_together)
        stack.enter_context(cache_only())
        request = world.run_on_main_first(lambda: request.located(stage.name, download=False))

        def check() -> Job:
            check_early(stage.name, request, world.size, download=False)
            stack.enter_context(locked(request.run, replaces_inputs=stage.shared))
            request.run.clear_leftovers()
            seen = request.seen_by(stage)
            job: Job = stage.module.check(seen.config, seen.run, world.size)
            return job

        world.run_on_main_and_broadcast(check).run(world)
        if world.is_main:
            request.run.store_config()
        world.barrier()
    return 0


def report_command(path: Path) -> int:
    """``trace-ds report RUN``."""
    from trace_ds.stages.report import report

    if not (path / "config.yaml").is_file():
        raise UserError("this is not a run directory (no config.yaml)", str(path), "give a run directory")
    with locked(run := RunDirectory.at(path)):
        report(run)
    return 0
