"""Read ``torch.save`` files without running anything that is in them, and without loading their tensors.

A ``torch.save`` file is a zip archive of stored (never compressed) records: ``data.pkl``, a pickle in which every
tensor refers to a record ``data/N`` of raw bytes. :func:`read_archive` gives plain data and :class:`LazyTensor`, which
knows file and offset of its bytes, so that ranges are read only when they are needed.

The pickle is read by ``torch.load(weights_only=True, map_location="meta")``, which allocates no tensor, leaves each
storage's place in the file, and calls nothing but what is allowed by name: torch's own list, and stand-ins for the few
classes in DeepSpeed's files. A hostile file can exhaust the process's memory or stack, but not run code.
"""

from __future__ import annotations

import contextlib
import math
import pickle
import re
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError

DTYPE_NAMES = {  # in safetensors files
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
WORDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # in configurations and reports
MAX_PICKLE_BYTES = 1 << 28
MAX_DIMENSIONS = 32
MAX_NUMEL = 1 << 62
COPY_CHECKPOINT = "copy the checkpoint again from where it was written, or convert another step"


@dataclass(frozen=True)
class Storage:
    """A contiguous array in a file: ``numel`` elements from ``offset_bytes`` on; ``name`` is for messages."""

    path: Path
    name: str
    offset_bytes: int
    numel: int
    dtype: torch.dtype


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is still on disk: a contiguous view of ``storage`` from element ``start`` on."""

    storage: Storage
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.storage.dtype

    def numel(self) -> int:
        return math.prod(self.shape)

    def load(self) -> torch.Tensor:
        """The tensor itself, in memory of its own."""
        storage, tensor = self.storage, torch.empty(self.shape, dtype=self.dtype)
        with storage.path.open("rb") as handle:
            handle.seek(storage.offset_bytes + self.start * storage.dtype.itemsize)
            read = handle.readinto(bytes_of(tensor.reshape(-1)))
        if read != tensor.nbytes:
            raise UserError(f"the file ends inside {storage.name} (truncated?)", str(storage.path), COPY_CHECKPOINT)
        return tensor


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor of one dimension."""
    return memoryview(tensor.view(torch.uint8).numpy())  # type: ignore[arg-type]


def scalar(tensor: LazyTensor) -> float:
    """The number in a tensor of one element; ``ValueError`` when it has more."""
    if tensor.numel() != 1:
        raise ValueError(f"expected one number, found a tensor of shape {tensor.shape}")
    return float(tensor.load())


class _Object:
    """Stands for an object of a class that is not imported; its fields come from the pickle."""

    def __init__(self, *arguments: Any) -> None:
        pass


def _member_of_stage(owner: Any, name: str) -> int:
    """``getattr(ZeroStageEnum, name)``, which is how Python 3.11.0 to 3.11.3 pickle an enum."""
    if owner is not int:
        raise ValueError(f"getattr of {owner!r}")
    return ("disabled", "optimizer_states", "gradients", "weights").index(name)


STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (_member_of_stage, "builtins.getattr"),
    (_Object, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_Object, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (_Object, "deepspeed.utils.tensor_fragment.fragment_address"),
]
_ALLOWING = threading.Lock()  # torch's list of what is allowed is the process's


def _load(path: Path) -> Any:
    """What ``torch.load`` makes of the file, its tensors without data."""
    try:
        with _ALLOWING, torch.serialization.safe_globals(STAND_INS):
            return torch.load(path, map_location="meta", weights_only=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        if name is None:
            raise ValueError(str(error).partition("WeightsUnpickler error: ")[2] or str(error)) from None
        raise UserError(
            f"the pickle in this file asks for {ascii(name[1])[1:100].rstrip(chr(39))}, which no checkpoint needs: "
            "it was refused and nothing of it was run",
            str(path),
            "get the checkpoint from its author again; do not load this file with weights_only=False",
        ) from None


def _check_records(path: Path) -> None:
    """Raise where the archive's directory or its pickle is damaged, or its storages are not plain bytes."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        pickles = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickles) != 1 or any(record.compress_type != zipfile.ZIP_STORED for record in records):
            raise zipfile.BadZipFile("no file of torch.save")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise zipfile.BadZipFile(f"its data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        archive.read(pickles[0])  # compares its CRC-32
        order = pickles[0].filename.replace("data.pkl", "byteorder")
        if order in archive.namelist() and archive.read(order) != b"little":
            raise zipfile.BadZipFile("it was written on a big-endian machine")


def _plain(value: Any, path: Path, file_bytes: int) -> Any:
    """Plain data and tensors that know where they lie, from what :func:`_load` made."""
    if isinstance(value, torch.Tensor):
        return _lazy(value, path, file_bytes)
    if isinstance(value, dict):
        return {key: _plain(entry, path, file_bytes) for key, entry in value.items()}
    if isinstance(value, (list, set)):
        return [_plain(entry, path, file_bytes) for entry in value]
    if isinstance(value, tuple):
        return tuple(_plain(entry, path, file_bytes) for entry in value)
    if isinstance(value, _Object):
        return _plain(vars(value), path, file_bytes)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    raise ValueError(f"a {type(value).__name__}")


def _lazy(tensor: torch.Tensor, path: Path, file_bytes: int) -> LazyTensor:
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, strides {tensor.stride()}")
    storage, shape, start = tensor.untyped_storage(), tuple(tensor.shape), int(tensor.storage_offset())
    offset, nbytes, itemsize = storage._checkpoint_offset, storage.nbytes(), tensor.dtype.itemsize
    if offset is None or offset + nbytes > file_bytes or (start + tensor.numel()) * itemsize > nbytes:
        raise ValueError("a tensor reaches beyond its storage or the file")
    return LazyTensor(Storage(path, "a tensor", offset, nbytes // itemsize, tensor.dtype), start, shape)


def plain_shape(value: Any) -> tuple[int, ...]:
    """A shape as DeepSpeed stores it; ``ValueError`` when it is none."""
    shape = tuple(value)
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < MAX_NUMEL for size in shape):
        raise ValueError("what should be a shape is none")
    return shape


@contextlib.contextmanager
def reading_archive(path: Path) -> Iterator[None]:
    """Turn whatever damaged metadata make a reader raise into one line that names the file."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"the metadata in this file are damaged ({reason})", str(path), COPY_CHECKPOINT) from None


def read_archive(path: Path) -> Any:
    """The object in a ``torch.save`` file as plain data, its tensors as :class:`LazyTensor`.

    Raises:
        UserError: the file is missing, truncated or damaged, or its pickle asks for a name that is not allowed.
    """
    if not path.is_file():
        raise UserError("a file of the checkpoint is missing", str(path), COPY_CHECKPOINT)
    try:
        _check_records(path)
        return _plain(_load(path), path, path.stat().st_size)
    except UserError:
        raise
    except Exception as error:  # whatever damage, or somebody on purpose, makes zipfile or torch stumble over
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"not a whole torch checkpoint file ({reason})", str(path), COPY_CHECKPOINT) from None


def check_checksums(path: Path) -> tuple[int, int]:
    """Compare the records of a ``torch.save`` file with their CRC-32: bytes that have one, and bytes that have none.

    Raises:
        UserError: the file is missing, truncated, or was altered after it was written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            summed = [info for info in archive.infolist() if info.CRC]
            for info in summed:
                with archive.open(info) as record:
                    while record.read(1 << 20):
                        pass
            total, checked = (sum(info.file_size for info in some) for some in (archive.infolist(), summed))
            return checked, total - checked
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
        raise UserError(f"the file was altered after it was written ({error})", str(path), COPY_CHECKPOINT) from None


def exchanged(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Plain data with ``change(x)`` in the place of every ``x`` of type ``kind`` in it."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: exchanged(entry, kind, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(exchanged(entry, kind, change) for entry in value)
    return value
