"""Raking against closed forms, a brute-force convex solver, and properties over degenerate inputs."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from trace_ds.calibration import raking, rows
from trace_ds.calibration.patterns import Encoding, PatternStore, build_store
from trace_ds.calibration.raking import covariance, evaluate, solve
from trace_ds.calibration.rows import RowStore
from trace_ds.calibration.rules import rake
from trace_ds.calibration.targets import offer
from trace_ds.calibration.tempering import temper


def weights(active_TS: np.ndarray, theta_S: np.ndarray) -> np.ndarray:
    score = active_TS @ theta_S
    w = np.exp(score - score.max())
    return w / w.mean()


def correlated(rng: np.random.Generator, count: int, constraints: int) -> np.ndarray:
    """0/1 columns that share a common cause."""
    common = rng.normal(size=(count, 1))
    return common * rng.normal(0.7, 0.3, constraints) + rng.normal(size=(count, constraints)) > 0.8


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 10_000), st.integers(1, 10_000), st.floats(1e-4, 1 - 1e-4))
def test_one_expert_has_the_closed_form(active: int, idle: int, target: float) -> None:
    column = np.array([[True], [False]])
    store = PatternStore.from_activations(column, np.array([active, idle]))
    p = active / (active + idle)
    solution = solve(store, np.array([target]))
    w = np.exp(column @ solution.point.theta_S - solution.point.log_mean)
    np.testing.assert_allclose(w, [target / p, (1 - target) / (1 - p)], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_a_brute_force_convex_solver(seed: int) -> None:
    """scipy minimises KL(w ‖ uniform) over the weights themselves, under the constraints: no dual involved."""
    rng = np.random.default_rng(seed)
    active = correlated(rng, 60, 3)
    target = 0.6 * active.mean(axis=0) + 0.4 * np.clip(active.mean(axis=0) + 0.25, 0, 0.9)
    solution = solve(PatternStore.from_activations(active), target)
    ours = weights(active, solution.point.theta_S)
    constraints = [
        {"type": "eq", "fun": lambda w: w.mean() - 1.0, "jac": lambda w: np.full(60, 1 / 60)},
        {"type": "eq", "fun": lambda w: active.T @ w / 60 - target, "jac": lambda w: active.T / 60},
    ]
    brute = optimize.minimize(
        lambda w: float((w * np.log(w)).mean()),
        np.ones(60),
        jac=lambda w: (np.log(w) + 1) / 60,
        bounds=[(1e-9, None)] * 60,
        constraints=constraints,
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    assert brute.success
    np.testing.assert_allclose(ours, brute.x, atol=2e-4)
    assert (ours * np.log(ours)).mean() <= (brute.x * np.log(brute.x)).mean() + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_rows_agree_with_a_brute_force_convex_solver(seed: int, monkeypatch) -> None:
    """One weight per row, rows of different length: scipy again minimises over the weights themselves."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(5, 40, 40).astype(float)
    counts = rng.binomial(sizes.astype(int)[:, None], np.clip(rng.normal(0.4, 0.2, (40, 3)), 0.02, 0.98))
    store = RowStore(Encoding.choose(np.arange(4)[None] < 3, 3), counts, sizes)
    share, base = counts / sizes[:, None], sizes / sizes.sum()
    target = 0.7 * base @ share + 0.3 * np.clip(base @ share + 0.2, 0, 0.9)
    solution = solve(store, target)
    assert solution.converged
    ours = np.exp(share @ solution.point.theta_S - solution.point.log_mean)
    brute = optimize.minimize(
        lambda w: float(base @ (w * np.log(w))),
        np.ones(40),
        jac=lambda w: base * (np.log(w) + 1),
        bounds=[(1e-9, None)] * 40,
        constraints=[
            {"type": "eq", "fun": lambda w: base @ w - 1.0, "jac": lambda w: base},
            {"type": "eq", "fun": lambda w: (base * w) @ share - target, "jac": lambda w: share.T * base},
        ],
        method="SLSQP",
        options={"maxiter": 2000, "ftol": 1e-14},
    )
    assert brute.success
    np.testing.assert_allclose(ours, brute.x, atol=5e-4)
    np.testing.assert_allclose((base * ours) @ share, target, atol=1e-9)
    assert base @ ours == pytest.approx(1, abs=1e-12)
    monkeypatch.setattr(rows, "BLOCK_VALUES", 9)  # blocks of three rows
    np.testing.assert_allclose(solve(store, target).point.theta_S, solution.point.theta_S, atol=1e-9)


