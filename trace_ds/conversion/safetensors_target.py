"""Write a Hugging Face model directory: shards whose layout is known before the first byte is read.

Shapes and types decide where every tensor lies, so the headers are written first and any thread can put any tensor in
its place. Grouping into shards is that of ``huggingface_hub`` (fill in order, start a new shard when the next tensor
does not fit), file names and index are those of ``save_pretrained``.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.errors import UserError
from trace_ds.run.files import write_json
from trace_ds.tensors.dtypes import DTYPE_NAMES
from trace_ds.tensors.model_files import INDEX_NAME, SINGLE_NAME
from trace_ds.tensors.runs import TensorSource
from trace_ds.tensors.stream import CopyTask, naming_full_disk

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(text: str, where: str = "max_shard_size") -> int:
    """Bytes of "5GB", "500 MiB" or "1000000"; decimal units as on the hub."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise UserError(f"{text!r} is not a size", where, "write it like 5GB or 500MB")
    return size


def place(
    tensors: Mapping[str, TensorSource], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int, directory: Path
) -> list[CopyTask]:
    """The shards at their full length (sparse) with their headers, and the index if there are several; what is still to
    be written into them, in the order of the files."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, source in tensors.items():
        nbytes = source.numel * dtypes[name].itemsize
        if shards[-1] and filled + nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += nbytes
    tasks: list[CopyTask] = []
    placed: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        # As the safetensors library does: larger element types first, so that every tensor is aligned.
        ordered = [CopyTask(tensors[name], dtypes[name], directory / file, 0) for name in names]
        ordered.sort(key=lambda task: -task.dtype.itemsize)
        begin = 0
        for task in ordered:
            span, begin = [begin, begin + task.nbytes], begin + task.nbytes
            facts = {"dtype": DTYPE_NAMES[task.dtype], "shape": list(task.source.shape)}
            entries[task.source.name] = {**facts, "data_offsets": span}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = struct.pack("<Q", len(text)) + text
        for task in ordered:
            start = entries[task.source.name]["data_offsets"][0]
            tasks.append(replace(task, offset_bytes=len(header) + start))
            placed[task.source.name] = file
        with naming_full_disk(directory / file), (directory / file).open("wb") as handle:
            handle.write(header)
            handle.truncate(len(header) + begin)
    if len(shards) > 1:
        metadata = {
            "total_size": sum(task.nbytes for task in tasks),
            "total_parameters": sum(task.source.numel for task in tasks),
        }
        write_json(directory / INDEX_NAME, {"metadata": metadata, "weight_map": dict(sorted(placed.items()))})
    return tasks
