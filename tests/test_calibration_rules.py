"""Weight rules on a synthetic world with correlated documents: what each promises, and what the controls break."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import Corpus, make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ds.calibration import tokens as token_module
from trace_ds.calibration.detect import Detection, detect
from trace_ds.calibration.rules import Calibrated, apply_rule, scope_of, source_log_weights
from trace_ds.config.sections.calibration import CONTROL_RULES, RULES, CalibrationConfig, DetectionConfig

EXPERTS = 8
RULES_THAT_CALIBRATE = [rule for rule in RULES if rule not in CONTROL_RULES]
SOURCE_WEIGHTS = {"topic/1": 3.0}


@pytest.fixture(scope="module")
def world() -> tuple[Corpus, Corpus, Detection]:
    forget, retain = make_world(seed=0)
    detection = detect(forget.statistics(EXPERTS), retain.statistics(EXPERTS), DetectionConfig())
    assert 2 <= detection.selected_LE.sum() < 16
    return forget, retain, detection


def run(world, folder, parts: int = 1, seed: int = 0, **options) -> tuple[Calibrated, np.ndarray, np.ndarray]:
    """(result, weights of the counted tokens, weighted frequencies [L, E])."""
    _, retain, detection = world
    if options.get("rule") == "sources":
        options.setdefault("source_weights", SOURCE_WEIGHTS)
    config = CalibrationConfig(**options)
    trace, by_row = retain.as_trace(parts), None
    if config.level == "row":
        by_row, trace = retain.selections(EXPERTS, parts), None
    made = apply_rule(
        config,
        retain.tokens,
        trace,
        scope_of(config, detection.selected_LE, detection.eligible_LE, seed, detection.log_ratio_LE),
        detection.forget_LE,
        detection.retain_LE,
        seed,
        folder,
        log_weight_D=source_log_weights(config.source_weights, [f"topic/{t}" for t in range(5)], retain.topic_D),
        selections=by_row,
    )
    everywhere = np.array(made.weight_T)
    assert (everywhere[~retain.counted_T] == 0).all()
    w = everywhere[retain.counted_T]
    return made, w, (w @ retain.dense(EXPERTS) / w.sum()).reshape(detection.forget_LE.shape)


@pytest.mark.parametrize("experts", ["all", "selected"])
@pytest.mark.parametrize("rule", RULES)
def test_mean_weight_floor_and_rows(world, tmp_path, rule: str, experts: str) -> None:
    made, w, _ = run(world, tmp_path, rule=rule, experts=experts)
    tokens = world[1].tokens
    assert abs(w.mean() - 1) < 1e-9 and (w > 0).all()
    ess = w.sum() ** 2 / (len(w) * (w**2).sum())
    assert made.ess == pytest.approx(ess, rel=1e-9) and made.max_weight == pytest.approx(w.max())
    assert ess >= 0.5 - (1e-2 if rule == "permuted" else 1e-9)
    counted_T, weight_T = world[1].counted_T, np.array(made.weight_T)
    for row in range(tokens.rows):
        at = slice(*(int(x) for x in tokens.row_starts_R1[row : row + 2]))
        mine = weight_T[at][counted_T[at]]
        assert made.row_weight_R[row] == pytest.approx(mine.mean() if len(mine) else 0.0, rel=1e-12)


@pytest.mark.parametrize("experts", ["all", "selected"])
@pytest.mark.parametrize("rule", RULES_THAT_CALIBRATE)
def test_each_selected_expert_comes_closer_to_its_forget_frequency(world, tmp_path, rule, experts) -> None:
    """The sentence of the abstract."""
    detection = world[2]
    _, _, achieved_LE = run(world, tmp_path, rule=rule, experts=experts)
    before = np.abs(detection.retain_LE - detection.forget_LE)[detection.selected_LE]
    after = np.abs(achieved_LE - detection.forget_LE)[detection.selected_LE]
    assert (after < before).all()


def test_raking_meets_its_targets(world, tmp_path) -> None:
    detection = world[2]
    made, _, achieved_LE = run(world, tmp_path)
    np.testing.assert_allclose(achieved_LE, made.target_LE, atol=1e-6)
    wanted = detection.retain_LE + made.strength * (detection.forget_LE - detection.retain_LE)
    np.testing.assert_allclose(made.target_LE, wanted, atol=1e-9)
    assert made.strength > 0.02


def test_ratios_that_move_an_expert_the_wrong_way_are_corrected(tmp_path) -> None:
    """Experts 0/0 and 1/0 exclude each other on retain text; 0/0 should double and 1/0 should rise a little."""
    kinds = [[[0], [1]]] * 4 + [[[1], [0]]] * 5 + [[[1], [1]]]  # by row: one of ten rows selects neither
    trace = np.repeat(np.array(kinds, np.uint8), 11, axis=0)
    token_map = token_module.TokenMap(np.arange(0, 111, 11), np.repeat(np.arange(10, dtype=np.int32), 11), 10)
    corpus = Corpus(trace, token_map, np.zeros(10))
    p = np.array([[0.4, 0.6], [0.5, 0.5]])
    np.testing.assert_allclose(corpus.dense(2).mean(axis=0).reshape(2, 2), p)
    q = np.array([[0.8, 0.2], [0.525, 0.475]])
    selected = np.array([[True, False], [True, False]])
    config = CalibrationConfig(rule="ratio_mean", ess_floor=0.05)
    made = apply_rule(config, token_map, corpus.as_trace(), selected, q, p, 0, tmp_path)
    w = np.array(made.weight_T)[corpus.counted_T]
    achieved = (w @ corpus.dense(2) / w.sum()).reshape(2, 2)
    assert (np.abs(achieved - q) < np.abs(p - q))[selected].all()
    assert made.iterations > 0 and "ratios were corrected" in made.notes[0]
    plain = np.where(corpus.dense(2)[:, 0], q[0, 0] / p[0, 0], q[1, 0] / p[1, 0])  # what the rule says literally
    moved = (plain @ corpus.dense(2) / plain.sum()).reshape(2, 2)
    assert abs(moved[1, 0] - q[1, 0]) > abs(p[1, 0] - q[1, 0])


def test_inverse_goes_the_other_way_and_is_raking_upside_down(world, tmp_path) -> None:
    detection = world[2]
    (tmp_path / "a").mkdir()
    _, w, _ = run(world, tmp_path / "a", rule="raking")
    made, inverse, achieved_LE = run(world, tmp_path, rule="inverse")
    before = np.abs(detection.retain_LE - detection.forget_LE)[detection.selected_LE]
    assert (np.abs(achieved_LE - detection.forget_LE)[detection.selected_LE] > before).all()
    wanted = w**-made.exponent
    np.testing.assert_allclose(inverse, wanted / wanted.mean(), rtol=1e-9)


def test_permuted_keeps_the_weights_of_rows_and_forgets_their_meaning(world, tmp_path) -> None:
    (tmp_path / "a").mkdir()
    raked, w, raked_LE = run(world, tmp_path / "a", rule="raking")
    made, permuted, achieved_LE = run(world, tmp_path, rule="permuted")
    np.testing.assert_allclose(np.sort(made.row_weight_R), np.sort(raked.row_weight_R), rtol=0.02)
    assert abs(np.corrcoef(w, permuted)[0, 1]) < 0.05
    retain_LE = world[2].retain_LE
    assert np.abs(achieved_LE - retain_LE).max() < 0.35 * np.abs(raked_LE - retain_LE).max()
    assert not made.theta_LE.any(), "a theta that does not give these weights must not be offered"


def test_permuting_rows_of_equal_length_keeps_both_multisets_exactly(tmp_path) -> None:
    rng = np.random.default_rng(0)
    size, rows = 10, 40
    documents = np.repeat(np.arange(rows, dtype=np.int32), size)
    starts = np.arange(0, rows * size + 1, size)
    trace = rng.integers(0, 4, (rows * size, 2, 1)).astype(np.uint8)
    corpus = Corpus(trace, token_module.TokenMap(starts, documents, rows), np.zeros(rows))
    p = corpus.dense(4).mean(axis=0).reshape(2, 4)
    q = np.roll(p, 1, axis=1)
    results = {}
    for rule in ("raking", "permuted"):
        folder = tmp_path / rule
        folder.mkdir()
        config = CalibrationConfig(rule=rule)
        everything = np.ones((2, 4), dtype=bool)
        results[rule] = apply_rule(config, corpus.tokens, corpus.as_trace(), everything, q, p, 0, folder)
    a, b = results["raking"], results["permuted"]
    np.testing.assert_allclose(np.sort(a.weight_T), np.sort(b.weight_T), rtol=1e-9)
    np.testing.assert_allclose(np.sort(a.row_weight_R), np.sort(b.row_weight_R), rtol=1e-9)
    assert not np.allclose(a.row_weight_R, b.row_weight_R)


@pytest.mark.parametrize("rule", ["random_experts", "lowest_experts"])
def test_other_experts_are_as_many_and_meet_their_true_targets(world, tmp_path, rule: str) -> None:
    detection = world[2]
    made, _, achieved_LE = run(world, tmp_path, rule=rule)
    count = int(detection.selected_LE.sum())
    assert made.scope_LE.sum() == count
    if rule == "lowest_experts":
        assert set(np.flatnonzero(made.scope_LE)) == set(np.argsort(detection.log_ratio_LE, axis=None)[:count])
    else:
        draws = {run(world, tmp_path, rule=rule, draw=draw)[0].scope_LE.tobytes() for draw in range(4)}
        assert len(draws) > 2 and detection.selected_LE.tobytes() not in draws
    wanted = detection.retain_LE + made.strength * (detection.forget_LE - detection.retain_LE)
    np.testing.assert_allclose(achieved_LE[made.scope_LE], wanted[made.scope_LE], atol=1e-6)


@pytest.mark.parametrize("rule", ["ratio_mean", "ratio_max"])
def test_ratio_rules_against_the_slow_way(world, tmp_path, rule: str) -> None:
    _, retain, detection = world
    made, w, _ = run(world, tmp_path, rule=rule, experts="selected", ess_floor=0.01, clip=1.5)
    ratio = np.clip(detection.forget_LE / detection.retain_LE, 1 / 1.5, 1.5)[detection.selected_LE]
    active = retain.dense(EXPERTS)[:, detection.selected_LE.ravel()]
    wanted = np.ones(len(active))
    for t, row in enumerate(active):
        if row.any():
            wanted[t] = ratio[row].mean() if rule == "ratio_mean" else ratio[row].max()
    assert made.exponent == 1.0
    np.testing.assert_allclose(w, wanted / wanted.mean(), rtol=1e-9)


def test_ratio_rules_are_flattened_to_the_floor(world, tmp_path) -> None:
    made, w, _ = run(world, tmp_path, rule="ratio_max", experts="selected", ess_floor=0.97)
    ess = w.sum() ** 2 / (len(w) * (w**2).sum())
    assert 0 < made.exponent < 1 and 0.97 <= ess < 0.972


@pytest.mark.parametrize("floor", [0.3, 0.8])
@pytest.mark.parametrize("rule", ["raking", "permuted", "random_experts", "inverse"])
def test_level_row_meets_the_floor_of_the_rows_without_a_trace(world, tmp_path, rule: str, floor: float) -> None:
    _, retain, detection = world
    made, w, achieved_LE = run(world, tmp_path, rule=rule, level="row", ess_floor=floor)
    drawn = made.row_weight_R[made.row_weight_R > 0]
    size = drawn.sum() ** 2 / (len(drawn) * (drawn**2).sum())
    slack = 0.05 if rule == "permuted" else 0.001  # its rows are of unequal length
    assert floor * (1 - slack) <= size < floor * (1 + slack)
    assert abs(w.mean() - 1) < 1e-9
    counted_T, weight_T = retain.counted_T, np.array(made.weight_T)
    score_T, share_R = np.zeros(retain.tokens.tokens), np.zeros(retain.tokens.rows)
    score_T[counted_T] = retain.dense(EXPERTS) @ made.theta_LE.ravel()
    for row in range(retain.tokens.rows):
        at = slice(*(int(x) for x in retain.tokens.row_starts_R1[row : row + 2]))
        mine = weight_T[at][counted_T[at]]
        share_R[row] = score_T[at][counted_T[at]].mean()
        np.testing.assert_allclose(mine, made.row_weight_R[row], rtol=1e-9)
    if rule != "permuted":
        np.testing.assert_allclose(made.row_weight_R, np.exp(share_R - made.log_mean), rtol=1e-9)
        np.testing.assert_allclose(achieved_LE, made.target_LE, atol=1e-9)
    before = np.abs(detection.retain_LE - detection.forget_LE)[detection.selected_LE]
    after = np.abs(achieved_LE - detection.forget_LE)[detection.selected_LE]
    assert rule != "raking" or (after < before).all()
    assert rule != "inverse" or (after > before).all()


def test_level_row_takes_the_near_rows_where_row_means_of_token_weights_take_half_of_them(world, tmp_path) -> None:
    """At one floor: what is drawn, in the share of the near topic's documents."""
    _, retain, _ = world
    near_T = (retain.topic_D == 1)[np.asarray(retain.tokens.document_ids_T)][retain.counted_T]
    row_T = np.concatenate([retain.tokens.row_of(*span) for span in retain.tokens.spans()])[retain.counted_T]
    share = {}
    for level in ("token", "row"):
        (tmp_path / level).mkdir()
        made, _, _ = run(world, tmp_path / level, level=level, ess_floor=0.3)
        drawn_T = made.row_weight_R[row_T]
        share[level] = float(drawn_T[near_T].sum() / drawn_T.sum() / near_T.mean())
    assert share["row"] > share["token"] > 1.2


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "permuted"])  # that one depends on places by intent
def test_the_order_of_the_rows_does_not_matter(world, tmp_path, rule: str) -> None:
    forget, retain, detection = world
    starts = retain.tokens.row_starts_R1
    order = np.random.default_rng(0).permutation(retain.tokens.rows)
    place_T = np.concatenate([np.arange(starts[row], starts[row + 1]) for row in order])
    row_T, old_T = np.repeat(order, np.diff(starts)[order]), retain.tokens.document_ids_T[place_T]
    documents_T = np.append(0, np.cumsum((np.diff(row_T) != 0) | (np.diff(old_T) != 0))).astype(np.int32)
    moved = token_module.TokenMap(
        np.append(0, np.cumsum(np.diff(starts)[order])), documents_T, int(documents_T[-1]) + 1
    )
    topics = retain.topic_D[old_T[np.unique(documents_T, return_index=True)[1]]]
    made = []
    for number, corpus in enumerate((retain, Corpus(retain.trace_TLK[place_T], moved, topics))):
        folder = tmp_path / str(number)
        folder.mkdir()
        made.append(run((forget, corpus, detection), folder, rule=rule)[0])
    np.testing.assert_allclose(made[1].weight_T, made[0].weight_T[place_T], rtol=1e-9)
    np.testing.assert_allclose(made[1].row_weight_R, made[0].row_weight_R[order], rtol=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_sharding_changes_no_bit_and_neither_does_running_again(world, tmp_path, monkeypatch, rule) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 1000)
    weights = []
    for number, parts in enumerate((1, 1, 5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        weights.append(run(world, folder, parts=parts, rule=rule)[1])
    np.testing.assert_array_equal(weights[0], weights[1])
    np.testing.assert_array_equal(weights[0], weights[2])


def test_uniform_needs_no_trace_and_others_say_so(world, tmp_path) -> None:
    _, retain, detection = world
    nothing = np.zeros_like(detection.selected_LE)
    p, q = detection.forget_LE, detection.retain_LE
    made = apply_rule(CalibrationConfig(rule="uniform"), retain.tokens, None, nothing, p, q, 0, tmp_path)
    assert (np.array(made.weight_T)[retain.counted_T] == 1.0).all() and made.ess == 1.0
    with pytest.raises(ValueError, match="level row needs the selections"):
        apply_rule(CalibrationConfig(level="row"), retain.tokens, None, ~nothing, p, q, 0, tmp_path)
    with pytest.raises(ValueError, match="needs the routing trace"):
        apply_rule(CalibrationConfig(), retain.tokens, None, ~nothing, p, q, 0, tmp_path)


def test_sources_weights_are_those_asked_for_until_the_floor_flattens_them(world, tmp_path) -> None:
    corpus = world[1]
    topic_T = corpus.topic_D[np.asarray(corpus.tokens.document_ids_T)[corpus.counted_T]]
    asked = np.where(topic_T == 1, 3.0, 1.0)
    made, w, _ = run(world, tmp_path, rule="sources")
    assert made.exponent == 1.0 and not made.scope_LE.any() and not made.theta_LE.any()
    np.testing.assert_allclose(w, asked / asked.mean(), rtol=1e-12)
    (tmp_path / "a").mkdir()
    made, w, _ = run(world, tmp_path / "a", rule="sources", source_weights={"topic/1": 1e6}, ess_floor=0.3)
    assert 0.3 <= made.ess < 0.301 and 0 < made.exponent < 1
    assert len(np.unique(w)) == 2 and (w[topic_T == 1].min() > w[topic_T != 1].max())


def test_source_patterns_multiply_and_one_that_matches_nothing_is_named() -> None:
    names, source_D = ["near/code", "near/element", "general/x"], np.array([2, 1, 0, 1])
    log_D = source_log_weights({"near/*": 4.0, "*element": 2.5}, names, source_D)
    np.testing.assert_allclose(np.exp(log_D), [1.0, 10.0, 4.0, 10.0])
    with pytest.raises(ValueError, match=r"no retain document has a source like 'nera/\*'; there are 3: general/x"):
        source_log_weights({"nera/*": 4.0}, names, source_D)


def test_theta_gives_the_weights_and_is_centred_in_fully_constrained_layers(world, tmp_path) -> None:
    _, retain, detection = world
    made, w, _ = run(world, tmp_path)
    score = retain.dense(EXPERTS) @ made.theta_LE.ravel()
    again = np.exp(score - score.max())
    np.testing.assert_allclose(again / again.mean(), w, rtol=1e-9)
    np.testing.assert_allclose((detection.retain_LE * made.theta_LE).sum(axis=1), 0.0, atol=1e-12)


@settings(max_examples=30, deadline=None)
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
    q = rng.dirichlet(np.ones(4), 2) * 2
    q = np.minimum(q, 1.0)
    weights = {"a": 7.0, "b*": 0.5} if rule == "sources" else {}
    config = CalibrationConfig(rule=rule, source_weights=weights)
    scope_LE = scope_of(config, q > p, np.ones((2, 4), dtype=bool), 0, q - p)
    folder = tmp_path_factory.mktemp("spool")
    log_weight_D = source_log_weights(weights, ["a", "b", "c"], rng.integers(0, 3, 3))
    made = apply_rule(config, corpus.tokens, corpus.as_trace(), scope_LE, q, p, 0, folder, log_weight_D=log_weight_D)
    w = np.array(made.weight_T)[corpus.counted_T]
    assert np.isfinite(w).all() and abs(w.mean() - 1) < 1e-9
    assert np.isfinite(made.row_weight_R).all() and np.isfinite(made.theta_LE).all()