@pytest.mark.parametrize(
    ("newton_constraints", "dense_constraints"),
    [(512, 1536), (0, 1536), (0, 4)],
    ids=["newton", "l-bfgs", "l-bfgs by layer"],
)
def test_many_experts_meet_their_targets(monkeypatch, tmp_path, newton_constraints, dense_constraints) -> None:
    monkeypatch.setattr(raking, "NEWTON_CONSTRAINTS", newton_constraints)
    monkeypatch.setattr(raking, "DENSE_CONSTRAINTS", dense_constraints)
    forget, retain = make_world(seed=3, layers=4, experts=10, top_k=3)
    _, store = build_store(retain.as_trace(), retain.tokens, np.ones((4, 10), dtype=bool), tmp_path)
    active = retain.dense(10)
    p = active.mean(axis=0)
    target = p + 0.3 * (forget.dense(10).mean(axis=0) - p)
    solution = solve(store, target)
    assert solution.converged
    w = weights(active, solution.point.theta_S)
    np.testing.assert_allclose(w @ active / w.sum(), target, atol=1e-6)
    assert abs(w.mean() - 1) < 1e-9


def test_sampled_hessian_and_newton_find_the_same_weights(monkeypatch, tmp_path) -> None:
    forget, retain = make_world(seed=5)
    everything = np.ones((3, 8), dtype=bool)
    _, store = build_store(retain.as_trace(), retain.tokens, everything, tmp_path)
    p, q = retain.dense(8).mean(axis=0), forget.dense(8).mean(axis=0)
    exact = temper(store, p, q, 0.5)
    monkeypatch.setattr(raking, "NEWTON_CONSTRAINTS", 0)
    monkeypatch.setattr(raking, "SAMPLE_TOKENS", 500)
    store.exact = False
    sampled = temper(store, p, q, 0.5)
    assert sampled.strength == pytest.approx(exact.strength, rel=2e-4)
    active = retain.dense(8)
    ours, theirs = (weights(active, t.solution.point.theta_S) for t in (sampled, exact))
    np.testing.assert_allclose(ours, theirs, rtol=2e-3)


