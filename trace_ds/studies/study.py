"""``trace-ds bench RECIPE``: run what is left of a study on this machine and say what its curves show.

    trace-ds bench bench_entangled --run-dir runs/entangled
    trace-ds bench bench_entangled --dry-run                       # which runs, on which seeds
    trace-ds submit RECIPE --study --run-dir STUDY                 # one ordinary SLURM job a seed, then
    trace-ds bench RECIPE --run-dir STUDY --analyse                # what they show

Writes ``study.json`` (every comparison with its intervals) and ``frontier.csv`` (every scored step of every run), both
from the runs' own files: the same runs give the same bytes.
"""

from __future__ import annotations

import csv
import gc
import io
import json as json_module
import math
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import JobFailed, StopRequested, UserError
from trace_ds.evaluation.metrics import ARROWS, METRICS, direction
from trace_ds.parallel.environment import accelerator_count, accelerator_names
from trace_ds.parallel.launch import die_with_parent, parent_of_this
from trace_ds.run.curve import check_scores, read_curve
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.stages.pipeline import Request, check_early, run_verb
from trace_ds.studies.analysis import Comparison, Curve, finite, metric_of
from trace_ds.studies.matched import matched
from trace_ds.studies.runs import GOLD, check, require_bench, run_of, seed_request, trials_of
from trace_ds.terminal import wide_console

if TYPE_CHECKING:
    from trace_ds.cluster.submit import Cluster
    from trace_ds.demo.corpora import Regime

START = "spawn"  # how workers are started
HEADER = ["seed", "loss", "method", "point", "step"]


class Study:
    """The runs of a recipe's study in a directory (default ``runs/bench/NAME``)."""

    def __init__(self, recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str]) -> None:
        self.config: Config = load_config(recipe, overrides, "${run_dir}")[0]
        self.bench = require_bench(self.config, self.config.name)
        check(self.config)
        self.directory = run_dir or Path("runs/bench") / self.config.name
        self.requests = {s: seed_request(recipe, overrides, self.directory, s) for s in self.bench.seeds}
        RunDirectory(self.directory).require_ours()
        for request in self.requests.values():
            request.check_places()

    def describe(self) -> str:
        runs, settings = len(trials_of(self.bench)), self.config.unlearning
        return (
            f"[bench] {runs * len(self.bench.seeds)} runs of at most {settings.steps} steps, scored every "
            f"{settings.evaluate.every}: {runs} methods and strengths on seeds {', '.join(map(str, self.bench.seeds))}"
        )

    def curves(self) -> Iterator[tuple[Curve, dict[str, Any]]]:
        """Every run's curve, and its file; :class:`UserError` where one is missing or damaged."""
        metrics = (self.bench.forget, *self.bench.utility)
        for seed, request in self.requests.items():
            for trial in trials_of(self.bench):
                raw = read_curve(run_of(request, trial).curve)
                scores = {name: [metric_of(point, name) for point in raw["curve"]] for name in metrics}
                steps, diverged = [point["step"] for point in raw["curve"]], raw["diverged"] is not None
                yield Curve(seed, trial.loss, trial.method, trial.label, steps, scores, diverged), raw

    def references(self, seed: int) -> dict[str, dict[str, Any]]:
        """The evaluations of the original and, where there is one, the gold model."""
        request = self.requests[seed]
        names = ("original", *request.written.evaluation.models)
        fix = "make it again with `trace-ds evaluate CONFIG`"
        found = {}
        for path in (request.run.evaluation / f"{name}.json" for name in names):
            found[path.stem] = read_object(path, "the evaluation", fix)
            try:
                check_scores(found[path.stem])
            except ValueError as error:
                raise UserError(f"the evaluation is damaged: {error}", str(path), fix) from None
        return found

    def target(self, references: Mapping[int, Mapping[str, dict[str, Any]]]) -> float:
        """The mean of the gold models of all seeds, without gold models chance, plus the margin.

        The mean (our decision): no gold model ever saw what is to be forgotten, so they differ by the luck of a few
        hundred questions only, and a seed whose gold model was unlucky would ask for less than chance.
        """
        golds = [metric_of(models[GOLD], self.bench.forget) for models in references.values() if GOLD in models]
        base = math.fsum(golds) / len(golds) if golds else METRICS[self.bench.forget.split()[1]].chance
        assert base is not None  # see runs.check
        return base + self.bench.margin


def run_study(
    recipe: Sequence[str],
    run_dir: Path | None,
    overrides: Sequence[str],
    workers: int | None,
    *,
    json: bool = False,
    dry_run: bool = False,
    analyse_only: bool = False,
) -> int:
    """Run every seed's runs that are not done (a process a seed, ``workers`` beside each other), then write and show
    the result; returns the exit status."""
    study = Study(recipe, run_dir, overrides)
    if not json:
        print(study.describe(), flush=True)
    if dry_run:
        return 0
    if not analyse_only:
        check_here(study)
        with locked(RunDirectory(study.directory)):
            run_all(study, workers, quiet=json)
    result = analyse(study)
    show(result, study, as_json=json)
    return 0


