"""glibc allocator settings for large tensors on the host (no effect with other C libraries)."""

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
    """Keep freed memory of any size in this process, for the tensors of the next step.

    By default tensors over 32 MB are mmap-ed and returned to the OS when freed; the page faults of the next allocation
    were a good part of the CPU time of a step on a model of 135 M parameters.
    """
    _set(M_MMAP_MAX, 0)
    _set(M_TRIM_THRESHOLD, NEVER)


@contextlib.contextmanager
def large_tensors_apart() -> Iterator[None]:
    """Inside, tensors of 1 MB and more are mmap-ed, so freeing them returns memory to the OS; afterwards they are not.

    While a model is loaded, glibc would move its mmap threshold up to 32 MB after the first free; small objects
    between large freed tensors then keep the heap fragmented (half a rank's share of the model was lost this way).
    After loading, the heap serves large tensors too and is not trimmed, so that steps cause no page faults.
    """
    _set(M_MMAP_THRESHOLD, LARGE_BYTES)
    _set(M_TRIM_THRESHOLD, 2 * LARGE_BYTES)
    try:
        yield
    finally:
        _set(M_MMAP_THRESHOLD, LARGEST_BYTES)  # the value that glibc would have reached by itself
        _set(M_TRIM_THRESHOLD, NEVER)
