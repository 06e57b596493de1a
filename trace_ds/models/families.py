"""MoE model families: one entry for each that supports expert parallelism, one rule for all others.

To add a family: docs/add_a_family.md. A model of a family without an entry is run as it is in transformers when its
routers are recognisable (:mod:`trace_ds.models.routers`): without expert parallelism, sharded by ZeRO-3 instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.tensors.model_files import ModelFiles, model_fingerprint, read_model_directory

# How the families spell the number of routed experts and top-k; the first name found counts (hub files and files that
# transformers 5 saved may differ).
EXPERTS_KEYS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
LOGIT_KEYS = ("logits_scaling", "logit_scale", "final_logit_softcapping", "lm_head_multiplier")
TOP_K_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk")


@dataclass(frozen=True)
class Family:
    """How one ``model_type`` spells its MoE.

    Attributes:
        model_type: of the Hugging Face configuration.
        autoep_preset: DeepSpeed AutoEP's preset; None: no expert parallelism.
        fp32_gate: transformers computes the router's logits in fp32 whatever the model's type; AutoEP does not, so
            its gates are made to.
    """

    model_type: str
    autoep_preset: str | None = None
    fp32_gate: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("mixtral", autoep_preset="mixtral"),
        Family("qwen2_moe", autoep_preset="qwen3_moe"),
        Family("qwen3_moe", autoep_preset="qwen3_moe"),
        # OLMoE's router and expert tensors have Qwen3-MoE's names and mathematics (norm_topk_prob is read from its
        # configuration), so the same preset converts it exactly.
        Family("olmoe", autoep_preset="qwen3_moe"),
        Family("deepseek_v2", autoep_preset="deepseek_v2", fp32_gate=True),
        Family("deepseek_v3", autoep_preset="deepseek_v3", fp32_gate=True),
        # The text model alone; three of its four layers carry a state from token to token.
        Family("qwen3_5_moe_text", autoep_preset="qwen3_5_moe"),
    )
}


@dataclass(frozen=True)
class ModelInfo:
    """Facts about a model directory that are known before any weight is loaded."""

    path: Path
    family: Family
    config: dict[str, Any]
    experts: int
    top_k: int
    decoder_layers: int
    fingerprint: str


def inspect_model(path: str | Path) -> ModelInfo:
    """Read and check the MoE model in the directory ``path``; raises :class:`UserError` where it cannot be used."""
    files = read_model_directory(Path(path))
    config = files.config
    model_type = str(config.get("model_type"))
    experts_key = next((key for key in EXPERTS_KEYS if key in config), None)
    family = FAMILIES.get(model_type)
    if family is None:
        if experts_key is None and "text_config" in config:
            problem, fix = f"{model_type!r} is a text model among others", "save it alone: AutoModelForCausalLM."
            raise UserError(problem, str(files.path), f"{fix}from_pretrained(MODEL).save_pretrained(DIRECTORY)")
        if experts_key is None:
            raise _unsupported(files, f"the model (family {model_type!r}) is not a Mixture-of-Experts model")
        from trace_ds.models.routers import find_routing_problem

        if reason := find_routing_problem(files.path, config[experts_key]):
            raise _unsupported(files, f"the model family {model_type!r} is not supported ({reason})")
        family = Family(model_type)
    top_k_key = next((key for key in TOP_K_KEYS if key in config), TOP_K_KEYS[0])
    experts, top_k = config.get(experts_key or EXPERTS_KEYS[0]), config.get(top_k_key)
    where = str(files.path / "config.json")
    if not isinstance(experts, int) or not isinstance(top_k, int) or experts < 1 or top_k < 1:
        problem = f"{experts_key or EXPERTS_KEYS[0]} is {experts!r} and {top_k_key} is {top_k!r}"
        raise UserError(problem, where, "copy the model again")
    if top_k > experts:
        problem = f"{top_k_key} {top_k} is larger than the number of experts ({experts})"
        raise UserError(problem, where, "correct it")
    layers = files.config.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise UserError(f"num_hidden_layers is {layers!r}", where, "copy the model again")
    return ModelInfo(files.path, family, files.config, experts, top_k, layers, model_fingerprint(files))


def _unsupported(files: ModelFiles, problem: str) -> UserError:
    fix = f"use a model of one of the families {', '.join(sorted(FAMILIES))}, or another with a top-k router"
    return UserError(problem, str(files.path), fix)


def largest_expert_parallel_size(model: Mapping[str, Any], ranks: int, ranks_per_node: int) -> int:
    """Return the largest EP size that divides the experts and the world size and fits in one node; 1 for a family
    without expert parallelism. (Across nodes every layer would send its tokens over the network.)

    Args:
        model: its ``config.json``.
    """
    family = FAMILIES.get(str(model.get("model_type")))
    experts = next((model[key] for key in EXPERTS_KEYS if isinstance(model.get(key), int)), 1)
    if family is None or family.autoep_preset is None:
        return 1
    return max(size for size in range(1, ranks_per_node + 1) if ranks % size == 0 and experts % size == 0)


def check_expert_parallel(
    info: ModelInfo,
    ep: int,
    world_size: int,
    key: str = "distributed.ep",
) -> None:
    """Check that the family supports expert parallelism and that ``ep`` divides the experts and the world size.

    Args:
        key: configuration key to name in errors.
    """
    if ep > 1 and info.family.autoep_preset is None:
        problem = f"the model family {info.family.model_type!r} has no expert parallelism"
        raise UserError(f"{problem} (its experts are sharded by ZeRO-3 instead)", key, "use --ep 1")
    if info.experts % ep:
        divisors = [size for size in range(1, info.experts + 1) if info.experts % size == 0]
        problem = f"expert-parallel size {ep} does not divide the {info.experts} experts of the model"
        raise UserError(problem, key, f"use one of {divisors}")
    if world_size % ep:
        fix = f"use a divisor of {world_size}, or start a multiple of {ep} processes (--nproc)"
        raise UserError(f"expert-parallel size {ep} does not divide the world size {world_size}", key, fix)


def require_plain_logits(info: ModelInfo, key_in_config: str) -> None:
    """Refuse models that scale or cap their logits after the LM head, for settings that need token losses.

    Token losses are computed from the head's weight in chunks, so a scale or a cap after it would be missed.
    ``key_in_config``: the setting to name in the error.
    """
    for key in LOGIT_KEYS:
        value = info.config.get(key)
        if value not in (None, 1, 1.0):
            raise UserError(
                f"{key} is {value} in this model, which token losses do not support",
                key_in_config,
                "use the forget loss rmu, and statistics.nll: false",
            )
