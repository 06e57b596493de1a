"""Arrays beside a dataset, one line per token or row, in parts, memory-mapped.

A part ``NAME-00001-of-00004.npy`` holds what belongs to one rank's rows, in order; the parts follow each other, so
together they are one array, the same whatever the number of ranks. Shape legend: T tokens in flat order (rows in order,
positions in order), R rows, N sampled tokens, L MoE layers, E experts, K = top-k.

====================  ===============  ======================================================================
``trace``             uint8 | 16       [T, L, K] the experts of every token, ascending (``trace_dtype``)
``nll``               float32          [T] the frozen model's loss, 0 at positions that are not counted
``row_counts``        uint8 | 16 | 32  [R, L, E] counted tokens of the row that select the expert (``count_dtype``)
``sample``            uint8 | 16       [N, L, K] ``trace`` of the sampled tokens, all of them counted
``sample_positions``  int64            [N] their flat positions, ascending (see :func:`sample_places`)
====================  ===============  ======================================================================
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_ds.corpora.dataset import FlatArray
from trace_ds.errors import UserError
from trace_ds.run.artefact import Artefact
from trace_ds.run.files import new_array, open_mapped, reserve

CONTENTS = {  # what a part holds, and the key that has it recorded (none: it is always recorded)
    "trace": ("the routing trace", "set statistics.trace: true (or leave it out) and "),
    "row_counts": ("the selections of each row", ""),
    "sample": ("the routing of a sample of tokens", ""),
    "nll": ("the frozen model's losses", "set statistics.nll: true and "),
}
SAMPLE_SEED = 0x7ACE  # a constant: another seed of a run is no reason to go through its corpora again


@dataclass(frozen=True)
class Recording:
    """What to record of every token or row besides the counts.

    ``rows``: the selections of each row; ``sample_tokens``: of how many counted tokens the top-k experts.
    """

    trace: bool
    nll: bool
    rows: bool = False
    sample_tokens: int = 0


def part_name(name: str, part: int, parts: int) -> str:
    return f"{name}-{part:05d}-of-{parts:05d}.npy"


def create_part(
    directory: Path, name: str, part: int, parts: int, shape: Sequence[int], dtype: np.dtype, *, fresh: bool = True
) -> np.ndarray:
    """A new part as a writable memory map of zeros (a plain empty file when it has no token).

    With ``fresh=False`` the part that is there is opened for writing on; ``ValueError`` when it is another's.
    """
    path = directory / part_name(name, part, parts)
    if fresh or 0 in shape:
        return new_array(path, dtype, shape)
    reserve(path)
    values: np.ndarray = np.lib.format.open_memmap(path, mode="r+")
    if values.shape != tuple(shape) or values.dtype != dtype:
        raise ValueError(f"{path} has shape {values.shape} and type {values.dtype}, not {tuple(shape)} and {dtype}")
    return values


def open_parts(artefact: Artefact, name: str) -> list[np.ndarray]:
    """The parts of ``name`` in order, as read-only memory maps; empty when the artefact has none."""
    return [open_mapped(artefact.file(file)) for file in sorted(artefact.files) if file.startswith(f"{name}-")]


def require_parts(artefact: Artefact, name: str, needed_by: str) -> list[np.ndarray]:
    """:func:`open_parts`; :class:`UserError` where they were not recorded, naming the key or rule ``needed_by``."""
    parts = open_parts(artefact, name)
    if not parts:
        content, key = CONTENTS[name]
        fix = f"{key}run `trace-ds collect CONFIG` again"
        raise UserError(f"{needed_by} needs {content}, not recorded", str(artefact.path), fix)
    return parts


@dataclass(frozen=True)
class SampledRouting:
    """The routing of sampled tokens: ``positions_N`` int64, flat and ascending; their experts [N, L, K], ascending."""

    positions_N: np.ndarray
    experts_NLK: FlatArray

    @classmethod
    def of(cls, artefact: Artefact) -> SampledRouting:
        positions_N = np.concatenate(open_parts(artefact, "sample_positions"))
        return cls(positions_N, FlatArray(require_parts(artefact, "sample", "unlearning.evaluate")))

    def within(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, counted from ``begin``; experts) of the sampled tokens among ``begin … end``."""
        where = slice(*np.searchsorted(self.positions_N, (begin, end)).tolist())
        return self.positions_N[where] - begin, self.experts_NLK[where]


def trace_dtype(experts: int) -> np.dtype:
    """The smallest unsigned type that holds an expert index."""
    return np.dtype(np.uint8 if experts <= 256 else np.uint16)


def count_dtype(most: int) -> np.dtype:
    """The smallest unsigned type that holds a count: a token selects an expert once, so at most the counted tokens of
    the longest row, whose last position is not one (uint8 up to rows of 256 tokens, uint16 up to 65,536)."""
    return np.dtype(np.min_scalar_type(max(most, 0)))


def bytes_per_token(layers: int, experts: int, top_k: int, row_tokens: int) -> tuple[float, float]:
    """(of ``trace``, of ``row_counts``) for each token of rows of ``row_tokens``."""
    cell, index = count_dtype(row_tokens - 1).itemsize, trace_dtype(experts).itemsize
    return float(layers * top_k * index), layers * experts * cell / row_tokens


def sample_places(counted: int, size: int) -> np.ndarray:
    """Which of ``counted`` tokens in flat order are in a sample of ``size``: int64, ascending; a function of the two.

    The tokens are cut into ``size`` strata of equal length, counted / size tokens, and one point is drawn in each
    (jittered systematic sampling). The tokens of a document follow each other, so each document has its share to within
    one or two tokens, and every token is expected size / counted times: plain means over the sample are unbiased. A
    token on the border of two strata can be there twice. All tokens, once each, where there are no more than ``size``.
    """
    size = min(size, counted)
    offsets = np.random.Generator(np.random.Philox(SAMPLE_SEED)).random(size)
    places = ((np.arange(size) + offsets) * (counted / max(size, 1))).astype(np.int64)
    return np.minimum(places, counted - 1)
