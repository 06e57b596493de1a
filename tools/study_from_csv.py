#!/usr/bin/env python3
"""Every comparison of a published study from its CSV alone, and how it depends on what counts as forgotten.

    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.302
    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.28 0.29 0.31 --method sampling
    python tools/study_from_csv.py bench_pretrained STUDY/frontier.csv --levels 0.35 0.65

The CSV is a study's ``frontier.csv``; the recipe says which runs it holds. For each target the strengths are chosen
anew, on other seeds, by the code of ``trace-ds bench``. One line per method: utility against the baseline on the seeds
on which both forgot, with the paired bootstrap interval, Student's t interval of the difference, and the forget score
after the last step.

``--levels``: instead, the utility at matched forgetting, averaged over forget levels between the two (31 of them, read
off the straight lines between scored steps), at the recipe's strength; a run that did not get down to the lower level
is left out. Lines of the method ``original`` are the models before the first step, step 0 of all runs of their seed.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.reporting.intervals import t_interval
from trace_ds.reporting.matched import matched, reached
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, choices, compare

LEVELS = 31


def read_curves(config: Config, path: Path, target: float) -> list[Curve]:
    """The curves in a ``frontier.csv`` of the recipe's runs."""
    bench = run_list.require_bench(config, "bench")
    trials = {
        (str(t.seed), t.loss, t.method, run_list.label(t.point)): t
        for t in run_list.grid_trials(bench, [*(bench.screening or []), *bench.seeds])
    }
    curves = []
    for key, run in read_lines(path).items():
        if key not in trials:
            continue  # the model before the first step, or a method that has gone from the recipe
        trial, steps = trials[key], [int(line["step"]) for line in run]
        columns = {m: [float(line[m]) if line[m] else math.nan for line in run] for m in (bench.forget, *bench.utility)}
        forget = columns.pop(bench.forget)
        found = {metric: matched(steps, forget, column, target) for metric, column in columns.items()}
        # a run that ended early diverged, unless its recipe lets it finish
        cut = steps[-1] < config.unlearning.steps and config.unlearning.evaluate.target_forget_nll is None
        curves.append(Curve(trial.seed, trial.loss, trial.method, trial.point, {} if cut else found, cut, forget[-1]))
    return curves


def read_lines(path: Path) -> dict[tuple[str, ...], list[dict[str, str]]]:
    """The lines of a ``frontier.csv`` by seed, loss, method and point."""
    lines: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            lines[line["seed"], line["loss"], line["method"], line["point"]].append(line)
    return lines


def over_levels(forget_S: list[float], utility_S: list[float], low: float, high: float) -> float | None:
    """Mean utility where the forget score first is at each of LEVELS levels; None: it does not reach the lower one."""
    found = []
    for number in range(LEVELS):
        at = reached(forget_S, low + (high - low) * number / (LEVELS - 1))
        if at is None or not at.index:
            return None
        before, after = utility_S[at.index - 1 : at.index + 1]
        found.append(before + at.share * (after - before))
    return math.fsum(found) / LEVELS


def level_rows(config: Config, path: Path, low: float, high: float) -> list[dict[str, Any]]:
    """Every method at every point against the baseline at that point, paired by seed; by utility metric."""
    bench = run_list.require_bench(config, "bench")
    lines = read_lines(path)
    originals = {key[0]: run for key, run in lines.items() if key[2] == "original"}
    found: dict[tuple[str, ...], float | None] = {}
    for (seed, loss, method, point), run in lines.items():
        whole = [*originals.get(seed, []), *run]
        forget_S = [float(line[bench.forget]) for line in whole]
        for metric in bench.utility if method != "original" else ():
            if metric.split()[0] not in bench.score_at_end:
                utility_S = [float(line[metric]) for line in whole]
                found[loss, metric, point, method, seed] = over_levels(forget_S, utility_S, low, high)
    rows = []
    for loss, metric, point, method in dict.fromkeys(key[:4] for key in found):
        pairs = {
            seed: (found[loss, metric, point, method, seed], found.get((loss, metric, point, bench.baseline, seed)))
            for seed in map(str, bench.seeds)
            if (loss, metric, point, method, seed) in found
        }
        kept = {seed: (mine, base) for seed, (mine, base) in pairs.items() if mine is not None and base is not None}
        differences = [mine - base for mine, base in kept.values()]
        row = {"loss": loss, "metric": metric, "point": point, "method": method, "seeds": [*kept]}
        row |= {"value": mean(mine for mine, _ in kept.values()), "difference": mean(differences)}
        rows.append(row | {"by_seed": differences, "t": t_interval(differences) if len(kept) > 1 else None})
    return rows


def mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else math.nan


def level_told(row: dict[str, Any]) -> str:
    interval = f" t [{row['t'].low:+.3f}, {row['t'].high:+.3f}]" if row["t"] is not None else ""
    each = ", ".join(f"{seed}: {value:+.3f}" for seed, value in zip(row["seeds"], row["by_seed"], strict=True))
    return f"{row['value']:.3f}, against the baseline {row['difference']:+.3f}{interval}  by seed {each}"


def comparisons(config: Config, curves: list[Curve]) -> list[dict[str, Any]]:
    """The rows of ``study.json``."""
    bench = run_list.require_bench(config, "bench")
    rows = []
    for loss, strength, _, chosen in choices(config, curves):
        for method in bench.methods:
            for metric in bench.utility:
                for at in ("end",) if metric.split()[0] in bench.score_at_end else ("post", "end"):
                    row = {"loss": loss, "strength": strength, "method": method, "metric": metric, "at": at}
                    rows.append(row | compare(chosen[method], chosen[bench.baseline], metric, at))
    return rows


def told(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "never on the same seed as the baseline"
    text = f"{row['value']:.3f} against {row['baseline']:.3f}"
    if row["relative"] is not None:
        text += f" {row['relative']:+.1%}"
    for key, name, form in (("relative_interval", "", "+.1%"), ("difference_t_interval", "t ", "+.3f")):
        if row[key]:
            text += f" {name}[{row[key]['low']:{form}}, {row[key]['high']:{form}}]"
    ends = [sum(row[key]) / len(row[key]) for key in ("forget_end", "baseline_forget_end")]
    steps = [sum(row[key]) / len(row[key]) for key in ("steps", "baseline_steps")]
    return (
        f"{text}  seeds {','.join(map(str, row['seeds']))}  steps {steps[0]:.0f} against {steps[1]:.0f}  "
        f"forget at the end {ends[0]:.3f} against {ends[1]:.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("csv", type=Path)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--target", type=float, nargs="+", default=[], help="Forget scores that count as forgotten.")
    how.add_argument("--levels", type=float, nargs=2, metavar=("LOW", "HIGH"), help="Average over forget scores.")
    parser.add_argument("--method", help="This method only.")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config, _ = load_config(arguments.recipe, arguments.changes, "out")
    for row in level_rows(config, arguments.csv, *arguments.levels) if arguments.levels else ():
        if arguments.method in (None, row["method"]):
            print(f"{', '.join(str(row[key]) for key in ('loss', 'point', 'method', 'metric'))}: {level_told(row)}")
    for target in arguments.target:
        print(f"forgotten: at most {target}")
        for row in comparisons(config, read_curves(config, arguments.csv, target)):
            if arguments.method in (None, row["method"]):
                head = (row[key] for key in ("loss", "strength", "method", "metric", "at"))
                print(f"  {', '.join(head)}: {told(row)}")


if __name__ == "__main__":
    main()
