"""Builds the self-contained HTML page: template, style, script and data in one file that needs no network.

Corpus text is hostile until escaped. In the HTML it goes through the template's autoescape; in the data block ``<``,
``>`` and ``&`` are written as JSON escapes, so no text can close the block; the script only ever sets ``textContent``;
and a content security policy names the hashes of our own script and style, so that nothing else can run or load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from importlib import resources
from typing import Any

import yaml

from trace_ds.evaluation.metrics import ARROWS, distinct_scores, meaning
from trace_ds.reporting import scores
from trace_ds.reporting.gather import BASE_MODEL, Evaluation, RunData
from trace_ds.reporting.tables import Table, item_cells
from trace_ds.reporting.verdict import Verdict

_SCRIPTS = ("charts.js", "page.js")
_EXAMPLES = 3
MAX_QUESTIONS = 1500
MAX_LIST_ROWS = 60
MOST_GAINED, MOST_LOST = 10, 4  # sources of the retain text that the page names


def render_page(run: RunData, verdict: Verdict, tables: dict[str, Table]) -> str:
    """The page as text."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    names = {arm.label: arm.title for arm in run.arms}
    models = list(run.evaluations())
    main = next((arm.label for arm in run.arms if arm.is_trace and arm.label in models), models[-1] if models else "")
    style = _asset("page.css")
    script = '"use strict";\n(function () {\n' + "\n".join(map(_asset, _SCRIPTS)) + "\n})();\n"
    environment = Environment(
        loader=FunctionLoader(_asset), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters |= {
        "number": number,
        "percent": lambda value: "–" if value is None else f"{value:.1%}",
        "change": describe_change,
        "tied": lambda text: re.sub(r"\[[^\]]*\]", lambda shown: shown[0].replace(" ", "\u00a0"), text),
        "model": lambda label: ", ".join(names.get(each, each) for each in label.split(", ")),
    }
    rows = {name: table.rows() for name, table in tables.items()}
    return environment.get_template("page.html.j2").render(
        style=style, script=script, style_hash=_csp_hash(style), script_hash=_csp_hash(script),
        data=escape_json(payload(run, tables, names)),
        run=run,
        verdict=verdict,
        tables=tables,
        rows=rows,
        examples=[
            (title, shown)
            for role, title in (("forget", "To be forgotten"), ("utility", "To be kept"))
            if (shown := examples(run, role, main))
        ],
        models=models,
        main=main,
        facts=facts(run),
        score_table=score_table(rows["scores"], run) if "scores" in rows else None,
        source_rows=source_rows(rows.get("sources", [])),
        warnings=_warnings(run),
        config_text=yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100) if run.config else "",
        limit=MAX_LIST_ROWS,
    )  # fmt: skip


