"""Seeing what the routers decide: one adapter per router class, one hook per MoE layer.

Shape legend: T tokens of a forward pass (B·S, row-major), K = top-k, E experts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

# Router class name -> how its output becomes (scores [T, K] float, indices [T, K] int64).
# Hugging Face routers return (logits [T, E], scores [T, K], indices [T, K]); AutoEP's TokenChoiceTopKRouter returns
# (scores [T, K], indices [T, K], tokens per expert [E]).
ADAPTERS: dict[str, Callable[[Any], tuple[torch.Tensor, torch.Tensor]]] = {
    "MixtralTopKRouter": lambda output: (output[1], output[2]),
    "OlmoeTopKRouter": lambda output: (output[1], output[2]),
    "Qwen3MoeTopKRouter": lambda output: (output[1], output[2]),
    "TokenChoiceTopKRouter": lambda output: (output[0], output[1]),
}


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model in layer order (plain Hugging Face or converted by AutoEP), each once."""
    return [module for module in model.modules() if type(module).__name__ in ADAPTERS]


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
        raise ValueError(f"no known router in {type(model).__name__}; known: {sorted(ADAPTERS)}")
    recorder = RoutingRecorder(len(routers))

    def hook_for(number: int, adapt: Callable[[Any], tuple[torch.Tensor, torch.Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            scores, indices = adapt(output)
            recorder.scores_TK[number] = scores.detach()
            recorder.indices_TK[number] = indices.detach()

        return hook

    handles = [
        router.register_forward_hook(hook_for(number, ADAPTERS[type(router).__name__]))
        for number, router in enumerate(routers)
    ]
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
        outputs[:] = [(output[0] if isinstance(output, tuple) else output).detach()]

    handle = module.register_forward_hook(hook)
    try:
        yield outputs
    finally:
        handle.remove()


def moe_decoder_layers(model: nn.Module) -> list[int]:
    """The decoder layer index of each MoE layer, in order."""
    layers = []
    for name, module in model.named_modules():
        if type(module).__name__ in ADAPTERS:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            layers.append(numbers[0])
    return layers
