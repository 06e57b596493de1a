"""What makes a directory of weights a model: configuration, tokenizer and a model card that says what was done.

:func:`model_card` writes every card, also the one of a report.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import write_json
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import hub_name, snapshot_name
from trace_ds.tensors.checkpoint import origin
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config
from trace_ds.tensors.torch_archive import WORDS

COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_METHOD = (
    "Re-weighting retain data by expert activation frequencies is TRACE (arXiv 2606.10338), of which only the abstract "
    "is public: the equations are trace_ds's own decisions. Uniform weights are the baseline."
)
LIMITS = (
    "Unlearning suppresses; it does not prove deletion. Relearning, quantisation or adversarial prompts may bring "
    "knowledge back. Evaluate before you rely on it.",
    "Knowledge close to a forget set may have been lost with it; compare with the base model.",
    "The base model's licence and limits apply to this model too.",
)


def companions(model: Path) -> list[Path]:
    """The files beside a model's weights that belong to it.

    Raises:
        UserError: one is a link that leaves the directory (and, in the hub's cache, the model's blobs).
    """
    paths = [model / name for name in (CONFIG_NAME, *COMPANIONS) if (model / name).is_file()]
    directory = model.resolve()
    places = [directory, *([directory.parents[1] / "blobs"] if snapshot_name(directory) else [])]
    for path in paths:
        if not any(path.resolve().is_relative_to(place.resolve()) for place in places):
            problem = f"{path.name} is a link that leaves the model's directory, to {path.resolve()}"
            raise UserError(problem, str(path), "put the file itself there")
    return paths


def copy_companions(base_model: Path, destination: Path, dtype: str) -> None:
    """``config.json`` with the new type, generation configuration and tokenizer of the base model."""
    config = read_model_config(base_model)
    if dtype in WORDS:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = str(WORDS[dtype]).removeprefix("torch.")
    # quantization_config: what is written here is never quantised; auto_map: code of the base model, which stays there.
    for key in ("_name_or_path", "quantization_config", "auto_map"):
        config.pop(key, None)
    write_json(destination / CONFIG_NAME, config)
    for path in companions(base_model):
        if path.name != CONFIG_NAME:
            shutil.copyfile(path, destination / path.name)
    tokenizer = destination / "tokenizer_config.json"
    settings = (
        read_object(tokenizer, "the tokenizer's configuration", "copy the model again") if tokenizer.is_file() else {}
    )
    if "auto_map" in settings:
        write_json(tokenizer, {key: value for key, value in settings.items() if key != "auto_map"})


def model_name(path: str | Path) -> str:
    """What to call a model: by its name on the hub, or in the cache of the hub's client; any other by its folder."""
    directory = Path(os.path.abspath(path))
    name = snapshot_name(directory) or hub_name(str(path))
    return name.id if name else directory.name


def model_card(
    title: str, base: str, tags: Sequence[str], about: Sequence[str], sections: Mapping[str, Sequence[str]]
) -> str:
    """Markdown with YAML front matter; sections without lines are left out.

    Args:
        base: of a hub model its name, of another what to call it; empty: not said.
        about, sections: lines; what comes from elsewhere went through :func:`plain_markdown`.
    """
    front = {"library_name": "transformers", "base_model": base, "tags": ["mixture-of-experts", "trace-ds", *tags]}
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value), "---", ""]
    lines += [f"# {plain_markdown(title)}", "", *about, ""]
    for heading, body in sections.items():
        lines += [f"## {heading}", "", *body, ""] if body else []
    return "\n".join(lines)


def plain_markdown(text: str) -> str:
    """Text without effect in Markdown or HTML: one line, markup characters escaped."""
    flat = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", flat)


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = ("", "")) -> list[str]:
    """The lines of a table."""
    body = [[plain_markdown(f"{cell:.6g}" if isinstance(cell, float) else str(cell)) for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body)]


def card_of_conversion(name: str, base_model: Path, report: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The card of a converted model.

    Args:
        name: what to call it where no run does.
        report: of the conversion.
        facts: of the run that made the weights, all optional: name, base_model, method (settings in words).
    """
    base = str(facts.get("base_model") or model_name(base_model))
    method = facts.get("method") or {}
    about = [f"Weights of a training job that started from {plain_markdown(base)}, converted by trace_ds."]
    unknown = ["How these weights were trained, and on what, is not known here: ask who made them."]
    if method:
        about, unknown = [f"{plain_markdown(base)} after machine unlearning with trace_ds. {_METHOD}"], []
    weights = {"source": origin(report["source"]), "type": report["dtype"], "parameters": report["parameters"]}
    sections = {
        "Method": table(method.items()) if method else [],
        "Weights": [*table(weights.items()), "", "`conversion.json` lists every file of weights with its SHA-256."],
        "Warnings": [f"- {plain_markdown(entry)}" for entry in (*report["warnings"], *report["notes"])],
        "Limits": [f"- {line}" for line in (*unknown, *LIMITS)],
    }
    return model_card(str(facts.get("name") or name), base, ["unlearning"] if method else [], about, sections)
