"""Running the real command line as a user does: its own process, its exit status, its messages."""

from __future__ import annotations

import contextlib
import os
import signal
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


def trace_ds(
    *arguments: str | Path, cwd: Path | None = None, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """``trace-ds ARGUMENTS``."""
    return run([sys.executable, "-m", "trace_ds", *map(str, arguments)], cwd, timeout_s)


KILLER = """
import os, signal, sys

seen = 0

def hook(event, arguments):
    global seen
    if event not in ("open", "os.mkdir", "os.rename", "os.remove"):
        return
    if not any(os.environ["KILL_IN"] in str(argument) for argument in arguments[:2]):
        return
    seen += 1
    if seen == int(os.environ["KILL_AT"]):
        os.kill(os.getpgid(0), signal.SIGKILL)  # the command itself, whose process group it is
        signal.pause()  # in one of its children: they die with it

sys.addaudithook(hook)
"""


def killed(arguments: Sequence[str | Path], cwd: Path, place: str, event: int) -> None:
    """Run ``trace-ds ARGUMENTS`` until one of its processes touches a path with ``place`` in it for the ``event``-th
    time; the command is killed (SIGKILL) then and there. It must come to that, and leave no process behind."""
    hooks = cwd / "hooks"
    hooks.mkdir(exist_ok=True)
    (hooks / "sitecustomize.py").write_text(KILLER)
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join([str(hooks), variables.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "-m", "trace_ds", *map(str, arguments)],
        cwd=cwd,
        env=variables | {"KILL_IN": place, "KILL_AT": str(event)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = process.communicate(timeout=600)[0]  # ends when the last process that holds the pipe is gone
    assert process.returncode == -signal.SIGKILL, (place, process.returncode, output[-3000:])


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
