"""The routing trace of the retain tokens, and sums over it.

Shape legend: T tokens of a chunk or of the corpus (flat order: rows in order, tokens of a row in order), R rows,
L MoE layers, K = top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_ds.calibration.selections import Packing, in_order
from trace_ds.corpora.dataset import CHUNK_TOKENS, FlatArray, TokenDataset, TokenMap, open_stream  # noqa: F401
from trace_ds.errors import UserError
from trace_ds.run.mapped import open_mapped


def read_token_map(path: Path, documents: int) -> TokenMap:
    """Rows and documents of a prepared corpus (``RUN/data/retain.arrow``), in place: memory is O(rows)."""
    dataset = TokenDataset.open(path)
    return TokenMap(dataset.row_starts_R1, dataset.document_ids_T, documents)


class Trace(FlatArray):
    """The routing trace of a corpus: parts ``[tokens of the part, L, K]`` of expert indices, in flat token order."""

    @property
    def tokens(self) -> int:
        return len(self)

    @property
    def layers(self) -> int:
        return int(self.parts[0].shape[1])

    @property
    def top_k(self) -> int:
        return int(self.parts[0].shape[2])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Expert indices [stop - start, L, K] of flat positions ``start … stop``, across the borders of parts."""
        return self[start:stop]


def open_trace(paths: list[Path], layers: int, top_k: int, tokens: int, fix: str) -> Trace:
    """Memory-map the parts of a trace and prove that they fit the corpus (see also :func:`count_selections`).

    Raises:
        UserError: a part is not an unsigned [tokens, L, K] array, or the parts do not cover the corpus.
    """
    parts = []
    for path in paths:
        try:
            part = open_mapped(path)
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
