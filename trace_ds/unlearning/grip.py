"""GRIP (Zhu et al., arXiv 2601.16905): a router's row may not move along the retain inputs that selected its expert.

Our reading of the router-update projection: for each MoE layer and expert e, U_e is an orthonormal basis of the span of
up to ``tokens`` inputs of the frozen router, from retain tokens that selected e; the gradient of the row becomes

    g_e ← g_e − (g_e U_e) U_eᵀ

It acts on the gradient (so the abstract says); AdamW's scaling by coordinate does not keep the null space exactly.
Weight decay of the routers is left as configured. The other variant, realigning the routers after training, is
:mod:`trace_ds.unlearning.realign`.

The bases take up to L·E·tokens·D·4 bytes, so the ranks share the experts: a router's gradient is summed over the ranks
(E × D numbers), and each rank gives back the projected rows of its experts and zeros for the others, which DeepSpeed's
own sum puts together. The projection is linear, so this is exact.

Shape legend: L MoE layers, E experts, D hidden size, N directions kept, T tokens of a pass, K = top-k.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from trace_ds.config.schema import GRIPConfig
from trace_ds.models.routers import find_routers, record_routing, router_weight
from trace_ds.parallel.world import World
from trace_ds.unlearning.batches import Batches, MicroBatch
from trace_ds.unlearning.forward import forward

# The inputs, in parts, of each of this rank's experts of a layer.
Inputs = dict[int, list[torch.Tensor]]


def install(engine: Any, batches: Batches, world: World, settings: GRIPConfig) -> int:
    """Project the routers' gradients of a training engine that still holds the frozen weights (collective).

    Every rank runs the same retain rows, those of the first steps, and keeps the inputs of its experts.

    Returns:
        Bytes of the bases on this rank.
    """
    routers = find_routers(engine.module)
    inputs_L: list[Inputs] = [{} for _ in routers]
    for step in range(settings.steps):
        for micro_batch in batches.at(step, 0, 1).micro_batches:
            _collect(engine, micro_batch.to(world.device), inputs_L, settings.tokens, world)
    held_bytes = 0
    for router, inputs in zip(routers, inputs_L, strict=True):
        bases = {expert: basis(torch.cat(parts)[: settings.tokens]) for expert, parts in inputs.items()}
        inputs.clear()
        held_bytes += sum(basis_DN.numel() * basis_DN.element_size() for basis_DN in bases.values())
        router_weight(router).register_hook(_projection(bases, world))
    return held_bytes


def basis(inputs_TD: torch.Tensor) -> torch.Tensor:
    """Orthonormal basis of the span of the inputs, fp32 [D, N], N the numerical rank."""
    if not len(inputs_TD):
        return torch.zeros(inputs_TD.shape[1], 0, device=inputs_TD.device)
    _, values_N, directions_ND = torch.linalg.svd(inputs_TD.float(), full_matrices=False)
    kept = values_N > values_N[0] * max(inputs_TD.shape) * torch.finfo(torch.float32).eps
    return directions_ND[kept].T.contiguous()


def project(gradient_D: torch.Tensor, basis_DN: torch.Tensor) -> torch.Tensor:
    """``gradient_D`` without its part in the span of the basis, in its own dtype."""
    gradient = gradient_D.float()
    return (gradient - basis_DN @ (basis_DN.T @ gradient)).to(gradient_D.dtype)


def _projection(bases: dict[int, torch.Tensor], world: World) -> Any:
    def hook(gradient_ED: torch.Tensor) -> torch.Tensor:
        total_ED = gradient_ED
        if world.size > 1:
            total_ED = gradient_ED.float().clone()
            world.sum_in_place(total_ED)
        mine_ED = torch.zeros_like(total_ED)
        for expert, basis_DN in bases.items():
            mine_ED[expert] = project(total_ED[expert], basis_DN)
        return mine_ED.to(gradient_ED.dtype)

    return hook


@contextlib.contextmanager
def router_inputs(routers: list[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the inputs [T, D] (detached) of the routers, in the order in which they run, inside the block."""
    seen: list[torch.Tensor] = []

    def keep(module: nn.Module, inputs: Any) -> None:
        seen.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))

    handles = [router.register_forward_pre_hook(keep) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _collect(engine: Any, batch: MicroBatch, inputs_L: list[Inputs], tokens: int, world: World) -> None:
    """Add the inputs of each router to this rank's experts that its retain tokens selected, up to ``tokens`` each."""
    counted_T = batch.counted_BS[batch.forget_rows :].reshape(-1)
    routers = find_routers(engine.module)
    retain = slice(batch.forget_rows, None)
    with router_inputs(routers) as seen, torch.no_grad(), record_routing(engine.module) as recorder:
        forward(engine, batch.input_ids_BS[retain], batch.position_ids_BS[retain], last=True)
    for layer, (inputs_TD, inputs) in enumerate(zip(seen, inputs_L, strict=True)):
        scores, indices_TK = recorder.layer(layer)
        experts = getattr(routers[layer], "num_experts", scores.shape[-1])
        for expert in range(world.rank, experts, world.size):
            parts = inputs.setdefault(expert, [inputs_TD[:0]])
            have = sum(len(part) for part in parts)
            if have < tokens:
                chosen_T = (indices_TK == expert).any(dim=1) & counted_T
                parts.append(inputs_TD[chosen_T][: tokens - have])
