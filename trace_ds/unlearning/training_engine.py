"""The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from trace_ds.checkpoints import serialization
from trace_ds.config.sections.training import TrainingConfig
from trace_ds.models import engine
from trace_ds.models.engine_config import RANKS_SUMMED_IN_BF16, merge_ds_config, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.environment import local_rank_and_size
from trace_ds.parallel.world import World
from trace_ds.unlearning import trainable


def training_engine(
    settings: TrainingConfig,
    info: ModelInfo,
    world: World,
    accumulation: int,
    trained: trainable.Trained | None = None,
    *,
    dtype: str,
    ep: int,
    options: Mapping[str, Any] | None = None,
    layers: int | None = None,
) -> Any:
    """The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP when ep > 1.

    Args:
        trained: None: all that is loaded.
        dtype: ``model.dtype``.
        options: ``distributed.autoep``.
        layers: load only the first so many decoder layers, without norm and LM head; None: the whole model.
    """
    optimizer = settings.optimizer
    ds_config = engine.base_ds_config(ep=ep, info=info, zero_stage=settings.zero_stage, options=options)
    ds_config |= {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": dtype == "bf16"},
        **({"communication_data_type": "fp32"} if world.size > RANKS_SUMMED_IN_BF16 else {}),
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # no JIT compilation of DeepSpeed's own
                "fused": True,  # 28 bytes moved a parameter, not 72; no temporary of its size
            },
        },
    }
    ds_config = merge_ds_config(ds_config, user_ds_config(settings.ds_config))
    made = engine.initialize(
        info,
        world,
        ds_config,
        dtype=dtype,
        parts=engine.ModelParts(layers=layers, head=layers is None),
        # by the names of the model as it was loaded, before AutoEP renames any
        parameters=lambda model: trainable.parameter_groups(model, trained, optimizer.weight_decay),
        recompute=settings.recompute,
    )
    if trained is not None:
        trainable.hold(made.module, trained)
    serialization.install(made)
    if settings.recompute and settings.zero_stage == 3:
        keep_recomputed(made)
    if "offload_optimizer" in ds_config["zero_optimization"]:
        update_with_all_cores(made.optimizer.optimizer)
    return made


def update_with_all_cores(optimizer: Any) -> None:
    """States in host memory are updated by this process's share of the cores, however many threads the rest has.

    Each element is computed by itself, so their number changes no bit.
    """
    update = optimizer.step
    cores = len(os.sched_getaffinity(0)) // local_rank_and_size()[1]

    def step(*arguments: Any, **options: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, cores))
        try:
            return update(*arguments, **options)
        finally:
            torch.set_num_threads(threads)

    optimizer.step = step


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
