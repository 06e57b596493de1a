"""``STUDY/study.html``: the verdict of a study, its comparison as tables and a plot, and what the words mean.

    render_study(analyse(study))      # of what study.json holds: one file without script or network

Differences are to the baseline on the same seeds, with their t intervals.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any

from trace_ds.reporting.page import describe_change, number
from trace_ds.studies.analysis import SAME

WIDTH, ROW = 360.0, 34  # of the plot and of a method in it, in units of its view box
GAP = 55.0  # between two numbers under the plot


def study_verdict(result: Mapping[str, Any]) -> str:
    """Whether the first method beside the baseline is ahead of it, by how much, and what so many seeds can tell."""
    row, baseline, seeds = headline(result), result["baseline"], len(result["seeds"])
    if row["difference_t_interval"] is None:
        return f"No verdict: {row['method']} and {baseline} both forgot on {len(row['seeds'])} of {seeds} seeds only."
    low, high = (row["difference_t_interval"][end] for end in ("low", "high"))
    outcome = f"No significant difference between {row['method']} and {baseline}"
    if low > 0 or high < 0:
        outcome = f"{row['method']} is {'ahead of' if low > 0 else 'behind'} {baseline}"
    strength = "at the same strength" if row["strength"] == SAME else f"each at its {row['strength']}"
    text = (
        f"{outcome}: {row['metric']} at the same forgetting is {number(row['value'])} against "
        f"{number(row['baseline'])}, {change(row)}, {strength}, on {len(row['seeds'])} of {seeds} seeds."
    )
    if row["detectable"] is not None:
        text += f" So many seeds tell a difference of {number(row['detectable'])} four times in five."
    return text


def headline(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The comparison of the verdict: the first method beside the baseline by the first metric, at the strengths that
    compare most seeds; of several, those that are tuned most."""
    others = [row for row in result["comparisons"] if row["method"] != result["baseline"] and row["at"] == "post"]
    rows = [row for row in others if row["tuned"] and all(row[key] == others[0][key] for key in ("method", "metric"))]
    return max(reversed(rows), key=lambda row: len(row["seeds"]))


def change(row: Mapping[str, Any]) -> str:
    """The difference to the baseline, with its interval where there is one."""
    return describe_change(row["difference"], *(row["difference_t_interval"] or {}).values())


def notes(result: Mapping[str, Any]) -> Iterator[str]:
    """What is not compared, and what may not be."""
    for seed in result["nothing_to_forget"]:
        score = result["references"][str(seed)]["original"][result["forget"]]
        yield (
            f"WARNING seed {seed}: nothing to forget: {result['forget']} of the original model is {score:.3g}, at or "
            f"below the target {result['target']:.3g} before the first step; the seed is left out"
        )
    for name in ("never_reached", "diverged"):
        if result[name]:
            yield f"{name.replace('_', ' ')}: {len(result[name])} runs (listed in study.json)"
    if len(result["made_with"]) > 1:
        yield f"WARNING the runs were made with different devices or versions of torch: {result['made_with']}"


def render_study(result: Mapping[str, Any]) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    main = headline(result)
    rows = [row for row in result["comparisons"] if row["at"] == "post"]
    scored = {row["metric"] for row in rows if row["value"] is not None} | {main["metric"]}
    rows = [row for row in rows if row["metric"] in scored]
    cells = {(row["metric"], row["method"], row["strength"]): row for row in rows}
    metrics, methods, strengths = (list(dict.fromkeys(key[part] for key in cells)) for part in range(3))
    plotted = [row for method in methods if (row := cells[main["metric"], method, main["strength"]])["tuned"]]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": number, "change": change, "mean": statistics.fmean}
    template = environment.from_string((resources.files("trace_ds.studies") / "study.html.j2").read_text("utf-8"))
    return template.render(
        style=(resources.files("trace_ds.reporting") / "page.css").read_text("utf-8"),
        result=result, verdict=study_verdict(result), main=main, notes=list(notes(result)),
        plot=plot([row for row in plotted if row["method"] != result["baseline"]]),
        metrics=metrics, methods=methods, strengths=strengths, cells=cells,
    )  # fmt: skip


def plot(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Where the differences of methods, of their seeds and their intervals lie in the plot; empty without any."""
    rows = [row for row in rows if row["difference_t_interval"] is not None]
    seeds = [[a - b for a, b in zip(row["by_seed"], row["baseline_by_seed"], strict=True)] for row in rows]
    ends = [tuple(row["difference_t_interval"].values()) for row in rows]
    low, high = (of(0.0, *(of(values) for values in [*ends, *seeds])) for of in (min, max)) if rows else (0.0, 0.0)
    if low == high:
        return {}

    def x(value: float) -> float:
        return round(8 + (WIDTH - 16) * (value - low) / (high - low), 1)

    lines = [
        {"method": row["method"], "y": ROW * number, "low": x(a), "high": x(b), "mean": x(row["difference"])}
        | {"seeds": [x(value) for value in values], "change": change(row)}
        for number, (row, (a, b), values) in enumerate(zip(rows, ends, seeds, strict=True))
    ]
    ticks = [(x(0), "0"), *((x(v), describe_change(v)) for v in (low, high) if abs(x(v) - x(0)) > GAP)]
    return {"lines": lines, "ticks": ticks, "width": WIDTH, "height": ROW * len(lines)}
