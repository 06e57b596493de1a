"""Forget-critical experts: which (layer, expert) pairs forget text selects more than retain text, beyond noise.

Shape legend: L MoE layers, E experts, K = top-k.

The abstract of TRACE (arXiv 2606.10338) says only that they come from "offline activation statistics"; the rule here
is our decision. It asks for

1. an effect beyond noise: log(p^F/p^R) significantly above log ρ, one-sided, with errors clustered by document and
   Benjamini–Hochberg control (J. R. Statist. Soc. B 57, 1995) over all experts of the layers that take part, and then
2. load: p^F ≥ c · K/E (a minimum share of the forget tokens).

Errors: Var log(p^F/p^R) ≈ Var(p^F)/p^F² + Var(p^R)/p^R² (delta method) with the clustered variances of
:class:`~trace_ds.routing.statistics.RoutingStatistics`. Student's t has D* − 1 degrees of freedom, of the corpus with
the smaller D*, Kish's effective number of documents n²/Σ n_d²: where a few long documents hold most of the tokens, they
alone determine the variance. (With Welch–Satterthwaite's degrees of freedom, a quarter of simulated draws with four
documents and no difference had false detections.) Half a selection is added to each count, so that the ratio of an
expert that was never selected is finite (Haldane–Anscombe). The variance is never below the binomial one; for an expert
without a selection, whose clustered variance is 0, the binomial one is multiplied by the design effect (clustered over
binomial variance) of the other corpus.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_ds.config.sections.calibration import DetectionConfig
from trace_ds.routing.statistics import RoutingStatistics

INTERVAL = 0.95
ALIKE = (
    "the forget and the retain corpus are routed identically, as the same text would be: check whether data.forget "
    "and data.retain name the same documents"
)
FALSE_DISCOVERY_RATE = 0.05  # Benjamini-Hochberg


@dataclass(frozen=True)
class Detection:
    """The result of :func:`detect`. All arrays are [L, E] float64 unless said otherwise.

    Attributes:
        selected_LE: bool, the forget-critical experts.
        eligible_LE: bool, experts of the layers that took part.
        forget_LE, retain_LE: activation frequencies p^F, p^R.
        log_ratio_LE, error_LE: log(p^F/p^R) and its standard error (infinite with fewer than two documents a side).
        low_LE, high_LE: 95 % interval of the ratio p^F/p^R.
        p_value_LE: one-sided, of the hypothesis p^F/p^R ≤ ρ.
        warnings: messages for the user.
    """

    selected_LE: np.ndarray
    eligible_LE: np.ndarray
    forget_LE: np.ndarray
    retain_LE: np.ndarray
    log_ratio_LE: np.ndarray
    error_LE: np.ndarray
    low_LE: np.ndarray
    high_LE: np.ndarray
    p_value_LE: np.ndarray
    warnings: tuple[str, ...]


def log_ratio(forget: RoutingStatistics, retain: RoutingStatistics) -> tuple[np.ndarray, np.ndarray, float]:
    """Return log(p^F/p^R) and its standard error, both float64 [L, E], and the degrees of freedom (docstring above)."""
    sides = (forget, retain)
    smoothed = [(s.counts_LE + 0.5) / (s.tokens + 1.0) for s in sides]
    binomial = [p_LE * (1.0 - p_LE) / max(s.tokens, 1) for p_LE, s in zip(smoothed, sides, strict=True)]
    clustered = [s.variance_LE() for s in sides]
    effects = [np.maximum(v / np.maximum(b, 1e-300), 1.0) for v, b in zip(clustered, binomial, strict=True)]
    relative = []
    for this, other in ((0, 1), (1, 0)):
        # Without a selection the clustered variance is 0: use the design effect of the other corpus.
        borrowed = np.where(sides[this].counts_LE == 0, effects[other], 1.0)
        floor = binomial[this] * np.where(np.isfinite(borrowed), borrowed, np.inf)
        relative.append(np.maximum(clustered[this], floor) / smoothed[this] ** 2)
    freedom = max(min(side.effective_documents for side in sides) - 1.0, 1.0)
    return np.log(smoothed[0] / smoothed[1]), np.sqrt(relative[0] + relative[1]), freedom


def detect(forget: RoutingStatistics, retain: RoutingStatistics, config: DetectionConfig) -> Detection:
    """Detect the forget-critical experts of the layers that ``config.layers`` lists.

    All layers for ``trained`` (the calibration stage replaces it by the layers) and for null.

    Raises:
        ValueError: the two statistics differ in shape or K, a layer number is out of range, or no layer takes part.
    """
    from scipy import stats

    if forget.counts_LE.shape != retain.counts_LE.shape or forget.top_k != retain.top_k:
        raise ValueError("the two statistics are of different models")
    layers, experts = forget.counts_LE.shape
    chosen = config.layers if isinstance(config.layers, list) else list(range(layers))
    for layer in chosen:
        if not 0 <= layer < layers:
            raise ValueError(f"layer {layer} is not one of the model's {layers} MoE layers (0 … {layers - 1})")
    if not chosen:
        raise ValueError("calibration.detection.layers is empty: no MoE layer is left to calibrate")
    eligible_LE = np.zeros((layers, experts), dtype=bool)
    eligible_LE[chosen] = True

    p_LE, q_LE = forget.frequency_LE, retain.frequency_LE
    ratio_LE, error_LE, freedom = log_ratio(forget, retain)
    safe_LE = np.maximum(error_LE, 1e-300)
    with np.errstate(over="ignore", invalid="ignore"):
        t_LE = np.where(np.isfinite(error_LE), (ratio_LE - np.log(config.min_ratio)) / safe_LE, 0.0)
        width_LE = stats.t.ppf(0.5 + INTERVAL / 2, freedom) * error_LE
        low_LE, high_LE = np.exp(ratio_LE - width_LE), np.exp(ratio_LE + width_LE)
    value_LE = np.where(np.isfinite(error_LE), stats.t.sf(t_LE, freedom), 1.0)

    warnings = [
        f"the {name} corpus has {s.documents} document(s) with counted tokens: errors cannot be estimated, so "
        "nothing is selected; use more documents"
        for name, s in (("forget", forget), ("retain", retain))
        if s.documents < 2
    ]
    alike = forget.tokens == retain.tokens and np.array_equal(forget.counts_LE, retain.counts_LE)
    if alike:
        warnings.append(ALIKE)
    discovered_LE = np.zeros_like(eligible_LE)
    discovered_LE[eligible_LE] = stats.false_discovery_control(value_LE[eligible_LE]) <= FALSE_DISCOVERY_RATE
    # The load rule comes after the test: selecting experts by load first, on the same data, would invalidate the
    # p-values. It only removes discoveries, and the false discovery rate is controlled for the set before: if the
    # removed ones are true discoveries more often than the others, the false share of the rest is larger.
    selected_LE = discovered_LE & (p_LE >= config.min_load * forget.top_k / experts)
    return Detection(
        selected_LE,
        eligible_LE,
        p_LE,
        q_LE,
        ratio_LE,
        error_LE,
        low_LE,
        high_LE,
        value_LE,
        tuple(warnings),
    )
