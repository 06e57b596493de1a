"""The objective of a job with what it needs from the frozen model, built once before the first step (collective)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trace_ds.config.schema import UnlearningConfig
from trace_ds.models.engine import reference_engine
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.world import World, quiet_deepspeed
from trace_ds.unlearning.batches import Batches
from trace_ds.unlearning.loss import ForgetRetain, Frozen, Objective, hidden_at
from trace_ds.unlearning.needs import FrozenNeeds
from trace_ds.unlearning.objectives import rmu_target
from trace_ds.unlearning.seuf import Anchor


def make_objective(
    settings: UnlearningConfig,
    info: ModelInfo,
    world: World,
    batches: Batches,
    cursor: dict[str, Any],
    anchored: tuple[int, tuple[int, ...]] | None = None,
    *,
    dtype: str,
    ep: int,
    seed: int,
) -> tuple[Objective, dict[str, Any]]:
    """The objective, and the cursor with the job constants it needs (kept in checkpoints for exact resumption).

    The frozen copy holds the layers that are needed and no others; without need for one there is none.

    Args:
        anchored: the MoE layer and the experts that SEUF anchors the router on.
        dtype, ep, seed: ``model.dtype``, ``distributed.ep`` and ``seed`` of the job.
    """
    needs = FrozenNeeds.of(settings, info.decoder_layers)
    measured = needs.norm and "rmu_hidden_norm" not in cursor
    frozen = None
    if needs.stays or measured:
        engine = reference_engine(
            info,
            world,
            dtype=dtype,
            ep=ep,
            zero_stage=settings.zero_stage,
            ds_config_path=settings.ds_config,
            layers=needs.layers,
        )
        if measured:
            assert needs.layer is not None
            cursor = {**cursor, "rmu_hidden_norm": mean_hidden_norm(engine, needs.layer, world, batches)}
        if needs.stays:
            frozen = Frozen(engine, _whole_head(engine) if needs.logits else None)
    target_D = None
    if settings.forget_loss == "rmu":
        unit = cursor["rmu_hidden_norm"] if needs.norm else 1.0
        length = settings.rmu.coefficient * unit
        target_D = rmu_target(int(info.config["hidden_size"]), seed, length).to(world.device)
    anchor = None
    if anchored is not None and settings.seuf is not None:
        moe_layer, experts = anchored
        target_E = torch.zeros(info.experts, device=world.device)
        target_E[list(experts)] = 1.0
        anchor = Anchor(moe_layer, target_E, settings.seuf.anchor)
    return ForgetRetain(settings, needs, target_D, frozen, anchor), cursor


def _whole_head(engine: Any) -> torch.Tensor:
    """The frozen LM head [V, D] on this rank, gathered where ZeRO partitions it."""
    weight = engine.module.lm_head.weight
    partitioned = hasattr(weight, "ds_id")
    with quiet_deepspeed().zero.GatheredParameters([weight], enabled=partitioned):
        return weight.detach().clone()


def mean_hidden_norm(reference: Any, layer: int, world: World, batches: Batches, steps: int = 4) -> float:
    """Mean Euclidean norm of the frozen hidden states over the forget tokens of the first ``steps`` steps."""
    totals = np.zeros(2)
    for step in range(steps):
        for micro_batch in batches.at(step, world.rank, world.size).micro_batches:
            batch = micro_batch.to(world.device)
            with torch.no_grad():
                hidden_BSD = hidden_at(reference, layer, batch)[: batch.forget_rows]
            norms = hidden_BSD.float().norm(dim=-1)[batch.counted_BS[: batch.forget_rows]]
            totals += [float(norms.double().sum()), len(norms)]
    totals = world.sum_float64(totals)
    return float(totals[0] / totals[1])
