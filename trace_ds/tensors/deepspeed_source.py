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
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import EXPERT_FILE, MODEL_FILE, MOMENTS, RANK_FILE, Checkpoint
from trace_ds.tensors.partitions import (
    Pieces,
    autoep_layers,
    check_adam_step,
    check_ranks,
    damaged,
    expert_weights,
    job_facts,
    read_state,
)
from trace_ds.tensors.runs import Run, TensorSource, from_lazy, make_source
from trace_ds.tensors.torch_archive import LazyTensor, plain_shape, read_archive, reading, scalar

MASTER, FROZEN = "fp32", "frozen"
MODEL_NAME = "mp_rank_00_model_states.pt"


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
        raise damaged(f"expected one {MODEL_NAME}, found {models or 'none'}", directory)
    return _open_replicated(directory, models[0], ranked["optim"], names)


def _read_optimizer(path: Path, stages: str, key: str) -> dict[str, Any]:
    """ZeRO's part of an optimizer file, in which ``stages`` always have ``key``."""
    optim = read_state(path, ("optimizer_state_dict",))["optimizer_state_dict"]
    if not isinstance(optim, dict) or key not in optim:
        raise damaged(f"this is not a {stages} optimizer file (no {key} in it)", path)
    return optim


def _flat(masters: LazyTensor, state: dict[str, Any]) -> tuple[dict[str, LazyTensor], Any]:
    """The flat vectors of a group on a rank, masters and moments, and the optimizer's step (None: it made none)."""
    step = state.get("step")
    moments = {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
    return {MASTER: masters, **moments}, scalar(step) if isinstance(step, LazyTensor) else step


class _Said(defaultdict[str, dict[str, Any]]):
    """What all files must say alike: ``said[what][name of the file]``."""

    def one(self, what: str, directory: Path) -> Any:
        """The value that they share (None: nobody says it); the error names a file of each."""
        first = next(iter(self[what]), "")
        for name, value in self[what].items():
            if value != self[what][first]:
                raise damaged(
                    f"{what} {value} here, but {self[what][first]} in {first}: files of different steps are mixed",
                    directory / name,
                )
        return self[what].get(first)


def _open_zero3(directory: Path, model_files: dict[int, str], optim_files: dict[int, str]) -> Checkpoint:
    needed = ("module", "param_shapes", "dp_world_size", "global_steps")
    head_path = directory / model_files[min(model_files)]
    head = read_state(head_path, needed)
    with reading(head_path):
        world = int(head["dp_world_size"])
    check_ranks(directory, model_files, world, "model")
    check_ranks(directory, optim_files, world, "optim")

    pieces, said = Pieces(), _Said(dict)
    for rank in range(world):
        model_path, optim_path = directory / model_files[rank], directory / optim_files[rank]
        model = head if model_path == head_path else read_state(model_path, needed)
        with reading(model_path):
            said["step"][model_path.name] = int(model["global_steps"])
            said["world size"][model_path.name] = model["dp_world_size"]
            experts = expert_weights(autoep_layers(model, model_path))  # their ep_rank is this rank's
            groups = [{name: plain_shape(shape) for name, shape in group.items()} for group in model["param_shapes"]]
            for name, tensor in (model.get("frozen_param_fragments") or {}).items():
                shape = plain_shape(model["frozen_param_shapes"][name])
                held = max(0, min(tensor.numel(), math.prod(shape) - rank * tensor.numel()))
                pieces.add(name, FROZEN, shape, 0, rank, Run(tensor.storage, tensor.start, held))
        optim = _read_optimizer(optim_path, "ZeRO-3", "fp32_flat_groups")
        with reading(optim_path):
            said["world size"][optim_path.name] = optim.get("partition_count", world)
            states = (optim.get("optimizer_state_dict") or {}).get("state") or {}
            partitions = optim.get("ds_zero_partition_groups") or []
            for index, (shapes, masters) in enumerate(zip(groups, optim["fp32_flat_groups"], strict=True)):
                state = states.get(index, {})
                flat, adam_step = _flat(masters, state)
                if state:
                    said["optimizer step"].setdefault(optim_path.name, adam_step)
                partition = partitions[index] if index < len(partitions) else {}
                parts = int(partition.get("partition_count", world))
                part = int(partition.get("partition_rank", rank))
                _add_group(pieces, shapes, flat, part, parts, experts)
    for what in ("world size", "step"):
        said.one(what, directory)
    adam_step = said.one("optimizer step", directory)
    notes: list[str] = []
    with reading(head_path):
        check_adam_step(adam_step, head, notes, directory / optim_files[min(model_files)])
        facts = job_facts(head, head_path)
        joined = pieces.join(directory, facts["layers"], (MASTER, *MOMENTS, FROZEN))
        trained = tuple(joined[MASTER])
        tensors = joined[MASTER] | joined[FROZEN]
        for name in head.get("buffer_names") or []:
            tensor = head["module"].get(name)
            if isinstance(tensor, LazyTensor):
                tensors[name] = from_lazy(name, tensor)
    moments = {key: joined[key] for key in MOMENTS if joined[key]}
    files = sorted([*model_files.values(), *optim_files.values()])
    return Checkpoint(directory, "zero3", tensors, moments, trained, zero_stage=3, files=files, notes=notes, **facts)


def _add_group(
    pieces: Pieces,
    shapes: dict[str, tuple[int, ...]],
    flat: dict[str, LazyTensor],
    part: int,
    parts: int,
    experts: dict[str, dict[str, Any]],
) -> None:
    """One sub-group of a rank: its parameters lie one after the other, each cut over the ranks of its partition group;
    ``ValueError`` where they do not fit."""
    if not 0 <= part < parts:
        raise ValueError(f"partition {part} of {parts}")
    offset = 0
    for name, shape in shapes.items():
        numel = math.prod(shape)
        share = -(-numel // parts)
        held = max(0, min(share, numel - part * share))
        ep_rank = experts[name]["ep_rank"] if name in experts else 0
        for key, tensor in flat.items():
            if offset + share > tensor.numel():
                raise ValueError(f"{name} reaches beyond its group")
            pieces.add(name, key, shape, ep_rank, part, Run(tensor.storage, tensor.start + offset, held))
        offset += share


def _open_replicated(directory: Path, model_file: str, optim_files: dict[int, str], names: list[str]) -> Checkpoint:
    """Stages 0, 1 and 2: one file of shared parameters, a file per expert, and optimizer files per rank."""
    model_path = directory / model_file
    model = read_state(model_path, ("module", "global_steps", "dp_world_size"))
    with reading(model_path):
        facts = job_facts(model, model_path)
        tensors = {name: from_lazy(name, t) for name, t in model["module"].items() if isinstance(t, LazyTensor)}
        tensors |= _expert_files(directory, names, facts["layers"])
        kept = [name for name in names if RANK_FILE.match(name) or MODEL_FILE.match(name) or EXPERT_FILE.match(name)]
        kind = "zero12" if optim_files else "expert_parallel"
        checkpoint = Checkpoint(directory, kind, tensors, zero_stage=0, files=kept, **facts)
        if not optim_files:
            checkpoint.notes.append("no fp32 master weights here (ZeRO stage 0): the engine's own parameters were used")
            return checkpoint
        data_first = bool((model.get("ds_config") or {}).get("use_data_before_expert_parallelism", False))
        groups = model.get("param_shapes") or []
        shapes = {name: plain_shape(shape) for group in groups for name, shape in group.items()}
    check_ranks(directory, optim_files, checkpoint.world, "optim")
    joined, adam_step = _zero12_masters(directory, optim_files, shapes, data_first, checkpoint)
    with reading(model_path):
        check_adam_step(adam_step, model, checkpoint.notes, directory / optim_files[0])
    checkpoint.trained = tuple(joined[MASTER])
    checkpoint.tensors |= joined.pop(MASTER)
    checkpoint.moments = {key: held for key, held in joined.items() if held}
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
    pieces, said = Pieces(), _Said(dict)
    for rank in range(world):
        path = directory / optim_files[rank]
        optim = _read_optimizer(path, "ZeRO-1/2", "param_slice_mappings")
        with reading(path):
            counts = optim.get("partition_count", world)
            largest = max(counts) if isinstance(counts, list) and counts else counts
            if largest != world:
                raise damaged(f"world size {largest} here, but {world} in {MODEL_NAME}", path)
            said["ZeRO stage"][path.name] = int(optim.get("zero_stage", 1))
            ep_rank = rank // (world // ep) if data_first else rank % ep
            states = (optim.get("base_optimizer_state") or {}).get("state") or {}
            for group, mapping in enumerate(optim["param_slice_mappings"]):
                flat, adam_step = _flat(optim["single_partition_of_fp32_groups"][group], states.get(group, {}))
                if adam_step is not None:
                    said["optimizer step"].setdefault(path.name, adam_step)
                for name, address in mapping.items():
                    numel, start = address["numel"], address["start"]
                    if not all(type(number) is int and number >= 0 for number in (numel, start)):
                        raise ValueError(f"a fragment of {numel} elements from {start} on")
                    for key, tensor in flat.items():
                        if start + numel > tensor.numel():
                            raise damaged(f"{name} reaches beyond its group in this file", path)
                        run = Run(tensor.storage, tensor.start + start, numel)
                        pieces.add(name, key, shapes[name], ep_rank if name in experts else 0, rank, run)
    checkpoint.zero_stage = said.one("ZeRO stage", directory)
    joined = pieces.join(directory, checkpoint.layers, (MASTER, *MOMENTS))
    without = sorted(set(shapes) - set(joined[MASTER]))
    if without:
        checkpoint.notes.append(f"no fp32 master of {', '.join(without)}: the engine's own parameter was used")
    return joined, said.one("optimizer step", directory)
