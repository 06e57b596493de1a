"""Stages as functions of a configuration and a run directory, in the process of a test or of its ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

from trace_ds.run import artefact
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.pipeline import run_stage

finetune, collect, unlearn, convert, evaluate = (
    partial(run_stage, name) for name in ("finetune", "collect", "unlearn", "convert", "evaluate")
)


def prepare(config: Any, run: RunDirectory) -> Artefact:
    run_stage("prepare", config, run)
    return artefact.load_artefact(run.data, "data", verify=False)


def calibrate(config: Any, run: RunDirectory) -> Artefact:
    run_stage("calibrate", config, run)
    return artefact.load_artefact(run.calibration, "calibration", verify=False)
