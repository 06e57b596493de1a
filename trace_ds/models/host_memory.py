"""Where glibc takes the memory of tensors from, and when it gives it back to the system; elsewhere nothing happens."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h
LARGE_BYTES, LARGEST_BYTES = 1 << 20, 1 << 25  # the second: the largest M_MMAP_THRESHOLD on 64 bits
NEVER = 2**31 - 1


def _set(option: int, value: int) -> None:
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        set_option(option, value)


def keep_freed_memory() -> None:
    """From now on what tensors of any size let go of stays with this process, for those of the next step.

    Without it those of more than 32 MB are the system's again each time, which fills them with zeros page by page when
    they are wanted again: of a run on a model of 135 M parameters that was a good part of the processor time.
    """
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, NEVER)


@contextlib.contextmanager
def large_tensors_apart() -> Iterator[None]:
    """Inside, tensors of a megabyte and more have memory of their own, which is the system's again when they go.

    After the first that goes, glibc would take those of up to 32 MB from its heap, and what is made between them would
    keep the heap as large as it was: half as much again as a rank's share of a model was held so. Afterwards they do
    come from the heap, and what a step lets go of stays there for the next: what is free at the heap's end beyond a
    threshold, 128 kB unless it is set, would return to the system, which fills it with zeros page by page when it is
    wanted again.
    """
    _set(M_MMAP_THRESHOLD, LARGE_BYTES)
    _set(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, LARGEST_BYTES)  # where it would have come to by itself
        _set(M_TRIM_THRESHOLD, NEVER)
