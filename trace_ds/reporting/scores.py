"""The table of scores, what counts as forgotten, and every arm at matched forgetting."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trace_ds.evaluation.table import ARROWS
from trace_ds.reporting.compare import models
from trace_ds.reporting.gather import Arm, Evaluation, RunData, Score
from trace_ds.reporting.intervals import Interval, of_mixes, t_interval
from trace_ds.reporting.matched import Reached, reached

if TYPE_CHECKING:
    from rich.table import Table as RichTable

MOMENTS = ("crossing", "after", "end")  # where the target is met; on average from there on; after the last step
CHANCE_MARGIN = 0.02  # without a gold model: forgotten = at most two points above guessing


def score_records(run: RunData, others: Iterable[RunData] = ()) -> list[dict[str, Any]]:
    """``scores.json``: a sorted list of ``{model, task, metric, value}``; other runs' models are ``RUN/MODEL``.

    A value that is not finite is None.
    """
    records = [
        {"model": name, "task": s.task, "metric": s.metric, "value": s.value if math.isfinite(s.value) else None}
        for name, evaluation, _ in models([run, *others])
        for s in evaluation.scores
    ]
    return sorted(records, key=lambda record: (record["model"], record["task"], record["metric"]))


@dataclass(frozen=True)
class Targets:
    """What counts as forgotten: one target per forget task, and where it comes from."""

    tasks: list[Score]  # the headline forget scores (of the model that defined them)
    values: list[float]
    origin: str  # in words


def targets(run: RunData) -> Targets | None:
    """The gold model's forget scores; else chance + 2 points; None when there is neither."""
    gold = run.references.get(run.gold)
    if gold is not None and gold.headline("forget"):
        tasks = gold.headline("forget")
        return Targets(tasks, [task.value for task in tasks], "what a model scores that never saw the text")
    some = next((e for e in run.evaluations().values() if e.headline("forget")), None)
    if some is None:
        return None
    tasks = some.headline("forget")
    if any(task.chance is None for task in tasks):
        return None
    return Targets(tasks, [float(task.chance or 0.0) + CHANCE_MARGIN for task in tasks], "2 points above guessing")


def excess(evaluation: Evaluation, goal: Targets) -> float | None:
    """Largest distance of a model's forget scores above their targets (<= 0: forgotten); None if one is missing."""
    left = []
    for task, level in zip(goal.tasks, goal.values, strict=True):
        value = evaluation.value(task.task, task.metric)
        if value is None or math.isnan(value):
            return None
        left.append(value - level if task.direction == "lower" else level - value)
    return max(left)


def role_scores(evaluation: Evaluation, role: str, metric: str | None = None) -> list[Score]:
    """The scores of a role that ``metric`` (default: each task's headline) gives.

    Only those that point the role's usual way: forget lower, utility higher is better.
    """
    usual = "lower" if role == "forget" else "higher"
    found = evaluation.headline(role) if metric is None else [s for s in evaluation.scores if s.metric == metric]
    return [score for score in found if score.role == role and score.direction == usual]


def mean_score(evaluation: Evaluation, role: str, metric: str | None = None) -> float | None:
    """The mean of :func:`role_scores`; None when there are none."""
    values = [score.value for score in role_scores(evaluation, role, metric)]
    return math.fsum(values) / len(values) if values else None


def utility_metrics(run: RunData) -> list[str]:
    """The metrics utility can be averaged by, besides the headline, in order of appearance."""
    found = [score for e in run.evaluations().values() for score in e.scores if score.role == "utility"]
    return list(dict.fromkeys(score.metric for score in found if score.direction == "higher"))


def arm_points(run: RunData, arm: Arm) -> list[tuple[int, Evaluation]]:
    """The scored models of an arm by step: the original at 0, each checkpoint, and the final model at its step.

    The final model's step is the last one of its log, else of its checkpoints; a final model whose step is not known
    comes one step after all others. Only tasks that all of them were asked are kept: a job's own curve may have fewer.
    """
    points = dict(arm.checkpoints)
    if "original" in run.references:
        points.setdefault(0, run.references["original"])
    if arm.final is not None:
        last = int(arm.log[-1]["step"]) if arm.log else None
        if last is None or last < max(points, default=0):
            last = max(arm.checkpoints, default=max(points, default=0) + 1)
        if last not in points or not points[last].items:
            points[last] = arm.final
    common = set.intersection(*({score.task for score in each.scores} for each in points.values())) if points else set()
    kept = {s: replace(e, scores=[score for score in e.scores if score.task in common]) for s, e in points.items()}
    return sorted(kept.items())


@dataclass(frozen=True)
class Way:
    """The scored models of an arm by step, from the original on, and where its forget scores met the target."""

    steps: list[int]
    models: list[Evaluation]
    met: Reached | None
    on_the_way: bool  # whether checkpoints were scored: end points alone are not at matched forgetting
    end: Evaluation  # the final model, by all that it was asked

    @property
    def crossing(self) -> tuple[float, int] | None:
        """The step at which the line between two scored steps meets the target, and how far these are apart."""
        if self.met is None or not self.on_the_way:
            return None
        here = self.steps[self.met.index]
        spacing = here - self.steps[self.met.index - 1] if self.met.index else 0
        return here - (1 - self.met.share) * spacing, spacing

    def mix(self, at: str) -> list[tuple[float, Evaluation]] | None:
        """The models whose weighted mean is the arm at a moment of :data:`MOMENTS`; None where there was no such."""
        if at == "end":
            return [(1.0, self.end)]
        if self.met is None or not self.on_the_way:
            return None
        index, share = self.met.index, self.met.share
        if at == "after":
            return [(1 / len(self.models[index:]), model) for model in self.models[index:]]
        before = [(1 - share, self.models[index - 1])] if share < 1 else []
        return [*before, (share, self.models[index])]


