"""How DeepSpeed reads and writes shard files in our jobs: plain data only, and canonical bytes.

DeepSpeed saves objects of its own classes and loads with ``weights_only=False``, which executes whatever a pickle says;
how Python pickles an enum differs even between patch releases. We replace its two file operations: what is written is
tensors, containers, numbers and text, read back at once by the reader that will have to read it; and what is loaded is
what that reader (:mod:`trace_ds.tensors.torch_archive`) makes of a file: nothing in it is rebuilt or called. And since
equal states pickled before and after a resume differ in which equal strings are one object, states are rebuilt before
they are written: equal states give equal files, so a resumed job's checkpoints can be compared by hash.
"""

from __future__ import annotations

import dataclasses
import enum
import hashlib
import os
import sys
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trace_ds.errors import JobFailed, UserError
from trace_ds.tensors.torch_archive import LazyTensor, exchanged, read_archive

OPTIMIZER, LOSS_SCALER = "optimizer_state_dict", "loss_scaler"


class ShardFiles:
    """The file operations of a DeepSpeed engine, and what they have written since the last :meth:`take`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._written: dict[str, dict[str, Any]] = {}

    def save(self, state_dict: Any, path: str | Path) -> None:
        self._written[os.path.abspath(path)] = save(state_dict, path)

    def load(self, path: str | Path, map_location: Any = None) -> Any:
        """As :func:`load` (DeepSpeed asks for the CPU); the loss scaler, which it wants back as an object, is the
        engine's own."""
        state = load(path)
        optimizer = state.get(OPTIMIZER) if isinstance(state, dict) else None
        if isinstance(optimizer, dict) and LOSS_SCALER in optimizer:
            optimizer[LOSS_SCALER] = self._engine.optimizer.loss_scaler
        return state

    def take(self) -> dict[str, dict[str, Any]]:
        """path -> {bytes, sha256} of every file written since the last call."""
        written, self._written = self._written, {}
        return written


def install(engine: Any) -> None:
    """Make a DeepSpeed engine save and load its checkpoint files through this module."""
    files, theirs = ShardFiles(engine), engine.checkpoint_engine
    theirs.load, theirs.save, theirs.take = files.load, files.save, files.take


class _Hashing:
    """A file that knows the size and the SHA-256 of what goes through it (``torch.save`` writes in order)."""

    def __init__(self, handle: BinaryIO) -> None:
        self._handle = handle
        self.digest, self.bytes = hashlib.sha256(), 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            written = self._handle.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        self.bytes += written
        return written

    def flush(self) -> None:
        self._handle.flush()


def load(path: str | Path) -> Any:
    """A shard file as plain data and tensors in memory; errors are those of :func:`check`."""
    return exchanged(check(Path(path)), LazyTensor, LazyTensor.load)


def check(path: Path) -> Any:
    """What is in a shard file, its tensors still on disk.

    Raises:
        UserError: the file is damaged, or its pickle asks for what no checkpoint needs.
    """
    try:
        return read_archive(path)
    except UserError as error:
        fix = "restore the file, or use another step"
        raise UserError(f"the shard cannot be loaded safely ({error.what})", str(path), fix) from None


def save(state_dict: Any, path: str | Path) -> dict[str, Any]:
    """Write a shard file whose bytes depend on the state's values only, onto the disk; its ``bytes`` and ``sha256``.

    Raises:
        OSError: it cannot be written (no space left, …); names the file.
        JobFailed: the state holds what is no plain data, or what was written cannot be read.
    """
    try:
        with Path(path).open("wb") as handle:
            out = _Hashing(handle)
            try:
                torch.save(plain(state_dict, {}), out)  # type: ignore[arg-type]
            except RuntimeError as error:  # torch wraps what its output raises
                raise (out.error or error) from None
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
    try:
        check(Path(path))
    except UserError as error:
        raise JobFailed(f"what was written a moment ago cannot be read: {error.line()}") from None
    return {"bytes": out.bytes, "sha256": out.digest.hexdigest()}


def plain(value: Any, strings: dict[str, str]) -> Any:
    """The same state as plain data: objects become their fields (all but one kind), enums their values.

    Containers are built anew and equal strings are one object (what pickle's memo depends on); tensors are untouched.
    """
    if isinstance(value, enum.Enum):
        return plain(value.value, strings)
    if isinstance(value, str):
        return strings.setdefault(str(value), sys.intern(str(value)))
    if type(value).__module__ == "numpy":
        return plain(value.tolist(), strings)
    if value is None or isinstance(value, (bool, int, float, torch.Tensor, torch.dtype, torch.Size)):
        return value
    if type(value) in (list, tuple):
        return type(value)(plain(item, strings) for item in value)
    if isinstance(value, (set, frozenset)):
        return [plain(item, strings) for item in sorted(value)]
    if isinstance(value, dict):
        return {plain(key, strings): plain(item, strings) for key, item in value.items()}
    if type(value).__name__ == "fragment_address":  # DeepSpeed's converter wants the object: two numbers
        return type(value)(value.numel, value.start)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}, strings)
    if type(value).__module__.split(".")[0] == "deepspeed":
        return plain(vars(value), strings)
    raise JobFailed(f"the state to be saved holds a {type(value).__name__}, which is no plain data")
