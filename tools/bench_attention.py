"""Attention inside packed documents against the mask that transformers makes for them, in one process.

    python tools/bench_attention.py [--json]            # two minutes; on a GPU with the shape of Qwen3-30B-A3B

For each way of packing rows (four equal documents, many of mixed lengths, one with filling after it):

* ``collect_ratio``: the forward passes of ``trace-ds collect`` over the same under transformers' mask, the median of
  the ratios of neighbouring rounds; below 1 is faster. ``step_ratio`` likewise with a backward pass. On a CPU by CPU
  time of the process, which other work on the machine disturbs less.
* ``memory_share``: peak memory that a forward pass over one row of 8,192 tokens in eight documents adds, over the same
  under the mask, in a model whose experts are as good as none (on a CPU resident memory, Linux; on a GPU what torch
  allocated); ``memory_share_with_experts`` in the same with its experts.

Random weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.bench_collect import CPU_SHAPE, SHAPES, build, engine_of, rounds_s
from tools.bench_collect_memory import peak_bytes, reset_peak

PACKINGS = ("equal", "mixed", "filled")
LATENT = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "vocab_size": 4096,
}


def batch_of(packing: str, rows: int, length: int, vocabulary: int) -> Any:
    """A batch of packed rows, as ``trace_ds.corpora.dataset.TokenDataset`` gives one."""
    import numpy as np
    import torch

    from trace_ds.corpora.dataset import Batch

    draw = np.random.default_rng(0)
    sizes = {"equal": lambda: length // 4, "mixed": lambda: int(draw.integers(5, length // 4))}
    sizes |= {"filled": lambda: 3 * length // 4, "eighths": lambda: length // 8}
    positions_BS = np.zeros((rows, length), dtype=np.int64)
    for positions_S in positions_BS:
        begin = 0
        while begin < length:
            part_S = positions_S[begin : begin + sizes[packing]()]
            part_S[:] = np.arange(len(part_S))
            begin += len(part_S)
    ids_BS = torch.from_numpy(draw.integers(0, vocabulary, (rows, length)))
    return Batch(ids_BS, torch.from_numpy(positions_BS), torch.ones_like(ids_BS, dtype=torch.bool), ids_BS)


def both(model: Any, function: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """``function`` with the model's attention as it is, and with transformers' under a mask."""
    from trace_ds.models.attention import NAME

    def under(name: str) -> Callable[[], Any]:
        def run() -> None:
            model.config._attn_implementation = name
            function()

        return run

    return {"documents": under(NAME), "mask": under("sdpa")}


def times(
    world: Any, family: str, shape: dict[str, Any], size: tuple[int, int], dtype: Any, rounds: int
) -> dict[str, float]:
    """``collect_ratio`` and ``step_ratio`` by packing; ``size``: rows and positions."""
    from trace_ds.models.attention import packed
    from trace_ds.routing.collection import forward

    engine = engine_of(build(family, shape, dtype, world.device), dtype)
    found = {}
    for packing in PACKINGS:
        batch = batch_of(packing, *size, shape["vocab_size"])

        def collect(batch: Any = batch) -> None:
            forward(engine, batch, world.device)

        def step(batch: Any = batch) -> None:
            model = engine.module.model
            ids_BS = batch.input_ids_BS.to(world.device)
            model(ids_BS, **packed(model, batch.position_ids_BS, world.device)).last_hidden_state.sum().backward()
            model.zero_grad()

        for kind, function in (("collect", collect), ("step", step)):
            engine.module.requires_grad_(kind == "step")
            taken = rounds_s(both(engine.module, function), rounds, world.device)
            clock = 1 if world.device.type == "cpu" else 0
            found[f"{kind}_ratio {packing}"] = statistics.median(
                ours[clock] / theirs[clock] for ours, theirs in zip(taken["documents"], taken["mask"], strict=True)
            )
            seconds = {way: statistics.median(value[clock] for value in values) for way, values in taken.items()}
            told = ", ".join(f"{way} {value:.4f} s" for way, value in seconds.items())
            print(f"{family}, {packing}, {kind}: {told}", file=sys.stderr)
    return found


def memory_share(world: Any, family: str, shape: dict[str, Any], length: int, dtype: Any) -> float:
    """Added peak memory of a pass over one row, over the same under the mask."""
    import torch

    from trace_ds.routing.collection import forward

    engine = engine_of(build(family, shape, dtype, world.device), dtype)
    batch = batch_of("eighths", 1, length, shape["vocab_size"])
    added = {}
    forward(engine, batch_of("equal", 1, 64, shape["vocab_size"]), world.device)  # what is made once
    for way, run in both(engine.module, lambda: forward(engine, batch, world.device)).items():
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            added[way] = torch.cuda.max_memory_allocated() - before
        else:
            before = reset_peak()
            run()
            added[way] = peak_bytes() - before
    told = ", ".join(f"{way} {value / 1e9:.3f} GB" for way, value in added.items())
    print(f"{family}, {length} tokens: {told}", file=sys.stderr)
    return added["documents"] / added["mask"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each kind")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    arguments = parser.parse_args()
    import torch

    from trace_ds.parallel.world import join, leave

    world = join(arguments.threads, timeout_minutes=10)
    if world.device.type == "cpu":
        size, dtype, shapes = (8, 512), torch.float32, {"mixtral": CPU_SHAPE, "deepseek_v3": LATENT}
    else:
        size, dtype, shapes = (8, 2048), torch.bfloat16, {"qwen3_moe": SHAPES["qwen3_moe"][1]}
    result: dict[str, Any] = {}
    for family, shape in shapes.items():
        small = shape | {"num_hidden_layers": 2}
        bare = small | {key: 16 for key in ("intermediate_size", "moe_intermediate_size") if key in shape}
        result[family] = {
            "memory_share": memory_share(world, family, bare, 8192, dtype),
            "memory_share_with_experts": memory_share(world, family, small, 8192, dtype),
            **times(world, family, shape, size, dtype, arguments.rounds),
        }
    leave()
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
