"""What a run shows, in words: one sentence and the answers to four questions, for page, model card and terminal.

    verdict(gather(Path("runs/mine"))).sentence

Scores are in 0 … 1, as in plots and tables. Every number is computed from the artefacts, of models that were scored; a
method that does not win is said not to.
"""

from __future__ import annotations

from dataclasses import dataclass

from trace_ds.evaluation.metrics import FORGET_QUALITY
from trace_ds.reporting.gather import Evaluation, RunData, Score
from trace_ds.reporting.intervals import Interval, of_score
from trace_ds.reporting.scores import (
    Difference,
    Standing,
    TaskChange,
    difference,
    forgotten,
    mean_score,
    outcome_of,
    role_scores,
    standing,
)

FORGOT: dict[TaskChange | None, tuple[str, str, str]] = {  # the sentence's words, the answer, and a note
    None: (
        " cannot be said to have forgotten",
        "Not known",
        "No forget task has a model that never saw the text, or a chance level, to compare with.",
    ),
    "nothing": (
        " had nothing to forget",
        "Nothing to forget",
        "The original model does not clearly know more than the target.",
    ),
    "kept": (" forgot nothing", "No", "The change is not clear: its 95 % interval holds 0, or the score rose."),
    "partly": (" did not forget enough", "Not enough", "It fell, and is still above the target."),
    "forgotten": (" forgot what it should", "Yes", ""),
}
HOW_SURE = (
    "Brackets: 95 % intervals from the number of questions. Another training run can differ by more.",
    "One seed is no proof: repeat with other seeds (`trace-ds bench`) before you believe a difference.",
)


@dataclass(frozen=True)
class Answer:
    """A question about a run, its answer in one sentence, and notes on it."""

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


def verdict(run: RunData) -> Verdict:
    """What a run shows."""
    finals = [arm for arm in run.arms if arm.final is not None]
    if "original" not in run.references or not finals:
        return Verdict(
            "Nothing to conclude yet: the original and at least one unlearned model must be evaluated first."
        )
    main = next((arm for arm in finals if arm.is_trace), finals[0])
    baseline = run.baseline
    outcome, words, answer = _forgot(run, main.label)
    parts = [(words, answer), _cost(run, main.label, baseline.label if baseline else None)]
    if baseline is not None and main.is_trace and outcome not in ("nothing", "kept"):
        mine, base = (standing(run, arm.label, baseline.label) for arm in (main, baseline))
        if mine is not None and base is not None and mine.utility["end"] is not None:
            parts.append(_against(mine, base, len(role_scores(_final(run, main.label), "utility"))))
    words = "TRACE" if main.is_trace else f"{main.title} ({main.rule or 'unknown'} weights)"
    words += "".join(part for part, _ in parts)
    if baseline is None or not main.is_trace:
        words += f"; no {'uniform' if main.is_trace else 'TRACE-weighted'} run stands beside it"
    sure = Answer("How sure is that?", "One run: not very", HOW_SURE)
    return Verdict(words + ".", (*(answer for _, answer in parts), sure))


def _forgot(run: RunData, label: str) -> tuple[TaskChange | None, str, Answer]:
    """What became of the knowledge, how the sentence begins, and the answer."""
    final, original = _final(run, label), run.references["original"]
    tasks = forgotten(run, final)
    outcome = outcome_of(tasks)
    words, answer, note = FORGOT[outcome]
    details = []
    for each in tasks:
        if each.after.metric == FORGET_QUALITY:  # a p-value: as it is
            after, before, level = f"{each.after.value:.3g}", f"{each.before.value:.3g}", "is"
        else:
            after = f"{each.after.value:.3f}{_band(of_score(each.after))}"
            before, level = f"{each.before.value:.3f}", f"is at most {each.target.level:.3f},"
        details.append(f"{_name(each.after)}: {after} after, {before} before; forgotten {level} {each.target.origin}.")
    for score in final.headline("forget"):  # best at a reference: shown, and in no mean
        earlier = original.find(score.task, score.metric)
        if score.direction == "reference" and earlier is not None:
            values = f"{score.value:.3g} after, {earlier.value:.3g} before"
            details.append(f"{_name(score)}: {values}; best is the reference.")
    return outcome, words, Answer("Did it forget?", answer, (*details, *([note] if note else [])))


