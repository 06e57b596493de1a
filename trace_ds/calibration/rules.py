"""Weight rules: from routing to one weight per retain token, with mean exactly 1 over the counted tokens.

Shape legend: T tokens (flat order), R rows, S constraints (layer, expert), L MoE layers, E experts.

Every rule gives a log-weight u_t per counted token; w_t = exp(c·u_t) / mean. ``c`` = 1 unless the effective sample size
(Σw)²/(nΣw²) would fall below the floor; then it is the largest exponent that keeps it (ESS falls with c because the
cumulant function of u is convex). Raking meets the floor by tempering its targets instead (λ), so c = 1 there.

Level ``row``: what drawing rows needs. Raking is solved on a sample of the tokens; a row's log-weight is τ times the
mean of Σ θ a over its counted tokens, which follows from its selections alone, so no trace is needed; τ is the largest
that keeps the effective sample size of the *rows* at the floor.

=================  ==================================================================================================
``raking``         u = Σ θ a: least change of the weights that meets the (tempered) targets (raking.py)
``ratio_mean``     u = log of the mean p^F/p^R of the experts in scope that the token selects (0 if it selects none)
``ratio_max``      … of their maximum; ratios are clipped to [1/clip, clip] in both. A token's experts are tied to one
                   another, so the plain ratios can move an expert the wrong way: the ratio of a selected expert that
                   ended no closer to p^F is multiplied by p^F/q, and all is done again, until none is left
``uniform``        u = 0: no trace needed. Control: the unweighted baseline
``permuted``       raking's weights on the wrong rows: row r gets those of row π(r). Control: same weights, no meaning
``random_experts`` raking on as many experts as were detected, drawn at random, with their true targets. Control
``lowest_experts`` the same on as many of the lowest p^F/p^R, those that forget text uses least. Control
``inverse``        −u of raking: θ negated, which is the same as 1/w renormalised. Control: the opposite direction
``sources``        u = log of the weight the configuration gives to the source of the token's document; no routing.
                   Control: what somebody who knows which text is near would do (the oracle of docs/studies.md)
=================  ==================================================================================================

All rules and controls are our decisions; none is taken from the paper.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from trace_ds.calibration.raking import Context, RakeArguments, Raked, rake, rake_sample
from trace_ds.calibration.rows import RowSelections
from trace_ds.calibration.tokens import Packing, RowSpread, TokenMap, Trace, count_selections, in_order
from trace_ds.calibration.units import Units
from trace_ds.calibration.weights import (
    exponentiate,
    flattening,
    row_means,
    row_sums,
    size_and_maximum,
    spooled,
)
from trace_ds.config.sections.calibration import WITHOUT_TRACE, CalibrationConfig

MAX_CORRECTIONS = 30
LIMITS = {
    "": "the targets are the forget frequencies themselves, or the closest feasible ones",
    "floor": "more would take the effective sample size below the floor",
    "passes": "the solver ended before it got farther",
}


@dataclass
class Calibrated:
    """The outcome of a rule. Per-token weights are in ``weight_T``, a float64 file in the spool directory.

    Attributes:
        weight_T: float64 [all tokens], 0 where uncounted, mean 1 (1e-12) over counted tokens.
        row_weight_R: float64, mean weight of the row's counted tokens, 0 for a row without any.
        theta_LE: float64, 0 where there is no constraint or the rule has no θ.
        log_mean: of exp(Σ θ a) over the counted tokens: w_t = exp(Σ θ a(t) − log_mean).
        scope_LE: bool, the experts whose frequencies the weights were asked to move.
        target_LE: float64, tempered target inside the scope, p^R elsewhere.
        strength: λ of raking; 1 for the other rules. limit: what set it, a key of LIMITS.
        exponent: c, see the module's docstring.
        ess: effective sample size of the final token weights, a fraction.
        max_weight: largest token weight.
        converged, iterations, solve_error: of the dual (True, 0, 0 for rules without one): see raking.py; passes over
            all units; max |q − target|.
        moved: (layer, expert, offered target, reason) of the experts whose target had to move.
        notes: warnings for people.
    """

    weight_T: np.ndarray
    row_weight_R: np.ndarray
    theta_LE: np.ndarray
    scope_LE: np.ndarray
    target_LE: np.ndarray
    log_mean: float = 0.0
    strength: float = 1.0
    limit: str = ""
    exponent: float = 1.0
    ess: float = 1.0
    max_weight: float = 1.0
    converged: bool = True
    iterations: int = 0
    solve_error: float = 0.0
    moved: list[tuple[int, int, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scope_of(
    config: CalibrationConfig,
    selected_LE: np.ndarray,
    eligible_LE: np.ndarray,
    seed: int,
    log_ratio_LE: np.ndarray | None = None,
) -> np.ndarray:
    """bool [L, E]: the experts whose frequencies the rule is asked to move; ``lowest_experts`` needs their ratios."""
    if config.rule in WITHOUT_TRACE or (config.if_none_found == "uniform" and not selected_LE.any()):
        return np.zeros_like(selected_LE)
    if config.rule in ("random_experts", "lowest_experts"):
        candidates = np.flatnonzero(eligible_LE)
        if config.rule == "random_experts":
            order = np.random.default_rng([seed, 1, config.draw]).permutation(candidates)
        else:
            assert log_ratio_LE is not None
            order = candidates[np.argsort(log_ratio_LE.flat[candidates], kind="stable")]
        scope_LE = np.zeros_like(selected_LE)
        scope_LE.flat[order[: int(selected_LE.sum())]] = True
        return scope_LE
    return eligible_LE.copy() if config.experts == "all" else selected_LE.copy()


def apply_rule(
    config: CalibrationConfig,
    tokens: TokenMap,
    trace: Trace | None,
    scope_LE: np.ndarray,
    forget_LE: np.ndarray,
    retain_LE: np.ndarray,
    seed: int,
    spool: Path,
    selected_LE: np.ndarray | None = None,
    log_weight_D: np.ndarray | None = None,
    error_LE: np.ndarray | None = None,
    context: Context | None = None,
    selections: RowSelections | None = None,
) -> Calibrated:
    """Make the weights of ``config.rule`` (see the module's docstring); large arrays live in ``spool``.

    ``retain_LE`` must be the frequencies of the very tokens that ``tokens`` counts. ``selected_LE``: the experts that
    the ratio rules must bring closer to their forget frequency (default: the whole scope). ``log_weight_D``: of the
    documents, what the rule ``sources`` needs (:func:`source_log_weights`). ``error_LE``: standard errors of the retain
    frequencies, clustered by document (None: 0). ``selections``: what level ``row`` needs in place of a trace. The
    ranks of the ``context`` share the passes of the dual over the tokens, nothing else.

    Raises:
        ValueError: a rule that needs the trace or the documents' weights without them, or no counted token.
    """
    context = context or Context()
    result = Calibrated(
        spooled(spool / "weight.f64", tokens.tokens),
        np.zeros(tokens.rows),
        np.zeros(forget_LE.shape),
        scope_LE,
        retain_LE.copy(),
    )
    by_row = config.level == "row" and config.rule not in WITHOUT_TRACE and bool(scope_LE.any())
    # log-weights of the tokens, or (permuted) a copy of their weights: level row has those of rows
    u_T = spooled(spool / "log_weight.f64", 0 if by_row and config.rule != "permuted" else tokens.tokens)
    error_S = None if error_LE is None else error_LE[scope_LE]
    asked: RakeArguments = (forget_LE[scope_LE], retain_LE[scope_LE], config.clip, config.ess_floor, error_S)
    if config.rule == "sources":
        if log_weight_D is None:
            raise ValueError("the rule sources needs the weights of the documents")
        for start, stop in tokens.spans():
            of_document_T = log_weight_D[np.asarray(tokens.document_ids_T[start:stop])]
            u_T[start:stop] = np.where(tokens.counted(start, stop), of_document_T, 0.0)
        _finish(config, tokens, u_T, result)
    elif config.rule == "uniform" or not scope_LE.any():
        _finish(config, tokens, u_T, result)
    elif by_row:
        if selections is None:
            raise ValueError("level row needs the selections of each row")
        _apply_rows(config, tokens, selections, asked, retain_LE, context, result)
    elif trace is None:
        raise ValueError(f"the rule {config.rule} needs the routing trace")
    elif config.rule in RATIOS:
        wanted_LE = scope_LE if selected_LE is None else scope_LE & selected_LE
        _apply_ratios(config, tokens, trace, wanted_LE, forget_LE, retain_LE, u_T, result)
    else:
        context.begin(scope_LE, asked)
        _take_in(config, rake(Units(trace, scope_LE, tokens), *asked, context), retain_LE, result)
        experts, theta_LE = scope_LE.shape[1], result.theta_LE
        _write_scores(u_T, tokens, trace, experts, lambda packing: _sum_of(packing, theta_LE), context.threads)
        _finish(config, tokens, u_T, result)
    if config.rule == "permuted":
        permute_rows(result, tokens, seed, scratch_T=u_T)
    result.ess, result.max_weight = size_and_maximum(result.weight_T, tokens)
    return result


def source_log_weights(weights: Mapping[str, float], names: Sequence[str], source_D: np.ndarray) -> np.ndarray:
    """float64 [D]: log of the product of the weights whose pattern matches the source of each document.

    Raises:
        ValueError: a pattern that matches no source.
    """
    log_S = np.zeros(len(names))
    for pattern, weight in sorted(weights.items()):
        matches_S = np.array([fnmatch.fnmatchcase(name, pattern) for name in names], dtype=bool)
        if not matches_S.any():
            shown = ", ".join(sorted(names)[:8])
            raise ValueError(f"no retain document has a source like {pattern!r}; there are {len(names)}: {shown}")
        log_S[matches_S] += np.log(weight)
    return log_S[source_D]


def row_exponent(u_R: np.ndarray, floor: float) -> float:
    """The largest τ (to 1e-6 of it, at most 1,024) at which weights exp(τ u) keep the effective sample size of rows."""

    def ess(exponent: float) -> float:
        w = np.exp(exponent * (u_R - u_R.max()))
        return float(w.sum() ** 2 / (len(w) * (w * w).sum()))

    high = 1.0
    while ess(high) >= floor:
        if high >= 1024.0:
            return high
        high *= 2.0
    low = 0.0
    while high - low > 1e-6 * high:
        middle = (low + high) / 2.0
        low, high = (middle, high) if ess(middle) >= floor else (low, middle)
    return low


def _apply_rows(
    config: CalibrationConfig,
    tokens: TokenMap,
    selections: RowSelections,
    asked: RakeArguments,
    retain_LE: np.ndarray,
    context: Context,
    result: Calibrated,
) -> None:
    """Level ``row`` (see the module's docstring)."""
    raked = rake_sample(Units.of(selections.selected_NLK, result.scope_LE), *asked, replace(context, world=None))
    _take_in(config, raked, retain_LE, result)
    sizes_R = tokens.counted_per_row()
    filled_R = sizes_R > 0
    u_R = selections.scores(result.theta_LE)
    result.exponent = row_exponent(u_R[filled_R], config.ess_floor)
    result.theta_LE *= result.exponent
    result.log_mean = exponentiate(RowSpread(tokens, u_R), result.weight_T, tokens, result.exponent)
    result.row_weight_R = np.where(filled_R, np.exp(result.exponent * u_R - result.log_mean), 0.0)
    result.target_LE[:] = selections.sums(result.row_weight_R) / max(int(sizes_R.sum()), 1)


def _finish(config: CalibrationConfig, tokens: TokenMap, u_T: np.ndarray, result: Calibrated) -> None:
    """From log-weights to weights: flattened where the floor asks for it, mean 1, row means."""
    result.exponent = flattening(u_T, tokens, config.ess_floor)
    result.theta_LE *= result.exponent
    result.log_mean = exponentiate(u_T, result.weight_T, tokens, result.exponent)
    result.row_weight_R = row_means(result.weight_T, tokens)


def _apply_ratios(
    config: CalibrationConfig,
    tokens: TokenMap,
    trace: Trace,
    wanted_LE: np.ndarray,
    forget_LE: np.ndarray,
    retain_LE: np.ndarray,
    u_T: np.ndarray,
    result: Calibrated,
) -> None:
    """The ratio rules, with the ratios of experts that ended no closer corrected (see the module's docstring)."""
    scope_LE = result.scope_LE
    forget_S, retain_S = forget_LE[scope_LE], retain_LE[scope_LE]
    wanted_S = wanted_LE[scope_LE] & (retain_S > 0) & (retain_S < 1) & (retain_S != forget_S)  # those that can move
    result.target_LE[scope_LE] = forget_S
    ratio_S = np.clip(forget_S / np.maximum(retain_S, 1e-300), 1.0 / config.clip, config.clip)
    ratio_S[(forget_S == 0) & (retain_S == 0)] = 1.0
    corrected_S = np.zeros(len(ratio_S), dtype=bool)
    for result.iterations in range(MAX_CORRECTIONS + 1):
        ratio_LE = np.zeros(scope_LE.shape)
        ratio_LE[scope_LE] = ratio_S
        scoring = functools.partial(RATIOS[config.rule], ratio_LE=ratio_LE, scope_LE=scope_LE)
        _write_scores(u_T, tokens, trace, scope_LE.shape[1], scoring)
        _finish(config, tokens, u_T, result)
        weighted_LE = count_selections(trace, tokens, scope_LE.shape[1], result.weight_T)
        reached_S = weighted_LE[scope_LE] / (weighted_LE[0].sum() / trace.top_k)
        away_S = wanted_S & (np.abs(reached_S - forget_S) >= np.abs(retain_S - forget_S))
        step_S = np.where(away_S, forget_S / np.maximum(reached_S, 1e-300), 1.0)
        changed_S = np.clip(ratio_S * step_S, 1.0 / config.clip, config.clip)
        if np.array_equal(changed_S, ratio_S) or result.iterations == MAX_CORRECTIONS:
            break
        corrected_S |= away_S
        ratio_S = changed_S
    if corrected_S.any():
        result.notes.append(
            f"the plain ratios moved {int(corrected_S.sum())} selected expert(s) away from their forget frequency; "
            f"their ratios were corrected in {result.iterations} round(s)"
        )


def _take_in(config: CalibrationConfig, raked: Raked, retain_LE: np.ndarray, result: Calibrated) -> None:
    """Into ``result``: θ, and what the solver says about it."""
    scope_LE = result.scope_LE
    result.target_LE[scope_LE] = raked.target_S
    result.strength, result.limit, result.iterations = raked.strength, raked.limit, raked.passes
    result.converged, result.solve_error = raked.converged, raked.error
    result.moved = [
        (int(layer), int(expert), float(offered), reason)
        for layer, expert, offered, reason in zip(*np.nonzero(scope_LE), raked.offered_S, raked.reason_S, strict=True)
        if reason
    ]
    theta_S = _fix_gauge(scope_LE, raked.theta_S, retain_LE[scope_LE])
    result.theta_LE[scope_LE] = theta_S * (-1.0 if config.rule == "inverse" else 1.0)


def permute_rows(result: Calibrated, tokens: TokenMap, seed: int, scratch_T: np.ndarray) -> None:
    """Give row r the weights of row π(r), repeated or cut to its length with their mean kept; then mean 1 again.

    Whole rows move, so that the control holds for row sampling as for token weighting: shuffling single tokens would
    leave all row means near 1. Rows of equal length keep both multisets (tokens and rows) exactly, and with them the
    effective sample size; others only nearly, so it can end a little below the floor.
    """
    source = scratch_T
    for start, stop in tokens.spans():
        source[start:stop] = result.weight_T[start:stop]
    _, counts_R = row_sums(source, tokens)
    filled = np.flatnonzero(counts_R > 0)
    permuted = np.random.default_rng([seed, 2]).permutation(filled)
    for row, other in zip(filled, permuted, strict=True):
        start, stop = (int(x) for x in tokens.row_starts_R1[row : row + 2])
        low, high = (int(x) for x in tokens.row_starts_R1[other : other + 2])
        block = np.resize(source[low:high][tokens.counted(low, high)], int(counts_R[row]))
        if counts_R[row] != counts_R[other] and block.sum() > 0:
            block = block * (result.row_weight_R[other] / block.mean())
        piece = np.zeros(stop - start)
        piece[tokens.counted(start, stop)] = block
        result.weight_T[start:stop] = piece
    sums_R, _ = row_sums(result.weight_T, tokens)
    scale = float(counts_R.sum()) / float(sums_R.sum())
    for start, stop in tokens.spans():
        result.weight_T[start:stop] *= scale
    result.row_weight_R = row_means(result.weight_T, tokens)
    result.theta_LE[:] = 0.0


def _fix_gauge(scope_LE: np.ndarray, theta_S: np.ndarray, retain_S: np.ndarray) -> np.ndarray:
    """θ of a fully constrained layer is defined up to a constant (its activations sum to K): make Σ p^R θ = 0."""
    theta_S, layer_S = theta_S.copy(), np.nonzero(scope_LE)[0]
    for layer in np.flatnonzero(scope_LE.all(axis=1)):
        used = np.flatnonzero((layer_S == layer) & (retain_S > 0))
        theta_S[used] -= float((retain_S[used] * theta_S[used]).sum()) / float(retain_S[used].sum())
    return theta_S


Scoring = Callable[[np.ndarray], np.ndarray]  # columns [G, T] of a chunk -> log-weights float64 [T]


def _sum_of(packing: Packing, value_LE: np.ndarray) -> Scoring:
    tables_LV = packing.tables(value_LE)
    return lambda columns_GT: packing.score(columns_GT, tables_LV)


def _mean_of(packing: Packing, ratio_LE: np.ndarray, scope_LE: np.ndarray) -> Scoring:
    sums, hits = packing.tables(ratio_LE), packing.tables(scope_LE.astype(np.float64))

    def log_mean(columns_GT: np.ndarray) -> np.ndarray:
        hits_T = packing.score(columns_GT, hits)
        return np.log(np.where(hits_T > 0, packing.score(columns_GT, sums), 1.0) / np.maximum(hits_T, 1.0))

    return log_mean


def _largest_of(packing: Packing, ratio_LE: np.ndarray, scope_LE: np.ndarray) -> Scoring:
    tables_LV = packing.tables(np.where(scope_LE, ratio_LE, -np.inf), np.maximum)

    def log_largest(columns_GT: np.ndarray) -> np.ndarray:
        best_T = packing.score(columns_GT, tables_LV, np.maximum, -np.inf)
        return np.log(np.where(np.isfinite(best_T), best_T, 1.0))

    return log_largest


RATIOS = {"ratio_mean": _mean_of, "ratio_max": _largest_of}


def _write_scores(
    u_T: np.ndarray,
    tokens: TokenMap,
    trace: Trace,
    experts: int,
    scoring: Callable[[Packing], Scoring],
    threads: int = 1,
) -> None:
    """Log-weights of all counted tokens, 0 elsewhere."""
    packing = trace.packing(experts)
    score = scoring(packing)

    def write(span: tuple[int, int]) -> None:
        piece_T, counted_T = np.zeros(span[1] - span[0]), tokens.counted(*span)
        piece_T[counted_T] = score(packing.columns(trace.read(*span)[counted_T]))
        u_T[slice(*span)] = piece_T

    for _ in in_order(write, tokens.spans(), threads):
        pass