def test_the_sample_of_rows_is_bounded_in_bytes_whatever_the_model(monkeypatch) -> None:
    """The shares of 65,536 rows over the 14,848 experts of a large model would be 7 GiB."""
    monkeypatch.setattr(rows, "SAMPLE_BYTES", 1 << 20)
    sizes = np.full(60_000, 8.0)
    wide = RowStore(
        Encoding.choose(np.ones((58, 256), dtype=bool), 8),
        np.broadcast_to(np.arange(60_000)[:, None] % 8, (60_000, 14_848)),
        sizes,
    )
    share, multiplicity = wide.sample(1 << 16)
    assert share.dtype == np.float32 and 0.9 * (1 << 20) < share.nbytes <= 1 << 20 and len(multiplicity) == len(share)
    np.testing.assert_allclose(share[:, 0], np.arange(0, 60_000, 60_000 // 17 + 1) % 8 / 8)
    narrow = RowStore(Encoding.choose(np.arange(4)[None] < 3, 3), np.ones((40_000, 3), np.uint16), sizes[:40_000])
    whole, _ = narrow.sample(0)
    assert whole.dtype == np.float64 and whole.shape == (40_000, 3)
    monkeypatch.setattr(rows, "MAX_UNIQUE_PATTERNS", 1)
    assert len(narrow.sample(30_000)[0]) == 20_000, "at most the limit, not up to twice as many"


@pytest.mark.parametrize("floor", [0.2, 0.5, 0.9, 1.0])
def test_the_floor_is_respected_and_reached(tmp_path, floor: float) -> None:
    forget, retain = make_world(seed=1)
    _, store = build_store(retain.as_trace(), retain.tokens, np.ones((3, 8), dtype=bool), tmp_path)
    active = retain.dense(8)
    p, q = active.mean(axis=0), forget.dense(8).mean(axis=0)
    tempered = temper(store, p, q, floor)
    w = weights(active, tempered.solution.point.theta_S)
    ess = w.sum() ** 2 / (len(w) * (w**2).sum())
    assert ess >= floor - 1e-12
    if tempered.strength < 1:
        assert ess < floor + 1e-3, "a larger lambda would have been possible"
    np.testing.assert_allclose(w @ active / w.sum(), p + tempered.strength * (q - p), atol=1e-6)


def test_a_lambda_limited_by_feasibility_rather_than_by_the_floor(monkeypatch) -> None:
    """The two experts exclude each other on retain text: q1 + q2 <= 1 bounds lambda below 1 with plenty of ESS left."""
    active = np.array([[1, 0]] * 50 + [[0, 1]] * 50 + [[0, 0]] * 100, dtype=bool)
    p, target = active.mean(axis=0), np.array([0.9, 0.6])
    limit = (1 - p.sum()) / (target - p).sum()
    for newton_constraints in (512, 0):
        monkeypatch.setattr(raking, "NEWTON_CONSTRAINTS", newton_constraints)
        tempered = temper(PatternStore.from_activations(active), p, target, 0.01)
        assert limit - 0.02 < tempered.strength <= limit + 1e-6
        assert tempered.solution.converged and tempered.solution.error < 1e-6


def test_order_of_tokens_changes_no_bit_of_deduplicated_patterns() -> None:
    rng = np.random.default_rng(0)
    active = correlated(rng, 4000, 9)
    target = active.mean(axis=0) + 0.05
    solutions = [
        solve(PatternStore.from_activations(active[order]), target).point.theta_S
        for order in (np.arange(4000), rng.permutation(4000), np.arange(4000)[::-1])
    ]
    for theta in solutions[1:]:
        np.testing.assert_array_equal(theta, solutions[0])


def test_order_of_documents_changes_nothing_beyond_rounding(tmp_path, monkeypatch) -> None:
    """Without de-duplication the sums are taken in another order: equal to 1e-9, not bit by bit."""
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 700)
    forget, retain = make_world(seed=2)
    p, q = retain.dense(8).mean(axis=0), forget.dense(8).mean(axis=0)
    every, _ = build_store(retain.as_trace(), retain.tokens, np.ones((3, 8), dtype=bool), tmp_path)
    target = p + 0.3 * (q - p)
    forward = solve(every, target).point
    every._memory = every._memory[::-1]
    backward = solve(every, target).point
    active = retain.dense(8)
    np.testing.assert_allclose(
        weights(active, forward.theta_S), weights(active, backward.theta_S), rtol=1e-6, atol=1e-9
    )


def test_number_of_torch_threads_changes_no_bit(tmp_path) -> None:
    import torch

    forget, retain = make_world(seed=4)
    _, store = build_store(retain.as_trace(), retain.tokens, np.ones((3, 8), dtype=bool), tmp_path)
    p, q = retain.dense(8).mean(axis=0), forget.dense(8).mean(axis=0)
    before = torch.get_num_threads()
    thetas = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            thetas.append(temper(store, p, q, 0.5).solution.point.theta_S)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*thetas)


