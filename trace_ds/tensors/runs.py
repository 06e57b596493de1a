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
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.torch_archive import COPY_AGAIN, LazyTensor, Storage

try:
    from isal.isal_zlib import crc32
except ImportError:  # tools/convert_checkpoint.py does without: the same sum in ten times the time
    from zlib import crc32


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
        found: list[Run] = []
        first = bisect.bisect_right(self._ends, start)
        for number in range(first, len(self.runs)):
            run = self.runs[number]
            position = self._ends[number] - run.numel
            low, high = max(start, position), min(start + numel, position + run.numel)
            if low >= high:
                break
            found.append(Run(run.storage, run.start + low - position, high - low))
        return found

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


# CRC-32 of a concatenation from the CRCs of its parts, as zlib's crc32_combine, which Python does not offer. A CRC is a
# polynomial over GF(2) modulo this one, and n zero bytes behind a part multiply its CRC by x**(8 n); in the reversed
# order of bits the highest bit is x**0.
_CRC_POLYNOMIAL = 0xEDB88320


def _multiply(one: int, other: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        product ^= other if one >> bit & 1 else 0
        other = other >> 1 ^ (_CRC_POLYNOMIAL if other & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _power(exponent: int) -> int:
    """x**exponent."""
    if exponent < 32:
        return 1 << 31 - exponent
    half = _power(exponent // 2)
    return _multiply(_multiply(half, half), _power(exponent % 2))


def crc32_combine(first: int, second: int, second_nbytes: int) -> int:
    """CRC-32 of ``a + b`` from ``crc32(a)``, ``crc32(b)`` and ``len(b)``."""
    return _multiply(_power(8 * second_nbytes), first) ^ second


class ChecksumLedger:
    """Proves that what was read is what was written, although it is read in pieces and in any order.

    Every piece that is read reports its CRC-32; at the end the pieces of each storage are combined (padding that no
    tensor needs is read for it) and compared with the checksum in the archive. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._pieces: dict[Storage, dict[int, tuple[int, int]]] = {}
        self._lock = threading.Lock()

    def add(self, storage: Storage, start_bytes: int, data: memoryview) -> None:
        """Report that bytes ``start_bytes …`` of ``storage`` were read and are ``data``."""
        if storage.crc32 is None:
            return
        checksum = crc32(data)
        with self._lock:
            self._pieces.setdefault(storage, {})[start_bytes] = (len(data), checksum)

    def check(self) -> None:
        """Compare every storage that was read with its checksum; ``UserError`` names the file and the record."""
        for storage, pieces in self._pieces.items():
            if _combined(storage, pieces) != storage.crc32:
                raise UserError(
                    f"{storage.record} in this file was altered after it was written (CRC-32 differs)",
                    str(storage.path),
                    COPY_AGAIN,
                )


def _combined(storage: Storage, pieces: dict[int, tuple[int, int]]) -> int:
    combined = position = 0
    with storage.path.open("rb") as handle:
        for start, (nbytes, checksum) in [*sorted(pieces.items()), (storage.nbytes, (0, 0))]:
            if start < position:  # a part was read twice, once as a part of something longer
                return _crc_of_range(handle, storage, 0, storage.nbytes)
            gap = start - position
            combined = crc32_combine(combined, _crc_of_range(handle, storage, position, gap), gap)
            combined = crc32_combine(combined, checksum, nbytes)
            position = start + nbytes
    return combined


def _crc_of_range(handle: BinaryIO, storage: Storage, start: int, nbytes: int) -> int:
    handle.seek(storage.offset_bytes + start)
    checksum = 0
    while nbytes:
        data = handle.read(min(nbytes, 1 << 22))
        if not data:
            break
        checksum = crc32(data, checksum)
        nbytes -= len(data)
    return checksum


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
