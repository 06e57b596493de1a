"""Retrieval: each similarity against a dense brute force, what is kept, and how it composes with the weight rules."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from calibration_world import Corpus, make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_calibration_stage import alter_summary, job, prepared, write_statistics  # noqa: F401 (fixtures)

from trace_ds.calibration import rows as rows_module
from trace_ds.calibration.retrieve import choose_rows
from trace_ds.calibration.rules import apply_rule
from trace_ds.calibration.similarity import hidden_similarity, routing_similarity, tfidf_similarity
from trace_ds.calibration.tokens import TokenMap, count_selections
from trace_ds.config.load import load_config
from trace_ds.config.sections.calibration import CalibrationConfig
from trace_ds.corpora.dataset import TokenDataset, write_rows
from trace_ds.corpora.pack import PackedRow
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.stages.calibrate import calibrate

EXPERTS = 8


def shares(corpus: Corpus) -> np.ndarray:
    """p_r of every row [R, L * E], the slow way."""
    starts, counted, active = corpus.tokens.row_starts_R1, corpus.counted_T, np.zeros((len(corpus.trace_TLK), 24))
    active[counted] = corpus.dense(EXPERTS)
    return np.stack(
        [active[a:b][counted[a:b]].mean(axis=0) for a, b in itertools.pairwise(starts.tolist())]
    )  # every row has counted tokens here


def near_rows(corpus: Corpus) -> np.ndarray:
    """Share of each row's tokens that belongs to documents of the near topic."""
    topic_T = corpus.topic_D[corpus.tokens.document_ids_T] == 1
    return np.array([topic_T[a:b].mean() for a, b in itertools.pairwise(corpus.tokens.row_starts_R1.tolist())])


def test_routing_similarity_against_dense_arrays_and_it_finds_the_near_rows(monkeypatch) -> None:
    monkeypatch.setattr(rows_module, "BLOCK_VALUES", 500)
    forget, retain = make_world(seed=1)
    p, q = retain.dense(EXPERTS).mean(axis=0), forget.dense(EXPERTS).mean(axis=0)
    everything = np.ones((3, EXPERTS), dtype=bool)
    shape = everything.shape
    found = routing_similarity(retain.selections(EXPERTS, 3), everything, q.reshape(shape), p.reshape(shape))
    spread = np.sqrt(p * (1 - p))
    z, target = (shares(retain) - p) / spread, (q - p) / spread
    noise = len(p) / retain.tokens.counted_per_row()
    wanted = z @ target / np.sqrt((z**2).sum(axis=1) + noise) / np.sqrt((target**2).sum())
    np.testing.assert_allclose(found, wanted, atol=1e-12)
    near = near_rows(retain)
    assert near[np.argsort(-found)[:10]].mean() > 4 * near.mean()


def test_hidden_similarity_against_dense_arrays() -> None:
    rng = np.random.default_rng(0)
    forget, pool = rng.normal(size=(7, 5)).astype(np.float32) + 1, rng.normal(size=(30, 5)).astype(np.float32)
    sizes_f, sizes_p = rng.integers(1, 9, 7), rng.integers(0, 9, 30)
    centre = (pool * sizes_p[:, None]).sum(0) / sizes_p.sum()
    target = (forget * sizes_f[:, None]).sum(0) / sizes_f.sum() - centre
    wanted = (pool - centre) @ target / np.linalg.norm(pool - centre, axis=1) / np.linalg.norm(target)
    wanted[sizes_p == 0] = 0
    for parts in (1, 4):
        found = hidden_similarity([forget], sizes_f, np.array_split(pool, parts), sizes_p)
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_tfidf_against_dense_arrays(tmp_path) -> None:
    rng = np.random.default_rng(0)

    def corpus(name: str, low: int, high: int, rows: int) -> list[np.ndarray]:
        made = [rng.integers(low, high, rng.integers(1, 12)).astype(np.int32) for _ in range(rows)]
        write_rows(tmp_path / name, (PackedRow(ids, np.full(len(ids), i, np.int32)) for i, ids in enumerate(made)))
        return made

    forget, pool = corpus("forget", 30, 60, 9), corpus("pool", 0, 50, 2000)  # tokens 50 … 59 are not in the pool
    counts = [np.stack([np.bincount(ids, minlength=60) for ids in side]) for side in (forget, pool)]
    idf = np.log((1 + 2000) / (1 + (counts[1] > 0).sum(0))) + 1
    vectors = [c * idf / np.linalg.norm(c * idf, axis=1, keepdims=True) for c in counts]
    centroid = vectors[0].sum(0) / np.linalg.norm(vectors[0].sum(0))
    found = tfidf_similarity(tmp_path / "forget", tmp_path / "pool")
    np.testing.assert_allclose(found, vectors[1] @ centroid, atol=1e-12)


