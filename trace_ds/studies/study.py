"""``trace-ds bench RECIPE``: run (or finish) a study on this machine and say what it shows.

    trace-ds bench bench_entangled --run-dir runs/entangled
    trace-ds bench bench_entangled --dry-run                  # the plan: which runs, on which seeds

Writes ``plan.json`` before the first run, then ``study.json`` (every comparison with its intervals) and
``frontier.csv`` (every scored step of every run), both from the results alone: running it again on a finished study
rewrites the same bytes. On many nodes: ``trace-ds submit RECIPE --study`` (:mod:`trace_ds.studies.array`).
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
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from trace_ds.config.load import load_config
from trace_ds.errors import JobFailed, StopRequested, UserError
from trace_ds.parallel.environment import accelerator_count
from trace_ds.run import ours
from trace_ds.run.directory import CALIBRATED, TRIALS, RunDirectory, locked
from trace_ds.run.files import write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.stages.training import OPERATIONAL
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, choices, compare, finite, metric_of, questions_of
from trace_ds.studies.jobs import Study, begin, do

TELL_EVERY_S = 30.0
START = "spawn"  # how workers are started
# For the estimate before anything ran: seconds of one CPU core of the machine this was developed on.
REFERENCE_S, STEP_S, SCORE_S = 220.0, 0.12, 0.9


def run_study(
    recipe: Sequence[str],
    run_dir: Path | None,
    overrides: Sequence[str],
    workers: int | None,
    *,
    json: bool = False,
    dry_run: bool = False,
) -> int:
    """Run every job that is not done, then write and show the result; returns the exit status.

    Args:
        run_dir: default ``runs/bench/NAME``.
    """
    study = checked(recipe, run_dir, overrides)
    ranks = study.config.distributed.nproc or 1
    check_ranks(study, ranks, local=True, download=not dry_run)
    count = workers or worker_count(ranks)
    if not json:
        tell_plan(study, count)
    if dry_run:
        return 0
    with locked(RunDirectory(study.directory)):
        keep_plan(study)
        with Workers(study, count, ranks, quiet=json) as pool:
            for phase in study.phases:
                pool.finish(phase)
        result = write_result(study)
    show(study, result, json)
    return 0


def checked(recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str]) -> Study:
    """A study of which all that can be wrong before its first run has been looked at; raises :class:`UserError`."""
    directory = run_dir or Path("runs/bench") / load_config(recipe, overrides)[0].name
    study = Study(recipe, directory, overrides)
    run_list.check(study.config)
    if study.bench.regime is not None:
        from trace_ds.demo.run import preflight

        preflight(directory)
    check_places(study)
    check_plan(study)
    return study


def check_places(study: Study) -> None:
    """Refuse a directory that is not a study's, or that lies in, on or around what the recipe reads."""
    from trace_ds.demo.run import require_inputs_ours
    from trace_ds.stages.pipeline import inputs_of

    directory = study.directory
    RunDirectory(directory).require_ours()
    for base in study.bases.values():
        made = [*base.run.outputs, *(base.run.path / name for name in (TRIALS, CALIBRATED))]
        ours.require_apart([*made, directory / "report", directory / "logs"], inputs_of(base.config))
        base.run.require_ours()
        if study.bench.regime is not None:
            require_inputs_ours(base.run.path)


def check_ranks(study: Study, ranks: int, *, local: bool, download: bool = False) -> None:
    """Refuse a job that so many processes (``local``: of this machine) cannot be.

    ``download``: bring a model that is named on the hub, to look at it.
    """
    from trace_ds.models.families import FAMILIES, ModelInfo, check_expert_parallel, inspect_model
    from trace_ds.parallel.launch import check_process_count

    settings, scoring = study.config.distributed, study.config.evaluation
    if local:
        for count, key in ((ranks, "distributed.nproc"), (scoring.nproc, "evaluation.nproc")):
            check_process_count(count, accelerator_count(), os.cpu_count() or 1, key)
    if study.bench.regime is None:
        base = study.bases[study.seeds[0]].located("unlearn", download=download)
        info = inspect_model(base.config.model.path)
    else:
        from trace_ds.demo.pretrain import MODEL

        experts, top_k, layers = (MODEL[f"num_{key}"] for key in ("local_experts", "experts_per_tok", "hidden_layers"))
        info = ModelInfo(Path(), FAMILIES["mixtral"], {}, experts, top_k, layers, "")
    check_expert_parallel(info, settings.ep, ranks, options=settings.autoep.options if local else None)
    check_expert_parallel(info, scoring.ep, scoring.nproc, "evaluation.ep")


