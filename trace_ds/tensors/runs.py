"""Tensors as lists of byte ranges: everything a conversion does to a tensor before it is read.

A :class:`TensorSource` is a tensor in C order whose elements lie in *runs*: contiguous ranges of storages in files.
Joining the partitions of ranks, merging and splitting experts, and cutting fused projections only rearrange runs, so a
whole model is described in a few megabytes and any tensor of any layout can be streamed in small blocks.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trace_ds.tensors.torch_archive import LazyTensor, Storage

SAMPLES, SAMPLE_NUMEL = 16, 256  # blocks of a tensor that a sample has, and elements of a block


@dataclass(frozen=True)
class Run:
    """``numel`` elements of ``storage`` from element ``start`` on."""

    storage: Storage
    start: int
    numel: int

    @property
    def offset_bytes(self) -> int:
        """Where it begins in the file."""
        return self.storage.offset_bytes + self.start * self.storage.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """``numel`` elements that lie at ``inner`` in one tensor and at ``outer`` in another (C-order positions)."""

    inner: int
    outer: int
    numel: int


@dataclass(frozen=True)
class TensorSource:
    """A tensor of ``shape`` and ``dtype`` whose elements, in C order, are the runs one after the other."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @functools.cached_property
    def _ends(self) -> list[int]:
        """Position just after each run."""
        return list(itertools.accumulate(run.numel for run in self.runs))

    def slice_runs(self, start: int, numel: int) -> list[Run]:
        """The runs of elements ``start … start + numel``."""
        runs: list[Run] = []
        first = bisect.bisect_right(self._ends, start)
        for number in range(first, len(self.runs)):
            run = self.runs[number]
            position = self._ends[number] - run.numel
            low, high = max(start, position), min(start + numel, position + run.numel)
            if low >= high:
                break
            runs.append(Run(run.storage, run.start + low - position, high - low))
        return runs

    def load(self, dtype: torch.dtype) -> torch.Tensor:
        """The tensor in memory, cast."""
        elements, position = torch.empty(self.numel, dtype=dtype), 0
        for run in self.runs:
            elements[position : position + run.numel] = LazyTensor(run.storage, run.start, (run.numel,)).load()
            position += run.numel
        return elements.view(self.shape)

    def sample(self) -> torch.Tensor:
        """Its elements, or :data:`SAMPLES` evenly spaced blocks of a large one, read from the files."""
        runs: Iterable[Run] = self.runs
        if self.numel > SAMPLES * SAMPLE_NUMEL:
            starts = (index * (self.numel - SAMPLE_NUMEL) // (SAMPLES - 1) for index in range(SAMPLES))
            runs = [run for start in starts for run in self.slice_runs(start, SAMPLE_NUMEL)]
        read = [LazyTensor(run.storage, run.start, (run.numel,)).load() for run in runs]
        return torch.cat(read) if read else torch.empty(0, dtype=self.dtype)


def make_source(name: str, shape: Sequence[int], runs: Iterable[Run]) -> TensorSource:
    """A :class:`TensorSource`; ``ValueError`` if the runs do not hold exactly ``shape`` elements of one dtype."""
    kept = tuple(run for run in runs if run.numel)
    dtypes = {run.storage.dtype for run in kept}
    total = sum(run.numel for run in kept)
    if total != math.prod(shape) or len(dtypes) > 1:
        raise ValueError(f"{name} of shape {tuple(shape)} has {total} elements of {sorted(map(str, dtypes))}")
    return TensorSource(name, tuple(shape), dtypes.pop() if dtypes else torch.float32, kept)


def from_lazy(name: str, tensor: LazyTensor) -> TensorSource:
    return TensorSource(name, tensor.shape, tensor.dtype, (Run(tensor.storage, tensor.start, tensor.numel()),))


def extract(name: str, shape: Sequence[int], blocks: Sequence[Block], whole: TensorSource) -> TensorSource:
    """The tensor whose element ``inner`` is element ``outer`` of ``whole``, for every block."""
    runs: list[Run] = []
    for block in sorted(blocks, key=lambda block: block.inner):
        runs += whole.slice_runs(block.outer, block.numel)
    return make_source(name, shape, runs)


def assemble(name: str, shape: Sequence[int], parts: Iterable[tuple[TensorSource, Sequence[Block]]]) -> TensorSource:
    """The tensor whose element ``outer`` is element ``inner`` of a part; the parts must tile it exactly."""
    pieces = sorted(
        ((block.outer, block, part) for part, blocks in parts for block in blocks), key=lambda piece: piece[0]
    )
    position = 0
    runs: list[Run] = []
    for outer, block, part in pieces:
        if outer != position:
            raise ValueError(f"{name}: elements {position} to {outer} are missing or held twice")
        runs += part.slice_runs(block.inner, block.numel)
        position += block.numel
    return make_source(name, shape, runs)


def merge_adjacent(source: TensorSource) -> TensorSource:
    """The same tensor with runs joined where one continues the other on disk (fewer, larger reads)."""
    merged: list[Run] = []
    for run in source.runs:
        last = merged[-1] if merged else None
        if last and last.storage == run.storage and last.start + last.numel == run.start:
            merged[-1] = Run(run.storage, last.start, last.numel + run.numel)
        else:
            merged.append(run)
    return TensorSource(source.name, source.shape, source.dtype, tuple(merged))


def pieces_of(runs: Iterable[Run], block_numel: int) -> Iterator[list[Run]]:
    """Cut runs into groups of at most ``block_numel`` elements: what is read, cast and written at once."""
    group: list[Run] = []
    room = block_numel
    for run in runs:
        start, left = run.start, run.numel
        while left:
            take = min(left, room)
            group.append(Run(run.storage, start, take))
            start += take
            left -= take
            room -= take
            if not room:
                yield group
                group, room = [], block_numel
    if group:
        yield group
