"""The tools that measure collecting run on a CPU, and say what they promise (small: the numbers mean nothing)."""

from __future__ import annotations

from typing import Any

from processes import run_distributed

from tools import bench_collect

SHAPE = bench_collect.CPU_SHAPE | {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "vocab_size": 64}


def measure_time(world: Any) -> dict[str, float]:
    import torch

    return bench_collect.counting_time(
        world, "mixtral", SHAPE, size=(5, 32), batch_rows=2, dtype=torch.float32, rounds=1
    )


def test_times() -> None:
    (result,) = run_distributed(measure_time, 1)
    assert result.keys() == {f"{kind}_{name}_ratio" for kind in ("counting", "sums") for name in ("time", "cpu")}
    assert all(value > 0 for value in result.values())


def test_wide_experts_are_run_one_after_the_other() -> None:
    """The rule of ``collect``; on a CPU transformers chooses."""
    import torch

    kernels = {
        name: bench_collect.chosen_kernel(shape, torch.device("cuda"))
        for name, (_, shape) in bench_collect.SHAPES.items()
    }
    assert kernels == {"mixtral": "eager", "olmoe": "grouped_mm", "qwen3_moe": "grouped_mm"}
    assert bench_collect.chosen_kernel(bench_collect.SHAPES["mixtral"][1], torch.device("cpu")) == "grouped_mm"
