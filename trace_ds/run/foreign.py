"""Small files that somebody else, a broken disk or a hostile hand wrote: plain values, or one line that says why.

Artefacts, manifests, reports, configurations and ``latest`` are read through here. What they call a file is a name
inside their own folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from trace_ds.errors import UserError

MAX_BYTES = 1 << 28  # an index of a million tensors has half of this
NAME_LENGTH = 255  # of a directory


def read_object(path: Path, what: str, fix: str, *, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in a file; with ``infinite`` it may hold NaN and infinities, as models' configurations do.

    Raises:
        UserError: it cannot be read, is no JSON object, or holds NaN, an infinity or what is nested or long beyond
            anything that we write; names the file, with ``fix``.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=None if infinite else _refuse)
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
    except OSError as error:
        raise UserError(f"{what} cannot be read ({error.strerror})", str(path), fix) from None
    except (ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"{what} is damaged ({str(error)[:200] or type(error).__name__})", str(path), fix) from None
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
