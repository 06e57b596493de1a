"""The table of scores on the terminal: models × tasks."""

from __future__ import annotations

from typing import Any

from rich.table import Table

ARROWS = {"lower": "↓", "higher": "↑"}


def columns_of(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One score per (task, metric), in the order of their first appearance: forget tasks first."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for result in results:
        for score in result["scores"]:
            found.setdefault((score["task"], score["metric"]), score)
    return sorted(found.values(), key=lambda score: score["role"] != "forget")


def score_table(results: list[dict[str, Any]]) -> Table:
    """Models × (task, metric); the arrow says which way is good. ``results`` are evaluation artefacts."""
    table = Table(title="Scores")
    table.add_column("model")
    columns = columns_of(results)
    for score in columns:
        table.add_column(
            f"{score['task']}\n{score['metric']} {ARROWS[score['direction']]}\n{score['role']}", justify="right"
        )
    drifts = any(result["drift"] for result in results)
    if drifts:
        table.add_column("routing overlap\nforget / retain", justify="right")
    for result in results:
        values = {(score["task"], score["metric"]): score["value"] for score in result["scores"]}
        cells = [_number(values.get((score["task"], score["metric"]))) for score in columns]
        if drifts:
            drift = result["drift"]
            cells.append(
                f"{drift['forget']['overlap_mean']:.3f} / {drift['retain']['overlap_mean']:.3f}" if drift else "–"
            )
        table.add_row(result["model"], *cells)
    return table


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:,.1f}"
