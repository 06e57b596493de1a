"""The three ways a model's tensors are cut and named, and how to go between them without touching data.

* *hub*: on the Hugging Face hub, one tensor per expert (``block_sparse_moe.experts.3.w1.weight``).
* *fused*: in transformers' memory and in plain ZeRO-3's files (``mlp.experts.gate_up_proj``). Every source is brought
  to it and every target is made from it.
* *engine*: in DeepSpeed's AutoEP (``mlp.experts.w1``, ``w3``: gate and up apart; ``mlp.router.gate``).

Hub ↔ fused is transformers' own weight mapping: the reverse conversion is run once on tensors without data
(meta device) that remember where their elements come from, and what comes out is read off as a list of
:class:`~trace_ds.tensors.runs.Block`. There is no mapping of names in this file. Fused ↔ engine undoes
``deepspeed/moe/ep_repack.py``.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import is_alias
from trace_ds.tensors.model_files import read_model_config
from trace_ds.tensors.runs import Block, TensorSource, assemble, extract

MAX_BLOCKS = 1 << 20
NO_SHAPE = ("dtype", "torch_dtype", "_name_or_path", "transformers_version")  # keys that change no tensor's place
_FAMILIES = "use one of the families mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek_v2, deepseek_v3, qwen3_5_moe_text"


@dataclass(frozen=True)
class Piece:
    """A tensor of one layout as pieces of one tensor of the other: ``blocks`` (inner: in it, outer: in ``whole``)."""

    name: str
    whole: str
    shape: tuple[int, ...]
    blocks: tuple[Block, ...]


@dataclass(frozen=True)
class ModelLayout:
    """Names and shapes of a model in the fused and the hub layout.

    Attributes:
        fused: name -> shape of every parameter and persistent buffer in memory; tied weights once.
        tied: name that is not stored -> name of the tensor it is tied to.
        hub: name -> Piece of every tensor on disk, in transformers' order.
        keep_fp32: patterns of names that transformers keeps in fp32 whatever the model's type.
        ignored: patterns of names that may be on disk and are not part of the model (DeepSeek-V3's layer for
            multi-token prediction).
    """

    fused: dict[str, tuple[int, ...]]
    tied: dict[str, str]
    hub: dict[str, Piece]
    keep_fp32: tuple[str, ...]
    ignored: tuple[str, ...]

    def keeps_fp32(self, name: str) -> bool:
        return any(re.search(rf"(^|\.){re.escape(pattern)}($|\.)", name) for pattern in self.keep_fp32)

    def ignores(self, name: str) -> bool:
        """Whether transformers skips a tensor of this name when it loads the model."""
        return name not in self.hub and name not in self.fused and any(re.search(p, name) for p in self.ignored)


def decoder_layer(name: str) -> int:
    """The decoder layer of a parameter or module, -1 outside the layers."""
    match = re.search(r"\.layers\.(\d+)", name)
    return int(match[1]) if match else -1


class _Tracked(torch.Tensor):
    """A meta tensor that stays a view through ``contiguous``, so that its offset and strides tell where it is from."""

    def contiguous(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self


def read_layout(model_directory: Path) -> ModelLayout:
    """Build the model on the meta device and read its layout; needs ``config.json`` only.

    Raises:
        UserError: no or unreadable ``config.json``, or an architecture that transformers does not know or maps in a
            way that is not a rearrangement of elements.
    """
    config = read_model_config(model_directory)  # refuses what would run code from elsewhere
    shape = {key: value for key, value in config.items() if key not in NO_SHAPE}
    try:
        return _layout(json.dumps(shape, sort_keys=True))
    except UserError:
        raise
    except Exception as error:  # whatever a value that nobody would write makes of some line in transformers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"transformers cannot build the model that this config.json describes ({reason})"
        fix = "give the model that was trained with --base-model"
        raise UserError(problem, str(model_directory / "config.json"), fix) from None


@functools.lru_cache(maxsize=2)  # the models of a run have one, unless some other is compared with them
def _layout(shape: str) -> ModelLayout:
    """The layout by the JSON of a configuration, without what changes no tensor's place."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    raw = json.loads(shape)
    config = CONFIG_MAPPING[raw.pop("model_type", None)].from_dict(raw)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first_name: dict[int, str] = {}
    tied: dict[str, str] = {}
    fused: dict[str, tuple[int, ...]] = {}
    for name in model.state_dict():
        tensor = parameters.get(name)
        if tensor is not None and id(tensor) in first_name:
            tied[name] = first_name[id(tensor)]
            continue
        if tensor is not None:
            first_name[id(tensor)] = name
        fused[name] = tuple((tensor if tensor is not None else model.get_buffer(name)).shape)

    tracked = {name: torch.empty(shape, device="meta").as_subclass(_Tracked) for name, shape in fused.items()}
    owners = {tensor.untyped_storage()._cdata: name for name, tensor in tracked.items()}
    hub: dict[str, Piece] = {}
    for name, view in revert_weight_conversion(model, dict(tracked)).items():
        whole = owners.get(view.untyped_storage()._cdata)
        if whole is None or (blocks := blocks_of_view(view.shape, view.stride(), view.storage_offset())) is None:
            problem = f"transformers computes {name} in a way that is not a rearrangement of one tensor"
            raise UserError(problem, f"model_type {config.model_type}", _FAMILIES)
        hub[name] = Piece(name, whole, tuple(view.shape), tuple(blocks))
    keep = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    keep |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    ignored = tuple(sorted(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()))
    return ModelLayout(fused, tied, hub, tuple(sorted(keep)), ignored)


