"""Weights from log-weights: sums over the counted tokens, chunk by chunk, in a fixed order.

Shape legend: T tokens (flat order), R rows. Arrays over T may be memory-mapped files.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from trace_ds.corpora.dataset import TokenMap


class TokenValues(Protocol):
    """Values per token, read in slices: an array, or an object that computes them from values of rows or documents."""

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


def _moments(u_T: np.ndarray, tokens: TokenMap, exponent: float, top: float) -> tuple[float, float, int]:
    """Return Σ w, Σ w² and the number n of the counted tokens, with w = exp(c (u − top)).

    Raises:
        ValueError: no token is counted.
    """
    total, square, count = 0.0, 0.0, 0
    for start, stop in tokens.spans():
        w = np.exp(exponent * (np.asarray(u_T[start:stop])[tokens.counted(start, stop)] - top))
        total, square, count = total + float(w.sum()), square + float((w * w).sum()), count + len(w)
    if not count:
        raise ValueError("there are no counted tokens to weight")
    return total, square, count


def _top(u_T: np.ndarray, tokens: TokenMap) -> float:
    tops = [
        float(np.asarray(u_T[start:stop])[tokens.counted(start, stop)].max(initial=-np.inf))
        for start, stop in tokens.spans()
    ]
    return max(tops, default=0.0)


def largest_exponent_tokens(u_T: np.ndarray, tokens: TokenMap, ess_floor: float) -> float:
    """Return the largest c in [0, 1] whose token weights exp(c u) keep the effective sample size.

    That is (Σw)²/(nΣw²) ≥ ``ess_floor`` over the n counted tokens. Bisection, to 1e-4.
    """
    top = _top(u_T, tokens)

    def enough(exponent: float) -> bool:
        total, square, count = _moments(u_T, tokens, exponent, top)
        return total * total / (count * square) >= ess_floor

    if enough(1.0):
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if enough(middle) else (low, middle)
    return low


def largest_exponent_rows(u_R: np.ndarray, ess_floor: float) -> float:
    """Return the largest c, at most 1,024, whose row weights exp(c u) keep the effective sample size.

    That is (Σw)²/(RΣw²) ≥ ``ess_floor``. Bisection, to a relative 1e-6.
    """

    def ess(exponent: float) -> float:
        w = np.exp(exponent * (u_R - u_R.max()))
        return float(w.sum() ** 2 / (len(w) * (w * w).sum()))

    high = 1.0
    while ess(high) >= ess_floor:
        if high >= 1024.0:
            return high
        high *= 2.0
    low = 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if ess(middle) >= ess_floor else (low, middle)
    return low


def exponentiate(u_T: np.ndarray, weight_T: np.ndarray, tokens: TokenMap, exponent: float) -> float:
    """Write w = exp(c u) / mean to ``weight_T`` (0 at tokens that are not counted) and return the log of the mean."""
    top = _top(u_T, tokens)
    total, _, count = _moments(u_T, tokens, exponent, top)
    for start, stop in tokens.spans():
        w = np.exp(exponent * (np.asarray(u_T[start:stop]) - top)) * (count / total)
        weight_T[start:stop] = np.where(tokens.counted(start, stop), w, 0.0)
    return exponent * top + float(np.log(total / count))


def row_means(value_T: TokenValues, tokens: TokenMap) -> np.ndarray:
    """Return the mean over the counted tokens of every row, float64 [R]; 0 for a row without any."""
    sums_R, counts_R = np.zeros(tokens.rows), np.zeros(tokens.rows, np.int64)
    for start, stop in tokens.spans():
        counted = tokens.counted(start, stop)
        row = tokens.row_of(start, stop)[counted]
        if len(row):
            # tokens are ordered by row, so a chunk only touches the rows from its first to its last
            first, size = int(row[0]), int(row[-1] - row[0]) + 1
            values = np.asarray(value_T[start:stop])[counted]
            sums_R[first : first + size] += np.bincount(row - first, values, size)
            counts_R[first : first + size] += np.bincount(row - first, minlength=size)
    return np.where(counts_R > 0, sums_R / np.maximum(counts_R, 1), 0.0)


def ess_and_max_weight(weight_T: TokenValues, tokens: TokenMap) -> tuple[float, float]:
    """Return the effective sample size, as a fraction, and the largest weight of the counted tokens."""
    total = square = largest = 0.0
    count = 0
    for start, stop in tokens.spans():
        w = np.asarray(weight_T[start:stop])[tokens.counted(start, stop)]
        total, square, count = total + float(w.sum()), square + float((w * w).sum()), count + len(w)
        largest = max(largest, float(w.max(initial=0.0)))
    return total * total / (count * square), largest
