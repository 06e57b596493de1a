"""Runs that differ in their seed only are one: the mean of their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.reporting.gather import Evaluation, RunData, gather


def gather_repeats(run: RunData, paths: Sequence[Path]) -> list[RunData]:
    """The runs at ``paths``; :class:`UserError` where one differs from ``run``, or another, in more than its seed."""
    runs = [run]
    for path in paths:
        runs.append(gather(path))
        if not all(repeats(runs[-1], each) for each in runs[:-1]):
            fix = "report it alone; methods are compared as `variants` of one configuration, or in a study"
            raise UserError(f"this run is no repetition of {run.path} with another seed", str(path), fix)
    return runs[1:]


def repeats(run: RunData, other: RunData) -> bool:
    """Whether two runs differ only in their seed, and in files of their own that were made with it."""

    def settings(value: Any, own: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: settings(each, own) for key, each in value.items()}
        if isinstance(value, list):
            return [settings(each, own) for each in value]
        if not isinstance(value, str):
            return value
        parts = value.split("/")  # a path: from the run's folder (or the one that it lies in) on
        return parts[max((place + 1 for place, part in enumerate(parts[:-1]) if part in own), default=0) :]

    mine, theirs = (
        settings({**each.config, "seed": 0, "name": "", "report": None}, each.path.resolve().parts[-2:])
        for each in (run, other)
    )
    return bool(run.config) and mine == theirs and run.config.get("seed") != other.config.get("seed")


def averaged(runs: Sequence[RunData]) -> RunData:
    """The first of several runs with the scores that all have as means over them; what else it holds is its own."""
    if len(runs) == 1:
        return runs[0]

    def mean(found: Sequence[Evaluation | None]) -> Evaluation | None:
        known = [evaluation for evaluation in found if evaluation is not None]
        if len(known) < len(runs):
            return None
        scores = []
        for score in known[0].scores:
            values = [value for each in known if (value := each.value(score.task, score.metric)) is not None]
            if len(values) == len(runs):
                scores.append(replace(score, value=math.fsum(values) / len(values), by_seed=tuple(values)))
        return replace(known[0], scores=scores)

    def over(found: Sequence[dict[Any, Evaluation]]) -> dict[Any, Evaluation]:
        means = {key: mean([each.get(key) for each in found]) for key in found[0]}
        return {key: evaluation for key, evaluation in means.items() if evaluation is not None}

    arms = []
    for arm in runs[0].arms:
        same = [other for run in runs for other in run.arms if other.label == arm.label]
        final = mean([other.final for other in same])
        arms.append(replace(arm, final=final, checkpoints=over([other.checkpoints for other in same])))
    return replace(runs[0], references=over([run.references for run in runs]), arms=arms)