def test_what_is_kept() -> None:
    rng = np.random.default_rng(0)
    score, sizes = rng.normal(size=200), rng.integers(1, 9, 200)
    sizes[::7] = 0
    kept = choose_rows(score, sizes, 50, 0.4, seed=0)
    assert kept.kept_R.sum() == 50 and kept.random == 20 and not kept.kept_R[::7].any()
    best = np.argsort(-np.where(sizes > 0, score, -np.inf))[:30]
    assert kept.kept_R[best].all()
    again = choose_rows(score, sizes, 50, 0.4, seed=1)
    assert again.kept_R[best].all() and not np.array_equal(again.kept_R, kept.kept_R)
    everything = choose_rows(score, sizes, int((sizes > 0).sum()), 1.0, seed=0)
    np.testing.assert_array_equal(everything.kept_R, sizes > 0)


def test_equally_near_rows_are_drawn_at_random_and_counted() -> None:
    sizes, score = np.ones(1000), np.zeros(1000)
    score[-3:] = 1.0
    kept = [np.flatnonzero(choose_rows(score, sizes, 103, 0.0, seed).kept_R) for seed in (0, 0, 1)]
    assert choose_rows(score, sizes, 103, 0.0, 0).tied == 100
    np.testing.assert_array_equal(kept[0], kept[1])
    assert len(np.intersect1d(kept[0], kept[2])) < 30, "another seed draws others"
    for rows in kept:
        assert (rows[-3:] >= 997).all() and 350 < rows[:-3].mean() < 650, "not the first rows of the file"
    score[:] = np.arange(1000)
    assert choose_rows(score, sizes, 103, 0.0, 0).tied == choose_rows(score, sizes, 1000, 0.0, 0).tied == 0


@pytest.mark.parametrize("rule", ["raking", "ratio_mean", "permuted", "uniform"])
def test_rules_on_kept_rows_equal_rules_on_a_corpus_of_these_rows(tmp_path, rule: str) -> None:
    forget, retain = make_world(seed=4)
    tokens = retain.tokens
    kept_R = np.random.default_rng(0).random(tokens.rows) < 0.5
    kept_T = kept_R[tokens.row_of(0, tokens.tokens)]
    lengths = np.diff(tokens.row_starts_R1)[kept_R]
    alone = Corpus(
        retain.trace_TLK[kept_T],
        TokenMap(np.concatenate([[0], np.cumsum(lengths)]), tokens.document_ids_T[kept_T], tokens.documents),
        retain.topic_D,
    )
    config, everything = CalibrationConfig(rule=rule), np.ones((3, EXPERTS), dtype=bool)
    scope = everything if rule != "uniform" else ~everything
    q = forget.statistics(EXPERTS).frequency_LE
    made = []
    for number, (corpus, token_map) in enumerate(((retain, tokens.restricted(kept_R)), (alone, alone.tokens))):
        p = count_selections(corpus.as_trace(), token_map, EXPERTS) / token_map.counted_total()
        folder = tmp_path / str(number)
        folder.mkdir()
        made.append(apply_rule(config, token_map, corpus.as_trace(), scope, q, p, 0, folder))
    inside, alone_T = np.array(made[0].weight_T), np.array(made[1].weight_T)
    assert not inside[~kept_T].any() and not made[0].row_weight_R[~kept_R].any()
    np.testing.assert_allclose(inside[kept_T], alone_T, rtol=1e-9)
    np.testing.assert_allclose(made[0].row_weight_R[kept_R], made[1].row_weight_R, rtol=1e-9)
    counted = tokens.restricted(kept_R).counted(0, tokens.tokens)
    assert inside[counted].mean() == pytest.approx(1, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    same=st.booleans(),
    keep=st.integers(1, 9),
)
def test_tiny_and_odd_pools_have_finite_scores(seed: int, lengths: list[int], same: bool, keep: int):
    """Rows of one token or without counted ones, experts that all or no tokens select, forget text like the pool."""
    rng = np.random.default_rng(seed)
    starts = np.concatenate([[0], np.cumsum([2, *lengths])]).astype(np.int64)
    documents = np.concatenate([[0, 0], np.sort(rng.integers(1, 3, int(starts[-1]) - 2))]).astype(np.int32)
    trace = np.argsort(rng.random((len(documents), 2, 4)), axis=2)[:, :, :2].astype(np.uint8)
    trace[:, 0] = [0, 1]  # always these two
    corpus = Corpus(trace, TokenMap(starts, documents, 3), np.zeros(3))
    p = corpus.dense(4).mean(axis=0).reshape(2, 4)
    q = p if same else np.minimum(rng.dirichlet(np.ones(4), 2) * 2, 1.0)
    everything, sizes = np.ones((2, 4), dtype=bool), corpus.tokens.counted_per_row()
    routing = routing_similarity(corpus.selections(4), everything, q, p)
    assert np.isfinite(routing).all() and (np.abs(routing) <= 1 + 1e-9).all() and not routing[sizes == 0].any()
    kept = choose_rows(routing, sizes, min(keep, int((sizes > 0).sum())), 0.5, seed=0)
    assert kept.kept_R.sum() == min(keep, int((sizes > 0).sum())) and not kept.kept_R[sizes == 0].any()