# ---------------------------------------------------------------------------------------------------------- the plan


def plan(study: Study) -> dict[str, Any]:
    """What will be run, decided before the first run: all that a result may not be the reason for."""
    bench, settings = study.bench, study.config.unlearning
    kept = settings.model_dump(mode="json", exclude={"evaluate", *OPERATIONAL} - {"steps"})
    looks = -(-settings.steps // bench.score_every)
    grid = len(run_list.grid_trials(bench, [0]))
    stages = [{"stage": "runs", "seeds": bench.seeds, "runs": grid * len(bench.seeds)}]
    if bench.screening is not None:
        most = sum(
            min(len(run_list.told_kinds(bench, loss)), len(run_list.points_of(bench, loss, method)))
            for loss in bench.losses
            for method in bench.methods
        )
        stages[0] |= {"stage": "runs, at most", "runs": most * len(bench.seeds)}
        screening = {"stage": "screening", "seeds": bench.screening, "runs": grid * len(bench.screening)}
        stages.insert(0, screening)
    return {
        "recipe": study.config.name,
        "bench": bench.model_dump(mode="json"),
        "calibration": study.config.calibration.model_dump(mode="json"),
        "unlearning": kept,
        "stages": [{**stage, "steps": settings.steps, "looks": looks} for stage in stages],
    }


def check_plan(study: Study) -> None:
    """Refuse a directory with another plan: what was seen there must not choose what is run now."""
    path = study.directory / "plan.json"
    if not path.is_file():
        return
    stored = read_object(path, "the plan of the study", "restore it, or choose another --run-dir")
    key = _difference(stored, json_module.loads(json_module.dumps(plan(study))))
    if key is not None:
        raise UserError(
            f"a study with another plan was begun here ({key} differs)",
            str(path),
            "choose another --run-dir; or, if no result has decided the change, delete plan.json: equal runs are kept",
        )


def _difference(one: Any, other: Any, key: str = "") -> str | None:
    """The first key under which two plans differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = (_difference(one.get(name), other.get(name), f"{key}.{name}".lstrip(".")) for name in {**other, **one})
        return next((place for place in found if place is not None), None)
    return None if one == other else key


def keep_plan(study: Study) -> None:
    if not (study.directory / "plan.json").is_file():
        write_json(study.directory / "plan.json", plan(study))


def tell_plan(study: Study, workers: int | None = None) -> None:
    """Print the plan; with the number of workers, how long the whole will take on cores like ours."""
    told = plan(study)
    seconds = len(study.seeds) * REFERENCE_S
    for stage in told["stages"]:
        seeds = ", ".join(map(str, stage["seeds"]))
        print(
            f"[bench] {stage['stage']}: {stage['runs']} of {stage['steps']} steps, {stage['looks']} times scored, on "
            f"base models {seeds}",
            flush=True,
        )
        seconds += stage["runs"] * (stage["steps"] * STEP_S + stage["looks"] * SCORE_S)
    if workers is not None and study.bench.regime is not None:
        print(
            f"[bench] {workers} workers: about {seconds / workers / 60:.0f} minutes on CPU cores like ours", flush=True
        )


# ------------------------------------------------------------------------------------------------------- the workers


def worker_count(ranks: int) -> int:
    """As many jobs beside each other as the accelerators, else the cores this process may use, have room for."""
    return max((accelerator_count() or len(os.sched_getaffinity(0))) // ranks, 1)


class Workers:
    """Processes that do the jobs of a study, started when there is one to do; as a context they are gone at its end."""

    def __init__(self, study: Study, count: int, ranks: int, *, quiet: bool) -> None:
        self._study, self._count, self._ranks, self._quiet = study, count, ranks, quiet
        self._logs = study.directory / "logs"
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        self._previous, self._others = signal.signal(signal.SIGTERM, _stop), multiprocessing.active_children()
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()).difference(self._others):
            child.kill()
            child.join()
        signal.signal(signal.SIGTERM, self._previous)

    def finish(self, phase: str) -> None:
        """Do what is left of a phase and tell how far it is.

        Raises:
            UserError, or any other error, of a job: it ends all. JobFailed: a process was killed. StopRequested.
        """
        todo = [number for number, job in enumerate(self._study.jobs(phase)) if not job.is_done()]
        if not todo:
            return
        pool = self._started()
        began_s = time.monotonic()
        futures = [pool.submit(do, self._study.asked, phase, number) for number in todo]
        try:
            while True:
                done, left = wait(futures, TELL_EVERY_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                minutes = (time.monotonic() - began_s) / max(len(done), 1) * len(left) / 60
                about = f", about {minutes:.0f} minutes left for them" if done and left else ""
                if not self._quiet:
                    print(f"[bench] {len(done)} of {len(todo)} {phase} done{about}", flush=True)
                if not left:
                    return
        except BrokenProcessPool:
            what = f"a worker of the study was killed (out of memory?); its log is among {self._logs}"
            raise JobFailed(what) from None

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context(START)
            numbers: SimpleQueue[int] = context.SimpleQueue()
            for number in range(self._count):
                numbers.put(number)
            self._logs.mkdir(parents=True, exist_ok=True)
            self._pool = ProcessPoolExecutor(self._count, context, begin, (numbers, self._ranks, self._logs))
        return self._pool


def _stop(number: int, frame: Any) -> None:
    raise StopRequested("the study was stopped; run the same command again to go on")


# -------------------------------------------------------------------------------------------------------- the result


def write_result(study: Study) -> dict[str, Any]:
    """Write ``study.json`` and ``frontier.csv`` of a study whose runs are all done."""
    result = analyse(study)
    write_json(study.directory / "study.json", result)
    write_text(study.directory / "frontier.csv", frontier_csv(study))
    return result


def show(study: Study, result: dict[str, Any], json: bool = False) -> None:
    if json:
        print(json_module.dumps(result, indent=1, sort_keys=True))
        return
    from trace_ds.studies import result_table

    result_table.show(result)
    made_with = {tuple(sorted(found["made_with"].items())) for _, found in study.results("runs")}
    if len(made_with) > 1:
        print(f"WARNING the runs were made with different devices or versions of torch: {sorted(made_with)}")
    print(f"numbers: {study.directory / 'study.json'}, every scored step: {study.directory / 'frontier.csv'}")


def analyse(study: Study) -> dict[str, Any]:
    """Every comparison of a finished study; JSON-ready and free of times and places."""
    from trace_ds.evaluation.metrics import direction

    bench = study.bench
    references = {
        str(seed): {
            name: {m: finite(metric_of(entry, m)) for m in (bench.forget, *bench.utility)}
            for name, entry in study.references(seed).items()
        }
        for seed in study.seeds
    }
    questions = {
        str(seed): {
            m: next((questions_of(entry, m) for entry in study.references(seed).values()), None)
            for m in (bench.forget, *bench.utility)
        }
        for seed in study.seeds
    }
    target = study.target()
    curves = [curve for phase in study.phases[2:] for curve in study.curves(phase, target)]
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
        **({"screening": bench.screening} if bench.screening else {}),
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


def _where(curve: Curve) -> str:
    return f"seed {curve.seed}, {curve.loss}, {curve.method}, {run_list.label(curve.point)}"


def frontier_csv(study: Study) -> str:
    """One line per scored step of every run, and of each seed's model before the first (method ``original``)."""
    bench = study.bench
    metrics = (bench.forget, *bench.utility)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "loss", "method", "point", "step", *metrics])

    def line(head: Sequence[Any], entry: Mapping[str, Any]) -> None:
        values = (metric_of(entry, name) for name in metrics)
        writer.writerow([*head, *("" if math.isnan(value) else f"{value:.6g}" for value in values)])

    for seed in study.seeds:
        line([seed, "", "original", "", 0], study.references(seed)["original"])
    for trial, result in (found for phase in study.phases[2:] for found in study.results(phase)):
        for entry in result["curve"]:
            line([trial.seed, trial.loss, trial.method, run_list.label(trial.point), entry["step"]], entry)
    return text.getvalue()
