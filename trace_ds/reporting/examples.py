"""What the models say: a few questions before and after, and whether the text is still language.

Broken text is told by a measure that needs no model: the share of its words that repeat what was just said, or that
occur in no question, answer or text of the evaluation and in nothing that the original model wrote. A sound model has
some of the latter too, so the original's and the retrained model's shares stand beside it. Where models only pick,
perplexity on other text says whether they still speak.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trace_ds.reporting.gather import Evaluation, RunData
from trace_ds.reporting.tables import item_cells

EXAMPLES = 3
CLEARLY = 1 / 3  # of the words, above what sound models have: such a text is called broken
NOTED = 0.1  # the same of the mean over all texts
TEXTS = ("prompt", "text", "reference", "choices")


@dataclass(frozen=True)
class Said:
    """What one model answered; ``broken``: share of its words, None where it only picked a choice."""

    model: str
    text: str
    score: float | None
    broken: float | None
    is_broken: bool


@dataclass(frozen=True)
class Example:
    task: str
    asked: str
    said: list[Said]


def examples(run: RunData, role: str) -> list[Example]:
    """Up to three questions, evenly spaced through the task (not picked by outcome); free text where there is any."""
    evaluations = run.evaluations()
    original = evaluations.get("original") or next(iter(evaluations.values()), None)
    task = None if original is None else _task(original, role)
    if original is None or task is None:
        return []
    items, known = original.items[task], vocabulary(run)
    references = [run.references[name] for name in ("original", run.gold) if name in run.references]
    sound = max((_mean(each, known, [task]) or 0.0 for each in references), default=0.0)
    count = min(EXAMPLES, len(items))
    found = []
    for number in range(count):
        item = items[(2 * number + 1) * len(items) // (2 * count)]
        said = []
        for name, evaluation in evaluations.items():
            own = next((each for each in evaluation.items.get(task) or [] if each.get("id") == item.get("id")), None)
            if own is not None:
                _, _, text, score = item_cells(own)
                share = broken_share(own["continuation"], known) if "continuation" in own else None
                said.append(Said(name, text or "nothing", score, share, share is not None and share > sound + CLEARLY))
        found.append(Example(task, item_cells(item)[1], said))
    return found


def vocabulary(run: RunData) -> set[str]:
    """The words of all texts of the evaluation, and of what the original model wrote."""
    known: set[str] = set()
    for name, evaluation in run.references.items():
        keys = (*TEXTS, "continuation") if name == "original" else TEXTS
        for value in (item.get(key) for items in evaluation.items.values() for item in items for key in keys):
            for text in value if isinstance(value, list) else [value]:
                known.update(_words(str(text or "")))
    return known


def broken_share(text: str, known: set[str]) -> float:
    """Share of the words that repeat or are in no text; 1 for a text without words.

    The last word may be cut, and is left out of longer texts.
    """
    words = _words(text)
    words = words[:-1] if len(words) > 1 else words
    seen: set[tuple[str, str]] = set()
    bad = 0
    for before, word in zip(["", *words], words, strict=False):
        bad += word not in known or word == before or (before, word) in seen
        seen.add((before, word))
    return bad / len(words) if words else 1.0


def broken_by_model(run: RunData) -> dict[str, float]:
    """The mean share of broken words of every model that writes, over all its texts."""
    known = vocabulary(run)
    found = {name: _mean(evaluation, known) for name, evaluation in run.evaluations().items()}
    return {name: share for name, share in found.items() if share is not None}


def broken_text(run: RunData, final: Evaluation) -> list[str]:
    """A sentence, where a model's texts are clearly more broken than the original's."""
    known = vocabulary(run)
    mine, before = (_mean(evaluation, known) for evaluation in (final, run.references["original"]))
    if mine is None or before is None or mine <= before + NOTED:
        return []
    return [f"It writes broken text: {mine:.0%} of the words repeat or are no words ({before:.0%} before)."]


def fluency(run: RunData, final: Evaluation) -> list[str]:
    """A sentence with the perplexity on text to keep, before and after."""
    for score in run.references["original"].scores:
        after = final.value(score.task, score.metric)
        if score.metric == "perplexity" and score.role == "utility" and after is not None:
            name = score.task.replace("_", " ")
            return [f"Fluency (perplexity of {name}, lower is better): {after:.1f} after, {score.value:.1f} before."]
    return []


def _task(evaluation: Evaluation, role: str) -> str | None:
    """The first task of a role with free text, else with anything said."""
    roles = {score.task: score.role for score in evaluation.scores}
    told = [task for task, items in evaluation.items.items() if roles.get(task) == role and items]
    kinds = ("continuation", "predicted")
    return next((task for kind in kinds for task in told if kind in evaluation.items[task][0]), None)


def _mean(evaluation: Evaluation, known: set[str], tasks: Iterable[str] = ()) -> float | None:
    shares = [broken_share(text, known) for text in _written(evaluation, tasks or evaluation.items)]
    return sum(shares) / len(shares) if shares else None


def _written(evaluation: Evaluation, tasks: Iterable[str]) -> Iterator[str]:
    for task in tasks:
        items: list[dict[str, Any]] = evaluation.items.get(task) or []
        yield from (str(item["continuation"]) for item in items if item.get("continuation") is not None)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())
