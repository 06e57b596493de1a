"""Move tensors from source files to a place in a destination file, block by block.

One block is :data:`BLOCK_NUMEL` elements: it is read, cast and written while it is in the processor's cache, so memory
is a few megabytes for each job however large a tensor, a shard or the model is. The calling thread follows the writers
and hashes the files that they write.
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
from trace_ds.tensors.runs import Run, TensorSource, merge_adjacent, pieces_of
from trace_ds.tensors.torch_archive import COPY_AGAIN, bytes_of

BLOCK_NUMEL = 1 << 17  # read and cast, a block lies in the second-level cache of a core
FLUSH_BYTES = 1 << 27
TOGETHER_BYTES = 1 << 20
HASH_BLOCK_BYTES = 1 << 20
KEPT_OPEN = 64  # files beside those in use; a target may have one for every expert, and a process 1024
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class CopyTask:
    """Write ``source`` cast to ``dtype`` into ``path`` from byte ``offset_bytes`` on."""

    source: TensorSource
    dtype: torch.dtype
    path: Path = Path()
    offset_bytes: int = 0

    @property
    def nbytes(self) -> int:
        return self.source.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Written:
    """What became of a task.

    Attributes:
        nan: the source holds NaN.
        overflow: finite elements became infinite in the cast.
    """

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


class FileHasher:
    """SHA-256 of files that are written one after the other, each from the beginning; what was written is read back
    while it is in the page cache."""

    def __init__(self) -> None:
        self.hashes: dict[Path, str] = {}
        self._buffer = memoryview(bytearray(HASH_BLOCK_BYTES))
        self._path: Path | None = None

    def follow(self, path: Path, end: int) -> None:
        """``path`` is written up to byte ``end``, and every other file is complete."""
        if path != self._path:
            self.finish()
            self._path, self._position, self._digest = path, 0, hashlib.sha256()
            self._file = OpenFile(path, os.O_RDONLY)
        while self._position < end:
            data = self._buffer[: min(end - self._position, HASH_BLOCK_BYTES)]
            read_all(self._file.descriptor, data, self._position, path)
            self._digest.update(data)
            self._position += len(data)

    def finish(self) -> dict[Path, str]:
        """The hashes of all files."""
        if self._path is not None:
            self.hashes[self._path] = self._digest.hexdigest()
            self._path = None
        return self.hashes


class Streamer:
    """Runs tasks on ``jobs`` threads; reading, casting, hashing and writing all release Python's lock."""

    def __init__(self, jobs: int, progress: Progress | None = None, total_bytes: int = 0) -> None:
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

    def run(self, tasks: Sequence[CopyTask], written_to: Callable[[Path, int], None] | None = None) -> list[Written]:
        """Carry out the tasks; results in their order. The first error stops the others and is raised.

        Args:
            written_to: called by this thread, in the order of the tasks, with the file and end of each that is done.
        """
        try:
            written = self._run(tasks, written_to)
            for flush in self._flushes:
                flush.result()  # a failed write shows here, and only once
            return written
        finally:
            self._flusher.shutdown(cancel_futures=True)
            self._file.cache_clear()

    def _run(self, tasks: Sequence[CopyTask], written_to: Callable[[Path, int], None] | None) -> list[Written]:
        written: list[Written] = []
        with ThreadPoolExecutor(self._jobs) as pool:
            futures = [(some, pool.submit(self._do_all, some)) for some in together(tasks)]
            try:
                for some, future in futures:
                    written += future.result()
                    for task in some:
                        if written_to is not None:
                            written_to(task.path, task.offset_bytes + task.nbytes)
            except BaseException:
                self._stopped.set()
                for _, future in futures:
                    future.cancel()
                raise
        return written

    def _buffer(self, use: str, dtype: torch.dtype) -> torch.Tensor:
        """This thread's own."""
        buffers = self._buffers.__dict__.setdefault("held", {})
        if (use, dtype) not in buffers:
            buffers[use, dtype] = torch.empty(BLOCK_NUMEL, dtype=dtype)
        return buffers[use, dtype]

    def _do_all(self, tasks: Sequence[CopyTask]) -> list[Written]:
        return [self._do(task) for task in tasks]

    def _do(self, task: CopyTask) -> Written:
        source = merge_adjacent(task.source)
        staging, result = self._buffer("read", source.dtype), self._buffer("cast", task.dtype)
        position, nan, overflow = task.offset_bytes, False, False
        with naming_full_disk(task.path):
            out = self._file(task.path, os.O_RDWR | os.O_CREAT)
            for piece in pieces_of(source.runs, BLOCK_NUMEL):
                if self._stopped.is_set():
                    break
                block = self._read(piece, staging)
                cast = block if source.dtype == task.dtype else result[: len(block)].copy_(block)
                if cast.dtype.is_floating_point and not nan:
                    nan, overflow = _not_finite(block, cast, overflow)
                data = bytes_of(cast)
                write_all(out.descriptor, data, position)
                position += len(data)
                self._advance(len(data), task.path)
        return Written(nan, overflow)

    def _read(self, piece: list[Run], staging: torch.Tensor) -> torch.Tensor:
        """The elements of the runs, one after the other, at the beginning of ``staging``."""
        filled = 0
        for run in piece:
            view = bytes_of(staging[filled : filled + run.numel])
            file = self._file(run.storage.path, os.O_RDONLY)
            read_all(file.descriptor, view, run.offset_bytes, run.storage.path)
            filled += run.numel
        return staging[:filled]

    def _advance(self, nbytes: int, path: Path) -> None:
        """Count the bytes. Every so often the file goes to the disk in the background, so that the final fsync, which
        alone counts for safety, finds little left to do."""
        with self._lock:
            self._done_bytes += nbytes
            self._unflushed_bytes += nbytes
            if self._unflushed_bytes >= FLUSH_BYTES:
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


def run_tasks(
    tasks: list[CopyTask], directory: Path, jobs: int, progress: Progress | None, hasher: FileHasher | None = None
) -> dict[str, Any]:
    """Stream the tasks after checking that the disk can hold them.

    Args:
        hasher: of the files that they write; the tasks are in the order of the files then.

    Returns:
        The report: how many ``tensors``, their ``bytes`` in all, and a line of ``warnings`` for every tensor that is
        not finite.
    """
    total = sum(task.nbytes for task in tasks)
    free = shutil.disk_usage(directory).free
    if total > free:
        raise UserError(
            f"the result needs {total} bytes, the destination has {free} free",
            str(directory.parent),
            "free space there, or choose another destination",
        )
    written = Streamer(jobs, progress, total).run(tasks, hasher.follow if hasher is not None else None)
    pairs = sorted((task.source.name, result) for task, result in zip(tasks, written, strict=True))
    nan = [f"{name} holds NaN" for name, result in pairs if result.nan]
    overflow = [f"{name} overflows in the target type" for name, result in pairs if result.overflow]
    return {"tensors": len(tasks), "bytes": total, "warnings": nan + overflow}
