"""Record the decisions of the routers: one adapter for each kind of router, one hook for each MoE layer.

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

from trace_ds.models import autoep
from trace_ds.tensors.layouts import decoder_layer

TRANSFORMERS_ROUTER = re.compile(r"Top[Kk]Router$")


def is_router(module: nn.Module) -> bool:
    return TRANSFORMERS_ROUTER.search(type(module).__name__) is not None


def router_weight(router: nn.Module) -> Any:
    """The weight [E, D] of a router, AutoEP's or transformers'."""
    return router.gate.weight if autoep.is_autoep_router(router) else router.weight  # type: ignore[union-attr]


def places_of(module: nn.Module, output: Any) -> tuple[int, int]:
    """Return the positions of scores [T, K] (float) and indices [T, K] (integer) in a router's output tuple.

    AutoEP's router returns (scores, indices, tokens per expert [E]). Every top-k router of transformers returns logits
    [T, E], scores and indices, sometimes followed by more; Granite's did in the opposite order before 5.18.

    Raises:
        ValueError: it returned something else.
    """
    autoeps = autoep.is_autoep_router(module)
    scores, indices = (0, 1) if autoeps else (1, 2)
    shapes = [tuple(item.shape) if isinstance(item, torch.Tensor) else None for item in output]
    if not autoeps and shapes[0] is not None and not output[0].is_floating_point():
        indices = 0
    description = f"{type(module).__name__} returned " + ", ".join(map(str, shapes))
    if len(shapes) < 3 or shapes[scores] is None or shapes[scores] != shapes[indices] or len(shapes[scores] or ()) != 2:
        raise ValueError(description)
    if output[indices].is_floating_point() or not output[scores].is_floating_point():
        raise ValueError(f"{description}, of types {output[scores].dtype} and {output[indices].dtype}")
    return scores, indices


def routing_of(module: nn.Module, output: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(scores [T, K] float, indices [T, K] integer) from the output of a router; ``ValueError`` if it is no such."""
    scores, indices = places_of(module, output)
    return output[scores], output[indices]


def logits_of(router: nn.Module, output: Any) -> torch.Tensor:
    """The logits [T, E] in the output of a router of transformers."""
    return output[2 - places_of(router, output)[1]]


def find_routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model in layer order (plain Hugging Face or converted by AutoEP), each once."""
    return [module for module in model.modules() if is_router(module)]


def meta_model(path: str | Path) -> nn.Module:
    """The model that a directory's ``config.json`` describes, without data; errors of transformers pass through."""
    from transformers import AutoConfig

    return without_data(AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False))


def without_data(config: Any) -> nn.Module:
    """The model that a configuration of transformers describes, on the meta device."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


class _Tried(Exception):
    """Ends the trial forward pass as soon as the router has run."""


def try_router(model: nn.Module, router: nn.Module, hidden: int) -> None:
    """Run the layer around a router on the meta device and check the shapes and types that the router returns.

    Raises:
        ValueError: the router's output has an unknown form. Anything else: the layer cannot be run this way.
    """
    name = next(name for name, module in model.named_modules() if module is router)

    def read(module: nn.Module, inputs: Any, output: Any) -> None:
        routing_of(module, output)
        raise _Tried

    try:
        with router.register_forward_hook(read):
            model.get_submodule(name.rpartition(".")[0])(torch.empty(1, 2, hidden, device="meta"))
    except _Tried:
        return
    raise ValueError(f"{type(router).__name__} is not asked by the layer it is in")


def find_routing_problem(path: str | Path, experts: object) -> str | None:
    """Return why routing cannot be counted in a model of a family without an entry, or None if it can.

    Finds its routers and tries one of each kind on the meta device. ``experts``: number in the configuration.
    """
    try:
        model: Any = meta_model(path).eval()
    except Exception as error:  # the modelling code of any family may raise anything on a configuration it rejects
        return f"transformers cannot build it as a causal language model: {type(error).__name__}"
    routers = find_routers(model)
    if not routers:
        return "it has no router that is known"
    widths = {parameter.shape[0] for router in routers for parameter in router.parameters() if parameter.dim() == 2}
    if widths != {experts}:  # identity or shared experts among which the router chooses as well
        choices = " or ".join(map(str, sorted(widths)))
        return f"its routers choose among {choices} experts, its configuration has {experts}"
    if not hasattr(model, "model") or not hasattr(model.model, "layers"):
        return "its decoder layers are not at model.layers"
    for router in {type(router): router for router in routers}.values():
        try:
            try_router(model, router, router_weight(router).shape[1])
        except Exception as error:  # as above
            reason = str(error) if isinstance(error, ValueError) else type(error).__name__
            return f"its router cannot be read: {reason}"
    return None


class RoutingRecorder:
    """Scores and indices of each router in the last forward pass; entry l belongs to MoE layer l."""

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

    with contextlib.ExitStack() as stack:
        for number, router in enumerate(routers):
            stack.enter_context(router.register_forward_hook(hook_for(number)))
        yield recorder


@contextlib.contextmanager
def record_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """The (first) output of ``module`` in the last forward pass inside the block, detached (a list of one)."""
    outputs: list[torch.Tensor] = []

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        tensor = output if isinstance(output, torch.Tensor) else output[0]
        outputs[:] = [tensor.detach()]

    with module.register_forward_hook(hook):
        yield outputs


def moe_decoder_layers(model: nn.Module) -> list[int]:
    """The decoder layer index of each MoE layer, in order."""
    return [decoder_layer(name) for name, module in model.named_modules() if is_router(module)]
