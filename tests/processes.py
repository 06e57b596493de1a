"""Run a function in N real processes joined over gloo on this machine.

The processes are forked from a server that has imported torch, transformers, DeepSpeed and this package once: importing
is most of what a small job costs.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import runpy
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trace_ds
from trace_ds.parallel.environment import free_port

TIMEOUT_S = 240.0
PRELOADED = [
    "torch.distributed",
    "torch.utils.tensorboard",
    "pandas",  # pyarrow looks for it
    "transformers.models.mixtral.modeling_mixtral",  # and with it most of transformers
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "torch._dynamo.backends.debugging",  # DeepSpeed's optimizers decorate functions for it
    "datasets",
    "pytest",  # a function of a test module brings what that imports
    "hypothesis",
    *(module.name for module in pkgutil.walk_packages(trace_ds.__path__, "trace_ds.") if "__" not in module.name),
    "tests.warmed",  # found where the working directory is the repository
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def run_distributed(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """``function(world, *arguments)`` on every rank; the results in rank order. A failing rank fails the test."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    port = free_port()
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(function, rank, world_size, port, queue, arguments), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    silent: set[int] = set()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while len(results) < world_size:
            try:
                rank, ok, value = queue.get(timeout=1.0)
            except Exception:
                dead = [
                    rank
                    for rank, process in enumerate(processes)
                    if process.exitcode not in (None, 0) and rank not in silent
                ]
                if dead:
                    raise AssertionError(f"rank {dead[0]} died with {processes[dead[0]].exitcode}") from None
                assert time.monotonic() < deadline, f"no answer from ranks {set(range(world_size)) - set(results)}"
                continue
            if not ok and value.rstrip().endswith("AgreedError") and len(silent) + 1 < world_size:
                silent.add(rank)  # it left because of another, who says why
                continue
            if not ok:
                raise AssertionError(f"rank {rank} failed:\n{value}")
            results[rank] = value
        return [results[rank] for rank in range(world_size)]
    finally:
        for process in processes:
            process.join(5.0 if len(results) == world_size else 0.1)
            if process.is_alive():
                process.kill()
                process.join()


def end_of_ranks(function: Callable[..., Any], world_size: int, *arguments: Any, limit_s: float = 60.0) -> list[Any]:
    """Run ``function`` on every rank where ranks are expected to die; per rank the exit status (negative: the signal),
    or the text of the exception that ended it. Every rank must have ended within ``limit_s``."""
    port = free_port()
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_rank, args=(function, rank, world_size, port, queue, arguments, False), daemon=True)
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + limit_s
    ends: list[Any] = []
    for rank, process in enumerate(processes):
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            raise AssertionError(f"rank {rank} was still there after {limit_s} s")
        ends.append(process.exitcode)
    while not queue.empty():
        rank, _, text = queue.get()
        ends[rank] = text
    return ends


def output_of_main(place: str | Path, *words: object, limit_s: float) -> subprocess.CompletedProcess[str]:
    """``python PLACE WORDS`` in a fork of the server (a script, or a module by its dotted name): what it printed and
    how it ended; it is killed after ``limit_s``."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = CONTEXT.Process(target=_main, args=(str(place), list(map(str, words)), list(map(str, files))))
        process.start()
        process.join(limit_s)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired([str(place)], limit_s)
        printed = [file.read_text(encoding="utf-8") for file in files]
    return subprocess.CompletedProcess([str(place), *map(str, words)], process.exitcode or 0, *printed)


def _main(place: str, words: list[str], files: Sequence[str]) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [place, *words]
    if place.endswith(".py"):
        runpy.run_path(place, run_name="__main__")
    else:
        runpy.run_module(place, run_name="__main__", alter_sys=True)


def _rank(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    queue: Any,
    arguments: Any,
    answers: bool = True,
) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
        DS_ACCELERATOR="cpu",
    )
    try:
        from trace_ds.parallel.world import join, leave

        world = join(threads=1, timeout_minutes=3)
        value = function(world, *arguments)
        world.barrier()
        if answers:
            queue.put((rank, True, value))
        leave()
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
        queue.close()
        queue.join_thread()
        if not answers:
            os._exit(1)
