"""Pieces of parameters that ranks hold, and AutoEP's description of which rank holds which experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trace_ds.conversion.runs import Run, TensorSource, make_source
from trace_ds.conversion.torch_archive import COPY_AGAIN, LazyTensor
from trace_ds.errors import UserError


def damaged(what: str, path: Path) -> UserError:
    return UserError(what, str(path), COPY_AGAIN)


def engine_dtype(model: dict[str, Any]) -> str:
    """bf16, fp16 or fp32: the type of the engine's own parameters (the first one decides)."""
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
    for tensor in model["module"].values():
        if isinstance(tensor, LazyTensor) and tensor.dtype in names:
            return names[tensor.dtype]
    return ""


def autoep_layers(state: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """AutoEP's description of the MoE layers in a model-states file (empty: no expert parallelism)."""
    layers = state.get("ds_autoep_layers") or state.get("autoep_layers") or []
    for layer in layers:
        needed = ("expert_key_prefix", "num_experts", "num_local_experts", "ep_size", "moe_layer_id", "ep_rank")
        if not isinstance(layer, dict) or any(key not in layer for key in needed):
            raise damaged("the AutoEP metadata are incomplete", path)
        counts = [layer[key] for key in needed[1:4]]
        if not all(isinstance(n, int) and n > 0 for n in counts) or counts[1] * counts[2] != counts[0]:
            raise damaged(
                f"the AutoEP metadata contradict themselves: {counts[0]} experts, {counts[1]} on each of {counts[2]}",
                path,
            )
    return list(layers)


def local_experts(layer: dict[str, Any], ep_rank: int) -> list[int]:
    """Global numbers of the experts that expert-parallel rank ``ep_rank`` holds, in its order."""
    placement = layer.get("expert_placement")
    if isinstance(placement, dict):
        for entry in placement["ranks"]:
            if entry["rank"] == ep_rank:
                return [int(expert) for expert in entry["experts"]]
    count = layer["num_local_experts"]
    return list(range(ep_rank * count, (ep_rank + 1) * count))


def expert_weights(layers: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {f"{layer['expert_key_prefix']}.{weight}": layer for layer in layers for weight in ("w1", "w2", "w3")}


class Fragments:
    """Collects the pieces of every parameter's state over the ranks and joins them."""

    def __init__(self) -> None:
        self._pieces: dict[tuple[str, str], dict[int, dict[int, list[Run]]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def add(
        self, name: str, state: str, shape: tuple[int, ...], ep_rank: int, part: int, parts: int, run: Run, path: Path
    ) -> None:
        """Piece ``part`` of ``parts`` of what ``ep_rank`` (0 for shared parameters) holds of a parameter."""
        if self._shapes.setdefault(name, shape) != shape or self._counts.setdefault((name, ep_rank), parts) != parts:
            raise damaged(f"the ranks disagree about the shape or partitioning of {name}", path)
        held = self._pieces.setdefault((name, state), {}).setdefault(ep_rank, {})
        if part in held:
            raise damaged(f"piece {part} of {name} is there twice", path)
        held[part] = [run]

    def join(
        self, directory: Path, experts: dict[str, dict[str, Any]], states: Sequence[str]
    ) -> dict[str, dict[str, TensorSource]]:
        """state -> name -> whole tensor."""
        joined: dict[str, dict[str, TensorSource]] = {state: {} for state in states}
        for (name, state), by_ep in self._pieces.items():
            layer = experts.get(name)
            shape = self._shapes[name]
            rank_sources = {}
            for ep_rank in range(layer["ep_size"] if layer else 1):
                held = by_ep.get(ep_rank, {})
                missing = set(range(self._counts.get((name, ep_rank), 1))) - set(held)
                if missing:
                    who = f" of expert-parallel rank {ep_rank}" if layer else ""
                    raise damaged(f"piece {min(missing)}{who} of {name} is missing", directory)
                rank_sources[ep_rank] = [run for part in sorted(held) for run in held[part]]
            joined[state][name] = join_experts(name, shape, rank_sources, layer, directory)
        return joined


def join_experts(
    name: str,
    shape: tuple[int, ...],
    runs_of_rank: dict[int, list[Run]],
    layer: dict[str, Any] | None,
    where: Path,
) -> TensorSource:
    """The whole tensor from what each expert-parallel rank holds (``shape``: of one rank's part)."""
    try:
        if layer is None:
            return make_source(name, shape, runs_of_rank[0])
        each = math.prod(shape[1:])
        by_expert: dict[int, list[Run]] = {}
        for ep_rank, runs in runs_of_rank.items():
            part = make_source(name, shape, runs)
            for position, expert in enumerate(local_experts(layer, ep_rank)):
                by_expert[expert] = part.slice_runs(position * each, each)
        whole = [run for expert in range(layer["num_experts"]) for run in by_expert[expert]]
        return make_source(name, (layer["num_experts"], *shape[1:]), whole)
    except (ValueError, KeyError) as error:
        raise damaged(f"the pieces of {name} do not fit together ({error})", where) from None
