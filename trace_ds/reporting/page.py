"""Builds the self-contained HTML page: template, style, script and data in one file that needs no network.

Corpus text is hostile until escaped. In the HTML it goes through the template's autoescape; in the data block ``<``,
``>`` and ``&`` are written as JSON escapes, so no text can close the block; the script only ever sets ``textContent``;
and a content security policy names the hashes of our own script and style, so that nothing else can run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

from trace_ds.evaluation.metrics import meaning
from trace_ds.evaluation.table import ARROWS, rows_of
from trace_ds.reporting import scores
from trace_ds.reporting.gather import RunData
from trace_ds.reporting.tables import Table

SCRIPTS = ("base.js", "charts.js", "heatmap.js", "page.js")
MAX_TRAINING_ROWS = 4000
MAX_ITEM_ROWS = 1500
MAX_LIST_ROWS = 60


def render(run: RunData, tables: dict[str, Table], pictures: list[str], compared: list[str], notes: list[str]) -> str:
    """The page as text.

    Args:
        pictures: the PNG files beside it.
        compared: names of the other runs in the tables.
        notes: why further runs are not.
    """
    return render_template(
        "page.html.j2",
        SCRIPTS,
        payload(run, tables),
        title=run.title,
        run=run,
        tables=tables,
        pictures=pictures,
        notes=notes,
        compared=compared,
        findings=scores.findings(run),
        tiles=tiles(run, tables),
        score_table=score_table(tables.get("scores")),
        attack_table=attack_table(tables.get("attacks")),
        meanings=meanings(tables.get("scores")),
        warnings=_warnings(run),
        config_text=_config_text(run),
        limit=MAX_LIST_ROWS,
    )


def render_template(template: str, scripts: Sequence[str], data: dict[str, Any], **values: Any) -> str:
    """A page of a template that extends ``base.html.j2``, with the style, these scripts and their data in it."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    style = _asset("page.css")
    script = '"use strict";\n(function () {\n' + "\n".join(_asset(name) for name in scripts) + "\n})();\n"
    environment = Environment(
        loader=FunctionLoader(_asset),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = lambda value: "–" if value is None else f"{value:.1%}"
    return environment.get_template(template).render(
        **values,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=escape_json(data),
    )


def payload(run: RunData, tables: dict[str, Table]) -> dict[str, Any]:
    """What the script reads: the tables by column (long ones thinned, and said so) and a few facts."""
    side = run.retain or run.forget
    embedded: dict[str, Any] = {}
    for name, table in sorted(tables.items()):
        columns, thinned = table.columns, None
        if name == "training" and len(table) > MAX_TRAINING_ROWS:
            stride = -(-len(table) // MAX_TRAINING_ROWS)
            columns = {key: values[::stride] for key, values in columns.items()}
            thinned = f"every {stride}th row of {len(table)}"
        elif name == "items" and len(table) > MAX_ITEM_ROWS:
            columns, thinned = thin_questions(table)
        embedded[name] = {"title": table.title, "columns": columns, "thinned": thinned}
    goal = scores.targets(run)
    return {
        "name": run.name,
        "tables": embedded,
        "layers": int(side.counts_LE.shape[0]) if side else 0,
        "experts": int(side.counts_LE.shape[1]) if side else 0,
        "top_k": side.top_k if side else 0,
        "tokens": {"forget": run.forget.tokens if run.forget else 0, "retain": run.retain.tokens if run.retain else 0},
        "target": sum(goal.values) / len(goal.values) if goal else None,
        "target_origin": goal.origin if goal else None,
        "gold": _point(run, "gold"),
    }


def thin_questions(table: Table) -> tuple[dict[str, list[Any]], str]:
    """The columns of the items, every so many-th question with all its models, and these words."""
    keys = list(zip(table.columns["task"], table.columns["id"], strict=True))
    questions = list(dict.fromkeys(keys))
    kept = set(questions[:: -(-len(table) // MAX_ITEM_ROWS)])
    chosen = [index for index, key in enumerate(keys) if key in kept]
    columns = {name: [values[index] for index in chosen] for name, values in table.columns.items()}
    return columns, f"{len(kept)} of {len(questions)} questions, evenly spaced; all are in the CSV file"


def escape_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no character of markup and no line separator survives."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def tiles(run: RunData, tables: dict[str, Table]) -> list[dict[str, str]]:
    """The few numbers at the top of the page."""
    found = []
    for role, title in (("forget", "Forget score ↓"), ("utility", "Utility ↑")):
        values = {name: scores.mean_score(evaluation, role) for name, evaluation in run.evaluations().items()}
        known = {name: value for name, value in values.items() if value is not None}
        arms = [name for name in known if name not in run.references]
        if arms:
            trace = [arm.label for arm in run.arms if arm.is_trace and arm.label in known]
            name = (trace or arms)[0]
            note = ", ".join(f"{other} {value:.3f}" for other, value in known.items() if other != name)
            found.append({"title": title, "value": f"{known[name]:.3f}", "note": f"{name}; {note}" if note else name})
    if "weight_summary" in tables:
        rows = tables["weight_summary"].rows()
        row = next((row for row in rows if row["rule"] not in ("uniform", None)), rows[0])
        found.append(
            {
                "title": "Effective sample size",
                "value": f"{row['ess_fraction']:.0%}",
                "note": f"{row['arm']} ({row['rule']}), largest weight {row['max_weight']:.3g}",
            }
        )
    if run.calibration is not None and "selected_LE" in run.calibration.arrays:
        chosen = run.calibration.arrays["selected_LE"]
        note = f"of {chosen.size} in {chosen.shape[0]} layers"
        found.append({"title": "Forget-critical experts", "value": str(int(chosen.sum())), "note": note})
    return found


def score_table(table: Table | None) -> dict[str, Any] | None:
    """Models × (task, metric), the best unlearned model of each column marked, chance in the last row."""
    if table is None:
        return None
    rows = table.rows()
    columns = [row | {"arrow": ARROWS.get(row["direction"], "")} for row in rows_of([{"scores": rows}])]
    values = {(row["model"], row["task"], row["metric"]): row for row in rows}
    lines = [
        {"model": model, "cells": [values.get((model, head["task"], head["metric"])) for head in columns]}
        for model in dict.fromkeys(table.columns["model"])
    ]
    chance = [head["chance"] for head in columns]
    return {"columns": columns, "lines": lines, "chance": chance if any(c is not None for c in chance) else None}


def attack_table(table: Table | None) -> dict[str, Any] | None:
    """(attack, stage, score) × models."""
    if table is None:
        return None
    rows = table.rows()
    models = list(dict.fromkeys(row["model"] for row in rows))
    values = {(row["attack"], row["stage"], row["score"], row["model"]): row["value"] for row in rows}
    keys = dict.fromkeys(key[:3] for key in values)
    lines = [
        {"attack": key[0], "stage": key[1], "score": key[2], "values": [values.get((*key, model)) for model in models]}
        for key in keys
    ]
    return {"heads": ["attack", "stage", "score", *(f"#{model}" for model in models)], "lines": lines}


def meanings(table: Table | None) -> list[tuple[str, str]]:
    """(metric, what it means) of every metric in the table of scores that is ours."""
    names = dict.fromkeys(table.columns["metric"]) if table is not None else {}
    return [(name, text) for name in names if (text := meaning(name)) is not None]


def number(value: Any) -> str:
    """A number for people: three or four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def _point(run: RunData, name: str) -> dict[str, float | None] | None:
    if name not in run.references:
        return None
    found = {role: scores.mean_score(run.references[name], role) for role in ("forget", "utility")}
    more = {f"utility_{metric}": scores.mean_score(run.references[name], "utility", metric) for metric in
            scores.utility_metrics(run)}  # fmt: skip
    return {**found, **more}


def _warnings(run: RunData) -> list[str]:
    found = []
    for arm in run.arms:
        for warning in (arm.calibration.diagnosis.get("warnings") or []) if arm.calibration else []:
            found.append(f"{arm.label}: {warning}")
    return found


def _config_text(run: RunData) -> str:
    import yaml

    return str(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)) if run.config else ""


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files("trace_ds.reporting") / name).read_text(encoding="utf-8")
