"""The objective of a job with what it needs from the frozen model, built once before the first step (collective)."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import Any

import torch

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.models.engine import ModelParts, base_ds_config, initialize
from trace_ds.models.engine_config import merge_ds_config, parameter_offload, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.world import World
from trace_ds.routing.collection import whole_head
from trace_ds.unlearning.batches import Batches
from trace_ds.unlearning.hidden_norms import measure
from trace_ds.unlearning.loss import ForgetRetain, Frozen
from trace_ds.unlearning.needs import UNITS, FrozenNeeds
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
    options: Mapping[str, Any] | None = None,
    seed: int,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[ForgetRetain, dict[str, Any]]:
    """The objective, and the cursor with the job constants it needs (kept in checkpoints for exact resumption).

    The frozen copy holds the layers that are needed and no others; without need for one there is none.

    Args:
        anchored: the MoE layer and the experts that SEUF anchors the router on.
        dtype, ep, options, seed: ``model.dtype``, ``distributed.ep``, ``distributed.autoep`` and ``seed`` of the job.
        say: hears warnings.
    """
    needs = FrozenNeeds.of(settings, info.decoder_layers)
    measured = needs.norms and not cursor.get("step")  # a job that goes on keeps what it began with
    frozen = None
    if needs.stays or measured:
        parts = ModelParts(needs.layers, needs.logits)
        engine = reference_engine(settings, info, world, parts, dtype, ep, options)
        if measured:
            assert needs.layer is not None
            norms = measure(engine, needs.layer, world, batches)
            left_out = settings.rmu.sinks == "leave_out"
            for warning in norms.warnings(needs.layer, left_out):
                say(f"WARNING {warning}")
            unit = norms.mean if settings.rmu.scale == "mean_norm" else norms.median
            cursor = {**cursor, "rmu_hidden_norm": unit, "hidden_sinks": list(norms.sinks) if left_out else []}
        if needs.stays:
            frozen = Frozen(engine, _whole_head(engine) if needs.logits else None)
        del engine
        if frozen is None:
            gc.collect()  # an engine refers to itself: its memory is the trained model's
    target_D = None
    if settings.forget_loss == "rmu":
        unit = cursor["rmu_hidden_norm"] if settings.rmu.scale in UNITS else 1.0
        length = settings.rmu.coefficient * unit
        target_D = rmu_target(int(info.config["hidden_size"]), seed, length).to(world.device)
    anchor = None
    if anchored is not None and settings.seuf is not None:
        moe_layer, experts = anchored
        target_E = torch.zeros(info.experts, device=world.device)
        target_E[list(experts)] = 1.0
        anchor = Anchor(moe_layer, target_E, settings.seuf.anchor)
    return ForgetRetain(settings, needs, target_D, frozen, anchor, tuple(cursor.get("hidden_sinks", ()))), cursor


def reference_engine(
    settings: UnlearningConfig,
    info: ModelInfo,
    world: World,
    parts: ModelParts,
    dtype: str,
    ep: int,
    options: Mapping[str, Any] | None,
) -> Any:
    """A frozen copy of some parts of the model, sharded over the ranks (no optimizer).

    With ZeRO stage 3, and whenever AutoEP does not shard the experts, every rank keeps its partition only, on the CPU
    or on disk if the job's parameters are offloaded there. With AutoEP and a lower stage only the experts are sharded.
    """
    stage = 3 if settings.zero_stage == 3 or (ep == 1 and world.size > 1) else 0
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage, options=options)
    if stage == 3:
        ds_config["bf16"] = {"enabled": dtype == "bf16"}
        ds_config = merge_ds_config(ds_config, parameter_offload(user_ds_config(settings.ds_config)))
    return initialize(info, world, ds_config, dtype=dtype, parts=parts)


def _whole_head(engine: Any) -> torch.Tensor:
    """The frozen LM head [V, D] on this rank, gathered where ZeRO partitions it."""
    with whole_head(engine.module.lm_head) as (weight_VD, _):
        return weight_VD.detach().clone()
