"""The acceptance run for a GPU goes through on a CPU, all parts of it (small: the numbers mean nothing)."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from processes import output_of_main

from tools import gpu_acceptance

KINDS = ("correct_collect", "correct_unlearn", "collect_qwen3_moe", "unlearn_mixtral")


def accept(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    """The tool with these words: its status and its report."""
    status = gpu_acceptance.main(["--device", "cpu", "--tiny", *words])
    return status, json.loads(capsys.readouterr().out)


def forked(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """A part in a fork of a process that has imported torch."""
    assert command[0] == sys.executable
    return output_of_main(*command[1:], limit_s=options["timeout"])


@pytest.mark.slow
def test_every_kind_of_part_goes_through(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    processes = SimpleNamespace(run=forked, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(gpu_acceptance, "subprocess", processes)
    status, result = accept(capsys, "--only", *KINDS)
    parts = result["parts"]
    assert status == 0 and result["ok"], {name: part for name, part in parts.items() if not part["ok"]}
    assert {name.split("_")[0] for name in KINDS} == {name.split("_")[0] for name in gpu_acceptance.PARTS}
    for part, names in (("correct_unlearn", gpu_acceptance.JOBS), ("correct_collect", gpu_acceptance.TINY)):
        assert all(parts[part][name]["worst"][1] == 0.0 for name in names)  # the device is the CPU: the same numbers
    for part in (parts[name] for name in KINDS[2:]):
        assert all(entry["tokens_per_s"] > 0 for entry in part.values() if isinstance(entry, dict))
        assert part["speedup"] > 0


def test_a_part_that_fails_or_takes_too_long_leaves_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        "import sys; sys.exit('this part is broken') if 'correct_collect' in sys.argv else __import__('time').sleep(9)"
    )

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", script, *command[2:]], **options)

    monkeypatch.setattr(
        gpu_acceptance, "subprocess", SimpleNamespace(run=run, TimeoutExpired=subprocess.TimeoutExpired)
    )
    monkeypatch.setattr(
        gpu_acceptance, "PARTS", {name: (part, 0.5) for name, (part, _) in gpu_acceptance.PARTS.items()}
    )
    status, result = accept(capsys, "--only", *KINDS[:2])
    assert status == 1 and not result["ok"]
    assert "this part is broken" in result["parts"]["correct_collect"]["error"]
    assert result["parts"]["correct_unlearn"]["error"] == "not done after 0 s"
