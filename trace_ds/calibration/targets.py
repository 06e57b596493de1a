"""Which frequencies the weights are asked for: the forget-side ones, or the closest that retain data can give.

Shape legend: S constraints (layer, expert), L MoE layers, E experts.

Weights only re-weight what is there. Four things keep a target out of reach whatever the weights:

* ``never``: no retain token selects the expert; its weighted frequency is 0;
* ``always``: every retain token selects it; its weighted frequency is 1;
* ``rare``: retain text selects it less than 1/limit as often as forget text (or fails to select it so rarely): matching
  would put all the weight on a handful of tokens, so at most ``limit`` times the retain frequency is asked for;
* ``dependent``: linear relations that hold for every retain token, such as the experts of a layer summing to K, or two
  experts that are always selected together. Targets must obey the same relation;
* ``tied``: what no equation shows, such as one expert that is only selected where another one is.

:func:`offer` returns the closest feasible target and names every expert whose target had to move. What it cannot see
shows when the dual is solved: one λ for all targets is then set by the worst pair of experts. :func:`leave_out` takes
such experts out of the solve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from trace_ds.calibration.patterns import Encoding, Store
from trace_ds.calibration.raking import NEWTON_CONSTRAINTS, covariance, eigen

LEAST_TOKENS = 30
REASONS = {
    "never": "no retain token selects it",
    "always": "every retain token selects it",
    "rare": "retain text selects it too rarely",
    "dependent": "its retain activations are tied to those of other experts",
    "tied": "no weights meet its target together with those of the others",
}


@dataclass(frozen=True)
class Offer:
    """``target_S`` float64, feasible as far as can be told before solving; ``reason_S`` a key of REASONS or ''."""

    target_S: np.ndarray
    reason_S: list[str]


def offer(store: Store, retain_S: np.ndarray, forget_S: np.ndarray, limit: float = np.inf) -> Offer:
    """The closest feasible targets (our decision).

    Inside a layer all of whose experts are constrained, the others take up what the fixed ones leave, by one common
    shift of their log-odds (the Bernoulli-KL projection on Σ = K). With de-duplicated patterns, exact linear
    dependencies are found from the covariance and the shift is projected (least squares) on what they allow.
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
    encoding = store.encoding
    for layer in np.unique(encoding.layer_S):
        members = np.nonzero(encoding.layer_S == layer)[0]
        if len(members) != encoding.experts:
            continue
        free = members[[reason_S[s] == "" and 0 < target_S[s] < 1 for s in members]]
        wanted = float(retain_S[members].sum() - target_S[members].sum() + target_S[free].sum())
        if abs(wanted - float(target_S[free].sum())) > 1e-12 and 0 < wanted < len(free):
            target_S[free] = _shift_log_odds(target_S[free], wanted)
    if store.exact and 0 < len(target_S) <= NEWTON_CONSTRAINTS:
        shift_S = target_S - retain_S
        values, vectors = eigen(covariance(*store.sample(0), np.zeros(len(target_S))))
        null = vectors[:, values <= 1e-12 * max(float(values.max()), 1e-300)]
        moved_S = np.einsum("ij,j->i", null, np.einsum("ij,i->j", null, shift_S))
        for s in np.nonzero(np.abs(moved_S) > 1e-9)[0]:
            reason_S[s] = reason_S[s] or "dependent"
        target_S = retain_S + np.where(np.abs(shift_S - moved_S) < 1e-15, 0.0, shift_S - moved_S)
    return Offer(np.clip(target_S, 0.0, 1.0), reason_S)


@dataclass(frozen=True)
class Subset:
    """A :class:`~trace_ds.calibration.patterns.Store` with constraints ``kept_S`` only (bool): the others have θ 0."""

    store: Store
    kept_S: np.ndarray

    @property
    def encoding(self) -> Encoding:
        whole = self.store.encoding
        return replace(whole, layer_S=whole.layer_S[self.kept_S], expert_S=whole.expert_S[self.kept_S])

    @property
    def tokens(self) -> int:
        return self.store.tokens

    @property
    def exact(self) -> bool:
        return self.store.exact

    def scored(
        self, theta_S: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, Callable[[np.ndarray], np.ndarray]]]:
        for score_N, multiplicity_N, fold in self.store.scored(self.whole(theta_S)):

            def folded(weights_N: np.ndarray, fold: Callable[[np.ndarray], np.ndarray] = fold) -> np.ndarray:
                return fold(weights_N)[self.kept_S]

            yield score_N, multiplicity_N, folded

    def sample(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        feature_NS, multiplicity_N = self.store.sample(limit)
        return feature_NS[:, self.kept_S], multiplicity_N

    def whole(self, value_S: np.ndarray) -> np.ndarray:
        """Values of the kept constraints among zeros for the others."""
        result_S = np.zeros(len(self.kept_S))
        result_S[self.kept_S] = value_S
        return result_S


def leave_out(
    store: Store, retain_S: np.ndarray, kept_S: np.ndarray, blocked_S: np.ndarray, most: int
) -> tuple[np.ndarray, str]:
    """(indices of further constraints to leave out of those in ``kept_S`` (bool), which cannot be met together; why).

    First all whose frequency hangs on fewer than :data:`LEAST_TOKENS` tokens; once these are out, the ``most`` whose
    θ ran off farthest (``blocked_S``). Our decision.
    """
    movable_S = kept_S & (retain_S > 0) & (retain_S < 1)
    few_S = movable_S & (np.minimum(retain_S, 1 - retain_S) * store.tokens < LEAST_TOKENS)
    if few_S.any():
        return np.flatnonzero(few_S), "rare"
    order = np.argsort(-np.where(movable_S, np.abs(blocked_S), -1.0), kind="stable")[:most]
    return order[movable_S[order]], "tied"


def with_absorbers(encoding: Encoding, retain_S: np.ndarray, kept_S: np.ndarray) -> np.ndarray:
    """``kept_S`` without the most used expert of each layer that is constrained whole but for those left out.

    The experts of a layer sum to K: with all others held, an expert left out would be held as well. The most used one
    takes up what they leave, which changes it least.
    """
    result_S = kept_S.copy()
    for layer in np.unique(encoding.layer_S):
        members = np.flatnonzero(encoding.layer_S == layer)
        if len(members) == encoding.experts and not kept_S[members].all() and kept_S[members].any():
            result_S[members[np.argmax(np.where(kept_S[members], retain_S[members], -1.0))]] = False
    return result_S


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
