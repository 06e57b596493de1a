"""Reading small files that a user, another program, a broken disk or an attacker wrote.

Only regular files are read (a device may have no end, a pipe never answer), and only so many bytes, whatever the file
system says their size is. Damage of any kind is one line that names the file, with exit status 2: :func:`reading`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from trace_ds.errors import UserError

MAX_BYTES = 1 << 28  # an index of a million tensors has half of this
NAME_LENGTH = 255  # of a directory


@contextlib.contextmanager
def reading(path: Path, label: str, fix: str) -> Iterator[None]:
    """Turn any error of reading one file, or of using a value in it, into a :class:`UserError` that names the file."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise UserError(f"{label} cannot be read ({reason})", str(path), fix) from None
    except Exception as error:  # each library has errors of its own, and a damaged file can cause any of them
        reason = " ".join(str(error).split())[:200]
        reason = f"{type(error).__name__} {reason}" if isinstance(error, (LookupError, TypeError)) else reason
        raise UserError(f"{label} is damaged ({reason or type(error).__name__})", str(path), fix) from None


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read its bytes; OSError for a device, a pipe, a socket or a directory."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe without a writer would block
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """All bytes of a regular file (OSError for anything else); ``ValueError`` for more than ``limit`` bytes."""
    with open_regular(path) as handle:
        data = handle.read(limit + 1)
    if len(data) > limit:
        raise ValueError(f"more than {limit:,} bytes")
    return data


def read_text(path: Path, label: str, fix: str, limit: int = MAX_BYTES) -> str:
    """The text of a UTF-8 file, without a byte order mark; :class:`UserError` as by :func:`reading`."""
    with reading(path, label, fix):
        return read_bytes(path, limit).decode("utf-8-sig")


def read_object(path: Path, label: str, fix: str, *, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in a file; with ``infinite`` it may hold NaN and infinities, as models' configurations do.

    Raises:
        UserError: it cannot be read, is no JSON object, or holds NaN, an infinity, half of a surrogate pair, or what is
            nested or long beyond anything that we write; names the file, with ``fix``.
    """
    text = read_text(path, label, fix)
    with reading(path, label, fix):
        value = json.loads(text, parse_constant=None if infinite else _refuse)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode()  # fails on half of a surrogate pair
    return value


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def typed(raw: dict[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    """The values of ``kinds``; ``ValueError`` when one is missing or of another type (True is no number)."""
    for name, kind in kinds.items():
        value = raw.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
            raise ValueError(f"{name} is {'missing' if name not in raw else f'a {type(value).__name__}'}")
    return {name: raw[name] for name in kinds}


def file_entries(raw: Any) -> dict[str, dict[str, Any]]:
    """``{name: {bytes, sha256}}``, checked; ``ValueError`` when it is none or a name leads out of the folder."""
    if not isinstance(raw, dict):
        raise ValueError("files is no JSON object")
    for name, entry in raw.items():
        if not isinstance(entry, dict):
            raise ValueError(f"the entry of {name[:100]!r} is no JSON object")
        typed(entry, {"bytes": int, "sha256": str})
        if not name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{name[:100]!r} is no name of a file in this folder")
    return raw


def text_values(raw: dict[str, Any], name: str) -> None:
    """``ValueError`` unless every value of the object ``raw[name]`` is text."""
    if not all(isinstance(value, str) for value in raw[name].values()):
        raise ValueError(f"{name} holds what is no text")


def named_by(path: Path, pointer: str) -> Path | None:
    """The directory that the file ``path/pointer`` names, if there is one."""
    if not (path / pointer).is_file():
        return None
    name = pointed(path / pointer)
    return path / name if name and Path(name).name == name and (path / name).is_dir() else None


def pointed(pointer: Path) -> str:
    """The name in a pointer file."""
    with pointer.open("rb") as handle:
        return handle.read(NAME_LENGTH).decode(errors="replace").strip().replace("\0", "")
