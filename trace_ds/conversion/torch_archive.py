"""Read ``torch.save`` files without running anything that is in them, and without loading their tensors.

A ``torch.save`` file is a zip archive of stored (never compressed) records: ``data.pkl``, a pickle in which every
tensor is a reference to a record ``data/N`` that holds the raw bytes. :func:`read_archive` unpickles with an
allow-list: containers, numbers and tensors become Python containers, numbers and :class:`LazyTensor`; classes of
DeepSpeed and NumPy become inert stand-ins that only remember their arguments (so neither package is imported, no
code of theirs runs); any other name in the pickle is refused. A :class:`LazyTensor` knows the file, the offset and the
CRC-32 of its bytes, so that ranges can be read when, and only when, they are needed.

Source of the layout: PyTorch, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.h``.
"""

from __future__ import annotations

import collections
import math
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
INERT_PACKAGES = ("deepspeed", "numpy", "trace_ds")
LOCAL_HEADER_BYTES = 30
MAX_PICKLE_BYTES = 1 << 30


@dataclass(frozen=True)
class Storage:
    """A contiguous array in a file: ``numel`` elements of ``dtype`` from ``offset_bytes`` on.

    ``crc32`` is the checksum the writer left of exactly these bytes, or None if there is none.
    """

    path: Path
    record: str
    offset_bytes: int
    numel: int
    dtype: torch.dtype
    crc32: int | None = None

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
        """The tensor itself (for small ones: optimizer steps, tests)."""
        storage = self.storage
        nbytes = self.numel() * storage.dtype.itemsize
        with storage.path.open("rb") as handle:
            handle.seek(storage.offset_bytes + self.start * storage.dtype.itemsize)
            data = handle.read(nbytes)
        if len(data) != nbytes:
            raise UserError(f"the file ends inside {storage.record} (truncated?)", str(storage.path), COPY_AGAIN)
        if not nbytes:
            return torch.empty(self.shape, dtype=storage.dtype)
        return torch.frombuffer(bytearray(data), dtype=storage.dtype).reshape(self.shape)


COPY_AGAIN = "copy the checkpoint again from where it was written, or convert another step"


class Inert:
    """Stand-in for an object of a class that is not imported: remembers how the pickle built it, does nothing."""

    qualified_name = ""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def field(self, name: str) -> Any:
        """Attribute ``name`` of the object that the pickle describes (a dataclass or plain object)."""
        state = self.__dict__.get("state")
        if isinstance(state, tuple) and len(state) == 2:
            state = {**(state[0] or {}), **(state[1] or {})}
        if not isinstance(state, dict) or name not in state:
            raise KeyError(name)
        return state[name]


def plain_number(value: Any) -> int:
    """The integer of an int or of a stand-in for an int enum."""
    if isinstance(value, Inert):
        value = value.__dict__.get("args", (None,))[0]
    if not isinstance(value, int):
        raise ValueError(f"expected an integer, found {type(value).__name__}")
    return int(value)


def scalar(tensor: LazyTensor) -> float:
    """The number in a tensor of one element; ``ValueError`` when it has more."""
    if tensor.numel() != 1:
        raise ValueError(f"expected one number, found a tensor of shape {tensor.shape}")
    return float(tensor.load())


class _DtypeToken:
    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


