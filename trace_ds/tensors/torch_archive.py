"""Read ``torch.save`` files without running anything that is in them, and without loading their tensors.

A ``torch.save`` file is a zip archive of stored (never compressed) records: ``data.pkl``, a pickle in which every
tensor is a reference to a record ``data/N`` that holds the raw bytes. :func:`read_archive` gives plain data: dicts,
lists, tuples, numbers, strings and :class:`LazyTensor`, which knows file and offset of its bytes, so that
ranges are read when, and only when, they are needed.

The pickle is read by ``torch.load`` with ``weights_only=True``, which imports nothing and calls nothing but what is
allowed by name: torch's own list, and stand-ins for the few classes in DeepSpeed's files (so that DeepSpeed need not be
installed). With ``map_location="meta"`` it allocates no tensor and leaves each storage's place in the file. A hostile
file can exhaust the memory or the stack of the process, but not run code.

Source of the layout: PyTorch, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.h``.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import struct
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.dtypes import DTYPE_NAMES

LOCAL_HEADER_BYTES = 30
MAX_PICKLE_BYTES = 1 << 28
MAX_DIMENSIONS = 32
MAX_NUMEL = 1 << 62
COPY_AGAIN = "copy the checkpoint again from where it was written, or convert another step"


@dataclass(frozen=True)
class Storage:
    """A contiguous array in a file: ``numel`` elements of ``dtype`` from ``offset_bytes`` on."""

    path: Path
    record: str
    offset_bytes: int
    numel: int
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


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
            raise UserError(f"the file ends inside {storage.record} (truncated?)", str(storage.path), COPY_AGAIN)
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
    """Stands for an object of a class that is not imported; its fields are those that the pickle gives it."""

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


def _records(path: Path) -> dict[int, zipfile.ZipInfo]:
    """Offset of the data -> the record, after the directory of the archive and its pickle were found undamaged."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        with zipfile.ZipFile(handle) as archive:
            records = {info.filename: info for info in archive.infolist()}
            pickles = [name for name in records if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise zipfile.BadZipFile("no data.pkl in it")
            if records[pickles[0]].file_size > MAX_PICKLE_BYTES:
                raise zipfile.BadZipFile(f"its data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MiB")
            archive.read(pickles[0])  # compares its CRC-32
            order = pickles[0].replace("data.pkl", "byteorder")
            if order in records and archive.read(order) != b"little":
                raise zipfile.BadZipFile("it was written on a big-endian machine")
        return {_data_offset(handle.fileno(), info, size): info for info in records.values()}


def _data_offset(descriptor: int, info: zipfile.ZipInfo, file_bytes: int) -> int:
    header = os.pread(descriptor, LOCAL_HEADER_BYTES, info.header_offset)
    if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04" or info.compress_type != 0:
        raise zipfile.BadZipFile(f"record {info.filename} is damaged")
    name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
    offset = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if offset + info.file_size > file_bytes:
        raise zipfile.BadZipFile(f"record {info.filename} reaches beyond the end of the file")
    return offset


def _plain(value: Any, path: Path, records: dict[int, zipfile.ZipInfo]) -> Any:
    """Plain data and tensors that know where they lie, from what :func:`_load` made."""
    if isinstance(value, torch.Tensor):
        return _lazy(value, path, records)
    if isinstance(value, dict):
        return {key: _plain(entry, path, records) for key, entry in value.items()}
    if isinstance(value, (list, set)):
        return [_plain(entry, path, records) for entry in value]
    if isinstance(value, tuple):
        return tuple(_plain(entry, path, records) for entry in value)
    if isinstance(value, _Object):
        return _plain(vars(value), path, records)
    if value is None or isinstance(value, (bool, int, float, str, bytes, torch.dtype, torch.device)):
        return value
    raise ValueError(f"a {type(value).__name__}")


def _lazy(tensor: torch.Tensor, path: Path, records: dict[int, zipfile.ZipInfo]) -> LazyTensor:
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES or not tensor.is_contiguous():
        raise ValueError(f"a tensor of {tensor.dtype}, {tensor.layout}, strides {tensor.stride()}")
    storage, shape, start = tensor.untyped_storage(), tuple(tensor.shape), int(tensor.storage_offset())
    offset, nbytes = storage._checkpoint_offset, storage.nbytes()
    info = None if offset is None else records.get(offset)
    if (
        offset is None
        or info is None
        or info.file_size != nbytes
        or (start + tensor.numel()) * tensor.dtype.itemsize > nbytes
    ):
        raise ValueError("the record of a tensor is missing or has another size than the pickle says")
    record, numel = info.filename.partition("/")[2], nbytes // tensor.dtype.itemsize
    return LazyTensor(Storage(path, record, offset, numel, tensor.dtype), start, shape)


def plain_shape(value: Any) -> tuple[int, ...]:
    """A shape as DeepSpeed stores it; ``ValueError`` when it is none."""
    shape = tuple(value)
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < MAX_NUMEL for size in shape):
        raise ValueError("what should be a shape is none")
    return shape


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Whatever a file that somebody else, or a broken disk, wrote makes a reader stumble over: one line."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"the metadata in this file are damaged ({found})", str(path), COPY_AGAIN) from None


def read_archive(path: Path) -> Any:
    """The object in a ``torch.save`` file as plain data, its tensors as :class:`LazyTensor`.

    Raises:
        UserError: the file is missing, truncated or damaged, or its pickle asks for a name that is not allowed.
    """
    if not path.is_file():
        raise UserError("a file of the checkpoint is missing", str(path), COPY_AGAIN)
    try:
        records = _records(path)
        return _plain(_load(path), path, records)
    except UserError:
        raise
    except Exception as error:  # whatever damage, or somebody on purpose, makes zipfile or torch stumble over
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"not a whole torch checkpoint file ({reason})", str(path), COPY_AGAIN) from None


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
        raise UserError(f"the file was altered after it was written ({error})", str(path), COPY_AGAIN) from None


def exchanged(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Plain data with ``change(x)`` in the place of every ``x`` of type ``kind`` in it."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, dict):
        return {key: exchanged(entry, kind, change) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(exchanged(entry, kind, change) for entry in value)
    return value


def tensors_of(value: Any) -> list[LazyTensor]:
    """Every tensor in an object that :func:`read_archive` returned."""
    found: list[LazyTensor] = []
    exchanged(value, LazyTensor, found.append)
    return found
