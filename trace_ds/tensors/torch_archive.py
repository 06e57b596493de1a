"""Read ``torch.save`` files without running anything that is in them, and without loading their tensors.

A ``torch.save`` file is a zip archive of stored (never compressed) records: ``data.pkl``, a pickle in which every
tensor is a reference to a record ``data/N`` that holds the raw bytes. :func:`read_archive` gives plain data: dicts,
lists, tuples, numbers, strings and :class:`LazyTensor`, which knows file, offset and CRC-32 of its bytes, so that
ranges are read when, and only when, they are needed.

torch's own loader with ``weights_only=True`` runs no code either, but a hostile file takes it down: a tuple two million
deep as a key ends the process by a signal, thirty calls of ``_codecs.encode`` fill the memory. So the pickle's opcodes
are read here one by one (``pickletools``). Nothing is imported and nothing is called: an object of a known package
becomes its state, any other name is refused, and opcodes, nesting and size of the result are limited.

Source of the layout: PyTorch, ``torch/serialization.py`` and ``caffe2/serialize/inline_container.h``.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trace_ds.errors import UserError
from trace_ds.tensors.dtypes import STORAGE_DTYPES

LOCAL_HEADER_BYTES = 30
MAX_PICKLE_BYTES = 1 << 28
MAX_OPCODES = 1 << 22
MAX_VALUES = 1 << 21  # of the result, an object counted wherever it stands
MAX_DEPTH = 64
MAX_DIMENSIONS = 32
MAX_NUMEL = 1 << 62
COPY_AGAIN = "copy the checkpoint again from where it was written, or convert another step"


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
                raise zipfile.BadZipFile(f"its data.pkl is larger than {MAX_PICKLE_BYTES >> 20} MiB")
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
        if info.CRC and zlib.crc32(data) != info.CRC:
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
        """The record that a pickle refers to; where it lies is what the archive's directory says."""
        if not isinstance(pid, tuple) or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            raise ValueError("it refers to a storage in a way that torch.save never does")
        _, kind, key, _, numel = pid
        dtype = torch.uint8 if kind == ("torch.storage", "UntypedStorage") else STORAGE_DTYPES.get(kind.name)
        record = f"{self.prefix}data/{key}"
        info = self.records.get(record)
        if dtype is None or info is None or type(numel) is not int or info.file_size != numel * dtype.itemsize:
            raise ValueError(f"record data/{key} is missing or has another size than the pickle says")
        # A checksum of zero: none was written (torch.serialization.set_crc32_options, or a streamed file).
        return Storage(self.path, f"data/{key}", self._offsets[record], numel, dtype, info.CRC or None)


class _Name(NamedTuple):
    """A name in a pickle: never imported, never called."""

    module: str
    name: str


class _Object:
    """What a pickle says of an object: what it is made from and its state."""

    __slots__ = ("arguments", "state")

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments, self.state = arguments, None

    def plain(self) -> Any:
        """Its fields, else the one argument it is made from (an enum's number), else all of them."""
        if isinstance(self.state, tuple) and len(self.state) == 2:  # (fields, slots)
            return {**(self.state[0] or {}), **(self.state[1] or {})}
        if self.state is not None:
            return self.state
        return self.arguments[0] if len(self.arguments) == 1 else self.arguments


