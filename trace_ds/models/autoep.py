"""What DeepSpeed's AutoEP calls things: the one place that knows (0.19.8; on disk: trace_ds/tensors/).

``deepspeed.initialize`` replaces every MoE layer of a known family. The layer that results has a router whose gate is a
linear layer of its own, and of the fused expert tensors the rows of this rank's experts, gate and up apart.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import nn

LAYER = "AutoEPMoELayer"
ROUTER = "TokenChoiceTopKRouter"
# Names in an MoE layer -> the source's. DeepSeek's own shared experts have the name that AutoEP gives Qwen's.
SOURCES = ((".experts.w1", ".experts.gate_up_proj"), (".experts.w3", ".experts.gate_up_proj"),
           (".experts.w2", ".experts.down_proj"), (".router.gate.", ".gate."),
           (".shared_experts.", ".shared_expert."), (".shared_experts_gate.", ".shared_expert_gate."))  # fmt: skip


class Fp32Linear(nn.Linear):
    """The gate of the families that compute router logits in fp32 whatever the type of the weights (DeepSeek)."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(hidden.float(), self.weight.float(), bias)


def settings(ep: int, preset: str | None) -> dict[str, Any]:
    """The section of a DeepSpeed configuration that shards experts over ``ep`` ranks; none where ``ep`` is 1."""
    section = {"enabled": True, "autoep_size": ep, "preset_model": preset}
    return {"expert_parallel": section} if ep > 1 else {}


def size(ds_config: dict[str, Any]) -> int:
    """The expert-parallel size that a DeepSpeed configuration asks for."""
    return int(ds_config.get("expert_parallel", {}).get("autoep_size", 1))


def is_router(module: nn.Module) -> bool:
    """Whether it is AutoEP's router: it returns (scores [T, K], indices [T, K], tokens per expert [E])."""
    return type(module).__name__ == ROUTER


def shared_parameters(model: nn.Module) -> dict[nn.Parameter, int]:
    """The weights of sharded experts -> over how many ranks: each of them sends its tokens there."""
    layers: list[Any] = [module for module in model.modules() if type(module).__name__ == LAYER]
    return {p: layer.ep_size for layer in layers for p in layer.parameters() if not getattr(p, "allreduce", True)}


def require_converted(model: nn.Module, layers: int, ep: int) -> None:
    """Every one of the ``layers`` MoE layers must have been converted when experts are sharded: AutoEP skips unknown
    families silently."""
    converted = sum(type(module).__name__ == LAYER for module in model.modules())
    if ep > 1 and converted != layers:
        raise AssertionError(f"AutoEP converted {converted} of {layers} MoE layers")


def make_gates_fp32(model: nn.Module) -> None:
    """Let the gates of a converted model compute as those of the family do in transformers."""
    for router in filter(is_router, model.modules()):
        router.gate.__class__ = Fp32Linear


def source_name(name: str, parameters: Collection[str]) -> str:
    """The Hugging Face name, one of ``parameters``, of a parameter of a converted (or any other) model."""
    found = name
    for converted, source in SOURCES:
        if found not in parameters:
            found = found.replace(converted, source)
    assert found in parameters, f"{name} is no parameter of the model that was loaded"  # it would be held, silently
    return found


def experts_here(model: nn.Module, name: str, parameter: Any) -> list[int]:
    """Global numbers of the experts in this rank's part of the fused expert tensor ``name``, in its order."""
    layer: Any = model.get_submodule(name.split(".experts.")[0])
    if type(layer).__name__ != LAYER:
        return list(range(getattr(parameter, "ds_shape", parameter.shape)[0]))
    from deepspeed.checkpoint.autoep_affine import autoep_experts_for_rank

    return list(autoep_experts_for_rank(layer.expert_placement_descriptor, layer.ep_rank))
