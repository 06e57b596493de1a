"""The numbers behind the page, as column tables: one source for the CSV files and the charts.

Real numbers are rounded to six significant digits (counts are exact), so that page and CSV hold the same values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trace_ds.reporting.gather import RunData
from trace_ds.reporting.intervals import Interval, of_difference, of_score
from trace_ds.reporting.scores import SCORING_MOMENTS, arm_points, mean_score, standing

MAX_TEXT = 300
# An item's score is the first of these in its log; of all but nll more means that more is known.
ITEM_SCORES = ("correct", "rouge_l", "rouge_l_recall", "min_k", "nll")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; a missing value is None."""

    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values()), []))

    def rows(self) -> list[dict[str, Any]]:
        return [dict(zip(self.columns, row, strict=True)) for row in zip(*self.columns.values(), strict=True)]

    def to_csv(self) -> str:
        """RFC 4180 text. A text cell that a spreadsheet would run as a formula gets a leading apostrophe."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        for row in zip(*self.columns.values(), strict=True):
            formula = [isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") for value in row]
            writer.writerow([f"'{value}" if bad else value for value, bad in zip(row, formula, strict=True)])
        return out.getvalue()


def make(header: Iterable[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table from rows; numbers are made plain and rounded, not-finite ones become None."""
    names = list(header)
    plain = [[_plain(value) for value in row] for row in rows]
    assert all(len(row) == len(names) for row in plain), f"ragged rows under {names}"
    return Table({key: [row[index] for row in plain] for index, key in enumerate(names)})


def all_tables(run: RunData) -> dict[str, Table]:
    """Every table by name; one without data is left out."""
    tables = {
        "routing": _routing(run),
        "selected": selected_experts(run),
        "sources": sources(run),
        "documents": _from_diagnosis(run, "top_documents", ["document", "source", "weight", "tokens", "text_start"]),
        "curves": curves(run),
        "matched": matched_forgetting(run),
        "drift": drift(run),
        "scores": scores(run),
        "items": items(run),
    }
    return {name: table for name, table in tables.items() if len(table)}


def _routing(run: RunData) -> Table:
    """One row per layer and expert: counts, frequencies with document-clustered errors, and their log-ratio.

    The ratio and its interval are the calibration's (Student's t; see calibration/detect.py); without one there is the
    plain ratio and no interval. Shape legend: L MoE layers, E experts.
    """
    both = {"forget": run.forget, "retain": run.retain}
    shape = next((side.counts_LE.shape for side in both.values() if side), None)
    if shape is None:
        return make(["layer"], [])
    missing_LE = np.full(shape, np.nan)
    arrays = run.calibration.arrays if run.calibration else {}
    layer_LE, expert_LE = np.indices(shape)
    columns = {"layer": layer_LE, "decoder_layer": np.array(run.decoder_layers)[layer_LE], "expert": expert_LE}
    columns |= {f"{name}_count": side.counts_LE if side else missing_LE for name, side in both.items()}
    for name, side in both.items():
        columns[f"{name}_frequency"] = side.frequency_LE if side else missing_LE
        columns[f"{name}_error"] = np.sqrt(side.variance_LE()) if side else missing_LE
    with np.errstate(divide="ignore", invalid="ignore"):
        plain_LE = np.log(columns["forget_frequency"]) - np.log(columns["retain_frequency"])
        columns["log_ratio"] = arrays.get("log_ratio_LE", plain_LE)
        for end in ("low", "high"):
            columns[f"log_ratio_{end}"] = np.log(arrays.get(f"ratio_{end}_LE", missing_LE))
    columns |= {name: arrays.get(f"{name}_LE", missing_LE) for name in ("target", "achieved")}
    columns["selected"] = arrays.get("selected_LE", np.zeros(shape, np.uint8))
    return make(columns, zip(*(array_LE.ravel() for array_LE in columns.values()), strict=True))


def selected_experts(run: RunData) -> Table:
    """The forget-critical experts, strongest ratio first."""
    header = ["layer", "expert", "forget", "retain", "ratio", "ratio_low", "ratio_high", "target", "achieved"]
    entries = (run.calibration.diagnosis.get("selected") or []) if run.calibration else []
    rows = [[entry.get(key) for key in header] for entry in entries if isinstance(entry, dict)]
    return make(header, sorted(rows, key=lambda row: (-(row[4] or 0), row[:2])))


def _from_diagnosis(run: RunData, key: str, header: list[str]) -> Table:
    """Rows of a list in the diagnoses; weights that are uniform say nothing, so those are left out."""
    diagnoses = {arm: c.diagnosis for arm, c in run.calibrations.items() if c.diagnosis.get("rule") != "uniform"}
    rows = [
        [arm, *map(entry.get, header)]
        for arm, diagnosis in diagnoses.items()
        for entry in diagnosis.get(key) or []
        if entry
    ]
    return make(["arm", *header], rows)


def sources(run: RunData) -> Table:
    """Share of the tokens and of the weight by source, the largest gain first."""
    shares = _from_diagnosis(run, "share_by_source", ["source", "token_share", "weight_share"]).rows()
    rows = [
        [*row.values(), weight - tokens, weight / tokens if tokens else None]
        for row in shares
        for tokens, weight in [(row["token_share"], row["weight_share"])]
    ]
    header = ["arm", "source", "token_share", "weight_share", "gain", "times"]
    return make(header, sorted(rows, key=lambda row: -row[4]))


