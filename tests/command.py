"""Running the real command line as a user does: its own process, its exit status, its messages."""

from __future__ import annotations

import contextlib
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


def run(
    command: Sequence[str],
    cwd: Path | None = None,
    timeout_s: float = 300.0,
    variables: dict[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """A command with the variables of :func:`environment`, or those given."""
    arguments = [str(item) for item in command]
    env = variables or environment()
    return subprocess.run(arguments, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)


def memory_of_tree(root: int) -> int:
    """Bytes of memory of a process and all its descendants now; a page that several share is counted once."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
    members = {root}
    while more := {pid for pid, parent in parents.items() if parent in members} - members:
        members |= more
    total_kb = 0
    for pid in members:
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total_kb += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total_kb * 1024


def tree(path: Path) -> dict[str, bytes]:
    """Every file below ``path`` with its content (to show that nothing was written)."""
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}
