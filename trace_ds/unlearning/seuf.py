"""SEUF (Zhuang et al., *Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?*, arXiv 2411.18797): train one
expert and its router, and anchor the router on that expert. It goes with any forget and retain loss.

As published, as far as we could read (abstract, reviews and what others say of it; the authors' code is not public):
the affinity of an expert is its mean gate weight over the tokens of a forget sequence, averaged over the sequences; the
M = 1 expert of the highest affinity is trained with its layer's router, and nothing else; the anchor ‖g − a‖², with a 1
for that expert and 0 elsewhere, is added with weight 1; learning rate 1e-4.

Ours: a sequence is a row, its tokens are the counted ones, a gate weight is 0 where the expert was not selected (all
from ``collect``'s statistics of the frozen model); the layer is the one that holds the expert of the highest affinity,
unless it is given; g is the router's softmax over all E experts, and the anchor is the mean over counted forget tokens.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_ds.config.sections.unlearning import SEUFConfig
from trace_ds.errors import UserError
from trace_ds.models import autoep
from trace_ds.models.routers import find_routers, logits_of


@dataclass(frozen=True)
class Anchor:
    """The router of MoE layer ``moe_layer`` is pulled to the experts ``target_E`` (1 or 0)."""

    moe_layer: int
    target_E: torch.Tensor

    def penalty(self, logits_TE: torch.Tensor, counted_BS: torch.Tensor) -> torch.Tensor:
        """Sum over the counted positions of the first rows (the forget rows), scalar."""
        gates_BSE = torch.softmax(logits_TE.float(), dim=-1)[: counted_BS.numel()].reshape(*counted_BS.shape, -1)
        distance_BS = (gates_BSE - self.target_E.to(gates_BSE.device)).square().sum(dim=-1)
        return (distance_BS * counted_BS).sum()


def choose_seuf_experts(
    affinity_LE: np.ndarray, decoder_layers: list[int], last_layer: int | None, settings: SEUFConfig
) -> tuple[int, tuple[int, ...]]:
    """(MoE layer, its experts of highest affinity), ties to the lower number.

    Args:
        affinity_LE: of each expert, up to a factor.
        decoder_layers: the decoder layer of each MoE layer.
        last_layer: decoder layer at which the losses end, None when all run.
    """
    usable = [
        number
        for number, layer in enumerate(decoder_layers)
        if (last_layer is None or layer <= last_layer) and settings.layer in (None, layer)
    ]
    if not usable:
        problem = f"layer {settings.layer} is no MoE layer that the losses reach"
        raise UserError(problem, "unlearning.seuf.layer", "choose another")
    if settings.experts > affinity_LE.shape[1]:
        problem = f"{settings.experts} experts, and a layer has {affinity_LE.shape[1]}"
        raise UserError(problem, "unlearning.seuf.experts", "ask for fewer")
    layer = max(usable, key=lambda number: (affinity_LE[number].max(), -number))
    order = np.argsort(-affinity_LE[layer], kind="stable")[: settings.experts]
    return layer, tuple(sorted(int(expert) for expert in order))


@contextlib.contextmanager
def router_logits(model: nn.Module, moe_layer: int | None) -> Iterator[list[torch.Tensor]]:
    """Collect the logits [T, E] of one router (of none where it is None), with gradient, in the passes of the block."""
    logits: list[torch.Tensor] = []
    if moe_layer is None:
        yield logits
        return
    router: Any = find_routers(model)[moe_layer]
    if autoep.is_autoep_router(router):  # the logits are its gate's output
        hook = router.gate.register_forward_hook(lambda gate, inputs, output: logits.append(output))
    else:
        hook = router.register_forward_hook(lambda router, inputs, output: logits.append(logits_of(router, output)))
    with hook:
        yield logits
