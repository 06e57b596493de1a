"""What the environment says about launchers and accelerators (no heavy imports: the launching parent uses it too)."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one rank of a job.

    Inside ``srun`` SLURM_STEP_NUM_TASKS is set; the batch script itself has SLURM_PROCID and SLURM_NTASKS too, so
    those do not count. MASTER_ADDR alone does not either.
    """
    return (
        ("RANK" in environment and "WORLD_SIZE" in environment)
        or "OMPI_COMM_WORLD_SIZE" in environment
        or "PMI_SIZE" in environment
        or "SLURM_STEP_NUM_TASKS" in environment
    )


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """What the launcher says of this process's rank and of the number of ranks; (0, 1) without one."""
    for rank, size in (
        ("RANK", "WORLD_SIZE"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
        ("PMI_RANK", "PMI_SIZE"),
        ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ):
        if rank in environment and size in environment:
            return int(environment[rank]), int(environment[size])
    return 0, 1


def local_rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """The same on this machine alone, as far as the launcher says; of machines with unequal numbers, the largest."""
    for rank, size in (
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # "4(x2),3": 4 on two machines, 3 on a third
    ):
        if rank in environment and size in environment:
            counts = [int(item.partition("(")[0]) for item in environment[size].split(",")]
            return int(environment[rank]), max(counts)
    return 0, 1


def accelerator_count(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    return len(accelerator_names(environment, devices))


def accelerator_names(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> list[str]:
    """Those GPUs as CUDA_VISIBLE_DEVICES names them: what is inherited there, else their numbers."""
    found = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(found)]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")][:found]


def free_port() -> int:
    """A TCP port nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
