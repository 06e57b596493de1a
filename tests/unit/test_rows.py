"""Which rows a step sees: exact under any world size, proportional to the weights, every row once per epoch."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trace_ds.unlearning.batches import EpochRows, SampledRows, share_of_rank


def test_every_row_once_per_epoch_and_reshuffled() -> None:
    rows = EpochRows(np.arange(10, 17), 3, seed=1, stream=1)
    seen = np.concatenate([rows.at(step) for step in range(14)])  # 42 rows: six epochs
    for epoch in range(6):
        assert sorted(seen[epoch * 7 : epoch * 7 + 7]) == list(range(10, 17))
    assert len({tuple(seen[epoch * 7 : epoch * 7 + 7]) for epoch in range(6)}) > 1
    assert EpochRows(np.arange(10, 17), 3, seed=1, stream=1).at(9).tolist() == rows.at(9).tolist()
    assert EpochRows(np.arange(10, 17), 3, seed=2, stream=1).at(9).tolist() != rows.at(9).tolist()


def test_sampling_is_proportional_to_the_weights() -> None:
    weights = np.array([0.0, 1.0, 2.0, 0.5, 6.5])
    rows = SampledRows(np.arange(5) * 10, weights, 8, seed=0, stream=2)
    drawn = np.concatenate([rows.at(step) for step in range(4000)])
    shares = np.array([(drawn == number * 10).mean() for number in range(5)])
    np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.004)
    assert shares[0] == 0


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 5))
def test_ranks_share_the_rows_of_a_step(count: int, world: int, micro: int) -> None:
    rows = np.arange(100, 100 + count)
    shares = [share_of_rank(rows, rank, world, micro) for rank in range(world)]
    most = math.ceil(count / world)
    assert all(share.shape == (micro, math.ceil(most / micro)) for share in shares)
    together = np.concatenate([share.reshape(-1) for share in shares])
    assert sorted(together[together >= 0]) == rows.tolist()
