"""The page of a study: all methods against the baseline at matched forgetting, from study.json and frontier.csv.

    STUDY/report/index.html, comparisons.csv, by_seed.csv, frontier_mean.csv

The numbers are those of ``trace-ds bench``; here they are only laid out (and, for the curves, averaged over seeds).
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.evaluation.table import ARROWS
from trace_ds.reporting.intervals import Interval, wilson
from trace_ds.reporting.page import embedded, render_template
from trace_ds.reporting.tables import Table, make
from trace_ds.run.foreign import read_object

SCRIPTS = ("base.js", "charts.js", "study.js")
AGAIN = "run `trace-ds bench` again: a finished study only writes it anew"


@dataclass(frozen=True)
class StudyData:
    """``result`` is study.json, ``frontier`` the lines of frontier.csv, both as `trace-ds bench` wrote them."""

    name: str
    result: dict[str, Any]
    frontier: list[dict[str, str]]

    @property
    def metrics(self) -> list[str]:
        return list(dict.fromkeys(row["metric"] for row in self.result["comparisons"]))

    @property
    def several_losses(self) -> bool:
        return len({row["loss"] for row in self.result["comparisons"]}) > 1


def read(path: Path) -> StudyData:
    """The study in a directory; :class:`UserError` names the file that is missing or damaged."""
    where = path / "study.json"
    result = read_object(where, "the study's result", AGAIN)
    keys = {"recipe", "seeds", "baseline", "forget", "target", "comparisons"}
    if not keys <= set(result):
        raise UserError(f"the study's result has no {', '.join(keys - set(result))}", str(where), AGAIN)
    where = path / "frontier.csv"
    try:
        with where.open(encoding="utf-8", newline="") as handle:
            frontier = list(csv.DictReader(handle))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"the study's result cannot be read ({type(error).__name__})", str(where), AGAIN) from None
    return StudyData(str(result["recipe"]), result, frontier)


def all_tables(study: StudyData) -> dict[str, Table]:
    tables = [comparisons(study), by_seed(study), frontier_mean(study)]
    return {table.name: table for table in tables if len(table)}


def comparisons(study: StudyData) -> Table:
    """One row per loss, strength, method, metric and moment, as in study.json."""
    header = [
        "loss", "strength", "method", "metric", "at", "value", "baseline", "relative", "relative_low", "relative_high",
        "value_low", "value_high", "difference", "steps", "baseline_steps", "steps_between_scores", "forget_end",
        "baseline_forget_end", "reached", "seeds", "points", "grid_ends", "not_tuned",
    ]  # fmt: skip
    rows = []
    for row in study.result["comparisons"]:
        intervals = [row.get(key) or {} for key in ("relative_interval", "value_t_interval")]
        points = "; ".join(dict.fromkeys(str(point) for point in row["points"].values()))
        rows.append(
            [
                *(row[key] for key in header[:8]), *(band.get(end) for band in intervals for end in ("low", "high")),
                row["difference"], _mean(row["steps"]), _mean(row["baseline_steps"]), row.get("steps_between_scores"),
                _mean(row.get("forget_end", [])),
                _mean(row.get("baseline_forget_end", [])), len(row["seeds"]), len(study.result["seeds"]),
                points, ", ".join(row.get("edges") or {}), ", ".join(row.get("untried") or []),
            ]
        )  # fmt: skip
    return make("comparisons", "Methods against the baseline", header, rows)


def by_seed(study: StudyData) -> Table:
    """The pairs behind every comparison."""
    keys = ["loss", "strength", "method", "metric", "at"]
    rows = [
        [*(row[key] for key in keys), *values]
        for row in study.result["comparisons"]
        for values in zip(
            row["seeds"], row["by_seed"], row["baseline_by_seed"], row["steps"], row["baseline_steps"], strict=True
        )
    ]
    header = [*keys, "seed", "value", "baseline", "step", "baseline_step"]
    return make("by_seed", "Utility by seed", header, rows)


def frontier_mean(study: StudyData) -> Table:
    """Forget score and utility by step of each method at its chosen points, mean over the seeds that have both."""
    runs: dict[tuple[str, ...], list[dict[str, str]]] = defaultdict(list)
    for line in study.frontier:
        runs[line["seed"], line["loss"], line["method"], line["point"]].append(line)
    rows = []
    for row in study.result["comparisons"]:
        if row["at"] != "post":  # a metric that is scored after the last step only has no curve
            continue
        pairs: dict[int, list[tuple[float, float]]] = defaultdict(list)
        for seed, point in row["points"].items():
            for line in runs.get((seed, row["loss"], row["method"], point or ""), []):
                if line[study.result["forget"]] and line[row["metric"]]:
                    pairs[int(line["step"])].append((float(line[study.result["forget"]]), float(line[row["metric"]])))
        for step, found in sorted(pairs.items()):
            forget, utility = (math.fsum(values) / len(found) for values in zip(*found, strict=True))
            rows.append(
                [*(row[key] for key in ("loss", "strength", "method", "metric")), step, len(found), forget, utility]
            )
    header = ["loss", "strength", "method", "metric", "step", "seeds", "forget", "utility"]
    return make("frontier_mean", "Forgetting against utility", header, rows)


def render(study: StudyData, tables: dict[str, Table]) -> str:
    """The page as text."""
    result = study.result
    asked = result.get("questions") or {}
    references = [
        {
            "seed": seed,
            "model": model,
            "scores": [(v, _of_questions(v, asked.get(seed, {}).get(metric))) for metric, v in scores.items()],
        }
        for seed, models in result["references"].items()
        for model, scores in models.items()
    ]
    return render_template(
        "study.html.j2",
        SCRIPTS,
        payload(study, tables),
        {},
        title=f"Study: {study.name}",
        tables=tables,
        pictures=[],
        result=result,
        several=study.several_losses,
        sections=sections(study, tables["comparisons"]) if "comparisons" in tables else [],
        references=references,
        reference_metrics=[f"#{metric}" for metric in next(iter(next(iter(result["references"].values())).values()))],
    )


def payload(study: StudyData, tables: dict[str, Table]) -> dict[str, Any]:
    """What the script reads."""
    return {
        "tables": {name: embedded(table) for name, table in tables.items()},
        "target": study.result["target"],
        "forget": study.result["forget"],
        "baseline": study.result["baseline"],
    }


def sections(study: StudyData, table: Table) -> list[dict[str, Any]]:
    """Per metric the lines of the comparison table: ``post`` (or, scored at the end only, ``end``) and ``cross``."""
    rows = {tuple(row[key] for key in ("metric", "at", "loss", "strength", "method")): row for row in table.rows()}
    ways = {row["metric"]: row.get("direction", "higher") for row in study.result["comparisons"]}
    found = []
    for metric in study.metrics:
        keys = [key[2:] for key in rows if key[:2] == (metric, "end")]
        lines = [
            {
                "main": rows.get((metric, "post", *key)) or rows[(metric, "end", *key)],
                "cross": rows.get((metric, "cross", *key)),
                "is_baseline": key[2] == study.result["baseline"],
            }
            for key in keys
        ]
        at_end = all(line["cross"] is None for line in lines)
        found.append({"metric": metric, "arrow": ARROWS[ways[metric]], "lines": lines, "at_end": at_end})
    return found


def _of_questions(value: float | None, count: int | None) -> Interval | None:
    """Wilson's interval of a score, from its number of questions."""
    return wilson(value, count) if value is not None and count and 0 <= value <= 1 else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
