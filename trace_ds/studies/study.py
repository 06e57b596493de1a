"""``trace-ds bench RECIPE``: run (or finish) a study on this machine and say what it shows.

    trace-ds bench bench_entangled --run-dir runs/entangled

Writes ``study.json`` (every comparison with its intervals) and ``frontier.csv`` (every scored step of every run).
Both are made from the results alone: running it again on a finished study rewrites the same bytes.
"""

from __future__ import annotations

import csv
import io
import json as json_module
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import JobFailed, StopRequested
from trace_ds.parallel.environment import accelerator_count
from trace_ds.run import ours
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, compare, curve_of, finite, metric_of, questions_of, tuned
from trace_ds.studies.worker import Study, StudyJob, begin, do

TELL_EVERY_S = 30.0
# For the estimate before anything ran: seconds of one CPU core of the machine this was developed on.
REFERENCE_S, STEP_S, SCORE_S = 110.0, 0.12, 0.9
SAME = "same strength"


def run_study(
    recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str], workers: int | None, json: bool
) -> int:
    """Run every job that is not done, then write and show the result; returns the exit status.

    Args:
        run_dir: default ``runs/bench/NAME``.
    """
    directory = run_dir or Path("runs/bench") / load_config(recipe, overrides)[0].name
    study = Study(recipe, directory, overrides)
    run_list.check(study.config)
    if study.bench.regime is not None:
        from trace_ds.demo.run import preflight

        preflight(directory)
    check_places(study, directory)
    with locked(RunDirectory(directory)):
        jobs = study.jobs(None)
        todo = [job for job in jobs if not job.is_done()]
        if todo:
            _clear_leftovers(study)
            count = workers or worker_count()
            if not json:
                _tell_estimate(study, jobs, todo, count)
            _work(study, directory / "logs", jobs, count, json)
        result = analyse(study)
        write_json(directory / "study.json", result)
        write_text(directory / "frontier.csv", frontier_csv(study))
    if json:
        print(json_module.dumps(result, indent=1, sort_keys=True))
    else:
        from trace_ds.studies.result_table import show

        show(result)
        print(f"numbers: {directory / 'study.json'}, every scored step: {directory / 'frontier.csv'}")
    return 0


def check_places(study: Study, directory: Path) -> None:
    """Refuse a directory that is not a study's, or that lies in, on or around what the recipe reads."""
    from trace_ds.demo.run import require_inputs_ours
    from trace_ds.stages.pipeline import inputs_of

    RunDirectory(directory).require_ours()
    ours.require_file(directory / "study.json", ours.is_described("recipe", "comparisons"))
    ours.require_file(directory / "frontier.csv", lambda path: path.read_bytes().startswith(b"seed,loss,method,point,"))
    for seed in study.bench.seeds:
        folder = study.seed_directory(seed)
        run = RunDirectory(folder)
        made = [*run.outputs, *(folder / name for name in ("scores", "trials", "calibrated"))]
        ours.require_apart([*made, directory / "report", directory / "logs"], inputs_of(study.seed_config(seed)))
        run.require_ours()
        if study.bench.regime is not None:
            require_inputs_ours(folder)


def worker_count() -> int:
    """One worker per accelerator, else one per core this process may use."""
    return accelerator_count() or len(os.sched_getaffinity(0))


def _clear_leftovers(study: Study) -> None:
    from trace_ds.demo.run import remove_input_leftovers

    for seed in study.bench.seeds:
        remove_input_leftovers(study.seed_directory(seed))


