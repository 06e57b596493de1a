"""Arrays in files, mapped into memory, of which no more stays in the process than a few dozen megabytes.

The kernel counts every page of a mapped file that was looked at as the process's own until it needs the room, so a pass
over a file of 20 GB would end with 20 GB resident, and a job under a memory limit may be killed for it.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np

RESIDENT_BYTES = 1 << 25
FAULT_BYTES = 1 << 16  # the kernel maps this much around the page that is looked at


class Mapped(np.memmap):
    """A memory map that lets go of its pages each time :data:`RESIDENT_BYTES` of it were read or written in slices.

    What it lets go of stays in the page cache, written pages too (the map is shared): looked at again it costs a page
    fault, and no other result. Slices are plain arrays, and stay valid. Its views (of another type, or a part of it)
    that are themselves ``Mapped`` count together with it.
    """

    _mmap: mmap.mmap | None  # of np.memmap; None in an array that is not in a file

    def __array_finalize__(self, origin: Any) -> None:
        super().__array_finalize__(origin)
        self._handed_out: list[int] = getattr(origin, "_handed_out", [0])  # bytes since the last time

    def __array_wrap__(self, array: Any, *context: Any) -> Any:
        return array if array is self else np.asarray(array)[()]  # results in memory are plain arrays and numbers

    def __getitem__(self, index: Any) -> Any:
        found = super().__getitem__(index)
        self._let_go(found.nbytes)
        return found.view(np.ndarray) if isinstance(found, np.ndarray) else found

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(index, value)
        self._let_go(super().__getitem__(index).nbytes if isinstance(index, slice) else self.itemsize * np.size(value))

    def part(self, start: int, stop: int) -> Mapped:
        """``self[start:stop]``, not as a plain array."""
        return super().__getitem__(slice(start, stop)).view(Mapped)

    def _let_go(self, size_bytes: int) -> None:
        # Threads that count at the same time may lose a slice: the bound is one of order, not of bytes.
        self._handed_out[0] += size_bytes + FAULT_BYTES
        if self._handed_out[0] >= RESIDENT_BYTES and self._mmap is not None:
            self._handed_out[0] = 0
            self._mmap.madvise(mmap.MADV_DONTNEED)


def open_mapped(path: Path) -> Mapped:
    """An .npy file, read only.

    Raises:
        ValueError: it is none, or holds pickled objects. OSError, EOFError: it cannot be read.
    """
    return np.load(path, mmap_mode="r", allow_pickle=False).view(Mapped)


def open_bytes(path: Path) -> Mapped:
    """The bytes of a file, read only.

    Raises:
        ValueError: it is empty. OSError: it cannot be read.
    """
    return np.memmap(path, np.uint8, "r").view(Mapped)