def payload(run: RunData, tables: dict[str, Table], names: dict[str, str]) -> dict[str, Any]:
    """Data for the page's script: the tables that it draws, by column (long ones thinned), and a few facts."""
    side, target_scores, gold = run.retain or run.forget, scores.targets(run), run.references.get(run.gold)
    stride = max(1, -(-len(tables["items"]) // MAX_QUESTIONS)) if "items" in tables else 1
    return {
        "names": names,
        "tables": {
            name: {key: values[:: stride if name == "items" else 1] for key, values in tables[name].columns.items()}
            for name in ("curves", "drift", "items", "routing")
            if name in tables
        },
        "thinned": f"1 in {stride} questions; all are in the CSV file" if stride > 1 else None,
        "layers": int(side.counts_LE.shape[0]) if side else 0,
        "experts": int(side.counts_LE.shape[1]) if side else 0,
        "top_k": side.top_k if side else 0,
        "tokens": {"forget": run.forget.tokens if run.forget else 0, "retain": run.retain.tokens if run.retain else 0},
        "target": sum(target.level for target in target_scores) / len(target_scores) if target_scores else None,
        "target_origin": ", ".join(dict.fromkeys(target.origin for target in target_scores)),
        "gold": {role: scores.mean_score(gold, role) for role in ("forget", "utility")} | {"name": run.gold}
        if gold
        else None,
    }


def escape_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no character of markup and no line separator survives."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def examples(run: RunData, role: str, main: str) -> list[tuple[str, list[tuple[str, str, float | None, bool]]]]:
    """Three questions of a task, of free text where there is any, with (model, answer, score, whether it wrote): the
    middle of each third, from what the model ``main`` answers worst to its best."""
    evaluations = run.evaluations()
    task = _task(evaluations[main], role) if main in evaluations else None
    if task is None:
        return []
    items = sorted(evaluations[main].items[task], key=lambda item: item_cells(item)[3] or 0.0)
    count = min(_EXAMPLES, len(items))
    by_id = {name: {each.get("id"): each for each in one.items.get(task) or []} for name, one in evaluations.items()}
    chosen = []
    for item in (items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)):
        own = {name: logs[item.get("id")] for name, logs in by_id.items() if item.get("id") in logs}
        cells = {name: item_cells(each) for name, each in own.items()}
        answers = [(name, c[2] or "nothing", c[3], "continuation" in own[name]) for name, c in cells.items()]
        chosen.append((item_cells(item)[1], answers))
    return chosen


def _task(evaluation: Evaluation, role: str) -> str | None:
    """The first task of a role with free text, else with any answers."""
    tasks = dict.fromkeys(score.task for score in evaluation.scores if score.role == role)
    first = {task: items[0] for task in tasks if (items := evaluation.items.get(task))}
    return next((task for kind in ("continuation", "predicted") for task in first if kind in first[task]), None)


def facts(run: RunData) -> list[tuple[str, str]]:
    """The model, data and machine: names and values, as far as they are known (settings: the configuration)."""
    job, side, path = run.job, run.retain or run.forget, str((run.config.get("model") or {}).get("path") or "")
    layers, experts = side.counts_LE.shape if side else (0, 0)
    kind = "CPU processes" if "cpu" in run.versions.get("torch", "") else "GPUs"
    settings = run.config.get("unlearning") or {}
    steps = job.get("step") or settings.get("steps")
    machine = {"world": f"{{}} {kind}", "ep": "expert-parallel {}", "zero_stage": "ZeRO stage {}"}
    parts_of = {
        "Model": [
            run.versions.get(BASE_MODEL, path.rpartition("/")[2]),
            str(job.get("family") or ""),
            f"{layers} layers of {experts} experts, {side.top_k} a token" if side else "",
        ],
        "Tokens": [f"{s.tokens:,} to {name}" for name, s in (("forget", run.forget), ("keep", run.retain)) if s],
        "Unlearning": [str(settings.get("forget_loss") or ""), f"{steps} steps" if steps else ""],
        "Retain weights": [f"{arm.title}: {arm.rule}" for arm in run.arms if arm.rule],
        "Machine": [text.format(job[key]) for key, text in machine.items() if job.get(key) is not None],
        "Seed": [str(run.config["seed"])] if "seed" in run.config else [],
    }
    texts = {name: ", ".join(part for part in parts if part) for name, parts in parts_of.items()}
    return [(name, text) for name, text in texts.items() if text]


def source_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The sources that gained and lost the most weight, with the length of their bars (-50 … 50)."""
    most = max((abs(row["gain"]) for row in rows), default=0.0) or 1.0
    rows = [row | {"bar": 50 * row["gain"] / most} for row in rows]
    return rows if len(rows) <= MOST_GAINED + MOST_LOST else rows[:MOST_GAINED] + rows[-MOST_LOST:]


def score_table(rows: list[dict[str, Any]], run: RunData) -> dict[str, Any]:
    """(task, metric) × models, the headline first, of each part the forget tasks first; and what the metrics mean."""
    values = {(row["model"], row["task"], row["metric"]): row for row in rows}
    models = list(dict.fromkeys(row["model"] for row in rows))
    heads = sorted(distinct_scores([{"scores": rows}]), key=lambda row: not row["headline"])
    lines = [
        row
        | {"arrow": ARROWS.get(row["direction"], "")}
        | {"cells": [(model, values.get((model, row["task"], row["metric"]))) for model in models]}
        for row in heads
    ]
    names = dict.fromkeys(row["metric"] for row in heads)
    return {
        "models": models,
        "lines": lines,
        "chance": any(row["chance"] is not None for row in heads),
        "baseline": run.baseline and run.baseline.title,
        "meanings": [(name, text) for name in names if (text := meaning(name)) is not None],
    }


def number(value: float | None) -> str:
    """A number for people: three or four significant digits, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if 10 <= abs(value) < 10_000:
        return f"{value:,.1f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def describe_change(value: float, low: float | None = None, high: float | None = None) -> str:
    """A difference with its sign and interval."""
    band = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
    return f"{value:+.3f}{band}".replace("-", "−")


def _warnings(run: RunData) -> list[tuple[str, str]]:
    """Every warning of the calibrations once, with the arms that it is about."""
    arms_of: dict[str, list[str]] = {}
    for arm in run.arms:
        for warning in (arm.calibration.diagnosis.get("warnings") or []) if arm.calibration else []:
            arms_of.setdefault(str(warning), []).append(arm.title)
    return [(text, ", ".join(arms)) for text, arms in arms_of.items()]


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files("trace_ds.reporting") / name).read_text(encoding="utf-8")
