"""Weight rules: from routing to weights of the retain text, with mean exactly 1 over the counted tokens.

Shape legend: T tokens (flat order), R rows, D documents, S constraints (layer, expert), L MoE layers, E experts,
G columns of a chunk (:class:`~trace_ds.calibration.tokens.Packing`).

``unlearning.apply: sampling`` needs one weight a row (:func:`weigh_rows`), which follows from the selections of the
row; ``apply: loss`` one a token (:func:`weigh_tokens`), which needs the routing of every token.

=================  ==================================================================================================
``raking``         log-weight of a token Σ θ a: the least change that meets the (tempered) targets (raking.py). Of a
                   row: τ times the mean of Σ θ a over its tokens, θ from a sample of tokens, τ the largest that keeps
                   the effective sample size of the rows at the floor
``literal``        weight of a token: the mean of p^F/p^R, clipped to [1/clip, clip], over the detected experts that it
                   selects, 1 where it selects none. Only for tokens
``uniform``        1, or with ``source_weights`` what the configuration gives to the source of the document (the oracle
                   of a study). Control: the unweighted baseline
``permuted``       raking's weights on other text: those of rows permuted over the rows, those of tokens shifted along
                   the corpus by a random distance. Control: same weights, no meaning
``random_experts`` raking on as many experts as were detected, drawn at random, with their true targets. Control
``lowest_experts`` the same on as many of the lowest p^F/p^R, those that forget text uses least. Control
=================  ==================================================================================================

Weights that are no raking's are flattened to a power c ≤ 1 where the effective sample size (Σw)²/(nΣw²) would fall
below the floor. All rules and controls are our decisions; none is taken from the paper. To add one:
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
from trace_ds.calibration.weights import exponentiate, flattening, row_means, sharpening, size_and_maximum
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
        scope_LE: bool, the experts whose frequencies the weights are to move (see :func:`choose_experts`).
        forget_LE, retain_LE: frequencies. error_LE: standard errors of the latter, clustered by document.
        source_log_weight_D: see :func:`source_log_weights`; None without ``source_weights``.
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
    def uniform(self) -> bool:
        return self.config.rule == "uniform" or not self.scope_LE.any()

    def rake(self, units: Units) -> tuple[RakingResult, np.ndarray]:
        """(the solution, θ [L, E]). θ of a fully constrained layer is defined up to a constant, since its activations
        sum to K: chosen so that Σ p^R θ = 0."""
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
        weight_T: float64 [all tokens], mean 1 over counted tokens; meaningless elsewhere.
        row_weight_R: float64, mean weight of the row's counted tokens, 0 for a row without any.
        theta_LE: float64, 0 where there is no constraint or the rule has no θ; log_mean: log-weights are Σ θ a of a
            token, or their mean over a row, less this.
        scope_LE: bool, the experts whose frequencies the weights were asked to move.
        target_LE: float64, tempered target inside the scope, p^R elsewhere; achieved_LE: frequencies under the weights
            (NaN: not known).
        exponent: c or τ, see the module's docstring.
        ess, max_weight: of the token weights; ess is a fraction.
        raking: the solution of raking; None where it was not needed.
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
    def strength(self) -> float:
        """λ of raking; 1 for the other rules."""
        return 1.0 if self.raking is None else self.raking.strength

    @property
    def converged(self) -> bool:
        return self.raking is None or self.raking.converged

    @property
    def moved(self) -> list[tuple[int, int, float, str]]:
        """(layer, expert, offered target, reason) of the experts whose target had to move."""
        if self.raking is None:
            return []
        rows = zip(*np.nonzero(self.scope_LE), self.raking.offered_S, self.raking.reason_S, strict=True)
        return [(int(layer), int(expert), float(offered), reason) for layer, expert, offered, reason in rows if reason]


def choose_experts(config: CalibrationConfig, detection: Detection, seed: int) -> np.ndarray:
    """bool [L, E]: the experts whose frequencies the rule is asked to move."""
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
    """Weights of rows, by which they are drawn; ``weight_T`` gives each token that of its row."""
    config, tokens, scope_LE = request.config, request.tokens, request.scope_LE
    sizes_R = tokens.counted_per_row()
    filled_R, total = sizes_R > 0, int(sizes_R.sum())
    raking, theta_LE, exponent, score_R = None, np.zeros(scope_LE.shape), 1.0, np.zeros(tokens.rows)
    if not request.uniform:
        raking, theta_LE = request.rake(Units.of(selections.selected_NLK, scope_LE))
        score_R = selections.scores(theta_LE)
        exponent = sharpening(score_R[filled_R], config.ess_floor)
    elif request.source_log_weight_D is not None:
        score_R = row_means(_SourceLogWeights(tokens, request.source_log_weight_D), tokens)
        exponent = min(sharpening(score_R[filled_R], config.ess_floor), 1.0)
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
        achieved_LE,  # the floor of the rows decides: there is no other target to miss
        achieved_LE,
        exponent,
        *size_and_maximum(spread_T, tokens),
        raking,
    )


def weigh_tokens(request: WeightRequest, trace: Trace | None, spool: Path) -> RuleResult:
    """Weights of tokens, by which their losses are multiplied.

    Args:
        trace: routing of every token; None: not recorded, which does for uniform weights only.
        spool: directory for arrays as long as the corpus, which the result refers to.
    """
    config, tokens, scope_LE = request.config, request.tokens, request.scope_LE
    u_T, weight_T = (new_array(spool / name, np.float64, (tokens.tokens,)) for name in ("log_weight.f64", "weight.f64"))
    raking, theta_LE, target_LE = None, np.zeros(scope_LE.shape), request.retain_LE.copy()
    if request.uniform:
        if request.source_log_weight_D is not None:
            sources = _SourceLogWeights(tokens, request.source_log_weight_D)
            for start, stop in tokens.spans():
                u_T[start:stop] = sources[start:stop]
    elif trace is None:
        raise ValueError(f"the rule {config.rule} needs the routing trace")
    elif config.rule in TOKEN_RULES:
        target_LE[scope_LE] = request.forget_LE[scope_LE]
        _write_scores(u_T, request, trace, TOKEN_RULES[config.rule](request, trace))
    else:
        raking, theta_LE = request.rake(Units(trace, scope_LE, tokens))
        target_LE[scope_LE] = raking.target_S
        packing = trace.packing(scope_LE.shape[1])
        tables_LV = packing.tables(theta_LE)
        _write_scores(u_T, request, trace, lambda columns_GT: packing.score(columns_GT, tables_LV))
    exponent = 1.0 if raking is not None else flattening(u_T, tokens, config.ess_floor)
    log_mean = exponentiate(u_T, weight_T, tokens, exponent)
    if config.rule == "permuted":
        theta_LE = np.zeros(scope_LE.shape)
        _shift_weights(weight_T, u_T, tokens, request.seed)
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
        *size_and_maximum(weight_T, tokens),
        raking,
    )


def literal_scores(request: WeightRequest, trace: Trace) -> Scorer:
    """Log of the mean clipped p^F/p^R over the detected experts that a token selects, 0 where it selects none."""
    clip, scope_LE, packing = request.config.clip, request.scope_LE, trace.packing(request.scope_LE.shape[1])
    ratio_LE = np.clip(request.forget_LE / np.maximum(request.retain_LE, 1e-300), 1.0 / clip, clip)
    sums, hits = packing.tables(np.where(scope_LE, ratio_LE, 0.0)), packing.tables(scope_LE.astype(np.float64))

    def log_mean(columns_GT: np.ndarray) -> np.ndarray:
        hits_T = packing.score(columns_GT, hits)
        return np.log(np.where(hits_T > 0, packing.score(columns_GT, sums), 1.0) / np.maximum(hits_T, 1.0))

    return log_mean


# Rules of tokens that are no raking: what prepares the log-weight of a token from the request and the trace.
TOKEN_RULES: dict[str, Callable[[WeightRequest, Trace], Scorer]] = {"literal": literal_scores}


@dataclass(frozen=True)
class _SourceLogWeights:
    """Log-weights of the tokens by their documents, as if they were an array; sliced, never made whole."""

    tokens: TokenMap
    log_weight_D: np.ndarray

    def __getitem__(self, span: slice) -> np.ndarray:
        return self.log_weight_D[np.asarray(self.tokens.document_ids_T[span])]


def _write_scores(u_T: np.ndarray, request: WeightRequest, trace: Trace, score: Scorer) -> None:
    """Write the log-weights of all counted tokens, 0 elsewhere."""
    tokens, packing = request.tokens, trace.packing(request.scope_LE.shape[1])

    def write(span: tuple[int, int]) -> None:
        piece_T, counted_T = np.zeros(span[1] - span[0]), tokens.counted(*span)
        piece_T[counted_T] = score(packing.columns(trace[slice(*span)][counted_T]))
        u_T[slice(*span)] = piece_T

    for _ in in_order(write, tokens.spans(), request.threads):
        pass


def _shift_weights(weight_T: np.ndarray, scratch_T: np.ndarray, tokens: TokenMap, seed: int) -> None:
    """Give each counted token the weight of the one a random distance along the corpus, round its end: the same
    weights, as alike among neighbours as before."""
    count = 0
    for start, stop in tokens.spans():
        kept_N = np.asarray(weight_T[start:stop])[tokens.counted(start, stop)]
        scratch_T[count : count + len(kept_N)] = kept_N
        count += len(kept_N)
    place = int(np.random.default_rng([seed, 2]).integers(count))
    for start, stop in tokens.spans():
        counted_T, piece_T = tokens.counted(start, stop), np.zeros(stop - start)
        size = int(counted_T.sum())
        until_end = min(size, count - place)
        piece_T[counted_T] = np.concatenate([scratch_T[place : place + until_end], scratch_T[: size - until_end]])
        weight_T[start:stop], place = piece_T, (place + size) % count
