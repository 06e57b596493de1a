"""What looks like a model directory and cannot be read as one: adapters, checkpoints of FSDP, GGUF, quantised weights.

Each is refused in one line that says what it is and how to make a model of it. Every reader of a model directory comes
through here (:func:`trace_ds.tensors.model_files.read_model_config`), so all subcommands say the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError

FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")  # transformers, llm-compressor, MLX
SAVE = "AutoModelForCausalLM.from_pretrained(MODEL{}).save_pretrained(DIRECTORY)"
DEQUANTISE = {
    "fp8": SAVE.format(", quantization_config=FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": SAVE.format(", quantization_config=Mxfp4Config(dequantize=True)"),
    "bitsandbytes": SAVE.format("").replace(".save", ".dequantize().save"),
}


def refuse_other_kinds(path: Path) -> None:
    """Raise :class:`UserError` where the names of its files show that ``path`` is no model directory."""
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        what = "this is a GGUF model: weights that llama.cpp reads, quantised as a rule"
        fix = f"use the model that it was made from, or dequantise it: {SAVE.format(', gguf_file=FILE')}"
    elif (path / "adapter_config.json").is_file():
        what = "this is a PEFT adapter (adapter_config.json), not a whole model"
        fix = (
            "merge it: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(DIRECTORY)"
        )
    elif (found := next((at for at in (path, *path.glob("*_fsdp_*")) if (at / ".metadata").is_file()), None)) or (
        found := next(iter(path.glob("pytorch_model_fsdp*")), None)
    ):
        what = f"this is a checkpoint of FSDP (torch.distributed.checkpoint, {found.name}), not a whole model"
        fix = (
            "consolidate it: `accelerate merge-weights CHECKPOINT DIRECTORY`, with config.json and tokenizer beside it"
        )
    else:
        return
    raise UserError(what, str(path), fix)


def quantisation(config: Mapping[str, Any]) -> str:
    """How the weights are quantised by the model's configuration; empty: they are not."""
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    for part in parts:
        for key in QUANTISATION_KEYS:
            if value := part.get(key):
                known = value if isinstance(value, dict) else {}
                return str(known.get("quant_method") or known.get("quant_algo") or key)[:40]
    return ""


def is_packed(name: str, dtype: str, shape: Sequence[int]) -> bool:
    """Whether a tensor holds quantised weights: a matrix of small integers or floats, or integers where the
    name says weight."""
    if dtype in FLOATS or name.endswith(("bias", "mask")):
        return False
    return name.endswith(("weight", "_proj", "_packed")) or (len(shape) > 1 and dtype not in ("I64", "I32", "BOOL"))


def quantised(path: Path, scheme: str) -> UserError:
    """The refusal of a model with quantised weights."""
    fix = "use the model that it was quantised from, in bf16, fp16 or fp32"
    if scheme in DEQUANTISE:
        fix += f"; or dequantise it: {DEQUANTISE[scheme]}"
    return UserError(f"its weights are quantised ({scheme})", str(path), fix)
