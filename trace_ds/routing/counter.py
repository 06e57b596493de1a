"""Counting on one rank: batches of routing decisions in, exact additive sums out.

Shape legend: B rows, S positions, T = B·S tokens of a batch, L MoE layers, E experts, K = top-k, D documents.

A rank sees a contiguous range of rows, and the pieces of a document are neighbours, so at any moment only one document
is open; only the first and the last document of a rank can continue on a neighbour. Those two are kept apart and merged
over the ranks at the end (O(L·E) each), which makes the document moments exact whatever the sharding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from trace_ds.models.routers import RoutingRecorder
from trace_ds.parallel.world import World
from trace_ds.routing.statistics import RoutingStatistics


@dataclass
class DocumentCounts:
    """Counts of one document: ``counts_LE`` int64 and its counted ``tokens``."""

    document: int
    counts_LE: torch.Tensor
    tokens: int


@dataclass
class RoutingCounter:
    """Accumulates :class:`RoutingStatistics` over the batches of one rank (int64 and float64, on the device)."""

    layers: int
    experts: int
    top_k: int
    device: torch.device
    counts_LE: torch.Tensor = field(init=False)
    gate_mass_LE: torch.Tensor = field(init=False)
    square_LE: torch.Tensor = field(init=False)
    cross_LE: torch.Tensor = field(init=False)
    square_tokens: int = 0
    tokens: int = 0
    documents: int = 0
    _first: DocumentCounts | None = None
    _open: DocumentCounts | None = None

    def __post_init__(self) -> None:
        for name, dtype in (
            ("counts_LE", torch.int64),
            ("gate_mass_LE", torch.float64),
            ("square_LE", torch.int64),
            ("cross_LE", torch.int64),
        ):
            setattr(self, name, torch.zeros(self.layers, self.experts, dtype=dtype, device=self.device))

    @torch.no_grad()
    def add(self, recorder: RoutingRecorder, counted_BS: torch.Tensor, document_ids_BS: torch.Tensor) -> None:
        """Add one batch: only positions where ``counted_BS`` (bool, on the CPU) take part.

        ``document_ids_BS`` int64 (on the CPU), non-decreasing over the batch's counted positions in row-major order.
        """
        flat = counted_BS.reshape(-1).nonzero().squeeze(1)
        if not len(flat):
            return
        documents, local, sizes = torch.unique_consecutive(
            document_ids_BS.reshape(-1)[flat], return_inverse=True, return_counts=True
        )
        flat_device, local_device = flat.to(self.device), local.to(self.device)
        counts_DLE = torch.empty(len(documents), self.layers, self.experts, dtype=torch.int64, device=self.device)
        for number in range(self.layers):
            scores_TK, indices_TK = recorder.layer(number)
            indices_TK = indices_TK[flat_device]
            counts_DLE[:, number] = torch.bincount(
                (local_device[:, None] * self.experts + indices_TK).reshape(-1),
                minlength=len(documents) * self.experts,
            ).view(len(documents), self.experts)
            # A dense scatter and one sum: deterministic on every device, unlike atomic float additions.
            dense_TE = torch.zeros(len(flat), self.experts, dtype=torch.float64, device=self.device)
            self.gate_mass_LE[number] += dense_TE.scatter_(1, indices_TK, scores_TK[flat_device].to(torch.float64)).sum(
                0
            )
        self.counts_LE += counts_DLE.sum(0)
        self.tokens += len(flat)
        self._add_documents(documents.tolist(), counts_DLE, sizes.tolist())

    def _add_documents(self, documents: list[int], counts_DLE: torch.Tensor, sizes: list[int]) -> None:
        if self._open is not None and self._open.document == documents[0]:
            counts_DLE[0] += self._open.counts_LE
            sizes[0] += self._open.tokens
        elif self._open is not None:
            self._close(self._open)
        closed = len(documents) - 1  # all but the last are complete
        begin = 0
        if closed and self._first is None:
            self._first = DocumentCounts(documents[0], counts_DLE[0].clone(), sizes[0])
            begin = 1
        if closed > begin:
            self._finish(counts_DLE[begin:closed], sizes[begin:closed])
        self._open = DocumentCounts(documents[-1], counts_DLE[-1].clone(), sizes[-1])

    def _close(self, counts: DocumentCounts) -> None:
        if self._first is None:
            self._first = counts
        else:
            self._finish(counts.counts_LE[None], [counts.tokens])

    def _finish(self, counts_DLE: torch.Tensor, sizes: list[int]) -> None:
        sizes_D = torch.tensor(sizes, dtype=torch.int64, device=self.device)
        self.square_LE += (counts_DLE * counts_DLE).sum(0)
        self.cross_LE += (counts_DLE * sizes_D[:, None, None]).sum(0)
        self.square_tokens += sum(size * size for size in sizes)
        self.documents += len(sizes)

    def reduce(self, world: World) -> RoutingStatistics:
        """All-reduce over the whole data-parallel world (not the expert-parallel group) and merge split documents."""
        boundary = [
            (item.document, item.counts_LE.cpu().numpy(), item.tokens)
            for item in (self._first, self._open)
            if item is not None
        ]
        merged: dict[int, tuple[np.ndarray, int]] = {}
        for rank_items in world.gather(boundary):
            for document, counts_LE, tokens in rank_items:
                old_LE, old_tokens = merged.get(document, (0, 0))
                merged[document] = (old_LE + counts_LE, old_tokens + tokens)
        square_LE = world.sum_int64(self.square_LE.cpu().numpy())
        cross_LE = world.sum_int64(self.cross_LE.cpu().numpy())
        scalars = world.sum_int64(np.array([self.square_tokens, self.tokens, self.documents]))
        for counts_LE, tokens in merged.values():
            square_LE = square_LE + counts_LE * counts_LE
            cross_LE = cross_LE + counts_LE * tokens
            scalars = scalars + np.array([tokens * tokens, 0, 1])
        statistics = RoutingStatistics(
            counts_LE=world.sum_int64(self.counts_LE.cpu().numpy()),
            gate_mass_LE=world.sum_float64(self.gate_mass_LE.cpu().numpy()),
            square_LE=square_LE,
            cross_LE=cross_LE,
            square_tokens=int(scalars[0]),
            tokens=int(scalars[1]),
            documents=int(scalars[2]),
            top_k=self.top_k,
        )
        assert (statistics.counts_LE.sum(1) == statistics.top_k * statistics.tokens).all()
        return statistics
