"""The numbers behind every plot, as column tables: one source for the CSV files, the page and the PNGs.

Shape legend: L MoE layers, E experts.

Real numbers are rounded to six significant digits (counts are exact), so that page and CSV hold the same values.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from trace_ds.reporting.compare import averaged, label, models
from trace_ds.reporting.gather import Calibration, RunData, weight_chunks
from trace_ds.reporting.intervals import Interval, of_difference, of_score
from trace_ds.reporting.scores import (
    MOMENTS,
    arm_points,
    excess,
    mean_score,
    standing,
    targets,
    utility_metrics,
)

BINS_PER_OCTAVE = 4
OCTAVES = 10  # the weight histogram spans 2^-10 ... 2^10; what lies outside falls into the end bins
MAX_TEXT = 300
VARIANCES = ("between", "within")
QUANTILES = ("0.01", "0.05", "0.25", "0.5", "0.75", "0.95", "0.99")
# An item's score is the first of these in its log; of all but nll more means that more is known.
ITEM_SCORES = ("correct", "rouge_l", "rouge_l_recall", "extraction_strength", "min_k", "nll")


@dataclass(frozen=True)
class Table:
    """Columns of equal length; a missing value is None."""

    name: str
    title: str
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
            writer.writerow([_safe_cell(value) for value in row])
        return out.getvalue()


def make(name: str, title: str, header: Iterable[str], rows: Iterable[Sequence[Any]]) -> Table:
    """A table from rows; numbers are made plain and rounded, not-finite ones become None."""
    names = list(header)
    plain = [[_plain(value) for value in row] for row in rows]
    assert all(len(row) == len(names) for row in plain), f"ragged rows in table {name}"
    return Table(name, title, {key: [row[index] for row in plain] for index, key in enumerate(names)})


def all_tables(runs: Sequence[RunData], others: list[RunData]) -> dict[str, Table]:
    """Every table by name; one without data is left out.

    Args:
        runs: the run, and those that repeat it with other seeds: their scores are told as means.
        others: what they are compared with.
    """
    run = averaged(runs)
    tables = [
        routing(run),
        selected_experts(run),
        layers(run),
        *weight_tables(run),
        sources(run),
        moved_targets(run),
        documents(run),
        training(run),
        curves([run, *others]),
        matched_forgetting([list(runs), *([other] for other in others)]),
        drift([run, *others]),
        attacks([run, *others]),
        scores([run, *others]),
        items(run),
    ]
    return {table.name: table for table in tables if len(table)}


def routing(run: RunData) -> Table:
    """One row per layer and expert: counts, frequencies with document-clustered errors, and their log-ratio.

    The ratio and its interval are the calibration's (Student's t; see calibration/detect.py); without one there is the
    plain ratio and no interval.
    """
    sides = [side for side in (run.forget, run.retain) if side is not None]
    if not sides:
        return make("routing", "", ["layer"], [])
    shape = sides[0].counts_LE.shape
    missing_LE = np.full(shape, np.nan)
    arrays = run.calibration.arrays if run.calibration else {}
    layer_LE, expert_LE = np.indices(shape)
    columns = {"layer": layer_LE, "decoder_layer": np.array(run.decoder_layers)[layer_LE], "expert": expert_LE}
    both = {"forget": run.forget, "retain": run.retain}
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
    rows = zip(*(array_LE.ravel() for array_LE in columns.values()), strict=True)
    return make("routing", "Routing by layer and expert", columns, rows)


def selected_experts(run: RunData) -> Table:
    """The forget-critical experts, strongest ratio first."""
    header = [
        "layer", "expert", "forget", "retain", "ratio", "ratio_low", "ratio_high", "target", "achieved",
    ]  # fmt: skip
    found = (run.calibration.diagnosis.get("selected") or []) if run.calibration else []
    rows = [[entry.get(key) for key in header] for entry in found if isinstance(entry, dict)]
    return make("selected", "Forget-critical experts", header, sorted(rows, key=lambda row: (-(row[4] or 0), row[:2])))


def layers(run: RunData) -> Table:
    """Per layer, in bits: entropy of the expert load on both corpora, and their Jensen-Shannon divergence.

    ``weighted_entropy_bits`` and ``js_weighted_bits`` are those of the retain tokens with their weights.
    """
    header = [
        "layer", "forget_entropy_bits", "retain_entropy_bits", "weighted_entropy_bits", "js_bits", "js_weighted_bits",
    ]  # fmt: skip
    if run.forget is None or run.retain is None:
        return make("layers", "", header, [])
    from scipy.stats import entropy

    p_LE, q_LE = (side.frequency_LE / side.top_k for side in (run.forget, run.retain))
    forget_L, retain_L, mixed_L = (entropy(x_LE, base=2, axis=1) for x_LE in (p_LE, q_LE, (p_LE + q_LE) / 2))
    js_L = mixed_L - (forget_L + retain_L) / 2
    known = (run.calibration.diagnosis.get("layers") or []) if run.calibration else []
    told: dict[int, dict[str, Any]] = {entry["layer"]: entry for entry in known if isinstance(entry, dict)}
    rows = []
    for layer in range(len(js_L)):
        entropy, js = (told.get(layer, {}).get(f"{key}_weighted_bits") for key in ("entropy", "js"))
        rows.append([layer, forget_L[layer], retain_L[layer], entropy, max(js_L[layer], 0.0), js])
    return make("layers", "Load entropy and divergence by layer", header, rows)


def weight_histogram(
    calibration: Calibration, counted_tokens: int | None
) -> tuple[list[float], list[int], dict[str, float]] | None:
    """Bin edges (log scale), tokens per bin, {tokens, ess_fraction, max_weight, mean}; None without weights.

    Uncounted positions have weight 0 and are left out; ``counted_tokens`` adds back counted tokens of weight 0.
    """
    if calibration.weights_path is None:
        return None
    bins = 2 * OCTAVES * BINS_PER_OCTAVE
    tokens_B = np.zeros(bins, np.int64)
    total = squares = largest = 0.0
    positive = 0
    for chunk in weight_chunks(calibration):
        chunk = chunk[chunk > 0]
        index = np.floor((np.log2(chunk) + OCTAVES) * BINS_PER_OCTAVE).clip(0, bins - 1).astype(np.int64)
        tokens_B += np.bincount(index, minlength=bins)
        total, squares = total + float(chunk.sum()), squares + float((chunk**2).sum())
        largest, positive = max(largest, float(chunk.max(initial=0.0))), positive + len(chunk)
    count = max(positive, counted_tokens or 0)
    if positive == 0:
        return None
    edges = [2.0 ** (index / BINS_PER_OCTAVE - OCTAVES) for index in range(bins + 1)]
    summary = {"tokens": count, "zero_tokens": count - positive, "ess_fraction": total**2 / (count * squares)}
    return edges, tokens_B.tolist(), {**summary, "max_weight": largest, "mean": total / count}


def weight_tables(run: RunData) -> tuple[Table, Table]:
    """The histogram of every different calibration's weights, and its summary; the weights are read once."""
    counted = ["ess_fraction", "max_weight", "mean", "tokens", "zero_tokens"]
    bins: list[list[Any]] = []
    summaries: list[list[Any]] = []
    told = ["rule", "lambda", "gap_closed", "gap_closed_by_rows", "row_ess_fraction", "iterations", "alike_share"]
    header = [
        "arm",
        *told,
        *counted,
        *(f"variance_{part}" for part in VARIANCES),
        *(f"quantile_{q}" for q in QUANTILES),
    ]
    for arm, calibration in run.calibrations():
        found = weight_histogram(calibration, run.retain.tokens if run.retain else None)
        if found is not None:
            edges, tokens, summary = found
            bins += [
                [arm, edges[index], edges[index + 1], count, count / summary["tokens"]]
                for index, count in enumerate(tokens)
                if count
            ]
            known = calibration.diagnosis
            spread, quantiles = known.get("variance") or {}, known.get("weight_quantiles") or {}
            details = [*map(spread.get, VARIANCES), *map(quantiles.get, QUANTILES)]
            summaries.append([arm, *map(known.get, told), *map(summary.get, counted), *details])
    return (
        make("weights", "Distribution of the retain weights", ["arm", "low", "high", "tokens", "share"], bins),
        make("weight_summary", "Effective sample size of the retain weights", header, summaries),
    )


