"""``diagnosis.json``: which experts and weights a calibration chose, and warnings where they look wrong.

Shape legend: T tokens, R rows, D documents, L MoE layers, E experts, K = top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.calibration.detect import Detection
from trace_ds.calibration.raking import REASONS
from trace_ds.calibration.rules import RuleResult
from trace_ds.calibration.weights import TokenValues
from trace_ds.config.sections.calibration import CONTROL_RULES, CalibrationConfig
from trace_ds.corpora.dataset import TokenMap

TOP_DOCUMENTS = 20
LEAST_DOCUMENT_TOKENS = 8
LEAST_STRENGTH, LEAST_CLOSED, MOST_ROW_ESS = 0.25, 0.05, 0.99


@dataclass(frozen=True)
class DocumentSources:
    """Source and beginning of every retain document, as `prepare` stored them.

    Attributes:
        names: the distinct sources.
        source_D: int64, the source of each document, an index into ``names``.
        text_start: first characters of each document (strings, or an Arrow column: it stays on disk).
    """

    names: Sequence[str]
    source_D: np.ndarray
    text_start: Sequence[Any]


@dataclass(frozen=True)
class DocumentSums:
    """Per-document sums over counted tokens, each float64 [D]: their number and Σ w."""

    tokens_D: np.ndarray
    weight_D: np.ndarray


def finite_or_none(x: float) -> float | None:
    """``x``, or None where JSON has no number for it."""
    return float(x) if np.isfinite(x) else None


def document_sums(tokens: TokenMap, weight_T: TokenValues) -> DocumentSums:
    """One pass: the sums per document."""
    sums = np.zeros((2, tokens.documents))
    for start, stop in tokens.spans():
        counted_T = tokens.counted(start, stop)
        if not counted_T.any():
            continue
        document = np.asarray(tokens.document_ids_T[start:stop])[counted_T]
        w = np.asarray(weight_T[start:stop])[counted_T]
        first, size = int(document[0]), int(document[-1] - document[0]) + 1
        for row, values in zip(sums, (None, w), strict=True):
            row[first : first + size] += np.bincount(document - first, values, size)
    return DocumentSums(*sums)


def source_shares(sums: DocumentSums, documents: DocumentSources) -> list[dict[str, Any]]:
    """Share of tokens and of weight by source, most up-weighted first."""
    names, of_D = documents.names, documents.source_D
    tokens = np.bincount(of_D, sums.tokens_D, len(names)) / max(float(sums.tokens_D.sum()), 1.0)
    weight = np.bincount(of_D, sums.weight_D, len(names)) / max(float(sums.weight_D.sum()), 1e-300)
    rows = [
        {"source": name, "token_share": float(tokens[i]), "weight_share": float(weight[i])}
        for i, name in enumerate(names)
    ]
    return sorted(rows, key=lambda r: (-r["weight_share"] / max(r["token_share"], 1e-300), r["source"]))


def top_documents(sums: DocumentSums, documents: DocumentSources) -> list[dict[str, Any]]:
    """The documents with the highest mean weight (of those with enough counted tokens for a mean to say something)."""
    enough = sums.tokens_D >= LEAST_DOCUMENT_TOKENS
    if int(enough.sum()) < TOP_DOCUMENTS:
        enough = sums.tokens_D > 0
    mean_D = np.where(enough, sums.weight_D / np.maximum(sums.tokens_D, 1), -np.inf)
    order = np.argsort(-mean_D, kind="stable")[: min(TOP_DOCUMENTS, int(enough.sum()))]
    return [
        {
            "document": int(d),
            "source": documents.names[documents.source_D[d]],
            "text_start": str(documents.text_start[int(d)]),
            "weight": float(mean_D[d]),
            "tokens": int(sums.tokens_D[d]),
        }
        for d in order
    ]


def expert_rows(mask_LE: np.ndarray, detection: Detection, result: RuleResult) -> list[dict[str, Any]]:
    """One row per expert of ``mask_LE``; None is an unbounded end of an interval or an unknown frequency."""
    return [
        {
            "layer": int(layer),
            "expert": int(expert),
            "forget": float(detection.forget_LE[layer, expert]),
            "retain": float(detection.retain_LE[layer, expert]),
            "ratio": finite_or_none(np.exp(detection.log_ratio_LE[layer, expert])),
            "ratio_low": finite_or_none(detection.low_LE[layer, expert]),
            "ratio_high": finite_or_none(detection.high_LE[layer, expert]),
            "p_value": float(detection.p_value_LE[layer, expert]),
            "target": finite_or_none(result.target_LE[layer, expert]),
            "achieved": finite_or_none(result.achieved_LE[layer, expert]),
            "in_scope": bool(result.scope_LE[layer, expert]),
        }
        for layer, expert in zip(*np.nonzero(mask_LE), strict=True)
    ]


def gap_closed(detection: Detection, result: RuleResult) -> float:
    """Share of Σ |p^F − p^R| over the experts in scope that is gone under the weights; 0 without a scope."""
    before_LE, after_LE = (np.abs(detection.forget_LE - q_LE) for q_LE in (detection.retain_LE, result.achieved_LE))
    gap, left = float(before_LE[result.scope_LE].sum()), float(after_LE[result.scope_LE].sum())
    return 1.0 - left / gap if gap > 0 else 0.0


def row_ess(result: RuleResult) -> float:
    """Effective sample size of the rows' mean weights, a fraction of the rows that have any."""
    row = result.row_weight_R[result.row_weight_R > 0]
    return float(row.sum() ** 2 / (len(row) * (row**2).sum())) if len(row) else 1.0


