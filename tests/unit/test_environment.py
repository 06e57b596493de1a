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


@pytest.mark.parametrize(
    ("environment", "sees", "local_rank"),
    [
        (TORCHRUN, 4, "3"),  # each process sees all devices
        (TORCHRUN, 0, "3"),  # no device
        (TORCHRUN, 1, "0"),  # each sees one of its own: srun --gpus-per-task=1
        (JOB, 1, "0"),
        (JOB, 0, "0"),
        ({}, 8, None),
    ],
)
def test_the_device_of_a_process(environment: dict[str, str], sees: int, local_rank: str | None) -> None:
    result = dict(environment)
    complete_launch(result, sees)
    assert result.get("LOCAL_RANK") == local_rank


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (JOB, "RANK and WORLD_SIZE are set, LOCAL_RANK not"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK and MASTER_ADDR and MASTER_PORT not"),
        (TORCHRUN | {"RANK": "4"}, "RANK='4' is no rank of WORLD_SIZE='4'"),
        (TORCHRUN | {"RANK": "one"}, "RANK='one' is no rank"),
        (TORCHRUN | {"WORLD_SIZE": ""}, "no rank of WORLD_SIZE=''"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "SLURM_PROCID='' is no rank of SLURM_STEP_NUM_TASKS='2'"),
    ],
)
def test_what_cannot_be_told_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match="the environment: ") as error:
        rank_and_size(environment)
        complete_launch(dict(environment), 8)
    assert message in error.value.line()


def test_ranks_as_each_launcher_says_them() -> None:
    assert rank_and_size({"PMI_RANK": "1", "PMI_SIZE": "2"}) == (1, 2)
    assert rank_and_size({}) == (0, 1)
    uneven = {"SLURM_LOCALID": "8", "SLURM_STEP_TASKS_PER_NODE": "9(x2),10"}
    assert local_rank_and_size(uneven) == (8, 10)


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
