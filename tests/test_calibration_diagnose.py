"""The diagnosis: divergences, likeness and its warning, shares, variance decomposition."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import Corpus, make_corpus
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from trace_ds.calibration.detect import detect
from trace_ds.calibration.diagnose import (
    Documents,
    document_sums,
    entropy_bits,
    find_warnings,
    jensen_shannon_bits,
    likeness,
    likeness_tables,
    quantiles,
    source_shares,
    top_documents,
    weight_variance,
)
from trace_ds.calibration.rules import apply_rule, scope_of
from trace_ds.config.sections.calibration import CalibrationConfig, DetectionConfig

EXPERTS = 8


def worlds(near_share: float) -> tuple[Corpus, Corpus]:
    """Forget topic 0; retain topics 2 … 4 and a share of topic 1, which is routed as topic 0."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=0.8, size=(5, 3, EXPERTS))
    logits[1] = logits[0]
    topics = np.where(rng.random(300) < near_share, 1, rng.integers(2, 5, 300))
    return make_corpus(rng, np.zeros(100, np.int64), logits, 2), make_corpus(rng, topics, logits, 2, taste=0.2)


def likenesses(forget: Corpus, retain: Corpus):
    statistics = forget.statistics(EXPERTS), retain.statistics(EXPERTS)
    score, low, high = likeness_tables(statistics[0].frequency_LE, statistics[1].frequency_LE, statistics[1].tokens)
    w = np.where(retain.counted_T, 1.0, 0.0)
    sums = document_sums(retain.tokens, retain.as_trace(2), w, score)
    return likeness(sums, low, high), sums


def test_divergences_against_scipy() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(6), 4) * 2, rng.dirichlet(np.ones(6), 4) * 2
    p[0, :3] = 0
    p[0] *= 2 / p[0].sum()
    np.testing.assert_allclose(entropy_bits(p, 2), entropy(p, base=2, axis=1), atol=1e-12)
    np.testing.assert_allclose(jensen_shannon_bits(p, q, 2), jensenshannon(p, q, base=2, axis=1) ** 2, atol=1e-12)
    np.testing.assert_allclose(jensen_shannon_bits(p, p, 2), 0.0, atol=1e-12)


def test_likeness_is_one_for_near_text_and_zero_for_the_average(monkeypatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 999)
    forget, retain = worlds(0.2)
    like, sums = likenesses(forget, retain)
    near = retain.topic_D == 1
    assert np.quantile(like[near], 0.05) > 0.5 and np.median(like[near]) == pytest.approx(1.0, abs=0.15)
    assert like[~near].max() < 0.5
    assert np.average(like, weights=sums.tokens_D) == pytest.approx(0.0, abs=0.05)


def test_likeness_of_documents_that_do_not_differ_is_shrunk_to_zero() -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(scale=0.8, size=(3, 3, EXPERTS))
    forget = make_corpus(rng, np.zeros(100, np.int64), logits, 2)
    retain = make_corpus(rng, np.full(300, 2), logits, 2, document_tokens=6, taste=0.0)
    like, _ = likenesses(forget, retain)
    assert np.abs(like).max() < 0.4, "short documents must not look alike by chance"


@pytest.mark.parametrize(("near_share", "warned"), [(0.2, False), (0.0, True)])
def test_warns_when_no_retain_text_is_routed_like_the_forget_text(tmp_path, near_share: float, warned: bool) -> None:
    forget, retain = worlds(near_share)
    found = detect(forget.statistics(EXPERTS), retain.statistics(EXPERTS), DetectionConfig())
    config = CalibrationConfig()
    made = apply_rule(
        config,
        retain.tokens,
        retain.as_trace(),
        scope_of(config, found.selected_LE, found.eligible_LE, 0),
        found.forget_LE,
        found.retain_LE,
        0,
        tmp_path,
    )
    like, sums = likenesses(forget, retain)
    warnings = find_warnings(found, made, found.retain_LE, found.retain_LE, like, sums, "raking")
    assert any("no retain text is routed like the forget text" in w for w in warnings) == warned
    moved_away = find_warnings(found, made, found.retain_LE - 0.1, found.retain_LE, like, sums, "raking")
    assert any("ended farther from their forget frequency" in w for w in moved_away)
    drawn_away = find_warnings(found, made, found.retain_LE, found.retain_LE - 0.1, like, sums, "raking")
    assert any("would end farther if rows are drawn" in w for w in drawn_away)


