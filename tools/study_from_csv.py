#!/usr/bin/env python3
"""Every comparison of a published study from its CSV alone, and how it depends on what counts as forgotten.

    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.302
    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.28 0.29 0.31 --method sampling

The CSV is a study's ``frontier.csv``; the recipe says which runs it holds. For each target the strengths are chosen
anew, on other seeds, by the code of ``trace-ds bench``. One line per method: utility against the baseline on the seeds
on which both forgot, with the paired bootstrap interval, Student's t interval of the difference, and the forget score
after the last step.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.reporting.matched import matched
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, compare
from trace_ds.studies.study import choices


def read_curves(config: Config, path: Path, target: float) -> list[Curve]:
    """The curves in a ``frontier.csv`` of the recipe's runs."""
    bench = run_list.require_bench(config, "bench")
    trials = {(str(t.seed), t.loss, t.method, run_list.label(t.point)): t for t in run_list.trials_of(bench)}
    lines: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            lines[line["seed"], line["loss"], line["method"], line["point"]].append(line)
    curves = []
    for key, run in lines.items():
        if key[2] not in bench.methods:
            continue  # a method that has gone from the recipe
        trial, steps = trials[key], [int(line["step"]) for line in run]
        columns = {m: [float(line[m]) if line[m] else math.nan for line in run] for m in (bench.forget, *bench.utility)}
        forget = columns.pop(bench.forget)
        found = {metric: matched(steps, forget, column, target) for metric, column in columns.items()}
        curves.append(Curve(trial.seed, trial.loss, trial.method, trial.point, found, False, forget[-1]))
    return curves


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
    parser.add_argument("--target", type=float, nargs="+", required=True, help="Forget scores that count as forgotten.")
    parser.add_argument("--method", help="This method only.")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    config, _ = load_config(arguments.recipe, arguments.changes, "out")
    for target in arguments.target:
        print(f"forgotten: at most {target}")
        for row in comparisons(config, read_curves(config, arguments.csv, target)):
            if arguments.method in (None, row["method"]):
                head = (row[key] for key in ("loss", "strength", "method", "metric", "at"))
                print(f"  {', '.join(head)}: {told(row)}")


if __name__ == "__main__":
    main()
