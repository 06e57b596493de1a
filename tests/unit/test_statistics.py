"""Routing statistics: the clustered errors against brute force and the bootstrap."""

from __future__ import annotations

import numpy as np
import pytest
from calibration_world import make_world

from trace_ds.routing.statistics import RoutingStatistics


def per_document(rng: np.random.Generator, documents: int, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """(c_DE, n_D): each document selects one expert far more often than the others."""
    n_D = rng.integers(1, 60, documents)
    favourite_D = rng.integers(0, experts, documents)
    p_DE = np.full((documents, experts), 0.5 / experts)
    p_DE[np.arange(documents), favourite_D] += 0.5
    return np.stack([rng.binomial(n_D, p_DE[:, e]) for e in range(experts)], axis=1), n_D


def from_documents(c_DE: np.ndarray, n_D: np.ndarray, top_k: int = 2) -> RoutingStatistics:
    return RoutingStatistics(
        c_DE.sum(axis=0)[None],
        c_DE.sum(axis=0)[None] * 0.5,
        (c_DE**2).sum(axis=0)[None],
        (c_DE * n_D[:, None]).sum(axis=0)[None],
        int((n_D**2).sum()),
        int(n_D.sum()),
        len(n_D),
        top_k,
    )


def test_variance_is_the_sum_over_documents() -> None:
    c_DE, n_D = per_document(np.random.default_rng(0), 40, 6)
    statistics = from_documents(c_DE, n_D)
    p_E = c_DE.sum(axis=0) / n_D.sum()
    kish = n_D.sum() ** 2 / (n_D**2).sum()
    assert 20 < kish < 39 and statistics.effective_documents == pytest.approx(kish)
    brute = kish / (kish - 1) * sum((c_DE[d] - p_E * n_D[d]) ** 2 for d in range(40)) / n_D.sum() ** 2
    np.testing.assert_allclose(statistics.variance_LE()[0], brute, rtol=1e-10)


def test_variance_agrees_with_the_bootstrap_over_documents_and_not_with_the_binomial() -> None:
    rng = np.random.default_rng(1)
    c_DE, n_D = per_document(rng, 200, 5)
    statistics = from_documents(c_DE, n_D)
    draws = rng.integers(0, 200, (4000, 200))
    resampled = c_DE[draws].sum(axis=1) / n_D[draws].sum(axis=1)[:, None]
    np.testing.assert_allclose(statistics.variance_LE()[0], resampled.var(axis=0), rtol=0.12)
    p_E = statistics.frequency_LE[0]
    binomial = p_E * (1 - p_E) / statistics.tokens
    assert (statistics.variance_LE()[0] > 3 * binomial).all(), "documents are clumped: binomial errors are too small"


@pytest.mark.parametrize("documents", [0, 1])
def test_fewer_than_two_documents_have_no_error(documents: int) -> None:
    c_DE, n_D = per_document(np.random.default_rng(2), documents, 4)
    assert np.isinf(from_documents(c_DE, n_D).variance_LE()).all()


def test_frequencies_of_a_layer_sum_to_top_k_and_survive_the_file(tmp_path) -> None:
    forget, _ = make_world(experts=8, top_k=2)
    statistics = forget.statistics(8)
    np.testing.assert_allclose(statistics.frequency_LE.sum(axis=1), 2.0, rtol=1e-12)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = RoutingStatistics.load(tmp_path / "statistics.safetensors")
    for name, value in vars(statistics).items():
        np.testing.assert_array_equal(getattr(loaded, name), value, err_msg=name)
