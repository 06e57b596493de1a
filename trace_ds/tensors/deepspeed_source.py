"""DeepSpeed checkpoints of ZeRO stages 0 to 3, with and without AutoEP, as whole tensors that are still on disk.

How DeepSpeed lays a parameter out (``runtime/zero/stage3.py``, ``stage_1_and_2.py``, ``runtime/engine.py``, 0.19):

* Stage 3: parameters are packed into sub-groups, in the order of ``param_shapes``. Each rank of a sub-group's
  partition group holds ``ceil(numel / ranks)`` elements of every parameter, the last ranks' padded. The group is the
  data-parallel world, or for AutoEP experts the ranks that hold the same experts (``ds_zero_partition_groups``); there
  the parameter is the rank's own experts only.
* Stages 1 and 2: all parameters of a group are flattened into one vector that is cut over the ranks;
  ``param_slice_mappings`` says which piece of which parameter lies where on this rank. Experts are again cut over the
  ranks that share them.
* Stage 0: whole tensors, each expert in a file of its own; no fp32 masters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import EXPERT_FILE, MODEL_FILE, RANK_FILE, Checkpoint
from trace_ds.tensors.partitions import (
    Fragments,
    autoep_layers,
    check_adam_step,
    check_ranks,
    damaged,
    engine_dtype,
    expert_weights,
    join_experts,
    reading,
)
from trace_ds.tensors.runs import Run, TensorSource, from_lazy, make_source
from trace_ds.tensors.torch_archive import LazyTensor, plain_shape, read_archive, scalar

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32"


def open_deepspeed(directory: Path) -> Checkpoint:
    """Open a directory that ``DeepSpeedEngine.save_checkpoint`` wrote."""
    names = sorted(entry.name for entry in directory.iterdir())
    ranked: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in names:
        match = RANK_FILE.match(name)
        if match:
            if int(match[2]):
                raise UserError(
                    "tensor- or pipeline-parallel checkpoints are not supported", str(directory / name), "use ep"
                )
            if int(match[1]) in ranked[match[3]]:
                raise damaged(
                    f"rank {match[1]} has two files here: files of different jobs are mixed", directory / name
                )
            ranked[match[3]][int(match[1])] = name
    if ranked["model"]:
        return _open_zero3(directory, ranked["model"], ranked["optim"])
    models = [name for name in names if MODEL_FILE.match(name)]
    if len(models) != 1:
        raise damaged(f"expected one mp_rank_00_model_states.pt, found {models or 'none'}", directory)
    return _open_replicated(directory, models[0], ranked["optim"], names)


def _read_state(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    state = read_archive(path)
    if not isinstance(state, dict):
        raise damaged("this is not a DeepSpeed checkpoint file", path)
    missing = [key for key in keys if key not in state]
    if missing:
        raise damaged(f"this is not a DeepSpeed checkpoint file (no {missing[0]} in it)", path)
    return state


def _adam_step(state: Any) -> Any:
    step = state.get("step") if isinstance(state, dict) else None
    return scalar(step) if isinstance(step, LazyTensor) else step


def _same(values: dict[str, Any], what: str, directory: Path) -> Any:
    """The one value that all files must share; the error names a file of each."""
    first = next(iter(values), None)
    for name, value in values.items():
        if first is not None and value != values[first]:
            raise damaged(f"{what} {value} here, but {values[first]} in {first}: files of different steps are mixed",
                          directory / name)  # fmt: skip
    return values[first] if first is not None else None


def _open_zero3(directory: Path, model_files: dict[int, str], optim_files: dict[int, str]) -> Checkpoint:
    needed = ("module", "param_shapes", "dp_world_size", "global_steps")
    first = min(model_files)
    head_path = directory / model_files[first]
    head = _read_state(head_path, needed)
    with reading(head_path):
        world = int(head["dp_world_size"])
    check_ranks(directory, model_files, world, "model", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    like = next(iter(optim_files.values()), "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    like = RANK_FILE.sub(lambda match: match[0].replace(f"rank_{match[1]}_", "rank_0_", 1), like)
    check_ranks(directory, optim_files, world, "optimizer", like)

    ranks = _Zero3Ranks(world)
    for rank in range(world):
        model_path, optim_path = directory / model_files[rank], directory / optim_files[rank]
        model = head if rank == first else _read_state(model_path, needed)
        with reading(model_path):
            ranks.add_model(rank, model, model_path)
        optim = _read_state(optim_path, ("optimizer_state_dict",))["optimizer_state_dict"]
        if not isinstance(optim, dict) or "fp32_flat_groups" not in optim:
            raise damaged("this is not a ZeRO-3 optimizer file (no fp32_flat_groups in it)", optim_path)
        with reading(optim_path):
            ranks.add_optimizer(rank, optim, optim_path)
    _same(ranks.worlds, "world size", directory)
    step = _same(ranks.steps, "step", directory)
    adam_step = _same(ranks.adam_steps, "optimizer step", directory)
    joined = ranks.fragments.join(directory, ranks.experts, (MASTER, *MOMENTS))
    tensors = joined.pop(MASTER)
    trained = tuple(tensors)
    for name, (shape, runs) in ranks.frozen.items():
        tensors[name] = join_experts(name, shape, {0: runs}, None, directory)
    notes: list[str] = []
    with reading(head_path):
        check_adam_step(adam_step, head, notes, directory / optim_files[first])
        _add_buffers(tensors, head)
        layers = autoep_layers(head, head_path)
        return Checkpoint(
            directory,
            "zero3",
            tensors,
            moments={key: value for key, value in joined.items() if value},
            trained=trained,
            dtype=engine_dtype(head),
            step=int(step),
            world=world,
            ep=layers[0]["ep_size"] if layers else 1,
            zero_stage=3,
            layers=layers,
            files=sorted([*model_files.values(), *optim_files.values()]),
            notes=notes,
            shared=dict(head.get("shared_params") or {}),
        )


class _Zero3Ranks:
    """What the two files of every rank say, brought together."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.fragments = Fragments()
        self.frozen: dict[str, tuple[tuple[int, ...], list[Run]]] = {}
        self.shapes: list[dict[str, tuple[int, ...]]] = []  # of the rank added last, by sub-group
        self.experts: dict[str, dict[str, Any]] = {}
        self.steps: dict[str, Any] = {}
        self.adam_steps: dict[str, Any] = {}
        self.worlds: dict[str, Any] = {}

    def add_model(self, rank: int, model: dict[str, Any], path: Path) -> None:
        self.steps[path.name] = int(model["global_steps"])
        self.worlds[path.name] = model["dp_world_size"]
        self.experts = expert_weights(autoep_layers(model, path))  # its ep_rank is this rank's
        self.shapes = [{name: plain_shape(shape) for name, shape in group.items()} for group in model["param_shapes"]]
        for name, tensor in (model.get("frozen_param_fragments") or {}).items():
            shape = plain_shape(model["frozen_param_shapes"][name])
            held = max(0, min(tensor.numel(), math.prod(shape) - rank * tensor.numel()))
            self.frozen.setdefault(name, (shape, []))[1].append(Run(tensor.storage, tensor.start, held))

    def add_optimizer(self, rank: int, optim: dict[str, Any], path: Path) -> None:
        self.worlds[path.name] = optim.get("partition_count", self.world)
        states = (optim.get("optimizer_state_dict") or {}).get("state") or {}
        partitions = optim.get("ds_zero_partition_groups") or []
        if len(self.shapes) != len(optim["fp32_flat_groups"]):
            raise damaged("the optimizer file has another number of parameter groups than the model file", path)
        for index, shapes in enumerate(self.shapes):
            flat: dict[str, LazyTensor] = {MASTER: optim["fp32_flat_groups"][index]}
            state = states.get(index, {})
            flat |= {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
            if state:
                self.adam_steps.setdefault(path.name, _adam_step(state))
            partition = partitions[index] if index < len(partitions) else {}
            parts, part = int(partition.get("partition_count", self.world)), int(partition.get("partition_rank", rank))
            self._add_group(shapes, flat, part, parts, path)

    def _add_group(
        self, shapes: dict[str, Any], flat: dict[str, LazyTensor], part: int, parts: int, path: Path
    ) -> None:
        """One sub-group: its parameters lie one after the other, each cut over the ranks of its partition group."""
        offset = 0
        for name, shape in shapes.items():
            numel = math.prod(shape)
            share = -(-numel // parts)
            held = max(0, min(share, numel - part * share))
            ep_rank = self.experts[name]["ep_rank"] if name in self.experts else 0
            for key, tensor in flat.items():
                if offset + share > tensor.numel():
                    raise damaged(f"{name} reaches beyond its group in this file", path)
                run = Run(tensor.storage, tensor.start + offset, held)
                self.fragments.add(name, key, shape, ep_rank, part, parts, run, path)
            offset += share


def _add_buffers(tensors: dict[str, TensorSource], model: dict[str, Any]) -> None:
    for name in model.get("buffer_names") or []:
        tensor = model["module"].get(name)
        if isinstance(tensor, LazyTensor):
            tensors[name] = from_lazy(name, tensor)


def _open_replicated(directory: Path, model_file: str, optim_files: dict[int, str], names: list[str]) -> Checkpoint:
    """Stages 0, 1 and 2: one file of shared parameters, a file per expert, and optimizer files per rank."""
    model_path = directory / model_file
    model = _read_state(model_path, ("module", "global_steps", "dp_world_size"))
    with reading(model_path):
        world = int(model["dp_world_size"])
        layers = autoep_layers(model, model_path)
        tensors = {name: from_lazy(name, t) for name, t in model["module"].items() if isinstance(t, LazyTensor)}
        tensors |= _expert_files(directory, names, layers)
        kept = [name for name in names if RANK_FILE.match(name) or MODEL_FILE.match(name) or EXPERT_FILE.match(name)]
        checkpoint = Checkpoint(
            directory,
            "zero12" if optim_files else "expert_parallel",
            tensors,
            dtype=engine_dtype(model),
            step=int(model["global_steps"]),
            world=world,
            ep=layers[0]["ep_size"] if layers else 1,
            zero_stage=0,
            layers=layers,
            files=kept,
            shared=dict(model.get("shared_params") or {}),
        )
        if not optim_files:
            checkpoint.notes.append("no fp32 master weights here (ZeRO stage 0): the engine's own parameters were used")
            return checkpoint
        data_first = bool((model.get("ds_config") or {}).get("use_data_before_expert_parallelism", False))
        groups = model.get("param_shapes") or []
        shapes = {name: plain_shape(shape) for group in groups for name, shape in group.items()}
    like = next(iter(optim_files.values()))
    like = RANK_FILE.sub(lambda match: match[0].replace(f"rank_{match[1]}_", "rank_0_", 1), like)
    check_ranks(directory, optim_files, world, "optimizer", like)
    masters, adam_step = _zero12_masters(directory, optim_files, shapes, data_first, checkpoint)
    with reading(model_path):
        check_adam_step(adam_step, model, checkpoint.notes, directory / optim_files[0])
    for name, source in masters[MASTER].items():
        checkpoint.tensors[name] = source
    checkpoint.trained = tuple(masters[MASTER])
    checkpoint.moments = {key: masters[key] for key in MOMENTS if masters[key]}
    return checkpoint


def _expert_files(directory: Path, names: list[str], layers: list[dict[str, Any]]) -> dict[str, TensorSource]:
    """The expert tensors of a stage 0-2 checkpoint from its one-expert files."""
    files = {(int(m[1]), int(m[2])): m[0] for m in map(EXPERT_FILE.match, names) if m}
    if files and not layers:
        raise UserError("native DeepSpeed-MoE checkpoints are not supported", str(directory), "use AutoEP")
    experts: dict[str, TensorSource] = {}
    for layer in layers:
        runs: dict[str, list[Run]] = defaultdict(list)
        shapes: dict[str, tuple[int, ...]] = {}
        for expert in range(layer["num_experts"]):
            key = (layer["moe_layer_id"], expert)
            path = directory / files.get(key, f"layer_{key[0]}_expert_{expert}_mp_rank_00_model_states.pt")
            state = read_archive(path)
            for weight in ("w1", "w2", "w3"):
                name = f"{layer['expert_key_prefix']}.{weight}"
                tensor = state.get(f"{name}.{expert}") if isinstance(state, dict) else None
                if not isinstance(tensor, LazyTensor):
                    raise damaged(f"there is no {name}.{expert} in this file", path)
                runs[name].append(Run(tensor.storage, tensor.start, tensor.numel()))
                shapes[name] = tensor.shape
        for name, held in runs.items():
            experts[name] = make_source(name, (layer["num_experts"], *shapes[name]), held)
    return experts


def _zero12_masters(
    directory: Path,
    optim_files: dict[int, str],
    shapes: dict[str, tuple[int, ...]],
    data_first: bool,
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, TensorSource]], Any]:
    """Masters and moments of stages 1 and 2, joined over the ranks, and the optimizer's step; parameters without
    masters are noted."""
    world, ep = checkpoint.world, checkpoint.ep
    experts = expert_weights(checkpoint.layers)
    pieces: dict[tuple[str, str], dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    adam_steps: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for rank in range(world):
        path = directory / optim_files[rank]
        optim = _read_state(path, ("optimizer_state_dict",))["optimizer_state_dict"]
        if not isinstance(optim, dict) or "param_slice_mappings" not in optim:
            raise damaged("this is not a ZeRO-1/2 optimizer file (no param_slice_mappings in it)", path)
        with reading(path):
            counts = optim.get("partition_count", world)
            largest = max(counts) if isinstance(counts, list) and counts else counts
            if largest != world:
                raise damaged(f"world size {largest} here, but {world} in {MODEL_NAME}", path)
            stages[path.name] = int(optim.get("zero_stage", 1))
            ep_rank = rank // (world // ep) if data_first else rank % ep
            for group, flat, step in _zero12_groups(optim):
                if step is not None:
                    adam_steps.setdefault(path.name, step)
                for name, address in optim["param_slice_mappings"][group].items():
                    numel, start = _fragment(address)
                    for key, tensor in flat.items():
                        if start + numel > tensor.numel():
                            raise damaged(f"{name} reaches beyond its group in this file", path)
                        held = pieces[name, key][ep_rank if name in experts else 0]
                        held.append(Run(tensor.storage, tensor.start + start, numel))
    adam_step = _same(adam_steps, "optimizer step", directory)
    checkpoint.zero_stage = _same(stages, "ZeRO stage", directory)
    joined: dict[str, dict[str, TensorSource]] = {key: {} for key in (MASTER, *MOMENTS)}
    for (name, key), by_ep in pieces.items():
        if name not in shapes:
            raise damaged(f"{name} has an optimizer state but no shape", directory / MODEL_NAME)
        joined[key][name] = join_experts(name, shapes[name], dict(by_ep), experts.get(name), directory)
    without = sorted(set(shapes) - set(joined[MASTER]))
    if without:
        checkpoint.notes.append(f"no fp32 master of {', '.join(without)}: the engine's own parameter was used")
    return joined, adam_step


def _zero12_groups(optim: dict[str, Any]) -> Iterator[tuple[int, dict[str, LazyTensor], Any]]:
    """Of every parameter group of a rank: its number, the flat vectors of masters and moments, Adam's step."""
    states = (optim.get("base_optimizer_state") or {}).get("state") or {}
    for group in range(len(optim["param_slice_mappings"])):
        state = states.get(group, {})
        flat = {MASTER: optim["single_partition_of_fp32_groups"][group]}
        flat |= {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
        yield group, flat, _adam_step(state) if state else None


MODEL_NAME = "mp_rank_00_model_states.pt"


def _fragment(address: Any) -> tuple[int, int]:
    """(numel, start) of DeepSpeed's ``fragment_address``."""
    numel, start = address["numel"], address["start"]
    if not all(type(number) is int and number >= 0 for number in (numel, start)):
        raise ValueError(f"a fragment of {numel} elements from {start} on")
    return numel, start
