"""``trace-ds bench RECIPE``: run what is left of a study on this machine and compare its runs.

    trace-ds bench bench_entangled --run-dir runs/entangled
    trace-ds bench bench_entangled --dry-run                       # which runs, on which seeds
    trace-ds submit RECIPE --study --run-dir STUDY                 # one ordinary SLURM job a seed, then
    trace-ds bench RECIPE --run-dir STUDY --analyse                # the comparison alone

Writes ``study.html`` (verdict, table and plot), ``study.json`` (every comparison with its intervals) and
``frontier.csv`` (every scored step of every run) from the runs' own files: the same runs give the same bytes.
"""

from __future__ import annotations

import csv
import gc
import io
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import JobFailed, StopRequested, UserError
from trace_ds.evaluation.metrics import METRICS
from trace_ds.reporting.page import number
from trace_ds.run.curve import check_scores, read_curve
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.stages.pipeline import Request, check_early, run_verb
from trace_ds.studies.analysis import Comparison, Curve, finite, matched, metric_of
from trace_ds.studies.page import change, notes, render_study, study_verdict
from trace_ds.studies.runs import GOLD, check_study, forget_target, require_bench, run_of, seed_request, trials_of

if TYPE_CHECKING:
    from trace_ds.cluster.submit import Cluster
    from trace_ds.demo.corpora import Regime

HEADER = ["seed", "method", "point", "step"]


class Study:
    """The runs of a recipe's study in a directory (default ``runs/bench/NAME``)."""

    def __init__(self, recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str]) -> None:
        self.config: Config = load_config(recipe, overrides, "${run_dir}")[0]
        self.bench = require_bench(self.config, self.config.name)
        check_study(self.config)
        self.metrics = (self.bench.forget, *self.bench.utility)
        self.directory = run_dir or Path("runs/bench") / self.config.name
        self.requests = {s: seed_request(recipe, overrides, self.directory, s) for s in self.bench.seeds}
        RunDirectory(self.directory).require_ours()
        for request in self.requests.values():
            request.check_run_directory()

    def describe(self) -> str:
        """One line on the size of the study, printed before its first run."""
        runs, settings = len(trials_of(self.bench)), self.config.unlearning
        return (
            f"[bench] {runs * len(self.bench.seeds)} runs of at most {settings.steps} steps, scored every "
            f"{settings.evaluate.every}: {runs} methods and strengths on seeds {', '.join(map(str, self.bench.seeds))}"
        )

    def read_curves(self) -> tuple[list[Curve], list[dict[str, Any]]]:
        """Every run's curve, and what they were made with; :class:`UserError` where one is missing or damaged."""
        curves, made_with = [], set()
        for seed, request in self.requests.items():
            for trial in trials_of(self.bench):
                raw = read_curve(run_of(request, trial).curve)
                scores = {name: [metric_of(point, name) for point in raw["curve"]] for name in self.metrics}
                steps, diverged = [point["step"] for point in raw["curve"]], raw["failed_after"] is not None
                curves.append(Curve(seed, trial.method, trial.label, steps, scores, diverged))
                made_with.add(tuple(sorted(raw["made_with"].items())))
        return curves, [dict(pairs) for pairs in sorted(made_with)]

    def read_references(self, seed: int) -> dict[str, dict[str, Any]]:
        """The evaluations of the original and, where there is one, the gold model."""
        request, fix = self.requests[seed], "make it again with `trace-ds evaluate CONFIG`"
        evaluations = {}
        for name in ("original", *request.written.evaluation.models):
            path = request.run.evaluation / f"{name}.json"
            evaluations[name] = read_object(path, "the evaluation", fix)
            try:
                check_scores(evaluations[name])
            except ValueError as error:
                raise UserError(f"the evaluation is damaged: {error}", str(path), fix) from None
        return evaluations

    def target(self, references: Mapping[int, Mapping[str, dict[str, Any]]]) -> float:
        """The mean of the gold models of all seeds, without gold models chance, plus the margin.

        The mean (our decision): no gold model ever saw what is to be forgotten, so they differ by the luck of a few
        hundred questions only, and a seed whose gold model was unlucky would ask for less than chance.
        """
        golds = [metric_of(models[GOLD], self.bench.forget) for models in references.values() if GOLD in models]
        base = math.fsum(golds) / len(golds) if golds else METRICS[self.bench.forget.split()[1]].chance
        assert base is not None  # see check_study
        return forget_target(self.bench, base)


