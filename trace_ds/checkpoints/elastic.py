"""Resuming on another number of ranks or another expert-parallel size, through a DeepSpeed universal folder.

A ZeRO checkpoint is cut for the job that wrote it. Here the pieces are joined into whole parameters, the ranks sharing
the files: ``zero/NAME/{fp32,exp_avg,exp_avg_sq}.pt`` hold one each, ``zero/optimizer_state.pt`` and the model-states
files the rest, as ``python -m deepspeed.checkpoint.ds_to_universal`` makes them. DeepSpeed then loads the folder
(``checkpoint.load_universal``), each rank what it will hold, within one stage family: 1 and 2, or 3. The folder lies
beside the checkpoints and is deleted after loading; a killed job's is deleted at the next start. Weights, both Adam
moments and the step count arrive bit for bit; sums over other groups then round differently.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.checkpoints import commit
from trace_ds.checkpoints.manifest import Manifest, step_name
from trace_ds.errors import UserError
from trace_ds.parallel.world import World
from trace_ds.tensors.checkpoint import EXPERT_FILE, MOMENTS, RANK_FILE, Checkpoint, damaged, expert_weights
from trace_ds.tensors.layouts import engine_to_fused, fused_to_engine, moe_prefixes, read_layout
from trace_ds.tensors.opening import open_source
from trace_ds.tensors.torch_archive import LazyTensor, exchanged, read_archive, reading_archive, scalar


def check_stage(manifest: Manifest, zero_stage: int, checkpoints: Path, section: str) -> None:
    """Refuse a checkpoint of the other kind of ZeRO: stage 3 partitions parameters, stages 1 and 2 do not, and
    DeepSpeed reads universal folders within one kind only."""
    if (manifest.zero_stage == 3) != (zero_stage == 3):
        raise UserError(
            f"the checkpoint was written with ZeRO stage {manifest.zero_stage}, and this job has {zero_stage}: "
            "a job can change its ranks and its expert-parallel size, but not between stage 3 and stages 1 and 2",
            str(checkpoints / step_name(manifest.step)),
            f"set {section}.zero_stage to {manifest.zero_stage}, or start over with --set {section}.resume=never",
        )


def load_reshaped(
    engine: Any, world: World, checkpoints: Path, manifest: Manifest, *, autoep: bool, base_model: Path
) -> None:
    """Load a checkpoint of another shape into the engine (collective).

    Args:
        autoep: whether the engine's experts are AutoEP's (their parameters then have other names).
        base_model: directory with the model's ``config.json``.

    Raises:
        UserError: a file is damaged; OSError: the folder (12 bytes a parameter) does not fit on the disk.
    """
    folder = Path(world.broadcast(str(checkpoints / f"universal.tmp-{os.getpid()}")))

    def convert() -> None:
        checkpoint = renamed(open_source(checkpoints / step_name(manifest.step)), base_model, autoep=autoep)
        folder.mkdir(exist_ok=True)
        write_universal(checkpoint, folder, part=world.rank, parts=world.size)

    try:
        world.run_on_all_ranks(convert)
        _load(engine, folder, manifest)
        world.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _load(engine: Any, folder: Path, manifest: Manifest) -> None:
    """DeepSpeed's own loading, less two of its mistakes.

    It gives every parameter group the hyperparameters of the first (with AutoEP the groups of experts differ), and
    every partition the same tensor as its step count, which the optimizer then advances once for each of them; on the
    host, where a fused optimizer does not look for it.
    """
    optimizer = engine.optimizer.optimizer
    kept = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    engine._config.load_universal_checkpoint = True
    try:
        commit.load_state(engine, folder, step_name(manifest.step), manifest.step)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)


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
    moments = {key: change(layout, tensors) for key, tensors in checkpoint.moments.items()}
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


def write_universal(checkpoint: Checkpoint, folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Write ``folder/STEP`` and ``folder/latest_universal``. Each parameter passes through memory whole, as when
    DeepSpeed loads it.

    Args:
        part, parts: write only every ``parts``-th file, from ``part`` on, so that several processes share the work;
            the folder is whole when all have returned.

    Raises:
        UserError: the source has not all optimizer states, see :func:`check_optimizer_states`.
    """
    check_optimizer_states(checkpoint)
    step_folder = folder / checkpoint.path.name
    zero = step_folder / "zero"
    experts = expert_weights(checkpoint.layers)
    ranked = (match for match in map(RANK_FILE.match, checkpoint.files) if match and match[3] == "optim")
    optimizer_file = checkpoint.path / next(match[0] for match in ranked if not int(match[1]))
    with reading_archive(optimizer_file):
        optimizer_state, step = _optimizer_state(checkpoint, read_archive(optimizer_file)["optimizer_state_dict"])
    for name in sorted(checkpoint.moments["exp_avg"])[part::parts]:
        for key, sources in {"fp32": checkpoint.tensors, **checkpoint.moments}.items():
            state: dict[str, Any] = {"param": sources[name].load(torch.float32), "cat_dim": 0}
            if name in experts:
                state |= {"is_expert_param": True, "ep_num_experts": experts[name]["num_experts"]}
            _save(zero / name / f"{key}.pt", state)
        if checkpoint.zero_stage != 3:
            _save(zero / name / "step.pt", step)
    if part == 0:
        _save(zero / "optimizer_state.pt", optimizer_state)
        (folder / "latest_universal").write_text(checkpoint.path.name, encoding="utf-8")
    models = [name for name in checkpoint.files if name.endswith("model_states.pt") and not EXPERT_FILE.match(name)]
    for name in sorted(models)[part::parts]:
        shutil.copyfile(checkpoint.path / name, step_folder / name)


def _save(path: Path, value: Any) -> None:
    """``torch.save``, with the OSError that torch wraps."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as handle:
        try:
            torch.save(value, handle)
        except RuntimeError as error:
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


def _optimizer_state(checkpoint: Checkpoint, zero: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
    """What ``optimizer_state.pt`` holds, and the optimizer's step count, from ZeRO's part of an optimizer file.

    Hyperparameters and counters, no sharded state and no objects of DeepSpeed's classes. The loss scaler is left out;
    DeepSpeed then keeps the engine's own, which matters for dynamic fp16 scaling only.
    """
    base = zero.get("optimizer_state_dict") or zero.get("base_optimizer_state") or zero
    states = [state for state in (base.get("state") or {}).values() if isinstance(state, dict) and "step" in state]
    adam_step = states[0]["step"] if states else checkpoint.step or 0
    step = torch.tensor(
        scalar(adam_step) if isinstance(adam_step, LazyTensor) else float(adam_step), dtype=torch.float32
    )
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
