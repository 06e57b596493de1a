"""DeepSpeed's universal folders, as a source and as a target.

``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`` hold one whole parameter each, so an engine of any world and EP size can
take its part (``checkpoint.load_universal: true``); ``zero/optimizer_state.pt`` and the model-states files hold the
rest. The target is what ``python -m deepspeed.checkpoint.ds_to_universal`` makes, without its temporary files and
without holding the checkpoint in memory. DeepSpeed loads it within one stage family: 1 and 2, or 3.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import MODEL_FILE, RANK_FILE, Checkpoint
from trace_ds.tensors.dtypes import DTYPE_NAMES
from trace_ds.tensors.layouts import engine_to_fused, fused_to_engine, layer_metadata, moe_prefixes, read_layout
from trace_ds.tensors.partitions import (
    autoep_layers,
    check_ranks,
    damaged,
    engine_dtype,
    expert_weights,
    reading,
)
from trace_ds.tensors.runs import Run, TensorSource, from_lazy, make_source
from trace_ds.tensors.stream import CopyTask, Progress, run_tasks, warnings_of
from trace_ds.tensors.torch_archive import LazyTensor, plain_shape, read_archive, scalar
from trace_ds.tensors.torch_writer import Streamed, write_archive

MOMENTS = ("exp_avg", "exp_avg_sq")


def open_universal(directory: Path) -> Checkpoint:
    """Open a universal folder, ours or DeepSpeed's own."""
    model_files = sorted(
        entry.name
        for entry in directory.iterdir()
        if MODEL_FILE.match(entry.name) or (RANK_FILE.match(entry.name) and entry.name.endswith("_model_states.pt"))
    )
    if not model_files:
        raise damaged("a universal folder without a model-states file", directory)
    path = directory / model_files[0]
    model = read_archive(path)
    if not isinstance(model, dict) or "module" not in model or "param_shapes" not in model:
        raise damaged("this is not a DeepSpeed checkpoint file", path)
    by_rank = {int(match[1]): match[0] for match in map(RANK_FILE.match, model_files) if match}
    with reading(path):
        if by_rank:
            world = int(model["dp_world_size"])
            check_ranks(directory, by_rank, world, "model", "zero_pp_rank_0_mp_rank_00_model_states.pt")
        layers = autoep_layers(model, path)
        experts = expert_weights(layers)
        shapes = {name: plain_shape(shape) for group in model["param_shapes"] or [] for name, shape in group.items()}
        tensors: dict[str, TensorSource] = {}
        moments: dict[str, dict[str, TensorSource]] = {key: {} for key in MOMENTS}
        for name, shape in shapes.items():
            if name in experts:
                shape = (experts[name]["num_experts"], *shape[1:])
            folder = directory / "zero" / name
            tensors[name] = _universal_tensor(folder / "fp32.pt", name, shape)
            for key in MOMENTS:
                if (folder / f"{key}.pt").is_file():
                    moments[key][name] = _universal_tensor(folder / f"{key}.pt", name, shape)
        for name, tensor in model["module"].items():
            if isinstance(tensor, LazyTensor) and tensor.numel() and name not in tensors:
                tensors[name] = from_lazy(name, tensor)
        for name, shape in (model.get("frozen_param_shapes") or {}).items():
            if name not in tensors:
                tensors[name] = _frozen(directory, by_rank, name, plain_shape(shape))
        return Checkpoint(
            directory,
            "universal",
            tensors,
            moments={key: value for key, value in moments.items() if value},
            trained=tuple(shapes),
            dtype=engine_dtype(model),
            step=int(model.get("global_steps", 0)),
            world=int(model.get("dp_world_size", 1)),
            ep=layers[0]["ep_size"] if layers else 1,
            zero_stage=3 if by_rank else 1,
            layers=layers,
            files=model_files,
            shared=dict(model.get("shared_params") or {}),
        )


def _universal_tensor(path: Path, name: str, shape: tuple[int, ...]) -> TensorSource:
    held = read_archive(path)
    tensor = held.get("param") if isinstance(held, dict) else held
    if not isinstance(tensor, LazyTensor) or tensor.numel() != math.prod(shape):
        raise damaged(f"this file does not hold {name} of shape {list(shape)}", path)
    return make_source(name, shape, [Run(tensor.storage, tensor.start, tensor.numel())])