def _tell_estimate(study: Study, jobs: list[StudyJob], todo: list[StudyJob], count: int) -> None:
    references = sum(job.is_reference for job in todo)
    runs = len(todo) - references
    steps = study.config.unlearning.steps
    scores = -(-steps // study.bench.score_every)
    seconds = references * REFERENCE_S + runs * (steps * STEP_S + scores * SCORE_S)
    print(
        f"[bench] {len(jobs) - len(todo)} of {len(jobs)} jobs are done; left: {references} base models, {runs} runs of "
        f"{steps} steps. With {count} workers about {seconds / count / 60:.0f} minutes on CPU cores like ours",
        flush=True,
    )


def _work(study: Study, logs: Path, jobs: list[StudyJob], count: int, quiet: bool) -> None:
    """Do what is left in ``count`` processes, the reference models first, and tell how far they are.

    Raises:
        UserError, or any other error, of a job: it ends all. JobFailed: a process was killed. StopRequested: SIGTERM.
    """
    context = multiprocessing.get_context("spawn")
    numbers: SimpleQueue[int] = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    logs.mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(count, context, begin, (numbers, logs))
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        for references in (True, False):
            todo = [job for job in jobs if job.is_reference == references and not job.is_done()]
            began_s, futures = time.monotonic(), [pool.submit(do, *study.asked, job.result) for job in todo]
            while futures:
                done, left = wait(futures, TELL_EVERY_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if not left:
                    break
                if not quiet:
                    minutes = (time.monotonic() - began_s) / max(len(done), 1) * len(left) / 60
                    about = f", about {minutes:.0f} minutes left for them" if done else ""
                    what = "base models" if references else "runs"
                    print(f"[bench] {len(done)} of {len(todo)} {what} done{about}", flush=True)
    except BrokenProcessPool:
        raise JobFailed(f"a worker of the study was killed (out of memory?); its log is among {logs}") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: Any) -> None:
    raise StopRequested("the study was stopped; run the same command again to go on")


def analyse(study: Study) -> dict[str, Any]:
    """Every comparison of a finished study; JSON-ready and free of times and places."""
    from trace_ds.evaluation.metrics import direction

    bench = study.bench
    scored = {
        seed: {name: _read(study.reference(seed, name)) for name in study.reference_names()} for seed in bench.seeds
    }
    references = {
        str(seed): {
            name: {m: finite(metric_of(entry, m)) for m in (bench.forget, *bench.utility)}
            for name, entry in models.items()
        }
        for seed, models in scored.items()
    }
    questions = {
        str(seed): {
            m: next((questions_of(entry, m) for entry in models.values()), None) for m in (bench.forget, *bench.utility)
        }
        for seed, models in scored.items()
    }
    target = _target(study, [models["gold"] for models in scored.values() if "gold" in models])
    curves = [curve_of(_read(path), bench.forget, bench.utility, target) for trial, path in study.results().items()]
    rows: list[dict[str, Any]] = []
    for loss, kind, free, chosen in choices(study.config, curves):
        for method in bench.methods:
            found_edges = _edges(study, loss, method, chosen[method], free)
            for metric in bench.utility:
                at_end = metric.split()[0] in bench.score_at_end
                for value in ("end",) if at_end else ("post", "cross", "end"):
                    found = compare(chosen[method], chosen[bench.baseline], metric, value)
                    row = {"loss": loss, "strength": kind, "method": method, "metric": metric, "at": value}
                    way = {"direction": direction(metric.split()[1], "utility"), "edges": found_edges}
                    way["untried"] = run_list.untried(bench, loss, method, free)
                    rows.append(row | way | found)
    return {
        "recipe": study.config.name,
        "seeds": bench.seeds,
        "baseline": bench.baseline,
        "forget": bench.forget,
        "target": target,
        "references": references,
        "questions": questions,
        "diverged": [_where(curve) for curve in curves if curve.diverged],
        "never_reached": [_where(curve) for curve in curves if curve.step is None and not curve.diverged],
        "comparisons": rows,
    }


def _edges(
    study: Study, loss: str, method: str, chosen: Mapping[int, Curve | None], free: Sequence[str]
) -> dict[str, list[int]]:
    """Values at an end of the grid that tuning chose, with the seeds it chose them for."""
    found: dict[str, list[int]] = {}
    for seed, curve in chosen.items():
        for edge in run_list.edges(study.bench, loss, method, curve.point if curve is not None else None, free):
            found.setdefault(edge, []).append(seed)
    return found


def choices(
    config: Config, curves: Sequence[Curve]
) -> Iterator[tuple[str, str, list[str], dict[str, dict[int, Curve | None]]]]:
    """By loss, then by :func:`kinds`: (loss, kind, free keys, method -> the curve it is told by for each seed).

    A kind is left out where no method has a second value of the key that it frees: it would repeat the one before.
    """
    bench = run_list.require_bench(config, "bench")
    for loss in bench.losses:
        for kind, free in kinds(list(bench.grid)):
            if free and all(run_list.untried(bench, loss, method, free[-1:]) for method in bench.methods):
                continue
            chosen = {
                method: tuned(
                    [curve for curve in curves if (curve.loss, curve.method) == (loss, method)],
                    bench.seeds,
                    bench.utility[0],
                    free,
                    dict(run_list.recipe_point(config, loss, method)),
                )
                for method in bench.methods
            }
            yield loss, kind, free, chosen


def kinds(keys: Sequence[str]) -> list[tuple[str, list[str]]]:
    """What is tuned: nothing, then the first key of the grid, then the first two, …"""
    found: list[tuple[str, list[str]]] = [(SAME, [])]
    for count in range(1, len(keys) + 1):
        free = list(keys[:count])
        found.append(("own " + ", ".join(key.rsplit(".", 1)[-1] for key in free), free))
    return found


def _target(study: Study, golds: Sequence[dict[str, Any]]) -> float:
    """The mean of the gold models of all seeds plus the margin; without gold models chance plus two points.

    The mean (our decision): no gold model ever saw what is to be forgotten, so they differ by the luck of a few hundred
    questions only, and a seed whose gold model was unlucky would ask for less than chance. :func:`run_list.check` has
    seen that the metric has a chance level where there is no gold model.
    """
    from trace_ds.evaluation.metrics import METRICS
    from trace_ds.reporting.scores import CHANCE_MARGIN

    if golds:
        return math.fsum(metric_of(gold, study.bench.forget) for gold in golds) / len(golds) + study.bench.margin
    chance = METRICS[study.bench.forget.split()[1]].chance
    assert chance is not None
    return chance + CHANCE_MARGIN


def _where(curve: Curve) -> str:
    return f"seed {curve.seed}, {curve.loss}, {curve.method}, {run_list.label(curve.point)}"


def frontier_csv(study: Study) -> str:
    """One line per scored step of every run."""
    bench = study.bench
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "loss", "method", "point", "step", bench.forget, *bench.utility])
    for trial, path in study.results().items():
        for entry in _read(path)["curve"]:
            values = [metric_of(entry, name) for name in (bench.forget, *bench.utility)]
            numbers = ["" if math.isnan(value) else f"{value:.6g}" for value in values]
            point = run_list.label(trial.point)
            writer.writerow([trial.seed, trial.loss, trial.method, point, entry["step"], *numbers])
    return text.getvalue()


def _read(path: Path) -> dict[str, Any]:
    return read_object(path, "a result of the study", "delete it and run the study again")
