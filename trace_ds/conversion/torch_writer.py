"""Write ``torch.save`` files whose tensors are streamed in later, by any thread, in any order.

``torch.save`` needs every tensor in memory. Here the pickle is made from placeholders, the places of the raw records
follow from shapes and types, the records are filled by :class:`~trace_ds.conversion.stream.Streamer`, and the zip
directory with the checksums is written at the end. ``torch.load`` (with ``weights_only=True``) reads the result.
"""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.conversion.runs import TensorSource
from trace_ds.conversion.stream import Task, Written, naming_full_disk, run_tasks

ALIGNMENT_BYTES = 64
ZIP64_LIMIT = 0xFFFFFFFF
STORAGE_CLASSES = {
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True, eq=False)
class Streamed:
    """A tensor in the object to be saved: its bytes come from ``source``, cast to ``dtype``."""

    source: TensorSource
    dtype: torch.dtype
    shape: tuple[int, ...]


class _StorageKey:
    def __init__(self, number: int, tensor: Streamed) -> None:
        self.pid = ("storage", STORAGE_CLASSES[tensor.dtype], str(number), "cpu", tensor.source.numel)


class _Pickler(pickle.Pickler):
    """Protocol 2, as ``torch.save`` writes it; collects the tensors in the order of their records."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, protocol=2)
        self.tensors: list[Streamed] = []

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Streamed):
            return NotImplemented
        key = _StorageKey(len(self.tensors), obj)
        self.tensors.append(obj)
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (key, 0, obj.shape, stride, False, OrderedDict())

    def persistent_id(self, obj: Any) -> Any:
        return obj.pid if isinstance(obj, _StorageKey) else None


@dataclass
class _Record:
    name: str
    nbytes: int
    crc32: int
    header_offset: int = 0
    data_offset: int = 0


class StreamedArchive:
    """One file: :meth:`tasks` fill it, :meth:`finish` completes it with what became of them."""

    def __init__(self, path: Path, obj: Any) -> None:
        self.path = path
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(obj)
        self._tensors = pickler.tensors
        root = path.stem
        small = {"data.pkl": stream.getvalue(), "byteorder": b"little", "version": b"3\n"}
        self._records = [_Record(f"{root}/{name}", len(data), zlib.crc32(data)) for name, data in small.items()]
        for number, tensor in enumerate(self._tensors):
            nbytes = tensor.source.numel * tensor.dtype.itemsize
            self._records.append(_Record(f"{root}/data/{number}", nbytes, 0))
        self._data = list(small.values())
        position = 0
        for record in self._records:
            record.header_offset = position
            head = 30 + len(record.name) + (20 if record.nbytes >= ZIP64_LIMIT else 0)
            record.data_offset = -(-(position + head + 4) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            position = record.data_offset + record.nbytes
        self._end = position
        path.parent.mkdir(parents=True, exist_ok=True)
        with naming_full_disk(path), path.open("wb") as handle:
            for record, data in zip(self._records, self._data, strict=False):
                handle.seek(record.data_offset)
                handle.write(data)
            handle.truncate(self._end)

    @property
    def names(self) -> list[str]:
        return [tensor.source.name for tensor in self._tensors]

    def tasks(self) -> list[Task]:
        offsets = [record.data_offset for record in self._records[len(self._data) :]]
        return [
            Task(tensor.source, tensor.dtype, self.path, offset, want_crc32=True)
            for tensor, offset in zip(self._tensors, offsets, strict=True)
        ]

    def finish(self, written: Sequence[Written]) -> None:
        """Write the headers and the zip directory; ``written`` are the results of :meth:`tasks`, in order."""
        for record, result in zip(self._records[len(self._data) :], written, strict=True):
            record.crc32 = result.crc32
        with naming_full_disk(self.path), self.path.open("r+b") as handle:
            directory = b""
            for record in self._records:
                handle.seek(record.header_offset)
                handle.write(_local_header(record))
                directory += _central_header(record)
            handle.seek(self._end)
            handle.write(directory + _end_of_directory(len(self._records), len(directory), self._end))


def _sizes(record: _Record, *extra: int) -> tuple[int, bytes]:
    """(the 32-bit size field, the zip64 extra field) of a record; ``extra`` are further 64-bit values."""
    if record.nbytes < ZIP64_LIMIT and not extra:
        return record.nbytes, b""
    values = ((record.nbytes, record.nbytes) if record.nbytes >= ZIP64_LIMIT else ()) + extra
    size = ZIP64_LIMIT if record.nbytes >= ZIP64_LIMIT else record.nbytes
    return size, struct.pack("<HH", 1, 8 * len(values)) + struct.pack(f"<{len(values)}Q", *values)


def _local_header(record: _Record) -> bytes:
    size, extra = _sizes(record)
    name = record.name.encode()
    padding = record.data_offset - record.header_offset - 30 - len(name) - len(extra) - 4
    extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    version = 45 if size == ZIP64_LIMIT else 20
    # No date: zip's epoch, 1 January 1980.
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", version, 0, 0, 0, 33, record.crc32, size, size, len(name),
                       len(extra)) + name + extra  # fmt: skip


def _central_header(record: _Record) -> bytes:
    far = record.header_offset >= ZIP64_LIMIT
    size, extra = _sizes(record, *((record.header_offset,) if far else ()))
    offset = ZIP64_LIMIT if far else record.header_offset
    name = record.name.encode()
    version = 45 if extra else 20
    return struct.pack("<4s6H3L5H2L", b"PK\x01\x02", version, version, 0, 0, 0, 33, record.crc32, size, size,
                       len(name), len(extra), 0, 0, 0, 0, offset) + name + extra  # fmt: skip


def _end_of_directory(count: int, nbytes: int, offset: int) -> bytes:
    tail = b""
    if count >= 0xFFFF or offset >= ZIP64_LIMIT:
        tail = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, nbytes, offset)
        tail += struct.pack("<4sLQL", b"PK\x06\x07", 0, offset + nbytes, 1)
    count = min(count, 0xFFFF)
    return tail + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, min(nbytes, ZIP64_LIMIT),
                              min(offset, ZIP64_LIMIT), 0)  # fmt: skip


def stream_archives(
    archives: Sequence[StreamedArchive], directory: Path, jobs: int, progress: Any
) -> list[tuple[Task, Written]]:
    """Fill and finish all archives; every task with its result, in order."""
    tasks = [archive.tasks() for archive in archives]
    written = iter(run_tasks([task for group in tasks for task in group], directory, jobs, progress))
    results: list[tuple[Task, Written]] = []
    for archive, group in zip(archives, tasks, strict=True):
        held = [next(written) for _ in group]
        archive.finish(held)
        results += zip(group, held, strict=True)
    return results
