"""Detection: the multiple-testing control, the false discoveries on correlated documents, and the top_* rankings."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from trace_ds.calibration.detect import detect, log_ratio
from trace_ds.config.sections.calibration import DetectionConfig
from trace_ds.routing.statistics import RoutingStatistics

LAYERS, EXPERTS, TOP_K = 4, 16, 2


def simulate(
    rng: np.random.Generator,
    documents: int,
    boost: dict[tuple[int, int], float] | None = None,
    heavy_tailed: bool = False,
) -> RoutingStatistics:
    """Statistics of a corpus whose documents each have their own routing taste (Dirichlet), tokens drawn from it.

    ``heavy_tailed``: lognormal lengths (σ = 1.5), so that a few documents hold most of the tokens.
    """
    n_D = rng.integers(20, 300, documents)
    if heavy_tailed:
        n_D = np.exp(rng.normal(4.5, 1.5, documents)).astype(np.int64) + 2
    base_LE = np.full((LAYERS, EXPERTS), 1.0)
    for place, factor in (boost or {}).items():
        base_LE[place] *= factor
    base_LE /= base_LE.sum(axis=1, keepdims=True)
    taste_DLE = rng.gamma(base_LE * 12.0, size=(documents, LAYERS, EXPERTS))
    taste_DLE /= taste_DLE.sum(axis=2, keepdims=True)
    c_DLE = rng.multinomial((TOP_K * n_D)[:, None], taste_DLE)
    return RoutingStatistics(
        c_DLE.sum(axis=0),
        c_DLE.sum(axis=0) * 0.5,
        (c_DLE**2).sum(axis=0),
        (c_DLE * n_D[:, None, None]).sum(axis=0),
        int((n_D**2).sum()),
        int(n_D.sum()),
        documents,
        TOP_K,
    )


def naive_binomial(forget: RoutingStatistics, retain: RoutingStatistics, min_ratio: float) -> np.ndarray:
    """The same rule with independent-token errors: what one would do without thinking of documents."""
    p, q = (np.maximum(s.frequency_LE, 0.5 / s.tokens) for s in (forget, retain))
    error = np.sqrt((1 - p) / (p * forget.tokens) + (1 - q) / (q * retain.tokens))
    return stats.false_discovery_control(stats.norm.sf((np.log(p / q) - np.log(min_ratio)) / error), axis=None) <= 0.05


@pytest.mark.parametrize("min_ratio", [1.0, 1.25])
def test_false_discoveries_stay_below_the_nominal_rate_where_the_naive_test_exceeds_it(min_ratio: float) -> None:
    """No expert differs. Under the global null the false discovery rate is the share of draws with any discovery."""
    rng = np.random.default_rng(11)
    config = DetectionConfig(min_ratio=min_ratio, min_load=0.0)
    ours = naive = 0
    for _ in range(200):
        forget, retain = simulate(rng, 60), simulate(rng, 150)
        ours += bool(detect(forget, retain, config).selected_LE.any())
        naive += bool(naive_binomial(forget, retain, min_ratio).any())
    assert ours / 200 <= 0.05
    assert naive / 200 > 0.25


@pytest.mark.parametrize("heavy_tailed", [False, True])
@pytest.mark.parametrize("documents", [(4, 4), (4, 150), (15, 150)])
def test_few_documents_make_no_discoveries(documents: tuple[int, int], heavy_tailed: bool) -> None:
    """With Welch–Satterthwaite's degrees of freedom .30 of the draws with 4 and 150 documents have a discovery, and
    counted as D documents, not as Kish's effective number, .38 of those with 15 and 150 and heavy tails."""
    rng = np.random.default_rng(1)
    config = DetectionConfig(min_ratio=1.0, min_load=0.0)
    sides = ([simulate(rng, number, heavy_tailed=heavy_tailed) for number in documents] for _ in range(150))
    assert np.mean([detect(*pair, config).selected_LE.any() for pair in sides]) < 0.05


def test_true_differences_are_found() -> None:
    rng = np.random.default_rng(3)
    boost = {(0, 3): 4.0, (2, 7): 4.0}
    result = detect(simulate(rng, 60, boost), simulate(rng, 150), DetectionConfig())
    assert {(int(a), int(b)) for a, b in zip(*np.nonzero(result.selected_LE), strict=True)} == set(boost)
    for place in boost:
        assert result.low_LE[place] < np.exp(result.log_ratio_LE[place]) < result.high_LE[place]
        assert result.low_LE[place] > 1.25


def test_load_rule_and_layers() -> None:
    rng = np.random.default_rng(3)
    boost = {(0, 3): 6.0, (2, 7): 6.0}
    forget, retain = simulate(rng, 60, boost), simulate(rng, 150)
    assert detect(forget, retain, DetectionConfig(layers=[2])).selected_LE.nonzero()[0].tolist() == [2]
    without = detect(forget, retain, DetectionConfig(layers=[0, 1, 3]))
    assert without.selected_LE.nonzero()[0].tolist() == [0] and not without.eligible_LE[2].any()
    assert not detect(forget, retain, DetectionConfig(min_load=7.0)).selected_LE.any()
    with pytest.raises(ValueError, match="no MoE layer is left to calibrate"):
        detect(forget, retain, DetectionConfig(layers=[]))
    with pytest.raises(ValueError, match="layer 4 is not one of the model's 4"):
        detect(forget, retain, DetectionConfig(layers=[4]))


def test_an_expert_never_selected_on_one_side_has_a_finite_ratio_and_a_wide_interval() -> None:
    rng = np.random.default_rng(0)
    forget, retain = simulate(rng, 60), simulate(rng, 60)
    for moments in (retain.counts_LE, retain.square_LE, retain.cross_LE):
        moments[1, 2] = 0
    ratio, error, freedom = log_ratio(forget, retain)
    assert np.isfinite([ratio[1, 2], error[1, 2], freedom]).all()
    assert ratio[1, 2] > 5 and error[1, 2] > 1.4, "zero selections say little about how small the frequency is"
