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
from collections.abc import Sequence
from importlib import resources
from typing import Any

from trace_ds.evaluation.metrics import meaning
from trace_ds.evaluation.table import ARROWS, rows_of
from trace_ds.reporting import scores
from trace_ds.reporting.compare import averaged, label
from trace_ds.reporting.examples import broken_by_model, examples, perplexity_task
from trace_ds.reporting.gather import BASE_MODEL, Arm, RunData
from trace_ds.reporting.tables import Table
from trace_ds.reporting.verdict import Verdict

SCRIPTS = ("base.js", "charts.js", "heatmap.js", "page.js")
MAX_TRAINING_ROWS = 4000
MAX_QUESTIONS = 1500
MAX_LIST_ROWS = 60
MOST_GAINED, MOST_LOST = 10, 4  # sources of the retain text that the page names


def render(
    runs: Sequence[RunData],
    told: Verdict,
    tables: dict[str, Table],
    pictures: list[str],
    compared: Sequence[RunData],
    notes: list[str],
) -> str:
    """The page as text.

    Args:
        runs: the run, and those that repeat it with other seeds.
        pictures: the PNG files beside it.
        compared: the other runs in the tables.
        notes: why further runs are not.
    """
    run = runs[0]
    names = titles([run, *compared])
    task = perplexity_task(run)
    models = list(run.evaluations())
    main = next((arm.label for arm in run.arms if arm.is_trace and arm.label in models), models[-1] if models else "")
    fluency = broken_by_model(run)
    return render_template(
        "page.html.j2",
        SCRIPTS,
        payload(averaged(runs), tables, names),
        names,
        title=run.title,
        run=run,
        verdict=told,
        tables=tables,
        pictures=pictures,
        notes=notes,
        repeats=[each.name for each in runs] if len(runs) > 1 else [],
        compared=[each.name for each in compared],
        examples=[
            (role, title, found)
            for role, title in (("forget", "To be forgotten"), ("utility", "To be kept"))
            if (found := examples(run, role, main))
        ],
        models=models,
        main=main,
        fluency=fluency,
        perplexity=task and (task, {name: each.value(task, "perplexity") for name, each in run.evaluations().items()}),
        facts=facts(runs),
        score_table=score_table(tables.get("scores"), averaged(runs)),
        attack_table=attack_table(tables.get("attacks")),
        meanings=meanings(tables.get("scores")),
        source_rows=source_rows(tables.get("sources")),
        several_sources=len(set(tables["sources"].columns["arm"])) > 1 if "sources" in tables else False,
        warnings=_warnings(run),
        config_text=_config_text(run),
        limit=MAX_LIST_ROWS,
    )


def render_template(
    template: str, scripts: Sequence[str], data: dict[str, Any], names: dict[str, str], **values: Any
) -> str:
    """A page of a template that extends ``base.html.j2``, with the style, these scripts and their data in it.

    ``names``: what people read instead of a model's label.
    """
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
    environment.filters["points"] = lambda value: "–" if value is None else f"{100 * value:.1f}"
    environment.filters["gain"] = lambda value, low, high: change(
        100 * value, low and 100 * low, high and 100 * high, 1
    )
    environment.filters["change"] = change
    environment.filters["tied"] = lambda text: re.sub(
        r"\[[^\]]*\]", lambda found: found[0].replace(" ", "\u00a0"), text
    )
    environment.filters["model"] = lambda label: ", ".join(names.get(each, each) for each in label.split(", "))
    return environment.get_template(template).render(
        **values,
        style=style,
        script=script,
        style_hash=_csp_hash(style),
        script_hash=_csp_hash(script),
        data=escape_json(data),
    )


def titles(runs: Sequence[RunData]) -> dict[str, str]:
    """What people read instead of an arm's label: that it is TRACE is said."""
    return {label(runs, run, arm.label): label(runs, run, arm.title) for run in runs for arm in run.arms}


def payload(run: RunData, tables: dict[str, Table], names: dict[str, str]) -> dict[str, Any]:
    """What the script reads: the tables by column (long ones thinned, and said so) and a few facts."""
    side = run.retain or run.forget
    most: dict[str, tuple[int | None, str]] = {
        "training": (MAX_TRAINING_ROWS, "rows"),
        "items": (MAX_QUESTIONS, "questions"),
    }
    goal = scores.targets(run)
    return {
        "name": run.name,
        "names": names,
        "tables": {name: embedded(table, *most.get(name, (None, ""))) for name, table in sorted(tables.items())},
        "layers": int(side.counts_LE.shape[0]) if side else 0,
        "experts": int(side.counts_LE.shape[1]) if side else 0,
        "top_k": side.top_k if side else 0,
        "tokens": {"forget": run.forget.tokens if run.forget else 0, "retain": run.retain.tokens if run.retain else 0},
        "target": sum(target.level for target in goal) / len(goal) if goal else None,
        "target_origin": ", ".join(dict.fromkeys(target.origin for target in goal)),
        "gold": _point(run, run.gold),
    }


