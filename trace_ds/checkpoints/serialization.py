"""How DeepSpeed reads and writes shard files in our jobs: never unpickling arbitrary objects, and canonical bytes.

DeepSpeed loads with ``weights_only=False``, which executes whatever a pickle says. We replace its two file operations
by ``weights_only=True`` with the three plain DeepSpeed classes that its states hold. And since equal states pickled
before and after a resume differ in which equal strings are one object, states are rebuilt before they are written:
equal states give equal files, so a resumed job's checkpoints can be compared by hash.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch

from trace_ds.errors import UserError


class Written:
    """What a process has written since the last :meth:`take`: path -> {bytes, sha256}. DeepSpeed's ``save``."""

    def __init__(self) -> None:
        self._files: dict[str, dict[str, Any]] = {}

    def __call__(self, state_dict: Any, path: str | Path) -> None:
        self._files[os.path.abspath(path)] = save(state_dict, path)

    def take(self) -> dict[str, dict[str, Any]]:
        files, self._files = self._files, {}
        return files


def install(engine: Any) -> None:
    """Make a DeepSpeed engine save and load its checkpoint files through this module."""
    files = engine.checkpoint_engine
    files.load = load
    files.save = Written()


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


def load(path: str | Path, map_location: Any = None) -> Any:
    """Load a shard file; :class:`UserError` naming the file when it holds anything but tensors and plain data."""
    return _read(str(path), map_location=map_location)


def check(path: Path) -> None:
    """Refuse a shard file that :func:`load` would refuse, without reading its tensors."""
    _read(str(path), map_location="cpu", mmap=True)


def _read(path: str, **how: Any) -> Any:
    from pickle import UnpicklingError

    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            return torch.load(path, weights_only=True, **how)
    # A damaged file can fail anywhere in torch's reader: in the archive, in a pickle opcode, in a name it looks up.
    except (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = next((line.strip() for line in lines if "WeightsUnpickler error" in line), lines[0])
        raise UserError(
            f"the shard cannot be loaded safely ({reason})", str(path), "restore the file, or use another step"
        ) from None


def save(state_dict: Any, path: str | Path) -> dict[str, Any]:
    """Write a shard file whose bytes depend on the state's values only, onto the disk; its ``bytes`` and ``sha256``.

    Raises:
        OSError: it cannot be written (no space left, …); names the file.
    """
    try:
        with Path(path).open("wb") as handle:
            out = _Hashing(handle)
            try:
                torch.save(canonical(state_dict, {}), out)  # type: ignore[arg-type]
            except RuntimeError as error:  # torch wraps what its output raises
                raise (out.error or error) from None
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise OSError(error.errno, os.strerror(error.errno or 0), str(path)) from None
    return {"bytes": out.bytes, "sha256": out.digest.hexdigest()}


def canonical(value: Any, strings: dict[str, str]) -> Any:
    """Containers rebuilt anew and equal strings made one object (what pickle's memo depends on); tensors untouched."""
    if type(value) is str:
        return strings.setdefault(value, value)
    if type(value) in (list, tuple, set, frozenset):
        return type(value)(canonical(item, strings) for item in value)
    if isinstance(value, dict) and type(value).__name__ in ("dict", "OrderedDict", "defaultdict"):
        items = {canonical(key, strings): canonical(item, strings) for key, item in value.items()}
        if type(value) is dict:
            return items
        rebuilt = value.copy()
        rebuilt.clear()
        rebuilt.update(items)
        return rebuilt
    return value
