"""Move tensors from source files to a place in a destination file, block by block.

One block is :data:`BLOCK_NUMEL` elements: it is read, checked, cast, hashed and written while it is in the processor's
cache, so memory is a few megabytes for each job however large a tensor, a shard or the model is.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.dtypes import DTYPE_NAMES
from trace_ds.tensors.runs import ChecksumLedger, Run, TensorSource, merge_adjacent, pieces_of
from trace_ds.tensors.torch_archive import COPY_AGAIN, bytes_of

BLOCK_NUMEL = 1 << 17  # read and cast, a block lies in the second-level cache of a core
FLUSH_BYTES = 1 << 27
TOGETHER_BYTES = 1 << 20
KEPT_OPEN = 64  # files beside those in use; a target may have one for every expert, and a process 1024
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CopyTask:
    """Write ``source`` cast to ``dtype`` into ``path`` from byte ``offset_bytes`` on (``path`` None: only read)."""

    source: TensorSource
    dtype: torch.dtype
    path: Path | None = None
    offset_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.source.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What became of a task.

    Attributes:
        sha256: of the bytes that were written.
        nan: the source holds NaN.
        overflow: finite elements became infinite in the cast.
    """

    sha256: str
    nan: bool
    overflow: bool


class OpenFile:
    """A file that is closed when nobody uses it any more; threads share it (positioned reads and writes only)."""

    def __init__(self, path: Path, flags: int) -> None:
        self.descriptor = -1
        self.descriptor = os.open(path, flags, 0o644)

    def __del__(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


@contextlib.contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn "no space left" (and quota and file-size limits) into a :class:`UserError` that names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UserError(
                f"the destination cannot hold the result ({error.strerror})",
                str(error.filename or path),
                "free space there, or choose another destination",
            ) from None
        raise


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def read_all(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    while buffer:
        done = os.preadv(descriptor, [buffer], offset)
        if not done:
            raise UserError("the file ends inside a tensor (truncated?)", str(path), COPY_AGAIN)
        buffer, offset = buffer[done:], offset + done


class Streamer:
    """Runs tasks on ``jobs`` threads; reading, casting, hashing and writing all release Python's lock."""

    def __init__(self, jobs: int, progress: Progress | None = None, total_bytes: int = 0) -> None:
        self.ledger = ChecksumLedger()
        self._jobs = jobs
        self._file = functools.lru_cache(KEPT_OPEN)(OpenFile)
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._stopped = threading.Event()
        self._flusher = ThreadPoolExecutor(1)
        self._flushes: list[Future[None]] = []
        self._unflushed_bytes = 0

    def run(self, tasks: Sequence[CopyTask]) -> list[Written]:
        """Carry out the tasks; results in their order. The first error stops the others and is raised."""
        try:
            written = self._run(tasks)
            for flush in self._flushes:
                flush.result()  # a failed write shows here, and only once
            return written
        finally:
            self._flusher.shutdown(cancel_futures=True)
            self._file.cache_clear()

    def _run(self, tasks: Sequence[CopyTask]) -> list[Written]:
        if self._jobs == 1:
            return [self._do(task) for task in tasks]
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [pool.submit(self._do_all, some) for some in together(tasks)]
            try:
                return [written for future in futures for written in future.result()]
            except BaseException:
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    def _buffer(self, use: str, dtype: torch.dtype) -> torch.Tensor:
        """This thread's own."""
        buffers = self._buffers.__dict__.setdefault("held", {})
        if (use, dtype) not in buffers:
            buffers[use, dtype] = torch.empty(BLOCK_NUMEL, dtype=dtype)
        return buffers[use, dtype]

    def _do_all(self, tasks: Sequence[CopyTask]) -> list[Written]:
        return [self._do(task) for task in tasks]

    def _do(self, task: CopyTask) -> Written:
        if task.path is None:
            return self._stream(task, None)
        with naming_full_disk(task.path):
            return self._stream(task, self._file(task.path, os.O_RDWR | os.O_CREAT))

    def _stream(self, task: CopyTask, out: OpenFile | None) -> Written:
        source = merge_adjacent(task.source)
        staging, result = self._buffer("read", source.dtype), self._buffer("cast", task.dtype)
        digest = hashlib.sha256()
        position, nan, overflow = task.offset_bytes, False, False
        for piece in pieces_of(source.runs, BLOCK_NUMEL):
            if self._stopped.is_set():
                break
            block = self._read(piece, staging)
            cast = block if source.dtype == task.dtype else result[: len(block)].copy_(block)
            if cast.dtype.is_floating_point and not nan:
                nan, overflow = _not_finite(block, cast, overflow)
            data = bytes_of(cast)
            digest.update(data)
            if out is not None:
                write_all(out.descriptor, data, position)
            position += len(data)
            self._advance(len(data), task.path)
        return Written(digest.hexdigest(), nan, overflow)

    def _read(self, piece: list[Run], staging: torch.Tensor) -> torch.Tensor:
        """The elements of the runs, one after the other, at the beginning of ``staging``."""
        filled = 0
        for run in piece:
            view = bytes_of(staging[filled : filled + run.numel])
            file = self._file(run.storage.path, os.O_RDONLY)
            read_all(file.descriptor, view, run.offset_bytes, run.storage.path)
            self.ledger.add(run.storage, run.offset_bytes - run.storage.offset_bytes, view)
            filled += run.numel
        return staging[:filled]

    def _advance(self, nbytes: int, path: Path | None) -> None:
        """Count the bytes. Every so often the file goes to the disk in the background, so that the final fsync, which
        alone counts for safety, finds little left to do."""
        with self._lock:
            self._done_bytes += nbytes
            self._unflushed_bytes += nbytes
            if path is not None and self._unflushed_bytes >= FLUSH_BYTES:
                self._unflushed_bytes = 0
                out = self._file(path, os.O_RDWR | os.O_CREAT)
                self._flushes.append(self._flusher.submit(lambda: os.fdatasync(out.descriptor)))
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


def together(tasks: Sequence[CopyTask]) -> Iterator[Sequence[CopyTask]]:
    """The tasks in their order, as many at a time as make up :data:`TOGETHER_BYTES`: an expert of a small model is a
    few kilobytes, and giving one to a thread takes longer than writing it."""
    begin = nbytes = 0
    for end, task in enumerate(tasks, 1):
        nbytes += task.nbytes
        if nbytes >= TOGETHER_BYTES or end == len(tasks):
            yield tasks[begin:end]
            begin, nbytes = end, 0


def _not_finite(block: torch.Tensor, cast: torch.Tensor, overflow: bool) -> tuple[bool, bool]:
    """(the block holds NaN, finite values became infinite in the cast). One pass over what is written when all is well:
    a sum is finite only if every element is."""
    if math.isfinite(float(cast.sum())):
        return False, overflow
    low, high = map(float, block.aminmax())  # NaN anywhere makes both NaN
    if math.isnan(low):
        return True, overflow
    if not overflow and cast.dtype != block.dtype and max(-low, high) > torch.finfo(cast.dtype).max:
        overflow = bool(torch.isinf(cast).any() and not torch.isinf(block).any())
    return False, overflow


def read_back(sources: Sequence[TensorSource], jobs: int) -> list[dict[str, Any]]:
    """What a report says of each tensor, from its bytes on the disk, which are proven undamaged."""
    streamer = Streamer(jobs)
    written = streamer.run([CopyTask(source, source.dtype) for source in sources])
    streamer.ledger.check()
    files = [source.runs[0].storage.path.name if source.runs else "" for source in sources]
    return [
        tensor_facts(source, source.dtype, file, result.sha256)
        for source, file, result in zip(sources, files, written, strict=True)
    ]


def tensor_facts(source: TensorSource, dtype: torch.dtype, file: str, sha256: str) -> dict[str, Any]:
    return {"file": file, "dtype": DTYPE_NAMES[dtype], "shape": list(source.shape), "sha256": sha256}


def run_tasks(tasks: list[CopyTask], directory: Path, jobs: int, progress: Progress | None) -> dict[str, Any]:
    """Stream the tasks after checking that the disk can hold them; sources are proven undamaged at the end.

    Returns:
        The report: ``tensors`` {name: file, type, shape, SHA-256}, their ``bytes`` in all, and a line of ``warnings``
        for every tensor that is not finite.
    """
    total = sum(task.nbytes for task in tasks)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(
            f"the result needs {total} bytes, the destination has {free} free",
            str(directory.parent),
            "free space there, or choose another destination",
        )
    streamer = Streamer(jobs, progress, total)
    written = streamer.run(tasks)
    streamer.ledger.check()
    tensors, nan, overflow = {}, [], []
    for task, result in sorted(zip(tasks, written, strict=True), key=lambda pair: pair[0].source.name):
        source, file = task.source, str(task.path.relative_to(directory)) if task.path else ""
        tensors[source.name] = tensor_facts(source, task.dtype, file, result.sha256)
        nan += [f"{source.name} holds NaN"] if result.nan else []
        overflow += [f"{source.name} overflows in the target type"] if result.overflow else []
    return {"tensors": tensors, "bytes": total, "warnings": nan + overflow}
