"""``trace-ds bench``: the same comparison over several seeds, at matched forgetting.

Each seed is the demo anew: its own split of the facts, its own base and gold model, its own unlearning order.

A method has forgotten from the first checkpoint whose forget score is at most the gold model's plus ``MARGIN``: the
standard error of a score over 240 questions is .03, and the scores level off near the gold model's, so an exact target
is reached by luck. A method is compared with the variant ``uniform`` of the same seed on the same checkpoints: from the
first one at which both have forgotten to the last. Our decisions.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import write_json

BASELINE = "uniform"
MARGIN = 0.05


@dataclass(frozen=True)
class Outcome:
    """One method of one seed.

    Attributes:
        step: the step from which it has forgotten; None: never.
        curves: {metric: {step: value}}.
    """

    seed: int
    method: str
    step: int | None
    curves: dict[str, dict[int, float]]

    def mean_from(self, metric: str, step: int) -> float:
        """Mean of the metric over the checkpoints from ``step`` to the last."""
        values = [value for at, value in self.curves[metric].items() if at >= step]
        return math.fsum(values) / len(values)


def bench(recipe: str, run_dir: Path, seeds: int, json: bool, overrides: Sequence[str] = ()) -> int:
    """Run (or finish) all seeds, with ``overrides`` of the recipe, and print the table; returns the exit status."""
    from trace_ds.config.load import load_config
    from trace_ds.demo.run import machine_overrides, prepare_inputs, remove_input_leftovers, require_inputs_ours
    from trace_ds.run.directory import RunDirectory, locked
    from trace_ds.run.ours import is_described, require_file
    from trace_ds.stages.pipeline import Request, run_verb

    if any(item.partition("=")[0].strip() == "seed" for item in overrides):
        raise UserError("the seeds of a comparison are 0, 1, …", "--set seed", "say how many with --seeds")
    config, _ = load_config(recipe, overrides, run_dir / "seed_0")
    if BASELINE not in config.variants:
        raise UserError(f"the recipe has no variant {BASELINE!r} to compare with", recipe, "add it under variants")
    RunDirectory(run_dir).require_ours()
    require_file(run_dir / "bench.json", is_described("recipe", "outcomes"))
    outcomes: list[Outcome] = []
    for seed in range(seeds):
        folder = run_dir / f"seed_{seed}"
        request = Request.load(recipe, [f"seed={seed}", *machine_overrides(), *overrides], folder)
        request.check_places()
        require_inputs_ours(folder)
        with locked(request.run):
            remove_input_leftovers(folder)
            prepare_inputs(folder, seed)
        status = run_verb("run", request)
        if status:
            return status
        outcomes += seed_outcomes(request.run.path, seed)
    lines = table(outcomes)
    result = {
        "recipe": recipe,
        "set": list(overrides),
        "seeds": seeds,
        "outcomes": [asdict(item) for item in outcomes],
        "table": lines,
    }
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
    from trace_ds.reporting.matched import crossing_index

    forget = next(key for key in gold if key[0] == "forget" and key[2] == "accuracy")
    utilities = [key for key in gold if key[0] == "utility" and key[2] in ("accuracy", "exact_match", "perplexity")]
    index = crossing_index([scores[forget] for _, scores in points], gold[forget] + MARGIN)
    curves = {f"{key[1]} {key[2]}": {step: scores[key] for step, scores in points} for key in utilities}
    return Outcome(seed, method, None if index is None else points[index][0], curves)


def _scores(path: Path) -> dict[tuple[str, str, str], float]:
    """(role, task, metric) -> value of one evaluation."""
    if not path.is_file():
        raise UserError(
            "this evaluation is missing", str(path), "set evaluation.checkpoints and evaluation.models.gold"
        )
    scores = json_module.loads(path.read_text(encoding="utf-8"))["scores"]
    return {(item["role"], item["task"], item["metric"]): item["value"] for item in scores}


def table(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """One line per method and metric: utility of the method and of ``uniform`` on the same checkpoints, their relative
    difference by seed, its mean and the half width of its 95 % interval (Student's t over the seeds).

    A seed in which either side never reached the target is left out and counted in ``not_reached``.
    """
    from scipy import stats

    by_key = {(item.seed, item.method): item for item in outcomes}
    seeds = sorted({item.seed for item in outcomes})
    methods = sorted({item.method for item in outcomes}, key=lambda name: (name != BASELINE, name))
    lines = []
    for metric in sorted({metric for item in outcomes for metric in item.curves}):
        for method in methods:
            pairs = []
            for seed in seeds:
                mine, base = by_key[seed, method], by_key[seed, BASELINE]
                if mine.step is not None and base.step is not None:
                    start = max(mine.step, base.step)
                    pairs.append((mine.mean_from(metric, start), base.mean_from(metric, start)))
            relative = [value / baseline - 1 for value, baseline in pairs if baseline]  # no ratio to nothing
            mean = math.fsum(relative) / len(relative) if relative else None
            half = None
            if mean is not None and len(relative) > 1:
                deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in relative) / (len(relative) - 1))
                half = float(stats.t.ppf(0.975, len(relative) - 1)) * deviation / math.sqrt(len(relative))
            lines.append(
                {
                    "metric": metric,
                    "method": method,
                    "utility": math.fsum(value for value, _ in pairs) / len(pairs) if pairs else None,
                    "relative": mean,
                    "relative_by_seed": relative,
                    "half_width": half,
                    "steps": [by_key[seed, method].step for seed in seeds],
                    "not_reached": len(seeds) - len(pairs),
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
