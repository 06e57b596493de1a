"""The acceptance run for a GPU goes through on a CPU, all parts of it (small: the numbers mean nothing)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import output_of_main

from tools import gpu_acceptance


@pytest.fixture
def accept(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, Any]]:
    """The tool with these words: its status and what it tells. The parts are processes of their own."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # the tool adds to both
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))

    def run(*words: str) -> tuple[int, Any]:
        status = gpu_acceptance.main(["--device", "cpu", "--tiny", *words])
        return status, json.loads(capsys.readouterr().out)

    return run


KINDS = ("correct_collect", "correct_unlearn", "collect_qwen3_moe", "zero3_mixtral")
ALONE = "unlearn_mixtral"  # the part that goes on where another fails


def forked(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A part in a fork of a process that has imported torch."""
    assert command[0] == sys.executable
    return output_of_main(*command[1:], limit_s=options["timeout"])


@pytest.mark.slow
def test_every_kind_of_part_goes_through(
    accept: Callable[..., tuple[int, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = SimpleNamespace(run=forked, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_acceptance, "subprocess", processes)
    status, result = accept("--only", *KINDS)
    parts = result["parts"]
    assert status == 0 and result["ok"], {name: part for name, part in parts.items() if not part["ok"]}
    assert parts.keys() == set(KINDS)
    assert {name.split("_")[0] for name in (*KINDS, ALONE)} == {name.split("_")[0] for name in gpu_acceptance.PARTS}
    assert {
        job: entry["worst"][1] for job, entry in parts["correct_unlearn"].items() if job in gpu_acceptance.JOBS
    } == (
        dict.fromkeys(gpu_acceptance.JOBS, 0.0)  # the device is the CPU: the very same numbers
    )
    assert all(parts["correct_collect"][family]["worst"][1] == 0.0 for family in gpu_acceptance.TINY)
    for name, part in parts.items():
        if not name.startswith("correct"):
            check_speed(part)


def check_speed(part: dict[str, Any]) -> None:
    assert all(entry["tokens_per_s"] > 0 for entry in part.values() if isinstance(entry, dict))
    assert any(key.startswith("speedup") and value > 0 for key, value in part.items())


def test_a_part_that_fails_leaves_the_others(accept: Callable[..., tuple[int, Any]], tmp_path: Path) -> None:
    """Of a DeepSpeed that cannot be imported (out of a wheel that lies beside) only the part that needs it is told; the
    parts are started as the tool does it."""
    with zipfile.ZipFile(tmp_path / "deepspeed-0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("deepspeed/__init__.py", "raise ImportError('this DeepSpeed is broken')")
    status, result = accept("--wheels", str(tmp_path), "--only", "zero3_mixtral", ALONE)
    assert status == 1 and not result["ok"]
    assert "this DeepSpeed is broken" in result["parts"]["zero3_mixtral"]["error"]
    check_speed(result["parts"][ALONE])


def test_a_part_that_takes_too_long_is_ended() -> None:
    options = gpu_acceptance.parse(["--device", "cpu", "--tiny"])
    result = gpu_acceptance.run_part("correct_collect", options, 0.5)
    assert not result["ok"] and result["error"] == "not done after 0 s"
