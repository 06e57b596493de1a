"""What the tests of the cost model measure on every rank of a real DeepSpeed job."""

from __future__ import annotations

from typing import Any

from trace_ds.config.load import load_config
from trace_ds.models.families import inspect_model


def shape(config: Any) -> dict[str, Any]:
    return {"dtype": config.model.dtype, "ep": config.distributed.ep}


class OneBatch:
    """The same synthetic micro-batch in every step: as many retain rows as forget rows, every position counted."""

    def __init__(self, rows: int, context: int, vocabulary: int) -> None:
        import torch

        from trace_ds.unlearning.batches import MicroBatch, Step

        ids_BS = torch.arange(rows * context).view(rows, context) * 7919 % vocabulary
        counted_BS = torch.ones_like(ids_BS, dtype=torch.bool)
        counted_BS[:, -1] = False
        positions_BS = torch.arange(context).expand(rows, -1)
        weights_BS, reference_BS = counted_BS.float(), torch.zeros(rows, context)
        batch = MicroBatch(ids_BS, positions_BS, counted_BS, weights_BS, reference_BS, rows // 2)
        self.step = Step([batch], int(counted_BS.sum()) // 2, rows // 2, int(counted_BS.sum()) // 2)

    def at(self, step: int, rank: int, world_size: int) -> Any:
        return self.step


def peak_bytes(world: Any, config: str, run_dir: str, overrides: list[str]) -> dict[str, float]:
    """Bytes of tensors in the second step of the real training job: those alive before it, and torch's largest
    allocation above them during it (its own record of every allocation, not what the C library keeps back)."""
    import gc

    import torch

    from trace_ds.unlearning.needs import layers_held
    from trace_ds.unlearning.objective import make_objective
    from trace_ds.unlearning.trainer import run_step, training_engine

    loaded, _ = load_config(config, overrides, run_dir)
    info = inspect_model(loaded.model.path)
    rows = loaded.unlearning.forget_rows // world.size * 2
    batches = OneBatch(rows, loaded.data.context_length, int(info.config["vocab_size"]))
    layers = layers_held(loaded.unlearning, info.decoder_layers)
    engine = training_engine(loaded.unlearning, info, world, 1, **shape(loaded), layers=layers)
    target, _ = make_objective(
        loaded.unlearning,
        info,
        world,
        batches,
        {},
        dtype=loaded.model.dtype,
        ep=loaded.distributed.ep,
        seed=loaded.seed,
    )

    def step(number: int, batch: OneBatch) -> None:
        run_step(engine, world, batch.step, target, loaded.unlearning, number)

    step(0, OneBatch(2, 16, int(info.config["vocab_size"])))  # Adam makes its moments, whatever the batch
    gc.collect()
    alive = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta
    }
    with torch.profiler.profile(profile_memory=True) as profile:
        step(1, batches)
    used = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            used += event.nbytes()
            peak = max(peak, used)
    return {"resident": float(sum(alive.values())), "peak": float(sum(alive.values()) + peak)}
