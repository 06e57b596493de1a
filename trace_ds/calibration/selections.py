"""Looking up and counting expert selections: the two loops that calibration spends its time in.

A token's features are zeros and ones, K ones a layer, so they are never spread out: Σ_s θ_s a_s(t) is a table look-up
for each of its selections and Σ_t w_t a_s(t) a histogram. Where expert numbers are bytes and K is even, two adjacent
selections are read as one 16-bit number, which halves both.

Shape legend: N tokens, L MoE layers, E experts, K = top-k, G columns, V values of a column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

A = TypeVar("A")
B = TypeVar("B")


def in_order(work: Callable[[A], B], items: Iterable[A], threads: int) -> Iterator[B]:
    """The results of ``work`` in the order of the items, made by so many threads: the same bits for any number."""
    if threads < 2:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads, initializer=_one_thread) as pool:
        yield from pool.map(work, items)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@dataclass(frozen=True)
class Packing:
    """How selections [N, L, K] of one corpus are looked up and counted."""

    layers: int
    top_k: int
    experts: int
    pairs: bool

    @classmethod
    def of(cls, selected_NLK: np.ndarray, experts: int) -> Packing:
        _, layers, top_k = selected_NLK.shape
        return cls(layers, top_k, experts, selected_NLK.dtype == np.uint8 and top_k % 2 == 0)

    def columns(self, selected_NLK: np.ndarray) -> np.ndarray:
        """Unsigned [G, N], the columns of layer 0, then those of layer 1, …"""
        flat = np.ascontiguousarray(selected_NLK).reshape(len(selected_NLK), -1)
        return np.ascontiguousarray((flat.view("<u2") if self.pairs else flat).T)

    def tables(self, value_LE: np.ndarray, join: np.ufunc = np.add) -> np.ndarray:
        """float64 [L, V]: what a column's value brings to a token's ``join`` (sum, or maximum) of ``value_LE``."""
        if not self.pairs:
            return value_LE
        values = np.zeros((self.layers, 256))
        values[:, : self.experts] = value_LE
        return join(value_LE[:, :, None], values[:, None, :]).reshape(self.layers, -1)

    def score(
        self, columns_GN: np.ndarray, tables_LV: np.ndarray, join: np.ufunc = np.add, start: float = 0.0
    ) -> np.ndarray:
        """float64 [N]: the sum (or maximum) of the values of each token's selections, in the order of the columns."""
        score_N = np.full(columns_GN.shape[1], start)
        per_layer = len(columns_GN) // self.layers
        for number, column_N in enumerate(columns_GN):
            join(score_N, tables_LV[number // per_layer].take(column_N), out=score_N)
        return score_N

    def sums(self, columns_GN: np.ndarray, weight_N: np.ndarray | None) -> np.ndarray:
        """[L, E]: Σ of the weights of the tokens that select each expert, float64; without weights their number, int64.

        Raises:
            ValueError: a selection of an expert that there is not.
        """
        per_layer = len(columns_GN) // self.layers
        weights = None if weight_N is None else np.tile(weight_N, per_layer)
        found = []
        for layer in range(self.layers):
            values = columns_GN[layer * per_layer : (layer + 1) * per_layer].reshape(-1)
            counts_V = np.bincount(values, weights, self.experts * (256 if self.pairs else 1))
            if self.pairs:
                counts_V = np.pad(counts_V, (0, -len(counts_V) % 256)).reshape(-1, 256)
                second, first = counts_V.sum(axis=1), counts_V.sum(axis=0)
                counts_V = np.pad(second, (0, max(256 - len(second), 0))) + first
            beyond = int(np.flatnonzero(counts_V).max(initial=0))
            if beyond >= self.experts:
                raise ValueError(f"the trace names expert {beyond} of {self.experts}")
            found.append(counts_V[: self.experts])
        return np.stack(found)
