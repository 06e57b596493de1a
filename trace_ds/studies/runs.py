"""The runs of a study: methods × strengths × seeds.

    STUDY/seed_N/                  an ordinary run of `trace-ds run`: the baseline at the recipe's own strength
    STUDY/seed_N/variants/NAME/    its variants: every other method and strength

Each run has its own config.yaml, scores itself while it trains and leaves ``curve.json`` (``unlearning.keep: 0``).
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

from trace_ds.config.load import dump_yaml, load_config, with_changes
from trace_ds.config.schema import Config
from trace_ds.config.sections.base import MAX_LENGTH
from trace_ds.config.sections.bench import BenchConfig
from trace_ds.errors import UserError
from trace_ds.evaluation.metrics import METRICS, TASK_METRICS, direction, require_level
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.pipeline import Request

GOLD = "gold"
# Of every run of a study: what has scores of its own is the original and the gold model.
CURVE_ONLY = {
    "bench": None,
    "unlearning.keep": 0,
    "unlearning.resume": "replace",
    "evaluation.drift": False,
    "evaluation.relearning": None,
}


@dataclass(frozen=True)
class Trial:
    """One run: a method at a strength (dotted key -> value, in the order of the grid)."""

    method: str
    strength: Mapping[str, Any]

    @property
    def label(self) -> str:
        """``alpha=16,lr=0.0005``: the last part of each key and its value."""
        return ",".join(f"{key.rsplit('.', 1)[-1]}={json.dumps(value)}" for key, value in self.strength.items())

    @property
    def name(self) -> str:
        """Name of its variant: ``uniform-alpha16-lr0.0005``."""
        words = (self.method, self.label.replace("=", "").replace(",", "-"))
        name = re.sub(r"[^A-Za-z0-9._-]", "_", "-".join(word for word in words if word))
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        return name if len(name) <= MAX_LENGTH else f"{name[: MAX_LENGTH - 9]}-{digest}"


def require_bench(config: Config, where: str) -> BenchConfig:
    """The section ``bench``; :class:`UserError` for a recipe without one."""
    if config.bench is None:
        fix = "start from `trace-ds recipes --show bench_entangled`"
        raise UserError("the recipe has no bench section", where, fix)
    return config.bench


def grid_of(bench: BenchConfig, method: str) -> dict[str, list[Any]]:
    """The values to try for one method, by key in the order of tuning."""
    return bench.grid | bench.grids.get(method, {})


def trials_of(bench: BenchConfig) -> list[Trial]:
    """All runs of one seed."""
    return [
        Trial(method, dict(zip(grid, values, strict=True)))
        for method in bench.methods
        for grid in [grid_of(bench, method)]
        for values in itertools.product(*grid.values())
    ]


def changes_of(bench: BenchConfig, trial: Trial) -> dict[str, Any]:
    """The changes a run makes to the recipe: those of its method, then its strength."""
    return {**bench.methods.get(trial.method, {}), **trial.strength}


def recipe_trial(config: Config, method: str) -> Trial:
    """The run of a method at the strength that the recipe itself names (with the changes of the method)."""
    bench = require_bench(config, config.name)
    changed = with_changes(config, changes_of(bench, Trial(method, {})) | {"bench": None}, "bench")
    raw = changed.model_dump(mode="json")
    own = Trial(method, {key: value_of(raw, key) for key in grid_of(bench, method)})
    return next((trial for trial in trials_of(bench) if trial == own), own)  # 16, where the grid says so, not 16.0


def value_of(raw: Mapping[str, Any], key: str) -> Any:
    return reduce(getitem, key.split("."), raw)


def seed_request(recipe: Sequence[str], overrides: Sequence[str], directory: Path, seed: int) -> Request:
    """The run of a seed with all its variants."""
    run_dir = directory / f"seed_{seed}"
    config, _ = load_config(recipe, [*overrides, f"seed={seed}"], run_dir)
    bench = require_bench(config, config.name)
    gold = {name: path for name, path in config.evaluation.models.items() if name == GOLD}
    shared = CURVE_ONLY | {"evaluation.models": gold, "variants": {}}
    shared |= {"distributed.nproc": config.distributed.nproc or 1}
    own = recipe_trial(config, bench.baseline)
    raw, own_changes = config.model_dump(mode="json"), changes_of(bench, own)
    variants = {}
    for trial in trials_of(bench):
        changes = changes_of(bench, trial)
        back = {key: value_of(raw, key) for key in own_changes if key not in changes}
        if trial != own:
            variants[trial.name] = back | changes
    written = with_changes(config, shared | own_changes | {"variants": variants}, "bench")
    return Request(written, RunDirectory.at(run_dir, dump_yaml(written)), chosen=tuple(variants))


def run_of(request: Request, trial: Trial) -> RunDirectory:
    """The run directory of a trial of a seed."""
    return request.run.variant(trial.name) if trial.name in request.written.variants else request.run


def forget_target(bench: BenchConfig, base: float) -> float:
    """The forget score that counts as forgotten, ``margin`` above ``base``; refused where no score could be above."""
    target = base + bench.margin
    require_level(bench.forget, target, f"bench.margin ({base:.3g} + {bench.margin:g})")
    return target


def check_study(config: Config) -> None:
    """Find what is wrong with a study before its first run; raises :class:`UserError`."""
    bench, evaluate = require_bench(config, config.name), config.unlearning.evaluate
    if evaluate.every is None:
        raise UserError("the runs are not scored", "unlearning.evaluate.every", "set it: steps between scores")
    tasks = {task.name: TASK_METRICS[task.type] for task in config.evaluation.tasks if task.name in evaluate.tasks}
    for metric in (bench.forget, *bench.utility):
        words = metric.split()
        if len(words) not in (2, 3) or words[1] not in tasks.get(words[0], ()):
            choices = "; ".join(f"{name} {', '.join(metrics)}" for name, metrics in sorted(tasks.items()))
            problem = f"{metric!r} is not 'TASK METRIC' of a task of unlearning.evaluate.tasks"
            raise UserError(problem, "bench", f"use one of: {choices}")
    forget, utility = (metric.split()[1] for metric in (bench.forget, bench.utility[0]))
    if direction(forget, "forget") != "lower":
        raise UserError(f"{forget} does not fall as more is forgotten", "bench.forget", "choose another metric")
    if GOLD not in config.evaluation.models and METRICS[forget].chance is None:
        problem = f"there is no gold model, and {forget} has no chance level, so there is no forgetting target"
        fix = "name a model trained without the forget set as evaluation.models.gold"
        raise UserError(problem, "bench.forget", fix)
    forget_target(bench, 0.0 if GOLD in config.evaluation.models else METRICS[forget].chance or 0.0)
    if direction(utility, "utility") != "higher":
        problem = f"{bench.utility[0]} does not grow with what is kept, and strengths are tuned by the first metric"
        raise UserError(problem, "bench.utility", "put another one first")
    trials = trials_of(bench)
    for method in bench.methods:
        if (own := recipe_trial(config, method)) not in trials:
            problem = f"the grid for {method} lacks the recipe's own strength {own.label}"
            raise UserError(problem, "bench.grid", "add it: it is the strength at which methods are compared alike")
    if len({trial.name for trial in trials}) < len(trials):
        raise UserError("two runs of the study have one name", "bench.grid", "let its values be numbers or words")
