"""Building a model so that each process reads from disk, and holds in memory, only its share.

* ZeRO stages 0 to 2: the model is built without data; everything but the routed experts is read whole, of the routed
  experts only those of this expert-parallel rank. The other experts are memory that is reserved and never touched,
  so it does not exist; AutoEP drops it when it cuts out the local experts.
* ZeRO stage 3: the model is built under ``zero.Init`` (one module at a time exists whole), then each rank reads the
  range of each tensor that is its partition.

Rotary frequencies are computed anew in fp32: cast to bf16 they move the logits by up to 4e-3. A damaged file, NaN in
the weights or a tensor that does not fit ends every rank with the same message.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trace_ds.errors import UserError
from trace_ds.models.attention import adopt
from trace_ds.models.routers import find_routers, moe_decoder_layers
from trace_ds.models.weight_files import WeightFiles, full_shape, local_elements
from trace_ds.parallel.world import World, quiet_deepspeed
from trace_ds.tensors.layouts import decoder_layer, moe_prefixes, read_layout


class SkippedExperts(nn.Module):
    """Replaces the routed or shared experts of an MoE layer whose output is not used."""

    def forward(self, hidden_states: torch.Tensor, *others: Any) -> torch.Tensor:
        return hidden_states


@dataclass(frozen=True)
class ModelParts:
    """Which parts of a model are loaded.

    Attributes:
        layers: only the first so many decoder layers (at least up to the first MoE layer, which AutoEP insists on);
            None: all.
        head: the language-model head, and with ``layers`` the norm before it.
        last_output: the output of the last decoder layer; without it the layers after the last router, and the routed
            and shared experts beside it, are left out.
        expert_kernel: transformers' experts implementation; None: its own choice.
    """

    layers: int | None = None
    head: bool = True
    last_output: bool = True
    expert_kernel: str | None = None


def load_share(
    path: Path, dtype: torch.dtype, world: World, *, ep: int, ds_config: dict[str, Any], parts: ModelParts
) -> tuple[nn.Module, WeightFiles]:
    """The model of a directory in evaluation mode, ready for ``deepspeed.initialize``, and the files to prove it with.

    Collective. Never executes code that ships with the model.

    Raises:
        UserError, AgreedError: the files are damaged or not of this model (see :meth:`World.run_on_all_ranks`).
    """
    partitioned = ds_config["zero_optimization"]["stage"] == 3
    _quiet_transformers()
    # before zero.Init, which would undo the decorators of the model's classes if it saw them being defined
    layout = world.run_on_main_first(lambda: read_layout(path))
    if parts.layers is not None:
        first = min(map(decoder_layer, moe_prefixes(layout)), default=0)
        parts = replace(parts, layers=max(parts.layers, first + 1))
    model: Any = _skeleton(path, dtype, parts, ds_config if partitioned else None)
    leave_out(model, parts, ep)

    def read() -> WeightFiles:
        files = WeightFiles.open(path, layout)
        if not partitioned:
            model.to_empty(device="cpu")
        _read(model, files, world.device if partitioned else torch.device("cpu"), dtype, ep, world.rank % ep)
        return files

    files = world.run_on_all_ranks(read)
    model.config.use_cache = False
    return model.eval(), files


def load_whole(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The model of a directory in evaluation mode, on this process alone; its weights may hold NaN.

    Never executes code that ships with the model.

    Raises:
        UserError: the files are damaged or not of this model.
    """
    _quiet_transformers()
    files = replace(WeightFiles.open(path, read_layout(path)), refuses_nan=False)
    model = _skeleton(path, dtype, ModelParts(), None)
    model.to_empty(device=device)
    _read(model, files, device, dtype, 1, 0)
    files.close()
    return model.eval()


def _read(
    model: nn.Module, files: WeightFiles, device: torch.device, dtype: torch.dtype, ep: int, ep_rank: int
) -> None:
    """Read this rank's share of everything in a model that was built without data."""
    try:
        _tie(model, files)
        _restore_rotary(model, device)
        _fill(model, files, dtype, ep, ep_rank)
    except OSError as error:
        problem = f"the weights cannot be read ({error.strerror})"
        raise UserError(problem, str(error.filename or files.path), "check the storage they lie on") from None


