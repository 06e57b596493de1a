"""DeepSpeed checkpoints of ZeRO stages 0 to 3, with and without AutoEP, as whole tensors that are still on disk.

How DeepSpeed lays a parameter out (``runtime/zero/stage3.py``, ``stage_1_and_2.py``, ``runtime/engine.py``, 0.19):

* Stage 3: parameters are packed into sub-groups, in the order of ``param_shapes``. Each rank of a sub-group's
  partition group holds ``ceil(numel / ranks)`` elements of every parameter, the last ranks' padded. The group is the
  data-parallel world, or for AutoEP experts the ranks that hold the same experts (``ds_zero_partition_groups``); there
  the parameter is the rank's own experts only.
* Stages 1 and 2: all parameters of a group are flattened, in the order of ``param_shapes`` (that of the model, or
  another one with ``round_robin_gradients``), into one vector that is cut over the ranks. Experts are again cut over
  the ranks that share them. (``param_slice_mappings`` has the model's order always, which is then wrong.)
* Stage 0: whole tensors, each expert in a file of its own; no fp32 masters.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import (
    EXPERT_FILE,
    MODEL_FILE,
    MOMENTS,
    RANK_FILE,
    Checkpoint,
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
from trace_ds.tensors.torch_archive import LazyTensor, plain_shape, read_archive, reading_archive, scalar

MASTER, FROZEN = "fp32", "frozen"
MODEL_NAME = "mp_rank_00_model_states.pt"


def open_deepspeed(directory: Path) -> Checkpoint:
    """Open a directory that ``DeepSpeedEngine.save_checkpoint`` wrote."""
    names = sorted(entry.name for entry in directory.iterdir())
    ranked: dict[str, dict[int, str]] = {"model": {}, "optim": {}}
    for name in names:
        if match := RANK_FILE.match(name):
            if int(match[2]):
                problem = "tensor- or pipeline-parallel checkpoints are not supported"
                raise UserError(problem, str(directory / name), "train with ZeRO and expert parallelism")
            if int(match[1]) in ranked[match[3]]:
                raise damaged(f"rank {match[1]} has two files: files of different jobs are mixed", directory / name)
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


def _shapes(groups: list[dict[str, Any]]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of the parameter groups."""
    return [{name: plain_shape(shape) for name, shape in group.items()} for group in groups]


