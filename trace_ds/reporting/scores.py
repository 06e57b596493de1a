"""What counts as forgotten, whether a model has, and every arm at matched forgetting. Only scored models count: nothing
between two scored steps is guessed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from trace_ds.evaluation.metrics import ARROWS, FORGET_QUALITY
from trace_ds.reporting.gather import Arm, Evaluation, RunData, Score
from trace_ds.reporting.intervals import Interval, of_difference, of_mixes, of_score

if TYPE_CHECKING:
    from rich.table import Table as RichTable

# The first scored step at the target; on average from there on; the last step.
SCORING_MOMENTS = ("first", "after", "end")
CHANCE_MARGIN = 0.02  # without a gold model: forgotten = at most this above guessing
_TOLERANCE = 1e-9  # of a score at the target
NEGLIGIBLE = 0.01  # less above the target is nothing to forget, however sure
FORGOTTEN_P = 0.05  # TOFU: truth ratios that a test cannot tell from the retrained model's


def role_scores(evaluation: Evaluation, role: str) -> list[Score]:
    """The headline scores of a role that can be averaged: forget lower (or TOFU's forget quality), utility higher is
    better."""
    usual = "lower" if role == "forget" else "higher"
    return [s for s in evaluation.headline(role) if s.direction == usual or s.metric == FORGET_QUALITY]


def remaining(score: Score) -> float:
    """The knowledge that a score shows to remain: the score itself, or 1 minus it where more means forgotten."""
    return score.value if score.direction == "lower" else 1 - score.value


def mean_score(evaluation: Evaluation, role: str) -> float | None:
    """The mean of :func:`role_scores` (of what remains, for forget tasks); None when there are none."""
    return _mean_of([remaining(s) if role == "forget" else s.value for s in role_scores(evaluation, role)])


@dataclass(frozen=True)
class Target:
    """A forget score and the level (of :func:`remaining`) at or below which its task is forgotten."""

    score: Score  # of the model that defined it
    level: float
    origin: str


def targets(run: RunData) -> list[Target]:
    """The target of every headline forget task; empty when one has neither a retrained model's score nor a chance."""
    gold = run.references.get(run.gold)
    some = next((e for e in [gold, *run.evaluations().values()] if e is not None and role_scores(e, "forget")), None)
    result = []
    for score in role_scores(some, "forget") if some is not None else []:
        if score.metric == FORGET_QUALITY:
            result.append(Target(score, 1 - FORGOTTEN_P, f"TOFU's level, a p-value above {FORGOTTEN_P:g}"))
        elif some is gold:
            result.append(Target(score, score.value, "what a model scores that never saw the text"))
        elif score.chance is None:
            return []
        else:
            result.append(Target(score, score.chance + CHANCE_MARGIN, "0.02 above guessing"))
    return result


def excess(evaluation: Evaluation, target_scores: Sequence[Target]) -> float | None:
    """Largest distance of a model's forget scores above their targets (<= 0: forgotten); None if one is missing."""
    scores = [evaluation.find(target.score.task, target.score.metric) for target in target_scores]
    left = [remaining(s) - target.level for s, target in zip(scores, target_scores, strict=True) if s is not None]
    return max(left) if len(left) == len(target_scores) > 0 and not any(map(math.isnan, left)) else None


@dataclass(frozen=True)
class Difference:
    """Two numbers to compare, and the interval of what lies between them (None: nothing gives one)."""

    mine: float
    base: float
    interval: Interval | None

    @property
    def value(self) -> float:
        return self.mine - self.base

    @property
    def sign(self) -> int:
        """1 more, -1 less, 0 not shown: the interval holds 0, or the two are equal."""
        clear = math.isfinite(self.value) and self.value != 0 and (self.interval is None or self.interval.excludes_zero)
        return int(math.copysign(1, self.value)) if clear else 0


# nothing: the model never clearly knew more than the target; kept: its score did not clearly fall; partly: it fell, and
# is above the target; forgotten: it fell to the target. Clear is what the 95 % interval of the paired difference says.
TaskChange = Literal["nothing", "kept", "partly", "forgotten"]


@dataclass(frozen=True)
class Forgotten:
    """One forget task before and after."""

    target: Target
    before: Score
    after: Score
    outcome: TaskChange


def forgotten(run: RunData, final: Evaluation) -> list[Forgotten]:
    """How the score of each forget task changed; empty when a target or a score is missing."""
    original, gold, result = run.references["original"], run.references.get(run.gold), []
    for target in targets(run):
        task, metric = target.score.task, target.score.metric
        before, after = original.find(task, metric), final.find(task, metric)
        if before is None or after is None or not math.isfinite(before.value + after.value):
            return []
        reference = gold.find(task, metric) if gold is not None else None
        if metric == FORGET_QUALITY:
            band = None
        elif reference is not None and gold is not None:
            band = of_difference(before, original, gold)
        elif (band := of_score(before)) is not None:
            band = Interval(band.low - target.level, band.high - target.level)
        gap = Difference(remaining(before), target.level, band)
        fall = Difference(remaining(before), remaining(after), of_difference(before, original, final))
        outcome: TaskChange = "forgotten" if remaining(after) <= target.level + _TOLERANCE else "partly"
        if gap.sign <= 0 or gap.value < NEGLIGIBLE:
            outcome = "nothing"
        elif fall.sign <= 0:
            outcome = "kept"
        result.append(Forgotten(target, before, after, outcome))
    return result


def outcome_of(tasks: Sequence[Forgotten]) -> TaskChange | None:
    """One outcome over the tasks that the original model knew; None when that is not known."""
    outcomes = {task.outcome for task in tasks} - {"nothing"}
    if not tasks:
        return None
    return "nothing" if not outcomes else outcomes.pop() if len(outcomes) == 1 else "partly"


def arm_points(run: RunData, arm: Arm) -> list[tuple[int, Evaluation]]:
    """The scored models of an arm by step: the original at 0, each checkpoint, and the final model at its step.

    A final model whose step is not known is at the last scored one. Only tasks that all of them were asked are kept: a
    job's own curve may have fewer.
    """
    points = dict(arm.checkpoints)
    if "original" in run.references:
        points.setdefault(0, run.references["original"])
    if arm.final is not None:
        last = max(arm.steps or 0, max(arm.checkpoints, default=1))
        if last not in points or not points[last].items:
            points[last] = arm.final
    common = set.intersection(*({score.task for score in each.scores} for each in points.values())) if points else set()
    return [(step, _with_tasks(points[step], common)) for step in sorted(points)]


@dataclass(frozen=True)
class Trajectory:
    """The scored models of an arm by step, from the original on."""

    steps: list[int]
    models: list[Evaluation]
    first: int | None  # index of the first model at the target; None where none is, or only end points were scored
    on_the_way: bool  # whether checkpoints were scored: end points alone are not at matched forgetting
    final: Evaluation  # with all its scores

    @property
    def spacing(self) -> int:
        """Steps between the first scored step at the target and the scored step before it; 0: there is none."""
        return self.steps[self.first] - self.steps[self.first - 1] if self.first else 0

    def at(self, moment: str) -> list[Evaluation] | None:
        """The models whose mean is the arm's score at one of :data:`SCORING_MOMENTS`; None where there are none."""
        if moment == "end":
            return [self.final]
        return None if self.first is None else self.models[self.first :][: 1 if moment == "first" else None]


def trajectory(run: RunData, label: str | None) -> Trajectory | None:
    """The trajectory of the arm of this label; None where no model of it has been scored."""
    arm = next((arm for arm in run.arms if arm.label == label), None)
    if arm is None or (arm.final is None and not arm.checkpoints):
        return None
    points = arm_points(run, arm)
    tasks = {score.task for score in points[-1][1].scores}
    target_scores = [target for target in targets(run) if target.score.task in tasks]
    left = [excess(model, target_scores) for _, model in points]
    on_the_way = bool(arm.checkpoints and target_scores)
    met = [number for number, value in enumerate(left) if on_the_way and value is not None and value <= _TOLERANCE]
    models = [model for _, model in points]
    return Trajectory([s for s, _ in points], models, met[0] if met else None, on_the_way, arm.final or models[-1])


@dataclass(frozen=True)
class Standing:
    """An arm at matched forgetting and at the end; by moment of :data:`SCORING_MOMENTS`."""

    title: str
    step: int | None  # the first scored one at the target; None where it was not scored on the way or never met it
    spacing: int  # how many steps before it the one before was scored
    utility: dict[str, float | None]
    against: dict[str, Difference | None]  # beside the baseline, paired by question
    late: bool  # whether it was scored on the way and never met the target
    tasks: tuple[str, ...]  # by which utility is compared


def standing(run: RunData, label: str, baseline: str | None) -> Standing | None:
    """One arm of a run; None where no model of it has been scored."""
    mine, base = trajectory(run, label), None if baseline == label else trajectory(run, baseline)
    if mine is None:
        return None
    sides = {moment: (mine.at(moment), base.at(moment) if base else None) for moment in SCORING_MOMENTS}
    return Standing(
        run.title_of(label),
        None if mine.first is None else mine.steps[mine.first],
        mine.spacing,
        {moment: _utility(models) if models else None for moment, (models, _) in sides.items()},
        {moment: difference(a, b) if a and b else None for moment, (a, b) in sides.items()},
        mine.on_the_way and mine.first is None,
        tuple(score.task for score in role_scores(mine.models[-1], "utility")),
    )


def difference(mine: Sequence[Evaluation], base: Sequence[Evaluation]) -> Difference | None:
    """Mean utility of some models minus that of others, over the tasks that all have scores of, with its interval."""
    common = set.intersection(*({score.task for score in model.scores} for model in (*mine, *base)))
    mine, base = ([_with_tasks(model, common) for model in side] for side in (mine, base))
    values = [_utility(side) for side in (mine, base)]
    if values[0] is None or values[1] is None:
        return None
    return Difference(values[0], values[1], of_mixes([mine, base], role_scores(mine[-1], "utility")))


def _with_tasks(evaluation: Evaluation, tasks: set[str]) -> Evaluation:
    return replace(evaluation, scores=[score for score in evaluation.scores if score.task in tasks])


def _utility(models: Sequence[Evaluation]) -> float | None:
    return _mean_of([mean_score(model, "utility") for model in models])


def _mean_of(values: Sequence[float | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if numbers and len(numbers) == len(values) else None


def headline_table(run: RunData) -> tuple[list[Score], dict[str, list[float | None]]]:
    """The headline scores, forget tasks first, and each model's values of them."""
    models = run.evaluations()
    headlines = [score for role in ("forget", "utility") for each in models.values() for score in each.headline(role)]
    scores = list({(score.task, score.metric): score for score in headlines}.values())
    return scores, {name: [one.value(s.task, s.metric) for s in scores] for name, one in models.items()}


def summary_table(run: RunData) -> RichTable:
    """Models × headline scores for the terminal, with arrows for the good direction and a row for chance."""
    from rich.table import Table as RichTable
    from rich.text import Text

    scores, rows = headline_table(run)
    table = RichTable(title=Text(run.title), caption="↓ lower is better, ↑ higher is better")
    table.add_column("model")
    for score in scores:
        name = f"{score.task}\n{score.metric} {ARROWS[score.direction]}\n({score.role})"
        table.add_column(Text(name), justify="right")
    if any(score.chance is not None for score in scores):
        rows["chance"] = [score.chance for score in scores]
    for label, values in rows.items():
        name = run.title_of(label)
        style = "dim" if name == "chance" else None
        table.add_row(Text(name), *("–" if value is None else f"{value:.3f}" for value in values), style=style)
    return table
