"""The table of scores, the comparison at matched forgetting, and the sentence that says what they show."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_ds.evaluation.table import ARROWS
from trace_ds.reporting.compare import models
from trace_ds.reporting.gather import Arm, Evaluation, RunData, Score
from trace_ds.reporting.matched import Matched, matched, relative_gain

if TYPE_CHECKING:
    from rich.table import Table as RichTable

CHANCE_MARGIN = 0.02  # without a gold model: forgotten = at most two points above guessing


def score_records(run: RunData, others: Iterable[RunData] = ()) -> list[dict[str, Any]]:
    """``scores.json``: a sorted list of ``{model, task, metric, value}``; other runs' models are ``RUN/MODEL``.

    A value that is not finite is None.
    """
    records = [
        {"model": name, "task": s.task, "metric": s.metric, "value": s.value if math.isfinite(s.value) else None}
        for name, evaluation in models([run, *others])
        for s in evaluation.scores
    ]
    return sorted(records, key=lambda record: (record["model"], record["task"], record["metric"]))


@dataclass(frozen=True)
class Targets:
    """What counts as forgotten: one target per forget task, and where it comes from."""

    tasks: list[Score]  # the headline forget scores (of the model that defined them)
    values: list[float]
    origin: str  # "the gold model" or "chance + 0.02"


def targets(run: RunData) -> Targets | None:
    """The gold model's forget scores; else chance + 2 points; None when there is neither."""
    gold = run.references.get("gold")
    if gold is not None and gold.headline("forget"):
        tasks = gold.headline("forget")
        return Targets(tasks, [task.value for task in tasks], "the gold model")
    some = next((e for e in run.evaluations().values() if e.headline("forget")), None)
    if some is None:
        return None
    tasks = some.headline("forget")
    if any(task.chance is None for task in tasks):
        return None
    return Targets(tasks, [float(task.chance or 0.0) + CHANCE_MARGIN for task in tasks], f"chance + {CHANCE_MARGIN}")


def excess(evaluation: Evaluation, goal: Targets) -> float | None:
    """Largest distance of a model's forget scores above their targets (<= 0: forgotten); None if one is missing."""
    left = []
    for task, level in zip(goal.tasks, goal.values, strict=True):
        value = evaluation.value(task.task, task.metric)
        if value is None:
            return None
        left.append(value - level if task.direction == "lower" else level - value)
    return max(left)


def mean_score(evaluation: Evaluation, role: str, metric: str | None = None) -> float | None:
    """Mean over the tasks of a role of ``metric`` (default: each task's headline); None when there is none.

    Only scores that point the role's usual way count: forget lower, utility higher is better.
    """
    usual = "lower" if role == "forget" else "higher"
    found = evaluation.headline(role) if metric is None else [s for s in evaluation.scores if s.metric == metric]
    values = [score.value for score in found if score.role == role and score.direction == usual]
    return math.fsum(values) / len(values) if values else None


def utility_metrics(run: RunData) -> list[str]:
    """The metrics utility can be averaged by, besides the headline, in order of appearance."""
    found = [score for e in run.evaluations().values() for score in e.scores if score.role == "utility"]
    return list(dict.fromkeys(score.metric for score in found if score.direction == "higher"))


def arm_points(run: RunData, arm: Arm) -> list[tuple[int, Evaluation]]:
    """The scored models of an arm by step: the original at 0, each checkpoint, and the final model at its step.

    The final model's step is the last one of its log, else of its checkpoints; a final model whose step is not known
    comes one step after all others.
    """
    points = dict(arm.checkpoints)
    if "original" in run.references:
        points.setdefault(0, run.references["original"])
    if arm.final is not None:
        last = int(arm.log[-1]["step"]) if arm.log else None
        if last is None or last < max(points, default=0):
            last = max(arm.checkpoints, default=max(points, default=0) + 1)
        points.setdefault(last, arm.final)
    return sorted(points.items())


def arm_matched(run: RunData, arm: Arm, metric: str | None = None) -> Matched | None:
    """Matched-forgetting summary of an arm from its scored checkpoints; None without checkpoints or a target.

    ``metric`` is what utility is averaged by (default: headlines); forgetting is always by the headlines.
    """
    goal = targets(run)
    if goal is None or not arm.checkpoints:
        return None
    rows = [
        (step, excess(evaluation, goal), mean_score(evaluation, "utility", metric))
        for step, evaluation in arm_points(run, arm)
    ]
    whole = [(step, left, utility) for step, left, utility in rows if left is not None and utility is not None]
    if not whole:
        return None
    steps, lefts, utilities = zip(*whole, strict=True)
    return matched(steps, lefts, utilities, 0.0)


def honest_sentence(run: RunData) -> str:
    """What the numbers show, in plain words computed from them; says so when the method does not win."""
    return " ".join(findings(run))


def findings(run: RunData) -> list[str]:
    """The sentences of :func:`honest_sentence`, one by one."""
    original = run.references.get("original")
    finals = [arm for arm in run.arms if arm.final is not None]
    if original is None or not finals:
        return ["Nothing to conclude yet: the original and at least one unlearned model must be evaluated first."]
    parts = [_forgetting(run, original, finals)]
    parts += _utility(run, original, finals)
    parts.append("One seed is no proof: repeat with other seeds before you believe a difference.")
    return [part for part in parts if part]


