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

from trace_ds.models import autoep
from trace_ds.tensors.layouts import decoder_layer

TRANSFORMERS_ROUTER = re.compile(r"Top[Kk]Router$")


def is_router(module: nn.Module) -> bool:
    return TRANSFORMERS_ROUTER.search(type(module).__name__) is not None


def router_weight(router: nn.Module) -> Any:
    """The weight [E, D] of a router, AutoEP's or transformers'."""
    return router.gate.weight if autoep.is_router(router) else router.weight  # type: ignore[union-attr]


def places_of(module: nn.Module, output: Any) -> tuple[int, int]:
    """Where in the output of a router the scores [T, K] (float) and the indices [T, K] (integer) are.

    AutoEP's router returns (scores, indices, tokens per expert [E]). Every top-k router of transformers returns logits
    [T, E], scores and indices, sometimes followed by more; Granite's did in the opposite order before 5.18.

    Raises:
        ValueError: it returned something else.
    """
    autoeps = autoep.is_router(module)
    scores, indices = (0, 1) if autoeps else (1, 2)
    shapes = [tuple(item.shape) if isinstance(item, torch.Tensor) else None for item in output]
    if not autoeps and shapes[0] is not None and not output[0].is_floating_point():
        indices = 0
    told = f"{type(module).__name__} returned " + ", ".join(map(str, shapes))
    if len(shapes) < 3 or shapes[scores] is None or shapes[scores] != shapes[indices] or len(shapes[scores] or ()) != 2:
        raise ValueError(told)
    if output[indices].is_floating_point() or not output[scores].is_floating_point():
        raise ValueError(f"{told}, of types {output[scores].dtype} and {output[indices].dtype}")
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
    """Ends a trial as soon as the router has answered."""


def try_router(model: nn.Module, router: nn.Module, hidden: int) -> None:
    """Let the layer around a router of a model without data ask it about a few tokens; shapes and types are all there
    is to the answer.

    Raises:
        ValueError: its answer cannot be read. Anything else: the layer cannot be run so.
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


def refusal(path: str | Path, experts: object) -> str | None:
    """Why routing cannot be counted in a model of a family without an entry, or None when it can: its routers are
    found, and one of each kind is tried.

    ``experts``: how many the configuration says.
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
        found = " or ".join(map(str, sorted(widths)))
        return f"its routers choose among {found} experts, its configuration has {experts}"
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
