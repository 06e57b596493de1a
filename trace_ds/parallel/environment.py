"""Launchers and accelerators, read from the environment (no heavy imports: the launching parent uses it too)."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from trace_ds.errors import UserError

LAUNCHERS = (  # the variables in which each says a process's rank, and of how many
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)


def launched(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a launcher started this process as one rank of a job.

    Inside ``srun`` SLURM_STEP_NUM_TASKS is set; the batch script itself has SLURM_PROCID and SLURM_NTASKS too, so
    those do not count. MASTER_ADDR alone does not either.
    """
    of_their_own = any(size in environment for _, size in LAUNCHERS[1:])
    return of_their_own or ("RANK" in environment and "WORLD_SIZE" in environment)


def rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(this process's rank, number of ranks), from the launcher's variables; (0, 1) without a launcher.

    Raises:
        UserError: that is no number, or the rank is none of so many.
    """
    for rank, size in LAUNCHERS:
        if size in environment and (rank in environment or size != "WORLD_SIZE"):
            return _place(rank, environment.get(rank, ""), size, environment[size])
    return 0, 1


def local_rank_and_size(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank on this machine, ranks on it), as far as the launcher says; of unequal machines, the largest."""
    for rank, size in (
        ("LOCAL_RANK", "LOCAL_WORLD_SIZE"),
        ("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),  # "4(x2),3": 4 on two machines, 3 on a third
    ):
        if rank in environment and size in environment:
            counts = [item.partition("(")[0] for item in environment[size].split(",")]
            return _place(rank, environment[rank], size, max(counts, key=lambda count: (len(count), count)))
    return 0, 1


def _place(rank_name: str, rank: str, size_name: str, size: str) -> tuple[int, int]:
    if not (rank.isascii() and rank.isdigit() and size.isascii() and size.isdigit() and int(rank) < int(size) < 10**9):
        problem = f"{rank_name}={rank[:40]!r} is no rank of {size_name}={size[:40]!r}"
        raise UserError(problem, "the environment", "start through torchrun, deepspeed, srun or mpirun, or unset both")
    return int(rank), int(size)


def complete_launch(environment: MutableMapping[str, str], accelerators: int) -> None:
    """Set LOCAL_RANK (this process's device) where the process sees one of ``accelerators`` or none.

    A process that sees one device of several (``srun --gpus-per-task=1``) uses that one, whatever its number on the
    machine.

    Raises:
        UserError: RANK and WORLD_SIZE are set, and LOCAL_RANK, MASTER_ADDR or MASTER_PORT is missing. DeepSpeed would
            take such an environment for that of MPI, and go on alone.
    """
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return
    rank_and_size(environment)
    if accelerators == 1:
        environment["LOCAL_RANK"] = "0"
    elif not accelerators:
        environment.setdefault("LOCAL_RANK", "0")
    missing = [name for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]
    if missing:
        fix = "start through torchrun, deepspeed, srun or mpirun, or export what is missing (as slurm/common.sh does)"
        raise UserError(f"RANK and WORLD_SIZE are set, {' and '.join(missing)} not", "the environment", fix)


def accelerator_count(devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    count = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, sum(name.strip() not in ("", "-1") for name in visible.split(",")))


def available_memory_bytes(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Memory this process may still take: the system's, or what its control groups leave it if that is less.

    Pages of files, which go when memory is asked for, count as free.
    """
    import psutil

    limits = [psutil.virtual_memory().available]
    with contextlib.suppress(OSError):
        group = groups / own.read_text(encoding="ascii").rpartition("0::/")[2].strip()
        for folder in [group, *group.parents]:
            with contextlib.suppress(OSError, ValueError):  # no group, or a limit of "max", which is none
                maximum, used = (int((folder / f"memory.{n}").read_text(encoding="ascii")) for n in ("max", "current"))
                cached = re.findall(r"^(?:in)?active_file (\d+)$", (folder / "memory.stat").read_text(), re.MULTILINE)
                limits.append(maximum - used + sum(map(int, cached)))
    return float(min(limits))


def free_port() -> int:
    """A TCP port nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
