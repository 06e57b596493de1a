"""SIGKILL in the middle of any stage, then the same command again: the artefacts are those of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from command import tree
from forked import JOB, Server
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
    """Everything a run leaves but logs, TensorBoard files, locks, and what the page says of the time that training took
    (the only places where times are)."""
    result = {}
    for part in KEPT:
        for name, content in tree(run / part).items():
            if "/logs/" not in f"/{name}" and "/tb/" not in f"/{name}" and not name.endswith(".lock"):
                result[f"{part}/{name}"] = content
    page = re.sub(rb"[\d,]+ s \([\d.e+-]+ s a step\)", b"", result["report/index.html"])
    described = json.loads(result["report/artefact.json"])
    del described["files"]["index.html"], described["content"]
    return result | {"report/index.html": page, "report/artefact.json": json.dumps(described).encode()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_in_any_stage_ends_the_same(tiny_model: Path, tmp_path: Path, server: Server) -> None:
    config = tiny.write_config(
        tmp_path, tiny_model, distributed={"ep": 2, "nproc": 2}, variants={"uniform": {"calibration.rule": "uniform"}}
    )
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    result = server.run(["run", config, "--run-dir", undisturbed, "--variants", "all"], tmp_path, **JOB)
    assert result.returncode == 0, result.stderr[-3000:]
    draw = random.Random(5)
    command = ["run", config, "--run-dir", disturbed, "--variants", "uniform"]
    for stage in STAGES:
        result = server.run(command, tmp_path, **JOB, kill=(f"{disturbed}/{WRITES[stage]}", draw.randint(1, 3)))
        assert result.returncode == -signal.SIGKILL, (stage, result)
    result = server.run(command, tmp_path, **JOB)
    assert result.returncode == 0, result.stderr[-3000:]
    expected, actual = final_artefacts(undisturbed), final_artefacts(disturbed)
    assert actual.keys() == expected.keys(), sorted(actual.keys() ^ expected.keys())
    different = [name for name in expected if actual[name] != expected[name]]
    assert not different, different


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) of a job on two ranks up to its calibration."""
    folder = tmp_path_factory.mktemp("calibrated")
    config = tiny.write_config(
        folder, tiny_model, distributed={"ep": 2, "nproc": 2}, unlearning__steps=5000, unlearning__save_every=1000
    )
    return config, calibrated_run(config, folder / "run", world=2)


def ranks_of(pid: int) -> list[int]:
    """The processes that a command has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_for(pid: int, condition: Callable[[], bool]) -> None:
    while not condition():
        assert Path(f"/proc/{pid}").exists()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(calibrated: tuple[Path, Path], tmp_path: Path, server: Server) -> None:
    """Killing one rank of a bare job ends it with a failure, soon, and leaves nothing running."""
    config, run = calibrated[0], tmp_path / "run"
    shutil.copytree(calibrated[1], run)
    command = server.start(["unlearn", config, "--run-dir", run, "--set", "unlearning.save_every=2"], tmp_path, **JOB)
    wait_for(command, (run / "checkpoints" / "step_000002").exists)
    ranks = ranks_of(command)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    assert server.wait().returncode not in (0, 2, 75)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["SIGTERM to the command", "Ctrl-C to all its processes"])
def test_a_signal_saves_and_exits_75_and_the_rerun_goes_on(
    calibrated: tuple[Path, Path], tmp_path: Path, how: str, server: Server
) -> None:
    config, run = calibrated[0], tmp_path / "run"
    shutil.copytree(calibrated[1], run)
    log = run / "logs" / "unlearn.jsonl"
    command = server.start(["unlearn", config, "--run-dir", run], tmp_path, **JOB)
    wait_for(command, lambda: log.exists() and '"step": 3,' in log.read_text())
    if how.startswith("SIGTERM"):
        os.kill(command, signal.SIGTERM)
    else:  # as a terminal does
        os.killpg(command, signal.SIGINT)
    stopped = server.wait()
    assert stopped.returncode == 75, stopped
    assert "stopped after step" in stopped.stderr
    steps = sorted(path.name for path in (run / "checkpoints").glob("step_*"))
    assert len(steps) == 1
    done = int(steps[0].removeprefix("step_"))
    further = ["unlearn", config, "--run-dir", run, "--set", f"unlearning.steps={done + 2}"]
    result = server.run(further, tmp_path, **JOB)
    assert result.returncode == 0, result.stderr
    assert f"resumed after step {done}" in result.stdout