RETRIEVE = {"calibration__retrieve__rows": 20, "calibration__retrieve__random_share": 0.25}


@pytest.mark.parametrize("similarity", ["weight", "routing", "tfidf", "hidden"])
def test_calibrating_what_was_retrieved(job, similarity: str) -> None:  # noqa: F811
    config, run = job(**RETRIEVE, calibration__retrieve__similarity=similarity)
    data = artefact.load(run.data, "data")
    dataset = TokenDataset.open(data.file("retain.arrow"))
    if similarity == "hidden":
        rng = np.random.default_rng(0)
        for side in ("forget", "retain"):
            rows = len(TokenDataset.open(data.file(f"{side}.arrow")))
            np.save(run.statistics / side / "hidden-00000-of-00001.npy", rng.normal(size=(rows, 6)).astype(np.float32))
            alter_summary(run.statistics / side)
    made = calibrate(config, run)
    weights, rows = np.load(made.file("weights.npy")), np.load(made.file("row_weights.npy"))
    assert (rows > 0).sum() == 20
    row_T = np.repeat(np.arange(len(dataset)), np.diff(dataset.row_starts_R1))
    counted = dataset.counted(0, dataset.tokens) & (rows > 0)[row_T]
    assert not weights[~counted].any() and weights[counted].mean() == pytest.approx(1, abs=1e-6)
    diagnosis = json.loads(made.file("diagnosis.json").read_text())
    told = diagnosis["retrieval"]
    assert (told["rows"], told["random_rows"], told["pool_rows"]) == (20, 5, len(dataset))
    assert told["tokens"] == counted.sum() and told["pool_tokens"] == dataset.counted(0, dataset.tokens).sum()
    for name in ("pool_share", "kept_share"):
        assert sum(source[name] for source in told["share_by_source"]) == pytest.approx(1)
    assert {entry["row"] for entry in told["top_rows"]} <= set(np.flatnonzero(rows > 0).tolist())
    scores = [entry["score"] for entry in told["top_rows"]]
    assert scores == sorted(scores, reverse=True)
    whole = json.loads(calibrate(*job(calibration__retrieve__rows=None)).file("diagnosis.json").read_text())
    assert whole["retrieval"] is None
    for mine, theirs in zip(diagnosis["selected"], whole["selected"], strict=True):  # those of the pool
        assert (mine["forget"], mine["retain"], mine["ratio"]) == (theirs["forget"], theirs["retain"], theirs["ratio"])
    if similarity in ("weight", "routing"):
        assert told["gap_kept"] < told["gap_pool"]


