"""An opened source, whatever its kind: whole tensors under the engine's names, still on disk; and how they are joined
from the pieces that ranks hold."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.tensors.runs import Run, TensorSource, make_source
from trace_ds.tensors.torch_archive import COPY_CHECKPOINT, WORDS, LazyTensor, read_archive

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt$")
MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_EXPERTS = 1 << 16  # of a layer; what files claim beyond it is not believed
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt$")


@dataclass
class Checkpoint:
    """An opened checkpoint or model directory: its tensors, still on disk, and facts of the job that wrote it.

    Attributes:
        path: its directory.
        kind: zero3, zero12, expert_parallel or huggingface.
        tensors: parameters and persistent buffers in the best precision there is (fp32 masters if any), whole: all
            partitions and all experts joined. Names are the engine's (AutoEP's ``mlp.experts.w1``), or those on disk
            for a Hugging Face directory.
        moments: the Adam moments ``exp_avg`` and ``exp_avg_sq`` by name of the parameter, where there are any.
        trained: names of the parameters that have an fp32 master, so that they are the optimizer's.
        dtype: bf16, fp16 or fp32, the type that the engine computes in (empty: each tensor's own).
        step, world, ep, zero_stage: of the job that wrote it, as far as its files say.
        family: transformers' ``model_type``; None where no manifest, configuration or report of a conversion says it.
        lacks_frozen: whether parameters that were not trained may have been left out (``exclude_frozen_parameters``, as
            our jobs save): they are as in the model that the job started from.
        base: fingerprint of that model, where a manifest or report says it.
        layers: AutoEP's metadata of the MoE layers (of rank 0).
        files: the DeepSpeed files that belong to it, relative to ``path``.
        notes: what the user should know (masters missing, for example).
    """

    path: Path
    kind: str
    tensors: dict[str, TensorSource]
    moments: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    dtype: str = ""
    step: int | None = None
    world: int = 1
    ep: int = 1
    zero_stage: int | None = None
    family: str | None = None
    lacks_frozen: bool = False
    base: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    shared: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """Facts for reports and ``trace-ds inspect``; JSON-compatible and without paths."""
        named = ("kind", "step", "world", "ep", "zero_stage", "family", "base", "dtype")
        # tied heads and AutoEP's alias of a router are another tensor again
        distinct = [n for n in self.tensors if n not in self.shared and not is_alias(n, self.tensors)]
        sources = [self.tensors[name] for name in distinct]
        return {
            **{name: getattr(self, name) for name in named},
            "tensors": len(sources),
            "parameters": sum(source.numel for source in sources),
            "bytes": sum(source.numel * source.dtype.itemsize for source in sources),
            "optimizer_states": sorted(self.moments),
            "files": len(self.files),
            "notes": self.notes,
        }


def is_alias(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether AutoEP holds this tensor of a router a second time under the name of its own router."""
    match = re.match(r"(.+)\.gate\.(gate\.weight|gate\.bias|e_score_correction_bias)$", name)
    return bool(match) and f"{match[1]}.router.{match[2]}" in tensors  # type: ignore[index]


def origin(facts: dict[str, Any]) -> str:
    """A report's source in words."""
    if facts.get("kind") == "huggingface":
        return "a hub model"
    return f"{facts.get('kind')} (step {facts.get('step')}, world {facts.get('world')}, ep {facts.get('ep')})"


def damaged(problem: str, path: Path) -> UserError:
    return UserError(problem, str(path), COPY_CHECKPOINT)


def read_state(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """Read a file that DeepSpeed wrote, which must hold ``keys``."""
    state = read_archive(path)
    missing = [key for key in keys if not isinstance(state, dict) or key not in state]
    if missing:
        raise damaged(f"this is not a DeepSpeed checkpoint file (no {missing[0]} in it)", path)
    return dict(state)


def check_adam_step(adam_step: Any, model: dict[str, Any], notes: list[str], where: Path) -> None:
    """Refuse an optimizer that has made more steps than the job; note one that has made fewer, as after weights were
    loaded without optimizer states."""
    job_step = int(model["global_steps"]) - int(model.get("skipped_steps") or 0)
    if adam_step is None or adam_step == job_step:
        return
    counts = f"the optimizer has made {adam_step:g} steps and the job {job_step}"
    if adam_step > job_step:
        raise damaged(f"{counts}: files of different steps are mixed", where)
    notes.append(f"{counts}: it was started anew, or files of different steps are mixed")


def job_facts(model: dict[str, Any], path: Path) -> dict[str, Any]:
    """Facts of the job that wrote a model-states file, under the names of a ``Checkpoint``'s fields."""
    layers = autoep_layers(model, path)
    words = {dtype: word for word, dtype in WORDS.items()}
    dtypes = (tensor.dtype for tensor in model["module"].values() if isinstance(tensor, LazyTensor))
    return {
        "dtype": next((words[dtype] for dtype in dtypes if dtype in words), ""),  # the first parameter decides
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
            shares = f"{counts[0]} experts, {counts[1]} on each of {counts[2]}"
            raise damaged(f"the AutoEP metadata contradict themselves: {shares}", path)
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


def check_ranks(directory: Path, files: dict[int, str], world: int, kind: str) -> None:
    """Refuse ``files`` (rank -> name) of a ``kind``, model or optim, that are not one for each of ``world`` ranks."""
    # A claimed size costs nothing, however large.
    missing = next((rank for rank in range(min(world, len(files) + 1)) if rank not in files), None)
    if missing is not None:
        like = next(iter(files.values()), f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt")
        name = re.sub(r"_pp_rank_\d+_", f"_pp_rank_{missing}_", like, count=1)
        count = world - sum(rank < world for rank in files)
        raise damaged(f"the file of rank {missing} is missing ({count} of {world} ranks)", directory / name)
    if extra := sorted(rank for rank in files if rank >= world):
        raise damaged(
            f"a file of rank {extra[0]}, but the metadata say world size {world}", directory / files[extra[0]]
        )


class Pieces:
    """The pieces that ranks hold of every state of every parameter, to be joined."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, str], dict[int, dict[int, Run]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    def add(self, name: str, state: str, shape: tuple[int, ...], ep_rank: int, part: int, run: Run) -> None:
        """Add what ``ep_rank`` (0 for shared parameters) has as its ``part``; ``ValueError`` when ranks disagree."""
        if self._shapes.setdefault(name, shape) != shape:
            raise ValueError(f"the ranks disagree about the shape of {name}")
        parts = self._runs.setdefault((name, state), {}).setdefault(ep_rank, {})
        if parts.setdefault(part, run) is not run:
            raise ValueError(f"piece {part} of {name} is there twice")

    def join(
        self, where: Path, layers: list[dict[str, Any]], states: Sequence[str]
    ) -> dict[str, dict[str, TensorSource]]:
        """state -> name -> whole tensor, in the order of the parts and, of experts, of their numbers."""
        experts = expert_weights(layers)
        joined: dict[str, dict[str, TensorSource]] = {state: {} for state in states}
        for (name, state), by_ep in self._runs.items():
            runs = {ep_rank: [parts[part] for part in sorted(parts)] for ep_rank, parts in by_ep.items()}
            try:
                joined[state][name] = _join(name, self._shapes[name], runs, experts.get(name))
            except (ValueError, KeyError, TypeError) as error:
                raise damaged(f"the pieces of {name} do not fit together ({error})", where) from None
        return joined


def _join(
    name: str, shape: tuple[int, ...], runs_of_rank: dict[int, list[Run]], layer: dict[str, Any] | None
) -> TensorSource:
    """The whole tensor from what each expert-parallel rank holds (``shape``: of one rank's part)."""
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
