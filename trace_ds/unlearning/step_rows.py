"""Which rows a step sees: a pure function of (seed, step), so resuming and any world size give the same data.

Shape legend: R rows of a dataset.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

FORGET_STREAM, RETAIN_STREAM, CORPUS_STREAM, GRIP_STREAM = 1, 2, 3, 4


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """A counter-based generator: independent for every (seed, stream, counter), no state to save."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))


@dataclass(frozen=True)
class EpochRows:
    """Every row once per epoch, in an order shuffled anew for each epoch."""

    rows: np.ndarray
    per_step: int
    seed: int
    stream: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, step: int) -> np.ndarray:
        """Row numbers of ``step`` (0-based), int64 [per_step]."""
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        epochs, places = np.divmod(positions, len(self.rows))
        for epoch in {int(epoch) for epoch in epochs}.difference(self._orders):
            self._orders[epoch] = generator(self.seed, self.stream, epoch).permutation(self.rows)
        found = np.array([self._orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])
        for epoch in set(self._orders).difference(int(epoch) for epoch in epochs):
            del self._orders[epoch]
        return found


class SampledRows:
    """Rows drawn with replacement in proportion to a weight: row i has expected share ``weights[i] / Σ weights``.

    The draws of a step are stratified over the cumulative weights (one in each of ``per_step`` equal strata), which
    leaves every row's expectation exact and lowers the variance; uniform weights go through the same sampler, so a
    comparison differs in the weights only.
    """

    def __init__(self, rows: np.ndarray, weights_R: np.ndarray, per_step: int, seed: int, stream: int) -> None:
        if not (weights_R >= 0).all() or not weights_R.sum() > 0:
            raise ValueError("row weights must be non-negative with a positive sum")
        self._rows = rows
        self._cumulative_R = np.cumsum(weights_R, dtype=np.float64)
        self._per_step, self._seed, self._stream = per_step, seed, stream

    def at(self, step: int) -> np.ndarray:
        """Row numbers of ``step`` (0-based), int64 [per_step]."""
        draws = generator(self._seed, self._stream, step).random(self._per_step)
        points = (np.arange(self._per_step) + draws) / self._per_step * self._cumulative_R[-1]
        found = np.searchsorted(self._cumulative_R, points, side="right")
        return self._rows[np.minimum(found, len(self._rows) - 1)]


def share_of_rank(rows: np.ndarray, rank: int, world_size: int, micro_batches: int, micro_rows: int) -> np.ndarray:
    """This rank's rows of a step as [micro_batches, micro_rows], filled with -1 (an empty row)."""
    mine = rows[rank::world_size]
    filled = np.full(micro_batches * micro_rows, -1, dtype=np.int64)
    filled[: len(mine)] = mine
    return filled.reshape(micro_batches, micro_rows)
