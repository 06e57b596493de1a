"""Membership inference: can an attacker tell forget text from text the model never saw (holdout)?

Every attack gives a text a score that is larger for likelier *members*; the AUC is the probability that a member
scores above a non-member, ties counting half. Range 0 … 1, chance 0.5; after unlearning, best is the AUC of a model
retrained without the forget set (about 0.5 when forget and holdout text are alike), not 0: an AUC far below it gives
the forget set away too.

- loss: mean log-probability (Yeom et al. 2018).
- zlib: summed log-probability per byte of the zlib-compressed text (Carlini et al. 2021).
- Min-K%: mean of the lowest K % of the token log-probabilities (Shi et al. 2024; MUSE takes K = 40).
- Min-K%++: the same of (log p − μ) / σ with μ, σ the mean and standard deviation of the log-probability of a token
  drawn from the model at that position (Zhang et al. 2025, equation 3).
"""

from __future__ import annotations

import math
import zlib

import numpy as np

from trace_ds.evaluation.language_model import TokenScores

MIN_K_PERCENT = 40.0
EPSILON = 1e-6  # a deviation of 0 means a certain token: it says nothing, and must not divide by zero


def lowest_mean(values: np.ndarray, percent: float = MIN_K_PERCENT) -> float:
    """Mean of the lowest ``percent`` % of the values, at least one (MUSE: ``max(1, int(n · percent))``)."""
    if not len(values) or not 0 < percent <= 100:
        raise ValueError(f"the lowest {percent} % of {len(values)} values")
    count = max(1, math.floor(len(values) * percent / 100))
    return float(np.sort(values.astype(np.float64))[:count].mean())


def member_scores(scores: TokenScores, text: str) -> dict[str, float]:
    """The score of each attack for one text; ``min_k_plus`` only when ``scores`` has moments."""
    log_prob = scores.log_prob.astype(np.float64)
    found = {
        "loss": float(log_prob.mean()),
        "zlib": float(log_prob.sum() / len(zlib.compress(text.encode()))),
        "min_k": lowest_mean(log_prob),
    }
    if scores.mean is not None and scores.deviation is not None:
        normalised = (log_prob - scores.mean) / np.maximum(scores.deviation.astype(np.float64), EPSILON)
        found["min_k_plus"] = lowest_mean(normalised)
    return found


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(member > other) + P(member = other) / 2: Mann-Whitney's U / (m · n), O(n log n)."""
    from scipy.stats import rankdata

    if not len(members) or not len(others):
        raise ValueError("an AUC needs members and others")
    values = np.concatenate([members, others]).astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("scores must be finite")
    m = len(members)
    return float(rankdata(values)[:m].sum() - m * (m + 1) / 2) / (m * len(others))


def priv_leak(member_auc: float, retrained_auc: float = 0.5) -> float:
    """PrivLeak of MUSE in percent: 100 · (A − A_retrain) / A_retrain; 0 is best.

    Args:
        member_auc: AUC of Min-40 % with the forget texts as members, as :func:`auc` gives it.
        retrained_auc: the same of the retrained model; 0.5 is an *assumption* that must be stated.

    MUSE's A counts the other way round (holdout text above forget text), so A = 1 − ``member_auc``: −100 means not
    unlearned (all forget texts look like members), + values mean over-unlearned.
    """
    if not 0 <= retrained_auc < 1:
        raise ValueError("the AUC of the retrained model must be in [0, 1)")
    reference = 1 - retrained_auc
    return 100 * ((1 - member_auc) - reference) / reference
