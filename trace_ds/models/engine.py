"""Build a DeepSpeed engine from a Hugging Face model directory and check its weights against the files."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from trace_ds.models import autoep
from trace_ds.models.engine_config import merge_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.models.loading import ModelParts, load_share
from trace_ds.parallel.world import World, quiet_deepspeed

WIDE_EXPERT = 8192
_DECODER_LAYER = re.compile(r".*?\.\d+\.")  # how the names of a decoder layer's parameters begin
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# malloc.h of glibc: where it takes the memory of tensors from, and when it gives it back to the system
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
LARGE_BYTES, LARGEST_BYTES = 1 << 20, 1 << 25  # the second: the largest M_MMAP_THRESHOLD on 64 bits
NEVER = 2**31 - 1


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
        # By default DeepSpeed 0.19 treats the MoE blocks of three families as one module each (for experts that are
        # modules of their own), and releases their weights too early where nothing below them is trained.
        ds_config["zero_optimization"]["leaf_module"] = {"classes": []}
    return ds_config | autoep.settings(ep, info.family.autoep_preset)


@contextlib.contextmanager
def quick_collections() -> Iterator[None]:
    """Exclude the objects that already exist from garbage collection inside the block.

    DeepSpeed runs gc.collect() after every MoE layer that AutoEP replaces; with all objects of torch and transformers
    to search, each call would take a quarter of a second.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def stage3_limits(model: nn.Module) -> dict[str, int]:
    """How many gathered elements ZeRO-3 keeps: the decoder layer (or embedding) at work and the next one.

    DeepSpeed's defaults, which these never exceed, keep all of a model below 1e9 parameters gathered.
    """
    sizes: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        block = _DECODER_LAYER.match(name)
        key = block.group() if block else name
        sizes[key] = sizes.get(key, 0) + int(getattr(parameter, "ds_numel", parameter.numel()))
    largest = max(sizes.values(), default=0)
    kept = min(2 * largest, 1_000_000_000)
    return {
        "stage3_max_live_parameters": kept,
        "stage3_max_reuse_distance": kept,
        "stage3_prefetch_bucket_size": min(largest, 50_000_000),
    }


def _set_malloc(option: int, value: int) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(option, value)


def keep_freed_memory() -> None:
    """Keep freed memory of any size in this process, for the tensors of the next step.

    By default tensors over 32 MB are mmap-ed and returned to the OS when freed; the page faults of the next allocation
    were a good part of the CPU time of a step on a model of 135 M parameters.
    """
    _set_malloc(M_MMAP_MAX, 0)
    _set_malloc(M_TRIM_THRESHOLD, NEVER)


@contextlib.contextmanager
def large_tensors_apart() -> Iterator[None]:
    """Inside, tensors of 1 MB and more are mmap-ed, so freeing them returns memory to the OS; afterwards they are not.

    While a model is loaded, glibc would move its mmap threshold up to 32 MB after the first free; small objects
    between large freed tensors then keep the heap fragmented (half a rank's share of the model was lost this way).
    After loading, the heap serves large tensors too and is not trimmed, so that steps cause no page faults.
    """
    _set_malloc(M_MMAP_THRESHOLD, LARGE_BYTES)
    _set_malloc(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
    try:
        yield
    finally:
        _set_malloc(M_MMAP_THRESHOLD, LARGEST_BYTES)  # the value that glibc would have reached by itself
        _set_malloc(M_TRIM_THRESHOLD, NEVER)


@quick_collections()
@large_tensors_apart()
def initialize(
    info: ModelInfo,
    world: World,
    ds_config: dict[str, Any],
    *,
    dtype: str,
    parts: ModelParts,
    parameters: Callable[[nn.Module], list[Any]] | None = None,
    recompute: bool = False,
) -> Any:
    """Return the DeepSpeed engine of a model; each process reads only its share of the files and checks it.

    Collective. ``dtype`` is the parameters' type (``model.dtype``); ``ds_config`` says everything else (stage, expert
    parallelism, optimizer); ``parameters`` names what the optimizer of a model that is trained gets (None: the model is
    frozen); ``recompute`` turns on activation checkpointing.

    Raises:
        UserError: the files are damaged.
        AssertionError: AutoEP did not convert every MoE layer (it skips unknown families silently), or a weight is
            not what the files say.
    """
    ep = autoep.expert_parallel_size(ds_config)
    model: Any
    model, files = load_share(info.path, TORCH_DTYPES[dtype], world, ep=ep, ds_config=ds_config, parts=parts)
    layers = sum(1 for module in model.modules() if _has_experts(module))
    arguments: dict[str, Any] = {}
    if ds_config["zero_optimization"]["stage"] == 3:
        ds_config = merge_ds_config({"zero_optimization": stage3_limits(model)}, ds_config)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if parameters is not None:
        model.train()
        arguments["model_parameters"] = parameters(model)
        import_muon()
    else:
        model.requires_grad_(False)
    with autoep.readable_recorders():
        engine, *_ = quiet_deepspeed().initialize(model=model, config=ds_config, **arguments)
    autoep.require_converted(engine.module, layers, ep)
    if info.family.fp32_gate:
        autoep.make_gates_fp32(engine.module)
    files.prove(engine.module, ep, world.rank % ep)
    files.close()
    if parameters is None:
        engine.eval()
    return engine


def import_muon() -> None:
    """Import DeepSpeed's Muon optimizer, which DeepSpeed imports anyway, without importing torch's compiler for it.

    A job cannot choose Muon, and importing the compiler takes a second.
    """
    from deepspeed.runtime import compiler

    compile_ = compiler.compile
    compiler.compile = lambda *arguments, **options: lambda function: function
    try:
        with contextlib.suppress(ImportError):
            import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        compiler.compile = compile_


def inference_engine(
    info: ModelInfo,
    world: World,
    *,
    dtype: str,
    ep: int,
    zero_stage: int = 0,
    parts: ModelParts | None = None,
) -> Any:
    """A forward-only DeepSpeed engine.

    Experts are sharded over ``ep`` ranks by AutoEP; at ``zero_stage`` 3 (which families without expert parallelism
    always have when there is more than one process) every rank keeps a part of each weight.
    """
    stage = 3 if info.family.autoep_preset is None and world.size > 1 else zero_stage
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage)
    if stage == 3:
        ds_config["bf16"] = {"enabled": dtype == "bf16"}
    parts = replace(parts or ModelParts(), expert_kernel=expert_kernel(info, world.device))
    return initialize(info, world, ds_config, dtype=dtype, parts=parts)


def expert_kernel(info: ModelInfo, device: torch.device) -> str | None:
    """Return the experts implementation to request from transformers; None leaves the choice to it.

    The rule is our decision, from plain forward passes measured on one H100 (8 x 2048 tokens, bf16):
    Mixtral's experts (14,336 wide) were 9 % faster one after the other, OLMoE's (1,024 wide) 2.4 times faster grouped.
    Transformers' own choice is grouped where the family allows it, else one after the other.
    """
    if device.type == "cpu":
        return None
    width = info.config.get("moe_intermediate_size") or info.config.get("intermediate_size") or 0
    return "eager" if int(width) >= WIDE_EXPERT else None


def _has_experts(module: nn.Module) -> bool:
    """Whether this is an MoE layer with routed experts that have weights."""
    experts = module._modules.get("experts")
    return experts is not None and any(
        len(getattr(parameter, "ds_shape", parameter.shape)) == 3 for parameter in experts.parameters()
    )
