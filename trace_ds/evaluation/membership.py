"""Membership inference as a task: forget texts (members) against texts the model never saw (holdout).

| metric         | what                                                          | range    | chance | best         |
|----------------|---------------------------------------------------------------|----------|--------|--------------|
| auc_min_k      | AUC of Min-40 % (MUSE's attack)                               | 0 … 1    | 0.5    | retrained's  |
| auc_min_k_plus | AUC of Min-40 %++                                             | 0 … 1    | 0.5    | retrained's  |
| auc_loss       | AUC of the mean log-probability                               | 0 … 1    | 0.5    | retrained's  |
| auc_zlib       | AUC of the log-probability per compressed byte                | 0 … 1    | 0.5    | retrained's  |
| priv_leak      | PrivLeak of MUSE, %: −100 not unlearned, + over-unlearned     | −100 … ∞ | none   | 0            |

The reference of the AUCs is the retrained model of the run (``evaluation.retrained`` names it); without one, 0.5 is
assumed, and the result says so. The attacks and their sources are in ``mia.py``. Texts longer than the context are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.errors import UserError
from trace_ds.evaluation.items import MembershipItem, beginning
from trace_ds.evaluation.language_model import LanguageModel, Sequence
from trace_ds.evaluation.metrics import ASSUMED_AUC, PRIV_LEAK
from trace_ds.evaluation.mia import auc, member_scores, priv_leak
from trace_ds.evaluation.outcome import Outcome, rounded

ATTACKS = ("min_k", "min_k_plus", "loss", "zlib")


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
    limit = min(context_length, getattr(model.model.config, "max_position_embeddings", None) or context_length)
    sequences = []
    for item in items:
        ids = model.encode(item.text)[:limit]
        if len(ids) < 2:
            raise UserError("the text is a single token", f"{where} item {item.id}", "remove it")
        sequences.append(Sequence(tuple(ids), 1))
    found = [
        member_scores(scores, item.text)
        for item, scores in zip(items, model.score(sequences, advance, moments=True), strict=True)
    ]
    logs = [
        {
            "id": item.id,
            "source": item.source,
            "text": beginning(item.text),
            "member": item.member,
            **{attack: rounded(scores[attack]) for attack in ATTACKS},
        }
        for item, scores in zip(items, found, strict=True)
    ]
    return MembershipOutcome({attack: np.array([scores[attack] for scores in found]) for attack in ATTACKS}, logs)


def with_references(result: dict[str, Any], retrained: dict[str, Any] | None) -> dict[str, Any]:
    """A result whose membership scores say what is best: the retrained model's AUC (else 0.5, assumed), and PrivLeak.

    Args:
        result: of one model, as in ``RUN/evaluation/NAME.json``.
        retrained: the result of the model trained without the forget set, or None.
    """
    theirs = {(s["task"], s["metric"]): s["value"] for s in retrained["scores"]} if retrained is not None else {}
    by_key = {(s["task"], s["metric"]): s["value"] for s in result["scores"]}
    scores = []
    for score in result["scores"]:
        task, metric = score["task"], score["metric"]
        if metric.startswith("auc_"):
            score = {**score, "reference": theirs.get((task, metric), ASSUMED_AUC)}
        elif metric == PRIV_LEAK:
            mine, reference = by_key[task, "auc_min_k"], theirs.get((task, "auc_min_k"))
            used = ASSUMED_AUC if reference is None else reference
            value = None if mine is None or used == 1 else priv_leak(mine, used)
            note = (
                f"AUC of the retrained model {retrained['model']}: {used:.4f}"
                if retrained is not None and reference is not None
                else "no retrained model was evaluated: its AUC is assumed to be 0.5"
            )
            score = {**score, "value": value, "reference": 0.0, "note": note}
        scores.append(score)
    return {**result, "scores": scores}
