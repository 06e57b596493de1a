"""Write ``torch.save`` files whose tensors are streamed in later, by any thread, in any order.

``torch.save`` needs every tensor in memory. Under ``torch.serialization.skip_data`` it leaves room for their bytes
instead (a hole in the file, without a checksum); where each lies is read back from the file, and
:class:`~trace_ds.tensors.stream.Streamer` fills it. ``torch.load`` (with ``weights_only=True``) reads the result.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.tensors.runs import TensorSource
from trace_ds.tensors.stream import CopyTask, naming_full_disk
from trace_ds.tensors.torch_archive import read_archive, tensors_of


@dataclass(frozen=True, eq=False)
class Streamed:
    """A tensor in the value to be saved: its bytes come from ``source``, cast to ``dtype``."""

    source: TensorSource
    dtype: torch.dtype


def write_archive(path: Path, value: Any) -> list[CopyTask]:
    """Write ``value``: plain data, tensors, or else room for every :class:`Streamed` in it; returns what fills them."""
    held: list[Streamed] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    with_room = _with_room(value, held)
    skipping = torch.serialization.skip_data() if held else contextlib.nullcontext()
    with naming_full_disk(path), path.open("wb") as handle, skipping:
        try:
            torch.save(with_room, handle)
        except RuntimeError as error:  # torch wraps what its output raises
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
    if not held:
        return []
    offsets = [tensor.storage.offset_bytes for tensor in tensors_of(read_archive(path))]
    return [CopyTask(one.source, one.dtype, path, offset) for one, offset in zip(held, offsets, strict=True)]


def _with_room(value: Any, held: list[Streamed]) -> Any:
    """``value`` with a tensor of which no page is ever touched in the place of every :class:`Streamed`."""
    if isinstance(value, Streamed):
        held.append(value)
        return torch.empty(value.source.shape, dtype=value.dtype)
    if isinstance(value, dict):
        return {key: _with_room(entry, held) for key, entry in value.items()}
    return [_with_room(entry, held) for entry in value] if isinstance(value, list) else value
