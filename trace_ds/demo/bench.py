"""``trace-ds bench``: the same comparison over several seeds, at matched forgetting.

Each seed is the demo anew: its own split of the facts, its own base and gold model, its own unlearning order. The
result is utility after forgetting: the mean over the checkpoints from the one where the forget score first reaches the
gold model's level to the last, for every variant, relative to the variant ``uniform`` of the same seed.
"""

from __future__ import annotations

import json as json_module
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import write_json

BASELINE = "uniform"


@dataclass(frozen=True)
class Outcome:
    """One method of one seed: utilities after forgetting by metric, and the step that reached the target."""

    seed: int
    method: str
    step: int | None
    utility: dict[str, float | None]


def bench(recipe: str, run_dir: Path, seeds: int, json: bool) -> int:
    """Run (or finish) all seeds and print the table; returns the exit status."""
    from trace_ds.config.load import load_config
    from trace_ds.demo.run import machine_overrides, prepare_inputs
    from trace_ds.run.directory import RunDirectory, locked
    from trace_ds.stages.pipeline import Request, run_verb

    config, _ = load_config(recipe, [], run_dir / "seed_0")
    if BASELINE not in config.variants:
        raise UserError(f"the recipe has no variant {BASELINE!r} to compare with", recipe, "add it under variants")
    outcomes: list[Outcome] = []
    for seed in range(seeds):
        folder = run_dir / f"seed_{seed}"
        with locked(RunDirectory(folder)):
            prepare_inputs(folder, seed)
        request = Request.load(recipe, [f"seed={seed}", *machine_overrides()], folder)
        status = run_verb("run", request)
        if status:
            return status
        outcomes += seed_outcomes(request.run.path, seed)
    lines = table(outcomes)
    result = {"recipe": recipe, "seeds": seeds, "outcomes": [asdict(item) for item in outcomes], "table": lines}
    write_json(run_dir / "bench.json", result)
    if json:
        print(json_module.dumps(result, indent=1, sort_keys=True))
    else:
        _print(lines, run_dir)
    return 0


def seed_outcomes(run: Path, seed: int) -> list[Outcome]:
    """Every arm of a finished run at matched forgetting; the run itself is called ``trace``."""
    folders = {"trace": run} | {path.name: path for path in sorted((run / "variants").iterdir()) if path.is_dir()}
    gold = _scores(run / "evaluation" / "gold.json")
    found = []
    for name, folder in folders.items():
        paths = sorted((folder / "evaluation").glob("step_*.json"))
        points = [(int(path.stem.removeprefix("step_")), _scores(path)) for path in paths]
        found.append(_at_matched_forgetting(points, gold, seed, name))
    return found


def _at_matched_forgetting(
    points: list[tuple[int, dict[tuple[str, str, str], float]]],
    gold: dict[tuple[str, str, str], float],
    seed: int,
    method: str,
) -> Outcome:
    from trace_ds.reporting.matched import matched

    forget = next(key for key in gold if key[0] == "forget" and key[2] == "accuracy")
    utilities = [key for key in gold if key[0] == "utility" and key[2] in ("accuracy", "exact_match", "perplexity")]
    steps = [step for step, _ in points]
    result, reached = {}, None
    for key in utilities:
        curve = matched(steps, [s[forget] for _, s in points], [s[key] for _, s in points], gold[forget])
        result[f"{key[1]} {key[2]}"], reached = curve.post, curve.step
    return Outcome(seed, method, reached, result)


def _scores(path: Path) -> dict[tuple[str, str, str], float]:
    """(role, task, metric) -> value of one evaluation."""
    if not path.is_file():
        raise UserError(
            "this evaluation is missing", str(path), "set evaluation.checkpoints and evaluation.models.gold"
        )
    scores = json_module.loads(path.read_text(encoding="utf-8"))["scores"]
    return {(item["role"], item["task"], item["metric"]): item["value"] for item in scores}


def table(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One line per method and metric: mean utility, paired relative difference to ``uniform`` by seed, interval.

    The interval is Student's t over the seeds (95 %); a seed in which either side did not reach the target is left
    out and counted.
    """
    from scipy import stats

    by_key = {(item.seed, item.method): item for item in outcomes}
    seeds = sorted({item.seed for item in outcomes})
    methods = sorted({item.method for item in outcomes}, key=lambda name: (name != BASELINE, name))
    metrics = sorted({metric for item in outcomes for metric in item.utility})
    lines = []
    for metric in metrics:
        for method in methods:
            values, relative = [], []
            for seed in seeds:
                value = by_key[seed, method].utility[metric]
                baseline = by_key[seed, BASELINE].utility[metric]
                if value is not None:
                    values.append(value)
                if value is not None and baseline:
                    relative.append(value / baseline - 1)
            mean = math.fsum(relative) / len(relative) if relative else None
            half = None
            if mean is not None and len(relative) > 1:
                deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in relative) / (len(relative) - 1))
                half = float(stats.t.ppf(0.975, len(relative) - 1)) * deviation / math.sqrt(len(relative))
            lines.append(
                {
                    "metric": metric,
                    "method": method,
                    "utility": math.fsum(values) / len(values) if values else None,
                    "relative": mean,
                    "relative_by_seed": relative,
                    "half_width": half,
                    "steps": [by_key[seed, method].step for seed in seeds],
                    "not_reached": len(seeds) - len(values),
                }
            )
    return lines


def _print(lines: list[dict[str, Any]], run_dir: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(title="Utility after forgetting, relative to uniform retain weights (same seed, same alpha)")
    for column in ("metric", "method", "utility", "relative to uniform [95 %]", "by seed", "step reached"):
        shown.add_column(column)
    for line in lines:
        interval = f" ± {line['half_width']:.1%}" if line["half_width"] is not None else ""
        shown.add_row(
            line["metric"],
            line["method"],
            "never" if line["utility"] is None else f"{line['utility']:.4g}",
            "–" if line["relative"] is None else f"{line['relative']:+.1%}{interval}",
            " ".join(f"{value:+.1%}" for value in line["relative_by_seed"]),
            " ".join("never" if step is None else str(step) for step in line["steps"]),
        )
    console = Console()
    console.print(shown)
    console.print(f"numbers: {run_dir / 'bench.json'}")
