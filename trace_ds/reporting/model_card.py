"""The model card of the unlearned model (Hugging Face layout): what was done, how well, and what is not claimed."""

from __future__ import annotations

import re
from pathlib import PurePath

import yaml

from trace_ds import __version__
from trace_ds.reporting import scores
from trace_ds.reporting.gather import BASE_MODEL, RunData

ARROWS = {"lower": "↓", "higher": "↑", "reference": "→"}


def model_card(run: RunData) -> str:
    """Markdown with YAML front matter. Texts from elsewhere are escaped: no markup of theirs takes effect."""
    model = str((run.config.get("model") or {}).get("path") or "")
    front: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["unlearning", "mixture-of-experts", "trace-ds"],
    }
    if model:
        front["base_model"] = run.versions.get(BASE_MODEL, PurePath(model).name).partition("@")[0]
    unlearning = run.config.get("unlearning") or {}
    loss, steps = (
        plain(str(unlearning.get("forget_loss", "not recorded"))),
        plain(str(unlearning.get("steps", "unknown"))),
    )
    rules = ", ".join(f"{arm.label}: {arm.rule}" for arm in run.arms if arm.rule)
    lines = ["---", yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(), "---", ""]
    lines += [f"# {plain(run.title)}", ""]
    lines += [
        f"Unlearned with trace_ds {__version__}. Forget loss: {loss}; steps: {steps}; retain weights: "
        f"{plain(rules) or 'not recorded'}.",
        "",
        plain(scores.honest_sentence(run)),
        "",
        "## Scores",
        "",
    ]
    evaluations = run.evaluations()
    rows = [(name, score) for name, evaluation in evaluations.items() for score in evaluation.scores]
    if rows:
        lines += ["| model | task | metric | value | n | chance |", "|---|---|---|---:|---:|---:|"]
        for name, score in rows:
            chance = "–" if score.chance is None else f"{score.chance:.3g}"
            count = "–" if score.n is None else str(score.n)
            metric = f"{plain(score.metric)} {ARROWS.get(score.direction, '')}"
            lines.append(f"| {plain(name)} | {plain(score.task)} | {metric} | {score.value:.4g} | {count} | {chance} |")
    else:
        lines.append("Not evaluated yet.")
    lines += [
        "",
        "## Limits",
        "",
        "- A low forget score on these tasks does not prove that the knowledge is gone: it may come back with other "
        "prompts, with fine-tuning, or under quantisation.",
        "- Scores are of one seed.",
        "- TRACE (Xie, Lin, Xiong, Zhang, Li; arXiv 2606.10338) is public as an abstract only; the equations used here "
        "are decisions of trace_ds.",
        "",
    ]
    if run.versions:
        lines += ["## Versions", "", *(f"- {plain(k)} {plain(v)}" for k, v in run.versions.items()), ""]
    return "\n".join(lines)


def plain(text: str) -> str:
    """Text without effect in Markdown or HTML: one line, markup characters escaped."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)
