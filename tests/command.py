"""Running the real command line as a user does: its own process, its exit status, its messages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def environment() -> dict[str, str]:
    """This environment without what a launcher or SLURM would have set, with the venv's programs first."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "OMPI_", "PMI")) and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    kept["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "COLUMNS": "160"}


def run(command: Sequence[str], cwd: Path | None = None, timeout_s: float = 300.0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(item) for item in command], cwd=cwd, env=environment(), capture_output=True, text=True, timeout=timeout_s
    )


def trace_ds(
    *arguments: str | Path, cwd: Path | None = None, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """``trace-ds ARGUMENTS``."""
    return run([sys.executable, "-m", "trace_ds", *map(str, arguments)], cwd, timeout_s)


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path`` with its content (to show that nothing was written)."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