def way_of(run: RunData, label: str) -> Way | None:
    """None where no model of the arm has been scored."""
    arm, goal = next((arm for arm in run.arms if arm.label == label), None), targets(run)
    if arm is None or (arm.final is None and not arm.checkpoints):
        return None
    points = arm_points(run, arm)
    if goal is not None:
        asked = {score.task for score in points[-1][1].scores}
        kept = [(task, level) for task, level in zip(goal.tasks, goal.values, strict=True) if task.task in asked]
        goal = Targets([task for task, _ in kept], [level for _, level in kept], goal.origin) if kept else None
    lefts = [excess(model, goal) if goal is not None else None for _, model in points]
    met = reached([math.nan if left is None else left for left in lefts], 0.0)
    models = [model for _, model in points]
    return Way([step for step, _ in points], models, met, bool(arm.checkpoints and goal), arm.final or models[-1])


@dataclass(frozen=True)
class Difference:
    """Mean utility of an arm and of the baseline, and the interval of what lies between (None: nothing gives one)."""

    mine: float
    base: float
    interval: Interval | None

    @property
    def value(self) -> float:
        return self.mine - self.base

    @property
    def sign(self) -> int:
        """1 better, -1 worse, 0 not shown: the interval holds 0, or the two are equal."""
        clear = math.isfinite(self.value) and self.value != 0 and (self.interval is None or self.interval.excludes_zero)
        return int(math.copysign(1, self.value)) if clear else 0


@dataclass(frozen=True)
class Standing:
    """An arm at matched forgetting and at the end, mean over its runs.

    Attributes:
        step: at which it met the target, between two scored steps; None where it was not scored on the way, or (in one
            of several runs) never met it.
        spacing: how many steps these two are apart (the most, over the runs).
        utility, against: by moment of :data:`MOMENTS`; the latter beside the baseline, paired by question within a run
            and by seed over several.
        late: whether it was scored on the way and never met the target.
        better: in how many runs it is above the baseline on average after the crossing.
        tasks: by which utility is compared.
    """

    label: str
    step: float | None
    spacing: int
    utility: dict[str, float | None]
    against: dict[str, Difference | None]
    late: bool
    better: int
    tasks: tuple[str, ...]


def standing(runs: Sequence[RunData], label: str, baseline: str | None, metric: str | None = None) -> Standing | None:
    """One arm of runs that repeat each other; None where a run has no scores of it.

    ``metric`` is what utility is averaged by (default: headlines); forgetting is always by the headlines.
    """
    ways = [way for run in runs if (way := way_of(run, label)) is not None]
    if len(ways) < len(runs):
        return None
    others = [None if baseline in (None, label) else way_of(run, str(baseline)) for run in runs]
    utility: dict[str, float | None] = {}
    against: dict[str, Difference | None] = {}
    better = 0
    for at in MOMENTS:
        mine = [way.mix(at) for way in ways]
        base = [None if way is None else way.mix(at) for way in others]
        utility[at] = _mean_of([None if each is None else _utility(each, metric) for each in mine])
        pairs = [_difference(a, b, metric) for a, b in zip(mine, base, strict=True) if a is not None and b is not None]
        known = [pair for pair in pairs if pair is not None]
        against[at] = _over_runs(known) if len(known) == len(runs) else None
        if at == "after":
            better = sum(pair.value > 0 for pair in known)
    met = [way.crossing for way in ways]
    step = _mean_of([each and each[0] for each in met])
    late = any(way.on_the_way and way.met is None for way in ways)
    tasks = tuple(score.task for score in role_scores(ways[0].models[-1], "utility", metric))
    return Standing(
        label, step, max((each[1] for each in met if each), default=0), utility, against, late, better, tasks
    )


Mix = Sequence[tuple[float, Evaluation]]


def _utility(mix: Mix, metric: str | None) -> float | None:
    values = [(weight, mean_score(model, "utility", metric)) for weight, model in mix]
    known = [weight * value for weight, value in values if value is not None]
    return math.fsum(known) if len(known) == len(values) else None


def _difference(mine: Mix, base: Mix, metric: str | None) -> Difference | None:
    """Of two mixes of models, by the tasks that all of them were asked, with its interval."""
    asked = [{score.task for score in model.scores} for mix in (mine, base) for _, model in mix]
    common = set.intersection(*asked)
    mine, base = (
        [
            (share, replace(model, scores=[score for score in model.scores if score.task in common]))
            for share, model in mix
        ]
        for mix in (mine, base)
    )
    values = [_utility(mix, metric) for mix in (mine, base)]
    if values[0] is None or values[1] is None:
        return None
    return Difference(values[0], values[1], of_mixes([mine, base], role_scores(mine[-1][1], "utility", metric)))


def _over_runs(found: Sequence[Difference]) -> Difference:
    if len(found) == 1:
        return found[0]
    mine, base = (math.fsum(values) / len(found) for values in zip(*((d.mine, d.base) for d in found), strict=True))
    return Difference(mine, base, t_interval([each.value for each in found]))


def _mean_of(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known and len(known) == len(values) else None


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