def test_covariance_against_numpy() -> None:
    rng = np.random.default_rng(0)
    active, theta, counts = correlated(rng, 300, 5), rng.normal(size=5), rng.integers(1, 9, 300).astype(float)
    w = counts * np.exp(active @ theta)
    wanted = np.cov(active.T.astype(float), aweights=w, ddof=0)
    np.testing.assert_allclose(covariance(active, counts, theta), wanted, atol=1e-14)
    np.testing.assert_allclose(covariance(active, counts, theta, single=True), wanted, atol=1e-6)


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
    store = PatternStore.from_activations(active)
    p = active.mean(axis=0)
    offered = offer(store, p, np.array(targets[:constraints]), 20.0)
    assert ((offered.target_S >= 0) & (offered.target_S <= 1)).all()
    tempered = temper(store, p, offered.target_S, floor)
    w = weights(active, tempered.solution.point.theta_S)
    assert np.isfinite(w).all() and 0 <= tempered.strength <= 1
    assert abs(w.mean() - 1) < 1e-9
    assert w.sum() ** 2 / (count * (w**2).sum()) >= floor - 1e-9
    reached = p + tempered.strength * (offered.target_S - p)
    np.testing.assert_allclose(w @ active / w.sum(), reached, atol=1e-6)
    if kinds[0] in ("never", "always") and targets[0] != p[0]:
        assert offered.reason_S[0] == kinds[0] and offered.target_S[0] == p[0]


def test_identical_experts_are_offered_a_common_target() -> None:
    active = np.array([[1, 1], [0, 0], [0, 0], [1, 1]], dtype=bool)
    offered = offer(PatternStore.from_activations(active), active.mean(axis=0), np.array([0.6, 0.8]))
    np.testing.assert_allclose(offered.target_S, [0.7, 0.7], atol=1e-12)
    assert offered.reason_S == ["dependent", "dependent"]


def test_a_layer_whose_fixed_experts_leave_a_rest_still_sums_to_top_k(tmp_path) -> None:
    forget, retain = make_world(seed=7)
    trace = retain.trace_TLK.copy()
    trace[:, 1] = np.where(trace[:, 1] == 3, 7, trace[:, 1])  # expert 1/3 is never selected by retain text
    both = (trace[:, 1] == 7).sum(axis=1) == 2
    trace[both, 1] = [6, 7]
    retain = type(retain)(trace, retain.tokens, retain.topic_D)
    p, q = retain.dense(8).mean(axis=0), forget.dense(8).mean(axis=0)
    for store in build_store(retain.as_trace(), retain.tokens, np.ones((3, 8), dtype=bool), tmp_path):
        offered = offer(store, p, q)  # tokens as they are (no covariance to project on), then de-duplicated
        assert offered.target_S[8 + 3] == 0 and offered.reason_S[8 + 3] == "never"
        assert offered.target_S[8:16].sum() == pytest.approx(2.0, abs=1e-9)
        np.testing.assert_allclose(offered.target_S[:8], q[:8], atol=1e-9)
        assert temper(store, p, offered.target_S, 0.5).strength > 0.05


def rare_pair(rng: np.random.Generator, first: slice, second: slice) -> np.ndarray:
    """Eight correlated experts and two rare ones that are used by the tokens of the slices only, bool [20,000, 10]."""
    rare = np.zeros((20_000, 2), dtype=bool)
    rare[first, 0] = rare[second, 1] = True
    return np.concatenate([correlated(rng, 20_000, 8), rare], axis=1)