def _frozen(directory: Path, by_rank: dict[int, str], name: str, shape: tuple[int, ...]) -> TensorSource:
    numel = math.prod(shape)
    runs: list[Run] = []
    for _, file in sorted(by_rank.items()):
        with reading(directory / file):
            tensor = read_archive(directory / file)["frozen_param_fragments"][name]
            held = max(0, min(tensor.numel(), numel - sum(run.numel for run in runs)))
            runs.append(Run(tensor.storage, tensor.start, held))
    return make_source(name, shape, runs)


def renamed(checkpoint: Checkpoint, base_model: Path, *, autoep: bool) -> Checkpoint:
    """The same checkpoint, moments too, under the names of an engine with AutoEP or of one without.

    Only names and cuts change, no data is read. The hyperparameter groups of the two engines differ in number
    (AutoEP sets experts apart), which is left to the reader of the folder.

    Args:
        base_model: directory with the model's ``config.json``.
    """
    if bool(checkpoint.layers) == autoep:
        return checkpoint
    check_optimizer_states(checkpoint)
    layout = read_layout(base_model)
    change = fused_to_engine if autoep else engine_to_fused
    layers = []
    if autoep:
        for number, prefix in enumerate(moe_prefixes(layout)):
            layers.append(layer_metadata(number, prefix, layout.fused[f"{prefix}.experts.gate_up_proj"][0]))
    moments = {key: change(layout, held) for key, held in checkpoint.moments.items()}
    trained = tuple(moments["exp_avg"])
    tensors = change(layout, checkpoint.tensors)
    return replace(checkpoint, tensors=tensors, moments=moments, layers=layers, trained=trained)


def check_optimizer_states(checkpoint: Checkpoint) -> None:
    """Refuse a source that does not hold both Adam moments of every parameter that was trained.

    Raises:
        UserError: a Hugging Face model, stage 0, a job that made no step, or states of some parameters only.
    """
    if not checkpoint.moments or checkpoint.kind not in ("zero3", "zero12", "universal"):
        raise UserError(
            "a universal folder holds optimizer states, and this source has none",
            str(checkpoint.path),
            "use a ZeRO checkpoint of a job that made at least one step, or --to hf",
        )
    for key in MOMENTS:
        without = sorted(set(checkpoint.trained) - set(checkpoint.moments.get(key, {})))
        if without:
            raise damaged(f"{without[0]} has no {key} ({len(without)} of {len(checkpoint.trained)} parameters)",
                          checkpoint.path)  # fmt: skip


def write_universal(
    checkpoint: Checkpoint,
    work: Path,
    *,
    jobs: int,
    progress: Progress | None,
    part: int = 0,
    parts: int = 1,
) -> dict[str, Any]:
    """A universal folder ``work/STEP`` and ``work/latest_universal``; the tensors' part of the report.

    Args:
        part, parts: write only every ``parts``-th file, from ``part`` on, so that several processes share the work;
            the folder is whole when all have returned.

    Raises:
        UserError: the source has not all optimizer states, see :func:`check_optimizer_states`.
    """
    check_optimizer_states(checkpoint)
    tag = checkpoint.path.name
    folder = work / tag
    experts = expert_weights(checkpoint.layers)
    trained = checkpoint.moments["exp_avg"]
    tasks: list[CopyTask] = []
    with reading(_optimizer_file(checkpoint)):
        step = torch.tensor(_step(checkpoint), dtype=torch.float32)
        optimizer_state = _optimizer_state(checkpoint, step)
    for name in sorted(trained)[part::parts]:
        states = {"fp32": checkpoint.tensors, **checkpoint.moments}
        for key, sources in states.items():
            source = _renamed(sources[name], f"{name}/{key}")
            state: dict[str, Any] = {"param": Streamed(source, torch.float32), "cat_dim": 0}
            if name in experts:
                state |= {"is_expert_param": True, "ep_num_experts": experts[name]["num_experts"]}
            tasks += write_archive(folder / "zero" / name / f"{key}.pt", state)
        if checkpoint.zero_stage != 3:
            write_archive(folder / "zero" / name / "step.pt", step)
    if part == 0:
        write_archive(folder / "zero" / "optimizer_state.pt", optimizer_state)
        (work / "latest_universal").write_text(tag, encoding="utf-8")
    for name in sorted(_model_files(checkpoint))[part::parts]:
        shutil.copyfile(checkpoint.path / name, folder / name)
    results = list(zip(tasks, run_tasks(tasks, work, jobs, progress), strict=True))
    return {
        "dtype": "fp32",
        "tensors": {
            task.source.name: {
                "file": str(task.path.relative_to(work)) if task.path else "",
                "dtype": DTYPE_NAMES[task.dtype],
                "shape": list(task.source.shape),
                "sha256": result.sha256,
            }
            for task, result in sorted(results, key=lambda pair: pair[0].source.name)
        },
        "parameters": sum(source.numel for source in trained.values()),
        "bytes": sum(task.nbytes for task, _ in results),
        "notes": checkpoint.notes,
        "warnings": warnings_of([task.source.name for task, _ in results], [result for _, result in results]),
    }