def _flat(masters: LazyTensor, state: dict[str, Any]) -> tuple[dict[str, LazyTensor], Any]:
    """The flat vectors of a group on a rank, masters and moments, and the optimizer's step (None: it made none)."""
    step = state.get("step")
    moments = {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
    return {MASTER: masters, **moments}, scalar(step) if isinstance(step, LazyTensor) else step


class _SharedValues(defaultdict[str, dict[str, Any]]):
    """Values that must be equal in all files: ``values[label][name of the file]``."""

    def one(self, label: str, directory: Path) -> Any:
        """The common value (None: no file has it); the error names a file of each."""
        values = self[label]
        first = next(iter(values), "")
        for name, value in values.items():
            if value != values[first]:
                problem = f"{label} {value} here, but {values[first]} in {first}: files of different steps are mixed"
                raise damaged(problem, directory / name)
        return values.get(first)


def _open_zero3(directory: Path, model_files: dict[int, str], optim_files: dict[int, str]) -> Checkpoint:
    needed = ("module", "param_shapes", "dp_world_size", "global_steps")
    head_path = directory / model_files[min(model_files)]
    head = read_state(head_path, needed)
    with reading_archive(head_path):
        world = int(head["dp_world_size"])
    check_ranks(directory, model_files, world, "model")
    check_ranks(directory, optim_files, world, "optim")

    pieces, values = Pieces(), _SharedValues(dict)
    for rank in range(world):
        model_path, optim_path = directory / model_files[rank], directory / optim_files[rank]
        model = head if model_path == head_path else read_state(model_path, needed)
        with reading_archive(model_path):
            values["step"][model_path.name] = int(model["global_steps"])
            values["world size"][model_path.name] = model["dp_world_size"]
            experts = expert_weights(autoep_layers(model, model_path))  # their ep_rank is this rank's
            groups = _shapes(model["param_shapes"])
            for name, tensor in (model.get("frozen_param_fragments") or {}).items():
                shape = plain_shape(model["frozen_param_shapes"][name])
                numel_here = max(0, min(tensor.numel(), math.prod(shape) - rank * tensor.numel()))
                pieces.add(name, FROZEN, shape, 0, rank, Run(tensor.storage, tensor.start, numel_here))
        optim = _read_optimizer(optim_path, "ZeRO-3", "fp32_flat_groups")
        with reading_archive(optim_path):
            values["world size"][optim_path.name] = optim.get("partition_count", world)
            states = (optim.get("optimizer_state_dict") or {}).get("state") or {}
            partitions = optim.get("ds_zero_partition_groups") or []
            for index, (shapes, masters) in enumerate(zip(groups, optim["fp32_flat_groups"], strict=True)):
                state = states.get(index, {})
                flat, adam_step = _flat(masters, state)
                if state:
                    values["optimizer step"].setdefault(optim_path.name, adam_step)
                partition = partitions[index] if index < len(partitions) else {}
                parts = int(partition.get("partition_count", world))
                part = int(partition.get("partition_rank", rank))
                _add_group(pieces, shapes, flat, part, parts, experts)
    for label in ("world size", "step"):
        values.one(label, directory)
    adam_step = values.one("optimizer step", directory)
    notes: list[str] = []
    with reading_archive(head_path):
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
        # every rank has a share of one size; what lies beyond the parameter's end in the last ones is padding
        share = -(-numel // parts)
        numel_here = max(0, min(share, numel - part * share))
        ep_rank = experts[name]["ep_rank"] if name in experts else 0
        for key, tensor in flat.items():
            if offset + share > tensor.numel():
                raise ValueError(f"{name} reaches beyond its group")
            pieces.add(name, key, shape, ep_rank, part, Run(tensor.storage, tensor.start + offset, numel_here))
        offset += share


def _open_replicated(directory: Path, model_file: str, optim_files: dict[int, str], names: list[str]) -> Checkpoint:
    """Stages 0, 1 and 2: one file of shared parameters, a file per expert, and optimizer files per rank."""
    model_path = directory / model_file
    model = read_state(model_path, ("module", "global_steps", "dp_world_size"))
    with reading_archive(model_path):
        facts = job_facts(model, model_path)
        tensors = {name: from_lazy(name, t) for name, t in model["module"].items() if isinstance(t, LazyTensor)}
        tensors |= _expert_files(directory, names, facts["layers"])
        kept = [name for name in names if RANK_FILE.match(name) or MODEL_FILE.match(name) or EXPERT_FILE.match(name)]
        kind = "zero12" if optim_files else "expert_parallel"
        checkpoint = Checkpoint(directory, kind, tensors, zero_stage=0, files=kept, **facts)
        if not optim_files:
            if (dtype := checkpoint.dtype) != "fp32":
                note = f"ZeRO stage 0 stores fp32 masters without their names: the {dtype} parameters were used"
                checkpoint.notes.append(note)
            return checkpoint
        data_first = bool((model.get("ds_config") or {}).get("use_data_before_expert_parallelism", False))
        groups = _shapes(model.get("param_shapes") or [])
    check_ranks(directory, optim_files, checkpoint.world, "optim")
    joined, adam_step = _zero12_masters(directory, optim_files, groups, data_first, checkpoint)
    with reading_archive(model_path):
        check_adam_step(adam_step, model, checkpoint.notes, directory / optim_files[0])
    masters = joined.pop(MASTER)
    _check_masters(masters, tensors, model_path)
    checkpoint.trained = tuple(masters)
    checkpoint.tensors |= masters
    checkpoint.moments = {key: moments for key, moments in joined.items() if moments}
    return checkpoint


def _check_masters(masters: dict[str, TensorSource], weights: dict[str, TensorSource], model_path: Path) -> None:
    """Compare a sample of every master, rounded as the engine rounds it, with the module's own weight.

    Raises:
        UserError: they differ: files of different steps, or a layout that is not known here.
    """
    for name, master in masters.items():
        weight = weights.get(name)
        if weight is None or weight.numel != master.numel:
            problem = f"the optimizer files have {name} of shape {list(master.shape)}, this file does not"
            raise damaged(problem, model_path)
        expected, sample = weight.sample(), master.sample().to(weight.dtype)
        if not torch.equal(sample.nan_to_num(), expected.nan_to_num()):
            problem = f"the optimizer's fp32 master of {name} is not the weight in this file: the files are of "
            raise damaged(f"{problem}different steps, or laid out in a way that is not known here", model_path)


def _expert_files(directory: Path, names: list[str], layers: list[dict[str, Any]]) -> dict[str, TensorSource]:
    """The expert tensors of a stage 0-2 checkpoint from its one-expert files."""
    files = {(int(m[1]), int(m[2])): m[0] for m in map(EXPERT_FILE.match, names) if m}
    if files and not layers:
        raise UserError("native DeepSpeed-MoE checkpoints are not supported", str(directory), "use AutoEP")
    experts: dict[str, TensorSource] = {}
    for layer in layers:
        number, prefix = layer["moe_layer_id"], layer["expert_key_prefix"]
        tensors: dict[str, list[LazyTensor]] = {f"{prefix}.{weight}": [] for weight in ("w1", "w2", "w3")}
        for expert in range(layer["num_experts"]):
            default = f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
            path = directory / files.get((number, expert), default)
            state = read_archive(path)
            for name, parts in tensors.items():
                tensor = state.get(f"{name}.{expert}") if isinstance(state, dict) else None
                if not isinstance(tensor, LazyTensor):
                    raise damaged(f"there is no {name}.{expert} in this file", path)
                parts.append(tensor)
        for name, parts in tensors.items():
            runs = [Run(part.storage, part.start, part.numel()) for part in parts]
            experts[name] = make_source(name, (len(parts), *parts[0].shape), runs)
    return experts


def _zero12_masters(
    directory: Path,
    optim_files: dict[int, str],
    groups: list[dict[str, tuple[int, ...]]],
    data_first: bool,
    checkpoint: Checkpoint,
) -> tuple[dict[str, dict[str, TensorSource]], Any]:
    """Masters and moments of stages 1 and 2, joined over the ranks, and the optimizer's step.

    Args:
      groups: names and shapes of every parameter group, in the order in which its vector holds them.
      data_first: ``use_data_before_expert_parallelism`` of the job.
    """
    world, ep = checkpoint.world, checkpoint.ep
    experts = expert_weights(checkpoint.layers)
    values = _SharedValues(dict)
    flats: list[list[dict[str, LazyTensor]]] = []  # of each rank, of each group
    for rank in range(world):
        path = directory / optim_files[rank]
        optim = _read_optimizer(path, "ZeRO-1/2", "single_partition_of_fp32_groups")
        with reading_archive(path):
            counts = optim.get("partition_count", world)
            largest = max(counts) if isinstance(counts, list) and counts else counts
            if largest != world:
                raise damaged(f"world size {largest} here, but {world} in {MODEL_NAME}", path)
            values["ZeRO stage"][path.name] = int(optim.get("zero_stage", 1))
            states = optim.get("base_optimizer_state") or {}
            states = dict(enumerate(states)) if isinstance(states, list) else states.get("state") or {}  # list: elastic
            values["paddings"][path.name] = optim.get("param_alignment_paddings") or [[0] * len(g) for g in groups]
            flats.append([])
            for group, (masters, _) in enumerate(zip(optim["single_partition_of_fp32_groups"], groups, strict=True)):
                flat, adam_step = _flat(masters, states.get(group, {}))
                if adam_step is not None:
                    values["optimizer step"].setdefault(path.name, adam_step)
                flats[-1].append(flat)
    pieces, paddings = Pieces(), values.one("paddings", directory)
    with reading_archive(directory / optim_files[0]):
        for group, shapes in enumerate(groups):
            ranks_of: dict[int, list[int]] = defaultdict(list)
            for rank in range(world):
                # which ranks hold the same experts: every ep-th one, or a run of neighbours with data_first
                ep_rank = rank // (world // ep) if data_first else rank % ep
                ranks_of[ep_rank if any(name in experts for name in shapes) else 0].append(rank)
            for ep_rank, ranks in ranks_of.items():
                parts = [flats[rank][group] for rank in ranks]
                _cut_group(pieces, shapes, parts, paddings[group], ep_rank)
    checkpoint.zero_stage = values.one("ZeRO stage", directory)
    return pieces.join(directory, checkpoint.layers, (MASTER, *MOMENTS)), values.one("optimizer step", directory)


def _cut_group(
    pieces: Pieces,
    shapes: dict[str, tuple[int, ...]],
    parts: list[dict[str, LazyTensor]],
    paddings: list[int],
    ep_rank: int,
) -> None:
    """One group of stages 1 and 2: its parameters, each with padding behind it, lie in one vector, of which each rank
    has a part. Padding at the end of the vector is in the moments and may be in the masters."""
    begin = 0  # of the parameter
    for (name, shape), padding in zip(shapes.items(), paddings, strict=True):
        end, part_begin = begin + math.prod(shape), 0
        for number, part in enumerate(parts):
            part_end = part_begin + part[MASTER].numel()
            low, high = max(begin, part_begin), min(end, part_end)
            if low < high:
                for key, tensor in part.items():
                    if high - part_begin > tensor.numel():
                        raise ValueError(f"{name} reaches beyond {key}")
                    run = Run(tensor.storage, tensor.start + low - part_begin, high - low)
                    pieces.add(name, key, shape, ep_rank, number, run)
            part_begin = part_end
        if end > part_begin:
            raise ValueError(f"{name} reaches beyond its group")
        begin = end + padding
