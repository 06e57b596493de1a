"""The table of scores on the terminal: one row per task and metric, one column per model."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

ARROWS = {"lower": "↓", "higher": "↑", "reference": "→"}  # →: nearest to the reference is best
TASK_COLUMNS, METRIC_COLUMNS = 22, 18  # characters left for the names of tasks and of metrics


def rows_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One score per (task, metric), forget tasks first, else in the order of their first appearance."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for score in result["scores"]:
            found.setdefault((score["task"], score["metric"]), score)
    return sorted(found.values(), key=lambda score: score["role"] != "forget")


def change(results: list[dict[str, Any]], before: str, after: str) -> str:
    """Each task's first score of two of the models, in one line."""
    named = {result["model"]: result for result in results}
    first = {score["task"]: score["metric"] for score in reversed(rows_of(results))}
    told = [
        f"{task} {' → '.join(_text(_value(named[name], task, first[task])) for name in (before, after))}"
        for task in dict.fromkeys(score["task"] for score in rows_of(results))
        if before in named and after in named
    ]
    return ", ".join(told)


def score_tables(results: list[dict[str, Any]], width: int = 80) -> list[Table]:
    """(task, metric) × models, as many at a time as ``width`` characters hold; the arrow says which way is good.

    Args:
        results: evaluation artefacts (``RUN/evaluation/NAME.json``) in the order to show.
    """
    scores = rows_of(results)
    tables = []
    widest = max((len(result["model"]) for result in results), default=0) + 3
    models = max(1, (width - TASK_COLUMNS - METRIC_COLUMNS) // widest)
    for begin in range(0, len(results), models):
        part = results[begin : begin + models]
        title = "Scores (the arrow says which way is good)" if not begin else None
        table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
        table.add_column("task", overflow="fold")
        table.add_column("metric", no_wrap=True)
        for result in part:
            table.add_column(Text(result["model"]), justify="right", no_wrap=True)
        role = None
        for score in scores:
            if role is not None and score["role"] != role:
                table.add_section()
            role = score["role"]
            values = [_value(result, score["task"], score["metric"]) for result in part]
            metric = f"{score['metric']} {ARROWS[score['direction']]}"
            table.add_row(Text(score["task"]), Text(metric), *map(_text, values))
        if any(result["drift"] for result in part):
            table.add_section()
            for side in ("forget", "retain"):
                overlaps = [result["drift"] and result["drift"][side]["overlap_mean"] for result in part]
                table.add_row("routing", f"overlap, {side}", *map(_text, overlaps))
        tables.append(table)
    return tables


def _value(result: dict[str, Any], task: str, metric: str) -> float | None:
    for score in result["scores"]:
        if (score["task"], score["metric"]) == (task, metric):
            return score["value"]
    return None


def _text(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
