"""The MoE model families we know: one small entry each, everything family-specific in one place.

To add a family: one entry here (its ``model_type``, the configuration keys of its expert count and top-k, DeepSpeed's
AutoEP preset), one router class in :mod:`trace_ds.models.routers` if its router is new, and one line in the
parametrised tests, which compare its counts with its own router's output at every expert-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.models.files import ModelFiles, read_model_directory
from trace_ds.run.files import canonical_json, sha256_text

FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 1 << 16


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` spells its MoE.

    Attributes:
        model_type: of the Hugging Face configuration.
        experts_keys: names of the number of routed experts in the configuration (hub files and files that
            transformers 5 saved may differ); the first one found counts.
        top_k_key: name of top-k.
        autoep_preset: DeepSpeed AutoEP's preset.
    """

    model_type: str
    experts_keys: tuple[str, ...]
    top_k_key: str
    autoep_preset: str


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mixtral", ("num_local_experts",), "num_experts_per_tok", "mixtral"),
        Family("qwen3_moe", ("num_experts", "num_local_experts"), "num_experts_per_tok", "qwen3_moe"),
        # OLMoE's router and expert tensors have Qwen3-MoE's names and mathematics (norm_topk_prob is read from its
        # configuration), so the same preset converts it exactly.
        Family("olmoe", ("num_experts", "num_local_experts"), "num_experts_per_tok", "qwen3_moe"),
    )
}


@dataclass(frozen=True)
class ModelInfo:
    """What a job needs to know of a model directory before it loads a weight."""

    path: Path
    family: Family
    config: dict[str, Any]
    experts: int
    top_k: int
    decoder_layers: int
    fingerprint: str


def inspect_model(path: str | Path) -> ModelInfo:
    """Check that ``path`` is a whole MoE model of a known family; :class:`UserError` says what is wrong otherwise."""
    files = read_model_directory(Path(path))
    model_type = str(files.config.get("model_type"))
    family = FAMILIES.get(model_type)
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        looks_moe = any("expert" in key for key in files.config)
        raise UserError(
            f"the model family {model_type!r} is not supported"
            if looks_moe
            else f"the model (family {model_type!r}) is not a Mixture-of-Experts model",
            str(files.path),
            f"use a model of one of the families {supported}",
        )
    experts = next((files.config[key] for key in family.experts_keys if key in files.config), None)
    top_k = files.config.get(family.top_k_key)
    where = str(files.path / "config.json")
    if not isinstance(experts, int) or not isinstance(top_k, int) or experts < 1 or top_k < 1:
        raise UserError(
            f"{family.experts_keys[0]} is {experts!r} and {family.top_k_key} is {top_k!r}",
            where,
            "copy the model again",
        )
    if top_k > experts:
        raise UserError(
            f"{family.top_k_key} {top_k} is larger than the number of experts ({experts})",
            where,
            "correct it",
        )
    layers = int(files.config["num_hidden_layers"])
    return ModelInfo(files.path, family, files.config, experts, top_k, layers, model_fingerprint(files))


def check_expert_parallel(info: ModelInfo, ep: int, world_size: int) -> None:
    """The expert-parallel size must divide the experts and the world size."""
    if info.experts % ep:
        divisors = [size for size in range(1, info.experts + 1) if info.experts % size == 0]
        raise UserError(
            f"expert-parallel size {ep} does not divide the {info.experts} experts of the model",
            "distributed.ep",
            f"use one of {divisors}",
        )
    if world_size % ep:
        raise UserError(
            f"expert-parallel size {ep} does not divide the world size {world_size}",
            "distributed.ep",
            f"use a divisor of {world_size}, or start a multiple of {ep} processes (--nproc)",
        )


def model_fingerprint(model: ModelFiles | str | Path) -> str:
    """SHA-256 that tells models apart without reading a hundred gigabytes.

    Covers the configuration, every tensor's name, type and shape, and of each file :data:`FINGERPRINT_BLOCKS` evenly
    spaced blocks of 64 KiB: whole small files, a sample of large ones (training changes every block).
    """
    files = model if isinstance(model, ModelFiles) else read_model_directory(Path(model))
    config = {key: value for key, value in files.config.items() if key not in ("_name_or_path", "transformers_version")}
    tensors = {name: [entry.dtype, list(entry.shape)] for name, entry in files.tensors.items()}
    blocks = {name: sample_sha256(files.path / name) for name in sorted(files.files)}
    return sha256_text(canonical_json({"config": config, "tensors": tensors, "blocks": blocks}))


def sample_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of :data:`FINGERPRINT_BLOCKS` blocks of it (of the whole, when it is small)."""
    import hashlib

    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        if size <= FINGERPRINT_BLOCKS * FINGERPRINT_BLOCK_BYTES:
            digest.update(handle.read())
        else:
            for number in range(FINGERPRINT_BLOCKS):
                handle.seek((size - FINGERPRINT_BLOCK_BYTES) * number // (FINGERPRINT_BLOCKS - 1))
                digest.update(handle.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()
