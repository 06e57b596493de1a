"""Pieces of parameters that ranks hold, and AutoEP's description of which rank holds which experts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.tensors.dtypes import WORDS
from trace_ds.tensors.runs import Run, TensorSource, make_source
from trace_ds.tensors.torch_archive import COPY_AGAIN, LazyTensor, read_archive

MAX_EXPERTS = 1 << 16  # of a layer; what files claim beyond it is not believed


def damaged(what: str, path: Path) -> UserError:
    return UserError(what, str(path), COPY_AGAIN)


def read_state(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """What a file that DeepSpeed wrote holds, ``keys`` among it."""
    state = read_archive(path)
    if not isinstance(state, dict):
        raise damaged("this is not a DeepSpeed checkpoint file", path)
    missing = [key for key in keys if key not in state]
    if missing:
        raise damaged(f"this is not a DeepSpeed checkpoint file (no {missing[0]} in it)", path)
    return state


def check_adam_step(adam_step: Any, model: dict[str, Any], notes: list[str], where: Path) -> None:
    """The optimizer cannot have made more steps than the job; fewer are possible and worth a note.

    A job that loaded weights without optimizer states has fewer, and so have files of different steps.
    """
    made = int(model["global_steps"]) - int(model.get("skipped_steps") or 0)
    if adam_step is None or adam_step == made:
        return
    if adam_step > made:
        raise damaged(
            f"the optimizer has made {adam_step:g} steps, the job {made}: files of different steps are mixed", where
        )
    notes.append(
        f"the optimizer has made {adam_step:g} steps and the job {made}: it was started anew, or files of different "
        "steps are mixed"
    )


def job_facts(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """What a model-states file says of the job that wrote it, under the names of a ``Checkpoint``'s fields."""
    layers = autoep_layers(model, path)
    words = {dtype: word for word, dtype in WORDS.items()}
    held = (tensor.dtype for tensor in model["module"].values() if isinstance(tensor, LazyTensor))
    return {
        "dtype": next((words[dtype] for dtype in held if dtype in words), ""),  # the first parameter decides
        "step": int(model["global_steps"]),
        "world": int(model["dp_world_size"]),
        "ep": layers[0]["ep_size"] if layers else 1,
        "layers": layers,
        "shared": dict(model.get("shared_params") or {}),
        "lacks_frozen": model.get("frozen_param_shapes") is None,  # stages 0 and 1 never list them
    }


def autoep_layers(state: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """AutoEP's description of the MoE layers in a model-states file (empty: no expert parallelism)."""
    layers = state.get("ds_autoep_layers") or state.get("autoep_layers") or []
    for layer in layers:
        needed = ("expert_key_prefix", "num_experts", "num_local_experts", "ep_size", "moe_layer_id", "ep_rank")
        if not isinstance(layer, dict) or any(key not in layer for key in needed):
            raise damaged("the AutoEP metadata are incomplete", path)
        counts = [layer[key] for key in needed[1:4]]
        if not all(isinstance(n, int) and 0 < n <= MAX_EXPERTS for n in counts) or counts[1] * counts[2] != counts[0]:
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


def check_ranks(directory: Path, found: dict[int, str], world: int, kind: str) -> None:
    """Refuse a set of files of a ``kind`` (model or optim), one for each rank, that is not that of ``world`` ranks."""
    # A claimed size costs nothing, however large.
    missing = next((rank for rank in range(min(world, len(found) + 1)) if rank not in found), None)
    if missing is not None:
        like = next(iter(found.values()), f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt")
        name = re.sub(r"_pp_rank_\d+_", f"_pp_rank_{missing}_", like, count=1)
        count = world - sum(rank < world for rank in found)
        more = f" ({count} of {world} ranks)" if count > 1 else ""
        kind = "optimizer" if kind == "optim" else kind
        raise UserError(f"the {kind} file of rank {missing} is missing{more}", str(directory / name), COPY_AGAIN)
    extra = sorted(rank for rank in found if rank >= world)
    if extra:
        raise damaged(
            f"the metadata say world size {world}, but there is a file of rank {extra[0]}", directory / found[extra[0]]
        )


class Pieces:
    """The pieces that ranks hold of every state of every parameter, to be joined."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], dict[int, dict[int, Run]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, state: str, shape: tuple[int, ...], ep_rank: int, part: int, run: Run) -> None:
        """What ``ep_rank`` (0 for shared parameters) holds as its ``part``; ``ValueError`` when ranks disagree."""
        if self._shapes.setdefault(name, shape) != shape:
            raise ValueError(f"the ranks disagree about the shape of {name}")
        held = self._runs.setdefault((name, state), {}).setdefault(ep_rank, {})
        if held.setdefault(part, run) is not run:
            raise ValueError(f"piece {part} of {name} is there twice")

    def join(
        self, where: Path, layers: list[dict[str, Any]], states: Sequence[str]
    ) -> dict[str, dict[str, TensorSource]]:
        """state -> name -> whole tensor, in the order of the parts and, of experts, of their numbers."""
        experts = expert_weights(layers)
        joined: dict[str, dict[str, TensorSource]] = {state: {} for state in states}
        for (name, state), by_ep in self._runs.items():
            runs = {ep_rank: [held[part] for part in sorted(held)] for ep_rank, held in by_ep.items()}
            joined[state][name] = join_experts(name, self._shapes[name], runs, experts.get(name), where)
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
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(f"the pieces of {name} do not fit together ({error})", where) from None