def submit_study(
    recipe: Sequence[str],
    run_dir: Path | None,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    chain: bool,
    dry_run: bool,
) -> int:
    """Submit each seed's run with its variants as an ordinary one, which waits for no other; returns 0."""
    from trace_ds.cluster.submit import submit_run

    study = Study(recipe, run_dir, overrides)
    if study.bench.regime is not None:
        raise UserError("the study makes its own inputs", "bench.regime", "run it with `trace-ds bench`")
    print(study.describe(), flush=True)
    for request in study.requests.values():
        submit_run(request, cluster, chain=chain, dry_run=dry_run)
        if not dry_run:
            RunDirectory(study.directory).mark()
    print(f"when they are done: trace-ds bench {' '.join(recipe)} --run-dir {study.directory} --analyse")
    return 0


def check_here(study: Study) -> None:
    """Refuse what no run on this machine could do, before the first one."""
    if study.bench.regime is not None:
        from trace_ds.demo.run import preflight, require_inputs_ours

        preflight(study.directory)
        for request in study.requests.values():
            require_inputs_ours(request.run.path)
        return
    request = study.requests[study.bench.seeds[0]]
    check_early("run", request.located("run", download=True))


def run_all(study: Study, workers: int | None, *, quiet: bool) -> None:
    """Do the runs of all seeds in worker processes.

    Raises:
        UserError, or any other error, of a run: it ends all. JobFailed: a process was killed. StopRequested.
    """
    seeds, logs = study.bench.seeds, study.directory / "logs"
    ranks = study.requests[seeds[0]].written.distributed.nproc or 1
    room = max((accelerator_count() or len(os.sched_getaffinity(0))) // ranks, 1)
    count = min(workers or room, len(seeds))
    logs.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context(START)
    numbers: SimpleQueue[int] = context.SimpleQueue()
    for number in range(count):
        numbers.put(number)
    previous, others = signal.signal(signal.SIGTERM, _stop), multiprocessing.active_children()
    pool = ProcessPoolExecutor(count, context, begin_worker, (numbers, ranks, logs))
    try:
        left: set[Future[None]] = {pool.submit(run_seed, study.requests[seed], study.bench.regime) for seed in seeds}
        while left:
            done, left = wait(left, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
            if not quiet:
                print(f"[bench] {len(seeds) - len(left)} of {len(seeds)} seeds done", flush=True)
    except BrokenProcessPool:
        raise JobFailed(f"a worker of the study was killed (out of memory?); its log is among {logs}") from None
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()).difference(others):
            child.kill()
            child.join()
        signal.signal(signal.SIGTERM, previous)


def _stop(number: int, frame: Any) -> None:
    raise StopRequested("the study was stopped; run the same command again to go on")


def begin_worker(numbers: SimpleQueue[int], ranks: int, logs: Path) -> None:
    """In a new process of the pool: nobody's rank, with its share of the GPUs, its own log, and its parent's end."""
    from trace_ds.models.host_memory import keep_freed_memory

    die_with_parent(parent_of_this())
    number = numbers.get()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= devices_of(number, ranks, os.environ)
    keep_freed_memory()
    with (logs / f"worker_{number}.log").open("ab") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def devices_of(number: int, ranks: int, inherited: Mapping[str, str], devices: Path = Path("/dev")) -> dict[str, str]:
    """One thread a process, and as many of the GPUs that may be used as a run has ranks, for a worker."""
    names = accelerator_names(inherited, devices)
    chosen = [names[(number * ranks + rank) % len(names)] for rank in range(ranks)] if names else []
    return {"OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if chosen else {})}


def run_seed(request: Request, regime: Regime | None) -> None:
    """In a worker: what `trace-ds run` does with the run of a seed and its variants. Where a run is one process, this
    process is its rank from the first one on, so that many short ones do not start anew."""
    config = request.written
    if regime is not None:
        from trace_ds.demo.run import prepare_inputs, remove_input_leftovers

        request.run.path.mkdir(parents=True, exist_ok=True)
        remove_input_leftovers(request.run.path)
        prepare_inputs(request.run.path, config.seed, regime)
    if config.distributed.nproc == config.evaluation.nproc == 1:
        from trace_ds.parallel.world import join

        join(config.distributed.threads, config.distributed.timeout_minutes)
    for verb in ("prepare", "collect", "calibrate", "unlearn", "evaluate"):
        for item in request.all() if verb in ("calibrate", "unlearn") else [request]:
            status = run_verb(verb, item)
            if status == StopRequested.exit_status:
                raise StopRequested(f"{item.run.path}: stopped on request; run the same command again to go on")
            if status:
                raise JobFailed(f"{verb} in {item.run.path} ended with exit status {status}: see the study's logs")
            gc.collect()


def analyse(study: Study) -> dict[str, Any]:
    """Write and return ``study.json``, free of times and places, and write ``frontier.csv``."""
    bench, metrics = study.bench, (study.bench.forget, *study.bench.utility)
    references = {seed: study.references(seed) for seed in bench.seeds}
    read = list(study.curves())
    target = study.target(references)
    comparison = Comparison(study.config, [curve for curve, _ in read], partial(matched, target=target))
    rows = comparison.rows()
    for row in rows:
        row["direction"] = direction(row["metric"].split()[1], "utility")
    nothing = comparison.nothing_to_forget
    result = {
        "recipe": study.config.name,
        "seeds": bench.seeds,
        "baseline": bench.baseline,
        "forget": bench.forget,
        "target": target,
        "references": {
            str(seed): {name: {m: finite(metric_of(scores, m)) for m in metrics} for name, scores in models.items()}
            for seed, models in references.items()
        },
        "made_with": [dict(pairs) for pairs in sorted({tuple(sorted(raw["made_with"].items())) for _, raw in read})],
        "nothing_to_forget": nothing,
        "diverged": [str(curve) for curve, _ in read if curve.diverged],
        "never_reached": [str(c) for c, _ in read if comparison.step(c) is None and not c.diverged],
        "comparisons": rows,
    }
    write_json(study.directory / "study.json", result)
    write_text(study.directory / "frontier.csv", frontier_csv([curve for curve, _ in read], metrics))
    return result


def frontier_csv(curves: Sequence[Curve], metrics: Sequence[str]) -> str:
    """One line per scored step of every run; step 0 is the original model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADER, *metrics])
    for curve in curves:
        for number, step in enumerate(curve.steps):
            values = ("" if math.isnan(v := curve.scores[name][number]) else f"{v:.6g}" for name in metrics)
            writer.writerow([curve.seed, curve.loss, curve.method, curve.strength, step, *values])
    return text.getvalue()


def show(result: dict[str, Any], study: Study, *, as_json: bool) -> None:
    """Print study.json, or a table per utility metric: methods against the baseline, ``post`` beside ``cross``."""
    if as_json:
        print(json_module.dumps(result, indent=1, sort_keys=True))
        return
    console = wide_console(log_width=180)  # of a file: nobody's window cuts it
    rows = {tuple(r[key] for key in ("metric", "loss", "strength", "method", "at")): r for r in result["comparisons"]}
    for metric in dict.fromkeys(key[0] for key in rows):
        keys = [key[:4] for key in rows if key[0] == metric and key[4] == "post"]
        arrow = ARROWS[rows[(*keys[0], "post")]["direction"]]
        table = Table(
            title=f"{metric} {arrow}, against {result['baseline']} at matched forgetting ({result['forget']})"
        )
        columns = ("loss", "strength", "method", "mean", "post [95 %]", "at the crossing", "at the end", "steps")
        for column in (*columns, "forget score at the end", "seeds", "chosen"):
            table.add_column(column, overflow="fold", no_wrap=column in ("loss", "method", "mean"))
        for key in keys:
            post, cross, end = (rows[(*key, at)] for at in ("post", "cross", "end"))
            table.add_row(
                *key[1:],
                "–" if post["value"] is None else f"{post['value']:.4g}",
                *(_relative(row) for row in (post, cross, end)),
                _pair(post["steps"], post["baseline_steps"], ".0f"),
                _pair(post["forget_end"], post["baseline_forget_end"], ".3f"),
                f"{len(post['seeds'])}/{len(result['seeds'])}",
                "; ".join(dict.fromkeys(map(str, post["strengths"].values()))),
            )
        console.print(table)
    for seed in result["nothing_to_forget"]:
        score = result["references"][str(seed)]["original"][result["forget"]]
        print(
            f"WARNING seed {seed}: nothing to forget: {result['forget']} of the original model is {score:.3g}, at or "
            f"below the target {result['target']:.3g} before the first step; the seed is left out"
        )
    for name in ("never_reached", "diverged"):
        if result[name]:
            print(f"{name.replace('_', ' ')}: {len(result[name])} runs (listed in study.json)")
    if len(result["made_with"]) > 1:
        print(f"WARNING the runs were made with different devices or versions of torch: {result['made_with']}")
    print(f"numbers: {study.directory / 'study.json'}, every scored step: {study.directory / 'frontier.csv'}")


def _relative(row: dict[str, Any]) -> str:
    if row["relative"] is None:
        return "–"
    band = row["relative_interval"]
    return f"{row['relative']:+.1%}" + (f" [{band['low']:+.1%}, {band['high']:+.1%}]" if band else "")


def _pair(mine: Sequence[float | None], theirs: Sequence[float | None], form: str) -> str:
    """The means of both sides."""
    means = [[value for value in side if value is not None] for side in (mine, theirs)]
    return " against ".join(f"{sum(side) / len(side):{form}}" for side in means) if all(means) else "–"
