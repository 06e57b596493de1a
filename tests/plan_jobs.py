"""What the tests of the cost model measure on every rank of a real DeepSpeed job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_ds.config.load import load_config
from trace_ds.models.families import inspect_model


def shape(config: Any) -> dict[str, Any]:
    return {"dtype": config.model.dtype, "ep": config.distributed.ep}


def zero3_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> dict[str, dict[str, float]]:
    """One step of the real training engine, 16 tokens on each rank: ``traffic``, the bytes of its collectives before
    the optimizer's turn, and ``kept``, what this rank keeps by part, with the checkpoint it writes.

    The calls are counted where DeepSpeed hands them to torch: what this rank would receive in a ring, or, for the
    all-to-all, what it sends to other ranks.
    """
    import torch
    from deepspeed.comm import comm

    from trace_ds.unlearning.trainer import training_engine

    loaded, directory = load_config(config, overrides, run_dir)
    engine = training_engine(loaded.unlearning, inspect_model(loaded.model.path), world, 1, **shape(loaded))
    optimizer = engine.optimizer
    totals: dict[str, float] = {}

    def bytes_of(tensors: Any) -> int:
        return sum(t.numel() * t.element_size() for t in ([tensors] if isinstance(tensors, torch.Tensor) else tensors))

    def wrap(method: str, name: str, position: int, of: str) -> None:
        """Count the bytes of the argument ``of`` (the gathered or unreduced whole) in every call of ``method``."""
        original = getattr(comm.cdb, method)

        def call(*arguments: Any, **options: Any) -> Any:
            group = options.get("group")
            tensors = options[of] if of in options else arguments[position]
            size, mine = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
            if name != "all-to-all":
                totals[name] = totals.get(name, 0.0) + bytes_of(tensors) * (size - 1) / size
            elif tensors.dim() == 2:  # tokens, not their counts
                rows = options["input_split_sizes"]
                away = sum(rows) - rows[mine]
                totals[name] = totals.get(name, 0.0) + away * tensors.shape[1] * tensors.element_size()
            return original(*arguments, **options)

        setattr(comm.cdb, method, call)

    wrap("all_gather_into_tensor", "all-gather", 0, "output_tensor")
    wrap("all_gather", "all-gather", 0, "tensor_list")
    wrap("reduce_scatter_tensor", "reduce-scatter", 1, "input_tensor")
    wrap("reduce_scatter", "reduce-scatter", 1, "input_list")
    wrap("all_reduce", "all-reduce", 0, "tensor")
    wrap("all_to_all_single", "all-to-all", 1, "input")
    ids = torch.arange(16)[None] * 7 + world.rank
    engine.backward(engine(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum())
    traffic = dict(totals)
    engine.step()  # Adam makes its moments in its first step
    states = optimizer.optimizer.state.values()
    moments = [t for state in states for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1]
    engine.save_checkpoint(str(Path(directory) / "raw"), tag="step", save_latest=False)
    world.barrier()
    kept = {
        "parameters": bytes_of([parameter.ds_tensor for parameter in engine.module.parameters()]),
        "gradients": optimizer.grad_partitions_flat_buffer.numel() * 2,
        "master and Adam moments": bytes_of([*moments, *optimizer.fp32_partitioned_groups_flat]),
        "files": len([*(Path(directory) / "raw").rglob("*.pt")]),
        "checkpoint": sum(file.stat().st_size for file in (Path(directory) / "raw").rglob("*.pt")),
    }
    return {"traffic": traffic, "kept": kept}


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
    from trace_ds.unlearning.objective import Unlearning, make_forget_retain
    from trace_ds.unlearning.trainer import run_step, training_engine

    loaded, _ = load_config(config, overrides, run_dir)
    info = inspect_model(loaded.model.path)
    rows = loaded.unlearning.forget_rows // world.size * 2
    batches = OneBatch(rows, loaded.data.context_length, int(info.config["vocab_size"]))
    layers = layers_held(loaded.unlearning, info.decoder_layers)
    engine = training_engine(loaded.unlearning, info, world, 1, **shape(loaded), layers=layers)
    objective, _ = make_forget_retain(
        loaded.unlearning,
        info,
        world,
        batches,
        {},
        dtype=loaded.model.dtype,
        ep=loaded.distributed.ep,
        seed=loaded.seed,
    )
    target = Unlearning(loaded.unlearning, objective, {})

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
