"""The result of a study on the terminal: one line per method, what it was tuned by, and the interval."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from trace_ds.reporting.study_page import StudyData, comparisons, sections
from trace_ds.terminal import wide_console


def show(result: dict[str, Any]) -> None:
    """Print a table per utility metric, methods against the baseline, ``post`` and ``cross`` side by side."""
    console = wide_console(log_width=180)  # of a file: nobody's window cuts it
    study = StudyData(result["recipe"], result, [])
    loss = ("loss",) if study.several_losses else ()
    for section in sections(study, comparisons(study)):
        against = f"against {result['baseline']} at matched forgetting ({result['forget']})"
        table = Table(title=f"{section['metric']} {section['arrow']}, {against}")
        columns = ("strength", "method", "mean", "post [95 %]", "at the crossing", "steps")
        for column in (*loss, *columns, "forget score at the end", "seeds", "point"):
            table.add_column(column, overflow="fold", no_wrap=column in ("loss", "method", "mean"))
        for line in section["lines"]:
            row = line["main"]
            table.add_row(
                *(row[key] for key in loss),
                row["strength"],
                row["method"],
                "never" if row["value"] is None else f"{row['value']:.4g}",
                _relative(row),
                _relative(line["cross"] or row),
                _pair(row["steps"], row["baseline_steps"], ".0f"),
                _pair(row["forget_end"], row["baseline_forget_end"], ".3f"),
                f"{row['reached']}/{row['seeds']}",
                row["points"]
                + (f" (at the grid's end: {row['grid_ends']})" if row["grid_ends"] else "")
                + (f" ({row['not_tuned']} not tuned)" if row["not_tuned"] else ""),
            )
        console.print(table)
    for key in ("never_reached", "diverged"):
        if result[key]:
            console.print(f"{key.replace('_', ' ')}: {len(result[key])} runs (listed in study.json)")


def _relative(row: dict[str, Any]) -> str:
    if row["relative"] is None:
        return "–"
    low, high = row["relative_low"], row["relative_high"]
    return f"{row['relative']:+.1%}" + ("" if low is None else f" [{low:+.1%}, {high:+.1%}]")


def _pair(mine: float | None, theirs: float | None, form: str) -> str:
    """The means of both sides."""
    return "–" if mine is None or theirs is None else f"{mine:{form}} against {theirs:{form}}"