def curves(run: RunData) -> Table:
    """Mean headline scores along every arm: the forgetting-utility curve (only end points without checkpoints).

    ``forget`` is what remains of the knowledge: of TOFU's forget quality 1 less it.
    """
    rows = []
    for arm in (arm for arm in run.arms if arm.final is not None or arm.checkpoints):
        for step, evaluation in arm_points(run, arm):
            forget, utility = mean_score(evaluation, "forget"), mean_score(evaluation, "utility")
            if forget is not None or utility is not None:
                rows.append([arm.label, arm.rule, step, evaluation.model, forget, utility])
    return make(["arm", "rule", "step", "model", "forget", "utility"], rows)


def matched_forgetting(run: RunData) -> Table:
    """Utility at matched forgetting, and the difference to uniform weights."""
    rows: list[list[Any]] = []
    for arm in run.arms:
        result = standing(run, arm.label, run.baseline.label if run.baseline else None)
        if result is not None and (result.step is not None or result.late):
            numbers: list[Any] = []
            for at in SCORING_MOMENTS:
                gap = result.against[at]
                numbers += [result.utility[at], gap and gap.value, *_ends(gap.interval if gap else None)]
            rows.append([arm.label, arm.rule, result.step, result.spacing, *numbers])
    header = ["arm", "rule", "first_step", "steps_between_scores"]
    for column in ("utility_at_first", "mean_utility_after", "utility_at_end"):
        header += [column, f"{column}_gain", f"{column}_gain_low", f"{column}_gain_high"]
    return make(header, rows)


def drift(run: RunData) -> Table:
    """Routing drift by layer: overlap of the selected experts with the original's."""
    rows = []
    for name, evaluation in run.evaluations().items():
        for corpus in ("forget", "retain"):
            side = (evaluation.drift or {}).get(corpus) or {}
            rows += [[name, corpus, layer, value] for layer, value in enumerate(side.get("overlap") or [])]
    return make(["model", "corpus", "layer", "overlap"], rows)


def scores(run: RunData) -> Table:
    """Every score with its interval, and its difference to uniform weights (``gain``) with that one's."""
    rows = []
    base = run.baseline.final if run.baseline else None
    for name, evaluation in run.evaluations().items():
        for s in evaluation.scores:
            other = base.find(s.task, s.metric) if base and base is not evaluation else None
            gain, near = None, None
            if other is not None and base is not None:
                gain, near = s.value - other.value, of_difference(s, evaluation, base)
            numbers = [s.value, *_ends(of_score(s)), gain, *_ends(near), s.n, s.chance]
            rows.append([name, s.task, s.metric, s.role, s.direction, *numbers, s.headline])
    header = ["model", "task", "metric", "role", "direction", "value", "low", "high", "gain", "gain_low", "gain_high"]
    return make([*header, "n", "chance", "headline"], rows)


def _ends(band: Interval | None) -> list[float | None]:
    return [None, None] if band is None else [band.low, band.high]


def items(run: RunData) -> Table:
    """Every forget item, and every other that models answer: the question, and by model its answer and score."""
    evaluations = run.evaluations()
    roles = {score.task: score.role for evaluation in evaluations.values() for score in evaluation.scores}
    rows_by_item: dict[tuple[str, str], list[Any]] = {}
    for number, evaluation in enumerate(evaluations.values()):
        for task in sorted(evaluation.items):
            for item in evaluation.items[task] if task in roles else []:
                name, question, answer, score = item_cells(item)
                row = rows_by_item.setdefault((task, name), [question, *[None] * (2 * len(evaluations))])
                row[2 * number + 1 : 2 * number + 3] = answer, score
    answered = {task for (task, _), row in rows_by_item.items() if roles[task] == "forget" or any(row[1::2])}
    rows = [[task, roles[task], name, *row] for (task, name), row in rows_by_item.items() if task in answered]
    columns = [column for name in evaluations for column in (name, f"{name} score")]
    return make(["task", "role", "id", "text", *columns], rows)


def item_cells(item: dict[str, Any]) -> list[Any]:
    """id, text (prompt and right answer), the model's answer, score of one item of any task type."""
    choices, answer, predicted = item.get("choices"), item.get("answer"), item.get("predicted")
    right, said = item.get("reference"), item.get("continuation")
    if isinstance(choices, list):
        right, said = (choices[index] if isinstance(index, int) else None for index in (answer, predicted))
    elif "member" in item:
        said = "was trained on" if item["member"] else "was never seen"
    score = next((item[key] for key in ITEM_SCORES if item.get(key) is not None), None)
    shown = " → ".join(str(part) for part in (item.get("prompt", item.get("text")), right) if part is not None)
    said = None if said is None else str(said)[:MAX_TEXT]
    return [str(item.get("id", "")), shown[:MAX_TEXT], said, None if score is None else float(score)]


def _plain(value: Any) -> Any:
    """Built-in types only; reals with six significant digits, None when not finite."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.integer):
        return int(value)
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None