def blocks_of_view(shape: tuple[int, ...], stride: tuple[int, ...], offset: int) -> list[Block] | None:
    """The contiguous blocks of a strided view (inner: in it, outer: in its storage); None where they are too many."""
    inner_numel = 1
    outer_dims = len(shape)
    while outer_dims and (shape[outer_dims - 1] == 1 or stride[outer_dims - 1] == inner_numel):
        inner_numel *= shape[outer_dims - 1]
        outer_dims -= 1
    if math.prod(shape[:outer_dims]) > MAX_BLOCKS:
        return None
    blocks = []
    for count, index in enumerate(itertools.product(*(range(size) for size in shape[:outer_dims]))):
        start = offset + sum(i * step for i, step in zip(index, stride, strict=False))
        blocks.append(Block(count * inner_numel, start, inner_numel))
    return blocks


def disk_to_fused(
    layout: ModelLayout, tensors: Mapping[str, TensorSource]
) -> tuple[dict[str, TensorSource], list[str]]:
    """(the tensors of a model directory by their names in memory, what does not fit the model), by the layout, hub or
    fused, that their names are of."""
    problems = missing_and_unexpected({name: piece.shape for name, piece in layout.hub.items()}, tensors)
    if not problems:
        fused = _assembled(layout, [(piece, tensors[piece.name]) for piece in layout.hub.values()])
        return {name: fused[name] for name in layout.fused}, []
    if any(name in layout.hub and name not in layout.fused for name in tensors):
        return {}, problems
    return dict(tensors), missing_and_unexpected(layout.fused, tensors)


def _assembled(layout: ModelLayout, parts: Iterable[tuple[Piece, TensorSource]]) -> dict[str, TensorSource]:
    """The fused tensors that the pieces are of, from their sources."""
    parts_of: dict[str, list[tuple[TensorSource, tuple[Block, ...]]]] = {}
    for piece, source in parts:
        parts_of.setdefault(piece.whole, []).append((source, piece.blocks))
    fused = {}
    for whole, sources in parts_of.items():
        try:
            fused[whole] = assemble(whole, layout.fused[whole], sources)
        except ValueError as error:
            names = " … ".join(sources[number][0].name for number in (0, -1))
            raise UserError(f"{whole} cannot be made from {names} ({error})", "checkpoint") from None
    return fused


