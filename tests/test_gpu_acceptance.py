"""The acceptance run for a GPU goes through on a CPU, all parts of it (small: the numbers mean nothing)."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from distributed import CONTEXT

from tools import gpu_acceptance

TOOL = Path(gpu_acceptance.__file__)


def accept(*arguments: str) -> tuple[int, dict[str, Any]]:
    command = [sys.executable, str(TOOL), "--device", "cpu", "--tiny", *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


KINDS = ("correct_collect", "correct_unlearn", "collect_qwen3_moe", "zero3_mixtral")
ALONE = "unlearn_mixtral"  # the part that goes on where another fails
SOME = ("rmu", "dpo", "online", "finetune")  # of the jobs, and one family; all on a device: tests/test_standin.py


def part(name: str, folder: Path) -> dict[str, Any]:
    """What the tool does in a process of its own."""
    gpu_acceptance.JOBS = {job: gpu_acceptance.JOBS[job] for job in SOME}
    if name == "correct_collect":
        gpu_acceptance.TINY = {"mixtral": gpu_acceptance.TINY["mixtral"]}
    return gpu_acceptance.PARTS[name][0](gpu_acceptance.parse(["--device", "cpu", "--tiny"]), folder)


@pytest.mark.slow
def test_every_kind_of_part_goes_through(tmp_path: Path) -> None:
    assert {name.split("_")[0] for name in (*KINDS, ALONE)} == {name.split("_")[0] for name in gpu_acceptance.PARTS}
    parts = {}
    for name in KINDS:
        with ProcessPoolExecutor(1, mp_context=CONTEXT) as process:
            parts[name] = process.submit(part, name, tmp_path).result(timeout=200)
    assert {job: held["worst"][1] for job, held in parts["correct_unlearn"].items() if job in SOME} == (
        dict.fromkeys(SOME, 0.0)  # the device is the CPU: the very same numbers
    )
    assert parts["correct_collect"]["mixtral"]["worst"][1] == 0.0
    for name, found in parts.items():
        if name.startswith("correct"):
            assert found["ok"], name
        else:
            check_speed(found)


def check_speed(part: dict[str, Any]) -> None:
    assert all(held["tokens_per_s"] > 0 for held in part.values() if isinstance(held, dict))
    assert any(key.startswith("speedup") and value > 0 for key, value in part.items())


def test_a_part_that_fails_leaves_the_others(tmp_path: Path) -> None:
    """By the tool's own command, each part a process. Of a DeepSpeed that cannot be imported (out of a wheel that lies
    beside) only the part that needs it is told."""
    with zipfile.ZipFile(tmp_path / "deepspeed-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("deepspeed/__init__.py", "raise ImportError('this DeepSpeed is broken')")
    status, found = accept("--wheels", str(tmp_path), "--only", "zero3_mixtral", ALONE)
    assert status == 1 and not found["ok"]
    assert "this DeepSpeed is broken" in found["parts"]["zero3_mixtral"]["error"]
    check_speed(found["parts"][ALONE])


def test_a_part_that_takes_too_long_is_ended() -> None:
    options = gpu_acceptance.parse(["--device", "cpu", "--tiny"])
    found = gpu_acceptance.run_part("correct_collect", options, 0.5)
    assert not found["ok"] and found["error"] == "not done after 0 s"
