"""Units of a dual: look-ups and histograms against a dense matrix, whatever the sharding, threads and sample."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ds.calibration.tokens import Trace, open_trace
from trace_ds.calibration.units import Units, evaluate
from trace_ds.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    experts=st.integers(1, 40),
    count=st.integers(1, 50),
    dtype=st.sampled_from([np.uint8, np.uint16]),
)
def test_scores_and_sums_are_those_of_the_dense_matrix(seed: int, layers: int, experts: int, count: int, dtype) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, experts + 1))
    selected = np.argsort(rng.random((count, layers, experts)), axis=2)[:, :, :top_k].astype(dtype)
    dense = np.zeros((count, layers, experts))
    np.put_along_axis(dense, selected.astype(np.int64), 1.0, axis=2)
    packing = Trace((selected,)).packing(experts)
    assert packing.pairs == (dtype is np.uint8 and top_k % 2 == 0)
    value, w = rng.normal(size=(layers, experts)), rng.random(count)
    columns = packing.columns(selected)
    expected = np.einsum("tle,le->t", dense, value)
    np.testing.assert_allclose(packing.score(columns, packing.tables(value)), expected, atol=1e-12)
    np.testing.assert_allclose(packing.sums(columns, w), np.einsum("tle,t->le", dense, w), atol=1e-12)
    np.testing.assert_array_equal(packing.sums(columns, None), dense.sum(axis=0))


def world_of_units(parts: int = 1) -> tuple[Units, np.ndarray, np.ndarray]:
    """(units of some experts, dense activations of these, θ)."""
    _, retain = make_world()
    scope = np.random.default_rng(1).random((3, 8)) < 0.7
    units = Units(retain.as_trace(parts), scope, retain.tokens)
    return units, retain.dense(8)[:, scope.ravel()].astype(float), np.linspace(-1, 1, int(scope.sum()))


def test_a_pass_equals_the_dense_matrix(monkeypatch) -> None:
    monkeypatch.setattr("trace_ds.calibration.units.CHUNK_TOKENS", 257)
    units, dense, theta = world_of_units()
    w = np.exp(dense @ theta)
    point = evaluate(units, theta)
    np.testing.assert_allclose(point.frequency_S, w @ dense / w.sum(), rtol=1e-12)
    assert point.ess == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-12)
    assert point.max_weight == pytest.approx(w.max() / w.mean(), rel=1e-12)
    assert point.log_mean == pytest.approx(np.log(w.mean()), rel=1e-12)
    far = evaluate(units, 900 * theta)  # exp of it would overflow
    assert np.isfinite(far.frequency_S).all() and far.ess < 0.01


def test_parts_of_the_trace_and_threads_change_no_bit(monkeypatch) -> None:
    monkeypatch.setattr("trace_ds.calibration.units.CHUNK_TOKENS", 500)
    points = []
    for parts, threads in ((1, 1), (2, 2), (7, 3)):
        units, _, theta = world_of_units(parts)
        points.append(evaluate(units, theta, threads))
    for point in points[1:]:
        np.testing.assert_array_equal(point.frequency_S, points[0].frequency_S)
        assert (point.log_mean, point.ess) == (points[0].log_mean, points[0].ess)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((5, 2, 2), np.int64), "instead of unsigned"),
        (np.zeros((5, 3, 2), np.uint8), "instead of unsigned"),
        (np.zeros((4, 2, 2), np.uint8), "covers 4 tokens, the retain data has 5"),
        (None, "not a trace part"),
    ],
)
def test_a_trace_that_does_not_fit_is_refused(tmp_path, array, message: str) -> None:
    path = tmp_path / "trace-00000-of-00001.npy"
    if array is None:
        path.write_bytes(b"not an array")
    else:
        np.save(path, array)
    with pytest.raises(UserError, match=message):
        open_trace([path], 2, 2, 5, "collect again")
