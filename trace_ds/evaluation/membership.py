"""Membership inference as a task: forget texts (members) against texts the model never saw (holdout).

An attack gives a text a score that is larger for likelier *members*; its AUC is the probability that a member scores
above a non-member, ties counting half. After unlearning, best is the AUC of a model retrained without the forget set
(named retrained or gold; without one 0.5 is assumed, and the result says so), not 0: an AUC far below that gives the
forget set away too. Texts longer than the context are cut.

- loss: mean log-probability (Yeom et al. 2018).
- zlib: summed log-probability per byte of the zlib-compressed text (Carlini et al. 2021).
- Min-K%: mean of the lowest K % of the token log-probabilities (Shi et al. 2024; MUSE takes K = 40).
- Min-K%++: the same of (log p − μ) / σ with μ, σ the mean and standard deviation of the log-probability of a token
  drawn from the model at that position (Zhang et al. 2025, equation 3).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.errors import UserError
from trace_ds.evaluation.items import MembershipItem, beginning
from trace_ds.evaluation.language_model import LanguageModel, Sequence, TokenScores
from trace_ds.evaluation.outcome import Outcome, item_logs

ATTACKS = ("min_k", "min_k_plus", "loss", "zlib")
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
    by_attack = {
        "loss": float(log_prob.mean()),
        "zlib": float(log_prob.sum() / len(zlib.compress(text.encode()))),
        "min_k": lowest_mean(log_prob),
    }
    if scores.mean is not None and scores.deviation is not None:
        normalised = (log_prob - scores.mean) / np.maximum(scores.deviation.astype(np.float64), EPSILON)
        by_attack["min_k_plus"] = lowest_mean(normalised)
    return by_attack


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """P(member > other) + P(member = other) / 2: Mann-Whitney's U over the number of pairs."""
    from scipy.stats import mannwhitneyu

    if not len(members) or not len(others):
        raise ValueError("an AUC needs members and others")
    if not (np.isfinite(members).all() and np.isfinite(others).all()):
        raise ValueError("scores must be finite")
    return float(mannwhitneyu(members, others, method="asymptotic").statistic) / (len(members) * len(others))


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


@dataclass(frozen=True)
class MembershipOutcome(Outcome):
    """Its columns, by attack: scores that are larger for likelier members."""

    @property
    def member_I(self) -> np.ndarray:
        return np.array([log["member"] for log in self.logs])

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """AUCs over all items."""
        return {
            f"auc_{attack}": auc(scores_I[self.member_I], scores_I[~self.member_I])
            for attack, scores_I in self.columns.items()
        }


def evaluate_membership(
    model: LanguageModel,
    items: list[MembershipItem],
    context_length: int,
    where: str,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Score every text; ``advance`` counts texts.

    Raises:
        UserError: a text has no token to predict.
    """
    limit = model.most_tokens(context_length)
    sequences = []
    for item in items:
        ids = model.encode(item.text)[:limit]
        if len(ids) < 2:
            raise UserError("the text is a single token", f"{where} item {item.id}", "remove it")
        sequences.append(Sequence(tuple(ids), 1))
    by_item = [
        member_scores(scores, item.text)
        for item, scores in zip(items, model.score(sequences, advance, moments=True), strict=True)
    ]
    columns = {attack: np.array([scores[attack] for scores in by_item]) for attack in ATTACKS}
    texts = [beginning(item.text) for item in items]
    return MembershipOutcome(columns, item_logs(items, columns, text=texts, member=[item.member for item in items]))