# Objects of these packages become their state.
PLAIN_PACKAGES = ("deepspeed", "numpy", "trace_ds")
# Python 3.11.0 to 3.11.3 pickle a member of an enum by its name.
ENUM_MEMBERS = {"ZeroStageEnum": {"disabled": 0, "optimizer_states": 1, "gradients": 2, "weights": 3}}
_VALUES = {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "SHORT_BINSTRING",
           "BINSTRING", "SHORT_BINBYTES", "BINBYTES"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_KEYS = (str, int, float, bool, type(None), torch.dtype)


def _shallow(key: Any) -> Any:
    """``key``, if it may be hashed: that goes to the bottom of a tuple, however deep."""
    if isinstance(key, _KEYS) or (type(key) is tuple and all(isinstance(part, _KEYS) for part in key)):
        return key
    raise ValueError(f"a key of type {type(key).__name__}")


class _Pickle:
    """An interpreter of the opcodes that ``torch.save`` writes (pickle protocols 2 to 4)."""

    def __init__(self, archive: _Archive) -> None:
        self.archive = archive
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.values = 0

    def read(self) -> Any:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(self.archive.pickle)):
            if number >= MAX_OPCODES:
                raise ValueError(f"more than {MAX_OPCODES} opcodes")
            if opcode.name == "STOP":
                (result,) = self.stack  # nothing else was made: torch's loader, which may follow, makes it too
                return self._plain(result, 0)
            self._step(opcode.name, argument)
        raise ValueError("no end")  # genops itself says so

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(self._popped(_TUPLES[name]))]
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name in ("TUPLE", "APPENDS", "ADDITEMS", "SETITEMS"):
            items, self.stack = stack, self.marks.pop()
            if name == "TUPLE":
                self.stack.append(tuple(items))
            else:
                self._extend(dict if name == "SETITEMS" else list, items)
        elif name in ("APPEND", "SETITEM"):
            count = 1 if name == "APPEND" else 2
            items = self._popped(count)
            del stack[-count:]
            self._extend(list if name == "APPEND" else dict, items)
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._push_name(argument)
        elif name in ("REDUCE", "NEWOBJ"):
            arguments = stack.pop()
            stack[-1] = self._made(stack[-1], arguments)
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], _Object):
                stack[-1].state = state
            elif not isinstance(stack[-1], dict):  # an OrderedDict's attributes: nobody reads them
                raise ValueError(f"state of a {type(stack[-1]).__name__}")
        elif name == "BINPERSID":
            stack[-1] = self.archive.storage(stack[-1])
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"opcode {name}, which torch.save never writes")

    def _popped(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise ValueError("an empty stack")
        return self.stack[-count:]

    def _extend(self, kind: Any, items: list[Any]) -> None:
        target: Any = self.stack[-1]
        if type(target) is not kind:
            raise ValueError(f"items for a {type(target).__name__}")
        if kind is list:
            target.extend(items)
            return
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[_shallow(key)] = value

    def _push_name(self, argument: str | None) -> None:
        parts = argument.split(" ", 1) if argument is not None else [self.stack.pop(-2), self.stack.pop()]
        module, name = (str(part) for part in parts)
        module = "builtins" if module == "__builtin__" else module
        dtype = getattr(torch, name, None) if module == "torch" and name.isidentifier() else None
        self.stack.append(dtype if isinstance(dtype, torch.dtype) else _Name(module, name))

    def _made(self, kind: Any, arguments: Any) -> Any:
        """What calling ``kind`` would have made, as plain data."""
        if not isinstance(kind, _Name) or type(arguments) is not tuple:
            raise ValueError(f"a call of a {type(kind).__name__}")
        if kind == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor(*arguments)
        if kind == ("torch._utils", "_rebuild_parameter"):
            return arguments[0]
        if kind == ("torch._tensor", "_rebuild_from_type_v2"):
            return self._made(arguments[0], arguments[2])
        if kind == ("torch", "Size"):
            return plain_shape(arguments[0])
        if kind == ("torch", "device") and isinstance(arguments[0], str):
            return arguments[0]
        if kind == ("collections", "OrderedDict") and not arguments:
            return {}
        if kind == ("collections", "defaultdict"):
            return {}
        if kind == ("builtins", "set"):
            return [_shallow(item) for item in arguments[0]]
        if kind == ("_codecs", "encode"):  # bytes, as protocol 2 pickles them
            text, encoding = arguments
            if isinstance(text, str) and encoding == "latin1":
                return text.encode("latin1")
        if kind == ("builtins", "getattr"):
            owner, member = arguments
            if isinstance(owner, _Name) and owner.name in ENUM_MEMBERS:
                return ENUM_MEMBERS[owner.name][member]
        if kind.module.split(".")[0] in PLAIN_PACKAGES:
            return _Object(arguments)
        raise self._refusal(kind)

    def _refusal(self, name: _Name) -> UserError:
        return UserError(
            f"the pickle in this file asks for {ascii(name.module + '.' + name.name)[1:100].rstrip(chr(39))}, which no "
            "checkpoint needs in this way: it was refused and nothing of it was run",
            str(self.archive.path),
            "get the checkpoint from its author again; do not load this file with torch.load",
        )

    def _tensor(self, storage: Storage, start: int, shape: Any, stride: Any, *rest: Any) -> LazyTensor:
        shape, stride, start = plain_shape(shape), plain_shape(stride), plain_shape((start,))[0]
        if not isinstance(storage, Storage) or not _contiguous(shape, stride):
            raise ValueError("a tensor is not contiguous")
        if start + math.prod(shape) > storage.numel:
            raise ValueError(f"a tensor reaches beyond its record {storage.record}")
        return LazyTensor(storage, start, shape)

    def _plain(self, value: Any, depth: int) -> Any:
        """The result without sharing: a list in many places, or in itself, must not cost more than it is worth."""
        self.values += 1
        if depth > MAX_DEPTH or self.values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values, or nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            return {key: self._plain(entry, depth + 1) for key, entry in value.items()}
        if isinstance(value, list):
            return [self._plain(entry, depth + 1) for entry in value]
        if type(value) is tuple:
            return tuple(self._plain(entry, depth + 1) for entry in value)
        if isinstance(value, _Object):
            return self._plain(value.plain(), depth + 1)
        if isinstance(value, _Name) and value.module.split(".")[0] not in (*PLAIN_PACKAGES, "torch"):
            raise self._refusal(value)
        if isinstance(value, (_Name, Storage)):
            return None  # a class or a bare storage: of no use without what it belongs to
        return value


def plain_shape(value: Any) -> tuple[int, ...]:
    """A shape as DeepSpeed stores it; ``ValueError`` when it is none."""
    shape = tuple(value)
    if len(shape) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < MAX_NUMEL for size in shape):
        raise ValueError("what should be a shape is none")
    return shape


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


@contextlib.contextmanager
def reading(path: Path, what: str = "the metadata in this file are damaged") -> Iterator[None]:
    """Whatever a file that somebody else, or a broken disk, wrote makes a reader stumble over: one line."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, MemoryError) as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{what} ({found})", str(path), COPY_AGAIN) from None


def read_archive(path: Path) -> Any:
    """The object in a ``torch.save`` file as plain data, its tensors as :class:`LazyTensor`.

    Raises:
        UserError: the file is missing, truncated or damaged, or its pickle asks for a name that is not allowed.
    """
    if not path.is_file():
        raise UserError("a file of the checkpoint is missing", str(path), COPY_AGAIN)
    try:
        with reading(path, "the pickle in this file is damaged or hostile"):
            return _Pickle(_Archive(path)).read()
    except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:  # the last: of another zip version
        raise UserError(f"not a whole torch checkpoint file ({error})", str(path), COPY_AGAIN) from None


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
