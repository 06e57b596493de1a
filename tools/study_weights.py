#!/usr/bin/env python3
"""Where the methods of a study put the weight, without training: a CSV of shares by seed, method and random draw.

    python tools/study_weights.py bench_pretrained runs/bench/bench_pretrained docs/studies/pretrained_weights.csv

The statistics are those of the study's base models, which must be there; each method is calibrated anew in a temporary
folder, and so are controls that no run of the study is made with. Columns: experts matched, effective sample size of
the rows, and the shares of tokens and of weight of the facts and, among them, of the atomic numbers.
"""

from __future__ import annotations

import argparse
import csv
import fnmatch
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trace_ds.config.load import dump_yaml, load_config, with_changes
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.calibrate import calibrate
from trace_ds.studies.run_list import require_bench

CONTROLS: dict[str, dict[str, object]] = {
    "lowest_experts": {"calibration.rule": "lowest_experts"},
    "inverse": {"calibration.rule": "inverse"},
    "oracle": {"calibration.rule": "sources", "calibration.source_weights": {"near/*": 1000, "mid/*": 1000}},
}
KINDS = {"facts": ("near/*", "mid/*"), "numbers": ("near/*element*",)}
COLUMNS = [
    "seed",
    "method",
    "draw",
    "experts",
    "ess_rows",
    *(f"{k}_{of}" for k in KINDS for of in ("tokens", "weight")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("study", type=Path)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--draws", type=int, default=10, help="Of random experts.")
    arguments = parser.parse_args()
    rows: list[list[object]] = [COLUMNS]
    bench = require_bench(load_config(arguments.recipe)[0], arguments.recipe)
    for seed in bench.seeds:
        place = arguments.study / f"seed_{seed}"
        config, _ = load_config(arguments.recipe, [f"seed={seed}"], place)
        config = config.model_copy(update={"bench": None})
        for method, changes in (bench.methods | CONTROLS).items():
            changed = with_changes(config, changes, method)
            random = changed.calibration.rule == "random_experts"
            if changed.calibration.rule == "uniform" or changed.calibration.draw:
                continue
            for draw in range(arguments.draws if random else 1):
                with tempfile.TemporaryDirectory() as folder:
                    run = RunDirectory(Path(folder), place)
                    drawn = with_changes(changed, {"calibration.draw": draw}, method)
                    run.create(dump_yaml(drawn))
                    calibrate(drawn, run)
                    told = json.loads((run.calibration / "diagnosis.json").read_text(encoding="utf-8"))
                    weight_R = np.load(run.calibration / "row_weights.npy")
                weight_R = weight_R[weight_R > 0]
                ess = weight_R.sum() ** 2 / (len(weight_R) * (weight_R**2).sum())
                shares = [
                    sum(
                        s[f"{of}_share"]
                        for s in told["share_by_source"]
                        if any(fnmatch.fnmatch(s["source"], p) for p in k)
                    )
                    for k in KINDS.values()
                    for of in ("token", "weight")
                ]
                rows.append([seed, method, draw, told["constraints"], *(f"{x:.5g}" for x in (ess, *shares))])
    with arguments.csv.open("w", encoding="utf-8", newline="") as handle:
        csv.writer(handle, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
