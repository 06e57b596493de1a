"""The expert selections of whole rows: what weights for drawing rows are made of.

Shape legend: R rows, N sampled tokens, L MoE layers, E experts, K = top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK_VALUES = 1 << 22


@dataclass(frozen=True)
class RowSelections:
    """What drawing rows needs to know of routing: the selections of each row, and the routing of a sample of tokens.

    ``collect`` records both.

    Attributes:
        parts: unsigned counts [rows of the part, L, E] of the row's counted tokens that select the expert.
        top_k: K. selected_NLK: experts of the sampled tokens, all of them counted. position_N: their flat positions.
    """

    parts: tuple[np.ndarray, ...]
    top_k: int
    selected_NLK: np.ndarray
    position_N: np.ndarray

    @property
    def rows(self) -> int:
        return sum(len(part) for part in self.parts)

    def blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, counts [rows, L · E]) in order."""
        first = 0
        for part in self.parts:
            step = max(1, BLOCK_VALUES // max(int(np.prod(part.shape[1:])), 1))
            for at in range(0, len(part), step):
                counts = np.asarray(part[at : at + step])
                yield slice(first + at, first + at + len(counts)), counts.reshape(len(counts), -1)
            first += len(part)

    def sizes(self, counts: np.ndarray, experts: int) -> np.ndarray:
        """Counted tokens of the rows of a block, int64: a layer's selections are K a token."""
        return counts[:, :experts].sum(axis=1, dtype=np.int64) // self.top_k

    def scores(self, theta_LE: np.ndarray) -> np.ndarray:
        """Mean of Σ θ a over the row's counted tokens, float64 [R]; 0 for a row without any."""
        theta, experts, found_R = theta_LE.ravel(), theta_LE.shape[1], np.zeros(self.rows)
        for rows, counts in self.blocks():
            sizes_R = np.maximum(self.sizes(counts, experts), 1)
            found_R[rows] = np.einsum("rs,s->r", counts.astype(np.float64), theta) / sizes_R
        return found_R

    def sums(self, weight_R: np.ndarray) -> np.ndarray:
        """Σ_r w_r counts_r, float64 [L, E]."""
        total = np.zeros(int(np.prod(self.parts[0].shape[1:])))
        for rows, counts in self.blocks():
            total += np.einsum("r,rs->s", weight_R[rows], counts.astype(np.float64))
        return total.reshape(self.parts[0].shape[1:])
