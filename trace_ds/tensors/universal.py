"""DeepSpeed's universal folders, as a source and as a target.

``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`` hold one whole parameter each, so an engine of any world and EP size can
take its part (``checkpoint.load_universal: true``); ``zero/optimizer_state.pt`` and the model-states files hold the
rest. The target is what ``python -m deepspeed.checkpoint.ds_to_universal`` makes, without its temporary files and
without holding the checkpoint in memory. DeepSpeed loads it within one stage family: 1 and 2, or 3.
"""

from __future__ import annotations

import contextlib
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import EXPERT_FILE, MODEL_FILE, MOMENTS, RANK_FILE, Checkpoint
from trace_ds.tensors.layouts import engine_to_fused, fused_to_engine, moe_prefixes, read_layout
from trace_ds.tensors.partitions import check_ranks, damaged, expert_weights, job_facts, read_state
from trace_ds.tensors.runs import Run, TensorSource, from_lazy, make_source
from trace_ds.tensors.stream import CopyTask, Progress, naming_full_disk, run_tasks
from trace_ds.tensors.torch_archive import LazyTensor, exchanged, plain_shape, read_archive, reading, scalar, tensors_of


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
    model = read_state(path, ("module", "param_shapes"))
    by_rank = {int(match[1]): match[0] for match in map(RANK_FILE.match, model_files) if match}
    with reading(path):
        facts = job_facts(model, path)
        if by_rank:
            check_ranks(directory, by_rank, facts["world"], "model")
        experts = expert_weights(facts["layers"])
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
        moments = {key: held for key, held in moments.items() if held}
        stage = 3 if by_rank else 1
        return Checkpoint(
            directory, "universal", tensors, moments, tuple(shapes), zero_stage=stage, files=model_files, **facts
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
    experts = {
        f"{prefix}.experts": layout.fused[f"{prefix}.experts.gate_up_proj"][0] for prefix in moe_prefixes(layout)
    }
    layers = [{"expert_key_prefix": name, "num_experts": n} for name, n in experts.items()] if autoep else []
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


def write_archive(path: Path, value: Any) -> list[CopyTask]:
    """Write a ``torch.save`` file of plain data and tensors, with room (a hole, without a checksum) for every task in
    it, none of which has a place yet; the tasks with their places, for any thread and in any order."""
    held: list[CopyTask] = []

    def room(task: CopyTask) -> torch.Tensor:
        held.append(task)
        return torch.empty(task.source.shape, dtype=task.dtype)  # of which no page is ever touched

    path.parent.mkdir(parents=True, exist_ok=True)
    with_room = exchanged(value, CopyTask, room)
    skipping = torch.serialization.skip_data() if held else contextlib.nullcontext()
    with naming_full_disk(path), path.open("wb") as handle, skipping:
        try:
            torch.save(with_room, handle)
        except RuntimeError as error:  # torch wraps what its output raises
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    offsets = [tensor.storage.offset_bytes for tensor in tensors_of(read_archive(path))] if held else []
    return [replace(task, path=path, offset_bytes=offset) for task, offset in zip(held, offsets, strict=True)]


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
        optimizer_state, step = _optimizer_state(checkpoint)
    for name in sorted(trained)[part::parts]:
        states = {"fp32": checkpoint.tensors, **checkpoint.moments}
        for key, sources in states.items():
            source = replace(sources[name], name=f"{name}/{key}")
            state: dict[str, Any] = {"param": CopyTask(source, torch.float32), "cat_dim": 0}
            if name in experts:
                state |= {"is_expert_param": True, "ep_num_experts": experts[name]["num_experts"]}
            tasks += write_archive(folder / "zero" / name / f"{key}.pt", state)
        if checkpoint.zero_stage != 3:
            write_archive(folder / "zero" / name / "step.pt", step)
    if part == 0:
        write_archive(folder / "zero" / "optimizer_state.pt", optimizer_state)
        (work / "latest_universal").write_text(tag, encoding="utf-8")
    models = [name for name in checkpoint.files if name.endswith("model_states.pt") and not EXPERT_FILE.match(name)]
    for name in sorted(models)[part::parts]:
        shutil.copyfile(checkpoint.path / name, folder / name)
    report = run_tasks(tasks, work, jobs, progress)
    parameters = sum(source.numel for source in trained.values())
    return {**report, "dtype": "fp32", "parameters": parameters, "notes": checkpoint.notes}


def _optimizer_file(checkpoint: Checkpoint) -> Path:
    if checkpoint.kind == "universal":
        return checkpoint.path / "zero" / "optimizer_state.pt"
    ranked = (match for match in map(RANK_FILE.match, checkpoint.files) if match and match[3] == "optim")
    return checkpoint.path / next(match[0] for match in ranked if not int(match[1]))


def _optimizer_state(checkpoint: Checkpoint) -> tuple[dict[str, Any], torch.Tensor]:
    """What ``optimizer_state.pt`` holds, and the optimizer's step count.

    Hyperparameters and counters, no sharded state and no objects of DeepSpeed's classes. The loss scaler is left out;
    DeepSpeed then keeps the engine's own, which matters for dynamic fp16 scaling only.
    """
    zero = read_archive(_optimizer_file(checkpoint))
    zero = zero if checkpoint.kind == "universal" else zero["optimizer_state_dict"]
    base = zero.get("optimizer_state_dict") or zero.get("base_optimizer_state") or zero
    states = [state for state in (base.get("state") or {}).values() if isinstance(state, dict) and "step" in state]
    made = states[0]["step"] if states else checkpoint.step or 0
    step = torch.tensor(scalar(made) if isinstance(made, LazyTensor) else float(made), dtype=torch.float32)
    groups = exchanged(base.get("param_groups") or [], LazyTensor, _numbers)
    if checkpoint.layers and len(groups) == 1:  # renamed from an engine without AutoEP, where experts are not apart
        groups *= 2
    keep = ("dynamic_loss_scale", "overflow", "clip_grad", "partition_count", "ds_version")
    state = {key: exchanged(zero[key], LazyTensor, _numbers) for key in keep if key in zero}
    state |= {"zero_stage": int(zero.get("zero_stage", 1)), "param_groups": groups}
    if checkpoint.zero_stage == 3:
        state["optimizer_state_dict"] = {"state": {0: {"step": step}}, "param_groups": groups}
    if zero.get("dynamic_loss_scale"):
        checkpoint.notes.append("the dynamic loss scale is not carried over: fp16 training starts with a new one")
    return state, step


def _numbers(tensor: LazyTensor) -> Any:
    loaded = tensor.load()
    return loaded.item() if loaded.numel() == 1 else loaded.tolist()
