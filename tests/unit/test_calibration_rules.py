"""Weight rules on a synthetic world with correlated documents: what each promises, and what the controls break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_world import Corpus, make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ds.calibration import tokens as token_module
from trace_ds.calibration.detect import Detection, detect
from trace_ds.calibration.rules import (
    RuleResult,
    WeightRequest,
    choose_experts,
    source_log_weights,
    weigh_rows,
    weigh_tokens,
)
from trace_ds.config.sections.calibration import RULES, CalibrationConfig, DetectionConfig

EXPERTS = 8
BY_ROWS = [rule for rule in RULES if rule != "literal"]
SOLVED = [rule for rule in BY_ROWS if rule != "uniform"]
TOPICS = [f"topic/{t}" for t in range(5)]
World = tuple[Corpus, Corpus, Detection]


@pytest.fixture(scope="module")
def world() -> World:
    forget, retain = make_world(seed=0)
    detection = detect(forget.statistics(EXPERTS), retain.statistics(EXPERTS), DetectionConfig())
    assert 2 <= detection.selected_LE.sum() < 16
    return forget, retain, detection


def requested(world: World, seed: int = 0, **options: Any) -> WeightRequest:
    _, retain, detection = world
    config = CalibrationConfig(**options)
    sources = source_log_weights(config.source_weights, TOPICS, retain.topic_D) if config.source_weights else None
    return WeightRequest(
        config,
        retain.tokens,
        choose_experts(config, detection, seed),
        detection.forget_LE,
        detection.retain_LE,
        np.zeros_like(detection.retain_LE),
        seed,
        sources,
    )


def by_tokens(world: World, folder: Path, parts: int = 1, **options: Any) -> tuple[RuleResult, np.ndarray]:
    """(result, weights of the counted tokens)."""
    folder.mkdir(exist_ok=True)
    weighting = weigh_tokens(requested(world, **options), world[1].as_trace(parts), folder)
    return weighting, np.asarray(weighting.weight_T)[world[1].counted_T]


def by_rows(world: World, parts: int = 1, **options: Any) -> RuleResult:
    return weigh_rows(requested(world, **options), world[1].selections(EXPERTS, parts))


def size(w: np.ndarray) -> float:
    return float(w.sum() ** 2 / (len(w) * (w**2).sum()))


def reached(world: World, w: np.ndarray) -> np.ndarray:
    return (w @ world[1].dense(EXPERTS) / w.sum()).reshape(world[2].forget_LE.shape)


@pytest.mark.parametrize("rule", RULES)
def test_weights_of_tokens_have_mean_one_and_keep_the_floor(world: World, tmp_path: Path, rule: str) -> None:
    weighting, w = by_tokens(world, tmp_path, rule=rule)
    tokens, counted_T = world[1].tokens, world[1].counted_T
    assert abs(w.mean() - 1) < 1e-9 and (w > 0).all()
    assert weighting.ess == pytest.approx(size(w), rel=1e-9) and weighting.max_weight == pytest.approx(w.max())
    assert size(w) >= 0.5 - 1e-9
    np.testing.assert_allclose(weighting.achieved_LE, reached(world, w), atol=1e-12)
    weight_T = np.asarray(weighting.weight_T)
    for row in range(tokens.rows):
        at = slice(*(int(x) for x in tokens.row_starts_R1[row : row + 2]))
        mine = weight_T[at][counted_T[at]]
        assert weighting.row_weight_R[row] == pytest.approx(mine.mean() if len(mine) else 0.0, rel=1e-12)


@pytest.mark.parametrize("rule", SOLVED)
def test_weights_of_rows_meet_the_floor_of_the_rows_without_a_trace(world: World, rule: str) -> None:
    floor, (_, retain, detection) = 0.3, world
    weighting = by_rows(world, rule=rule, ess_floor=floor)
    sizes_R = retain.tokens.counted_per_row()
    slack = 0.05 if rule == "permuted" else 0.001  # its rows are of unequal length
    assert floor * (1 - slack) <= size(weighting.row_weight_R[sizes_R > 0]) < floor * (1 + slack)
    assert weighting.row_weight_R @ sizes_R / sizes_R.sum() == pytest.approx(1.0, abs=1e-12)
    row_T = retain.tokens.row_of(0, retain.tokens.tokens)[retain.counted_T]
    np.testing.assert_allclose(weighting.achieved_LE, reached(world, weighting.row_weight_R[row_T]), atol=1e-12)
    if rule == "permuted":
        assert not weighting.theta_LE.any(), "a theta that does not give these weights must not be offered"
    else:
        score_T = retain.dense(EXPERTS) @ weighting.theta_LE.ravel()
        score_R = np.bincount(row_T, score_T, retain.tokens.rows) / np.maximum(sizes_R, 1)
        np.testing.assert_allclose(
            weighting.row_weight_R, np.where(sizes_R > 0, np.exp(score_R - weighting.log_mean), 0.0), rtol=1e-9
        )
    before = np.abs(detection.retain_LE - detection.forget_LE)[detection.selected_LE]
    after = np.abs(weighting.achieved_LE - detection.forget_LE)[detection.selected_LE]
    assert rule != "raking" or (after < before).all()


@pytest.mark.parametrize("experts", ["all", "selected"])
def test_each_selected_expert_comes_closer_to_its_forget_frequency(world: World, tmp_path: Path, experts: str) -> None:
    """The sentence of the abstract."""
    detection = world[2]
    weighting, _ = by_tokens(world, tmp_path, experts=experts)
    before = np.abs(detection.retain_LE - detection.forget_LE)[detection.selected_LE]
    assert (np.abs(weighting.achieved_LE - detection.forget_LE)[detection.selected_LE] < before).all()
    np.testing.assert_allclose(
        weighting.achieved_LE[weighting.scope_LE], weighting.target_LE[weighting.scope_LE], atol=1e-6
    )
    expected = detection.retain_LE + weighting.lambda_ * (detection.forget_LE - detection.retain_LE)
    np.testing.assert_allclose(weighting.target_LE[weighting.scope_LE], expected[weighting.scope_LE], atol=1e-9)
    assert weighting.lambda_ > 0.02


def test_permuted_keeps_the_weights_and_forgets_their_meaning(world: World, tmp_path: Path) -> None:
    raked, w = by_tokens(world, tmp_path / "a")
    weighting, permuted = by_tokens(world, tmp_path / "b", rule="permuted")
    np.testing.assert_array_equal(np.sort(permuted), np.sort(w))
    assert abs(np.corrcoef(w, permuted)[0, 1]) < 0.05 and not weighting.theta_LE.any()
    neighbours = [np.corrcoef(x[:-1], x[1:])[0, 1] for x in (w, permuted)]
    assert neighbours[1] == pytest.approx(neighbours[0], abs=0.01)
    rows = [by_rows(world, rule=rule) for rule in ("raking", "permuted")]
    np.testing.assert_allclose(*(np.sort(each.row_weight_R) for each in rows), rtol=0.02)
    assert abs(np.corrcoef(*(each.row_weight_R for each in rows))[0, 1]) < 0.1
    retain_LE = world[2].retain_LE
    for moved, control in ((raked, weighting), rows):
        there, here = (np.abs(each.achieved_LE - retain_LE).max() for each in (moved, control))
        assert here < 0.35 * there


@pytest.mark.parametrize("rule", ["random_experts", "lowest_experts"])
def test_other_experts_are_as_many_and_meet_their_true_targets(world: World, tmp_path: Path, rule: str) -> None:
    detection = world[2]
    weighting, _ = by_tokens(world, tmp_path, rule=rule)
    count = int(detection.selected_LE.sum())
    assert weighting.scope_LE.sum() == count
    if rule == "lowest_experts":
        assert set(np.flatnonzero(weighting.scope_LE)) == set(np.argsort(detection.log_ratio_LE, axis=None)[:count])
    else:
        draws = {choose_experts(CalibrationConfig(rule=rule), detection, seed).tobytes() for seed in range(4)}
        assert len(draws) > 2 and detection.selected_LE.tobytes() not in draws
    expected = detection.retain_LE + weighting.lambda_ * (detection.forget_LE - detection.retain_LE)
    np.testing.assert_allclose(weighting.achieved_LE[weighting.scope_LE], expected[weighting.scope_LE], atol=1e-6)


def test_literal_against_the_slow_way(world: World, tmp_path: Path) -> None:
    _, retain, detection = world
    weighting, w = by_tokens(world, tmp_path, rule="literal", ess_floor=0.01, clip=4.0)  # experts: all changes nothing
    ratio = np.clip(detection.forget_LE / detection.retain_LE, 1 / 4.0, 4.0)[detection.selected_LE]
    active = retain.dense(EXPERTS)[:, detection.selected_LE.ravel()]
    expected = np.array([ratio[row].mean() if row.any() else 1.0 for row in active])
    assert weighting.exponent == 1.0 and len(np.unique(expected)) > 2
    np.testing.assert_allclose(w, expected / expected.mean(), rtol=1e-9)
    weighting, w = by_tokens(world, tmp_path / "flat", rule="literal", ess_floor=0.97)
    assert 0 < weighting.exponent < 1 and 0.97 <= size(w) < 0.972


@pytest.mark.parametrize("rule", RULES)
def test_sharding_changes_no_bit_and_neither_does_running_again(world, tmp_path, monkeypatch, rule: str) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 1000)
    weighting = [by_tokens(world, tmp_path / str(n), parts=parts, rule=rule)[1] for n, parts in enumerate((1, 1, 5))]
    np.testing.assert_array_equal(weighting[0], weighting[1])
    np.testing.assert_array_equal(weighting[0], weighting[2])
    if rule in BY_ROWS:
        rows = [by_rows(world, parts=parts, rule=rule).row_weight_R for parts in (1, 5)]
        np.testing.assert_array_equal(rows[0], rows[1])


def test_source_weights_are_those_asked_for_until_the_floor_flattens_them(world: World, tmp_path: Path) -> None:
    corpus = world[1]
    topic_T = corpus.topic_D[np.asarray(corpus.tokens.document_ids_T)[corpus.counted_T]]
    requests = np.where(topic_T == 1, 3.0, 1.0)
    weighting, w = by_tokens(world, tmp_path, rule="uniform", source_weights={"topic/1": 3.0})
    assert weighting.exponent == 1.0 and not weighting.scope_LE.any() and not weighting.theta_LE.any()
    np.testing.assert_allclose(w, requests / requests.mean(), rtol=1e-12)
    huge = {"rule": "uniform", "source_weights": {"topic/1": 1e6}, "ess_floor": 0.3}
    weighting, w = by_tokens(world, tmp_path / "a", **huge)
    assert 0.3 <= weighting.ess < 0.301 and 0 < weighting.exponent < 1
    assert len(np.unique(w)) == 2 and (w[topic_T == 1].min() > w[topic_T != 1].max())
    rows = by_rows(world, **huge)
    assert 0.3 <= size(rows.row_weight_R[rows.row_weight_R > 0]) < 0.301
    row_T = corpus.tokens.row_of(0, corpus.tokens.tokens)[corpus.counted_T]
    near_R = np.bincount(row_T, topic_T == 1) / np.bincount(row_T)
    assert np.corrcoef(near_R, rows.row_weight_R)[0, 1] > 0.5


def test_source_patterns_multiply_and_one_that_matches_nothing_is_named() -> None:
    names, source_D = ["near/code", "near/element", "general/x"], np.array([2, 1, 0, 1])
    log_D = source_log_weights({"near/*": 4.0, "*element": 2.5}, names, source_D)
    np.testing.assert_allclose(np.exp(log_D), [1.0, 10.0, 4.0, 10.0])
    with pytest.raises(ValueError, match=r"no retain document has a source like 'nera/\*'; there are general/x"):
        source_log_weights({"nera/*": 4.0}, names, source_D)


def test_theta_gives_the_weights_and_is_centred_in_fully_constrained_layers(world: World, tmp_path: Path) -> None:
    _, retain, detection = world
    weighting, w = by_tokens(world, tmp_path)
    score = retain.dense(EXPERTS) @ weighting.theta_LE.ravel()
    np.testing.assert_allclose(np.exp(score - weighting.log_mean), w, rtol=1e-9)
    np.testing.assert_allclose((detection.retain_LE * weighting.theta_LE).sum(axis=1), 0.0, atol=1e-12)


@settings(max_examples=10, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rule=st.sampled_from(RULES),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
)
def test_tiny_and_odd_corpora(tmp_path_factory, seed: int, rule: str, lengths: list[int]) -> None:
    """Rows of one token, rows without any counted token, one counted token in all: finite weights of mean 1."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum([2, *lengths])]).astype(np.int64)
    total = int(starts[-1])
    documents = np.sort(rng.integers(0, 3, total)).astype(np.int32)
    documents[:2] = 0
    trace = np.argsort(rng.random((total, 2, 4)), axis=2)[:, :, :2].astype(np.uint8)
    corpus = Corpus(trace, token_module.TokenMap(starts, np.sort(documents), 3), np.zeros(3))
    p = corpus.dense(4).mean(axis=0).reshape(2, 4)
    q = np.minimum(rng.dirichlet(np.ones(4), 2) * 2, 1.0)
    scope_LE = np.zeros((2, 4), dtype=bool) if rule == "uniform" else np.ones((2, 4), dtype=bool)
    unknown_LE = np.full((2, 4), np.inf)  # the errors of a corpus of one document
    request = WeightRequest(CalibrationConfig(rule=rule), corpus.tokens, scope_LE, q, p, unknown_LE)
    weighting = weigh_tokens(request, corpus.as_trace(), tmp_path_factory.mktemp("spool"))
    w = np.asarray(weighting.weight_T)[corpus.counted_T]
    assert np.isfinite(w).all() and abs(w.mean() - 1) < 1e-9
    assert np.isfinite(weighting.row_weight_R).all() and np.isfinite(weighting.theta_LE).all()
    if rule in BY_ROWS:
        rows = weigh_rows(request, corpus.selections(4))
        assert np.isfinite(rows.row_weight_R).all() and np.isfinite(rows.theta_LE).all()
        sizes_R = corpus.tokens.counted_per_row()
        assert rows.row_weight_R @ sizes_R / sizes_R.sum() == pytest.approx(1.0)
