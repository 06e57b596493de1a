"""Which runs a study consists of: pure functions of the recipe.

A *method* is what is compared (a weight rule, a control, a baseline), a *point* one choice of the grid's strengths
(alpha, learning rate), a *trial* one unlearning run of a method at a point on the base model of a seed.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from trace_ds.config.load import with_changes
from trace_ds.config.schema import Config
from trace_ds.config.sections.bench import BenchConfig
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError

FILE_NAME = re.compile(r"[^/\0]{1,200}", re.ASCII)
SAME = "same strength"
DEAR = 10  # times the training between two looks, in tokens
BACKWARD = 3  # forward passes that a training step of a token costs
BYTES_PER_TOKEN = 4
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
        """Of its run directory below ``seed_N/trials/``: ``rmu/uniform/alpha=16,lr=0.0005``."""
        point = label(self.point) or "recipe"
        if not FILE_NAME.fullmatch(point):  # a value with a slash in it, or a point of many keys
            point = hashlib.sha256(point.encode()).hexdigest()[:16]
        return f"{self.loss}/{self.method}/{point}"


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


def grid_trials(bench: BenchConfig, seeds: Sequence[int]) -> list[Trial]:
    """Every point of the grid on each seed, seed by seed."""
    pairs = itertools.product(bench.losses, bench.methods)
    return trials_at(bench, {pair: points_of(bench, *pair) for pair in pairs}, seeds)


def trials_at(
    bench: BenchConfig, points: Mapping[tuple[str, str], Sequence[Point]], seeds: Sequence[int] | None = None
) -> list[Trial]:
    """The points of each loss and method on each seed (default: those that are told), seed by seed."""
    return [
        Trial(*pair, point, seed)
        for seed in (bench.seeds if seeds is None else seeds)
        for pair, chosen in points.items()
        for point in chosen
    ]


def trial_config(config: Config, trial: Trial) -> Config:
    """The configuration of one trial, from that of its seed: changes of the loss, the method, then the point."""
    bench = require_bench(config, "bench")
    looks = {
        "every": bench.score_every,
        "tasks": [task.name for task in config.evaluation.tasks],
        "until": [] if bench.until is None else [f"{bench.forget} <= {bench.until}"],
    }
    changes = {**bench.losses[trial.loss], **bench.methods[trial.method], **dict(trial.point)}
    changes |= {"unlearning.resume": "replace", "unlearning.keep": 0, "bench": None, "variants": {}}
    changes |= {f"unlearning.evaluate.{key}": value for key, value in looks.items()}
    return with_changes(config, changes, f"bench: {trial.name}")


def kinds(keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What is tuned: nothing, then the first key of the grid, then the first two, …"""
    found: list[tuple[str, list[str]]] = [(SAME, [])]
    for count in range(1, len(keys) + 1):
        free = list(keys[:count])
        found.append(("own " + ", ".join(key.rsplit(".", 1)[-1] for key in free), free))
    return found


def told_kinds(bench: BenchConfig, loss: str) -> list[tuple[str, list[str]]]:
    """:func:`kinds`, but for one where no method has a second value of the key that it frees: it would repeat the one
    before."""
    return [
        (kind, free)
        for kind, free in kinds(list(bench.grid))
        if not free or not all(untried(bench, loss, method, free[-1:]) for method in bench.methods)
    ]


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
    bench, chance = require_bench(config, "bench"), METRICS[metric].chance
    if bench.until is not None and len(bench.forget.split()) > 2:
        raise UserError(
            f"a run cannot end by {bench.forget!r}, which is of some sources only", "bench.until", "leave it out"
        )
    has_gold = "gold" in config.evaluation.models
    if not has_gold and bench.until is not None and chance is not None and bench.until > chance + bench.margin:
        raise UserError(
            f"runs end at {bench.until:g}, and have forgotten at {chance + bench.margin:g} (chance plus bench.margin)",
            "bench.until",
            "lower it, or raise bench.margin",
        )
    if not has_gold and chance is None:
        raise UserError(
            f"there is no gold model, and {metric} has no chance level, so there is no forgetting target",
            "bench.forget",
            "name a model trained without the forget set as evaluation.models.gold",
        )


def _check_looks(config: Config) -> None:
    """Refuse a task that would cost much more at every look than the training in between."""
    bench, settings = require_bench(config, "bench"), config.unlearning
    rows = (settings.forget_rows + settings.retain_rows) * bench.score_every
    trained_tokens = BACKWARD * rows * config.data.context_length
    for task in config.evaluation.tasks:
        if task.name in bench.score_at_end:
            continue
        read = _read_tokens(task)
        if read > DEAR * trained_tokens:
            raise UserError(
                f"the task {task.name} is too dear to be scored every {bench.score_every} steps: about {read:,.0f} "
                f"tokens, {read / trained_tokens:,.0f} times the training between two looks",
                "bench.score_at_end",
                "name it there, raise bench.score_every, or give the task a file with fewer items",
            )


def _read_tokens(task: TaskConfig) -> float:
    """Roughly what scoring a task reads: a question once with each choice. 0: it is no file, or not there yet."""
    from trace_ds.evaluation.items import CHOICES

    path = Path(task.path) if task.path else None
    times = CHOICES if task.type in ("choice", "lm_eval") else 1
    return path.stat().st_size * times / BYTES_PER_TOKEN if path is not None and path.is_file() else 0


def check(config: Config) -> None:
    """Find what is wrong with a study before its first run; raises :class:`UserError`."""
    from trace_ds.evaluation.metrics import TASK_METRICS, direction

    bench = require_bench(config, "bench")
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
    _check_looks(config)
    for loss in bench.losses:
        for method in bench.methods:
            recipe_point(config, loss, method)
            for point in points_of(bench, loss, method):
                trial_config(config, Trial(loss, method, point, config.seed))