def run_study(
    recipe: Sequence[str],
    run_dir: Path | None,
    overrides: Sequence[str],
    *,
    dry_run: bool = False,
    analyse_only: bool = False,
) -> int:
    """Run every seed's runs that are not done, then write and print the result; returns the exit status."""
    study = Study(recipe, run_dir, overrides)
    print(study.describe(), flush=True)
    if dry_run:
        return 0
    if not analyse_only:
        check_machine(study)
        with locked(RunDirectory(study.directory)):
            run_all(study)
    print_result(analyse(study), study)
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


def check_machine(study: Study) -> None:
    """Refuse what no run on this machine could do, before the first one."""
    if study.bench.regime is not None:
        from trace_ds.demo.run import require_demo, require_inputs_ours

        require_demo(study.directory)
        for request in study.requests.values():
            require_inputs_ours(request.run.path)
        return
    request = study.requests[study.bench.seeds[0]]
    check_early("run", request.located("run", download=True))


def run_all(study: Study) -> None:
    """Do the runs of all seeds, one after another; raises what ends one of them."""
    from trace_ds.models.engine import keep_freed_memory

    keep_freed_memory()
    for done, request in enumerate(study.requests.values(), 1):
        run_seed(request, study.bench.regime)
        print(f"[bench] {done} of {len(study.requests)} seeds done", flush=True)


def run_seed(request: Request, regime: Regime | None) -> None:
    """Run one seed and its variants as `trace-ds run` does. Where a run is one process, this process is its rank from
    the first one on, so that many short ones do not start anew."""
    config = request.written
    if regime is not None:
        from trace_ds.demo.run import prepare_inputs, remove_input_leftovers

        request.run.mark()
        remove_input_leftovers(request.run.path)
        prepare_inputs(request.run.path, config.seed, regime)
    if config.distributed.nproc == config.evaluation.nproc == 1:
        from trace_ds.parallel.world import join

        join(config.distributed.threads, config.distributed.timeout_minutes)
    for verb in ("prepare", "collect", "calibrate", "unlearn", "evaluate"):
        for item in request.run_and_variants() if verb in ("calibrate", "unlearn") else [request]:
            status = run_verb(verb, item)
            if status == StopRequested.exit_status:
                raise StopRequested(f"{item.run.path}: stopped on request; run the same command again to go on")
            if status:
                raise JobFailed(f"{verb} in {item.run.path} ended with exit status {status}")
            gc.collect()


def analyse(study: Study) -> dict[str, Any]:
    """Write and return ``study.json``, free of times and places, and write ``frontier.csv`` and ``study.html``."""
    bench = study.bench
    references = {seed: study.read_references(seed) for seed in bench.seeds}
    curves, made_with = study.read_curves()
    target = study.target(references)
    comparison = Comparison(study.config, curves, partial(matched, target=target))
    result = comparison.summary() | {
        "target": target,
        "references": {
            str(seed): {name: {m: finite(metric_of(one, m)) for m in study.metrics} for name, one in models.items()}
            for seed, models in references.items()
        },
        "made_with": made_with,
    }
    write_json(study.directory / "study.json", result)
    write_text(study.directory / "frontier.csv", frontier_csv(curves, study.metrics))
    write_text(study.directory / "study.html", render_study(result))
    return result


def frontier_csv(curves: Sequence[Curve], metrics: Sequence[str]) -> str:
    """One line per scored step of every run; step 0 is the original model."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*HEADER, *metrics])
    for curve in curves:
        for index, step in enumerate(curve.steps):
            values = ("" if math.isnan(v := curve.scores[name][index]) else f"{v:.6g}" for name in metrics)
            writer.writerow([curve.seed, curve.method, curve.strength, step, *values])
    return text.getvalue()


def print_result(result: dict[str, Any], study: Study) -> None:
    """The verdict, one line per comparison from the first step at the target on (``post``), and what is left out."""
    print(study_verdict(result))
    for row in result["comparisons"]:
        if row["at"] == "post" and row["tuned"]:
            values = "–" if row["value"] is None else f"{number(row['value'])} {change(row)}"
            label = ", ".join(row[key] for key in ("metric", "strength", "method"))
            print(f"  {label}: {values} ({len(row['seeds'])} of {len(result['seeds'])} seeds)")
    print(*notes(result), f"page: {study.directory / 'study.html'}; numbers: study.json and frontier.csv", sep="\n")