@pytest.mark.parametrize("newton_constraints", [512, 0])
@pytest.mark.parametrize(
    ("first", "second", "factors", "reason"),
    [
        (slice(5, 6), slice(5, 6), (10.0, 0.3), "rare"),  # on one token: both must have one frequency
        (slice(5, 8), slice(5, 11), (6.0, 0.4), "rare"),  # the first only where the second is
        (slice(0, 400), slice(0, 600), (3.0, 0.8), "tied"),
    ],
)
def test_two_experts_that_exclude_each_other_do_not_stop_the_others(
    monkeypatch, newton_constraints: int, first: slice, second: slice, factors: tuple[float, float], reason: str
) -> None:
    monkeypatch.setattr(raking, "NEWTON_CONSTRAINTS", newton_constraints)
    monkeypatch.setattr("trace_ds.calibration.targets.NEWTON_CONSTRAINTS", newton_constraints)
    active = rare_pair(np.random.default_rng(0), first, second)
    p = active.mean(axis=0)
    q = np.concatenate([np.clip(p[:8] + 0.15, 0, 0.95), p[8:] * factors])
    store = PatternStore.from_activations(active)
    assert temper(store, p, q, 0.5).strength < 0.3, "one lambda for all is set by the pair"
    theta, offered, tempered = rake(store, q, p, 20.0, 0.5)
    w = weights(active, theta)
    alone = temper(PatternStore.from_activations(active[:, :8]), p[:8], q[:8], 0.5)
    assert tempered.strength == pytest.approx(alone.strength, abs=0.02) and tempered.strength > 0.9
    np.testing.assert_allclose((w @ active / w.sum())[:8], (p + tempered.strength * (q - p))[:8], atol=1e-6)
    out = theta == 0
    assert not out[:8].any() and (out[8:].any() or offered.reason_S[9] == "dependent")
    assert {offered.reason_S[s] for s in np.flatnonzero(out)} <= {reason}
    np.testing.assert_allclose(offered.target_S[out], (w @ active / w.sum())[out], atol=1e-9)
    assert 1.0 / (w**2).mean() >= 0.5 - 1e-9


def test_an_expert_left_out_of_a_whole_layer_is_really_free(tmp_path) -> None:
    """The experts of a layer sum to K: unless another one gives way, it would still be held by the others."""
    forget, retain = make_world(seed=7)
    trace = retain.trace_TLK.copy()
    for layer, expert, last in ((1, 3, 108), (2, 5, 124)):  # the first only where the second is
        trace[:, layer] = np.where(trace[:, layer] == expert, 7, trace[:, layer])
        trace[(trace[:, layer] == 7).sum(axis=1) == 2, layer] = [6, 7]
        trace[100:last, layer] = [expert, 7]
    retain = type(retain)(trace, retain.tokens, retain.topic_D)
    p, q = retain.dense(8).mean(axis=0), forget.dense(8).mean(axis=0)
    q[8 + 3], q[16 + 5] = 5 * p[8 + 3], 0.2 * p[16 + 5]
    _, store = build_store(retain.as_trace(), retain.tokens, np.ones((3, 8), dtype=bool), tmp_path)
    theta, offered, tempered = rake(store, q, p, 20.0, 0.5)
    w = weights(retain.dense(8), theta)
    reached = w @ retain.dense(8) / w.sum()
    assert offered.reason_S[8 + 3] == offered.reason_S[16 + 5] == "rare" and tempered.strength > 0.05
    np.testing.assert_allclose(reached, tempered.solution.target_S, atol=1e-6)
    wanted = p + tempered.strength * (offered.target_S - p)
    kept = np.array([reason == "" for reason in offered.reason_S])
    assert kept.sum() == 22 and np.abs(reached - wanted)[kept].max() < 0.01


def test_a_target_far_beyond_the_retain_frequency_is_limited() -> None:
    active = np.zeros((1000, 1), dtype=bool)
    active[0] = True
    offered = offer(PatternStore.from_activations(active), np.array([0.001]), np.array([0.4]), limit=20.0)
    assert offered.target_S[0] == pytest.approx(0.02) and offered.reason_S == ["rare"]


def test_infeasible_fixed_targets_are_reported_not_hidden() -> None:
    active = np.array([[1, 0], [0, 1], [1, 1], [0, 0]], dtype=bool)[:2]
    solution = solve(PatternStore.from_activations(active), np.array([0.9, 0.9]))
    assert not solution.converged and solution.error > 0.1


def test_empty_scope_and_no_tokens() -> None:
    store = PatternStore(Encoding.choose(np.zeros((2, 4), dtype=bool), 2), 3, False, [np.zeros((0, 3), np.uint8)])
    tempered = temper(store, np.zeros(0), np.zeros(0), 0.5)
    assert tempered.strength == 1.0 and tempered.solution.point.ess == 1.0
    with pytest.raises(ValueError, match="no counted tokens"):
        evaluate(PatternStore(store.encoding, 0, False, []), np.zeros(0))
