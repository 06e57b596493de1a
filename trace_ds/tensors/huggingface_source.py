"""A Hugging Face model directory as a source: hub or fused layout, one file or many."""

from __future__ import annotations

from pathlib import Path

from trace_ds.errors import UserError
from trace_ds.tensors.checkpoint import Checkpoint
from trace_ds.tensors.dtypes import DTYPES
from trace_ds.tensors.model_files import read_model_directory
from trace_ds.tensors.runs import Run, TensorSource
from trace_ds.tensors.torch_archive import Storage


def open_huggingface(directory: Path) -> Checkpoint:
    """Every tensor of a model directory under its name on disk (its header and index are checked, nothing is read)."""
    files = read_model_directory(directory)
    tensors: dict[str, TensorSource] = {}
    for name, entry in files.tensors.items():
        if entry.dtype not in DTYPES:
            raise UserError(
                f"{name} is stored as {entry.dtype}, which cannot be converted",
                str(directory / entry.file),
                "use a model in bf16, fp16 or fp32",
            )
        storage = Storage(directory / entry.file, name, entry.begin, entry.elements, DTYPES[entry.dtype])
        tensors[name] = TensorSource(name, tuple(entry.shape), storage.dtype, (Run(storage, 0, entry.elements),))
    return Checkpoint(directory, "huggingface", tensors, files=list(files.files))
