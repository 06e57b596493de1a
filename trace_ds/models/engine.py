"""From a Hugging Face directory to a DeepSpeed engine: loading, ZeRO, expert parallelism, proof that it happened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo
from trace_ds.models.routers import find_routers
from trace_ds.parallel.world import World, quiet_deepspeed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def load_model(path: str | Path, dtype: torch.dtype, *, layers: int | None = None) -> nn.Module:
    """A causal language model of a local directory, in evaluation mode, on the CPU.

    Args:
        layers: keep only the first so many decoder layers (the rest is not read); default: all.

    Never executes code that ships with the model. The rotary frequencies stay in fp32 whatever ``dtype``: cast to
    bf16 they move the logits by up to 4e-3.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if layers is not None:
        config.num_hidden_layers = layers
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(path),
            config=config,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            attn_implementation="sdpa",
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"the model cannot be loaded ({error})", str(path), "check it with `trace-ds doctor`"
        ) from error
    model, info = loaded
    unexpected = info["unexpected_keys"] if layers is None else []
    problems = [*info["missing_keys"], *unexpected, *info["mismatched_keys"]]
    if problems:
        raise UserError(
            f"{len(problems)} tensors are missing, unexpected or of another shape, the first {problems[0]}",
            str(path),
            "copy or convert the model again",
        )
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise AssertionError(f"{name} is {buffer.dtype}, not fp32")
    model.config.use_cache = False
    return model.eval()


def base_ds_config(*, ep: int, info: ModelInfo, zero_stage: int) -> dict[str, Any]:
    """The DeepSpeed configuration every job starts from (no optimizer)."""
    ds_config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 62,
    }
    if zero_stage == 3:
        ds_config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = False
    if ep > 1:
        ds_config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": ep,
            "preset_model": info.family.autoep_preset,
        }
    return ds_config


def inference_engine(config: Config, info: ModelInfo, world: World, *, ep: int) -> Any:
    """A forward-only DeepSpeed engine: ZeRO stage 0, experts sharded over ``ep`` ranks by AutoEP.

    Raises:
        AssertionError: AutoEP did not convert every MoE layer (it skips unknown families silently).
    """
    deepspeed = quiet_deepspeed()
    model = load_model(info.path, DTYPES[config.model.dtype])
    layers = len(find_routers(model))
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=0)
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    assert_expert_parallel(engine.module, layers, ep)
    engine.eval()
    return engine


def reference_engine(config: Config, info: ModelInfo, *, layers: int) -> Any:
    """A frozen copy of the first ``layers`` decoder layers, sharded like the job itself (no optimizer).

    With ZeRO stage 3 every rank keeps its partition only; below that the experts are still sharded by AutoEP.
    """
    deepspeed = quiet_deepspeed()
    model = load_model(info.path, DTYPES[config.model.dtype], layers=layers)
    model.requires_grad_(False)
    routers = len(find_routers(model))
    stage = 3 if config.unlearning.zero_stage == 3 else 0
    ep = config.distributed.ep
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage)
    if stage == 3:
        ds_config["bf16"] = {"enabled": config.model.dtype == "bf16"}
    engine, *_ = deepspeed.initialize(model=model, config=ds_config)
    assert_expert_parallel(engine.module, routers, ep)
    engine.eval()
    return engine


def assert_expert_parallel(model: nn.Module, layers: int, ep: int) -> None:
    """Every one of the ``layers`` MoE layers must have been converted when experts are sharded."""
    converted = sum(type(module).__name__ == "AutoEPMoELayer" for module in model.modules())
    if ep > 1 and converted != layers:
        raise AssertionError(f"AutoEP converted {converted} of {layers} MoE layers")
