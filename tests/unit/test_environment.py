"""What a launcher leaves out is told from the machine, or refused; never taken for a job of one process."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from trace_ds.errors import UserError
from trace_ds.parallel.environment import (
    available_memory_bytes,
    complete_launch,
    local_rank_and_size,
    rank_and_size,
)

JOB = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
TORCHRUN = JOB | {"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4"}
SRUN = JOB | {"LOCAL_RANK": "3", "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4"}


@pytest.mark.parametrize(
    ("environment", "sees", "has", "local_rank"),
    [
        (TORCHRUN, 4, 4, "3"),  # each process sees all devices
        (TORCHRUN, 0, 0, "3"),  # no device
        (TORCHRUN, 1, 4, "0"),  # each sees one of its own
        (SRUN, 1, 8, "0"),  # --gpus-per-task=1
        (SRUN | {"SLURM_GPUS_PER_TASK": "1"}, 1, 1, "0"),  # in a container that has no other device
        (SRUN, 1, 1, "3"),  # four processes on the one device of a machine: refused where they join
        (JOB, 1, 4, "0"),
        (JOB, 0, 0, "0"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, 8, 8, "0"),
        ({}, 8, 8, None),
    ],
)
def test_the_device_of_a_process(environment: dict[str, str], sees: int, has: int, local_rank: str | None) -> None:
    result = dict(environment)
    complete_launch(result, sees, has)
    assert result.get("LOCAL_RANK") == local_rank
    assert bool(result) == ("MASTER_ADDR" in result) == ("MASTER_PORT" in result)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JOB, "LOCAL_RANK is not, and 8 devices are visible"),
        (TORCHRUN | {"RANK": "4"}, "RANK='4' is no rank of WORLD_SIZE='4'"),
        (TORCHRUN | {"RANK": "-1"}, "RANK='-1' is no rank"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is no rank"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "no rank of WORLD_SIZE=''"),
        (TORCHRUN | {"LOCAL_RANK": "x"}, "LOCAL_RANK='x' is no local rank"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK='4' is no rank of LOCAL_WORLD_SIZE='4'"),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR is not"),
    ],
)
def test_what_cannot_be_told_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match="the environment: ") as error:
        complete_launch(dict(environment), 8, 8)
    assert message in error.value.line()


def test_ranks_as_each_launcher_says_them() -> None:
    assert rank_and_size({"PMI_RANK": "1", "PMI_SIZE": "2"}) == (1, 2)
    assert rank_and_size({}) == (0, 1)
    uneven = {"SLURM_LOCALID": "8", "SLURM_STEP_TASKS_PER_NODE": "9(x2),10"}
    assert local_rank_and_size(uneven) == (8, 10)
    with pytest.raises(UserError, match="SLURM_PROCID='x' is no rank of SLURM_STEP_NUM_TASKS='2'"):
        rank_and_size({"SLURM_PROCID": "x", "SLURM_STEP_NUM_TASKS": "2"})


def test_the_memory_of_a_job_is_that_of_its_control_groups(tmp_path: Path) -> None:
    """The tightest of the groups above the process; what caches files there is free."""

    def group(folder: Path, maximum: str, current: int, *cached: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{maximum}\n")
        (folder / "memory.current").write_text(f"{current}\n")
        (folder / "memory.stat").write_text("anon 7\nfile 99\ninactive_file {}\nactive_file {}\n".format(*cached))

    own = tmp_path / "cgroup"
    own.write_text("0::/job/step\n")
    assert available_memory_bytes(tmp_path / "none", own) == pytest.approx(psutil.virtual_memory().available, rel=0.2)
    group(tmp_path / "job", "1000000", 900_000, 300_000, 50_000)
    group(tmp_path / "job" / "step", "max", 800_000, 0, 0)
    assert available_memory_bytes(tmp_path, own) == 450_000
    group(tmp_path / "job" / "step", "810000", 800_000, 100, 20)
    assert available_memory_bytes(tmp_path, own) == 10_120
    assert available_memory_bytes(tmp_path, tmp_path / "missing") > 10_120