def fewer_experts(config: CalibrationConfig) -> str:
    """The advice to match fewer experts, where it would change anything."""
    return "use fewer experts (calibration.experts: selected), " if config.experts == "all" else ""


def find_warnings(config: CalibrationConfig, detection: Detection, result: RuleResult, by_rows: bool) -> list[str]:
    """Plain sentences about everything that did not work out, most important first.

    ``by_rows``: whether the weights are those of rows.
    """
    lines: list[str] = list(detection.warnings)
    control = config.rule in CONTROL_RULES
    if not detection.selected_LE.any():
        then = "are calibrated on all experts that take part" if result.scope_LE.any() else "are uniform"
        then = "go by the sources of the documents" if config.source_weights else then
        lines.append(
            "no forget-critical expert was found: forget text is not routed differently enough from retain text; the "
            f"weights {then}"
        )
    by_reason: dict[str, list[str]] = {}
    for layer, expert, target, reason in result.replaced_targets:
        by_reason.setdefault(reason, []).append(f"{layer}/{expert} -> {target:.3g}")
    for reason, cases in sorted(by_reason.items()):
        more = f" and {len(cases) - 8} more" if len(cases) > 8 else ""
        lines.append(
            f"{len(cases)} expert(s) cannot be matched because {REASONS[reason]}; the closest feasible "
            f"frequency was taken (layer/expert -> frequency): {', '.join(cases[:8])}{more}"
        )
    if not control and result.scope_LE.any():
        if result.lambda_ < LEAST_STRENGTH and not by_rows:  # rows have a floor of their own
            lines.append(
                f"the weights go only {result.lambda_:.0%} of the way to the forget frequencies (lambda): more would "
                f"leave too few effective tokens; lower calibration.ess_floor, {fewer_experts(config)}or add retain "
                "text close to the forget domain"
            )
        closed = gap_closed(detection, result)
        if closed < 0:
            lines.append(
                f"the weights widen the frequency gap by {-closed:.0%}: the same retain text selects "
                "the experts it should raise and lower; set calibration.rule: uniform, or add retain text close "
                "to the forget domain"
            )
        elif closed < LEAST_CLOSED:
            lines.append(f"the weights close {closed:.1%} of the frequency gap: they will do next to nothing")
        if by_rows and row_ess(result) > MOST_ROW_ESS:
            lines.append(
                f"the rows' weights are nearly equal (effective sample size {row_ess(result):.1%} of the rows): "
                "sampling by them will hardly differ from uniform sampling"
            )
    if result.exponent < 1.0 and not control and not by_rows:
        lines.append(f"the weights were raised to the power {result.exponent:.3f} to keep the effective sample size")
    return lines


def diagnose(
    config: CalibrationConfig,
    detection: Detection,
    result: RuleResult,
    tokens: TokenMap,
    documents: DocumentSources,
    by_rows: bool,
) -> dict[str, Any]:
    """The content of ``diagnosis.json`` (JSON types only); ``by_rows``: whether the weights are those of rows."""
    sums = document_sums(tokens, result.weight_T)
    raking = result.raking
    return {
        "rule": config.rule,
        "experts": config.experts,
        "weights_of": "rows" if by_rows else "tokens",
        "lambda": result.lambda_,
        "exponent": result.exponent,
        "ess_fraction": result.ess,
        "row_ess_fraction": row_ess(result),
        "ess_floor": config.ess_floor,
        "max_weight": result.max_weight,
        "iterations": 0 if raking is None else raking.passes,
        "solve_error": 0.0 if raking is None else raking.residual,
        "gap_closed": gap_closed(detection, result),
        "none_found": not bool(detection.selected_LE.any()),
        "constraints": int(result.scope_LE.sum()),
        "selected": expert_rows(detection.selected_LE, detection, result),
        "moved_targets": [
            {"layer": layer, "expert": expert, "target": target, "reason": reason}
            for layer, expert, target, reason in result.replaced_targets
        ],
        "top_documents": top_documents(sums, documents),
        "share_by_source": source_shares(sums, documents),
        "warnings": find_warnings(config, detection, result, by_rows),
    }
