"""Counting on one rank: batches of routing decisions in, exact additive sums out.

Shape legend: B rows, S positions, T = B·S tokens of a batch, N of them counted, L MoE layers, E experts, K = top-k,
D documents, P pieces: the tokens of one document in one row.

A rank sees a contiguous range of rows, and the pieces of a document are neighbours, so at any moment only one document
is open; only the first and the last document of a rank can continue on a neighbour. Those two are kept apart and merged
over the ranks at the end (O(L·E) each), which makes the document moments exact whatever the sharding.

Nothing here waits for the device: counts are integer scatter-adds (associative, so deterministic on every device), and
gate weights are summed in units of 2^-40 for the same reason: exact for fp32 weights above 2^-17, and off by at most
2^-41 a token below.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from trace_ds.models.routers import RoutingRecorder
from trace_ds.parallel.device import to_device
from trace_ds.parallel.world import World
from trace_ds.routing.statistics import RoutingStatistics

GATE_UNIT = 2.0**-40
SPLIT_DOCUMENTS_AT_ONCE = 32  # of the documents that several ranks hold: int64 [L, E] each
SUMS = (
    ("counts_LE", torch.int64),
    ("gate_mass_LE", torch.float64),
    ("row_gate_LE", torch.float64),
    ("square_LE", torch.int64),
    ("cross_LE", torch.int64),
)
SCALARS = ("square_tokens", "tokens", "documents")


@dataclass
class DocumentCounts:
    """Counts of one document: ``counts_LE`` int64 and its counted ``tokens``."""

    document: int
    counts_LE: torch.Tensor
    tokens: int


@dataclass
class RoutingCounter:
    """Accumulates :class:`RoutingStatistics` over the batches of one rank (int64 and float64, on the device).

    ``not_finite_L`` (bool) says in which layers a gate weight of a counted token was NaN or infinite.
    """

    layers: int
    experts: int
    top_k: int
    device: torch.device
    counts_LE: torch.Tensor = field(init=False)
    gate_mass_LE: torch.Tensor = field(init=False)
    row_gate_LE: torch.Tensor = field(init=False)
    square_LE: torch.Tensor = field(init=False)
    cross_LE: torch.Tensor = field(init=False)
    not_finite_L: torch.Tensor = field(init=False)
    square_tokens: int = 0
    tokens: int = 0
    documents: int = 0
    _first: DocumentCounts | None = None
    _open: DocumentCounts | None = None

    def __post_init__(self) -> None:
        for name, dtype in SUMS:
            setattr(self, name, torch.zeros(self.layers, self.experts, dtype=dtype, device=self.device))
        self.not_finite_L = torch.zeros(self.layers, dtype=torch.bool, device=self.device)

    @torch.no_grad()
    def add(self, recorder: RoutingRecorder, counted_BS: torch.Tensor, document_ids_BS: torch.Tensor) -> torch.Tensor:
        """Add one batch: only positions where ``counted_BS`` (bool, on the CPU) take part.

        ``document_ids_BS`` int64 (on the CPU), non-decreasing over the batch's counted positions in row-major order.

        Returns:
            the selections of each row, int32 [B, L, E] on the device.
        """
        rows_N, columns_N = counted_BS.nonzero(as_tuple=True)
        if not len(rows_N):
            shape = (len(counted_BS), self.layers, self.experts)
            return torch.zeros(shape, dtype=torch.int32, device=self.device)
        # one number a (document, row); a piece is a run of equal ones
        pieces_P, local_N, sizes_P = torch.unique_consecutive(
            document_ids_BS[rows_N, columns_N] * len(counted_BS) + rows_N, return_inverse=True, return_counts=True
        )
        documents, document_of_P = torch.unique_consecutive(pieces_P // len(counted_BS), return_inverse=True)
        sizes = torch.zeros(len(documents), dtype=torch.int64).index_add_(0, document_of_P, sizes_P)
        flat_N = to_device(rows_N * counted_BS.shape[1] + columns_N, self.device)
        local_N, document_of_P, row_of_P = (
            to_device(item, self.device) for item in (local_N, document_of_P, pieces_P % len(counted_BS))
        )
        decisions = [recorder.layer(number) for number in range(self.layers)]
        scores_LNK = torch.stack([scores_TK for scores_TK, _ in decisions])[:, flat_N].double()
        indices_LNK = torch.stack([indices_TK for _, indices_TK in decisions])[:, flat_N].long()
        indices_LNK += torch.arange(self.layers, device=self.device)[:, None, None] * self.experts
        self.not_finite_L |= ~scores_LNK.sum((1, 2)).isfinite()
        tokens_N = to_device(counted_BS.sum(1)[rows_N], self.device)  # of the token's row
        self.gate_mass_LE += self._gates(scores_LNK, indices_LNK)
        self.row_gate_LE += self._gates(scores_LNK / tokens_N[:, None], indices_LNK)
        cells = indices_LNK + local_N[None, :, None] * (self.layers * self.experts)
        counts = torch.zeros(len(pieces_P) * self.layers * self.experts, dtype=torch.int64, device=self.device)
        counts.scatter_add_(0, cells.reshape(-1), torch.ones_like(cells).reshape(-1))
        counts_PLE = counts.view(len(pieces_P), self.layers, self.experts)
        self.counts_LE += counts_PLE.sum(0)
        self.tokens += len(flat_N)
        self._add_documents(documents.tolist(), _summed(counts_PLE, document_of_P, len(documents)), sizes.tolist())
        return _summed(counts_PLE, row_of_P, len(counted_BS)).int()

    def _gates(self, values_LNK: torch.Tensor, cells_LNK: torch.Tensor) -> torch.Tensor:
        """The sum of the values of each expert, float64 [L, E], in whole units."""
        mass_LE = torch.zeros(self.layers * self.experts, dtype=torch.int64, device=self.device)
        mass_LE.scatter_add_(0, cells_LNK.reshape(-1), (values_LNK / GATE_UNIT).round_().long().reshape(-1))
        return mass_LE.view(self.layers, self.experts).double() * GATE_UNIT

    def _add_documents(self, documents: list[int], counts_DLE: torch.Tensor, sizes: list[int]) -> None:
        if self._open is not None and self._open.document == documents[0]:
            counts_DLE[0] += self._open.counts_LE
            sizes[0] += self._open.tokens
        elif self._open is not None:
            if self._first is None:
                self._first = self._open
            else:
                self._finish(self._open.counts_LE[None], [self._open.tokens])
        closed = len(documents) - 1  # all but the last are complete
        begin = 0
        if closed and self._first is None:
            self._first = DocumentCounts(documents[0], counts_DLE[0].clone(), sizes[0])
            begin = 1
        if closed > begin:
            self._finish(counts_DLE[begin:closed], sizes[begin:closed])
        self._open = DocumentCounts(documents[-1], counts_DLE[-1].clone(), sizes[-1])

    def _finish(self, counts_DLE: torch.Tensor, sizes: list[int]) -> None:
        sizes_D = to_device(torch.tensor(sizes, dtype=torch.int64), self.device)
        self.square_LE += (counts_DLE * counts_DLE).sum(0)
        self.cross_LE += (counts_DLE * sizes_D[:, None, None]).sum(0)
        self.square_tokens += sum(size * size for size in sizes)
        self.documents += len(sizes)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as CPU tensors that a safetensors file can hold; see :meth:`restore`."""
        tensors = {name: getattr(self, name).cpu() for name, _ in SUMS}
        tensors["scalars"] = torch.tensor([getattr(self, name) for name in SCALARS], dtype=torch.int64)
        for name, item in (("first", self._first), ("open", self._open)):
            if item is not None:
                tensors[name] = item.counts_LE.cpu()
                tensors[f"{name}_scalars"] = torch.tensor([item.document, item.tokens], dtype=torch.int64)
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, torch.Tensor]) -> None:
        """Continue exactly where :meth:`state` was taken."""
        for name, _ in SUMS:
            setattr(self, name, tensors[name].to(self.device))
        for name, value in zip(SCALARS, tensors["scalars"].tolist(), strict=True):
            setattr(self, name, value)
        for name in ("first", "open"):
            if name in tensors:
                document, tokens = tensors[f"{name}_scalars"].tolist()
                setattr(self, f"_{name}", DocumentCounts(document, tensors[name].to(self.device), tokens))

    def reduce(self, world: World) -> RoutingStatistics:
        """All-reduce over the whole data-parallel world (not the expert-parallel group) and merge split documents."""
        self._merge_boundaries(world)
        sums: dict[str, Any] = {
            name: (world.sum_int64 if dtype == torch.int64 else world.sum_float64)(getattr(self, name).cpu().numpy())
            for name, dtype in SUMS
        }
        scalars = world.sum_int64(np.array([getattr(self, name) for name in SCALARS]))
        statistics = RoutingStatistics(**sums, **dict(zip(SCALARS, scalars.tolist(), strict=True)), top_k=self.top_k)
        assert (statistics.counts_LE.sum(1) == statistics.top_k * statistics.tokens).all()
        return statistics

    def _merge_boundaries(self, world: World) -> None:
        """Complete the first and the last document of every rank, whose other tokens other ranks may hold (collective).

        Only documents of two ranks or more are exchanged, a few at a time: no rank ever holds the counts of all ranks.
        """
        own = [item for item in (self._first, self._open) if item is not None]
        self._first = self._open = None
        ids_R2 = np.zeros((world.size, 2), dtype=np.int64)  # 0: none
        ids_R2[world.rank, : len(own)] = [item.document + 1 for item in own]
        ids_R2 = world.sum_int64(ids_R2)
        documents, holders = np.unique(ids_R2[ids_R2 > 0] - 1, return_counts=True)
        split = documents[holders > 1]
        for item in own:
            if item.document not in split:
                self._finish(item.counts_LE[None], [item.tokens])
        for start in range(0, len(split), SPLIT_DOCUMENTS_AT_ONCE):
            part = split[start : start + SPLIT_DOCUMENTS_AT_ONCE]
            counts_DLE = np.zeros((len(part), self.layers, self.experts), dtype=np.int64)
            tokens_D = np.zeros(len(part), dtype=np.int64)
            for item in own:
                for place in np.flatnonzero(part == item.document):
                    counts_DLE[place], tokens_D[place] = item.counts_LE.cpu().numpy(), item.tokens
            counts_DLE, tokens_D = world.sum_int64(counts_DLE), world.sum_int64(tokens_D)
            if world.is_main:  # on one rank only: `reduce` adds up what each rank has finished
                self._finish(torch.from_numpy(counts_DLE).to(self.device), tokens_D.tolist())


def _summed(counts_PLE: torch.Tensor, place_P: torch.Tensor, places: int) -> torch.Tensor:
    """The counts of all pieces of a place, int64 [places, L, E]."""
    return counts_PLE.new_zeros(places, *counts_PLE.shape[1:]).index_add_(0, place_P, counts_PLE)
