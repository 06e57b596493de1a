"""The comparison at matched forgetting, against a loop one can check by eye, and its properties."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from trace_ds.reporting.gather import Score
from trace_ds.reporting.intervals import of_score, wilson
from trace_ds.studies.analysis import matched

unit = st.floats(0, 1, allow_nan=False)


@pytest.mark.parametrize(
    ("steps", "forget", "utility", "target", "result"),
    [
        ([0, 20, 40, 60], [0.9, 0.5, 0.3, 0.4], [1.0, 0.9, 0.75, 0.5], 0.34, (40, 0.625, 0.5)),  # rises again
        ([1, 2], [0.5, 0.1 + 0.2], [0.7, 0.5], 0.3, (2, 0.5, 0.5)),  # equal to the target counts as reached
        ([1, 2], [0.9, 0.8], [0.7, 0.6], 0.3, (None, None, 0.6)),
        ([1, 2], [math.nan, 0.9], [0.7, 0.6], 0.3, (None, None, 0.6)),
    ],
)
def test_first_step_at_the_target_and_mean_from_there(
    steps: Any, forget: Any, utility: Any, target: float, result: Any
) -> None:
    assert astuple(matched(steps, forget, utility, target)) == pytest.approx(result)


@given(st.lists(st.tuples(unit, unit), min_size=1, max_size=20), unit)
def test_against_a_plain_loop(rows: list[tuple[float, float]], target: float) -> None:
    forget_S, utility_S = [row[0] for row in rows], [row[1] for row in rows]
    result = matched(range(len(rows)), forget_S, utility_S, target)
    kept = None
    for step, (forget, utility) in enumerate(rows):
        if kept is None and forget <= target + 1e-9:
            kept = []
            assert result.step == step
        if kept is not None:
            kept.append(utility)
    assert (result.post is None) == (kept is None)
    if kept:
        assert result.post == pytest.approx(sum(kept) / len(kept))
        assert min(kept) - 1e-12 <= result.post <= max(kept) + 1e-12


@pytest.mark.parametrize(("count", "of"), [(0, 40), (3, 40), (67, 240), (240, 240)])
def test_wilson_against_scipy(count: int, of: int) -> None:
    result, expected = wilson(count / of, of), stats.binomtest(count, of).proportion_ci(method="wilson")
    assert (result.low, result.high) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_scores_that_are_no_mean_over_questions_have_no_interval() -> None:
    for metric, direction, value in (
        ("forget_quality", "higher", 0.2),
        ("priv_leak", "reference", 0.5),
        ("x", "higher", 3),
    ):
        score = Score("m", "t", metric, value, 80, "utility", direction, None)
        assert of_score(score) is None
