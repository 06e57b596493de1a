"""What calibration needs to know about the retain tokens: which are counted, and their row and document.

Shape legend: T tokens of a chunk or of the corpus (flat order: rows in order, tokens of a row in order), R rows,
D documents, L MoE layers, K = top-k.

Everything is read in chunks of :data:`CHUNK_TOKENS` *flat* tokens, whatever the sharding of the trace files or the
Arrow batches, so that every sum is taken in one order and the results are bitwise independent of the sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_ds.calibration.selections import Packing, in_order
from trace_ds.errors import UserError

CHUNK_TOKENS = 1 << 16


@dataclass(frozen=True)
class TokenMap:
    """Rows and documents of a flat token sequence.

    Attributes:
        row_starts_R1: int64 [R + 1], flat position of each row's first token; the last entry is the token total.
        document_ids_T: int32 [T] (may be a memory map), document index of every token, non-decreasing.
        documents: number of documents D.
        kept_R: bool [R], rows whose tokens count at all (None: every row); see :meth:`restricted`.
    """

    row_starts_R1: np.ndarray
    document_ids_T: np.ndarray
    documents: int
    kept_R: np.ndarray | None = None

    @property
    def tokens(self) -> int:
        """All tokens, counted or not."""
        return int(self.row_starts_R1[-1])

    @property
    def rows(self) -> int:
        return len(self.row_starts_R1) - 1

    def spans(self) -> list[tuple[int, int]]:
        """The chunks as (start, stop) in flat positions."""
        return [(at, min(at + CHUNK_TOKENS, self.tokens)) for at in range(0, self.tokens, CHUNK_TOKENS)]

    def counted(self, start: int, stop: int) -> np.ndarray:
        """bool [stop - start]: the next token exists in the same (kept) row and belongs to the same document."""
        ids = np.asarray(self.document_ids_T[start : min(stop + 1, self.tokens)])
        result_T = np.zeros(stop - start, dtype=bool)
        result_T[: len(ids) - 1] = ids[1:] == ids[:-1]
        first = int(np.searchsorted(self.row_starts_R1, start + 1, side="left"))
        last = int(np.searchsorted(self.row_starts_R1, stop, side="right"))
        result_T[self.row_starts_R1[first:last] - 1 - start] = False
        if self.kept_R is not None:
            result_T &= self.kept_R[self.row_of(start, stop)]
        return result_T

    def restricted(self, kept_R: np.ndarray) -> TokenMap:
        """The same tokens, of which only those of the kept rows count."""
        return replace(self, kept_R=kept_R)

    def row_of(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the row of each token (rows without tokens are never returned)."""
        return np.searchsorted(self.row_starts_R1, np.arange(start, stop), side="right") - 1

    def counted_total(self) -> int:
        return sum(int(self.counted(*span).sum()) for span in self.spans())


def open_stream(path: Path) -> Any:
    """A pyarrow reader of an Arrow IPC stream, memory-mapped; :class:`UserError` when the file is not one."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(pa.memory_map(str(path)))
    except (OSError, pa.ArrowInvalid) as error:
        raise UserError(
            f"this is not an Arrow stream ({error})",
            str(path),
            "make it again with `trace-ds prepare CONFIG`",
        ) from None


def read_token_map(path: Path, documents: int, spool: Path) -> TokenMap:
    """Stream the rows of a prepared corpus (``RUN/data/retain.arrow``) into a :class:`TokenMap`.

    The document ids go to a memory-mapped file in ``spool``: memory is O(rows), not O(tokens).
    """
    lengths: list[np.ndarray] = []
    ids_path = spool / "document_ids.i32"
    with ids_path.open("wb") as handle:
        for batch in open_stream(path):
            column = batch.column("document_ids")
            offsets = np.asarray(column.offsets)
            lengths.append(np.diff(offsets).astype(np.int64))
            values = np.asarray(column.values)[offsets[0] : offsets[-1]]
            handle.write(np.ascontiguousarray(values, dtype=np.int32).tobytes())
    starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([*lengths, np.zeros(0, np.int64)]))])
    total = int(starts[-1])
    ids = np.memmap(ids_path, np.int32, "r", shape=(total,)) if total else np.zeros(0, np.int32)
    return TokenMap(starts, ids, documents)


@dataclass(frozen=True)
class Trace:
    """The routing trace of a corpus: parts ``[tokens of the part, L, K]`` of expert indices, in flat token order."""

    parts: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def layers(self) -> int:
        return int(self.parts[0].shape[1])

    @property
    def top_k(self) -> int:
        return int(self.parts[0].shape[2])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Expert indices [stop - start, L, K] of flat positions ``start … stop``, across the borders of parts."""
        pieces, at = [], 0
        for part in self.parts:
            low, high = max(start - at, 0), min(stop - at, len(part))
            if low < high:
                pieces.append(np.asarray(part[low:high]))
            at += len(part)
        if len(pieces) == 1:
            return pieces[0]
        return np.concatenate(pieces) if pieces else np.asarray(self.parts[0][:0])

    def chunks(self, tokens: TokenMap) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Yield (start, stop, counted_T bool, selected_TLK of the counted tokens only)."""
        for start, stop in tokens.spans():
            counted_T = tokens.counted(start, stop)
            yield start, stop, counted_T, self.read(start, stop)[counted_T]


def open_trace(paths: list[Path], layers: int, top_k: int, tokens: int, fix: str) -> Trace:
    """Memory-map the parts of a trace and prove that they fit the corpus (see also :func:`count_selections`).

    Raises:
        UserError: a part is not an unsigned [tokens, L, K] array, or the parts do not cover the corpus.
    """
    parts = []
    for path in paths:
        try:
            part = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError) as error:
            raise UserError(f"this is not a trace part ({error})", str(path), fix) from None
        if part.dtype not in (np.uint8, np.uint16) or part.ndim != 3 or part.shape[1:] != (layers, top_k):
            raise UserError(
                f"the trace part holds {part.dtype} {list(part.shape)} instead of unsigned [tokens, {layers}, {top_k}]",
                str(path),
                fix,
            )
        parts.append(part)
    covered = sum(len(part) for part in parts)
    if not parts or covered != tokens:
        raise UserError(
            f"the trace covers {covered} tokens, the retain data has {tokens}",
            str(paths[0].parent) if paths else "",
            fix,
        )
    return Trace(tuple(parts))


@dataclass(frozen=True)
class RowSpread:
    """Values of rows as if they were an array over the tokens, float64; sliced, never made whole."""

    tokens: TokenMap
    value_R: np.ndarray

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.value_R[self.tokens.row_of(span.start, span.stop)]


def count_selections(
    trace: Trace, tokens: TokenMap, experts: int, weight_T: np.ndarray | RowSpread | None = None, threads: int = 1
) -> np.ndarray:
    """[L, E] selections by counted tokens, int64, or their weighted sums, float64, when ``weight_T`` is given.

    One pass. The unweighted counts of an honest trace equal the statistics' ``counts_LE`` exactly.

    Raises:
        ValueError: the trace names an expert ≥ ``experts``.
    """
    packing = Packing.of(trace.read(0, 1), experts)

    def part(span: tuple[int, int]) -> np.ndarray:
        counted_T = tokens.counted(*span)
        columns_GT = packing.columns(trace.read(*span)[counted_T])
        return packing.sums(columns_GT, None if weight_T is None else np.asarray(weight_T[slice(*span)])[counted_T])

    result_LE = np.zeros((trace.layers, experts), dtype=np.int64 if weight_T is None else np.float64)
    for part_LE in in_order(part, tokens.spans(), threads):
        result_LE += part_LE
    return result_LE
