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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.runs import Run, TensorSource, merge_adjacent, pieces_of
from trace_ds.tensors.torch_archive import COPY_CHECKPOINT, bytes_of

BLOCK_NUMEL = 1 << 17  # read and cast, a block lies in the second-level cache of a core
BATCH_BYTES = 1 << 20
_HASH_BLOCK_BYTES = 1 << 20
FREE_SPACE = "free space there, or choose another destination"
KEPT_OPEN = 64  # files beside those in use; a target may have one for every expert, and a process 1024
NAN, OVERFLOW = "holds NaN", "overflows in the target type"
ByteProgress = Callable[[int, int], None]  # bytes written, bytes in all


@dataclass(frozen=True)
class CopyTask:
    """Write ``source`` cast to ``dtype`` into ``path`` from byte ``offset_bytes`` on."""

    source: TensorSource
    dtype: torch.dtype
    path: Path
    offset_bytes: int

    @property
    def nbytes(self) -> int:
        return self.source.numel * self.dtype.itemsize


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
            problem = f"the destination cannot hold the result ({error.strerror})"
            raise UserError(problem, str(error.filename or path), FREE_SPACE) from None
        raise


def write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done


def read_all(descriptor: int, buffer: memoryview, offset: int, path: Path) -> None:
    while buffer:
        done = os.preadv(descriptor, [buffer], offset)
        if not done:
            raise UserError("the file ends inside a tensor (truncated?)", str(path), COPY_CHECKPOINT)
        buffer, offset = buffer[done:], offset + done


class FileHasher:
    """SHA-256 of files that are written one after the other, each from the beginning; what was written is read back
    while it is in the page cache."""

    def __init__(self) -> None:
        self.hashes: dict[Path, str] = {}
        self._buffer = memoryview(bytearray(_HASH_BLOCK_BYTES))
        self._path: Path | None = None

    def update(self, path: Path, end: int) -> None:
        """``path`` is written up to byte ``end``, and every other file is complete."""
        if path != self._path:
            self.finish()
            self._path, self._position, self._digest = path, 0, hashlib.sha256()
            self._file = OpenFile(path, os.O_RDONLY)
        while self._position < end:
            data = self._buffer[: min(end - self._position, _HASH_BLOCK_BYTES)]
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

    def __init__(self, jobs: int, progress: ByteProgress | None = None, total_bytes: int = 0) -> None:
        self._jobs = jobs
        self._file = functools.lru_cache(KEPT_OPEN)(OpenFile)
        self._progress = progress
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._lock = threading.Lock()
        self._buffers = threading.local()
        self._stopped = threading.Event()

    def run(self, tasks: Sequence[CopyTask], on_written: Callable[[Path, int], None]) -> list[str]:
        """Carry out the tasks; of each, in their order, :data:`NAN`, :data:`OVERFLOW` or "". The first error stops the
        others and is raised.

        Args:
            on_written: called by this thread, in the order of the tasks, with the file and end of each that is done.
        """
        problems: list[str] = []
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                futures = [(batch, pool.submit(self._copy_all, batch)) for batch in _batches(tasks)]
                try:
                    for batch, future in futures:
                        problems += future.result()
                        for task in batch:
                            on_written(task.path, task.offset_bytes + task.nbytes)
                except BaseException:
                    self._stopped.set()
                    for _, future in futures:
                        future.cancel()
                    raise
            return problems
        finally:
            self._file.cache_clear()

    def _buffer(self, use: str, dtype: torch.dtype) -> torch.Tensor:
        """This thread's own."""
        buffers = self._buffers.__dict__.setdefault("held", {})
        if (use, dtype) not in buffers:
            buffers[use, dtype] = torch.empty(BLOCK_NUMEL, dtype=dtype)
        return buffers[use, dtype]

    def _copy_all(self, tasks: Sequence[CopyTask]) -> list[str]:
        return [self._copy(task) for task in tasks]

    def _copy(self, task: CopyTask) -> str:
        source = merge_adjacent(task.source)
        staging, result = self._buffer("read", source.dtype), self._buffer("cast", task.dtype)
        position, problem = task.offset_bytes, ""
        with naming_full_disk(task.path):
            out = self._file(task.path, os.O_RDWR | os.O_CREAT)
            for piece in pieces_of(source.runs, BLOCK_NUMEL):
                if self._stopped.is_set():
                    break
                block = self._read(piece, staging)
                cast = block if source.dtype == task.dtype else result[: len(block)].copy_(block)
                if cast.dtype.is_floating_point and problem != NAN:
                    problem = _problem(block, cast) or problem
                data = bytes_of(cast)
                write_all(out.descriptor, data, position)
                position += len(data)
                self._advance(len(data))
        return problem

    def _read(self, piece: list[Run], staging: torch.Tensor) -> torch.Tensor:
        """The elements of the runs, one after the other, at the beginning of ``staging``."""
        filled = 0
        for run in piece:
            view = bytes_of(staging[filled : filled + run.numel])
            file = self._file(run.storage.path, os.O_RDONLY)
            read_all(file.descriptor, view, run.offset_bytes, run.storage.path)
            filled += run.numel
        return staging[:filled]

    def _advance(self, nbytes: int) -> None:
        with self._lock:
            self._done_bytes += nbytes
            if self._progress is not None:
                self._progress(self._done_bytes, self._total_bytes)


def _batches(tasks: Sequence[CopyTask]) -> Iterator[Sequence[CopyTask]]:
    """The tasks in their order, at least :data:`BATCH_BYTES` at a time: an expert of a small model is a few kilobytes,
    and giving one to a thread takes longer than writing it."""
    begin = nbytes = 0
    for end, task in enumerate(tasks, 1):
        nbytes += task.nbytes
        if nbytes >= BATCH_BYTES or end == len(tasks):
            yield tasks[begin:end]
            begin, nbytes = end, 0


def _problem(block: torch.Tensor, cast: torch.Tensor) -> str:
    """Whether a block holds NaN, or finite values became infinite in the cast. One pass over what is written when all
    is well: a sum is finite only if every element is."""
    if math.isfinite(float(cast.sum())):
        return ""
    if bool(block.isnan().any()):
        return NAN
    return OVERFLOW if bool((cast.isinf() & ~block.isinf()).any()) else ""


def run_tasks(
    tasks: list[CopyTask], directory: Path, jobs: int, progress: ByteProgress | None, hasher: FileHasher
) -> dict[str, Any]:
    """Stream the tasks, which are in the order of their files, after checking that the disk can hold them.

    Returns:
        The report: how many ``tensors``, their ``bytes`` in all, and a line of ``warnings`` for every tensor that is
        not finite.
    """
    total = sum(task.nbytes for task in tasks)
    free = shutil.disk_usage(directory).free
    if total > free:
        problem = f"the result needs {total} bytes, the destination has {free} free"
        raise UserError(problem, str(directory.parent), FREE_SPACE)
    problems = Streamer(jobs, progress, total).run(tasks, hasher.update)
    named = sorted(zip((task.source.name for task in tasks), problems, strict=True))
    warnings = [f"{name} {problem}" for kind in (NAN, OVERFLOW) for name, problem in named if problem == kind]
    return {"tensors": len(tasks), "bytes": total, "warnings": warnings}
