"""The tools that measure collecting run on a CPU, and say what they promise (small: the numbers mean nothing)."""

from __future__ import annotations

from typing import Any

from processes import run_distributed

from tools import bench_collect

SHAPE = bench_collect.CPU_SHAPE | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}


def measure_time(world: Any) -> tuple[dict[str, float], str]:
    import contextlib
    import io

    import torch

    arguments = {"size": (5, 32), "batch_rows": 2, "dtype": torch.float32, "rounds": 1}
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        found = bench_collect.counting_time(world, "mixtral", SHAPE, **arguments)
        found |= bench_collect.speedup(world, "small", "mixtral", SHAPE, **arguments)
    return found, said.getvalue()


def test_times() -> None:
    found, said = run_distributed(measure_time, 1)[0]
    ratios = {f"{kind}_{name}_ratio" for kind in ("counting", "sums") for name in ("time", "cpu")}
    assert found.keys() == {*ratios, "collect", "everything"}
    assert all(value > 0 for value in found.values())
    lines = [line for line in said.splitlines() if line.startswith("small: ")]
    kinds = [line.split(": ")[1] for line in lines]
    plain = [f"plain {kernel} {way}" for kernel in ("grouped_mm", "eager") for way in ("packed", "causal")]
    assert sorted(kinds) == sorted([*plain, "everything grouped_mm", "collect grouped_mm"])


def test_wide_experts_are_run_one_after_the_other() -> None:
    """The rule of ``collect``; on a CPU transformers chooses."""
    import torch

    kernels = {
        name: bench_collect.chosen_kernel(shape, torch.device("cuda"))
        for name, (_, shape) in bench_collect.SHAPES.items()
    }
    assert kernels == {"mixtral": "eager", "olmoe": "grouped_mm", "qwen3_moe": "grouped_mm"}
    assert bench_collect.chosen_kernel(bench_collect.SHAPES["mixtral"][1], torch.device("cpu")) == "grouped_mm"
