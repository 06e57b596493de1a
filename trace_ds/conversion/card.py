"""What makes a directory of weights a model: configuration, tokenizer and a model card that says what was done."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_ds.run.files import write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import hub_name, snapshot_name
from trace_ds.tensors.checkpoint import origin

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
DTYPE_CONFIG = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def copy_companions(base_model: Path, destination: Path, dtype: str) -> None:
    """``config.json`` with the new type, generation configuration and tokenizer of the base model."""
    config = read_object(base_model / "config.json", "the model's configuration", "copy the model again")
    if dtype in DTYPE_CONFIG:
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = DTYPE_CONFIG[dtype]
    # quantization_config: what is written here is never quantised; auto_map: code of the base model, which stays there.
    for key in ("_name_or_path", "quantization_config", "auto_map"):
        config.pop(key, None)
    write_json(destination / "config.json", config)
    for name in COMPANIONS:
        if (base_model / name).is_file():
            shutil.copyfile(base_model / name, destination / name)
    tokenizer = destination / "tokenizer_config.json"
    if tokenizer.is_file() and b'"auto_map"' in tokenizer.read_bytes():
        settings = read_object(tokenizer, "the tokenizer's configuration", "copy the model again")
        write_json(tokenizer, {key: value for key, value in settings.items() if key != "auto_map"})


def model_name(directory: Path) -> str:
    """What to call the model of a directory: its name, or that on the hub where it is known."""
    name = snapshot_name(directory) or hub_name(str(directory))
    return name.id if name else directory.name


def write_card(
    base_model: Path,
    destination: Path,
    report: Mapping[str, Any],
    source: dict[str, Any],
    dtype: str,
    facts: Mapping[str, Any] | None,
) -> None:
    """``README.md``: base model, how the weights were made and converted, calibration summary, limits.

    ``facts`` (all optional): name, method (dict of settings in words), calibration (the summary of the calibration
    artefact), experts (table of forget-critical experts).
    """
    facts = facts or {}
    name = facts.get("name") or destination.name
    base = facts.get("base_model") or model_name(base_model)
    lines = ["---", "library_name: transformers", f"base_model: {json.dumps(str(base))}"]
    lines += ["tags:", "- mixture-of-experts"]
    if facts.get("method"):
        lines += ["- unlearning"]
    lines += ["---", "", f"# {str(name).split('.tmp-')[0]}", ""]
    if facts.get("method"):
        lines += [
            *unlearned(str(base), str(facts["method"].get("weight rule", ""))),
            "",
            "## Method",
            "",
            *_table(facts["method"]),
            "",
        ]
    else:
        lines += [f"Weights of a training job that started from `{base}`, converted by trace_ds.", ""]
    if facts.get("calibration"):
        lines += ["## Calibration", "", *_table(facts["calibration"]), ""]
    lines += [
        "## Weights",
        "",
        *_table(
            {
                "source": origin(source),
                "type": dtype,
                "tensors": len(report["tensors"]),
                "parameters": report["parameters"],
            }
        ),
        "",
        "`conversion.json` lists every tensor with its shape and SHA-256.",
        "",
    ]
    for heading, entries in (("Warnings", report["warnings"]), ("Notes", report["notes"])):
        if entries:
            lines += [f"## {heading}", "", *(f"- {entry}" for entry in entries), ""]
    lines += ["## Limits", "", *(f"- {line}" for line in _limits(bool(facts.get("method")))), ""]
    write_text(destination / "README.md", "\n".join(lines))


def _limits(of_a_run: bool) -> list[str]:
    known = [] if of_a_run else ["How these weights were trained, and on what, is not known here: ask who made them."]
    return [
        *known,
        "Unlearning suppresses; it does not prove deletion. Relearning, quantisation or adversarial prompts may bring "
        "knowledge back. Evaluate before you rely on it.",
        "Knowledge close to a forget set may have been lost with it; compare with the base model.",
        "The base model's licence and limits apply to this model too.",
    ]


def unlearned(base: str, rule: str) -> list[str]:
    """What was done to ``base``, in two sentences; a baseline is called a baseline."""
    if rule.startswith("uniform"):
        return [f"`{base}` after machine unlearning with trace_ds, with uniform retain weights (the baseline)."]
    if rule.startswith("sources"):
        return [f"`{base}` after machine unlearning with trace_ds, with retain weights by the sources of documents."]
    return [
        f"`{base}` after machine unlearning with trace_ds: the retain data re-weighted by expert activation "
        "frequencies (TRACE, arXiv 2606.10338).",
        "Only the abstract of that paper is public; the equations behind it are trace_ds's own decisions.",
    ]


def _table(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| | |", "|---|---|"]
    for key, value in rows.items():
        text = f"{value:.6g}" if isinstance(value, float) else str(value)
        cells = (str(cell).replace("|", "\\|").replace("\n", " ") for cell in (key, text))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
