"""Per-token arrays beside a dataset: the routing trace and the frozen model's losses, in parts, memory-mapped.

A part ``NAME-00001-of-00004.npy`` holds the tokens of one rank's rows in flat order (rows in order, positions in
order); the parts follow each other, so together they are one array over all tokens of the dataset. The mean hidden
states (``hidden``, fp32 [rows, D]) are kept in the same way, with one line per row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from trace_ds.run.artefact import Artefact
from trace_ds.run.files import new_array, reserve


def part_name(name: str, part: int, parts: int) -> str:
    return f"{name}-{part:05d}-of-{parts:05d}.npy"


def create_part(
    directory: Path, name: str, part: int, parts: int, shape: Sequence[int], dtype: np.dtype, *, fresh: bool = True
) -> np.ndarray:
    """A new part as a writable memory map of zeros (a plain empty file when it has no token).

    With ``fresh=False`` the part that is there is opened for writing on; ``ValueError`` when it is another's.
    """
    path = directory / part_name(name, part, parts)
    if fresh or 0 in shape:
        return new_array(path, dtype, shape)
    reserve(path)
    found = np.lib.format.open_memmap(path, mode="r+")
    if found.shape != tuple(shape) or found.dtype != dtype:
        raise ValueError(f"{path} has shape {found.shape} and type {found.dtype}, not {tuple(shape)} and {dtype}")
    return found


def part_paths(artefact: Artefact, name: str) -> list[Path]:
    """The parts of ``name`` in order; empty when the artefact has none."""
    return [artefact.file(file) for file in sorted(artefact.files) if file.startswith(f"{name}-")]


def open_parts(artefact: Artefact, name: str) -> list[np.ndarray]:
    """The parts as read-only memory maps."""
    return [np.load(path, mmap_mode="r", allow_pickle=False) for path in part_paths(artefact, name)]


class TokenArray:
    """Random access by flat token range over the parts, as if they were one array."""

    def __init__(self, parts: list[np.ndarray]) -> None:
        if not parts:
            raise ValueError("no parts")
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def slice(self, begin: int, end: int) -> np.ndarray:
        """The values of tokens ``begin`` to ``end`` (a copy when they lie in two parts)."""
        found = []
        for part, part_end in zip(self._parts, self._ends, strict=True):
            start = int(part_end) - len(part)
            if start < end and begin < part_end:
                found.append(part[max(begin - start, 0) : end - start])
        return found[0] if len(found) == 1 else np.concatenate(found)

    def chunks(self, tokens: int) -> Iterator[np.ndarray]:
        """All values in order, at most ``tokens`` at a time, never across parts."""
        for part in self._parts:
            for begin in range(0, len(part), tokens):
                yield part[begin : begin + tokens]


def trace_dtype(experts: int) -> np.dtype:
    """The smallest unsigned type that holds an expert index."""
    return np.dtype(np.uint8 if experts <= 256 else np.uint16)
