"""Read any range of any tensor of a model directory, by transformers' in-memory names.

Names and pieces come from transformers' own weight mapping (:mod:`trace_ds.tensors.layouts`); bytes are read at
their place in the safetensors files, so a process that holds an eighth of a tensor reads an eighth of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from trace_ds.errors import UserError
from trace_ds.tensors.layouts import ModelLayout, engine_pieces
from trace_ds.tensors.model_files import COPY_AGAIN
from trace_ds.tensors.opening import open_model
from trace_ds.tensors.runs import Run, TensorSource, extract, merge_adjacent, pieces_of
from trace_ds.tensors.stream import read_all
from trace_ds.tensors.torch_archive import bytes_of

READ_BLOCK_NUMEL = 1 << 22
PROOF_SAMPLES = 32
PROOF_NUMEL = 64


@dataclass(frozen=True)
class WeightFiles:
    """The tensors of a model directory, on disk.

    Attributes:
        sources: every tensor by its in-memory name.
        engine: those that AutoEP renames or cuts, by its names.
        handles: the files opened so far; see :meth:`close`.
        refuses_nan: whether :meth:`read` does.
    """

    path: Path
    layout: ModelLayout
    sources: dict[str, TensorSource]
    engine: dict[str, TensorSource]
    handles: dict[Path, IO[bytes]] = field(default_factory=dict)
    refuses_nan: bool = True

    @classmethod
    def open(cls, path: Path, layout: ModelLayout) -> WeightFiles:
        """Headers and index only; errors are those of :func:`open_model`."""
        sources = open_model(path, layout)
        merged = {name: merge_adjacent(source) for name, source in sources.items()}
        pieces = engine_pieces(layout).items()
        engine = {name: extract(name, piece.shape, piece.blocks, merged[piece.whole]) for name, piece in pieces}
        return cls(path, layout, merged, engine)

    def source(self, name: str) -> TensorSource:
        """The whole tensor of an in-memory, engine or tied name; ``KeyError`` when the model has none of it."""
        name = self.layout.tied.get(name, name)
        return self.engine[name] if name in self.engine else self.sources[name]

    def read(self, source: TensorSource, start: int, out: torch.Tensor) -> None:
        """Fill the contiguous ``out`` with the elements of ``source`` from ``start`` on, cast to its type.

        Raises:
            UserError: a file ends too early, or holds NaN there (the tensor and the file are named).
        """
        flat = out.view(-1)
        for where, descriptor, run in self._parts(source, start, flat.numel()):
            block = torch.empty(run.numel, dtype=run.storage.dtype)
            read_all(descriptor, bytes_of(block), run.offset_bytes, run.storage.path)
            if self.refuses_nan and block.is_floating_point() and bool(block.isnan().any()):
                raise UserError(f"the weights {run.storage.name} hold NaN", str(run.storage.path), COPY_AGAIN)
            flat[where].copy_(block)

    def _parts(self, source: TensorSource, start: int, numel: int) -> Iterator[tuple[slice, int, Run]]:
        """``numel`` elements from ``start`` on, block by block: their places among them, the open file, where it is."""
        done = 0
        for run in chain.from_iterable(pieces_of(source.slice_runs(start, numel), READ_BLOCK_NUMEL)):
            path = run.storage.path
            handle = self.handles.get(path) or self.handles.setdefault(path, path.open("rb"))
            yield slice(done, done + run.numel), handle.fileno(), run
            done += run.numel

    def close(self) -> None:
        """Close the files."""
        for handle in self.handles.values():
            handle.close()
        self.handles.clear()

    def prove(self, model: nn.Module, ep: int, ep_rank: int) -> int:
        """Compare samples of every parameter and persistent buffer of a finished engine with the files, bit for bit.

        Evenly spaced samples of :data:`PROOF_NUMEL` elements, at least one in every expert; of a partitioned parameter
        (ZeRO-3) within this rank's partition, at least one in every expert that has elements there.

        Returns:
            How many were compared.

        Raises:
            AssertionError: one differs from the files, or has no counterpart in them.
        """
        compared = 0
        for name, parameter in chain(model.named_parameters(), persistent_buffers(model)):
            try:
                source = self.source(name)
            except KeyError:
                raise AssertionError(f"{name} is not in the files of {self.path}") from None
            values, first, last = local_elements(parameter)
            shape = full_shape(parameter)
            shift = source.numel // ep * ep_rank if source.numel != math.prod(shape) else 0
            experts = math.ceil(shape[0] * (last - first) / math.prod(shape)) if len(shape) == 3 else 0
            samples = max(PROOF_SAMPLES, experts + 1)
            size = min(PROOF_NUMEL, last - first)
            for number in range(samples if size else 0):
                begin = first + (last - first - size) * number // max(samples - 1, 1)
                expected = torch.empty(size, dtype=parameter.dtype)
                self.read(source, shift + begin, expected)
                if not torch.equal(values[begin - first : begin - first + size].cpu(), expected):
                    raise AssertionError(f"{name} differs from the files of {self.path} at element {begin}")
            compared += 1
        return compared


def persistent_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that are saved in the files, by name (for example DeepSeek-V3's score correction bias)."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer


def full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """The shape of a whole parameter, also of one that ZeRO-3 partitioned (its own shape is [0] then)."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def local_elements(parameter: Any) -> tuple[torch.Tensor, int, int]:
    """Return (values, first, last): the flat elements of a parameter on this rank and their range in the whole."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter.detach().reshape(-1), 0, parameter.numel()
    import torch.distributed as dist

    first = dist.get_rank(parameter.ds_process_group) * parameter.ds_tensor.ds_numel
    last = min(first + parameter.ds_tensor.ds_numel, parameter.ds_numel)
    return parameter.ds_tensor.detach().reshape(-1), min(first, last), last
