"""Forget-critical experts: which (layer, expert) pairs forget text selects more than retain text, beyond noise.

Shape legend: L MoE layers, E experts, K = top-k.

The abstract of TRACE (arXiv 2606.10338) says only that they come from "offline activation statistics"; the rule here
is our decision. It asks for

1. load: p^F ≥ c · K/E (the expert matters for forget text at all), and
2. effect beyond noise: log(p^F/p^R) significantly above log ρ, one-sided, with document-clustered errors and
   Benjamini–Hochberg control (J. R. Statist. Soc. B 57, 1995) over all L×E hypotheses tested.

Errors: Var log(p^F/p^R) ≈ Var(p^F)/p^F² + Var(p^R)/p^R² (delta method) with the clustered variances of
:class:`~trace_ds.routing.statistics.RoutingStatistics`; Student's t with as many degrees of freedom as the corpus of
fewer documents has, less one, because corpora of few documents are common. (Welch–Satterthwaite's number, which lets
the other corpus make up for it, finds something in a quarter of the draws with four documents and no difference: tails
as far out as many experts at once ask for are too thin.) Documents are counted by Kish's effective number n²/Σ n_d²:
where a few long ones hold most of the tokens they alone decide the variance, and it is as uncertain as they are few.
Half a selection is added to each count so that an expert never selected has a finite ratio (Haldane–Anscombe); its
clustered variance would be zero, so a variance is never taken below the binomial one times the design effect seen on
the other side.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_ds.config.sections.calibration import DetectionConfig
from trace_ds.routing.statistics import RoutingStatistics

INTERVAL = 0.95
ALIKE = (
    "the forget and the retain corpus are routed exactly alike, as the same text is: look whether data.forget and "
    "data.retain name the same documents"
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
        warnings: for people.
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
    """(log(p^F/p^R), its standard error, both float64 [L, E], degrees of freedom); see the module's docstring."""
    sides = (forget, retain)
    smoothed = [(s.counts_LE + 0.5) / (s.tokens + 1.0) for s in sides]
    binomial = [p_LE * (1.0 - p_LE) / max(s.tokens, 1) for p_LE, s in zip(smoothed, sides, strict=True)]
    clustered = [s.variance_LE() for s in sides]
    effects = [np.maximum(v / np.maximum(b, 1e-300), 1.0) for v, b in zip(clustered, binomial, strict=True)]
    relative = []
    for this, other in ((0, 1), (1, 0)):
        # Without a selection the clustered variance says nothing: borrow the clumping of the other corpus.
        borrowed = np.where(sides[this].counts_LE == 0, effects[other], 1.0)
        floor = binomial[this] * np.where(np.isfinite(borrowed), borrowed, np.inf)
        relative.append(np.maximum(clustered[this], floor) / smoothed[this] ** 2)
    freedom = max(min(side.effective_documents for side in sides) - 1.0, 1.0)
    return np.log(smoothed[0] / smoothed[1]), np.sqrt(relative[0] + relative[1]), freedom


def detect(forget: RoutingStatistics, retain: RoutingStatistics, config: DetectionConfig) -> Detection:
    """Find the forget-critical experts among the layers that ``config`` lets take part (where it
    says ``trained``, which only the stage can tell: all).

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
        raise ValueError("layers leaves no MoE layer to look at")
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
    # The load rule comes after the control, because p-values of experts chosen by their load would not be valid
    # ones. It only removes discoveries, but the rate is controlled for the set before: where the removed ones are
    # true more often than the others, the false share of those that stay is larger.
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
