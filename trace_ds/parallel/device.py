"""Tensors between the host and the device of a process, without the host waiting for the device."""

from __future__ import annotations

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
