"""The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from trace_ds.checkpoints import serialization
from trace_ds.config.schema import TrainingConfig
from trace_ds.models import engine
from trace_ds.models.engine_config import merge, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.world import World
from trace_ds.unlearning import trainable


def training_engine(
    settings: TrainingConfig,
    info: ModelInfo,
    world: World,
    accumulation: int,
    choose: Callable[[nn.Module], trainable.Trained] = trainable.everything,
    *,
    dtype: str,
    ep: int,
    options: Mapping[str, Any] | None = None,
) -> Any:
    """The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP when ep > 1.

    ``choose``: what is trained, of the model as it was loaded. ``dtype``: ``model.dtype``; ``options``:
    ``distributed.autoep``.
    """
    optimizer = settings.optimizer
    ds_config = engine.base_ds_config(ep=ep, info=info, zero_stage=settings.zero_stage, options=options)
    ds_config |= {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": dtype == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # no JIT compilation of DeepSpeed's own
                **({"fused": True} if world.device.type == "cuda" else {}),  # 28 bytes moved a parameter, not 72
            },
        },
    }
    chosen: list[trainable.Trained] = []

    def parameters(model: nn.Module) -> list[Any]:
        """Chosen by the names of the model as it was loaded, before AutoEP renames any."""
        chosen.append(choose(model))
        return trainable.parameter_groups(model, chosen[0], optimizer.weight_decay)

    made = engine.initialize(
        info,
        world,
        merge(ds_config, user_ds_config(settings.ds_config)),
        dtype=dtype,
        parts=engine.ModelParts(),
        parameters=parameters,
        recompute=settings.recompute,
    )
    trainable.hold(made.module, chosen[0])
    serialization.install(made)
    if settings.recompute and settings.zero_stage == 3:
        keep_recomputed(made)
    return made


def keep_recomputed(engine: Any) -> None:
    """Parameters gathered for a recomputation stay until their module's backward pass releases them.

    DeepSpeed gathers a module's parameters before its backward pass. The first saved tensor that this needs makes torch
    run the layer's forward pass again, and DeepSpeed would release the parameters at the end of that.
    """
    offload = engine.optimizer.parameter_offload
    release = offload.post_sub_module_forward_function

    def release_unless_recomputing(module: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not inside a backward pass
            release(module)

    offload.post_sub_module_forward_function = release_unless_recomputing
