"""Seeing what the routers decide: one adapter per kind of router, one hook per MoE layer.

Shape legend: T tokens of a forward pass (B·S, row-major), K = top-k, E experts.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

# AutoEP's router returns (scores [T, K], indices [T, K], tokens per expert [E]); every top-k router of transformers
# returns (logits [T, E], scores [T, K], indices [T, K]), sometimes followed by more.
AUTOEP_ROUTER = "TokenChoiceTopKRouter"
TRANSFORMERS_ROUTER = re.compile(r"Top[Kk]Router$")


def is_router(module: nn.Module) -> bool:
    return TRANSFORMERS_ROUTER.search(type(module).__name__) is not None


def routing_of(module: nn.Module, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [T, K] float, indices [T, K] integer) from the output of a router; ``ValueError`` if it is no such."""
    name = type(module).__name__
    scores, indices = output[:2] if name == AUTOEP_ROUTER else output[1:3]
    if scores.shape != indices.shape or indices.is_floating_point() or scores.dim() != 2:
        raise ValueError(f"{name} returned scores {tuple(scores.shape)} and indices {tuple(indices.shape)}")
    return scores, indices


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model in layer order (plain Hugging Face or converted by AutoEP), each once."""
    return [module for module in model.modules() if is_router(module)]


def meta_model(path: str | Path) -> nn.Module:
    """The model that a directory's ``config.json`` describes, without data; errors of transformers pass through."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def refusal(path: str | Path, experts: object) -> str | None:
    """Why routing cannot be counted in a model of a family without an entry, or None when it can.

    ``experts``: how many the configuration says.
    """
    try:
        model = meta_model(path)
    except Exception as error:  # the modelling code of any family may raise anything on a configuration it rejects
        return f"transformers cannot build it as a causal language model: {type(error).__name__}"
    routers = find_routers(model)
    if not routers:
        return "it has no router that is known"
    widths = {parameter.shape[0] for router in routers for parameter in router.parameters() if parameter.dim() == 2}
    if widths != {experts}:  # identity or shared experts among which the router chooses as well
        found = " or ".join(map(str, sorted(widths)))
        return f"its routers choose among {found} experts, its configuration has {experts}"
    if not hasattr(model, "model") or not hasattr(model.model, "layers"):
        return "its decoder layers are not at model.layers"
    return None


class RoutingRecorder:
    """What each router decided in the last forward pass; entry l is MoE layer l's."""

    def __init__(self, layers: int) -> None:
        self.indices_TK: list[torch.Tensor | None] = [None] * layers
        self.scores_TK: list[torch.Tensor | None] = [None] * layers

    def layer(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, indices) of one MoE layer; ``ValueError`` when no forward pass went through it."""
        scores, indices = self.scores_TK[number], self.indices_TK[number]
        if scores is None or indices is None:
            raise ValueError(f"MoE layer {number} was not run while recording")
        return scores, indices


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Record the routers' decisions of every forward pass inside the block (detached, on the device).

    Activation-checkpoint recomputation runs the hook again with the same result: entries are replaced, not added.
    """
    routers = find_routers(model)
    if not routers:
        raise ValueError(f"no known router in {type(model).__name__}")
    recorder = RoutingRecorder(len(routers))

    def hook_for(number: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            scores, indices = routing_of(module, output)
            recorder.scores_TK[number] = scores.detach()
            recorder.indices_TK[number] = indices.detach()

        return hook

    handles = [router.register_forward_hook(hook_for(number)) for number, router in enumerate(routers)]
    try:
        yield recorder
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def record_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The (first) output of ``module`` in the last forward pass inside the block, detached (a list of one)."""
    outputs: list[torch.Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        outputs[:] = [tensor.detach()]

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def moe_decoder_layers(model: nn.Module) -> list[int]:
    """The decoder layer index of each MoE layer, in order."""
    layers = []
    for name, module in model.named_modules():
        if is_router(module):
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            layers.append(numbers[0])
    return layers