def _from_diagnosis(run: RunData, name: str, title: str, header: list[str], key: str) -> Table:
    """Rows of a list in the diagnoses; weights that are uniform say nothing, so those are left out."""
    rows = []
    for arm, calibration in run.calibrations():
        entries: Any = calibration.diagnosis.get(key) or []
        if calibration.diagnosis.get("rule") != "uniform":
            rows += [[arm, *map(entry.get, header[1:])] for entry in entries if isinstance(entry, dict)]
    return make(name, title, header, rows)


def sources(run: RunData) -> Table:
    """Where the weight went, what gained most first."""
    table = _from_diagnosis(run, "sources", "", ["arm", "source", "token_share", "weight_share"], "share_by_source")
    rows = sorted(table.rows(), key=lambda row: row["token_share"] - row["weight_share"])
    told = [
        [*row.values(), row["weight_share"] - row["token_share"], row["weight_share"] / row["token_share"]]
        if row["token_share"]
        else [*row.values(), row["weight_share"], None]
        for row in rows
    ]
    header = ["arm", "source", "token_share", "weight_share", "gain", "times"]
    return make("sources", "Share of the weight by source", header, told)


def moved_targets(run: RunData) -> Table:
    """Experts whose target had to move, with the frequency that was offered instead and the reason."""
    header = ["arm", "layer", "expert", "offered", "reason"]
    return _from_diagnosis(run, "moved_targets", "Experts that cannot be matched", header, "moved_targets")


