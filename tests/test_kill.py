"""SIGKILL in the middle of any stage, then the same command again: the artefacts are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from command import environment, killed, trace_ds, tree
from test_unlearn import calibrated_run

STAGES = ("prepare", "collect", "calibrate", "unlearn", "convert", "evaluate", "report")
# What a stage, and no other, writes before its result is there, below the run directory.
WRITES = {
    "prepare": "data.tmp-",
    "collect": "statistics/",
    "calibrate": "calibration.tmp-",
    "unlearn": "checkpoints/step_",
    "convert": "model.tmp-",
    "evaluate": "evaluation/.",
    "report": "report.tmp-",
}
KEPT = ("data", "statistics", "calibration", "checkpoints", "model", "evaluation", "report", "variants")


def final_artefacts(run: Path) -> dict[str, bytes]:
    """Everything a run leaves but logs, TensorBoard files and locks (the only places where times are)."""
    found = {}
    for part in KEPT:
        for name, content in tree(run / part).items():
            if "/logs/" not in f"/{name}" and "/tb/" not in f"/{name}" and not name.endswith(".lock"):
                found[f"{part}/{name}"] = content
    return found


def processes_with(text: str) -> list[int]:
    """Process ids whose command line contains ``text``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_any_stage_ends_the_same(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny.write_config(
        tmp_path, tiny_model, distributed={"ep": 2, "nproc": 2}, variants={"uniform": {"calibration.rule": "uniform"}}
    )
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    result = trace_ds("run", config, "--run-dir", undisturbed, cwd=tmp_path, timeout_s=900)
    assert result.returncode == 0, result.stderr[-3000:]
    draw = random.Random(5)
    for stage in STAGES:
        killed(["run", config, "--run-dir", disturbed], tmp_path, f"{disturbed}/{WRITES[stage]}", draw.randint(1, 3))
        assert not processes_with(str(disturbed)), stage
    result = trace_ds("run", config, "--run-dir", disturbed, cwd=tmp_path, timeout_s=900)
    assert result.returncode == 0, result.stderr[-3000:]
    expected, found = final_artefacts(undisturbed), final_artefacts(disturbed)
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, different


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) of a job on two ranks up to its calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    config = tiny.write_config(
        folder, tiny_model, distributed={"ep": 2, "nproc": 2}, unlearning__steps=5000, unlearning__save_every=1000
    )
    return config, calibrated_run(config, folder / "run", world=2)


def started(config: Path, run: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "trace_ds", "unlearn", str(config), "--run-dir", str(run), *options]
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), start_new_session=True, **quiet)


def wait_for(process: subprocess.Popen[str], condition: Callable[[], bool]) -> None:
    while not condition():
        assert process.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    """Killing one rank of a bare job ends it with a failure, soon, and leaves nothing running."""
    config, run = calibrated[0], tmp_path / "run"
    shutil.copytree(calibrated[1], run)
    process = started(config, run, "--set", "unlearning.save_every=2")
    wait_for(process, lambda: (run / "checkpoints" / "step_000002").exists())
    ranks = [pid for pid in processes_with(str(run / "config.yaml")) if pid != process.pid]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode not in (0, 2, 75)
    assert not processes_with(str(run / "config.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to the command", "Ctrl-C to all its processes"])
def test_a_signal_saves_and_exits_75_and_the_rerun_goes_on(
    calibrated: tuple[Path, Path], tmp_path: Path, how: str
) -> None:
    config, run = calibrated[0], tmp_path / "run"
    shutil.copytree(calibrated[1], run)
    process, log = started(config, run), run / "logs" / "unlearn.jsonl"
    wait_for(process, lambda: log.exists() and '"step": 3,' in log.read_text())
    if how.startswith("SIGTERM"):
        process.send_signal(signal.SIGTERM)
    else:  # as a terminal does
        os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=120)[1]
    assert process.returncode == 75, errors
    assert "stopped after step" in errors
    steps = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert len(steps) == 1
    done = int(steps[0].removeprefix("step_"))
    result = trace_ds("unlearn", config, "--run-dir", run, "--set", f"unlearning.steps={done + 2}")
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {done}" in result.stdout
