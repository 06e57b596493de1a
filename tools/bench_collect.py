"""What collecting routing statistics costs in time, against plain forward passes.

    python tools/bench_collect.py

Ours is the collection itself: a DeepSpeed engine and ``Collection.run`` over a token dataset on disk, with the expert
kernel that ``collect`` chooses.

* ``counting_time_ratio``: collecting (sums, selections of each row, routing of sampled tokens, which are all tokens
  here) over the same engine's bare forward passes on the same batches, the median of the ratios of neighbouring rounds;
  ``counting_cpu_ratio`` the same by CPU time of the process, which other work on the machine disturbs less;
  ``sums_time_ratio`` and ``sums_cpu_ratio`` with the sums of the corpus alone.

Tokens per second on a GPU against the best plain pass: ``tools/gpu_acceptance.py``. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trace_ds.corpora.dataset import PackedRow, TokenDataset, write_rows
from trace_ds.models.attention import adopt
from trace_ds.models.engine import expert_kernel
from trace_ds.parallel.world import join, leave, quiet_deepspeed
from trace_ds.routing.collection import Collection, frozen_pass
from trace_ds.routing.token_files import Recording
from trace_ds.run.log import StageLog

COMMON = {"tie_word_embeddings": False, "max_position_embeddings": 4096}
# Published shapes; `layers` of them are built.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                           "num_experts_per_tok", "vocab_size"), sizes, strict=True)) | own)
    for name, sizes, own in (
        ("mixtral", (8, 4096, 32, 8, 2, 32000), {"intermediate_size": 14336, "num_local_experts": 8}),
        ("olmoe", (16, 2048, 16, 16, 8, 50304), {"intermediate_size": 1024, "num_experts": 64}),
        ("qwen3_moe", (12, 2048, 32, 4, 8, 151936),
         {"moe_intermediate_size": 768, "intermediate_size": 6144, "head_dim": 128, "num_experts": 128}),
    )
}  # fmt: skip
CPU_SHAPE = SHAPES["mixtral"][1] | {"num_hidden_layers": 4, "hidden_size": 256, "intermediate_size": 512,
                                    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip
SAMPLE_TOKENS = 200_000  # as collect
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the vendor's data sheets


def build(family: str, shape: dict[str, Any], dtype: Any, device: Any, experts: str | None = None) -> Any:
    """A random model on the device (normal weights: what is measured does not depend on them)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **shape)
    arguments = {} if experts is None else {"experts_implementation": experts}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **arguments)
    return model.eval().requires_grad_(False)


def rounds_s(functions: dict[str, Callable[[], Any]], rounds: int, device: Any) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of the process) of each function in each round, interleaved, after one warm-up of each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter(), time.process_time()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return taken


def median_s(function: Callable[[], Any], rounds: int, device: Any) -> float:
    return statistics.median(seconds for seconds, _ in rounds_s({"": function}, rounds, device)[""])


def dataset_of(folder: Path, vocabulary: int, rows: int, length: int) -> Any:
    """A token dataset of packed rows, four documents in each."""
    draw = np.random.default_rng(1)
    local = (np.arange(length) // -(-length // 4)).astype(np.int32)
    packed = (
        PackedRow(draw.integers(0, vocabulary, length, dtype=np.int32), local + np.int32(4 * row))
        for row in range(rows)
    )
    write_rows(folder / "rows.arrow", packed)
    return TokenDataset.open(folder / "rows.arrow")


def collecting(
    world: Any, engine: Any, dataset: Any, shape: dict[str, Any], batch_rows: int, folder: Path, recorded: str
) -> Callable[[], Any]:
    """A function that collects the dataset as ``trace-ds collect`` does, from opening the parts to the statistics.

    ``recorded``: sums (of the corpus alone) or collect (also the selections of each row and the sample).
    """
    rows = recorded == "collect"
    recording = Recording(trace=False, nll=False, rows=rows, sample_tokens=SAMPLE_TOKENS if rows else 0)

    def run() -> None:
        collection = Collection(
            engine,
            world,
            dataset,
            experts=experts_of(shape),
            top_k=shape["num_experts_per_tok"],
            recording=recording,
            batch_rows=batch_rows,
            directory=folder,
        )
        collection.run(StageLog("collect", None, None), "rows", save_every=0)

    return run


def experts_of(shape: dict[str, Any]) -> int:
    return int(shape.get("num_local_experts") or shape["num_experts"])


def engine_of(model: Any) -> Any:
    """The engine that ``collect`` runs a model of one process in."""
    adopt(model)
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}, "steps_per_print": 1 << 62}
    engine = quiet_deepspeed().initialize(model=model.requires_grad_(False), config=ds_config)[0]
    engine.eval()
    return engine


def chosen_kernel(shape: dict[str, Any], device: Any) -> str:
    """What ``collect`` chooses for a shape here: eager or grouped_mm."""
    info: Any = SimpleNamespace(config=shape)
    return expert_kernel(info, device) or "grouped_mm"


def counting_time(
    world: Any, family: str, shape: dict[str, Any], size: tuple[int, int], batch_rows: int, dtype: Any, rounds: int
) -> dict[str, float]:
    """Collecting over bare forward passes of the same engine, ``size`` rows and positions."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        dataset = dataset_of(folder, shape["vocab_size"], *size)
        engine = engine_of(build(family, shape, dtype, world.device, chosen_kernel(shape, world.device)))
        batches = [
            dataset.batch(range(first, min(first + batch_rows, size[0])), pad_id=0)
            for first in range(0, size[0], batch_rows)
        ]

        def plain() -> None:
            for batch in batches:
                frozen_pass(engine, batch, world.device)

        kinds = {
            name: collecting(world, engine, dataset, shape, batch_rows, folder, recorded)
            for name, recorded in (("counting", "collect"), ("sums", "sums"))
        }
        taken = rounds_s({"plain": plain, **kinds}, rounds, world.device)
    seconds = {side: statistics.median(value for value, _ in values) for side, values in taken.items()}
    print(", ".join(f"{side} {value:.4f} s" for side, value in seconds.items()), file=sys.stderr)
    return {
        f"{kind}_{name}_ratio": statistics.median(
            ours[clock] / plain[clock] for plain, ours in zip(taken["plain"], taken[kind], strict=True)
        )
        for kind in kinds
        for clock, name in enumerate(("time", "cpu"))
    }


def active_parameters(model: Any, shape: dict[str, Any]) -> int:
    """Parameters that take part in one token's forward pass, without the embedding and what was left out."""
    experts = experts_of(shape)
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            routed = parameter.dim() == 3
            total += parameter.numel() * shape["num_experts_per_tok"] // experts if routed else parameter.numel()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each kind")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    arguments = parser.parse_args()

    world = join(arguments.threads, timeout_minutes=10)
    rounds = arguments.rounds
    if world.device.type == "cpu":
        result = counting_time(world, "mixtral", CPU_SHAPE, (16, 256), 8, torch.float32, rounds)
    else:
        result = counting_time(world, *SHAPES["olmoe"], (32, 2048), 8, torch.bfloat16, rounds)
    leave()
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
