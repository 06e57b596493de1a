"""The benchmark runs and measures what it says (small: its numbers are not judged here)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from processes import output_of_main

from tools import bench

SIZES = {"hidden": 32, "layers": 2, "collect-layers": 2, "rows": 2, "context": 24, "questions": 4, "megabytes": 1}
SIZES |= {"convert-layers": 1, "tokens": 6000, "rounds": 1}
SMALL = ["--shape", "mixtral_8x7b", *(word for name, value in SIZES.items() for word in (f"--{name}", str(value)))]


def run_bench(*words: object) -> None:
    ended = output_of_main(bench.__file__, *words, *SMALL, limit_s=120)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("work", "names"),
    [
        ("collect", {"against hooks", "against bare"}),
        ("evaluate", {"letters", "letters, five-shot", "endings"}),
        ("prepare", {"time against datasets"}),
        ("calibrate", {"mixtral_8x7b"}),
    ],
)
def test_a_work_is_measured_beside_what_people_do(work: str, names: set[str], tmp_path: Path) -> None:
    run_bench(work, "--json", tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))[work]
    assert result.keys() == names
    for each in result.values():
        assert each["ratio"] > 0
        assert each.get("largest_difference", 0.0) < 1e-4  # both sides score the same text
        assert each.get("largest_miss", 0.0) < 1e-5 and each.get("theirs_largest_miss", 0.0) < 1e-4


@pytest.mark.slow
def test_a_step_of_each_loss_is_measured_beside_the_plain_loop(tmp_path: Path) -> None:
    run_bench("--part", "step", "prepare", tmp_path)
    for loss in bench.LOSSES:
        for kind in ("times", "ours", "plain"):
            run_bench("--part", "step", f"{loss} {kind}", tmp_path)


def test_hooks_and_collecting_count_the_same(tmp_path: Path) -> None:
    shape = bench.small_shape(bench.parse(SMALL))
    model = bench.build("olmoe", shape, torch.float32, "cpu")
    dataset = bench.dataset_of(tmp_path, shape["vocab_size"], 2, 24)
    counts_LE = bench.hooked(model, [dataset.batch(range(2), pad_id=0)], 32)()
    assert counts_LE.shape == (2, 32) and counts_LE.sum() == 2 * 2 * 24 * 8


def test_wide_experts_are_run_one_after_the_other() -> None:
    """The rule of ``collect``; on a CPU transformers chooses."""
    kernels = {name: bench.chosen_kernel(shape, torch.device("cuda")) for name, (_, shape) in bench.SHAPES.items()}
    assert kernels == {"mixtral": "eager", "olmoe": "grouped_mm", "qwen3_moe": "grouped_mm"}
    assert bench.chosen_kernel(bench.SHAPES["mixtral"][1], torch.device("cpu")) == "grouped_mm"
