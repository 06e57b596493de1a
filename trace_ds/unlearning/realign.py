"""GRIP's other variant (Zhu et al., arXiv 2601.16905): realign the routers after training.

Only the idea is public ("ridge-realign the routers afterwards"); the rest is our reading. On the retain tokens of the
first ``steps`` steps, z_t are the logits of the frozen router and x_t the inputs of the router in the trained model.
Layer by layer from below, since each realigned router changes the inputs of those above, the trained weights W become

    W + argmin_Δ Σ_t ‖(W + Δ) x_t − z_t‖² + λ m ‖Δ‖² = W + (Σ r_t x_tᵀ)(Σ x_t x_tᵀ + λ m I)⁻¹,    r_t = z_t − W x_t

with m the mean eigenvalue of Σ x_t x_tᵀ: where retain tokens say nothing, the trained router stays. The sums are
streamed in float64 and taken over all ranks, so every rank solves the same equations. A router that training did not
move (one that is held) is left alone. It costs a pass over those rows for each MoE layer, up to that layer, after the
last step; the rows' frozen logits (L·T·E·4 bytes over all ranks) wait in host memory.

Shape legend: L MoE layers, E experts, D hidden size, T counted retain tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from trace_ds.config.schema import GRIPConfig
from trace_ds.models.routers import find_routers, moe_decoder_layers, router_weight
from trace_ds.parallel.world import World, quiet_deepspeed
from trace_ds.unlearning.batches import Batches, MicroBatch
from trace_ds.unlearning.forward import forward
from trace_ds.unlearning.grip import router_inputs


class Realignment:
    """The frozen routers' logits and weights, recorded from a training engine that still holds them (collective)."""

    def __init__(self, engine: Any, batches: Batches, world: World, settings: GRIPConfig) -> None:
        self._batches, self._world, self._settings = batches, world, settings
        routers = find_routers(engine.module)
        self._frozen_L = [_whole(router_weight(router)).cpu() for router in routers]
        self._logits: list[list[torch.Tensor]] = []  # by micro-batch and layer, fp32 [T, E] on the CPU
        for batch in self._micro_batches():
            with router_inputs(routers) as seen, torch.no_grad():
                _run(engine, batch, last=True)
            counted_T = _counted(batch)
            self._logits.append(
                [
                    (inputs_TD[counted_T].float() @ frozen_ED.to(inputs_TD.device).float().T).cpu()
                    for inputs_TD, frozen_ED in zip(seen, self._frozen_L, strict=True)
                ]
            )

    @classmethod
    def asked(cls, engine: Any, batches: Batches, world: World, settings: GRIPConfig) -> Realignment | None:
        """The realignment where the settings ask for it."""
        return cls(engine, batches, world, settings) if settings.realign else None

    def apply(self, engine: Any) -> int:
        """Realign the routers of the trained engine (collective); how many there were to realign."""
        engine.eval()
        done = 0
        routers, layers = find_routers(engine.module), moe_decoder_layers(engine.module)
        for number, (router, decoder_layer) in enumerate(zip(routers, layers, strict=True)):
            weight = router_weight(router)
            trained_ED = _whole(weight)
            if torch.equal(trained_ED.cpu(), self._frozen_L[number]):
                continue
            gram_DD, cross_ED = self._sums(engine, number, decoder_layer, trained_ED.double())
            gram_DD.diagonal().add_(self._settings.ridge * gram_DD.trace() / len(gram_DD))
            _replace(weight, trained_ED.double() + torch.linalg.solve(gram_DD, cross_ED.T).T)
            done += 1
        engine.train()
        return done

    def _sums(
        self, engine: Any, number: int, decoder_layer: int, trained_ED: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(Σ x xᵀ [D, D], Σ r xᵀ [E, D]) of a layer over the tokens of all ranks, float64."""
        experts, hidden = trained_ED.shape
        sums = torch.zeros(hidden + experts, hidden, dtype=torch.float64, device=trained_ED.device)
        router = find_routers(engine.module)[number]
        for batch, logits_L in zip(self._micro_batches(), self._logits, strict=True):
            with router_inputs([router]) as seen, torch.no_grad():
                _run(engine, batch, layer=decoder_layer)
            inputs_TD = seen[0][_counted(batch)].double()
            rest_TE = logits_L[number].to(inputs_TD) - inputs_TD @ trained_ED.T
            sums[:hidden] += inputs_TD.T @ inputs_TD
            sums[hidden:] += rest_TE.T @ inputs_TD
        self._world.sum_in_place(sums)
        return sums[:hidden], sums[hidden:]

    def _micro_batches(self) -> Iterator[MicroBatch]:
        for step in range(self._settings.steps):
            for batch in self._batches.at(step, self._world.rank, self._world.size).micro_batches:
                yield batch.to(self._world.device)


def _run(engine: Any, batch: MicroBatch, **wanted: Any) -> None:
    retain = slice(batch.forget_rows, None)
    forward(engine, batch.input_ids_BS[retain], batch.position_ids_BS[retain], **wanted)


def _counted(batch: MicroBatch) -> torch.Tensor:
    return batch.counted_BS[batch.forget_rows :].reshape(-1)


def _whole(weight: Any) -> torch.Tensor:
    """A copy of a router's weight, gathered where ZeRO partitions it (collective)."""
    with quiet_deepspeed().zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
        return weight.detach().clone()


def _replace(weight: Any, value_ED: torch.Tensor) -> None:
    """Set a trained parameter and its fp32 copy in the optimizer (collective); the value is the same on all ranks."""
    zero, utils = quiet_deepspeed().zero, quiet_deepspeed().utils
    partitioned = hasattr(weight, "ds_id")
    with torch.no_grad(), zero.GatheredParameters([weight], modifier_rank=0, enabled=partitioned):
        weight.data.copy_(value_ED)
    if partitioned:
        utils.safe_set_local_fp32_param(weight, weight.ds_tensor.data.float())
    else:
        utils.safe_set_full_fp32_param(weight, weight.data.float())
