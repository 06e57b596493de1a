"""Stages as functions of a configuration and a run directory, in the process of a test or of its ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from trace_ds.config.schema import Config
from trace_ds.run import artefact
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.pipeline import STAGES, world_of_one


def call(name: str, config: Config, run: RunDirectory, world: Any = None) -> None:
    """Check a stage and do what is not done of it (with a ``world``: collectively, on each of its ranks)."""
    stage = STAGES[name]
    if world is not None:
        world.run_on_main_and_broadcast(lambda: stage.module.check(config, run, world.size)).run(world)
        return
    job = stage.module.check(config, run, 1)
    if job.done():
        return
    if stage.section:
        with world_of_one(stage, config) as alone:
            job.run(alone)
    else:
        job.run(None)


finetune, collect, unlearn, convert, evaluate = (
    partial(call, name) for name in ("finetune", "collect", "unlearn", "convert", "evaluate")
)


def prepare(config: Any, run: RunDirectory) -> Artefact:
    call("prepare", config, run)
    return artefact.load_artefact(run.data, "data", verify=False)


def calibrate(config: Any, run: RunDirectory) -> Artefact:
    call("calibrate", config, run)
    return artefact.load_artefact(run.calibration, "calibration", verify=False)
