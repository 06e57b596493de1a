"""What a run shows, in words: one sentence and the answers to four questions, for the page and for the terminal.

    verdict(gather(Path("runs/mine"))).sentence

Scores are told in points, 0 to 100. Every number is computed here from the artefacts, and a method that does not win is
said not to. Runs that differ only in their seed are told as one: means, Student's t, differences paired by seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trace_ds.reporting.compare import averaged
from trace_ds.reporting.examples import broken_text, fluency
from trace_ds.reporting.gather import Evaluation, RunData, Score
from trace_ds.reporting.intervals import of_mean
from trace_ds.reporting.matched import TOLERANCE
from trace_ds.reporting.scores import Difference, Standing, excess, mean_score, role_scores, standing, targets


@dataclass(frozen=True)
class Answer:
    question: str
    answer: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """One sentence, and the questions of whoever sees a run for the first time."""

    sentence: str
    answers: tuple[Answer, ...] = ()

    @property
    def lines(self) -> list[str]:
        """Sentence and answers, one a line, for a terminal or a model card."""
        return [self.sentence, *(f"{a.question} {a.answer}. {' '.join(a.details)}" for a in self.answers)]


def verdict(run: RunData, repeats: Sequence[RunData] = ()) -> Verdict:
    """What ``run`` shows, together with the runs that repeat it with other seeds."""
    runs = [run, *repeats]
    finals = [arm for arm in run.arms if arm.final is not None]
    if "original" not in run.references or not finals:
        return Verdict(
            "Nothing to conclude yet: the original and at least one unlearned model must be evaluated first."
        )
    main = next((arm for arm in finals if arm.is_trace), finals[0])
    baseline, whole = run.baseline, averaged(runs)
    parts = [_forgot(whole, main.label), _cost(whole, main.label, baseline.label if baseline else None)]
    better = None
    if baseline is not None and main.is_trace:
        mine, base = (standing(runs, arm.label, baseline.label) for arm in (main, baseline))
        if mine is not None and base is not None and mine.utility["end"] is not None:
            parts.append(_against(mine, base, len(role_scores(_final(whole, main.label), "utility"))))
            better = mine.better
    words = "TRACE" if main.is_trace else f"{main.label} ({main.rule or 'unknown'} weights)"
    words += "".join(part for part, _ in parts)
    if baseline is None or not main.is_trace:
        words += f"; no {'uniform' if main.is_trace else 'TRACE-weighted'} run stands beside it"
    return Verdict(words + ".", (*(answer for _, answer in parts), _sure(runs, better)))


def points(found: Difference) -> str:
    """A difference in points, with its interval."""
    band = found.interval
    told = "" if band is None else f" [{100 * band.low:+.1f}, {100 * band.high:+.1f}]"
    return f"{100 * found.value:+.1f}{told}".replace("-", "−")


def _forgot(run: RunData, label: str) -> tuple[str, Answer]:
    """How the sentence begins, and the answer."""
    question, goal, original = "Did it forget?", targets(run), run.references["original"]
    final = _final(run, label)
    left = excess(final, goal) if goal is not None else None
    before, start = mean_score(original, "forget"), excess(original, goal) if goal is not None else None
    if goal is None or left is None or before is None:
        note = "No forget task has a model that never saw the text, or a chance level, to compare with."
        return " cannot be said to have forgotten", Answer(question, "Not known", (note,))
    tasks = ", ".join(f"{task.task} ({task.metric.replace('_', ' ')})" for task in goal.tasks).replace("_", " ")
    numbers = (
        f"{tasks}: {_mean(role_scores(final, 'forget'), final)} of 100 after, {100 * before:.1f} before.",
        f"Forgotten is at most {100 * math.fsum(goal.values) / len(goal.values):.1f}, {goal.origin}.",
    )
    if start is not None and start <= TOLERANCE:
        note = "The original model is already at the target: there was nothing to forget."
        return " had nothing to forget", Answer(question, "Nothing to forget", (*numbers, note))
    if left <= TOLERANCE:
        return " forgot what it should", Answer(question, "Yes", numbers)
    return " did not forget enough", Answer(question, "Not enough", numbers)


def _cost(run: RunData, label: str, baseline: str | None) -> tuple[str, Answer]:
    question, final = "What did it cost?", _final(run, label)
    before, after = (mean_score(model, "utility") for model in (run.references["original"], final))
    if before is None or after is None:
        note = "No utility task was evaluated, so what the forgetting cost is unknown."
        return ", at a cost that was not measured", Answer(question, "Not measured", (note,))
    other = mean_score(_final(run, baseline), "utility") if baseline not in (None, label) else None
    beside = "" if other is None else f"; {100 * other:.1f} with uniform weights"
    shown = _mean(role_scores(final, "utility"), final)
    details = [f"What should stay: {shown} of 100 after, {100 * before:.1f} before{beside}."]
    broken = broken_text(run, final)
    details += broken + fluency(run, final)
    lost = 100 * (before - after)
    answer = f"{lost:.1f} points of utility" if lost > 0.05 else "Nothing measured"
    words = f" and kept {100 * after:.1f} of {100 * before:.1f} points of utility" + ", but writes broken text" * bool(
        broken
    )
    return words, Answer(question, answer, tuple(details))


def _against(mine: Standing, base: Standing, tasks: int) -> tuple[str, Answer]:
    """How the sentence ends, and the answer; ``tasks``: how many tell the utility after the last step."""
    question = "Is TRACE better than uniform weights?"
    after, crossing, end = (mine.against[at] for at in ("after", "crossing", "end"))
    if after is None or crossing is None or mine.step is None or base.step is None:
        late = " and ".join(found.label for found in (mine, base) if found.late)
        why = f"{late} never met the forgetting target" if late else "nothing was scored on the way"
        note = f"{why[0].upper()}{why[1:]}, so the two cannot be compared at the same forgetting."
        told = () if end is None else (f"At the end: {_sides(end)}.",)
        words = "" if end is None else f" (at the end: {points(end)} points)"
        sentence = f"; whether it is better than uniform weights is open, since {why}{words}"
        return sentence, Answer(question, "Open", (note, *told))
    short_of = {1: "yes", 0: "not shown", -1: "worse"}
    same = after.sign == crossing.sign
    short = short_of[after.sign]
    short = short if same else f"on average {short}, at the moment of forgetting {short_of[crossing.sign]}"
    near = f"between scored steps {mine.spacing} apart" if mine.spacing else "the first scored one"
    details: tuple[str, ...] = (
        f"On average once forgotten: {_sides(after)}.",
        f"At the moment of forgetting (step {mine.step:.0f} against {base.step:.0f}, {near}): {_sides(crossing)}.",
    )
    if len(mine.tasks) < tasks:
        details = (*details, f"By the tasks that were scored on the way: {', '.join(mine.tasks)}.")
    first = _more(after, "on average once it has forgotten", "keeps {} points")
    second = _more(crossing, "at the moment of forgetting", "{}" if after.sign else "keeps {}")
    sentence = f"; against uniform weights it {first}, {'and' if same else 'but'} {second}"
    return sentence, Answer(question, short[0].upper() + short[1:], details)


def _more(found: Difference, when: str, words: str) -> str:
    """A difference in words: so many points more or fewer, or none that is clear."""
    if found.sign == 0:
        return f"is not clearly different {when} ({points(found)})"
    band = found.interval
    ends = sorted(100 * abs(end) for end in (band.low, band.high)) if band else []
    told = f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else ""
    return f"{words.format(f'{100 * abs(found.value):.1f}')} {'more' if found.sign > 0 else 'fewer'} {when}{told}"


def _sure(runs: Sequence[RunData], better: int | None) -> Answer:
    question = "How sure is that?"
    if len(runs) == 1:
        details = (
            "Brackets: 95 % intervals from the number of questions. Another training run can differ by more.",
            "One seed is no proof: repeat with other seeds before you believe a difference.",
        )
        return Answer(question, "One run: not very", details)
    won = "" if better is None else f" TRACE is the better one on average in {better} of {len(runs)}."
    told = f"Means over runs; brackets: 95 % intervals (Student's t), differences paired by seed.{won}"
    return Answer(question, f"{len(runs)} runs, each with its own seed", (told,))


def _final(run: RunData, label: str | None) -> Evaluation:
    return next(arm.final for arm in run.arms if arm.label == label and arm.final is not None)


def _sides(found: Difference) -> str:
    return f"{100 * found.mine:.1f} against {100 * found.base:.1f}, {points(found)} points"


def _mean(scores: Sequence[Score], evaluation: Evaluation) -> str:
    """A mean in points, with its interval."""
    mean, band = math.fsum(score.value for score in scores) / len(scores), of_mean(scores, evaluation)
    return f"{100 * mean:.1f}" + ("" if band is None else f" [{100 * band.low:.1f}, {100 * band.high:.1f}]")