def _cost(run: RunData, label: str, baseline: str | None) -> tuple[str, Answer]:
    question, final = "What did it cost?", _final(run, label)
    before, after = (mean_score(model, "utility") for model in (run.references["original"], final))
    change = difference([final], [run.references["original"]])
    if before is None or after is None or change is None:
        note = "No utility task was evaluated, so what the forgetting cost is unknown."
        return ", at a cost that was not measured", Answer(question, "Not measured", (note,))
    other = mean_score(_final(run, baseline), "utility") if baseline not in (None, label) else None
    beside = "" if other is None else f"; {other:.3f} with uniform weights"
    scores = role_scores(final, "utility")
    shown = f"{after:.3f} after, {before:.3f} before{beside}"
    details = [f"{' and '.join(map(_name, scores))}: {shown}; change {_signed(change)}."]
    if change.value == 0:
        words, answer = f", and its utility did not change ({after:.3f})", "Nothing"
    elif change.sign == 0:
        words = f", with no clear change of utility ({after:.3f} after, {before:.3f} before)"
        answer = "Nothing clear"
    elif change.sign > 0:
        words, answer = f" and gained {change.value:.3f} of utility", "Nothing: utility rose"
    else:
        words = f" and kept a utility of {after:.3f} ({before:.3f} before)"
        answer = f"{before - after:.3f} of utility"
    return words, Answer(question, answer, (*details, *_fluency(run, label)))


def _against(mine: Standing, base: Standing, tasks: int) -> tuple[str, Answer]:
    """How the sentence ends, and the answer; ``tasks``: how many give the utility after the last step."""
    question = "Is TRACE better than uniform weights?"
    after, first, end = (mine.against[moment] for moment in ("after", "first", "end"))
    if after is None or first is None or mine.step is None or base.step is None:
        late = " and ".join(each.title for each in (mine, base) if each.late)
        why = f"{late} never met the forgetting target" if late else "nothing was scored on the way"
        details = [f"{why[0].upper()}{why[1:]}, so the two cannot be compared at the same forgetting."]
        words = f"; whether it is better than uniform weights is open, since {why}"
        if end is not None:
            details.append(f"At the end: {_sides(end)}.")
            words += f" (at the end: {_signed(end)})"
        return words, Answer(question, "Open", tuple(details))
    short_of = {1: "yes", 0: "not shown", -1: "worse"}
    short = short_of[after.sign]
    if after.sign != first.sign:
        short = f"on average {short}, at first {short_of[first.sign]}"
    near = f"{mine.spacing} steps after the score before it" if mine.spacing else "the first one scored"
    details = [
        f"On average once forgotten: {_sides(after)}.",
        f"At the first scored step that had forgotten ({mine.step} against {base.step}; {near}): {_sides(first)}.",
    ]
    if len(mine.tasks) < tasks:
        details.append(f"By the tasks that were scored on the way: {', '.join(mine.tasks)}.")
    words = f"is not clearly different on average once it has forgotten ({_signed(after)})"
    if after.sign:
        band = after.interval
        ends = Interval(*sorted((abs(band.low), abs(band.high)))) if band else None
        more = "more" if after.sign > 0 else "less"
        words = f"keeps {abs(after.value):.3f} {more} utility on average once it has forgotten{_band(ends)}"
    return f"; against uniform weights it {words}", Answer(question, short[0].upper() + short[1:], tuple(details))


def _fluency(run: RunData, label: str) -> list[str]:
    """A sentence with the perplexity of the first text to keep, before and after."""
    original, final = run.references["original"], _final(run, label)
    task = next((s.task for s in final.scores if (s.role, s.metric) == ("utility", "perplexity")), "")
    before, after = (model.value(task, "perplexity") for model in (original, final))
    if after is None or before is None:
        return []
    text = task.replace("_", " ")
    return [f"Fluency (perplexity of {text}, lower is better): {after:.1f} after, {before:.1f} before."]


def _final(run: RunData, label: str | None) -> Evaluation:
    return next(arm.final for arm in run.arms if arm.label == label and arm.final is not None)


def _name(score: Score) -> str:
    return f"{score.task} ({score.metric})".replace("_", " ")


def _band(band: Interval | None, sign: str = "") -> str:
    return "" if band is None else f" [{band.low:{sign}.3f}, {band.high:{sign}.3f}]"


def _signed(gap: Difference) -> str:
    """A difference with its interval."""
    return f"{gap.value:+.3f}{_band(gap.interval, '+')}".replace("-", "−")


def _sides(gap: Difference) -> str:
    return f"{gap.mine:.3f} against {gap.base:.3f}, {_signed(gap)}"