def fused_to_hub(layout: ModelLayout, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    return {name: extract(name, piece.shape, piece.blocks, tensors[piece.whole]) for name, piece in layout.hub.items()}


# Fused <-> engine. AutoEP replaces the module of an MoE layer, PREFIX = model.layers.N.mlp: gate_up_proj is cut into
# experts.w1 (gate) and .w3 (up), and what else is below PREFIX gets other names. (The router has a second one that is
# only an alias, gate.gate.weight.)
ENGINE_NAMES = (
    (r"experts\.down_proj", "experts.w2"),
    (r"gate\.(weight|bias)", r"router.gate.\1"),
    (r"gate\.(.+)", r"router.\1"),
    (r"shared_expert(_gate)?\.(.+)", r"shared_experts\1.\2"),
)
EXPERTS = re.compile(r"(.+)\.experts\.gate_up_proj$")


def moe_prefixes(layout: ModelLayout) -> list[str]:
    """Module paths of the MoE layers, in the model's order."""
    return [match[1] for match in map(EXPERTS.match, layout.fused) if match]


def engine_pieces(layout: ModelLayout) -> dict[str, Piece]:
    """Engine name -> Piece of a fused tensor, for the tensors that AutoEP renames or cuts."""
    pieces: dict[str, Piece] = {}
    for prefix in moe_prefixes(layout):
        gate_up = f"{prefix}.experts.gate_up_proj"
        experts, double_ffn, hidden = layout.fused[gate_up]
        half = double_ffn // 2 * hidden
        for weight, shift in (("w1", 0), ("w3", half)):
            blocks = tuple(Block(e * half, 2 * e * half + shift, half) for e in range(experts))
            name = f"{prefix}.experts.{weight}"
            pieces[name] = Piece(name, gate_up, (experts, double_ffn // 2, hidden), blocks)
        for whole, shape in layout.fused.items():
            leaf = whole.removeprefix(f"{prefix}.")
            for pattern, renamed in ENGINE_NAMES:
                if leaf != whole and (match := re.fullmatch(pattern, leaf)):
                    name = f"{prefix}.{match.expand(renamed)}"
                    pieces[name] = Piece(name, whole, shape, (Block(0, 0, math.prod(shape)),))
                    break
    return pieces


def engine_to_fused(layout: ModelLayout, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Tensors under fused names from those under engine names; what AutoEP did not touch passes through.

    The alias of the router is dropped, and so are tensors that are tied to another one; whatever is left without a
    fused name is returned under its own, for the caller to report.
    """
    pieces = engine_pieces(layout)
    parts: list[tuple[Piece, TensorSource]] = []
    fused: dict[str, TensorSource] = {}
    for name, source in tensors.items():
        piece = pieces.get(name)
        if piece is not None and source.shape == piece.shape:
            parts.append((piece, source))
        elif not is_alias(name, pieces) and name not in layout.tied:
            fused[name] = source
    return fused | _assembled(layout, parts)


def fused_to_engine(layout: ModelLayout, tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """Tensors under AutoEP's names (whole: all experts together); the rest pass through."""
    pieces = {name: piece for name, piece in engine_pieces(layout).items() if piece.whole in tensors}
    replaced = {piece.whole for piece in pieces.values()}
    engine = {name: source for name, source in tensors.items() if name not in replaced}
    for name, piece in pieces.items():
        engine[name] = extract(name, piece.shape, piece.blocks, tensors[piece.whole])
    return engine


def missing_and_unexpected(expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorSource]) -> list[str]:
    """One line for each missing name, unexpected name and other shape."""
    lines = [f"{name} is missing" for name in expected if name not in tensors]
    lines += [f"{name} is not part of the model" for name in tensors if name not in expected]
    lines += [
        f"{name} has shape {list(tensors[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return lines
