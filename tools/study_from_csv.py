#!/usr/bin/env python3
"""Every comparison of a published study from its CSV alone, and how it depends on what counts as forgotten.

    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.302
    python tools/study_from_csv.py bench_entangled docs/studies/entangled.csv --target 0.28 0.29 0.31 --method sampling
    python tools/study_from_csv.py bench_pretrained STUDY/frontier.csv --levels 0.35 0.65

The CSV is a study's ``frontier.csv``, and may hold methods that the recipe no longer has. For each target the strengths
are chosen anew, on other seeds, by the code of ``trace-ds bench``. One line per method: utility against the baseline on
the seeds on which both forgot, with the t intervals of the ratio and of the difference, and the
forget score after the last step.

``--levels``: instead, in the place of the mean from the first step at a target on, the utility at matched forgetting
averaged over forget levels between the two (31 of them, read off the straight lines between scored steps); a run that
did not get down to the lower level has not forgotten. Lines of the method ``original`` are the models before the first
step, step 0 of all runs of their seed.

Each line tells what as many seeds with as much spread could tell: the smallest difference that a t test at 5 % finds
with probability .8 (from the noncentral t distribution).
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.evaluation.metrics import require_level
from trace_ds.studies.analysis import Comparison, Curve, Matched, Measure, matched, reached
from trace_ds.studies.runs import require_bench
from trace_ds.studies.study import HEADER

LEVELS = 31


def read_curves(config: Config, path: Path) -> list[Curve]:
    """The curves in a ``frontier.csv``; those without a step 0 begin with their seed's line ``original``."""
    evaluate, bench = config.unlearning.evaluate, require_bench(config, "bench")
    lines: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as handle:
        for line in csv.DictReader(handle):
            lines[line["seed"], line["method"], line["point"]].append(line)
    before = {key[0]: run for key, run in lines.items() if key[1] == "original"}
    curves = []
    for (seed, method, strength), run in lines.items():
        if method == "original":
            continue
        whole = run if run[0]["step"] == "0" else [*before.get(seed, []), *run]
        metrics = [name for name in run[0] if name not in (*HEADER, "loss")]  # the published ones have a column loss
        scores = {name: [float(line[name]) if line[name] else math.nan for line in whole] for name in metrics}
        steps = [int(line["step"]) for line in whole]
        bounds = [bound for bound in evaluate.bounds("until") if bound.score == bench.forget]
        ended = any(bound.holds(scores[bench.forget][-1]) for bound in bounds)
        diverged = steps[-1] < config.unlearning.steps and not ended
        curves.append(Curve(int(seed), method, strength, steps, scores, diverged))
    return curves


def over_levels(steps_S: list[int], forget_S: list[float], utility_S: list[float], low: float, high: float) -> Matched:
    """As ``post`` the mean utility where the forget score first is at each of LEVELS levels; not reached unless it is
    at the lower one, after the first step."""
    utilities, last = [], 0
    for number in range(LEVELS):
        level = high + (low - high) * number / (LEVELS - 1)
        last = reached(forget_S, level) or 0
        if not last:
            return Matched(None, None, utility_S[-1])
        before, after = forget_S[last - 1 : last + 1]
        share = min((before - level) / (before - after), 1.0) if math.isfinite(before) else 1.0
        utilities.append(utility_S[last - 1] + share * (utility_S[last] - utility_S[last - 1]))
    return Matched(steps_S[last], math.fsum(utilities) / LEVELS, utility_S[-1])


def summary(row: dict[str, Any]) -> str:
    if row["value"] is None:
        return "never on the same seed as the baseline"
    text = f"{row['value']:.3f} against {row['baseline']:.3f}"
    if row["relative"] is not None:
        text += f" {row['relative']:+.1%}"
    for key, name, form in (("relative_interval", "", "+.1%"), ("difference_t_interval", "t ", "+.3f")):
        if row[key]:
            text += f" {name}[{row[key]['low']:{form}}, {row[key]['high']:{form}}]"
    if row["detectable"] is not None:
        text += f"  tells {row['detectable']:.3f}"
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
    try:
        config, _ = load_config(arguments.recipe, arguments.changes, "out")
        for name in ("target", "levels"):
            for level in getattr(arguments, name) or []:
                require_level(require_bench(config, arguments.recipe).forget, level, f"--{name}")
    except UserError as error:
        print(f"study_from_csv: {error}", file=sys.stderr)
        raise SystemExit(error.exit_status) from None
    measures: dict[str, Measure] = {f"forgotten: at most {t}": partial(matched, target=t) for t in arguments.target}
    if arguments.levels:
        low, high = sorted(arguments.levels)
        measures = {f"forget scores from {high} to {low}": partial(over_levels, low=low, high=high)}
    curves = read_curves(config, arguments.csv)
    for title, measure in measures.items():
        print(title)
        for row in Comparison(config, curves, measure).rows():
            if arguments.method in (None, row["method"]):
                head = (row[key] for key in ("strength", "method", "metric", "at"))
                print(f"  {', '.join(head)}: {summary(row)}")


if __name__ == "__main__":
    main()
