"""What the tests of the cost model measure on every rank of a real DeepSpeed job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_ds.config.load import load_config
from trace_ds.models.families import inspect_model


def zero3_bytes(world: Any, config: str, run_dir: str, overrides: list[str]) -> dict[str, int]:
    """Bytes that this rank of the real training engine keeps, by part, and those of the checkpoint it writes."""
    import torch

    from trace_ds.stages.unlearn import training_engine

    loaded, directory = load_config(config, overrides, run_dir)
    info = inspect_model(loaded.model.path)
    engine = training_engine(loaded, info, world, 1)
    optimizer = engine.optimizer
    ids = torch.arange(8)[None] + world.rank
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum())
    engine.step()  # Adam makes its moments in its first step
    partitions = [parameter.ds_tensor for parameter in engine.module.parameters()]
    moments = [
        value
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.numel() > 1
    ]
    masters = list(optimizer.fp32_partitioned_groups_flat)
    engine.save_checkpoint(str(Path(directory) / "raw"), tag="step", save_latest=False)
    world.barrier()
    saved = sum(file.stat().st_size for file in (Path(directory) / "raw").rglob("*.pt"))
    return {
        "parameters": sum(part.numel() * part.element_size() for part in partitions),
        "gradients": optimizer.grad_partitions_flat_buffer.numel() * 2,
        "master and Adam moments": sum(t.numel() * t.element_size() for t in (*moments, *masters)),
        "checkpoint": saved,
    }