def embedded(table: Table, most: int | None = None, what: str = "") -> dict[str, Any]:
    """A table as the script reads it: by column, at most so many rows (``what`` they are)."""
    stride = max(1, -(-len(table) // most)) if most else 1
    thinned = f"{len(range(0, len(table), stride))} of {len(table)} {what}, evenly spaced" if stride > 1 else None
    columns = {key: values[::stride] for key, values in table.columns.items()}
    return {"title": table.title, "columns": columns, "thinned": thinned}


def escape_json(value: Any) -> str:
    """JSON that is safe inside a ``<script>`` element: no character of markup and no line separator survives."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def facts(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """What was run: names and values, as far as they are known."""
    run = runs[0]
    job, config, side = run.job, run.config, run.retain or run.forget
    settings = config.get("unlearning") or {}
    path = (config.get("model") or {}).get("path")
    model = [run.versions.get(BASE_MODEL, str(path).rpartition("/")[2] if path else ""), str(job.get("family") or "")]
    if side is not None:
        layers, experts = side.counts_LE.shape
        model.append(f"{layers} layers of {experts} experts, {side.top_k} a token")
    texts = [f"{each.tokens:,} to {name}" for name, each in (("forget", run.forget), ("keep", run.retain)) if each]
    losses = [str(settings[key]) for key in ("forget_loss", "retain_loss") if settings.get(key)]
    learning = (settings.get("optimizer") or {}).get("lr")
    strengths = [
        f"{name} {value:g}"
        for name, value in (
            ("forget γ", settings.get("gamma")), ("retain α", settings.get("alpha")), ("learning rate", learning),
        )
        if isinstance(value, (int, float))
    ]  # fmt: skip
    steps = [f"{settings['steps']:,}"] if settings.get("steps") else []
    if settings.get("forget_rows") and settings.get("retain_rows"):
        steps.append(f"of {settings['forget_rows']} rows to forget and {settings['retain_rows']} to keep")
    times = [
        f"{arm.title} {arm.step_s * len(arm.log):,.0f} s ({arm.step_s:.2g} s a step)" for arm in run.arms if arm.step_s
    ]
    kind = "CPU processes" if "cpu" in run.versions.get("torch", "") else "GPUs"
    machine = [f"{job['world']} {kind}"] if job.get("world") else []
    machine += [f"expert-parallel {job['ep']}"] if job.get("ep") else []
    machine += [f"ZeRO stage {job['zero_stage']}"] if job.get("zero_stage") is not None else []
    found = {
        "Model": model,
        "Tokens": texts,
        "Losses": losses,
        "Strengths": strengths,
        "Retain weights": [f"{arm.title}: {_weights_of(run, arm)}" for arm in run.arms if arm.rule],
        "Steps": [" ".join(steps)],
        "Training time": times,
        "Machine": machine,
        "Seeds" if len(runs) > 1 else "Seed": [str(each.config["seed"]) for each in runs if "seed" in each.config],
    }
    told = {name: ", ".join(part for part in parts if part) for name, parts in found.items()}
    return [(name, text) for name, text in told.items() if text]


def _weights_of(run: RunData, arm: Arm) -> str:
    """The rule of an arm, and whether its weights multiply losses or draw rows."""
    changes = (run.config.get("variants") or {}).get(arm.label) or {}
    way = changes.get("unlearning.apply", (run.config.get("unlearning") or {}).get("apply"))
    told = {"sampling": "rows drawn by weight", "loss": "losses times weight"}.get(str(way), "")
    return f"{arm.rule} ({told})" if told and arm.rule != "uniform" else str(arm.rule)


def source_rows(table: Table | None) -> list[dict[str, Any]]:
    """The sources that gained and lost the most weight, with the length of their bars (-50 … 50)."""
    rows = table.rows() if table is not None else []
    most = max((abs(row["gain"]) for row in rows), default=0.0) or 1.0
    rows = [row | {"bar": 50 * row["gain"] / most} for row in rows]
    return rows if len(rows) <= MOST_GAINED + MOST_LOST else rows[:MOST_GAINED] + rows[-MOST_LOST:]


def score_table(table: Table | None, run: RunData) -> dict[str, Any] | None:
    """(task, metric) × models, forget tasks first."""
    if table is None:
        return None
    rows = table.rows()
    heads = sorted(rows_of([{"scores": rows}]), key=lambda row: not row["headline"])
    values = {(row["model"], row["task"], row["metric"]): row for row in rows}
    models = list(dict.fromkeys(table.columns["model"]))
    lines = [
        row
        | {"arrow": ARROWS.get(row["direction"], "")}
        | {"cells": [(model, values.get((model, row["task"], row["metric"]))) for model in models]}
        for row in heads
    ]
    chance = any(row["chance"] is not None for row in heads)
    return {"models": models, "lines": lines, "chance": chance, "baseline": run.baseline and run.baseline.label}


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
    return {"models": models, "lines": lines}


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
    if 10 <= abs(value) < 10_000:
        return f"{value:,.1f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 or value == 0 else f"{value:.4g}"


def change(value: float, low: float | None = None, high: float | None = None, digits: int = 3) -> str:
    """A difference with its sign and interval."""
    band = "" if low is None or high is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    return f"{value:+.{digits}f}{band}".replace("-", "−")


def _point(run: RunData, name: str) -> dict[str, float | None] | None:
    if name not in run.references:
        return None
    found = {role: scores.mean_score(run.references[name], role) for role in ("forget", "utility")}
    more = {f"utility_{metric}": scores.mean_score(run.references[name], "utility", metric) for metric in
            scores.utility_metrics(run)}  # fmt: skip
    return {**found, **more}


def _warnings(run: RunData) -> list[tuple[str, str]]:
    """Every warning of the calibrations once, with the arms that it is about."""
    found: dict[str, list[str]] = {}
    for arm in run.arms:
        for warning in (arm.calibration.diagnosis.get("warnings") or []) if arm.calibration else []:
            found.setdefault(str(warning), []).append(arm.title)
    return [(text, ", ".join(arms)) for text, arms in found.items()]


def _config_text(run: RunData) -> str:
    import yaml

    return str(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True, width=100)) if run.config else ""


def _csp_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _asset(name: str) -> str:
    return (resources.files("trace_ds.reporting") / name).read_text(encoding="utf-8")
