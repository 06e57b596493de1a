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


def accelerator_count(environment: Mapping[str, str] = os.environ, devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs this process may use, without importing torch."""
    found = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return min(found, len([name for name in visible.split(",") if name.strip() not in ("", "-1")]))
    return found


def free_port() -> int:
    """A TCP port nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
