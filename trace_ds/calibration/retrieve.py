"""Retrieval: of a large pool of retain text, keep the rows that are worth having before any of them is weighted.

Weights can only re-distribute what a retain set holds. Where it is a pool, too large to be used whole or mostly far
from the forget domain, ``calibration.retrieve`` keeps ``rows`` of its rows: the nearest by a similarity
(similarity.py), mixed with ``random_share`` of rows drawn at random from the others, because the nearest alone would
drop general text. The rule then weights the kept rows only (mean 1 over them) and the others have weight 0: the two
compose. Detection and the reported p^R stay those of the pool. Our decisions.

Shape legend: R rows, D documents, L MoE layers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from trace_ds.calibration.detect import Detection
from trace_ds.calibration.diagnose import Documents
from trace_ds.calibration.rows import RowSelections
from trace_ds.calibration.rules import apply_rule
from trace_ds.calibration.similarity import hidden_similarity, routing_similarity, tfidf_similarity
from trace_ds.calibration.tokens import TokenMap, Trace, count_selections, read_token_map
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.routing.token_files import open_parts
from trace_ds.run.artefact import Artefact

TOP_ROWS = 10
COLLECT_AGAIN = "and run `trace-ds collect CONFIG` again"


@dataclass(frozen=True)
class Retrieved:
    """``kept_R`` bool [rows of the pool]; ``score_R`` float64, the similarity; how many rows are ``random`` ones, and
    how many of the nearest were drawn among rows ``tied`` at the last place; ``notes``: warnings for people."""

    kept_R: np.ndarray
    score_R: np.ndarray
    random: int
    tied: int = 0
    notes: tuple[str, ...] = ()


def choose_rows(score_R: np.ndarray, sizes_R: np.ndarray, keep: int, random_share: float, seed: int) -> Retrieved:
    """Keep ``keep`` of the rows with counted tokens: the highest scores (ties: at random), and random others."""
    usable = np.flatnonzero(sizes_R > 0)
    random = round(keep * random_share)
    shuffled = np.random.default_rng([seed, 4]).permutation(usable)
    ranked = shuffled[np.argsort(-score_R[shuffled], kind="stable")]
    others = np.sort(ranked[keep - random :])
    kept_R = np.zeros(len(score_R), dtype=bool)
    kept_R[ranked[: keep - random]] = True
    kept_R[np.random.default_rng([seed, 3]).permutation(others)[:random]] = True
    nearest_R, beyond_R = score_R[ranked[: keep - random]], score_R[ranked[keep - random :]]
    cut_tied = min(len(nearest_R), len(beyond_R)) > 0 and nearest_R[-1] == beyond_R[0]
    return Retrieved(kept_R, score_R, random, int((nearest_R == nearest_R[-1]).sum()) if cut_tied else 0)


def retrieve(
    config: Config,
    data: Artefact,
    statistics: tuple[Artefact, Artefact],
    detection: Detection,
    tokens: TokenMap,
    trace: Trace | None,
    selections: RowSelections | None,
    spool: Path,
) -> Retrieved | None:
    """The rows that ``calibration.retrieve`` keeps; None when it is off.

    Args:
        statistics: the artefacts of the forget and of the retain side.
        tokens, trace, selections: of the pool.

    Raises:
        UserError: more rows asked for than there are, or the similarity needs what was not recorded.
    """
    settings = config.calibration.retrieve
    if settings.rows is None:
        return None
    sizes_R = tokens.counted_per_row()
    usable = int((sizes_R > 0).sum())
    keep = max(round(settings.rows * usable), 1) if settings.rows < 1 else int(settings.rows)
    if keep > usable:
        raise UserError(
            f"{keep} rows are asked for, the retain data has {usable} with counted tokens",
            "calibration.retrieve.rows",
            "ask for fewer (or for a fraction below 1), or give a larger pool under data.retain",
        )
    spool = spool / "pool"
    spool.mkdir()

    def similarity() -> np.ndarray:
        kind, where = settings.similarity, "calibration.retrieve.similarity"
        if kind == "tfidf":
            return tfidf_similarity(data.file("forget.arrow"), data.file("retain.arrow"))
        if kind == "hidden":
            sides = [open_parts(side, "hidden") for side in statistics]
            if not all(sides):
                fix = f"set statistics.hidden: true {COLLECT_AGAIN}"
                raise UserError(
                    "the similarity hidden needs the rows' hidden states, which were not recorded", where, fix
                )
            forget_sizes_R = read_token_map(data.file("forget.arrow"), 0).counted_per_row()
            return hidden_similarity(sides[0], forget_sizes_R, sides[1], sizes_R)
        frequencies = detection.forget_LE, detection.retain_LE
        if kind == "routing":
            assert selections is not None
            return routing_similarity(selections, detection.eligible_LE, *frequencies)
        if trace is None:
            fix = f"set statistics.trace: true {COLLECT_AGAIN}"
            raise UserError(f"the similarity {kind} needs the routing trace, which was not recorded", where, fix)
        selected = _uses_selected(config) and detection.selected_LE.any()
        covered_LE = detection.selected_LE if selected else detection.eligible_LE
        raking = config.calibration.model_copy(update={"rule": "raking", "level": "token"})
        return apply_rule(raking, tokens, trace, covered_LE, *frequencies, config.seed, spool).row_weight_R

    found = choose_rows(similarity(), sizes_R, keep, settings.random_share, config.seed)
    notes = []
    if _uses_selected(config) and not detection.selected_LE.any():
        notes.append("no forget-critical expert was found: the rows were retrieved by all experts that take part")
    if 2 * found.tied > keep - found.random:
        notes.append(
            f"the similarity {settings.similarity} does not tell the rows apart: {found.tied} of the "
            f"{keep - found.random} nearest rows were drawn at random among equally near ones"
        )
    return replace(found, notes=tuple(notes))


def _uses_selected(config: Config) -> bool:
    """Whether the similarity looks at the forget-critical experts only."""
    return config.calibration.retrieve.similarity == "weight" and config.calibration.experts == "selected"


def describe_retrieval(
    config: Config,
    retrieved: Retrieved,
    detection: Detection,
    tokens: TokenMap,
    trace: Trace | None,
    documents: Documents,
) -> dict[str, Any]:
    """What was retrieved, for ``diagnosis.json``. ``tokens``: of the pool.

    ``gap_pool`` and ``gap_kept``: Σ |p^F − p| over the forget-critical experts, of the pool and of the kept rows before
    any weighting.
    """
    kept = tokens.restricted(retrieved.kept_R)
    counts = [_document_tokens(side) for side in (tokens, kept)]
    totals = [max(int(c.sum()), 1) for c in counts]
    names, of_D = documents.names, documents.source_D
    shares = [np.bincount(of_D, c, len(names)) / total for c, total in zip(counts, totals, strict=True)]
    gaps: dict[str, float] = {}
    if trace is not None:
        where = detection.selected_LE
        p_LE = count_selections(trace, kept, where.shape[1]) / totals[1]
        for name, side_LE in (("gap_pool", detection.retain_LE), ("gap_kept", p_LE)):
            gaps[name] = float(np.abs(detection.forget_LE - side_LE)[where].sum())
    best = np.argsort(-np.where(retrieved.kept_R, retrieved.score_R, -np.inf), kind="stable")[:TOP_ROWS]
    best = best[retrieved.kept_R[best]]
    first = [int(tokens.document_ids_T[int(tokens.row_starts_R1[row])]) for row in best]
    return {
        "similarity": config.calibration.retrieve.similarity,
        "rows": int(retrieved.kept_R.sum()),
        "random_rows": retrieved.random,
        "pool_rows": tokens.rows,
        "tokens": totals[1],
        "pool_tokens": totals[0],
        **gaps,
        "share_by_source": sorted(
            (
                {"source": name, "pool_share": float(shares[0][i]), "kept_share": float(shares[1][i])}
                for i, name in enumerate(names)
            ),
            key=lambda r: (-r["kept_share"] / max(r["pool_share"], 1e-300), r["source"]),
        ),
        "top_rows": [
            {
                "row": int(row),
                "score": float(retrieved.score_R[row]),
                "document": document,
                "source": names[of_D[document]],
                "text_start": str(documents.text_start[document]),
            }
            for row, document in zip(best, first, strict=True)
        ],
    }


def _document_tokens(tokens: TokenMap) -> np.ndarray:
    """Counted tokens of every document, int64 [D]."""
    counts_D = np.zeros(tokens.documents, np.int64)
    for start, stop in tokens.spans():
        counted_T = tokens.counted(start, stop)
        ids = np.asarray(tokens.document_ids_T[start:stop])[counted_T]
        if len(ids):
            counts_D[ids[0] : ids[-1] + 1] += np.bincount(ids - ids[0])
    return counts_D
