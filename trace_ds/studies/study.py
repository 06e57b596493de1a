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
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import EXIT_STOPPED, StopRequested, UserError
from trace_ds.run import ours
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import write_json, write_text
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, compare, curve_of, finite, metric_of, tuned
from trace_ds.studies.worker import Study, StudyJob, is_done

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
        todo = [job for job in jobs if not is_done(job)]
        if todo:
            _clear_leftovers(study)
            count = workers or worker_count()
            if not json:
                _tell_estimate(study, jobs, todo, count)
            status = _work(recipe, directory, overrides, jobs, count, json)
            if status:
                return status
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
    from trace_ds.parallel.environment import accelerator_count

    return accelerator_count() or len(os.sched_getaffinity(0))


def _clear_leftovers(study: Study) -> None:
    from trace_ds.demo.run import remove_input_leftovers

    for seed in study.bench.seeds:
        remove_input_leftovers(study.seed_directory(seed))


def _tell_estimate(study: Study, jobs: list[StudyJob], todo: list[StudyJob], count: int) -> None:
    references = sum(not job.needs for job in todo)
    runs = len(todo) - references
    steps = study.config.unlearning.steps
    scores = -(-steps // study.bench.score_every)
    seconds = references * REFERENCE_S + runs * (steps * STEP_S + scores * SCORE_S)
    print(
        f"[bench] {len(jobs) - len(todo)} of {len(jobs)} jobs are done; left: {references} base models, {runs} runs of "
        f"{steps} steps. With {count} workers about {seconds / count / 60:.0f} minutes on CPU cores like ours",
        flush=True,
    )


def _work(
    recipe: Sequence[str], directory: Path, overrides: Sequence[str], jobs: list[StudyJob], count: int, quiet: bool
) -> int:
    """Start the workers, tell how far they are, wait; the first failure ends all of them."""
    from trace_ds.parallel.launch import die_with_parent

    command = [sys.executable, "-m", "trace_ds.studies.worker", str(directory), *recipe]
    for override in overrides:
        command += ["--set", override]
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    logs = [directory / "logs" / f"worker_{number}.log" for number in range(count)]
    children: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, _stop)
    try:
        for number, log in enumerate(logs):
            environment = worker_environment(number, os.environ)
            with log.open("wb") as handle:
                children.append(
                    subprocess.Popen(command, env=environment, stdout=handle, stderr=handle, preexec_fn=die_with_parent)
                )
        return _wait(children, logs, jobs, quiet)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        signal.signal(signal.SIGTERM, previous)


def worker_environment(number: int, inherited: Mapping[str, str], devices: Path = Path("/dev")) -> dict[str, str]:
    """The environment of a worker: no rank of anything, one thread, and one of the GPUs this process may use."""
    from trace_ds.parallel.environment import accelerator_names

    environment = {k: v for k, v in inherited.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment["OMP_NUM_THREADS"] = "1"
    accelerators = accelerator_names(inherited, devices)
    if accelerators:
        environment["CUDA_VISIBLE_DEVICES"] = accelerators[number % len(accelerators)]
    return environment


def _stop(number: int, frame: Any) -> None:
    raise StopRequested("the study was stopped; run the same command again to go on")


def _wait(children: list[subprocess.Popen[bytes]], logs: list[Path], jobs: list[StudyJob], quiet: bool) -> int:
    began_s = told_s = time.monotonic()
    began_with = sum(map(is_done, jobs))
    while True:
        codes = [child.poll() for child in children]
        for code, log in zip(codes, logs, strict=True):
            if code:
                lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
                if code < 0:
                    lines.append(
                        f"a worker of the study was ended by signal {-code} (9: out of memory?); its log: {log}"
                    )
                print("\n".join(lines[-1:] if code == UserError.exit_status else lines[-15:]), file=sys.stderr)
                return code if code > 0 else EXIT_STOPPED if code == -signal.SIGTERM else 1
        if all(code == 0 for code in codes):
            return 0
        now_s = time.monotonic()
        if not quiet and now_s - told_s > TELL_EVERY_S:
            told_s = now_s
            done = sum(map(is_done, jobs))
            new = done - began_with
            left_minutes = (now_s - began_s) / max(new, 1) * (len(jobs) - done) / 60
            left = f", about {left_minutes:.0f} minutes left" if new else ""
            print(f"[bench] {done} of {len(jobs)} jobs done{left}", flush=True)
        time.sleep(0.5)


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
    value: dict[str, Any] = json_module.loads(path.read_text(encoding="utf-8"))
    return value