def documents(run: RunData) -> Table:
    header = ["arm", "document", "source", "weight", "tokens", "text_start"]
    return _from_diagnosis(run, "documents", "Retain documents with the most weight", header, "top_documents")


def training(run: RunData) -> Table:
    keys = sorted({key for arm in run.arms for record in arm.log for key in record} - {"step"}, key=_training_order)
    rows = [[arm.label, int(record["step"]), *map(record.get, keys)] for arm in run.arms for record in arm.log]
    return make("training", "Training by step", ["arm", "step", *keys], rows)


def _training_order(key: str) -> tuple[int, str]:
    first = ("loss_forget", "loss_retain", "loss", "grad_norm", "lr")
    return (first.index(key) if key in first else len(first), key)


def curves(runs: list[RunData]) -> Table:
    """Mean scores along every arm: the forgetting-utility curve (only end points without checkpoints).

    ``forget`` and ``utility`` are means of the headline metrics (forget quality: 1 less it); ``utility_METRIC`` of that
    metric alone.
    """
    metrics = list(dict.fromkeys(metric for run in runs for metric in utility_metrics(run)))
    rows = []
    for run in runs:
        goal = targets(run)
        for arm in run.arms:
            if arm.final is None and not arm.checkpoints:
                continue
            for step, evaluation in arm_points(run, arm):
                forget, utility = mean_score(evaluation, "forget"), mean_score(evaluation, "utility")
                left = excess(evaluation, goal) if goal else None
                more = [mean_score(evaluation, "utility", metric) for metric in metrics]
                if forget is not None or utility is not None:
                    name = label(runs, run, arm.label)
                    rows.append([name, arm.rule, step, evaluation.model, forget, left, utility, *more])
    more_names = [f"utility_{metric}" for metric in metrics]
    header = ["arm", "rule", "step", "model", "forget", "forget_excess", "utility", *more_names]
    return make("curves", "Forgetting against utility", header, rows)


def matched_forgetting(groups: list[list[RunData]]) -> Table:
    """Utility at matched forgetting, by the headline metrics and by each metric alone, and the difference to uniform
    weights; a group of runs that repeat each other is told by its mean."""
    rows: list[list[Any]] = []
    for group in groups:
        run = group[0]
        baseline = run.baseline.label if run.baseline else None
        for metric in (None, *utility_metrics(run)):
            for arm in run.arms:
                found = standing(group, arm.label, baseline, metric)
                if found is not None and (found.step is not None or found.late):
                    name = label([each[0] for each in groups], run, arm.label)
                    numbers: list[Any] = []
                    for at in MOMENTS:
                        gap = found.against[at]
                        numbers += [found.utility[at], gap and gap.value, *_ends(gap.interval if gap else None)]
                    rows.append([name, arm.rule, metric or "headline", len(group), found.step, found.spacing, *numbers])
    header = ["arm", "rule", "utility", "runs", "first_step", "steps_between_scores"]
    for column in ("utility_at_first", "mean_utility_after", "utility_at_end"):
        header += [column, f"{column}_gain", f"{column}_gain_low", f"{column}_gain_high"]
    return make("matched", "Utility at matched forgetting", header, rows)


