"""Weight rules: from routing to one weight per retain token, with mean exactly 1 over the counted tokens.

Shape legend: T tokens (flat order), R rows, S constraints (layer, expert), L MoE layers, E experts.

Every rule gives a log-weight u_t per counted token; w_t = exp(c·u_t) / mean. ``c`` = 1 unless the effective sample size
(Σw)²/(nΣw²) would fall below the floor; then it is the largest exponent that keeps it (ESS falls with c because the
cumulant function of u is convex). Raking meets the floor by tempering its targets instead (λ), so c = 1 there.

=================  ==================================================================================================
``raking``         u = Σ θ a: least change of the weights that meets the (tempered) targets (raking.py)
``ratio_mean``     u = log of the mean p^F/p^R of the experts in scope that the token selects (0 if it selects none)
``ratio_max``      … of their maximum; ratios are clipped to [1/clip, clip] in both
``uniform``        u = 0: no trace needed. Control: the unweighted baseline
``permuted``       raking's weights on the wrong rows: row r gets those of row π(r). Control: same weights, no meaning
``random_experts`` raking on as many experts as were detected, drawn at random, with their true targets. Control
``inverse``        −u of raking: θ negated, which is the same as 1/w renormalised. Control: the opposite direction
=================  ==================================================================================================

All rules and controls are our decisions; none is taken from the paper.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from trace_ds.calibration.patterns import Encoding, PatternStore, build_store, score
from trace_ds.calibration.targets import Offer, offer
from trace_ds.calibration.tempering import temper
from trace_ds.calibration.tokens import TokenMap, Trace
from trace_ds.config.schema import CalibrationConfig

RAKING_RULES = ("raking", "permuted", "random_experts", "inverse")
RATIO_RULES = ("ratio_mean", "ratio_max")


@dataclass
class Calibrated:
    """The outcome of a rule. Per-token weights are in ``weight_T``, a float64 file in the spool directory.

    Attributes:
        weight_T: float64 [all tokens], 0 where uncounted, mean 1 (1e-12) over counted tokens.
        row_weight_R: float64, mean weight of the row's counted tokens, 0 for a row without any.
        theta_LE: float64, 0 where there is no constraint or the rule has no θ.
        scope_LE: bool, the experts whose frequencies the weights were asked to move.
        target_LE: float64, tempered target inside the scope, p^R elsewhere.
        strength: λ of raking; 1 for the other rules.
        exponent: c, see the module's docstring.
        ess: effective sample size of the final token weights, a fraction.
        max_weight: largest token weight.
        converged, iterations, solve_error: of the dual (True, 0, 0 for rules without one).
        moved: (layer, expert, offered target, reason) of the experts whose target had to move.
        notes: warnings for people.
    """

    weight_T: np.ndarray
    row_weight_R: np.ndarray
    theta_LE: np.ndarray
    scope_LE: np.ndarray
    target_LE: np.ndarray
    strength: float = 1.0
    exponent: float = 1.0
    ess: float = 1.0
    max_weight: float = 1.0
    converged: bool = True
    iterations: int = 0
    solve_error: float = 0.0
    moved: list[tuple[int, int, float, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def scope_of(config: CalibrationConfig, selected_LE: np.ndarray, eligible_LE: np.ndarray, seed: int) -> np.ndarray:
    """bool [L, E]: the experts whose frequencies the rule is asked to move."""
    if config.rule == "uniform":
        return np.zeros_like(selected_LE)
    if config.rule == "random_experts":
        candidates = np.flatnonzero(eligible_LE)
        drawn = np.random.default_rng([seed, 1]).permutation(candidates)[: int(selected_LE.sum())]
        scope_LE = np.zeros_like(selected_LE)
        scope_LE.flat[drawn] = True
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
) -> Calibrated:
    """Make the weights of ``config.rule`` (see the module's docstring); large arrays live in ``spool``.

    ``retain_LE`` must be the frequencies of the very tokens in ``trace``.

    Raises:
        ValueError: a rule other than ``uniform`` without a trace, or no counted token.
    """
    u_T = _spooled(spool / "log_weight.f64", tokens.tokens)
    result = Calibrated(
        _spooled(spool / "weight.f64", tokens.tokens),
        np.zeros(tokens.rows),
        np.zeros(forget_LE.shape),
        scope_LE,
        retain_LE.copy(),
    )
    if config.rule != "uniform" and scope_LE.any():
        if trace is None:
            raise ValueError(f"the rule {config.rule} needs the routing trace")
        every, solving = build_store(trace, tokens, scope_LE, spool)
        forget_S, retain_S = forget_LE[scope_LE], retain_LE[scope_LE]
        if config.rule in RATIO_RULES:
            result.target_LE[scope_LE] = forget_S
            ratio_S = np.clip(forget_S / np.maximum(retain_S, 1e-300), 1.0 / config.clip, config.clip)
            ratio_S[(forget_S == 0) & (retain_S == 0)] = 1.0
            _write_scores(u_T, tokens, every, ratio_S, config.rule)
        else:
            theta_S = _rake(config, solving, forget_S, retain_S, result)
            if config.rule == "inverse":
                theta_S = -theta_S
            result.theta_LE[scope_LE] = theta_S
            _write_scores(u_T, tokens, every, theta_S, "sum")
    floor_applies = config.rule in RATIO_RULES or config.rule == "inverse"
    result.exponent = _largest_exponent(u_T, tokens, config.ess_floor) if floor_applies else 1.0
    result.theta_LE *= result.exponent
    _exponentiate(u_T, result.weight_T, tokens, result.exponent)
    result.row_weight_R = _row_means(result.weight_T, tokens)
    if config.level == "sequence":
        _spread_rows(result, tokens)
    if config.rule == "permuted":
        _permute_rows(result, tokens, seed, scratch_T=u_T)
    result.ess, result.max_weight = _size_and_maximum(result.weight_T, tokens)
    return result


def _rake(
    config: CalibrationConfig,
    store: PatternStore,
    forget_S: np.ndarray,
    retain_S: np.ndarray,
    result: Calibrated,
) -> np.ndarray:
    """Solve for θ; fills in what ``result`` says about targets, λ and convergence."""
    wanted: Offer = offer(store, retain_S, forget_S, config.clip)
    tempered = temper(store, retain_S, wanted.target_S, config.ess_floor)
    solution = tempered.solution
    theta_S = _fix_gauge(store.encoding, solution.point.theta_S, retain_S)
    result.target_LE[result.scope_LE] = solution.target_S
    result.strength, result.iterations = tempered.strength, tempered.iterations
    result.converged, result.solve_error = solution.converged, solution.error
    encoding = store.encoding
    result.moved = [
        (int(encoding.layer_S[s]), int(encoding.expert_S[s]), float(wanted.target_S[s]), reason)
        for s, reason in enumerate(wanted.reason_S)
        if reason
    ]
    if tempered.strength < 1e-3 and np.abs(forget_S - retain_S).max(initial=0.0) > 1e-9:
        result.notes.append(
            "the weights could hardly move at all (lambda below 0.001): the targets cannot be met together on this "
            "retain data; use fewer experts (calibration.experts: selected) or other retain text"
        )
    return theta_S


def _fix_gauge(encoding: Encoding, theta_S: np.ndarray, retain_S: np.ndarray) -> np.ndarray:
    """θ of a fully constrained layer is defined up to a constant (its activations sum to K): make Σ p^R θ = 0."""
    theta_S = theta_S.copy()
    for layer in np.unique(encoding.layer_S):
        members = np.nonzero(encoding.layer_S == layer)[0]
        total = float(retain_S[members].sum())
        if len(members) == encoding.experts and total > 0:
            used = members[retain_S[members] > 0]
            theta_S[used] -= float((retain_S[used] * theta_S[used]).sum()) / total
    return theta_S


def _write_scores(u_T: np.ndarray, tokens: TokenMap, store: PatternStore, value_S: np.ndarray, how: str) -> None:
    """Log-weights of all counted tokens: ``sum`` of values, or log of the mean/max ratio of the selected experts."""
    encoding = store.encoding
    sums_GV, hits_GV = encoding.tables(value_S), encoding.tables(np.ones_like(value_S))
    largest_GV = encoding.largest(value_S)
    for (start, stop), (columns_GT, _) in zip(tokens.spans(), store.blocks(), strict=True):
        if how == "sum":
            u = score(columns_GT, sums_GV)
        elif how == "ratio_mean":
            hits_T = score(columns_GT, hits_GV)
            u = np.log(np.where(hits_T > 0, score(columns_GT, sums_GV), 1.0) / np.maximum(hits_T, 1.0))
        else:
            best_T = np.full(columns_GT.shape[1], -np.inf)
            for column_T, table_V in zip(columns_GT, largest_GV, strict=True):
                np.maximum(best_T, table_V.take(column_T), out=best_T)
            u = np.log(np.where(np.isfinite(best_T), best_T, 1.0))
        piece_T = np.zeros(stop - start)
        piece_T[tokens.counted(start, stop)] = u
        u_T[start:stop] = piece_T


def _moments(u_T: np.ndarray, tokens: TokenMap, exponent: float, top: float) -> tuple[float, float, int]:
    """Σ w, Σ w² and n of w = exp(c (u − top)) over counted tokens."""
    total, square, count = 0.0, 0.0, 0
    for start, stop in tokens.spans():
        w = np.exp(exponent * (np.asarray(u_T[start:stop])[tokens.counted(start, stop)] - top))
        total, square, count = total + float(w.sum()), square + float((w * w).sum()), count + len(w)
    if not count:
        raise ValueError("there are no counted tokens to weight")
    return total, square, count


def _top(u_T: np.ndarray, tokens: TokenMap) -> float:
    tops = [
        float(np.asarray(u_T[start:stop])[tokens.counted(start, stop)].max(initial=-np.inf))
        for start, stop in tokens.spans()
    ]
    return max(tops, default=0.0)


def _largest_exponent(u_T: np.ndarray, tokens: TokenMap, ess_floor: float) -> float:
    """The largest c in [0, 1] with an effective sample size of at least the floor (bisection to 1e-4)."""
    top = _top(u_T, tokens)

    def ess(exponent: float) -> float:
        total, square, count = _moments(u_T, tokens, exponent, top)
        return total * total / (count * square)

    if ess(1.0) >= ess_floor:
        return 1.0
    low, high = 0.0, 1.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (middle, high) if ess(middle) >= ess_floor else (low, middle)
    return low


def _exponentiate(u_T: np.ndarray, weight_T: np.ndarray, tokens: TokenMap, exponent: float) -> None:
    top = _top(u_T, tokens)
    total, _, count = _moments(u_T, tokens, exponent, top)
    for start, stop in tokens.spans():
        w = np.exp(exponent * (np.asarray(u_T[start:stop]) - top)) * (count / total)
        weight_T[start:stop] = np.where(tokens.counted(start, stop), w, 0.0)


def _row_sums(weight_T: np.ndarray, tokens: TokenMap) -> tuple[np.ndarray, np.ndarray]:
    """Σ of the weights and number of counted tokens of every row, float64 and int64 [R]."""
    sums_R, counts_R = np.zeros(tokens.rows), np.zeros(tokens.rows, np.int64)
    for start, stop in tokens.spans():
        row = tokens.row_of(start, stop)
        first, size = int(row[0]), int(row[-1] - row[0]) + 1
        sums_R[first : first + size] += np.bincount(row - first, np.asarray(weight_T[start:stop]), size)
        counted = tokens.counted(start, stop)
        counts_R[first : first + size] += np.bincount(row[counted] - first, minlength=size)
    return sums_R, counts_R


def _row_means(weight_T: np.ndarray, tokens: TokenMap) -> np.ndarray:
    sums_R, counts_R = _row_sums(weight_T, tokens)
    return np.where(counts_R > 0, sums_R / np.maximum(counts_R, 1), 0.0)


def _spread_rows(result: Calibrated, tokens: TokenMap) -> None:
    """Level ``sequence``: every counted token takes its row's mean weight (the corpus mean stays 1)."""
    for start, stop in tokens.spans():
        spread = result.row_weight_R[tokens.row_of(start, stop)]
        result.weight_T[start:stop] = np.where(tokens.counted(start, stop), spread, 0.0)


def _permute_rows(result: Calibrated, tokens: TokenMap, seed: int, scratch_T: np.ndarray) -> None:
    """Give row r the weights of row π(r), repeated or cut to its length with their mean kept; then mean 1 again.

    Whole rows move, so that the control holds for row sampling as for token weighting: shuffling single tokens would
    leave all row means near 1. Rows of equal length keep both multisets (tokens and rows) exactly.
    """
    source = scratch_T
    for start, stop in tokens.spans():
        source[start:stop] = result.weight_T[start:stop]
    _, counts_R = _row_sums(source, tokens)
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
    sums_R, _ = _row_sums(result.weight_T, tokens)
    scale = float(counts_R.sum()) / float(sums_R.sum())
    for start, stop in tokens.spans():
        result.weight_T[start:stop] *= scale
    result.row_weight_R = _row_means(result.weight_T, tokens)
    result.theta_LE[:] = 0.0


def _size_and_maximum(weight_T: np.ndarray, tokens: TokenMap) -> tuple[float, float]:
    total = square = largest = 0.0
    count = 0
    for start, stop in tokens.spans():
        w = np.asarray(weight_T[start:stop])[tokens.counted(start, stop)]
        total, square, count = total + float(w.sum()), square + float((w * w).sum()), count + len(w)
        largest = max(largest, float(w.max(initial=0.0)))
    return total * total / (count * square), largest


def _spooled(path: Path, size: int) -> np.ndarray:
    """A zeroed float64 array [size] backed by a file (the page cache decides what stays in memory)."""
    return np.memmap(path, np.float64, "w+", shape=(max(size, 1),))[:size]
