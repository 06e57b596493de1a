"""The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP."""

from __future__ import annotations

from typing import Any

from trace_ds.checkpoints import serialization
from trace_ds.config.schema import Config
from trace_ds.models import engine
from trace_ds.models.engine_config import merge, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.models.routers import find_routers
from trace_ds.parallel.world import World, quiet_deepspeed


def training_engine(config: Config, info: ModelInfo, world: World, accumulation: int) -> Any:
    """The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP when ep > 1."""
    settings = config.unlearning
    optimizer = settings.optimizer
    ds_config = engine.base_ds_config(ep=config.distributed.ep, info=info, zero_stage=settings.zero_stage)
    ds_config |= {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": config.model.dtype == "bf16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": list(optimizer.betas),
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # no JIT compilation of a fused optimizer
            },
        },
    }
    model: Any = engine.load_model(info.path, engine.DTYPES[config.model.dtype])
    layers = len(find_routers(model))
    if settings.recompute:  # to each layer's end: ZeRO-3 releases a module's parameters when its forward pass ends
        model.gradient_checkpointing_enable({"use_reentrant": False, "early_stop": False})
    model.train()
    made, *_ = quiet_deepspeed().initialize(
        model=model,
        model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
        config=merge(ds_config, user_ds_config(settings.ds_config)),
    )
    engine.assert_expert_parallel(made.module, layers, config.distributed.ep)
    serialization.install(made)
    return made
