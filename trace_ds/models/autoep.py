"""Names of DeepSpeed's AutoEP (0.19.8), known in this module only (on disk: trace_ds/tensors/).

``deepspeed.initialize`` replaces every MoE layer of a known family. The layer that results has a router whose gate is a
linear layer of its own, and of the fused expert tensors the rows of this rank's experts, gate and up apart.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

AUTOEP_LAYER = "AutoEPMoELayer"
AUTOEP_ROUTER = "TokenChoiceTopKRouter"
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
    return {"expert_parallel": {"enabled": True, "autoep_size": ep, "preset_model": preset}} if ep > 1 else {}


@contextlib.contextmanager
def readable_recorders() -> Iterator[None]:
    """Make transformers' registry of output recorders accept class names as keys inside the block, as AutoEP needs.

    Since 5.23 its ``get`` and ``[]`` take the model itself, on which AutoEP of DeepSpeed 0.19.8 fails. A test in
    ``tests/distributed/test_autoep.py`` fails when a newer DeepSpeed makes this function unnecessary.
    """
    from transformers.utils import output_capturing

    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    kind = type(registry)

    class ByName(kind):  # type: ignore[misc, valid-type]
        def get(self, key: Any, *default: Any) -> Any:
            return dict.get(self, key, *default) if isinstance(key, str) else kind.get(self, key, *default)

        def __setitem__(self, key: Any, value: Any) -> None:
            (dict if isinstance(key, str) else kind).__setitem__(self, key, value)

    if kind is dict:
        yield
        return
    registry.__class__ = ByName
    try:
        yield
    finally:
        registry.__class__ = kind


def expert_parallel_size(ds_config: dict[str, Any]) -> int:
    """The expert-parallel size that a DeepSpeed configuration asks for."""
    return int(ds_config.get("expert_parallel", {}).get("autoep_size", 1))


def is_autoep_router(module: nn.Module) -> bool:
    """Whether it is AutoEP's router: it returns (scores [T, K], indices [T, K], tokens per expert [E])."""
    return type(module).__name__ == AUTOEP_ROUTER


def require_converted(model: nn.Module, layers: int, ep: int) -> None:
    """Assert that AutoEP converted all ``layers`` MoE layers if experts are sharded: it skips unknown ones silently."""
    converted = sum(type(module).__name__ == AUTOEP_LAYER for module in model.modules())
    if ep > 1 and converted != layers:
        raise AssertionError(f"AutoEP converted {converted} of {layers} MoE layers")


def make_gates_fp32(model: nn.Module) -> None:
    """Make the gates of a converted model compute in fp32, as those of the family do in transformers."""
    for router in filter(is_autoep_router, model.modules()):
        router.gate.__class__ = Fp32Linear


def source_name(name: str, parameters: Collection[str]) -> str:
    """The Hugging Face name, one of ``parameters``, of a parameter of a converted (or any other) model."""
    original = name
    for converted, source in SOURCES:
        if original not in parameters:
            original = original.replace(converted, source)
    assert original in parameters, f"{name} is no parameter of the model that was loaded"
    return original


def experts_here(model: nn.Module, name: str, parameter: Any) -> list[int]:
    """Global numbers of the experts in this rank's part of the fused expert tensor ``name``, in its order."""
    layer: Any = model.get_submodule(name.split(".experts.")[0])
    if type(layer).__name__ != AUTOEP_LAYER:
        return list(range(getattr(parameter, "ds_shape", parameter.shape)[0]))
    from deepspeed.checkpoint.autoep_affine import autoep_experts_for_rank

    return list(autoep_experts_for_rank(layer.expert_placement_descriptor, layer.ep_rank))
