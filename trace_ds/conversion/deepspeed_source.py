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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trace_ds.conversion.checkpoint import EXPERT_FILE, MODEL_FILE, RANK_FILE, Checkpoint
from trace_ds.conversion.partitions import (
    Fragments,
    autoep_layers,
    damaged,
    engine_dtype,
    expert_weights,
    join_experts,
)
from trace_ds.conversion.runs import Run, TensorSource, from_lazy, make_source
from trace_ds.conversion.torch_archive import COPY_AGAIN, Inert, LazyTensor, plain_number, read_archive
from trace_ds.errors import UserError

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


def _check_ranks(directory: Path, found: dict[int, str], world: int, kind: str, like: str) -> None:
    missing = sorted(set(range(world)) - set(found))
    if missing:
        name = like.replace("rank_0_", f"rank_{missing[0]}_", 1)
        more = f" ({len(missing)} of {world} ranks)" if len(missing) > 1 else ""
        raise UserError(f"the {kind} file of rank {missing[0]} is missing{more}", str(directory / name), COPY_AGAIN)
    extra = sorted(set(found) - set(range(world)))
    if extra:
        raise damaged(
            f"the metadata say world size {world}, but there is a file of rank {extra[0]}", directory / found[extra[0]]
        )


def _adam_step(state: Any) -> Any:
    step = state.get("step") if isinstance(state, dict) else None
    return float(step.load()) if isinstance(step, LazyTensor) else step


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
    head = _read_state(directory / model_files[first], needed)
    world = int(head["dp_world_size"])
    _check_ranks(directory, model_files, world, "model", "zero_pp_rank_0_mp_rank_00_model_states.pt")
    like = next(iter(optim_files.values()), "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    like = RANK_FILE.sub(lambda match: match[0].replace(f"rank_{match[1]}_", "rank_0_", 1), like)
    _check_ranks(directory, optim_files, world, "optimizer", like)

    fragments = Fragments()
    steps: dict[str, Any] = {}
    adam_steps: dict[str, Any] = {}
    worlds: dict[str, Any] = {}
    experts: dict[str, dict[str, Any]] = {}
    frozen: dict[str, list[Run]] = defaultdict(list)
    for rank in range(world):
        model_path, optim_path = directory / model_files[rank], directory / optim_files[rank]
        model = head if rank == first else _read_state(model_path, needed)
        optim = _read_state(optim_path, ("optimizer_state_dict",))["optimizer_state_dict"]
        if not isinstance(optim, dict) or "fp32_flat_groups" not in optim:
            raise damaged("this is not a ZeRO-3 optimizer file (no fp32_flat_groups in it)", optim_path)
        steps[model_path.name] = model["global_steps"]
        worlds[model_path.name] = model["dp_world_size"]
        worlds[optim_path.name] = optim.get("partition_count", world)
        layers = autoep_layers(model, model_path)
        experts = expert_weights(layers)
        states = (optim.get("optimizer_state_dict") or {}).get("state") or {}
        groups = optim.get("ds_zero_partition_groups") or []
        if len(model["param_shapes"]) != len(optim["fp32_flat_groups"]):
            raise damaged("the optimizer file has another number of parameter groups than the model file", optim_path)
        for index, shapes in enumerate(model["param_shapes"]):
            flat: dict[str, LazyTensor] = {MASTER: optim["fp32_flat_groups"][index]}
            state = states.get(index, {})
            flat |= {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
            if state:
                adam_steps.setdefault(optim_path.name, _adam_step(state))
            group = groups[index] if index < len(groups) else {}
            parts, part = int(group.get("partition_count", world)), int(group.get("partition_rank", rank))
            offset = 0
            for name, raw_shape in shapes.items():
                shape = tuple(raw_shape)
                numel = math.prod(shape)
                share = -(-numel // parts)
                held = max(0, min(share, numel - part * share))
                ep_rank = experts[name]["ep_rank"] if name in experts else 0
                for key, tensor in flat.items():
                    if offset + share > tensor.numel():
                        raise damaged(f"{name} reaches beyond its group in this file", optim_path)
                    run = Run(tensor.storage, tensor.start + offset, held)
                    fragments.add(name, key, shape, ep_rank, part, parts, run, optim_path)
                offset += share
        for name, tensor in (model.get("frozen_param_fragments") or {}).items():
            numel = math.prod(head["frozen_param_shapes"][name])
            held = max(0, min(tensor.numel(), numel - rank * tensor.numel()))
            frozen[name].append(Run(tensor.storage, tensor.start, held))
    _same(worlds, "world size", directory)
    step = _same(steps, "step", directory)
    _same(adam_steps, "optimizer step", directory)
    joined = fragments.join(directory, experts, (MASTER, *MOMENTS))
    tensors = joined.pop(MASTER)
    for name, runs in frozen.items():
        tensors[name] = join_experts(name, tuple(head["frozen_param_shapes"][name]), {0: runs}, None, directory)
    _add_buffers(tensors, head)
    layers = autoep_layers(head, directory / model_files[first])
    return Checkpoint(
        directory,
        "zero3",
        tensors,
        moments={key: value for key, value in joined.items() if value},
        dtype=engine_dtype(head),
        step=int(step),
        world=world,
        ep=layers[0]["ep_size"] if layers else 1,
        zero_stage=3,
        layers=layers,
        files=sorted([*model_files.values(), *optim_files.values()]),
        shared=dict(head.get("shared_params") or {}),
    )


def _add_buffers(tensors: dict[str, TensorSource], model: dict[str, Any]) -> None:
    for name in model.get("buffer_names") or []:
        tensor = model["module"].get(name)
        if isinstance(tensor, LazyTensor):
            tensors[name] = from_lazy(name, tensor)


def _open_replicated(directory: Path, model_file: str, optim_files: dict[int, str], names: list[str]) -> Checkpoint:
    """Stages 0, 1 and 2: one file of shared parameters, a file per expert, and optimizer files per rank."""
    model_path = directory / model_file
    model = _read_state(model_path, ("module", "global_steps", "dp_world_size"))
    world = int(model["dp_world_size"])
    layers = autoep_layers(model, model_path)
    ep = layers[0]["ep_size"] if layers else 1
    tensors = {name: from_lazy(name, t) for name, t in model["module"].items() if isinstance(t, LazyTensor)}
    tensors |= _expert_files(directory, names, layers)
    checkpoint = Checkpoint(
        directory,
        "zero12" if optim_files else "expert_parallel",
        tensors,
        dtype=engine_dtype(model),
        step=int(model["global_steps"]),
        world=world,
        ep=ep,
        zero_stage=0,
        layers=layers,
        files=[name for name in names if RANK_FILE.match(name) or MODEL_FILE.match(name) or EXPERT_FILE.match(name)],
        shared=dict(model.get("shared_params") or {}),
    )
    if not optim_files:
        checkpoint.notes.append("no fp32 master weights here (ZeRO stage 0): the engine's own parameters were used")
        return checkpoint
    like = next(iter(optim_files.values()))
    like = RANK_FILE.sub(lambda match: match[0].replace(f"rank_{match[1]}_", "rank_0_", 1), like)
    _check_ranks(directory, optim_files, world, "optimizer", like)
    data_first = bool((model.get("ds_config") or {}).get("use_data_before_expert_parallelism", False))
    masters = _zero12_masters(directory, optim_files, model, layers, data_first, checkpoint)
    for name, source in masters[MASTER].items():
        checkpoint.tensors[name] = source
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
    model: dict[str, Any],
    layers: list[dict[str, Any]],
    data_first: bool,
    checkpoint: Checkpoint,
) -> dict[str, dict[str, TensorSource]]:
    """Masters and moments of stages 1 and 2, joined over the ranks; parameters without masters are noted."""
    world, ep = checkpoint.world, checkpoint.ep
    experts = expert_weights(layers)
    shapes = {name: tuple(shape) for group in model.get("param_shapes") or [] for name, shape in group.items()}
    pieces: dict[tuple[str, str], dict[int, list[Run]]] = defaultdict(lambda: defaultdict(list))
    adam_steps: dict[str, Any] = {}
    stages: dict[str, Any] = {}
    for rank in range(world):
        path = directory / optim_files[rank]
        optim = _read_state(path, ("optimizer_state_dict",))["optimizer_state_dict"]
        if not isinstance(optim, dict) or "param_slice_mappings" not in optim:
            raise damaged("this is not a ZeRO-1/2 optimizer file (no param_slice_mappings in it)", path)
        counts = optim.get("partition_count", world)
        largest = max(counts) if isinstance(counts, list) and counts else counts
        if largest != world:
            raise damaged(f"world size {largest} here, but {world} in {MODEL_NAME}", path)
        stages[path.name] = plain_number(optim.get("zero_stage", 1))
        states = (optim.get("base_optimizer_state") or {}).get("state") or {}
        ep_rank = rank // (world // ep) if data_first else rank % ep
        for group, mapping in enumerate(optim["param_slice_mappings"]):
            state = states.get(group, {})
            flat = {MASTER: optim["single_partition_of_fp32_groups"][group]}
            flat |= {key: state[key] for key in MOMENTS if isinstance(state.get(key), LazyTensor)}
            if state:
                adam_steps.setdefault(path.name, _adam_step(state))
            for name, address in mapping.items():
                numel, start = _fragment(address, path)
                for key, tensor in flat.items():
                    if start + numel > tensor.numel():
                        raise damaged(f"{name} reaches beyond its group in this file", path)
                    held = pieces[name, key][ep_rank if name in experts else 0]
                    held.append(Run(tensor.storage, tensor.start + start, numel))
    _same(adam_steps, "optimizer step", directory)
    checkpoint.zero_stage = _same(stages, "ZeRO stage", directory)
    joined: dict[str, dict[str, TensorSource]] = {key: {} for key in (MASTER, *MOMENTS)}
    for (name, key), by_ep in pieces.items():
        if name not in shapes:
            raise damaged(f"{name} has an optimizer state but no shape", directory / MODEL_NAME)
        joined[key][name] = join_experts(name, shapes[name], dict(by_ep), experts.get(name), directory)
    without = sorted(set(shapes) - set(joined[MASTER]))
    if without:
        checkpoint.notes.append(f"no fp32 master of {', '.join(without)}: the engine's own parameter was used")
    return joined


MODEL_NAME = "mp_rank_00_model_states.pt"


def _fragment(address: Any, path: Path) -> tuple[int, int]:
    """(numel, start) of DeepSpeed's ``fragment_address``."""
    try:
        if not isinstance(address, Inert):
            raise KeyError("fragment_address")
        return int(address.field("numel")), int(address.field("start"))
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(f"param_slice_mappings is damaged ({error})", path) from None
