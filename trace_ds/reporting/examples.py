"""What the models say: a few questions before and after, and whether the text is still language.

Broken text is measured without a model: the share of its words that repeat what was just said, or that occur in no
question, answer or text of the evaluation and in nothing else that the original model wrote. A sound model has some of
the latter too, so the original's and the retrained model's shares stand beside it. Where models only pick, perplexity
on other text says whether they still speak.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

from trace_ds.reporting.gather import Evaluation, RunData
from trace_ds.reporting.tables import item_cells

EXAMPLES = 3
CLEARLY = 0.15  # of the words, above what sound models have: such a text is called broken
NOTED = 0.1  # the same of the mean over all texts
TEXTS = ("prompt", "text", "reference", "choices")


@dataclass(frozen=True)
class Answered:
    model: str
    text: str
    score: float | None
    wrote: bool  # free text, no choice
    is_broken: bool


@dataclass(frozen=True)
class Example:
    question: str
    answers: list[Answered]


def examples(run: RunData, role: str, main: str) -> list[Example]:
    """Up to three questions of a task, of free text where there is any, in proportion to how they came out: the middle
    of each third, from those that the model ``main`` answers worst to those that it answers best."""
    evaluations = run.evaluations()
    task = _task(evaluations[main], role) if main in evaluations else None
    if task is None:
        return []
    known, references = vocabulary(run), [run.references[n] for n in ("original", run.gold) if n in run.references]
    sound = max((_mean(each, known, task) or 0.0 for each in references), default=0.0)
    items = sorted(evaluations[main].items[task], key=lambda item: item_cells(item)[3] or 0.0)
    count = min(EXAMPLES, len(items))
    by_id = {name: {each.get("id"): each for each in one.items.get(task) or []} for name, one in evaluations.items()}
    found = []
    for item in (items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)):
        answers = []
        for name, own in ((name, logs[item.get("id")]) for name, logs in by_id.items() if item.get("id") in logs):
            _, _, text, score = item_cells(own)
            wrote = own.get("continuation")
            bad = wrote is not None and broken_share(str(wrote), known, name == "original") > sound + CLEARLY
            answers.append(Answered(name, text or "nothing", score, wrote is not None, bad))
        found.append(Example(item_cells(item)[1], answers))
    return found


def vocabulary(run: RunData) -> Counter[str]:
    """In how many texts a word (or a run of punctuation) is: those of the evaluation, and the original model's own."""
    known: Counter[str] = Counter()
    for name, evaluation in run.references.items():
        keys = (*TEXTS, "continuation") if name == "original" else TEXTS
        for value in (item.get(key) for items in evaluation.items.values() for item in items for key in keys):
            for text in value if isinstance(value, list) else [value]:
                known.update(set(_words(str(text or ""))))
    return known


def broken_share(text: str, known: Counter[str], own: bool = False) -> float:
    """Share of the words that repeat or are in no text; 1 for a text without words.

    The last word may be cut, and is left out of longer texts. ``own``: the text itself is among those counted.
    """
    words = _words(text)
    words = words[:-1] if len(words) > 1 else words
    seen: set[tuple[str, str]] = set()
    bad = 0
    for before, word in zip(["", *words], words, strict=False):
        bad += known[word] <= own or word == before or (before, word) in seen
        seen.add((before, word))
    return bad / len(words) if words else 1.0


def broken_by_model(run: RunData) -> dict[str, float]:
    """The mean share of broken words of every model that writes, over all its texts."""
    known = vocabulary(run)
    found = {name: _mean(evaluation, known) for name, evaluation in run.evaluations().items()}
    return {name: share for name, share in found.items() if share is not None}


def broken_text(run: RunData, label: str) -> list[str]:
    """A sentence, where a model's texts are clearly more broken than the original's."""
    shares = broken_by_model(run)
    mine, before = shares.get(label, 0.0), shares.get("original", 1.0)
    if mine <= before + NOTED:
        return []
    return [f"It writes broken text: {mine:.0%} of the words repeat or are no words ({before:.0%} before)."]


def perplexity_task(run: RunData) -> str | None:
    """The first task of text to keep whose perplexity tells whether a model still speaks."""
    found = (score for evaluation in run.evaluations().values() for score in evaluation.scores)
    return next((s.task for s in found if (s.metric, s.role) == ("perplexity", "utility")), None)


def fluency(run: RunData, final: Evaluation) -> list[str]:
    """A sentence with the perplexity on text to keep, before and after."""
    task = perplexity_task(run)
    values = [model.value(task, "perplexity") for model in (final, run.references["original"])] if task else [None]
    if task is None or None in values:
        return []
    text = "{:.1f} after, {:.1f} before".format(*values)
    return [f"Fluency (perplexity of {task.replace('_', ' ')}, lower is better): {text}."]


def _task(evaluation: Evaluation, role: str) -> str | None:
    """The first task of a role with free text, else with any answers."""
    tasks = dict.fromkeys(score.task for score in evaluation.scores if score.role == role)
    first = {task: items[0] for task in tasks if (items := evaluation.items.get(task))}
    return next((task for kind in ("continuation", "predicted") for task in first if kind in first[task]), None)


def _mean(evaluation: Evaluation, known: Counter[str], task: str | None = None) -> float | None:
    items = [item for name, logs in evaluation.items.items() if task in (None, name) for item in logs]
    texts = [str(item["continuation"]) for item in items if item.get("continuation") is not None]
    shares = [broken_share(text, known, evaluation.model == "original") for text in texts]
    return sum(shares) / len(shares) if shares else None


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+|[^\w\s]{2,}", text.lower())
