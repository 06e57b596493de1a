"""How DeepSpeed reads and writes shard files in our jobs: plain data only, and canonical bytes.

DeepSpeed saves objects of its own classes and loads with ``weights_only=False``, which executes whatever a pickle says.
We replace its two file operations: only tensors, containers, numbers and text are written, read back at once by
:mod:`trace_ds.tensors.torch_archive`, which also loads. Equal states pickled before and after a resume differ in
which equal strings are one object, so states are rebuilt first: equal states give equal files, and a resumed job's
checkpoints can be compared by hash.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trace_ds.errors import JobFailed, UserError
from trace_ds.tensors.torch_archive import LazyTensor, exchanged, read_archive

OPTIMIZER, LOSS_SCALER = "optimizer_state_dict", "loss_scaler"


class ShardFiles:
    """The file operations of a DeepSpeed engine, and the files of the checkpoint that it is writing."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self.begin()

    def begin(self) -> None:
        """Begin a checkpoint."""
        self._written: dict[str, dict[str, Any]] = {}
        self._failed: OSError | None = None

    def save(self, state_dict: Any, path: str | Path) -> None:
        """Write a file onto the disk. What goes wrong is raised by :meth:`finish`: the other ranks wait for this one
        inside DeepSpeed."""
        if self._failed is None:
            try:
                self._written[os.path.abspath(path)] = _write(path, _plain(state_dict, {}))
            except OSError as error:
                self._failed = error

    def finish(self) -> dict[str, dict[str, Any]]:
        """path -> {bytes, sha256} of every file of the checkpoint; OSError where one could not be written."""
        if self._failed is not None:
            raise self._failed
        return self._written

    def load(self, path: str | Path, map_location: Any = None) -> Any:
        """As :func:`load_shard` (DeepSpeed asks for the CPU); the loss scaler, which it wants back as an object, is the
        engine's own."""
        state = load_shard(path)
        optimizer = state.get(OPTIMIZER) if isinstance(state, dict) else None
        if isinstance(optimizer, dict) and LOSS_SCALER in optimizer:
            optimizer[LOSS_SCALER] = self._engine.optimizer.loss_scaler
        return state


def install(engine: Any) -> None:
    """Make a DeepSpeed engine save and load its checkpoint files through this module."""
    engine.checkpoint_engine.files = files = ShardFiles(engine)
    engine.checkpoint_engine.load, engine.checkpoint_engine.save = files.load, files.save


@contextlib.contextmanager
def frozen_experts_left_out(engine: Any) -> Iterator[None]:
    """Let DeepSpeed save an engine whose experts are partly frozen, under ZeRO-3 and AutoEP, without the frozen ones.

    DeepSpeed 0.19.8 refuses: its shards could not restore them. Here they are the base model's, like every frozen
    parameter. So they pass for trained ones (what is written of experts comes from the optimizer alone), and the check
    that the optimizer has every expert gets the names of the trained ones.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    experts = engine.module.named_parameters() if engine.has_moe_layers else ()
    frozen = {name: parameter for name, parameter in experts if ".experts." in name and not parameter.requires_grad}
    names_of = DeepSpeedEngine._autoep_expert_parameter_names

    def trained_names(autoep_layers: Any, model: torch.nn.Module) -> set[str]:
        return set(names_of(autoep_layers, model)) - frozen.keys()

    if not frozen:
        yield
        return
    DeepSpeedEngine._autoep_expert_parameter_names = staticmethod(trained_names)
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        DeepSpeedEngine._autoep_expert_parameter_names = staticmethod(names_of)
        for parameter in frozen.values():
            parameter.requires_grad_(False)


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


def load_shard(path: str | Path) -> Any:
    """A shard file as plain data and tensors in memory; errors are those of :func:`open_shard`."""
    return exchanged(open_shard(Path(path)), LazyTensor, LazyTensor.load)


def open_shard(path: Path) -> Any:
    """A shard file's plain data, its tensors still on disk.

    Raises:
        UserError: the file is damaged, or its pickle asks for what no checkpoint needs.
    """
    try:
        return read_archive(path)
    except UserError as error:
        fix = "restore the file, or use another step"
        raise UserError(f"the shard cannot be loaded safely ({error.problem})", str(path), fix) from None


def _write(path: str | Path, state: Any) -> dict[str, Any]:
    """Write a shard file of plain data onto the disk; its ``bytes`` and ``sha256``.

    Raises:
        OSError: it cannot be written (no space left, …); names the file.
        JobFailed: what was written cannot be read.
    """
    try:
        with Path(path).open("wb") as handle:
            out: Any = _Hashing(handle)
            try:
                torch.save(state, out)
            except RuntimeError as error:  # torch wraps what its output raises
                raise (out.error or error) from None
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
    try:
        open_shard(Path(path))
    except UserError as error:
        raise JobFailed(f"what was written a moment ago cannot be read: {error.line()}") from None
    return {"bytes": out.bytes, "sha256": out.digest.hexdigest()}


def _plain(value: Any, strings: dict[str, str]) -> Any:
    """A state as plain data: objects become their fields (all but one kind), enums their values. Containers are built
    anew and equal strings are one object (what pickle's memo depends on); tensors are untouched."""
    if isinstance(value, enum.Enum):
        return _plain(value.value, strings)
    if isinstance(value, str):
        return strings.setdefault(str(value), sys.intern(str(value)))
    if type(value).__module__ == "numpy":
        return _plain(value.tolist(), strings)
    if value is None or isinstance(value, (bool, int, float, torch.Tensor, torch.dtype, torch.Size)):
        return value
    if type(value) in (list, tuple):
        return type(value)(_plain(item, strings) for item in value)
    if isinstance(value, (set, frozenset)):
        return [_plain(item, strings) for item in sorted(value)]
    if isinstance(value, dict):
        return {_plain(key, strings): _plain(item, strings) for key, item in value.items()}
    if type(value).__name__ == "fragment_address":  # DeepSpeed's converter wants the object: two numbers
        return type(value)(value.numel, value.start)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain({entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}, strings)
    if type(value).__module__.split(".")[0] == "deepspeed":
        return _plain(vars(value), strings)
    raise JobFailed(f"the state to be saved holds a {type(value).__name__}, which is no plain data")