def _skeleton(path: Path, dtype: torch.dtype, parts: ModelParts, zero3: dict[str, Any] | None) -> nn.Module:
    """Build the model without data: on the meta device, or partitioned by ``zero.Init``."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    if parts.layers is not None:
        config.num_hidden_layers = parts.layers
    extra = {} if parts.expert_kernel is None else {"experts_implementation": parts.expert_kernel}
    context: Any = torch.device("meta")
    if zero3 is not None:
        context = quiet_deepspeed().zero.Init(config_dict_or_path=zero3)  # dtype: from its bf16 section

    def build(attention: str) -> nn.Module:
        with no_init_weights(), context:
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention, **extra)

    try:
        model = build("sdpa")
    except ValueError:  # a family without it (gpt_oss)
        model = build("eager")
    adopt(model)
    return model


def leave_out(model: Any, parts: ModelParts, ep: int) -> None:
    """Remove from the model what ``parts`` does not include."""
    if not parts.head:
        model.lm_head = nn.Identity()
        if parts.layers is not None:
            model.model.norm = nn.Identity()
    last = moe_decoder_layers(model)[-1]
    if parts.last_output:
        return
    del model.model.layers[last + 1 :]
    if ep > 1 and len(find_routers(model)) == 1:
        return  # AutoEP insists on a layer to convert
    for module in list(model.model.layers[last].modules()):
        for name in list(module._modules):
            if name == "experts" or name.startswith("shared"):  # shared_expert, shared_experts, shared_mlp
                setattr(module, name, SkippedExperts())


def _tie(model: nn.Module, files: WeightFiles) -> None:
    """Tie again the parameters that the family ties: building without data or under ``zero.Init`` unties them."""
    for name, target in files.layout.tied.items():
        owner, _, leaf = name.rpartition(".")
        with contextlib.suppress(AttributeError):  # the head is left out
            if leaf in model.get_submodule(owner)._parameters:
                setattr(model.get_submodule(owner), leaf, model.get_parameter(target))


def _restore_rotary(model: Any, device: torch.device) -> None:
    """Rebuild the modules whose buffers are in no file (rotary embeddings), in fp32."""
    for name, module in list(model.named_modules()):
        if module._non_persistent_buffers_set:
            if not type(module).__name__.endswith("RotaryEmbedding"):
                raise UserError(
                    f"{name} ({type(module).__name__}) has buffers that no file holds",
                    str(model.config.model_type),
                    "use a model of another family",
                )
            model.set_submodule(name, type(module)(config=model.config).to(device))


def _fill(model: nn.Module, files: WeightFiles, dtype: torch.dtype, ep: int, ep_rank: int) -> None:
    """Read this rank's share of every parameter and persistent buffer."""
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or () if dtype != torch.float32 else ()
    fp32 = re.compile(r"(^|\.)(" + "|".join(map(re.escape, kept)) + r")($|\.)" if kept else r"$^")
    for name, parameter in model.named_parameters():
        source = files.source(name)
        if source.shape != full_shape(parameter):
            raise UserError(f"{name} has shape {list(source.shape)}", str(files.path), "copy the model again")
        if not hasattr(parameter, "ds_tensor") and fp32.search(name):
            parameter.data = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
        values, first, last = local_elements(parameter)
        # AutoEP gives each rank as many experts, in their order: a rank's share of the fused tensor is one range
        if ep > 1 and ".experts." in name and parameter.dim() == 3 and not hasattr(parameter, "ds_tensor"):
            share = parameter.numel() // ep
            first, last = ep_rank * share, (ep_rank + 1) * share
            values = values[first:last]
        if last > first:
            target = values[: last - first]
            # files are read into host memory, also where the partition is on the GPU
            staged = target if target.device.type == "cpu" else torch.empty_like(target, device="cpu")
            files.read(source, first, staged)
            if staged is not target:
                target.copy_(staged)
    for name, buffer in model.named_buffers():
        if name in files.sources:
            owner, _, leaf = name.rpartition(".")
            kind = torch.float32 if fp32.search(name) else buffer.dtype
            values = torch.empty(buffer.shape, dtype=kind)
            files.read(files.sources[name], 0, values)
            model.get_submodule(owner)._buffers[leaf] = values.to(buffer.device)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
