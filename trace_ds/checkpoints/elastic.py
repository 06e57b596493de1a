"""Resuming on another number of ranks or another expert-parallel size, through a DeepSpeed universal folder.

A ZeRO checkpoint is cut for the job that wrote it. Our converter joins the pieces into whole parameters (streamed: no
tensor is held whole while writing), the ranks sharing the files, and each rank of the new job reads what it will hold.
The folder lies beside the checkpoints and is deleted after loading; a killed job's is deleted at the next start.
Weights, both Adam moments and the step count arrive bit for bit; sums over other groups then round differently.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from trace_ds.checkpoints import commit
from trace_ds.checkpoints.manifest import Manifest, step_name
from trace_ds.errors import UserError
from trace_ds.parallel.world import World

THREADS = 2


def check_shape(manifest: Manifest, zero_stage: int, layers: int | None, checkpoints: Path, section: str) -> None:
    """Refuse a checkpoint that no conversion fits to the job.

    One of the other kind of ZeRO: stage 3 cuts parameters, stages 1 and 2 do not, and DeepSpeed reads universal folders
    within one kind only. And one of the first layers where the job needs the whole model (``layers`` None).
    """
    where = str(checkpoints / step_name(manifest.step))
    if (manifest.zero_stage == 3) != (zero_stage == 3):
        raise UserError(
            f"the checkpoint was written with ZeRO stage {manifest.zero_stage}, and this job has {zero_stage}: "
            "a job can change its ranks and its expert-parallel size, but not between stage 3 and stages 1 and 2",
            where,
            f"set {section}.zero_stage to {manifest.zero_stage}, or start over with --set {section}.resume=never",
        )
    if manifest.layers is not None and layers is None:
        raise UserError(
            f"the checkpoint holds the first {manifest.layers} decoder layers, which is where the losses end, and the "
            f"whole model is needed for {section}.evaluate",
            where,
            f"go on without {section}.evaluate.every, or start over with --set {section}.resume=never",
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
    from trace_ds.tensors.opening import open_source
    from trace_ds.tensors.universal import renamed, write_universal

    folder = Path(world.broadcast(str(checkpoints / f"universal.tmp-{os.getpid()}")))

    def convert() -> None:
        checkpoint = renamed(open_source(checkpoints / step_name(manifest.step)), base_model, autoep=autoep)
        folder.mkdir(exist_ok=True)
        write_universal(checkpoint, folder, jobs=THREADS, part=world.rank, parts=world.size)

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
        commit.load(engine, folder, step_name(manifest.step), manifest.step)
    finally:
        engine._config.load_universal_checkpoint = False
    for group, values in zip(optimizer.param_groups, kept, strict=True):
        group.update(values)
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)
