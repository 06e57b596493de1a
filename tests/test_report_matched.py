"""The comparison at matched forgetting, against a loop one can check by eye, and its properties."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ds.reporting.matched import crossing_index, forget_excess, matched, relative_gain

scores = st.floats(0, 1, allow_nan=False)


def test_crossing_and_mean_after_it() -> None:
    found = matched([0, 20, 40, 60], [0.9, 0.5, 0.3, 0.4], [1.0, 0.9, 0.8, 0.5], 0.34)
    assert (found.step, found.at_crossing, found.end) == (40, 0.8, 0.5)
    assert found.post == pytest.approx((0.8 + 0.5) / 2)  # from the first crossing on, even if the score rises again


def test_equal_to_the_target_counts_as_reached() -> None:
    assert crossing_index([0.5, 0.1 + 0.2], 0.3) == 1


def test_never_reached_is_said_not_guessed() -> None:
    found = matched([1, 2], [0.9, 0.8], [0.7, 0.6], 0.3)
    assert (found.step, found.at_crossing, found.post, found.end) == (None, None, None, 0.6)
    assert crossing_index([math.nan, 0.9], 0.3) is None


def test_every_forget_task_must_reach_its_own_target() -> None:
    excess_S = forget_excess([[0.9, 0.2, 0.2], [0.8, 0.6, 0.1]], [0.3, 0.2])
    assert excess_S == pytest.approx([0.6, 0.4, -0.1])
    assert crossing_index(excess_S, 0.0) == 2


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=20), scores)
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


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="do not increase"):
        matched([2, 1], [0.1, 0.1], [1, 1], 0.5)
    with pytest.raises(ValueError, match="utilities"):
        matched([1, 2], [0.1, 0.1], [1], 0.5)
    with pytest.raises(ValueError, match="different numbers"):
        forget_excess([[0.1], [0.1, 0.2]], [0.3, 0.3])
    with pytest.raises(ValueError, match="targets"):
        forget_excess([], [])


def test_relative_gain() -> None:
    assert relative_gain(1.1, 1.0) == pytest.approx(0.1)
    assert relative_gain(1.0, 0.0) is None
