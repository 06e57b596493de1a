"""Which runs a study consists of: pure functions of the recipe.

A *method* is what is compared (a weight rule, a control, a baseline), a *point* one choice of the grid's strengths
(alpha, learning rate), a *trial* one unlearning run of a method at a point on the base model of a seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from typing import Any

from trace_ds.config.load import with_changes
from trace_ds.config.schema import BenchConfig, Config
from trace_ds.errors import UserError

FILE_NAME = re.compile(r"[^/\0]{1,200}", re.ASCII)
Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Trial:
    """One unlearning run; ``point`` holds (dotted key, value) in the order of the grid."""

    loss: str
    method: str
    point: Point
    seed: int

    @property
    def name(self) -> str:
        """Of its result below ``seed_N/trials/``: ``rmu/uniform/alpha=16,lr=0.0005.json``."""
        point = label(self.point) or "recipe"
        if not FILE_NAME.fullmatch(point):  # a value with a slash in it, or a point of many keys
            point = hashlib.sha256(point.encode()).hexdigest()[:16]
        return f"{self.loss}/{self.method}/{point}.json"


def label(point: Point) -> str:
    """A point in words: the last part of each key and its value."""
    return ",".join(f"{key.rsplit('.', 1)[-1]}={json.dumps(value)}" for key, value in point)


def grid_of(bench: BenchConfig, loss: str, method: str) -> dict[str, list[Any]]:
    """The values to try for one method under one loss, by key in the order of tuning."""
    grid = dict(bench.grid)
    for name in (loss, method, f"{loss} {method}"):
        grid |= bench.grids.get(name, {})
    return grid


def points_of(bench: BenchConfig, loss: str, method: str) -> list[Point]:
    """All points of a method under a loss."""
    grid = grid_of(bench, loss, method)
    return [tuple(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def trials_of(bench: BenchConfig) -> list[Trial]:
    """All trials, seed by seed."""
    return [
        Trial(loss, method, point, seed)
        for seed in bench.seeds
        for loss in bench.losses
        for method in bench.methods
        for point in points_of(bench, loss, method)
    ]


def trial_config(config: Config, trial: Trial) -> Config:
    """The configuration of one trial, from that of its seed: changes of the loss, the method, then the point."""
    bench = require_bench(config, "bench")
    changes = {**bench.losses[trial.loss], **bench.methods[trial.method], **dict(trial.point)}
    changed = with_changes(config, changes, f"bench: {trial.name}")
    return changed.model_copy(update={"bench": None, "variants": {}})


def recipe_point(config: Config, loss: str, method: str) -> Point:
    """The point that the recipe itself names (with the changes of the loss and the method).

    Raises:
        UserError: the grid lacks it, so there would be no comparison at the same strength.
    """
    bench = require_bench(config, "bench")
    grid = grid_of(bench, loss, method)
    raw = trial_config(config, Trial(loss, method, (), config.seed)).model_dump(mode="json")
    point = tuple((key, reduce(getitem, key.split("."), raw)) for key in grid)
    for key, value in point:
        if value not in grid[key]:
            raise UserError(
                f"the grid of {key} for {loss} {method} lacks the recipe's own value {value}",
                "bench.grid",
                "add it: it is the point at which methods are compared at the same strength",
            )
    return point


def edges(bench: BenchConfig, loss: str, method: str, point: Point | None, free: Sequence[str]) -> list[str]:
    """The tuned keys whose value in ``point`` is the first or last of several tried, as ``alpha=4096``.

    A better value may lie beyond: widen the grid there.
    """
    grid = grid_of(bench, loss, method)
    tried = {key: values for key, values in grid.items() if key in free and len(values) > 1}
    return [
        label(((key, value),))
        for key, value in point or ()
        if value in tried.get(key, [])[:1] + tried.get(key, [])[-1:]
    ]


def untried(bench: BenchConfig, loss: str, method: str, free: Sequence[str]) -> list[str]:
    """The keys among ``free`` of which the method has one value only: there was nothing to choose from."""
    grid = grid_of(bench, loss, method)
    return [key.rsplit(".", 1)[-1] for key in free if len(grid[key]) < 2]


def require_bench(config: Config, where: str) -> BenchConfig:
    if config.bench is None:
        raise UserError(
            "the recipe has no bench section", where, "start from `trace-ds recipes --show bench_entangled`"
        )
    return config.bench


def _check_forget(config: Config, metric: str) -> None:
    """What is forgotten must fall as it is forgotten, and have a target: the gold model's score, or chance."""
    from trace_ds.evaluation.metrics import METRICS, direction

    if direction(metric, "forget") != "lower":
        raise UserError(f"{metric} does not fall as more is forgotten", "bench.forget", "choose another metric")
    if "gold" not in config.evaluation.models and METRICS[metric].chance is None:
        raise UserError(
            f"there is no gold model, and {metric} has no chance level, so there is no forgetting target",
            "bench.forget",
            "name a model trained without the forget set as evaluation.models.gold",
        )


def check(config: Config) -> None:
    """Find what is wrong with a study before its first run; raises :class:`UserError`."""
    from trace_ds.evaluation.metrics import TASK_METRICS, direction

    bench = require_bench(config, "bench")
    if config.distributed.ep != 1 or (config.distributed.nproc or 1) != 1 or config.unlearning.zero_stage == 3:
        raise UserError(
            "the runs of a study are one process each",
            "distributed",
            "set distributed.nproc and ep to 1 and unlearning.zero_stage to 1",
        )
    tasks = {task.name: TASK_METRICS[task.type] for task in config.evaluation.tasks}
    for metric in (bench.forget, *bench.utility):
        words = metric.split()
        if len(words) not in (2, 3) or words[1] not in tasks.get(words[0], ()):
            known = "; ".join(f"{name} {', '.join(metrics)}" for name, metrics in sorted(tasks.items()))
            raise UserError(f"{metric!r} is not 'TASK METRIC' of a task of the recipe", "bench", f"use one of: {known}")
    needed = {bench.forget.split()[0], bench.utility[0].split()[0]}
    for name in bench.score_at_end:
        if name not in tasks or name in needed:
            what = "is scored at every look: it decides" if name in needed else "is no task of the recipe"
            raise UserError(
                f"{name!r} {what}", "bench.score_at_end", f"tasks: {', '.join(sorted(set(tasks) - needed))}"
            )
    _check_forget(config, bench.forget.split()[1])
    if direction(bench.utility[0].split()[1], "utility") != "higher":
        raise UserError(
            f"{bench.utility[0]} does not grow with what is kept, and strengths are tuned by the first metric",
            "bench.utility",
            "put another one first",
        )
    for loss in bench.losses:
        for method in bench.methods:
            recipe_point(config, loss, method)
            for point in points_of(bench, loss, method):
                trial_config(config, Trial(loss, method, point, config.seed))
