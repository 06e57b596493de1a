"""Token datasets: packed rows in an Arrow file, memory-mapped, read by row in any order.

Shape legend: B rows of a batch, S positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from trace_ds.corpora.pack import PackedRow, counted_positions

if TYPE_CHECKING:
    import torch

ROWS_PER_BATCH = 1024
TEXT_START_READ, TEXT_START_CHARACTERS = 400, 160
ROW_SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("document_ids", pa.list_(pa.int32()))])
DOCUMENT_SCHEMA = pa.schema([("source", pa.string()), ("tokens", pa.int64()), ("text_start", pa.string())])


@dataclass(frozen=True)
class Batch:
    """Rows as tensors, filled at the right to the longest one.

    Attributes:
        input_ids_BS: int64 token ids.
        position_ids_BS: int64, restarting at 0 with each document (and with the filling): this is what keeps
            attention inside documents.
        counted_BS: bool, the loss-bearing positions; False in the filling.
        document_ids_BS: int64 document index, -1 in the filling.
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    counted_BS: torch.Tensor
    document_ids_BS: torch.Tensor


class TokenDataset:
    """A memory-mapped file of packed rows; ``row_offsets[i]`` is the flat index of the first token of row i."""

    def __init__(self, table: pa.Table) -> None:
        self._ids = [_flat(chunk) for chunk in table.column("input_ids").chunks]
        self._documents = [_flat(chunk) for chunk in table.column("document_ids").chunks]
        lengths = [np.zeros(1, dtype=np.int64), *(np.diff(offsets).astype(np.int64) for offsets, _ in self._ids)]
        self.row_offsets: np.ndarray = np.cumsum(np.concatenate(lengths))

    @classmethod
    def open(cls, path: Path) -> TokenDataset:
        return cls(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def tokens(self) -> int:
        """Tokens of all rows, counted or not."""
        return int(self.row_offsets[-1])

    def row(self, index: int) -> PackedRow:
        chunk, local = divmod(index, ROWS_PER_BATCH)
        offsets, ids = self._ids[chunk]
        begin, end = offsets[local], offsets[local + 1]
        return PackedRow(ids[begin:end], self._documents[chunk][1][begin:end])

    def batch(self, indices: Sequence[int], pad_id: int, length: int | None = None) -> Batch:
        """Rows as one :class:`Batch`.

        Args:
            indices: row numbers; -1 gives an empty row (filling only), so that every process can take part in every
                collective step.
            pad_id: token id of the filling.
            length: S; default: the longest of the rows (at least 1).
        """
        import torch

        rows = [self.row(index) if index >= 0 else None for index in indices]
        longest = max([len(row.input_ids) for row in rows if row is not None], default=1)
        length = length or longest
        ids = np.full((len(rows), length), pad_id, dtype=np.int64)
        documents = np.full((len(rows), length), -1, dtype=np.int64)
        counted = np.zeros((len(rows), length), dtype=bool)
        for number, row in enumerate(rows):
            if row is not None:
                size = len(row.input_ids)
                ids[number, :size] = row.input_ids
                documents[number, :size] = row.document_ids
                counted[number, :size] = counted_positions(row.document_ids)
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(_restarting_positions(documents)),
            torch.from_numpy(counted),
            torch.from_numpy(documents),
        )

    def counted_flat(self) -> np.ndarray:
        """bool [tokens], the loss-bearing positions in flat token order (one byte a token)."""
        counted = np.zeros(self.tokens, dtype=bool)
        position = 0
        for _, same in self._counted_chunks():
            counted[position : position + len(same)] = same
            position += len(same)
        return counted

    def counted_per_row(self) -> np.ndarray:
        """Loss-bearing positions of each row, int64 [rows]; no more than a chunk's tokens are in memory at a time."""
        found = [np.zeros(0, dtype=np.int64)]
        for offsets, same in self._counted_chunks():
            totals = np.concatenate([[0], np.cumsum(same, dtype=np.int64)])  # reduceat would miscount empty rows
            found.append(np.diff(totals[offsets]))
        return np.concatenate(found)

    def _counted_chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(row offsets from 0, bool [tokens of the chunk]) of each chunk in order."""
        for (offsets, _), (_, documents) in zip(self._ids, self._documents, strict=True):
            starts = offsets - offsets[0]
            same = np.zeros(int(starts[-1]), dtype=bool)
            if len(same):
                values = documents[offsets[0] : offsets[-1]]
                same[:-1] = values[1:] == values[:-1]
                same[np.maximum(starts[1:] - 1, 0)] = False  # the last position of each row
            yield starts, same

    def documents_flat(self) -> np.ndarray:
        """int32 [tokens], the document of each token in flat order."""
        return np.concatenate([values[offsets[0] : offsets[-1]] for offsets, values in self._documents])


def write_rows(path: Path, rows: Iterable[PackedRow]) -> None:
    """Stream rows into an Arrow file, :data:`ROWS_PER_BATCH` at a time (constant memory)."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, ROW_SCHEMA) as writer:
        batch: list[PackedRow] = []
        for row in rows:
            batch.append(row)
            if len(batch) == ROWS_PER_BATCH:
                writer.write_batch(_record_batch(batch))
                batch = []
        if batch:
            writer.write_batch(_record_batch(batch))


class DocumentTable:
    """Writes one line per document (source, tokens, the start of its text) beside a token dataset."""

    def __init__(self, path: Path) -> None:
        self._sink = pa.OSFile(str(path), "wb")
        self._writer = pa.ipc.new_stream(self._sink, DOCUMENT_SCHEMA)
        self._pending: list[tuple[str, int, str]] = []

    def add(self, source: str, tokens: int, text_start: str) -> None:
        """A document by its source, its tokens and how its text begins (:data:`TEXT_START_READ` characters do)."""
        start = " ".join(text_start[:TEXT_START_READ].split())[:TEXT_START_CHARACTERS]
        self._pending.append((source, tokens, start))
        if len(self._pending) >= ROWS_PER_BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()

    def _flush(self) -> None:
        if self._pending:
            columns = [list(column) for column in zip(*self._pending, strict=True)]
            arrays = [pa.array(column, item.type) for column, item in zip(columns, DOCUMENT_SCHEMA, strict=True)]
            self._writer.write_batch(pa.record_batch(arrays, schema=DOCUMENT_SCHEMA))
            self._pending = []


def read_document_table(path: Path) -> pa.Table:
    """The table of documents (columns source, tokens, text_start), memory-mapped."""
    return pa.ipc.open_stream(pa.memory_map(str(path))).read_all()


def _flat(chunk: pa.ListArray) -> tuple[np.ndarray, np.ndarray]:
    return chunk.offsets.to_numpy(), chunk.values.to_numpy(zero_copy_only=True)


def _record_batch(rows: list[PackedRow]) -> pa.RecordBatch:
    offsets = np.concatenate([[0], np.cumsum([len(row.input_ids) for row in rows])]).astype(np.int32)
    columns = [
        pa.ListArray.from_arrays(offsets, pa.array(np.concatenate([getattr(row, name) for row in rows])))
        for name in ROW_SCHEMA.names
    ]
    return pa.record_batch(columns, schema=ROW_SCHEMA)


def _restarting_positions(documents_BS: np.ndarray) -> np.ndarray:
    positions_S = np.arange(documents_BS.shape[1], dtype=np.int64)
    starts = np.ones_like(documents_BS, dtype=bool)
    starts[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    begin_BS = np.maximum.accumulate(np.where(starts, positions_S, 0), axis=1)
    return positions_S - begin_BS