def _renamed(source: TensorSource, name: str) -> TensorSource:
    return TensorSource(name, source.shape, source.dtype, source.runs)


def _model_files(checkpoint: Checkpoint) -> Iterator[str]:
    for name in checkpoint.files:
        if MODEL_FILE.match(name) or (RANK_FILE.match(name) and name.endswith("_model_states.pt")):
            yield name


def _optimizer(checkpoint: Checkpoint) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ZeRO's optimizer state, the base optimizer's) from rank 0's file or the folder's own."""
    path = _optimizer_file(checkpoint)
    state = read_archive(path) if checkpoint.kind == "universal" else read_archive(path)["optimizer_state_dict"]
    return state, state.get("optimizer_state_dict") or state.get("base_optimizer_state") or state


def _optimizer_file(checkpoint: Checkpoint) -> Path:
    if checkpoint.kind == "universal":
        return checkpoint.path / "zero" / "optimizer_state.pt"
    name = min(
        (name for name in checkpoint.files if name.endswith("_optim_states.pt")),
        key=lambda name: int(match[1]) if (match := RANK_FILE.match(name)) else 0,
    )
    return checkpoint.path / name


def _step(checkpoint: Checkpoint) -> float:
    """The optimizer's step count."""
    _, base = _optimizer(checkpoint)
    for state in (base.get("state") or {}).values():
        if isinstance(state, dict) and "step" in state:
            step = state["step"]
            return scalar(step) if isinstance(step, LazyTensor) else float(step)
    return float(checkpoint.step or 0)


def _optimizer_state(checkpoint: Checkpoint, step: torch.Tensor) -> dict[str, Any]:
    """``optimizer_state.pt``: hyperparameters and counters, no sharded state and no objects of DeepSpeed's classes.

    The loss scaler is left out; DeepSpeed then keeps the engine's own, which matters for dynamic fp16 scaling only.
    """
    zero, base = _optimizer(checkpoint)
    groups = [{key: _plain(value) for key, value in group.items()} for group in base.get("param_groups") or []]
    if (
        checkpoint.layers and len(groups) == 1
    ):  # renamed from an engine without AutoEP, which does not set experts apart
        groups *= 2
    keep = ("dynamic_loss_scale", "overflow", "clip_grad", "partition_count", "ds_version")
    state: dict[str, Any] = {key: _plain(zero[key]) for key in keep if key in zero}
    state["zero_stage"] = int(zero.get("zero_stage", 1))
    state["param_groups"] = groups
    if checkpoint.zero_stage == 3:
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    if zero.get("dynamic_loss_scale"):
        checkpoint.notes.append("the dynamic loss scale is not carried over: fp16 training starts with a new one")
    return state


def _plain(value: Any) -> Any:
    if isinstance(value, LazyTensor):
        loaded = value.load()
        return loaded.item() if loaded.numel() == 1 else loaded.tolist()
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(entry) for entry in value)
    return value
