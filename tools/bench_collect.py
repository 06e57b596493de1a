"""What collecting routing statistics costs in time, against plain forward passes (memory: bench_collect_memory.py).

    python tools/bench_collect.py [--json]                  # time; on a GPU also the speed-up on three real shapes

``counting_time_ratio``: the forward pass with counting over the same forward pass without, medians of interleaved
passes. ``speedup`` (GPU): tokens per second of collecting, over the best plain transformers forward pass (grouped or
eager experts, with the language-model head) in the same process; ``speedup_with_trace_and_nll`` likewise with
everything recorded. Random weights everywhere; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

COMMON = {"tie_word_embeddings": False, "max_position_embeddings": 4096}
# Published shapes; `layers` of them are built.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {
            "num_hidden_layers": 8,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
        },
    ),
    "olmoe": (
        "olmoe",
        {
            "num_hidden_layers": 16,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "vocab_size": 50304,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_hidden_layers": 12,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
        },
    ),
}
CPU_SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 4096,
}
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the vendor's data sheets


def build(family: str, shape: dict[str, Any], dtype: Any, device: Any, experts: str | None = None) -> Any:
    """A random model on the device (normal weights: what is measured does not depend on them)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **shape)
    arguments = {} if experts is None else {"experts_implementation": experts}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **arguments)
    return model.eval().requires_grad_(False)


def median_s(functions: dict[str, Callable[[], Any]], rounds: int, device: Any) -> dict[str, float]:
    """Median seconds of each function, interleaved, after one warm-up of each."""
    import torch

    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                taken[name].append(time.perf_counter() - begin)
    return {name: statistics.median(values) for name, values in taken.items()}


def rows_of(vocabulary: int, rows: int, length: int) -> Any:
    """A batch of packed rows, four documents in each."""
    import torch

    from trace_ds.corpora.dataset import Batch

    ids = torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    local = torch.arange(length) // -(-length // 4)
    documents = local[None] + 4 * torch.arange(rows)[:, None]
    positions = torch.arange(length).repeat(rows, 1) % -(-length // 4)
    counted = torch.zeros(rows, length, dtype=torch.bool)
    counted[:, :-1] = documents[:, 1:] == documents[:, :-1]
    return Batch(ids, positions, counted, documents)


def counting_pass(model: Any, counter: Any, batch: Any, device: Any) -> None:
    """What collect does with a batch when neither trace nor losses are asked for."""
    from trace_ds.models.routers import record_routing
    from trace_ds.routing.collection import forward

    with record_routing(model) as recorder:
        forward(model, batch, device)
    counter.add(recorder, batch.counted_BS, batch.document_ids_BS)


def everything_pass(model: Any, counter: Any, batch: Any, device: Any) -> None:
    """The same with the routing trace and the loss of every token."""
    import torch

    from trace_ds.models.routers import record_output, record_routing
    from trace_ds.routing.collection import forward, token_nll

    with record_routing(model) as recorder, record_output(model.model) as body:
        forward(model, batch, device)
    counter.add(recorder, batch.counted_BS, batch.document_ids_BS)
    trace = torch.stack([recorder.layer(number)[1] for number in range(counter.layers)], dim=1)
    trace.sort(dim=-1).values.to(torch.uint8).cpu()
    token_nll(model.lm_head, body[0], batch).cpu()


def counting_time(rounds: int) -> float:
    import torch

    from trace_ds.models.routers import find_routers
    from trace_ds.routing.collection import forward
    from trace_ds.routing.counter import RoutingCounter

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    family, shape, size = "mixtral", CPU_SHAPE, (8, 256)
    if device.type == "cuda":
        (family, shape), size = SHAPES["olmoe"], (8, 2048)
    model = build(family, shape, torch.bfloat16 if device.type == "cuda" else torch.float32, device)
    batch = rows_of(shape["vocab_size"], *size)
    experts = shape.get("num_local_experts") or shape["num_experts"]
    counter = RoutingCounter(len(find_routers(model)), experts, shape["num_experts_per_tok"], device)
    taken = median_s(
        {
            "plain": lambda: forward(model, batch, device),
            "counting": lambda: counting_pass(model, counter, batch, device),
        },
        rounds,
        device,
    )
    print(f"forward {taken['plain']:.4f} s, with counting {taken['counting']:.4f} s", file=sys.stderr)
    return taken["counting"] / taken["plain"]


def speedup(name: str, rounds: int) -> dict[str, float]:
    """Collecting (counts; or trace and losses too) against the best plain pass, 8 × 2048 tokens, bf16, one GPU."""
    import torch

    from trace_ds.models.loading import Parts, leave_out
    from trace_ds.models.routers import find_routers
    from trace_ds.routing.counter import RoutingCounter

    device = torch.device("cuda")
    family, shape = SHAPES[name]
    batch = rows_of(shape["vocab_size"], 8, 2048)
    ids, positions = batch.input_ids_BS.to(device), batch.position_ids_BS.to(device)
    tokens, seconds = ids.numel(), {}
    for kind in ("grouped_mm", "eager"):
        model = build(family, shape, torch.bfloat16, device, kind)
        flops = 2 * tokens * active_parameters(model, shape)

        def plain(model: Any = model) -> None:
            with torch.no_grad():
                model(input_ids=ids, position_ids=positions, use_cache=False)

        seconds[f"plain {kind}"] = median_s({"": plain}, rounds, device)[""]
        experts = shape.get("num_local_experts") or shape["num_experts"]
        counter = RoutingCounter(len(find_routers(model)), experts, shape["num_experts_per_tok"], device)
        ours = (model, counter, batch, device)
        seconds[f"everything {kind}"] = median_s({"": partial(everything_pass, *ours)}, rounds, device)[""]
        leave_out(model, Parts(head=False, last_output=False), ep=1)
        seconds[f"collect {kind}"] = median_s({"": partial(counting_pass, *ours)}, rounds, device)[""]
        del model, counter, ours
        gc.collect()
        torch.cuda.empty_cache()
    card = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK_FLOPS.items() if key in card), None)
    for kind, taken in seconds.items():
        use = f", {flops / taken / peak:.0%} of peak (model FLOPs of the whole forward)" if peak else ""
        print(f"{name}: {kind}: {tokens / taken:,.0f} tokens/s on {card}{use}", file=sys.stderr)
    sides = ("plain", "collect", "everything")
    best = {side: min(value for key, value in seconds.items() if key.startswith(side)) for side in sides}
    return {side: best["plain"] / best[side] for side in sides[1:]}


def active_parameters(model: Any, shape: dict[str, Any]) -> int:
    """Parameters that take part in one token's forward pass, without the embedding."""
    experts = shape.get("num_local_experts") or shape["num_experts"]
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            routed = parameter.dim() == 3
            total += parameter.numel() * shape["num_experts_per_tok"] // experts if routed else parameter.numel()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object on one line")
    parser.add_argument("--rounds", type=int, default=15, help="timed passes of each kind")
    arguments = parser.parse_args()
    import torch

    result: dict[str, Any] = {"counting_time_ratio": counting_time(arguments.rounds)}
    if torch.cuda.is_available():
        found = {name: speedup(name, arguments.rounds) for name in SHAPES}
        result["speedup"] = {name: value["collect"] for name, value in found.items()}
        result["speedup_with_trace_and_nll"] = {name: value["everything"] for name, value in found.items()}
    print(json.dumps(result, indent=None if arguments.json else 1))


if __name__ == "__main__":
    main()