def test_warns_of_weights_that_do_little_of_what_was_asked(tmp_path) -> None:
    forget, retain = worlds(0.2)
    found = detect(forget.statistics(EXPERTS), retain.statistics(EXPERTS), DetectionConfig())
    _, sums = likenesses(forget, retain)
    everything = np.ones(found.selected_LE.shape, dtype=bool)
    made = {}
    for rule, floor in (("raking", 0.5), ("raking", 0.98), ("uniform", 0.5)):
        folder = tmp_path / f"{rule}{floor}"
        folder.mkdir()
        config = CalibrationConfig(rule=rule, ess_floor=floor)
        scope_LE = scope_of(config, found.selected_LE, everything, 0)
        sides = found.forget_LE, found.retain_LE
        made[rule, floor] = apply_rule(config, retain.tokens, retain.as_trace(), scope_LE, *sides, 0, folder)
    middle_LE = (found.retain_LE + found.forget_LE) / 2
    expected = {
        ("raking", 0.5, True): (False, False, False),
        ("raking", 0.5, False): (False, True, False),  # the rows do not follow their tokens
        ("raking", 0.98, True): (True, False, True),
        ("uniform", 0.5, False): (False, False, False),  # a control owes nothing
    }
    for (rule, floor, rows_follow), wanted in expected.items():
        drawn_LE = middle_LE if rows_follow else found.retain_LE
        warnings = find_warnings(found, made[rule, floor], middle_LE, drawn_LE, None, sums, rule)
        told = [any(words in w for w in warnings) for words in ("(lambda)", "closes 0.0% of", "are nearly equal")]
        assert tuple(told) == wanted, (rule, floor, warnings)


def test_variance_decomposition_and_shares_against_the_slow_way() -> None:
    _, retain = worlds(0.2)
    rng = np.random.default_rng(2)
    counted = retain.counted_T
    w_T = np.where(counted, rng.random(len(counted)) + (retain.topic_D == 1)[retain.tokens.document_ids_T], 0.0)
    w_T[counted] /= w_T[counted].mean()
    sums = document_sums(retain.tokens, None, w_T, None)
    w, d = w_T[counted], np.asarray(retain.tokens.document_ids_T)[counted]
    means = np.array([w[d == i].mean() for i in range(300)])
    variance = weight_variance(sums)
    assert variance["between"] == pytest.approx(((means[d] - 1) ** 2).mean(), rel=1e-9)
    assert variance["between"] + variance["within"] == pytest.approx(w.var(), rel=1e-9)
    documents = Documents([f"s{t}" for t in range(5)], retain.topic_D, ["text"] * 300)
    shares = source_shares(sums, documents)
    assert shares[0]["source"] == "s1"
    assert [row["source"] for row in shares if row["token_share"] == 0] == ["s0"]
    for row in shares:
        mine = np.isin(d, np.nonzero(retain.topic_D == int(row["source"][1:]))[0])
        assert row["token_share"] == pytest.approx(mine.mean())
        assert row["weight_share"] == pytest.approx(w[mine].sum() / w.sum())
    best = top_documents(sums, documents, np.zeros(300))
    enough = np.bincount(d, minlength=300) >= 8
    assert [r["document"] for r in best] == np.argsort(-np.where(enough, means, -1), kind="stable")[:20].tolist()
    values = quantiles(w_T, retain.tokens)
    assert values["0.5"] == pytest.approx(np.median(w)) and values["1"] == w.max() and values["0"] == w.min()


def test_quantiles_of_a_sample_keep_the_exact_ends(monkeypatch) -> None:
    from trace_ds.calibration import diagnose

    monkeypatch.setattr(diagnose, "QUANTILE_SAMPLE", 100)
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 77)
    _, retain = worlds(0.2)
    w_T = np.where(retain.counted_T, np.random.default_rng(0).random(len(retain.counted_T)), 0.0)
    w = w_T[retain.counted_T]
    values = quantiles(w_T, retain.tokens)
    assert values["0"] == w.min() and values["1"] == w.max()
    assert values["0.5"] == pytest.approx(0.5, abs=0.15)
