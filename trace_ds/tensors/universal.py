"""DeepSpeed's universal folders, through which a job resumes on another shape (:mod:`trace_ds.checkpoints.elastic`).

``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`` hold one whole parameter each, so an engine of any world and EP size can
take its part (``checkpoint.load_universal: true``); ``zero/optimizer_state.pt`` and the model-states files hold the
rest. It is what ``python -m deepspeed.checkpoint.ds_to_universal`` makes, without its temporary files and without
holding the checkpoint in memory. DeepSpeed loads it within one stage family: 1 and 2, or 3.
"""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.tensors.checkpoint import EXPERT_FILE, MOMENTS, RANK_FILE, Checkpoint
from trace_ds.tensors.layouts import engine_to_fused, fused_to_engine, moe_prefixes, read_layout
from trace_ds.tensors.partitions import damaged, expert_weights
from trace_ds.tensors.stream import CopyTask, naming_full_disk, run_tasks
from trace_ds.tensors.torch_archive import LazyTensor, exchanged, read_archive, reading, scalar, tensors_of


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
        UserError: stage 0, a job that made no step, or states of some parameters only.
    """
    if not checkpoint.moments:
        raise damaged("the checkpoint has no optimizer states", checkpoint.path)
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


def write_universal(checkpoint: Checkpoint, work: Path, *, jobs: int, part: int = 0, parts: int = 1) -> None:
    """A universal folder ``work/STEP`` and ``work/latest_universal``.

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
    tasks: list[CopyTask] = []
    ranked = (match for match in map(RANK_FILE.match, checkpoint.files) if match and match[3] == "optim")
    optimizer_file = checkpoint.path / next(match[0] for match in ranked if not int(match[1]))
    with reading(optimizer_file):
        optimizer_state, step = _optimizer_state(checkpoint, read_archive(optimizer_file)["optimizer_state_dict"])
    for name in sorted(checkpoint.moments["exp_avg"])[part::parts]:
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
    run_tasks(tasks, work, jobs, None)


def _optimizer_state(checkpoint: Checkpoint, zero: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """What ``optimizer_state.pt`` holds, and the optimizer's step count, from ZeRO's part of an optimizer file.

    Hyperparameters and counters, no sharded state and no objects of DeepSpeed's classes. The loss scaler is left out;
    DeepSpeed then keeps the engine's own, which matters for dynamic fp16 scaling only.
    """
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
    return state, step


def _numbers(tensor: LazyTensor) -> Any:
    loaded = tensor.load()
    return loaded.item() if loaded.numel() == 1 else loaded.tolist()
