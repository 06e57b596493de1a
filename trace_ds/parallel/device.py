"""Tensors between the host and the device of a process, without the host waiting for the device."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from typing import Any

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of ``tensor`` (on the host) on ``device`` that nobody waits for; the tensor itself where that is the CPU.

    The copy is made from page-locked memory: out of any other a driver copies twice, and the host waits.
    """
    return tensor if device.type == "cpu" else tensor.contiguous().pin_memory().to(device, non_blocking=True)


def event_now(device: torch.device) -> Any:
    """An event that has come when all that was asked of ``device`` so far is done (on the CPU: at once).

    What ``to("cpu", non_blocking=True)`` gave may be read after ``event.synchronize()``, and not before, whatever else
    has waited for the device meanwhile.
    """
    event = torch.get_device_module(device).Event()
    event.record()
    return event


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory this process has held: allocated on its GPU, or resident in host memory where it has none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


@contextlib.contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Inside, where ``on``, the same work on a GPU gives the same bits each time (on the CPU it always does).

    Sums by atomic additions (the backward passes of attention and of look-ups, among others) get a fixed order, and an
    operation that has none raises a RuntimeError that names it. Memory that is allocated is not filled first: nothing
    of ours reads it unwritten. To be entered before the process multiplies matrices on its GPU: cuBLAS reads its
    variable then, once.
    """
    if not on:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: list[tuple[Any, str, bool]] = [
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ]
    before = [getattr(place, name) for place, name, _ in settings]
    for place, name, value in settings:
        setattr(place, name, value)
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        for (place, name, _), value in zip(settings, before, strict=True):
            setattr(place, name, value)
