"""Packed patterns: both encodings against a dense matrix, whatever the sharding and whether in memory or spooled."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import make_corpus, make_world
from hypothesis import given, settings
from hypothesis import strategies as st

from trace_ds.calibration import patterns
from trace_ds.calibration.patterns import Encoding, build_store
from trace_ds.calibration.raking import evaluate
from trace_ds.calibration.tokens import TokenMap, count_selections, open_trace
from trace_ds.errors import UserError


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    layers=st.integers(1, 3),
    experts=st.integers(1, 40),
    count=st.integers(1, 50),
    kind=st.sampled_from(["bits", "index"]),
)
def test_packing_is_exact(seed: int, layers: int, experts: int, count: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    top_k = int(rng.integers(1, experts + 1))
    selected = np.argsort(rng.random((count, layers, experts)), axis=2)[:, :, :top_k].astype(np.uint8)
    constrained_LE = rng.random((layers, experts)) < 0.6
    constrained_LE[0, 0] = True
    encoding = Encoding.choose(constrained_LE, top_k, kind)
    dense = np.zeros((count, layers, experts), dtype=bool)
    np.put_along_axis(dense, selected.astype(np.int64), True, axis=2)
    active = dense[:, constrained_LE]
    columns = encoding.encode(selected)
    theta, w = rng.normal(size=active.shape[1]), rng.random(count)
    np.testing.assert_array_equal(encoding.unpack(columns), active)
    np.testing.assert_allclose(patterns.score(columns, encoding.tables(theta)), active @ theta, atol=1e-12)
    folded = encoding.fold(patterns.histogram(columns, w, encoding.values))
    np.testing.assert_allclose(folded, w @ active, atol=1e-12)
    best = np.stack([t.take(c) for t, c in zip(encoding.largest(theta), columns, strict=True)]).max(axis=0)
    np.testing.assert_array_equal(best, np.where(active, theta, -np.inf).max(axis=1))


def test_expert_numbers_beyond_a_byte() -> None:
    rng = np.random.default_rng(0)
    corpus = make_corpus(rng, np.zeros(20, np.int64), rng.normal(size=(1, 2, 300)), 4)
    assert corpus.trace_TLK.dtype == np.uint16 and corpus.trace_TLK.max() > 255
    everything = np.ones((2, 300), dtype=bool)
    dense = corpus.dense(300)
    for kind in ("bits", "index"):
        encoding = Encoding.choose(everything, 4, kind)
        columns = encoding.encode(corpus.trace_TLK[corpus.counted_T])
        np.testing.assert_array_equal(encoding.unpack(columns), dense)


@pytest.mark.parametrize("kind", ["bits", "index"])
@pytest.mark.parametrize("memory_limit_bytes", [0, 1 << 30])
def test_store_equals_the_dense_matrix(tmp_path, monkeypatch, kind: str, memory_limit_bytes: int) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 257)
    _, retain = make_world(experts=8)
    dense = retain.dense(8)
    theta = np.random.default_rng(0).normal(size=dense.shape[1])
    w = np.exp(dense @ theta)
    every, solving = build_store(
        retain.as_trace(),
        retain.tokens,
        np.ones((3, 8), dtype=bool),
        tmp_path,
        memory_limit_bytes=memory_limit_bytes,
        kind=kind,
    )
    assert every.tokens == solving.tokens == len(dense) and solving.exact and not every.exact
    assert (tmp_path / "patterns.bin").exists() == (memory_limit_bytes == 0)
    for store in (every, solving):
        point = evaluate(store, theta)
        np.testing.assert_allclose(point.frequency_S, w @ dense / w.sum(), rtol=1e-12)
        assert point.ess == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-12)
        assert point.max_weight == pytest.approx(w.max() / w.mean(), rel=1e-12)
        assert point.log_mean == pytest.approx(np.log(w.mean()), rel=1e-12)


def test_sharding_of_the_trace_changes_no_bit(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 500)
    _, retain = make_world()
    theta = np.linspace(-1, 1, 24)
    points = []
    for parts in (1, 2, 7):
        folder = tmp_path / str(parts)
        folder.mkdir()
        every, _ = build_store(retain.as_trace(parts), retain.tokens, np.ones((3, 8), dtype=bool), folder)
        points.append(evaluate(every, theta))
    for point in points[1:]:
        np.testing.assert_array_equal(point.frequency_S, points[0].frequency_S)
        assert (point.log_mean, point.ess) == (points[0].log_mean, points[0].ess)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), start=st.integers(0, 60), size=st.integers(1, 70))
def test_counted_positions_are_those_whose_next_token_is_of_the_same_row_and_document(
    seed: int, start: int, size: int
) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 9, 15)
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    documents = np.sort(rng.integers(0, 8, total)).astype(np.int32)
    stop = min(start + size, total)
    if start >= stop:
        return
    row = np.repeat(np.arange(15), lengths)
    wanted = [t + 1 < total and row[t + 1] == row[t] and documents[t + 1] == documents[t] for t in range(start, stop)]
    token_map = TokenMap(starts, documents, 8)
    assert token_map.counted(start, stop).tolist() == wanted
    assert token_map.row_of(start, stop).tolist() == row[start:stop].tolist()


def test_counting_the_trace_gives_the_statistics(monkeypatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", 333)
    _, retain = make_world()
    counts = count_selections(retain.as_trace(3), retain.tokens, 8)
    np.testing.assert_array_equal(counts, retain.statistics(8).counts_LE)
    w = np.random.default_rng(0).random(retain.tokens.tokens)
    weighted = count_selections(retain.as_trace(), retain.tokens, 8, w)
    np.testing.assert_allclose(weighted.ravel(), w[retain.counted_T] @ retain.dense(8), rtol=1e-12)
    with pytest.raises(ValueError, match="expert 7 of 7"):
        count_selections(retain.as_trace(), retain.tokens, 7)


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


def test_a_pickled_trace_is_refused(tmp_path) -> None:
    path = tmp_path / "trace-00000-of-00001.npy"
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="not a trace part"):
        open_trace([path], 2, 2, 5, "collect again")
