"""What a stage is to the pipeline: one module that checks a job, and the job, which knows how to do its work.

    stages/NAME.py
        preflight(config, run, processes, download)   what can be wrong before the stages in front of this one have run
        check(config, run, processes) -> Job          everything else that can be wrong, before a weight is loaded
        look(config, run)                             of a stage with ranks: whether what it reads can be seen here
    Job.done()                                        whether the same work on the same inputs is there, whole
    Job.run(world)                                    the work that is not done yet, on one process or on every rank

To add a stage, write its module and give it a line in :data:`STAGES`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from trace_ds.parallel.environment import accelerator_count

if TYPE_CHECKING:
    from trace_ds.config.schema import Config
    from trace_ds.parallel.world import World
    from trace_ds.run.directory import RunDirectory


class Job(Protocol):
    """A checked job: it holds its configuration, run directory and inputs, and can be sent to the ranks that do it."""

    def done(self) -> bool:
        """Whether there is nothing to do. Artefacts are compared by their hashes."""
        ...

    def run(self, world: World | None) -> None:
        """Do it; ``world`` is None for a stage of one process."""
        ...


class StageModule(Protocol):
    """The functions of ``stages/NAME.py``; they raise :class:`trace_ds.errors.UserError`."""

    def preflight(self, config: Config, run: RunDirectory, processes: int, *, download: bool) -> None: ...

    def check(self, config: Config, run: RunDirectory, processes: int) -> Job: ...

    def look(self, config: Config, run: RunDirectory) -> None: ...


@dataclass(frozen=True)
class Stage:
    """How a stage is run.

    Attributes:
        shared: what it makes belongs to a run and its variants; the run alone makes it.
        section: the section of the configuration whose ``nproc`` says how many processes it has; "": one.
        of_finetuned: it works on the model that ``finetune`` makes, where the configuration asks for that.
        optional: `run` has it where the configuration has a section of its name.
        of_all: it works on a run and its variants together.
    """

    name: str
    shared: bool = False
    section: str = ""
    of_finetuned: bool = True
    optional: bool = False
    of_all: bool = False

    @property
    def needs_world(self) -> bool:
        """Whether it is written for ranks also where there is one process."""
        return self.section == "distributed"

    @property
    def module(self) -> StageModule:
        return cast(StageModule, importlib.import_module(f"trace_ds.stages.{self.name}"))

    def processes(self, config: Config) -> int:
        """Local processes of a job started bare: as configured; in training, else one per accelerator, else one."""
        if not self.section:
            return 1
        return getattr(config, self.section).nproc or accelerator_count() or 1


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", shared=True, of_finetuned=False),
        Stage("finetune", shared=True, section="distributed", of_finetuned=False, optional=True),
        Stage("collect", shared=True, section="distributed"),
        Stage("calibrate"),
        Stage("unlearn", section="distributed"),
        Stage("convert"),
        Stage("evaluate", section="evaluation"),
        Stage("report", of_all=True),
    )
}
