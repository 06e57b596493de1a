"""Every launcher, for real, gives the same artefact byte for byte."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import jobs
import pytest
import tiny
from command import run, tree
from forked import JOB, Server
from processes import end_of_ranks

from trace_ds.parallel.environment import free_port
from trace_ds.parallel.launch import run_processes
from trace_ds.parallel.world import end_process

PROCESSES = ("--num_machines", "1", "--num_processes", "2", "--main_process_port")
LAUNCHERS = {
    "bare": [sys.executable, "-m", "trace_ds"],
    "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", "{port}", "--module", "trace_ds"],
    # On GPUs it takes --multi_gpu for granted; on CPUs it would start one process without, whatever --num_processes.
    "accelerate": ["accelerate", "launch", "--multi_gpu", *PROCESSES, "{port}", "-m", "trace_ds"],
    "torchrun": ["torchrun", "--nproc-per-node", "2", "--master-port", "{port}", "-m", "trace_ds"],
    "mpiexec": ["mpiexec", "--allow-run-as-root", "--oversubscribe", "-n", "2", sys.executable, "-m", "trace_ds"],
}

MAKES = {"collect": "statistics", "calibrate": "calibration", "unlearn": "checkpoints"}  # calibrate: always bare


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    config = tiny.write_config(folder, tiny_model, distributed={"ep": 2, "nproc": 2}, unlearning__steps=2)
    jobs.prepared_run(config, folder / "bare")
    for name in LAUNCHERS:
        if name != "bare":
            jobs.copied_run(folder / "bare", folder / name, "data")
    return config


def artefacts(run_dir: Path) -> dict[str, bytes]:
    result = {}
    for part in MAKES.values():
        result |= {f"{part}/{name}": content for name, content in tree(run_dir / part).items()}
    return result


@pytest.mark.slow
def test_all_launchers_give_the_same_bytes(prepared: Path, server: Server) -> None:
    """What a launcher does not make itself it gets from the bare start, and that is forked but for one verb: each real
    launch costs seconds."""
    folder = prepared.parent
    verbs = {"bare": "collect", "deepspeed": "collect", "accelerate": "unlearn", "torchrun": "unlearn"}
    verbs["mpiexec"] = "collect"
    for name, command in LAUNCHERS.items():
        for verb, part in MAKES.items():
            arguments = [verb, str(prepared), "--run-dir", str(folder / name)]
            if verb == verbs[name]:
                words = [word.replace("{port}", str(free_port())) for word in command]
                result = run([*words, *arguments], cwd=folder)
            elif name == "bare":
                result = server.run(arguments, folder, **JOB)
            else:
                shutil.copytree(folder / "bare" / part, folder / name / part)
                continue
            assert result.returncode == 0, (name, verb, result.stdout[-2000:], result.stderr[-3000:])
    expected = artefacts(folder / "bare")
    assert any(name.startswith("checkpoints/step_000002/") for name in expected)
    assert "statistics/retain/statistics.safetensors" in expected
    for name in LAUNCHERS:
        actual = artefacts(folder / name)
        assert actual.keys() == expected.keys(), name
        different = [file for file in expected if actual[file] != expected[file]]
        assert not different, (name, different)


def test_verbs_of_one_process_refuse_to_be_ranks(server: Server, tmp_path: Path) -> None:
    """Rank 0 says it in one line, all ranks end with status 2, and nothing is written."""
    for rank, expected in (("0", "run runs as one process, and the launcher started 2"), ("1", "")):
        launcher = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2"}
        result = server.run(["run", "demo", "--run-dir", "made"], tmp_path, launcher)
        assert result.returncode == 2 and expected in result.stderr, result.stderr
        assert len(result.stderr.splitlines()) == bool(expected) and not list(tmp_path.iterdir())


def leaves_with_groups_open(world: Any, folder: str) -> None:
    import torch
    import torch.distributed as dist

    kept = [dist.new_group(list(range(world.size))) for _ in range(2)]  # as DeepSpeed keeps its groups
    for _ in range(20):
        for group in kept:
            dist.all_reduce(torch.ones(1000), group=group)
    sys.stdout = (Path(folder) / str(world.rank)).open("w")
    sys.stdout.write("written")  # and not flushed
    end_process(75)


def test_a_rank_that_ends_with_groups_open_does_not_abort(tmp_path: Path) -> None:
    """With ``sys.exit`` instead, one of these processes in a few dies of SIGABRT in gloo's threads."""
    assert end_of_ranks(leaves_with_groups_open, 4, str(tmp_path)) == [75] * 4
    assert [(tmp_path / str(rank)).read_text() for rank in range(4)] == ["written"] * 4


# A stand-in for the package, as what run_processes starts: says that it runs, and that it was asked to stop.
RANK = """
import os, pathlib, signal, sys, time

def asked(number, frame):
    pathlib.Path("asked").touch()
    if "obeys" in sys.argv:
        sys.exit(75)

signal.signal(signal.SIGTERM, asked)
pathlib.Path("ready").touch()
time.sleep(120)
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "trace_ds").mkdir()
    (tmp_path / "trace_ds" / "__init__.py").touch()
    (tmp_path / "trace_ds" / "__main__.py").write_text(RANK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("rank", "signals", "status"),
    [
        ("obeys", [signal.SIGINT], 75),
        ("waits", [signal.SIGTERM, signal.SIGTERM], 143),
    ],
)
def test_the_first_signal_asks_and_the_same_again_ends(
    stand_in: Path, rank: str, signals: list[signal.Signals], status: int
) -> None:
    def send() -> None:
        for number, file in zip(signals, ("ready", "asked"), strict=False):
            while not (stand_in / file).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    assert run_processes([rank], 1, {}, [], 1) == status
    sender.join()
    assert (stand_in / "asked").exists()
