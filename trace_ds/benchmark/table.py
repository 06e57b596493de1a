"""The result of a study on the terminal: one line per method, what it was tuned by, and the interval."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from trace_ds.evaluation.table import ARROWS

LOG_WIDTH = 180  # of a file: nobody's window cuts it


def show(result: dict[str, Any]) -> None:
    """Print a table per utility metric, methods against the baseline, ``post`` and ``cross`` side by side."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    several = len({row["loss"] for row in result["comparisons"]}) > 1
    rows = result["comparisons"]
    for metric in dict.fromkeys(row["metric"] for row in rows):
        arrow = ARROWS[next(row for row in rows if row["metric"] == metric).get("direction", "higher")]
        table = Table(
            title=f"{metric} {arrow}, against {result['baseline']} at matched forgetting ({result['forget']})"
        )
        for column in (
            *(("loss",) if several else ()),
            "strength",
            "method",
            "mean",
            "post [95 %]",
            "at the crossing",
            "steps",
            "forget score at the end",
            "seeds",
            "point",
        ):
            table.add_column(column, overflow="fold", no_wrap=column in ("loss", "method", "mean"))
        found = {(r["loss"], r["strength"], r["method"], r["at"]): r for r in rows if r["metric"] == metric}
        for loss, strength, method in dict.fromkeys(key[:3] for key in found):
            end = found[loss, strength, method, "end"]
            post, cross = (found.get((loss, strength, method, at), end) for at in ("post", "cross"))
            table.add_row(
                *((loss,) if several else ()),
                strength,
                method,
                "never" if post["value"] is None else f"{post['value']:.4g}",
                _relative(post),
                _relative(cross),
                _pair(post, "steps", "baseline_steps", ".0f"),
                _pair(post, "forget_end", "baseline_forget_end", ".3f"),
                f"{len(post['seeds'])}/{len(result['seeds'])}",
                "; ".join(dict.fromkeys(str(point) for point in post["points"].values())) + edge_note(post),
            )
        console.print(table)
    for line in strongest_lines(result):
        console.print(line)
    for key in ("never_reached", "diverged"):
        if result[key]:
            console.print(f"{key.replace('_', ' ')}: {len(result[key])} runs (listed in study.json)")


def strongest_lines(result: dict[str, Any]) -> list[str]:
    """One line per forget loss: the best method that uses routing against the best that does not."""
    found = []
    for row in result.get("strongest", []):
        if row.get("relative") is not None:
            interval = row["relative_interval"]
            told = f" [{interval['low']:+.1%}, {interval['high']:+.1%}]" if interval else ""
            found.append(
                f"{row['loss']}, {row['strength']}: best with routing {row['routing']} {row['routing_value']:.4g}, "
                f"without {row['baseline']} {row['baseline_value']:.4g}: {row['relative']:+.1%}{told} {row['metric']} "
                "(both picked after the fact)"
            )
    return found


def edge_note(row: dict[str, Any]) -> str:
    """Says which chosen values lie at an end of the grid, so that the best may lie beyond, and what had no choice."""
    ends = f" (at the grid's end: {', '.join(row['edges'])})" if row.get("edges") else ""
    return ends + (f" ({', '.join(row['untried'])} not tuned)" if row.get("untried") else "")


def _relative(row: dict[str, Any]) -> str:
    if row["relative"] is None:
        return "–"
    interval = row["relative_interval"]
    return f"{row['relative']:+.1%}" + (f" [{interval['low']:+.1%}, {interval['high']:+.1%}]" if interval else "")


def _pair(row: dict[str, Any], mine: str, theirs: str, form: str) -> str:
    """The means of both sides."""
    sides = [[value for value in row[key] if value is not None] for key in (mine, theirs)]
    if not all(sides):
        return "–"
    return " against ".join(format(sum(values) / len(values), form) for values in sides)
