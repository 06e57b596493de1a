"""One unlearning run of a study, scored while it runs, in this process.

The mathematics is the job's own: the engine, the objective, the rows of a step and the optimizer step are those of
``trace-ds unlearn``, the scores those of ``trace-ds evaluate``. Left out is what only a long job needs: checkpoints,
their conversion, and a process group of its own for every run; the model in the engine is scored as it stands.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import BenchConfig, Config
from trace_ds.evaluation.items import Task

if TYPE_CHECKING:
    from trace_ds.evaluation.language_model import LanguageModel
    from trace_ds.parallel.world import World
    from trace_ds.stages.unlearn import UnlearnJob


def score(config: Config, tasks: list[Task], model: LanguageModel) -> dict[str, Any]:
    """``{"scores": {"TASK METRIC": value}, "by_source": {task: {source: {metric: value}}}}`` of a loaded model."""
    from trace_ds.evaluation.tasks import run_task

    scores: dict[str, float | None] = {}
    by_source: dict[str, Any] = {}
    for task in tasks:
        outcome = run_task(
            model,
            task,
            max_new_tokens=config.evaluation.max_new_tokens,
            context_length=config.data.context_length,
        )
        scores |= {f"{record['task']} {record['metric']}": record["value"] for record in outcome.scores}
        by_source[task.config.name] = outcome.by_source
    return {"scores": scores, "by_source": by_source}


def score_directory(config: Config, tasks: list[Task], path: Path) -> dict[str, Any]:
    """Scores of a model directory, with its own tokenizer: the original may still be in the making beside it."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.language_model import loaded

    with loaded(str(path), load_tokenizer(config.model.tokenizer or str(path)), _settings(config)) as model:
        return score(config, tasks, model)


def run(config: Config, job: UnlearnJob, world: World, tasks: list[Task], bench: BenchConfig) -> dict[str, Any]:
    """Unlearn and score every ``score_every`` steps and at the end.

    Returns:
        ``curve``: one entry of :func:`score` with its ``step`` per scored step; ``diverged``: the step in which a
        loss or a log-probability was not finite (the curve ends before it), else None.
    """
    from trace_ds.evaluation.language_model import Diverged
    from trace_ds.unlearning.job import NumericalFailure, run_step, seed_step

    curve: list[dict[str, Any]] = []
    settings = config.unlearning
    with _engine(config, job, world) as (engine, batches, goal, model):
        for step in range(settings.steps):
            done = step + 1
            try:
                data = batches.at(step, world.rank, world.size)
                seed_step(config.seed, step, world.rank)
                run_step(engine, world, data, goal, settings, step)
                if done == settings.steps:
                    goal.finish(engine)
                if done % bench.score_every == 0 or done == settings.steps:
                    due = [t for t in tasks if done == settings.steps or t.config.name not in bench.score_at_end]
                    engine.module.eval()
                    curve.append({"step": done, **score(config, due, model)})
                    engine.module.train()
            except (NumericalFailure, Diverged):
                return {"curve": curve, "diverged": done}
    return {"curve": curve, "diverged": None}


@contextmanager
def _engine(config: Config, job: UnlearnJob, world: World) -> Iterator[Any]:
    """Engine, batches and goal of a job, and its model as evaluation sees it; freed at the end."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.language_model import LanguageModel, Sharding
    from trace_ds.stages.unlearn import make_batches, make_engine, make_goal

    job = replace(job, layers=None)  # the scores need the whole model
    batches = make_batches(config, job)
    engine, realignment = make_engine(config, job, world, batches)
    start = {"step": 0, "seed": config.seed}
    goal, _ = make_goal(config, job, world, engine, batches, start, realignment)
    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    try:
        model = LanguageModel.of_engine(engine, tokenizer, _settings(config), world, Sharding())
        yield engine, batches, goal, model
    finally:
        engine.destroy()
        del engine, goal, realignment, model
        gc.collect()


def _settings(config: Config) -> Any:
    from trace_ds.evaluation.language_model import ModelSettings

    return ModelSettings(config.model.dtype, config.data.add_bos, config.data.add_eos, config.evaluation.batch_rows)
