"""The diagnosis: its warnings, shares of sources, documents of most weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_world import Corpus, make_corpus

from trace_ds.calibration.detect import Detection, detect
from trace_ds.calibration.diagnose import (
    DocumentSources,
    document_sums,
    find_warnings,
    source_shares,
    top_documents,
)
from trace_ds.calibration.rules import RuleResult, WeightRequest, choose_experts, weigh_rows, weigh_tokens
from trace_ds.config.sections.calibration import CalibrationConfig, DetectionConfig

EXPERTS = 8


def worlds(near_share: float) -> tuple[Corpus, Corpus]:
    """Forget topic 0; retain topics 2 … 4 and a share of topic 1, which is routed as topic 0."""
    rng = np.random.default_rng(0)
    logits = rng.normal(scale=0.8, size=(5, 3, EXPERTS))
    logits[1] = logits[0]
    topics = np.where(rng.random(300) < near_share, 1, rng.integers(2, 5, 300))
    return make_corpus(rng, np.zeros(100, np.int64), logits, 2), make_corpus(rng, topics, logits, 2, taste=0.2)


def calibrated(forget: Corpus, retain: Corpus, folder: Path | None, **options: Any) -> tuple[Detection, RuleResult]:
    """Weights of tokens, spooled to the folder; without one, of rows."""
    result = detect(forget.statistics(EXPERTS), retain.statistics(EXPERTS), DetectionConfig())
    config = CalibrationConfig(**options)
    scope_LE = choose_experts(config, result, 0)
    sides = result.forget_LE, result.retain_LE, np.zeros_like(result.retain_LE)
    request = WeightRequest(config, retain.tokens, scope_LE, *sides)
    if folder is None:
        return result, weigh_rows(request, retain.selections(EXPERTS))
    return result, weigh_tokens(request, retain.as_trace(), folder)


def test_warns_of_weights_that_do_little_of_what_was_asked(tmp_path) -> None:
    forget, retain = worlds(0.2)
    expected = {
        ("raking", 0.5, True): (False, False, False),
        ("raking", 0.999, True): (False, True, True),
        ("raking", 0.98, False): (True, False, False),
        ("uniform", 0.5, False): (False, False, False),  # a control owes nothing
    }
    for (rule, floor, rows), target in expected.items():
        options = {"rule": rule, "ess_floor": floor, "experts": "all"}
        actual, weighting = calibrated(forget, retain, None if rows else tmp_path, **options)
        warnings = find_warnings(CalibrationConfig(**options), actual, weighting, rows)
        shown = [
            any(words in w for w in warnings) for words in ("(lambda)", "of the frequency gap", "are nearly equal")
        ]
        assert tuple(shown) == target, (rule, floor, warnings)


def test_weights_that_widen_the_gap_are_called_that_and_the_advice_changes_something(tmp_path) -> None:
    forget, retain = worlds(0.2)
    for experts in ("all", "selected"):
        detection, weights = calibrated(forget, retain, tmp_path, experts=experts, ess_floor=0.98)
        away_LE = 1.5 * detection.retain_LE - 0.5 * detection.forget_LE
        config = CalibrationConfig(experts=experts)
        warnings = " ".join(find_warnings(config, detection, replace(weights, achieved_LE=away_LE), False))
        assert "widen the frequency gap by 50%" in warnings and "(lambda)" in warnings
        assert ("calibration.experts: selected" in warnings) == (experts == "all")


def test_shares_and_documents_against_the_slow_way() -> None:
    _, retain = worlds(0.2)
    rng = np.random.default_rng(2)
    counted = retain.counted_T
    w_T = np.where(counted, rng.random(len(counted)) + (retain.topic_D == 1)[retain.tokens.document_ids_T], 0.0)
    w_T[counted] /= w_T[counted].mean()
    sums = document_sums(retain.tokens, w_T)
    w, d = w_T[counted], np.asarray(retain.tokens.document_ids_T)[counted]
    means = np.array([w[d == i].mean() for i in range(300)])
    documents = DocumentSources([f"s{t}" for t in range(5)], retain.topic_D, ["text"] * 300)
    shares = source_shares(sums, documents)
    assert shares[0]["source"] == "s1"
    assert [row["source"] for row in shares if row["token_share"] == 0] == ["s0"]
    for row in shares:
        mine = np.isin(d, np.nonzero(retain.topic_D == int(row["source"][1:]))[0])
        assert row["token_share"] == pytest.approx(mine.mean())
        assert row["weight_share"] == pytest.approx(w[mine].sum() / w.sum())
    best = top_documents(sums, documents)
    enough = np.bincount(d, minlength=300) >= 8
    assert [r["document"] for r in best] == np.argsort(-np.where(enough, means, -1), kind="stable")[:20].tolist()