class _Unpickler(pickle.Unpickler):
    """Unpickler with an allow-list; every name that is not on it is an error, never an import."""

    def __init__(self, stream: Any, path: Path, storage_of: Callable[[Any], Storage]) -> None:
        super().__init__(stream)
        self._path = path
        self._storage_of = storage_of

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGE_DTYPES:
            return _DtypeToken(STORAGE_DTYPES[name])
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        known: dict[tuple[str, str], Any] = {
            ("torch", "Size"): tuple,
            ("torch", "device"): lambda *args: "cpu",
            ("torch.storage", "UntypedStorage"): _DtypeToken(torch.uint8),
            ("torch._utils", "_rebuild_tensor_v2"): self._tensor,
            ("torch._utils", "_rebuild_parameter"): lambda data, *rest: data,
            ("torch._tensor", "_rebuild_from_type_v2"): lambda build, kind, arguments, state: build(*arguments),
            ("torch", "Tensor"): _DtypeToken(torch.uint8),
            ("torch.nn.parameter", "Parameter"): _DtypeToken(torch.uint8),
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("collections", "defaultdict"): lambda *args: {},
            ("builtins", "set"): set,
            ("builtins", "frozenset"): frozenset,
            ("builtins", "complex"): complex,
            ("builtins", "bytearray"): bytearray,
            ("builtins", "slice"): slice,
            ("_codecs", "encode"): lambda text, encoding="latin1": text.encode("latin1"),
        }
        if (module, name) in known:
            return known[module, name]
        if module.split(".")[0] in INERT_PACKAGES:
            return type(name.rsplit(".", 1)[-1], (Inert,), {"qualified_name": f"{module}.{name}"})
        raise UserError(
            f"the pickle in this file asks for {module}.{name}, which no checkpoint needs: it was refused and "
            "nothing of it was run",
            str(self._path),
            "get the checkpoint from its author again; do not load this file with torch.load",
        )

    def persistent_load(self, pid: Any) -> Storage:
        return self._storage_of(pid)

    def _tensor(self, storage: Storage, start: int, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
        shape = tuple(shape)
        if not all(type(number) is int and number >= 0 for number in (start, *shape)):
            raise ValueError(f"a tensor of shape {shape} from element {start} on")
        if not isinstance(storage, Storage) or not _contiguous(shape, tuple(stride)):
            raise UserError("a tensor in this file is not contiguous", str(self._path), COPY_AGAIN)
        if start + math.prod(shape) > storage.numel:
            raise UserError(f"a tensor reaches beyond its record {storage.record}", str(self._path), COPY_AGAIN)
        return LazyTensor(storage, start, shape)


class _Archive:
    """The records of one ``torch.save`` file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file_bytes = path.stat().st_size
        with path.open("rb") as handle:
            with zipfile.ZipFile(handle) as archive:
                self.records = {info.filename: info for info in archive.infolist()}
                pickles = [name for name in self.records if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise zipfile.BadZipFile("no data.pkl in it")
                self.prefix = pickles[0][: -len("data.pkl")]
                if self.records[pickles[0]].file_size > MAX_PICKLE_BYTES:
                    raise zipfile.BadZipFile("its data.pkl is larger than 1 GiB")
            # torch.serialization.set_crc32_options(False) writes zero for every checksum.
            self.has_checksums = self.records[pickles[0]].CRC != 0
            self.pickle = self._read(handle.fileno(), self.records[pickles[0]])
            order = self.records.get(f"{self.prefix}byteorder")
            if order is not None and self._read(handle.fileno(), order) != b"little":
                raise zipfile.BadZipFile("it was written on a big-endian machine")
            self._offsets = {
                name: self._data_offset(handle.fileno(), info)
                for name, info in self.records.items()
                if name.startswith(f"{self.prefix}data/")
            }

    def _read(self, descriptor: int, info: zipfile.ZipInfo) -> bytes:
        data = os.pread(descriptor, info.file_size, self._data_offset(descriptor, info))
        if self.has_checksums and zlib.crc32(data) != info.CRC:
            raise zipfile.BadZipFile(f"record {info.filename} is damaged: its CRC-32 differs")
        return data

    def _data_offset(self, descriptor: int, info: zipfile.ZipInfo) -> int:
        header = os.pread(descriptor, LOCAL_HEADER_BYTES, info.header_offset)
        if len(header) < LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04" or info.compress_type != 0:
            raise zipfile.BadZipFile(f"record {info.filename} is damaged")
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        offset = info.header_offset + LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        if offset + info.file_size > self.file_bytes:
            raise zipfile.BadZipFile(f"record {info.filename} reaches beyond the end of the file")
        return offset

    def storage(self, pid: Any) -> Storage:
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _DtypeToken):
            raise zipfile.BadZipFile("it refers to a storage in a way that torch.save never does")
        _, token, key, _, numel = pid
        record = f"{self.prefix}data/{key}"
        info = self.records.get(record)
        if token.dtype == torch.uint8 and info is not None:
            numel = info.file_size
        if info is None or type(numel) is not int or info.file_size != numel * token.dtype.itemsize:
            raise zipfile.BadZipFile(f"record data/{key} is missing or has another size than the pickle says")
        checksum = info.CRC if self.has_checksums else None
        return Storage(self.path, f"data/{key}", self._offsets[record], numel, token.dtype, checksum)


# What an unpickler can stumble over in a file that somebody else, or a broken disk, wrote.
_PICKLE_ERRORS = (
    pickle.UnpicklingError,
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


def read_archive(path: Path) -> Any:
    """The object in a ``torch.save`` file, its tensors as :class:`LazyTensor`.

    Raises:
        UserError: the file is missing, truncated or damaged, or its pickle asks for a name that is not allowed.
    """
    if not path.is_file():
        raise UserError("a file of the checkpoint is missing", str(path), COPY_AGAIN)
    try:
        archive = _Archive(path)
        stream = _BytesReader(archive.pickle)
        return _Unpickler(stream, path, archive.storage).load()
    except UserError:
        raise
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:  # the last: of another zip version
        raise UserError(f"not a whole torch checkpoint file ({error})", str(path), COPY_AGAIN) from None
    except _PICKLE_ERRORS as error:
        raise UserError(
            f"the pickle in this file is damaged or hostile ({type(error).__name__}: {error})", str(path), COPY_AGAIN
        ) from None


def tensors_of(value: Any) -> Iterator[LazyTensor]:
    """Every tensor in an object that :func:`read_archive` returned."""
    if isinstance(value, LazyTensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_of(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from tensors_of(entry)


class _BytesReader:
    """A minimal read-only stream over bytes (``io.BytesIO`` would copy a pickle of hundreds of megabytes)."""

    def __init__(self, data: bytes) -> None:
        self._view = memoryview(data)
        self._position = 0

    def read(self, size: int = -1) -> bytes:
        end = len(self._view) if size < 0 else self._position + size
        block = bytes(self._view[self._position : end])
        self._position += len(block)
        return block

    def readinto(self, buffer: Any) -> int:
        block = self.read(len(buffer))
        buffer[: len(block)] = block
        return len(block)

    def readline(self) -> bytes:
        rest = bytes(self._view[self._position : self._position + 65536])
        end = rest.find(b"\n") + 1 or len(rest)
        self._position += end
        return rest[:end]
