"""Raking against closed forms and other solvers, with more experts than a solver can match, on degenerate inputs."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import Corpus, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from trace_ds.calibration import raking
from trace_ds.calibration.raking import rake
from trace_ds.calibration.units import Units


def weights(active_TS: np.ndarray, theta_S: np.ndarray) -> np.ndarray:
    score = active_TS @ theta_S
    w = np.exp(score - score.max())
    return w / w.mean()


def ess(w: np.ndarray) -> float:
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


def units_of(active_TS: np.ndarray, multiplicity_T: np.ndarray | None = None) -> Units:
    """Units with the columns of a 0/1 matrix as constraints: each in a layer of its own, as one of two experts."""
    selected = np.where(active_TS, 0, 1).astype(np.uint8)[:, :, None]
    return Units.of(selected, np.array([[True, False]] * active_TS.shape[1]), multiplicity_T)


def correlated(rng: np.random.Generator, count: int, constraints: int) -> np.ndarray:
    """0/1 columns that share a common cause."""
    common = rng.normal(size=(count, 1))
    return common * rng.normal(0.7, 0.3, constraints) + rng.normal(size=(count, constraints)) > 0.8


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 1000), st.integers(1, 1000), st.floats(0.01, 0.99))
def test_one_expert_has_the_closed_form(active: int, idle: int, target: float) -> None:
    column = np.array([[True], [False]])
    p = active / (active + idle)
    raking = rake(units_of(column, np.array([active, idle])), np.array([target]), np.array([p]), 1e9, 1e-9)
    w = np.exp(column @ raking.theta_S - raking.point.log_mean)
    np.testing.assert_allclose(w, [target / p, (1 - target) / (1 - p)], rtol=1e-5)


def reference(active_TS: np.ndarray, target_S: np.ndarray) -> np.ndarray:
    """Weights from scipy's trust-region Newton on the plain dual, float64, run until it cannot go on."""

    def moments(theta_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        w = weights(active_TS, theta_S)
        return w / w.sum(), w @ active_TS / w.sum()

    def value(theta_S: np.ndarray) -> float:
        score = active_TS @ theta_S
        return float(score.max() + np.log(np.exp(score - score.max()).mean()) - theta_S @ target_S)

    def hessian(theta_S: np.ndarray) -> np.ndarray:
        w, mean = moments(theta_S)
        return (active_TS.T * w) @ active_TS - np.outer(mean, mean)

    result = optimize.minimize(
        value,
        np.zeros(len(target_S)),
        jac=lambda theta_S: moments(theta_S)[1] - target_S,
        hess=hessian,
        method="trust-ncg",
        options={"gtol": 1e-10, "maxiter": 1000},
    )
    return weights(active_TS, result.x)


@pytest.mark.parametrize("sample", [1 << 18, 4000])
def test_weights_are_those_of_a_plain_long_running_solver(monkeypatch, sample: int) -> None:
    """On all tokens at once, and on a sample of them first."""
    monkeypatch.setattr(raking, "SAMPLE_UNITS", sample)
    forget, retain = make_world(seed=3, layers=4, experts=10, top_k=3, documents=600)
    active = retain.dense(10).astype(float)
    p, q = active.mean(axis=0), forget.dense(10).mean(axis=0)
    result = rake(Units(retain.as_trace(), np.ones((4, 10), dtype=bool), retain.tokens), q, p, 20.0, 0.5)
    assert result.converged and result.lambda_ < 1 and not any(result.reason_S)
    assert (result.passes > 1) == (sample < len(active))
    np.testing.assert_allclose(result.target_S, p + result.lambda_ * (q - p), atol=1e-12)
    w, expected = weights(active, result.theta_S), reference(active, result.target_S)
    assert 0.5 <= ess(w) < 0.5005
    np.testing.assert_allclose(w @ active / w.sum(), result.target_S, atol=2e-6)
    np.testing.assert_allclose(w, expected, rtol=1e-3)


def errors(corpus: Corpus, experts: int) -> np.ndarray:
    return np.sqrt(corpus.statistics(experts).variance_LE()).ravel()


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    constraints=st.integers(1, 5),
    kinds=st.lists(st.sampled_from(["free", "never", "always", "copy"]), min_size=5, max_size=5),
    targets=st.lists(st.sampled_from([0.0, 1e-6, 0.1, 0.5, 0.9, 1.0]), min_size=5, max_size=5),
    floor=st.sampled_from([0.05, 0.5, 0.99, 1.0]),
)
def test_degenerate_inputs_give_finite_weights_above_the_floor(seed, count, constraints, kinds, targets, floor) -> None:
    active = np.random.default_rng(seed).random((count, constraints)) < 0.4
    for s, kind in enumerate(kinds[:constraints]):
        if kind == "never":
            active[:, s] = False
        elif kind == "always":
            active[:, s] = True
        elif kind == "copy":
            active[:, s] = active[:, 0]
    p = active.mean(axis=0)
    raking = rake(units_of(active), np.array(targets[:constraints]), p, 20.0, floor)
    w = weights(active, raking.theta_S)
    assert np.isfinite(w).all() and 0 <= raking.lambda_ <= 1
    assert abs(w.mean() - 1) < 1e-9
    assert ess(w) >= floor - 1e-9
    if raking.converged:
        np.testing.assert_allclose(w @ active / w.sum(), raking.target_S, atol=2e-5)
    if kinds[0] in ("never", "always") and targets[0] != p[0]:
        assert raking.reason_S[0] == kinds[0] and raking.full_target_S[0] == p[0]


def test_two_experts_that_exclude_each_other_do_not_stop_the_others() -> None:
    """Of two rare experts the first is selected only where the second is; eight correlated ones go on."""
    rare = np.zeros((20_000, 2), dtype=bool)
    rare[5:8, 0] = rare[5:11, 1] = True
    active = np.concatenate([correlated(np.random.default_rng(0), 20_000, 8), rare], axis=1)
    p = active.mean(axis=0)
    q = np.concatenate([np.clip(p[:8] + 0.15, 0, 0.95), p[8:] * (6.0, 0.4)])
    raking = rake(units_of(active), q, p, 20.0, 0.5)
    w = weights(active, raking.theta_S)
    alone = rake(units_of(active[:, :8]), q[:8], p[:8], 20.0, 0.5)
    assert raking.lambda_ == pytest.approx(alone.lambda_, abs=0.02) and raking.lambda_ > 0.9
    np.testing.assert_allclose((w @ active / w.sum())[:8], (p + raking.lambda_ * (q - p))[:8], atol=1e-5)
    assert "tied" in raking.reason_S[8:] and not any(raking.reason_S[:8])
    np.testing.assert_allclose(raking.target_S, w @ active / w.sum(), atol=1e-5)
    assert ess(w) >= 0.5 - 1e-9