def test_retrieval_without_forget_critical_experts_goes_by_all_and_says_so(job) -> None:  # noqa: F811
    changes = {"calibration__detection__min_ratio": 50.0, "calibration__experts": "selected"}
    made = calibrate(*job(**RETRIEVE, **changes))
    assert any("retrieved by all experts" in warning for warning in made.summary["warnings"])
    told = json.loads(made.file("diagnosis.json").read_text())["retrieval"]["top_rows"]
    assert told[0]["score"] > 1.0 and len({entry["score"] for entry in told}) > 5
    made = calibrate(*job(**RETRIEVE, **changes, calibration__ess_floor=1.0))  # lambda 0: no row is nearer
    assert any("15 of the 15 nearest rows were drawn at random" in warning for warning in made.summary["warnings"])


def test_unlearning_sees_the_retrieved_rows_only(job) -> None:  # noqa: F811
    from trace_ds.stages.unlearn import check_unlearn, make_batches

    for apply in ("loss", "sampling"):
        config, run = job(**RETRIEVE, unlearning__apply=apply)
        rows = np.load(calibrate(config, run).file("row_weights.npy"))
        dataset = TokenDataset.open(artefact.load(run.data, "data").file("retain.arrow"))
        kept = {tuple(dataset.row(int(row)).input_ids.tolist()) for row in np.flatnonzero(rows > 0)}
        batches = make_batches(config, check_unlearn(config, run, 1))
        seen = set()
        for step in range(12):
            batch = batches.at(step, 0, 1).micro_batches[0]
            for row in range(batch.forget_rows, len(batch.input_ids_BS)):
                seen.add(tuple(batch.input_ids_BS[row].tolist()))
                assert any(tuple(batch.input_ids_BS[row, : len(ids)].tolist()) == ids for ids in kept)
        assert len(seen) > 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration__retrieve__rows": 5000}, "5000 rows are asked for, the retain data has"),
        (
            {**RETRIEVE, "calibration__retrieve__similarity": "hidden"},
            r"hidden states, which were not recorded.*statistics\.hidden: true",
        ),
    ],
)
def test_impossible_requests_are_refused(job, changes: dict, message: str) -> None:  # noqa: F811
    config, run = job(**changes)
    with pytest.raises(UserError, match=message) as refused:
        calibrate(config, run)
    assert "\n" not in refused.value.line() and not run.calibration.exists()


def test_requests_that_make_no_sense_and_a_missing_trace(job, prepared: tuple[Path, Path]) -> None:  # noqa: F811
    with pytest.raises(UserError, match="a whole number of rows, or a fraction below 1"):
        load_config(str(prepared[0]), ["calibration.retrieve.rows=2.5"])
    with pytest.raises(UserError, match=r"retrieve\.rows"):
        load_config(str(prepared[0]), ["calibration.retrieve.rows=0"])
    config, run = job(**RETRIEVE, calibration__rule="uniform", calibration__retrieve__similarity="tfidf")
    write_statistics(config, run, trace=False)
    made = calibrate(config, run)
    assert (
        np.load(made.file("row_weights.npy")) > 0
    ).sum() == 20  # needs no trace, but nobody knows how they are routed
    diagnosis = json.loads(made.file("diagnosis.json").read_text())
    assert {(entry["achieved"], entry["target"]) for entry in diagnosis["selected"]} == {(None, None)}
    assert {(layer["entropy_weighted_bits"], layer["js_weighted_bits"]) for layer in diagnosis["layers"]} == {
        (None, None)
    }
    assert np.isnan(load_file(made.file("calibration.safetensors"))["achieved_LE"]).all()
    config, run = job(**RETRIEVE, calibration__rule="uniform", calibration__retrieve__similarity="weight")
    shutil.rmtree(run.calibration)
    with pytest.raises(UserError, match=r"weight needs the routing trace.*statistics\.trace: true"):
        calibrate(config, run)
    config, run = job(**RETRIEVE, calibration__rule="uniform", calibration__retrieve__similarity="routing")
    write_statistics(config, run, trace=False)
    assert (np.load(calibrate(config, run).file("row_weights.npy")) > 0).sum() == 20
    shutil.rmtree(run.calibration)
    write_statistics(config, run, rows=False)
    with pytest.raises(UserError, match=r"similarity: routing needs the selections of each row.*collect CONFIG"):
        calibrate(config, run)
