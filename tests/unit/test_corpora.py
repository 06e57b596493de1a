"""Packing loses no token, keeps order and documents apart; datasets give back what was written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trace_ds.corpora.dataset import FlatArray, PackingCounts, TokenDataset, counted_positions, pack, write_rows

documents_strategy = st.lists(st.lists(st.integers(0, 99), max_size=20), max_size=30)


@given(documents_strategy, st.integers(2, 9), st.sampled_from(["dense", "whole", "single"]))
def test_packing_keeps_every_token_in_order(documents: list[list[int]], length: int, packing: str) -> None:
    counts = PackingCounts()
    rows = list(pack(documents, length, packing, counts))
    tokens = [int(token) for row in rows for token in row.input_ids]
    assert tokens == [token for document in documents for token in document]
    owners = [int(owner) for row in rows for owner in row.document_ids]
    assert owners == [index for index, document in enumerate(documents) for _ in document]
    assert all(0 < len(row.input_ids) <= length for row in rows)
    if packing == "single":
        assert all(len(np.unique(row.document_ids)) == 1 for row in rows)
    if packing == "dense":
        assert all(len(row.input_ids) == length for row in rows[:-1])
    if packing != "dense":
        for index, document in enumerate(documents):
            places = {number for number, row in enumerate(rows) if (row.document_ids == index).any()}
            assert len(document) > length or len(places) <= 1
    assert counts.counted_tokens == sum(
        int(row.document_ids[t] == row.document_ids[t + 1]) for row in rows for t in range(len(row.input_ids) - 1)
    )
    assert (counts.documents, counts.rows, counts.tokens) == (len(documents), len(rows), len(tokens))


@pytest.mark.parametrize("rows_count", [1, 2500])
def test_dataset_gives_back_the_rows(tmp_path: Path, rows_count: int) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 99, draw.integers(1, 12)).tolist() for _ in range(rows_count)]
    rows = list(pack(documents, 12, "single", PackingCounts()))
    write_rows(tmp_path / "rows.arrow", rows)
    dataset = TokenDataset.open(tmp_path / "rows.arrow")
    assert len(dataset) == len(rows)
    for index in {0, len(rows) // 2, len(rows) - 1}:
        assert dataset.row(index).input_ids.tolist() == rows[index].input_ids.tolist()
        assert dataset.row(index).document_ids.tolist() == rows[index].document_ids.tolist()
    assert dataset.counted_per_row().tolist() == [int(counted_positions(r.document_ids).sum()) for r in rows]
    assert (
        dataset.counted(0, dataset.tokens).tolist()
        == np.concatenate([counted_positions(r.document_ids) for r in rows]).tolist()
    )
    assert dataset.document_ids_T[:].tolist() == np.concatenate([r.document_ids for r in rows]).tolist()
    assert dataset.tokens == sum(len(row.input_ids) for row in rows) == dataset.row_starts_R1[-1]


@pytest.mark.parametrize("chunk", [1, 7])
def test_what_is_counted_does_not_depend_on_the_chunks(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand, row by row: documents of 1 to 7 tokens, several in a row and cut at its end, read at any position."""
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 99, draw.integers(1, 8)).tolist() for _ in range(300)]
    rows = list(pack(documents, 10, "dense", PackingCounts()))
    write_rows(tmp_path / "rows.arrow", rows)
    monkeypatch.setattr("trace_ds.corpora.dataset.CHUNK_TOKENS", chunk)
    dataset = TokenDataset.open(tmp_path / "rows.arrow")
    counted = np.concatenate([counted_positions(row.document_ids) for row in rows])
    row_T = np.repeat(np.arange(len(rows)), [len(row.input_ids) for row in rows])
    assert (dataset.counted_per_row() == np.bincount(row_T, counted)).all()
    assert dataset.counted_total() == counted.sum() and dataset.documents == 300
    for begin, end in draw.integers(0, dataset.tokens + 1, (50, 2)):
        begin, end = min(begin, end), max(begin, end)
        assert (dataset.counted(begin, end) == counted[begin:end]).all()
        assert begin == end or (dataset.row_of(begin, end) == row_T[begin:end]).all()


@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.integers(0, 25), st.integers(0, 25))
def test_arrays_in_parts_read_as_one(lengths: list[int], begin: int, end: int) -> None:
    whole = np.arange(2 * sum(lengths)).reshape(-1, 2)
    array = FlatArray(np.split(whole, np.cumsum(lengths)[:-1]))
    assert len(array) == len(whole) and array[begin:end].tolist() == whole[begin:end].tolist()
    assert all(array[number].tolist() == whole[number].tolist() for number in range(len(whole)))


def test_batches_restart_positions_and_fill_at_the_right(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.arrow", pack([[5, 6, 7], [8, 9], [1]], 5, "whole", PackingCounts()))
    batch = TokenDataset.open(tmp_path / "rows.arrow").batch([0, -1, 1], pad_id=3)
    assert batch.input_ids_BS.tolist() == [[5, 6, 7, 8, 9], [3] * 5, [1, 3, 3, 3, 3]]
    assert batch.position_ids_BS.tolist() == [[0, 1, 2, 0, 1], [0, 1, 2, 3, 4], [0, 0, 1, 2, 3]]
    assert batch.counted_BS.tolist() == [[True, True, False, True, False], [False] * 5, [False] * 5]