def _forgetting(run: RunData, original: Evaluation, finals: list[Arm]) -> str:
    goal = targets(run)
    before = mean_score(original, "forget")
    if goal is None or before is None:
        return "Whether the forget set is forgotten cannot be said: no forget task has a gold model or a chance level."
    told = []
    for arm in finals:
        assert arm.final is not None
        left, score = excess(arm.final, goal), mean_score(arm.final, "forget")
        if left is not None and score is not None:
            told.append(f"{arm.label} {score:.3f} ({'reached' if left <= 1e-9 else 'NOT reached'})")
    level = math.fsum(goal.values) / len(goal.values)
    tasks = ", ".join(f"{task.task} {task.metric}" for task in goal.tasks)
    start = excess(original, goal)
    already = start is not None and start <= 1e-9
    return f"Forget score ({tasks}): {before:.3f} before; target {level:.3f} ({goal.origin}); {'; '.join(told)}." + (
        " The original model is already at the target: there was nothing to forget." if already else ""
    )


def _utility(run: RunData, original: Evaluation, finals: list[Arm]) -> list[str]:
    values = {arm.label: mean_score(arm.final, "utility") for arm in finals if arm.final is not None}
    before = mean_score(original, "utility")
    known = [f"{label} {value:.3f}" for label, value in values.items() if value is not None]
    if before is None or not known:
        return ["No utility task was evaluated, so what the forgetting cost is unknown."]
    parts = [f"Mean utility: {before:.3f} before; at the end {', '.join(known)}."]
    baseline = next((arm for arm in finals if arm.rule == "uniform"), None)
    methods = [arm for arm in finals if arm.is_trace]
    if baseline is None or not methods:
        return [*parts, "There is no pair of a TRACE-weighted and a uniform run to compare."]
    base_matched = arm_matched(run, baseline)
    for arm in methods:
        parts.append(_against(run, arm, baseline, values.get(arm.label), values.get(baseline.label), base_matched))
    return parts


def _against(
    run: RunData, arm: Arm, baseline: Arm, end: float | None, base_end: float | None, base: Matched | None
) -> str:
    """One sentence on one method against uniform weights: at matched forgetting when both reached it, else the end."""
    mine = arm_matched(run, arm)
    if mine is not None and base is not None:
        if mine.post is not None and base.post is not None:
            verdict = _verdict(mine.post, base.post, arm.label) + _by_exact_match(run, arm, baseline)
            return (
                f"At matched forgetting (from the first scored checkpoint at the target, step {mine.step} against "
                f"{base.step}, to the end), {verdict}."
            )
        late = [a.label for a, m in ((arm, mine), (baseline, base)) if m.post is None]
        fair = f"{arm.label} and uniform cannot be compared fairly."
        return f"{' and '.join(late)} never reached the forgetting target, so {fair}"
    if end is None or base_end is None:
        return ""
    return (
        f"At the end {_verdict(end, base_end, arm.label)}; no checkpoints were scored, so this is not at matched "
        "forgetting."
    )


def _by_exact_match(run: RunData, arm: Arm, baseline: Arm) -> str:
    """The same by exact match, where it is measured: 4-choice accuracy can sit at a ceiling that hides a difference."""
    pair = [arm_matched(run, each, "exact_match") for each in (arm, baseline)]
    values = [found.post for found in pair if found is not None and found.post is not None]
    return f" (by exact match {values[0]:.3f} against {values[1]:.3f})" if len(values) == 2 else ""


def _verdict(value: float, reference: float, label: str) -> str:
    gain = relative_gain(value, reference)
    numbers = f"{label} keeps {value:.3f} mean utility, uniform {reference:.3f}"
    if gain is None:
        return numbers
    if gain > 0.0005:
        return f"{numbers}: {gain:+.1%} for TRACE"
    if gain < -0.0005:
        return f"{numbers}: TRACE is worse, {gain:+.1%}"
    return f"{numbers}: TRACE is not better"


def summary_table(run: RunData) -> RichTable:
    """Models × headline scores for the terminal, with arrows for the good direction and a row for chance."""
    from rich.table import Table as RichTable
    from rich.text import Text

    evaluations = run.evaluations()
    columns = {
        (score.task, score.metric): score
        for role in ("forget", "utility")
        for evaluation in evaluations.values()
        for score in evaluation.headline(role)
    }
    table = RichTable(title=Text(run.title), caption="↓ lower is better, ↑ higher is better")
    table.add_column("model")
    for (task, metric), score in columns.items():
        table.add_column(Text(f"{task}\n{metric} {ARROWS[score.direction]}\n({score.role})"), justify="right")
    for name, evaluation in evaluations.items():
        values = [evaluation.value(task, metric) for task, metric in columns]
        table.add_row(Text(name), *("–" if value is None else f"{value:.3f}" for value in values))
    chances = [score.chance for score in columns.values()]
    if any(chance is not None for chance in chances):
        table.add_row("chance", *("–" if chance is None else f"{chance:.3f}" for chance in chances), style="dim")
    return table
