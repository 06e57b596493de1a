"""GRIP (Zhu et al., arXiv 2601.16905): a router's row may not move along the retain inputs that selected its expert.

Our reading of the router-update projection: for each MoE layer and expert e, U_e is an orthonormal basis of the span of
up to ``tokens`` inputs of the frozen router, from retain tokens that selected e; the gradient of the row becomes

    g_e ← g_e − (g_e U_e) U_eᵀ

The projection is linear, so projecting each rank's gradient before the sum over ranks is exact. It acts on the
gradient (so the abstract says); AdamW's scaling by coordinate does not keep the null space exactly. Weight decay of the
routers is left as configured. The other variant, realigning routers by ridge regression after training, is not here.

Shape legend: L MoE layers, E experts, D hidden size, N directions kept, T tokens of a pass, K = top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from trace_ds.config.schema import GRIPConfig
from trace_ds.models.routers import find_routers, record_routing
from trace_ds.unlearning.batches import Batches, MicroBatch
from trace_ds.unlearning.forward import forward


def install(engine: Any, batches: Batches, device: torch.device, settings: GRIPConfig) -> None:
    """Project the routers' gradients of a training engine that still holds the frozen weights (collective).

    Every rank runs the same retain rows, those of the first steps, and so has the same bases.
    """
    routers = find_routers(engine.module)
    inputs_LE: list[list[list[torch.Tensor]]] = [[] for _ in routers]
    for step in range(settings.steps):
        for micro_batch in batches.at(step, 0, 1).micro_batches:
            _collect(engine, micro_batch.to(device), inputs_LE, settings.tokens)
    for router, inputs_E in zip(routers, inputs_LE, strict=True):
        bases = [basis(torch.cat(inputs)[: settings.tokens]) for inputs in inputs_E]
        weight: Any = router.gate.weight if hasattr(router, "gate") else router.weight  # type: ignore[union-attr]
        weight.register_hook(_projection(bases))


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


def _projection(bases: list[torch.Tensor]) -> Any:
    return lambda gradient_ED: torch.stack(
        [project(row_D, basis_DN) for row_D, basis_DN in zip(gradient_ED, bases, strict=True)]
    )


def _collect(engine: Any, batch: MicroBatch, inputs_LE: list[list[list[torch.Tensor]]], tokens: int) -> None:
    """Add the inputs of each router to the experts that its retain tokens selected, up to ``tokens`` each."""
    counted_T = batch.counted_BS[batch.forget_rows :].reshape(-1)
    seen: list[torch.Tensor] = []
    routers: list[nn.Module] = find_routers(engine.module)
    handles = [
        router.register_forward_pre_hook(
            lambda module, inputs: seen.append(inputs[0].detach().reshape(-1, inputs[0].shape[-1]))
        )
        for router in routers
    ]
    try:
        with torch.no_grad(), record_routing(engine.module) as recorder:
            retain = slice(batch.forget_rows, None)
            forward(engine, batch.input_ids_BS[retain], batch.position_ids_BS[retain], last=True)
    finally:
        for handle in handles:
            handle.remove()
    for layer, (inputs_TD, inputs_E) in enumerate(zip(seen, inputs_LE, strict=True)):
        scores, indices_TK = recorder.layer(layer)
        experts = getattr(routers[layer], "num_experts", scores.shape[-1])
        inputs_E.extend([inputs_TD[:0]] for _ in range(experts - len(inputs_E)))
        for expert in range(experts):
            have = sum(len(part) for part in inputs_E[expert])
            if have < tokens:
                chosen_T = (indices_TK == expert).any(dim=1) & counted_T
                inputs_E[expert].append(inputs_TD[chosen_T][: tokens - have])
