"""The result of a study on the terminal: one line per method, what it was tuned by, and the interval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from trace_ds.evaluation.table import ARROWS
from trace_ds.terminal import wide_console


def show(result: dict[str, Any]) -> None:
    """Print a table per utility metric of study.json: methods against the baseline, ``post`` beside ``cross``."""
    console = wide_console(log_width=180)  # of a file: nobody's window cuts it
    comparisons = result["comparisons"]
    rows = {tuple(row[key] for key in ("metric", "at", "loss", "strength", "method")): row for row in comparisons}
    loss = ("loss",) if len({row["loss"] for row in comparisons}) > 1 else ()
    for metric in dict.fromkeys(row["metric"] for row in comparisons):
        keys = [key[2:] for key in rows if key[:2] == (metric, "end")]
        arrow = ARROWS[rows[(metric, "end", *keys[0])].get("direction", "higher")]
        against = f"against {result['baseline']} at matched forgetting ({result['forget']})"
        table = Table(title=f"{metric} {arrow}, {against}")
        columns = ("strength", "method", "mean", "post [95 %]", "at the crossing", "steps")
        for column in (*loss, *columns, "forget score at the end", "seeds", "point"):
            table.add_column(column, overflow="fold", no_wrap=column in ("loss", "method", "mean"))
        for key in keys:
            row = rows.get((metric, "post", *key)) or rows[(metric, "end", *key)]
            edges, untried = (", ".join(row.get(name) or ()) for name in ("edges", "untried"))
            table.add_row(
                *(row[name] for name in loss),
                row["strength"],
                row["method"],
                "never" if row["value"] is None else f"{row['value']:.4g}",
                _relative(row),
                _relative(rows.get((metric, "cross", *key), row)),
                _pair(row["steps"], row["baseline_steps"], ".0f"),
                _pair(row.get("forget_end", []), row.get("baseline_forget_end", []), ".3f"),
                f"{len(row['seeds'])}/{len(result['seeds'])}",
                "; ".join(dict.fromkeys(map(str, row["points"].values())))
                + (f" (at the grid's end: {edges})" if edges else "")
                + (f" ({untried} not tuned)" if untried else ""),
            )
        console.print(table)
    for name in ("never_reached", "diverged"):
        if result[name]:
            console.print(f"{name.replace('_', ' ')}: {len(result[name])} runs (listed in study.json)")


def _relative(row: dict[str, Any]) -> str:
    if row["relative"] is None:
        return "–"
    band = row.get("relative_interval")
    return f"{row['relative']:+.1%}" + (f" [{band['low']:+.1%}, {band['high']:+.1%}]" if band else "")


def _pair(mine: Sequence[float | None], theirs: Sequence[float | None], form: str) -> str:
    """The means of both sides."""
    means = [[value for value in side if value is not None] for side in (mine, theirs)]
    if not all(means):
        return "–"
    return " against ".join(f"{sum(side) / len(side):{form}}" for side in means)