def drift(runs: list[RunData]) -> Table:
    """Routing drift by layer: overlap of the selected experts with the original's, and KL of their shares."""
    rows = []
    for name, evaluation, _ in models(runs):
        for corpus in ("forget", "retain"):
            side = (evaluation.drift or {}).get(corpus) or {}
            by_layer = zip_longest(*(side.get(key) or [] for key in ("overlap", "kl")))
            rows += [[name, corpus, layer, *values] for layer, values in enumerate(by_layer)]
    return make("drift", "Routing drift by layer", ["model", "corpus", "layer", "overlap", "kl"], rows)


def attacks(runs: list[RunData]) -> Table:
    """Forget scores under attack: by way of forcing experts, and by step of relearning."""
    rows: list[list[Any]] = []
    for name, evaluation, _ in models(runs):
        told = evaluation.attacks
        stages = [("expert forcing", kind, found) for kind, found in told["expert_forcing"].items()]
        stages += [("relearning", f"step {entry['step']}", entry["scores"]) for entry in told["relearning"]]
        for attack, stage, found in stages:
            rows += [[name, attack, stage.replace("_", " "), metric, value] for metric, value in found.items()]
    return make("attacks", "Forget scores under attack", ["model", "attack", "stage", "score", "value"], rows)


def scores(runs: list[RunData]) -> Table:
    """Every score with its interval, and its difference to the run's uniform weights (``gain``) with that one's."""
    rows = []
    for name, evaluation, run in models(runs):
        base = run.baseline.final if run.baseline else None
        for s in evaluation.scores:
            band = of_score(s, evaluation)
            other = next((b for b in base.scores if (b.task, b.metric) == (s.task, s.metric)), None) if base else None
            gain, near = None, None
            if other is not None and base is not None and base is not evaluation:
                gain, near = s.value - other.value, of_difference(s, evaluation, other, base)
            numbers = [s.value, *_ends(band), gain, *_ends(near), s.n, s.chance, len(s.by_seed) or 1, s.headline]
            rows.append([name, s.task, s.metric, s.role, s.direction, *numbers])
    header = ["model", "task", "metric", "role", "direction", "value", "low", "high", "gain", "gain_low", "gain_high"]
    return make("scores", "Scores", [*header, "n", "chance", "runs", "headline"], rows)


def _ends(band: Interval | None) -> list[float | None]:
    return [None, None] if band is None else [band.low, band.high]


def items(run: RunData) -> Table:
    """Every forget item, and every other that models answer: what it asks, and by model what was said and its score."""
    evaluations = run.evaluations()
    roles = {score.task: score.role for evaluation in evaluations.values() for score in evaluation.scores}
    found: dict[tuple[str, str], list[Any]] = {}
    for number, evaluation in enumerate(evaluations.values()):
        for task in sorted(evaluation.items):
            for item in evaluation.items[task]:
                if task in roles:
                    name, asked, said, score = item_cells(item)
                    row = found.setdefault((task, name), [asked, *[None] * (2 * len(evaluations))])
                    row[2 * number + 1 : 2 * number + 3] = said, score
    answered = {task for (task, _), row in found.items() if roles[task] == "forget" or any(row[1::2])}
    rows = [[task, roles[task], name, *row] for (task, name), row in found.items() if task in answered]
    columns = [column for name in evaluations for column in (name, f"{name} score")]
    return make("items", "Questions, one by one", ["task", "role", "id", "text", *columns], rows)


def item_cells(item: dict[str, Any]) -> list[Any]:
    """id, text (prompt and right answer), outcome (what the model said), score of one item of any task type."""
    choices, answer, predicted = item.get("choices"), item.get("answer"), item.get("predicted")
    right, said = item.get("reference"), item.get("continuation")
    if isinstance(choices, list):
        right, said = (choices[index] if isinstance(index, int) else None for index in (answer, predicted))
    elif "member" in item:
        said = "was trained on" if item["member"] else "was never seen"
    score = next((item[key] for key in ITEM_SCORES if item.get(key) is not None), None)
    shown = " → ".join(str(part) for part in (item.get("prompt", item.get("text")), right) if part is not None)
    return [
        str(item.get("id", "")),
        shown[:MAX_TEXT],
        None if said is None else str(said)[:MAX_TEXT],
        None if score is None else float(score),
    ]


def _plain(value: Any) -> Any:
    """Built-in types only; reals with six significant digits, None when not finite."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, np.integer):
        return int(value)
    number = float(value)
    return float(f"{number:.6g}") if math.isfinite(number) else None


def _safe_cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return "'" + value
    return "" if value is None else value
