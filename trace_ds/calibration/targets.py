"""Which frequencies the weights are asked for: the forget-side ones, or the closest that retain data can give.

Shape legend: S constraints (layer, expert), L MoE layers, E experts.

Weights only re-weight what is there. Four things keep a target out of reach whatever the weights:

* ``never``: no retain token selects the expert; its weighted frequency is 0;
* ``always``: every retain token selects it; its weighted frequency is 1;
* ``rare``: retain text selects it less than 1/limit as often as forget text (or fails to select it so rarely): matching
  would put all the weight on a handful of tokens, so at most ``limit`` times the retain frequency is asked for;
* ``tied``: relations that hold for every retain token, such as two experts that are always selected together, or one
  that is only selected where another one is. They show when the dual is solved (raking.py); that the experts of a layer
  sum to K is respected by :func:`offer`.

:func:`offer` does what can be done before: the closest targets, and a name for every expert whose target had to move.
"""

from __future__ import annotations

import numpy as np

REASONS = {
    "never": "no retain token selects it",
    "always": "every retain token selects it",
    "rare": "retain text selects it too rarely",
    "tied": "no weights meet its target together with those of the others",
}


def offer(
    scope_LE: np.ndarray, retain_S: np.ndarray, forget_S: np.ndarray, limit: float
) -> tuple[np.ndarray, list[str]]:
    """(the closest targets that can be told to be feasible before solving, a key of REASONS or '' for each).

    Inside a layer all of whose experts are constrained, the others take up what the fixed ones leave, by one common
    shift of their log-odds (the Bernoulli-KL projection on Σ = K). Our decision.
    """
    target_S = np.asarray(forget_S, np.float64).copy()
    reason_S = [""] * len(target_S)

    def fix(mask_S: np.ndarray, value_S: np.ndarray, reason: str) -> None:
        for s in np.nonzero(mask_S)[0]:
            target_S[s], reason_S[s] = value_S[s], reason

    with np.errstate(invalid="ignore"):
        fix(forget_S > limit * retain_S, limit * retain_S, "rare")
        fix(1 - forget_S > limit * (1 - retain_S), 1 - limit * (1 - retain_S), "rare")
    fix((retain_S <= 0) & (forget_S > 0), np.zeros_like(target_S), "never")
    fix((retain_S >= 1) & (forget_S < 1), np.ones_like(target_S), "always")
    layer_S = np.nonzero(scope_LE)[0]
    for layer in np.flatnonzero(scope_LE.all(axis=1)):
        members = np.nonzero(layer_S == layer)[0]
        free = members[[reason_S[s] == "" and 0 < target_S[s] < 1 for s in members]]
        wanted = float(retain_S[members].sum() - target_S[members].sum() + target_S[free].sum())
        if abs(wanted - float(target_S[free].sum())) > 1e-12 and 0 < wanted < len(free):
            target_S[free] = _shift_log_odds(target_S[free], wanted)
    return np.clip(target_S, 0.0, 1.0), reason_S


def _shift_log_odds(target: np.ndarray, wanted: float) -> np.ndarray:
    """The targets with one common constant added to their log-odds so that they sum to ``wanted`` (bisection)."""
    odds = np.log(target) - np.log1p(-target)
    low, high = -60.0, 60.0
    for _ in range(100):
        middle = (low + high) / 2
        if float((1.0 / (1.0 + np.exp(-(odds + middle)))).sum()) < wanted:
            low = middle
        else:
            high = middle
    return 1.0 / (1.0 + np.exp(-(odds + (low + high) / 2)))
