"""Starting local processes for a distributed verb when no launcher did: ``trace-ds collect CONFIG --nproc 2``.

The children die with the parent (Linux parent-death signal), share its lock on the run directory, and SIGTERM or
SIGINT (Ctrl-C) to the parent asks them all to stop, as SIGTERM; the same signal again ends them at once. Their exit
status is the parent's.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from types import FrameType

from trace_ds.errors import EXIT_STOPPED, EXIT_USER_ERROR, StopRequested, UserError
from trace_ds.parallel.environment import free_port

CORES_OVERSUBSCRIPTION = 4
PEERS_GRACE_S = 30.0
PR_SET_PDEATHSIG = 1


def check_process_count(nproc: int, accelerators: int, cores: int, key: str = "distributed.nproc") -> None:
    """Refuse more local processes, which ``key`` asks for, than the machine can hold.

    On a machine with accelerators each process needs its own; on a CPU-only one, more than
    ``CORES_OVERSUBSCRIPTION`` processes per core is taken for a mistake.
    """
    limit = accelerators or CORES_OVERSUBSCRIPTION * cores
    if nproc <= limit:
        return
    has = f"{accelerators} accelerators" if accelerators else f"no accelerator and {cores} CPU cores"
    more = ", or use more nodes" if accelerators else ""
    raise UserError(f"{nproc} processes on this machine, which has {has}", key, f"set {key} to {limit} at most{more}")


def run_processes(
    arguments: Sequence[str], nproc: int, environment: dict[str, str], pass_fds: Sequence[int], threads: int
) -> int:
    """Run ``python -m trace_ds ARGUMENTS`` as ``nproc`` ranks of one job and wait; returns the exit status.

    When a rank fails, the others get :data:`PEERS_GRACE_S` to notice before they are killed.

    Raises:
        StopRequested: a signal asked for it, and no rank said anything else than that it stopped, or had finished.
    """
    port = str(free_port())
    children: list[subprocess.Popen[bytes]] = []
    signals: list[int] = []  # signals received, also before there is a child to tell

    def forward(number: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGKILL if number in signals else signal.SIGTERM)
        signals.append(number)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(nproc):
            if signals:  # nothing can have been saved yet: those that are there already have been told
                break
            variables = {
                **os.environ,
                **environment,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(nproc),
                "LOCAL_WORLD_SIZE": str(nproc),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "OMP_NUM_THREADS": str(threads),
            }
            children.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trace_ds", *arguments],
                    env=variables,
                    pass_fds=pass_fds,
                    preexec_fn=_begin_rank,
                )
            )
            if signals:  # while it was started
                children[-1].send_signal(signal.SIGTERM)
        status = _wait(children)
        if len(set(signals)) < len(signals):
            return 128 + signals[-1]
        ends = {child.returncode for child in children}
        if signals and (ends <= {0} or -signal.SIGTERM in ends):  # before, or just when, there was nothing to save
            raise StopRequested("stopped on request; run again to go on")
        return status
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()
        for number, handler in previous.items():
            signal.signal(number, handler)


def _wait(children: list[subprocess.Popen[bytes]]) -> int:
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.poll() not in (None, 0) for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PEERS_GRACE_S:
            for child in children:
                child.kill()
        time.sleep(0.05)
    statuses = [child.returncode for child in children]
    for status in (EXIT_USER_ERROR, EXIT_STOPPED):
        if status in statuses:
            return status
    failed = [status for status in statuses if status != 0]
    return 0 if not failed else (failed[0] if failed[0] > 0 else 128 - failed[0])


def _begin_rank() -> None:
    """In a rank, before exec: Ctrl-C in a terminal reaches all processes of a job, but it is the parent that asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()


def die_with_parent(parent: BaseProcess | None = None) -> None:
    """In the child, before exec: be killed when the parent dies, so that nothing outlives a killed job.

    ``parent``: the process that a child of multiprocessing comes from; if it died while the child was still importing,
    the child ends too.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if parent is not None and parent.pid != os.getppid():
            os.kill(os.getpid(), signal.SIGKILL)
