"""Tokenising on several cores: processes that take batches and give them back in the order they were read."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from trace_ds.corpora.tokenizer import Batch, Encoder, encode_batch
from trace_ds.errors import JobFailed

if TYPE_CHECKING:
    import numpy as np

HERE_CHARACTERS = 4 << 20  # are tokenised here: too few to start processes for
BUSY = 16  # more cannot be kept busy by the one that reads and packs (about a third of a process' work)
AHEAD = 3  # batches under way for each process
ALONE = {"TOKENIZERS_PARALLELISM": "false"}  # a process is one core: its library starts no threads


def default_processes() -> int:
    """As many as this process may use cores, up to :data:`BUSY`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, BUSY)


@contextlib.contextmanager
def tokenising(encode: Encoder, processes: int) -> Iterator[_Pool]:
    """What :func:`~trace_ds.corpora.tokenizer.encode_documents` gives its work to; one process is this one."""
    before = {name: os.environ.get(name) for name in ALONE}
    os.environ.update(ALONE)
    pool = _Pool(encode, processes)
    try:
        yield pool
    finally:
        pool.close()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Pool:
    def __init__(self, encode: Encoder, processes: int) -> None:
        self._encode, self._processes = encode, processes
        self._executor: ProcessPoolExecutor | None = None
        self._characters = 0

    def __call__(self, batches: Iterator[Batch]) -> Iterator[tuple[np.ndarray, list[int]]]:
        for batch in batches:
            if self._processes > 1 and self._characters >= HERE_CHARACTERS:
                batches = itertools.chain([batch], batches)
                break
            self._characters += sum(len(text) for text, _ in batch)
            yield encode_batch(batch, self._encode)
        under_way: deque[Future[tuple[np.ndarray, list[int]]]] = deque()
        try:
            for batch in batches:
                under_way.append(self._started().submit(_encode_there, batch))
                if len(under_way) == AHEAD * self._processes:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool:
            raise JobFailed(
                "a process that tokenises died (out of memory?): run again, or lower data.num_proc"
            ) from None

    def close(self) -> None:
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # a fork would take the locks of running threads along
            self._executor = ProcessPoolExecutor(self._processes, context, _begin, (self._encode,))
        return self._executor


_encode: Encoder  # of a process of the pool


def _begin(encode: Encoder) -> None:
    global _encode
    _encode = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all, and the parent ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its processes would wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_there(batch: Batch) -> tuple[np.ndarray, list[int]]:
    return encode_batch(batch, _encode)
