"""Weight rules: weights of the retain text from its routing, with mean 1 over the counted tokens.

Shape legend: T tokens (flat order), R rows, D documents, S constraints (layer, expert), L MoE layers, E experts,
G columns of a chunk (:class:`~trace_ds.calibration.tokens.Packing`).

``unlearning.apply: sampling`` needs one weight per row (:func:`weigh_rows`), computed from the selections of the row;
``apply: loss`` one per token (:func:`weigh_tokens`), which needs the routing of every token.

=================  ==================================================================================================
``raking``         log-weight of a token: Σ θ a, the weights closest to uniform that meet the (tempered) targets
                   (raking.py). Log-weight of a row: τ times the mean of Σ θ a over its counted tokens, with θ from a
                   sample of tokens, and τ ≤ 1,024 (it can be below 1) the largest that keeps the effective sample
                   size of the rows at or above the floor
``literal``        weight of a token: the mean of p^F/p^R, each clipped to [1/clip, clip], over the detected experts
                   that it selects, 1 where it selects none. For tokens only
``uniform``        1; with ``source_weights``, the configured weight of the document's source (the oracle of a study).
                   Control: the unweighted baseline
``permuted``       raking's weights on other text: those of rows permuted over the rows, those of tokens shifted
                   cyclically by a random number of counted tokens. Control: the same weights without their meaning
``random_experts`` raking on as many experts as were detected, drawn at random, each with its own p^F. Control
``lowest_experts`` the same on as many experts with the lowest p^F/p^R. Control
=================  ==================================================================================================

Weights of ``literal`` and ``uniform`` are raised to a power c ≤ 1, the largest that keeps the effective sample size
(Σw)²/(nΣw²) at or above the floor. All rules and controls are our decisions; none is taken from the paper. To add one:
docs/add_a_weight_rule.md.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trace_ds.calibration.detect import Detection
from trace_ds.calibration.raking import RakingResult, rake
from trace_ds.calibration.tokens import RowSelections, RowSpread, Trace, count_selections, in_order
from trace_ds.calibration.units import Units
from trace_ds.calibration.weights import (
    ess_and_max_weight,
    exponentiate,
    largest_exponent_rows,
    largest_exponent_tokens,
    row_means,
)
from trace_ds.config.sections.calibration import CalibrationConfig
from trace_ds.corpora.dataset import TokenMap
from trace_ds.errors import listed
from trace_ds.run.files import new_array

# Columns [G, T] of some tokens → their log-weights, float64 [T].
Scorer = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class WeightRequest:
    """The input of a weight rule: corpora, detection and settings.

    Attributes:
        config: the rule and its settings.
        tokens: the counted tokens, rows and documents of the retain corpus.
        scope_LE: bool, the experts whose frequencies the weights are to move (see :func:`choose_experts`).
        forget_LE, retain_LE: float64, activation frequencies p^F and p^R.
        error_LE: float64, standard errors of p^R, clustered by document.
        seed: of the rules that draw at random.
        source_log_weight_D: see :func:`source_log_weights`; None without ``source_weights``.
        threads: number of threads that read the trace.
        log: receives lines of progress.
    """

    config: CalibrationConfig
    tokens: TokenMap
    scope_LE: np.ndarray
    forget_LE: np.ndarray
    retain_LE: np.ndarray
    error_LE: np.ndarray
    seed: int = 0
    source_log_weight_D: np.ndarray | None = None
    threads: int = 1
    log: Callable[[str], None] = lambda line: None

    @property
    def ignores_routing(self) -> bool:
        """Whether the weights do not depend on the routing, so that no trace is read."""
        return self.config.rule == "uniform" or not self.scope_LE.any()

    def rake(self, units: Units) -> tuple[RakingResult, np.ndarray]:
        """Return the solution and θ, float64 [L, E].

        The activations of a layer sum to K, so θ of a layer whose experts are all constrained is determined only up
        to a common constant, which is chosen so that Σ p^R θ = 0.
        """
        scope_LE, config = self.scope_LE, self.config
        sides = self.forget_LE[scope_LE], self.retain_LE[scope_LE]
        raking = rake(units, *sides, config.clip, config.ess_floor, self.error_LE[scope_LE], self.threads, self.log)
        theta_LE = np.zeros(scope_LE.shape)
        theta_LE[scope_LE] = raking.theta_S
        for layer in np.flatnonzero(scope_LE.all(axis=1)):
            retain_E = self.retain_LE[layer]
            theta_LE[layer, retain_E > 0] -= float(retain_E @ theta_LE[layer]) / float(retain_E.sum())
        return raking, theta_LE


@dataclass(frozen=True)
class RuleResult:
    """The weights of a rule.

    Attributes:
        weight_T: float64 [all tokens], mean 1 over counted tokens. At other tokens 0 or the row's weight: ignore it.
        row_weight_R: float64, mean weight of the row's counted tokens, 0 for a row without any.
        theta_LE: float64, times ``exponent``; 0 where there is no constraint or the rule has no θ.
        log_mean: the log-weight of a token is Σ θ a − log_mean; of a row, the mean of Σ θ a over its tokens − log_mean.
        scope_LE: bool, the experts whose frequencies the weights were to move.
        target_LE: float64. Of token weights: the tempered target inside the scope, p^R elsewhere. Weights of rows have
            no target of their own, and this equals ``achieved_LE``.
        achieved_LE: float64, frequencies under the weights (NaN: not known).
        exponent: c or τ (see the module's docstring); 1 for raking's weights of tokens.
        ess, max_weight: effective sample size, as a fraction, and largest weight of the tokens.
        raking: the solution of raking; None for a rule that does not solve.
    """

    weight_T: np.ndarray | RowSpread
    row_weight_R: np.ndarray
    theta_LE: np.ndarray
    log_mean: float
    scope_LE: np.ndarray
    target_LE: np.ndarray
    achieved_LE: np.ndarray
    exponent: float
    ess: float
    max_weight: float
    raking: RakingResult | None

    @property
    def lambda_(self) -> float:
        """λ of raking; 1 for the other rules."""
        return 1.0 if self.raking is None else self.raking.lambda_

    @property
    def converged(self) -> bool:
        return self.raking is None or self.raking.converged

    @property
    def replaced_targets(self) -> list[tuple[int, int, float, str]]:
        """(layer, expert, target at λ = 1, reason) of the experts for which p^F could not be the target."""
        if self.raking is None:
            return []
        rows = zip(*np.nonzero(self.scope_LE), self.raking.full_target_S, self.raking.reason_S, strict=True)
        return [(int(layer), int(expert), float(target), reason) for layer, expert, target, reason in rows if reason]


def choose_experts(config: CalibrationConfig, detection: Detection, seed: int) -> np.ndarray:
    """Return the experts whose frequencies the weights are to move, bool [L, E].

    None for ``uniform``, and where none was detected and ``if_none_found`` says ``uniform``; as many as were detected
    for ``random_experts`` and ``lowest_experts``; the detected ones for ``literal``; otherwise those of
    ``calibration.experts``.
    """
    selected_LE = detection.selected_LE
    chosen_LE = np.zeros_like(selected_LE)
    if config.rule == "uniform" or (config.if_none_found == "uniform" and not selected_LE.any()):
        return chosen_LE
    if config.rule in ("random_experts", "lowest_experts"):
        candidates = np.flatnonzero(detection.eligible_LE)
        if config.rule == "random_experts":
            order = np.random.default_rng([seed, 1, 0]).permutation(candidates)
        else:
            order = candidates[np.argsort(detection.log_ratio_LE.flat[candidates], kind="stable")]
        chosen_LE.flat[order[: int(selected_LE.sum())]] = True
        return chosen_LE
    return detection.eligible_LE.copy() if config.experts == "all" and config.rule != "literal" else selected_LE.copy()


def source_log_weights(weights: Mapping[str, float], names: Sequence[str], source_D: np.ndarray) -> np.ndarray:
    """float64 [D]: log of the product of the weights whose pattern matches the source of each document.

    Raises:
        ValueError: a pattern that matches no source.
    """
    log_S = np.zeros(len(names))
    for pattern, weight in sorted(weights.items()):
        matches_S = np.array([fnmatch.fnmatchcase(name, pattern) for name in names], dtype=bool)
        if not matches_S.any():
            raise ValueError(f"no retain document has a source like {pattern!r}; there are {listed(sorted(names))}")
        log_S[matches_S] += np.log(weight)
    return log_S[source_D]


def weigh_rows(request: WeightRequest, selections: RowSelections) -> RuleResult:
    """Return weights of rows, with which rows are drawn; ``weight_T`` is the weight of each token's row."""
    config, tokens, scope_LE = request.config, request.tokens, request.scope_LE
    sizes_R = tokens.counted_per_row()
    filled_R, total = sizes_R > 0, int(sizes_R.sum())
    raking, theta_LE, exponent, score_R = None, np.zeros(scope_LE.shape), 1.0, np.zeros(tokens.rows)
    if not request.ignores_routing:
        raking, theta_LE = request.rake(Units.of(selections.selected_NLK, scope_LE))
        score_R = selections.scores(theta_LE)
        exponent = largest_exponent_rows(score_R[filled_R], config.ess_floor)
    elif request.source_log_weight_D is not None:
        score_R = row_means(_SourceLogWeights(tokens, request.source_log_weight_D), tokens)
        exponent = min(largest_exponent_rows(score_R[filled_R], config.ess_floor), 1.0)
    score_R = np.where(filled_R, exponent * score_R, -np.inf)
    weight_R = np.exp(score_R - score_R.max())
    mean = float(weight_R @ sizes_R) / total
    log_mean, weight_R = float(score_R.max()) + float(np.log(mean)), weight_R / mean
    if config.rule == "permuted":
        theta_LE = np.zeros(scope_LE.shape)  # no θ gives these weights
        weight_R[filled_R] = np.random.default_rng([request.seed, 2]).permutation(weight_R[filled_R])
        # rows differ in tokens, so the mean over tokens is no longer 1
        weight_R *= total / float(weight_R @ sizes_R)
    spread_T, achieved_LE = RowSpread(tokens, weight_R), selections.sums(weight_R) / total
    return RuleResult(
        spread_T,
        weight_R,
        theta_LE * exponent,
        log_mean,
        scope_LE,
        achieved_LE,  # weights of rows have no target of their own: τ follows from the floor alone
        achieved_LE,
        exponent,
        *ess_and_max_weight(spread_T, tokens),
        raking,
    )


def weigh_tokens(request: WeightRequest, trace: Trace | None, spool: Path) -> RuleResult:
    """Return weights of tokens, by which their losses are multiplied.

    Args:
        trace: routing of every token; may be None for ``uniform`` weights.
        spool: directory for the arrays over all tokens that the result refers to.
    """
    config, tokens, scope_LE = request.config, request.tokens, request.scope_LE
    log_weight_T, weight_T = (
        new_array(spool / name, np.float64, (tokens.tokens,)) for name in ("log_weight.f64", "weight.f64")
    )
    raking, theta_LE, target_LE = None, np.zeros(scope_LE.shape), request.retain_LE.copy()
    if request.ignores_routing:
        if request.source_log_weight_D is not None:
            sources = _SourceLogWeights(tokens, request.source_log_weight_D)
            for start, stop in tokens.spans():
                log_weight_T[start:stop] = sources[start:stop]
    elif trace is None:
        raise ValueError(f"the rule {config.rule} needs the routing trace")
    elif config.rule in TOKEN_RULES:
        target_LE[scope_LE] = request.forget_LE[scope_LE]
        _write_scores(log_weight_T, request, trace, TOKEN_RULES[config.rule](request, trace))
    else:
        raking, theta_LE = request.rake(Units(trace, scope_LE, tokens))
        target_LE[scope_LE] = raking.target_S
        packing = trace.packing(scope_LE.shape[1])
        tables_LV = packing.tables(theta_LE)
        _write_scores(log_weight_T, request, trace, lambda columns_GT: packing.score(columns_GT, tables_LV))
    exponent = 1.0 if raking is not None else largest_exponent_tokens(log_weight_T, tokens, config.ess_floor)
    log_mean = exponentiate(log_weight_T, weight_T, tokens, exponent)
    if config.rule == "permuted":
        theta_LE = np.zeros(scope_LE.shape)
        _shift_weights(weight_T, log_weight_T, tokens, request.seed)
    achieved_LE = request.retain_LE if request.source_log_weight_D is None else np.full(scope_LE.shape, np.nan)
    if trace is not None:
        weighted_LE = count_selections(trace, tokens, scope_LE.shape[1], weight_T, request.threads)
        achieved_LE = weighted_LE / tokens.counted_total()
    return RuleResult(
        weight_T,
        row_means(weight_T, tokens),
        theta_LE * exponent,
        log_mean,
        scope_LE,
        target_LE,
        achieved_LE,
        exponent,
        *ess_and_max_weight(weight_T, tokens),
        raking,
    )


def literal_scores(request: WeightRequest, trace: Trace) -> Scorer:
    """Return a scorer: log of the mean clipped p^F/p^R over the detected experts a token selects, 0 for none."""
    clip, scope_LE, packing = request.config.clip, request.scope_LE, trace.packing(request.scope_LE.shape[1])
    ratio_LE = np.clip(request.forget_LE / np.maximum(request.retain_LE, 1e-300), 1.0 / clip, clip)
    sums, hits = packing.tables(np.where(scope_LE, ratio_LE, 0.0)), packing.tables(scope_LE.astype(np.float64))

    def score(columns_GT: np.ndarray) -> np.ndarray:
        hits_T = packing.score(columns_GT, hits)
        return np.log(np.where(hits_T > 0, packing.score(columns_GT, sums), 1.0) / np.maximum(hits_T, 1.0))

    return score


# Rules for tokens without raking: functions that return a scorer, which gives the log-weights of tokens.
TOKEN_RULES: dict[str, Callable[[WeightRequest, Trace], Scorer]] = {"literal": literal_scores}


@dataclass(frozen=True)
class _SourceLogWeights:
    """Log-weights of tokens by their documents; slicing computes only the tokens of the slice."""

    tokens: TokenMap
    log_weight_D: np.ndarray

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.log_weight_D[np.asarray(self.tokens.document_ids_T[span])]


def _write_scores(log_weight_T: np.ndarray, request: WeightRequest, trace: Trace, score: Scorer) -> None:
    """Write the log-weights of all counted tokens, 0 elsewhere."""
    tokens, packing = request.tokens, trace.packing(request.scope_LE.shape[1])

    def write(span: tuple[int, int]) -> None:
        chunk_T, counted_T = np.zeros(span[1] - span[0]), tokens.counted(*span)
        chunk_T[counted_T] = score(packing.columns(trace[slice(*span)][counted_T]))
        log_weight_T[slice(*span)] = chunk_T

    for _ in in_order(write, tokens.spans(), request.threads):
        pass


def _shift_weights(weight_T: np.ndarray, scratch_T: np.ndarray, tokens: TokenMap, seed: int) -> None:
    """Shift the weights of the counted tokens cyclically by a random number of counted tokens.

    Keeps the set of weights and their correlation among neighbouring tokens.
    """
    count = 0
    for start, stop in tokens.spans():
        kept_N = np.asarray(weight_T[start:stop])[tokens.counted(start, stop)]
        scratch_T[count : count + len(kept_N)] = kept_N
        count += len(kept_N)
    offset = int(np.random.default_rng([seed, 2]).integers(count))
    for start, stop in tokens.spans():
        counted_T, chunk_T = tokens.counted(start, stop), np.zeros(stop - start)
        size = int(counted_T.sum())
        until_end = min(size, count - offset)
        chunk_T[counted_T] = np.concatenate([scratch_T[offset : offset + until_end], scratch_T[: size - until_end]])
        weight_T[start:stop], offset = chunk_T, (offset + size) % count
