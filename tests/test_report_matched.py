"""The comparison at matched forgetting, against a loop one can check by eye, and its properties."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ds.reporting.matched import Matched, matched, relative_gain

unit = st.floats(0, 1, allow_nan=False)


@pytest.mark.parametrize(
    ("steps", "forget", "utility", "target", "found"),
    [
        ([0, 20, 40, 60], [0.9, 0.5, 0.3, 0.4], [1.0, 0.9, 0.75, 0.5], 0.34, (40, 0.75, 0.625, 0.5)),  # rises again
        ([1, 2], [0.5, 0.1 + 0.2], [0.7, 0.5], 0.3, (2, 0.5, 0.5, 0.5)),  # equal to the target counts as reached
        ([1, 2], [0.9, 0.8], [0.7, 0.6], 0.3, (None, None, None, 0.6)),
        ([1, 2], [math.nan, 0.9], [0.7, 0.6], 0.3, (None, None, None, 0.6)),
    ],
)
def test_crossing_and_mean_after_it(steps: Any, forget: Any, utility: Any, target: float, found: Any) -> None:
    assert matched(steps, forget, utility, target) == Matched(*found)


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=20), unit)
def test_against_a_plain_loop(rows: list[tuple[float, float]], target: float) -> None:
    forget_S, utility_S = [row[0] for row in rows], [row[1] for row in rows]
    found = matched(range(len(rows)), forget_S, utility_S, target)
    kept = None
    for step, (forget, utility) in enumerate(rows):
        if kept is None and forget <= target + 1e-9:
            kept = []
            assert (found.step, found.at_crossing) == (step, utility)
        if kept is not None:
            kept.append(utility)
    assert (found.post is None) == (kept is None)
    if kept:
        assert found.post == pytest.approx(sum(kept) / len(kept))
        assert min(kept) - 1e-12 <= found.post <= max(kept) + 1e-12


@pytest.mark.parametrize(("steps", "utility", "message"), [([2, 1], [1, 1], "do not increase"), ([1, 2], [1], "util")])
def test_bad_input_is_refused(steps: list[int], utility: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matched(steps, [0.1, 0.1], utility, 0.5)


def test_relative_gain() -> None:
    assert relative_gain(1.1, 1.0) == pytest.approx(0.1)
    assert relative_gain(1.0, 0.0) is None
