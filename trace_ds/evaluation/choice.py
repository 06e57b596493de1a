"""Four-choice questions by the log-likelihood of the completions (the WMDP and MMLU pattern).

| metric          | what                                                              | range  | chance |
|-----------------|-------------------------------------------------------------------|--------|--------|
| accuracy        | the right choice has the largest summed log-probability           | 0 … 1  | 0.25   |
| accuracy_norm   | the same, divided by the characters of the choice                 | 0 … 1  | 0.25   |
| exact_match     | greedy decoding after the prompt gives the right choice, token for token | 0 … 1 | none |

Scored text: ``prompt + " " + choice``, with a BOS token before it where ``data.add_bos`` puts one before the documents
of the run. Ties go to the first choice. Higher means that the model knows more: good for utility tasks, bad for forget
tasks. Accuracy sits at a ceiling long before recall does; exact_match is the stricter one. Reference: accuracy and
accuracy_norm are ``acc`` and ``acc_norm`` of lm-evaluation-harness (multiple_choice) of texts that begin alike. The
harness leaves the BOS token to the tokenizer: where that adds none by itself and ``data.add_bos`` does (or the other
way round), its numbers are those of another text, which a model can find harder. Greedy decoding reproduces a text
exactly if and only if every one of its tokens is the argmax given the tokens before it, so exact_match needs no
generation.

Shape legend: I items, C choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.evaluation.items import CHOICES, ChoiceItem
from trace_ds.evaluation.language_model import LanguageModel, TokenScores

CHANCE = 1 / CHOICES


@dataclass(frozen=True)
class ChoiceResult:
    """Per item: ``log_prob_IC`` float64 (summed), predictions int64 [I], and bool [I] for exact match."""

    log_prob_IC: np.ndarray
    predicted_I: np.ndarray
    predicted_norm_I: np.ndarray
    answer_I: np.ndarray
    exact_I: np.ndarray

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """The three metrics over all items, or over those of a bool mask [I]."""
        mask_I = np.ones(len(self.answer_I), dtype=bool) if chosen_I is None else chosen_I
        if not mask_I.any():
            raise ValueError("a metric over no items")
        return {
            "accuracy": float(np.mean((self.predicted_I == self.answer_I)[mask_I])),
            "accuracy_norm": float(np.mean((self.predicted_norm_I == self.answer_I)[mask_I])),
            "exact_match": float(np.mean(self.exact_I[mask_I])),
        }


def decide(items: list[ChoiceItem], scores: list[TokenScores]) -> ChoiceResult:
    """From the token scores of all completions (item by item, choice by choice) to decisions; pure."""
    if len(scores) != len(items) * CHOICES:
        raise ValueError(f"{len(scores)} scores for {len(items)} items of {CHOICES} choices")
    log_prob_IC = np.array([score.log_prob.sum(dtype=np.float64) for score in scores]).reshape(-1, CHOICES)
    characters_IC = np.array([[len(choice) for choice in item.choices] for item in items], dtype=np.float64)
    exact_IC = np.array([bool(score.is_argmax.all()) for score in scores]).reshape(-1, CHOICES)
    answer_I = np.array([item.answer for item in items])
    return ChoiceResult(
        log_prob_IC,
        log_prob_IC.argmax(1),
        (log_prob_IC / characters_IC).argmax(1),
        answer_I,
        exact_IC[np.arange(len(items)), answer_I],
    )


def evaluate_choice(
    model: LanguageModel, items: list[ChoiceItem], where: str, advance: Callable[[int], None] | None = None
) -> ChoiceResult:
    """Score all choices of all items with a model; ``advance`` counts completions."""
    sequences = [
        model.encode_completion(item.prompt, " " + choice, f"{where} item {item.id}")
        for item in items
        for choice in item.choices
    ]
    return decide(items, model.score(sequences, advance))


def item_logs(items: list[ChoiceItem], result: ChoiceResult) -> list[dict[str, object]]:
    """One JSON-ready record per item."""
    return [
        {
            "id": item.id,
            "source": item.source,
            "prompt": item.prompt,
            "choices": list(item.choices),
            "answer": item.answer,
            "predicted": int(result.predicted_I[number]),
            "predicted_norm": int(result.predicted_norm_I[number]),
            "correct": bool(result.predicted_I[number] == item.answer),
            "exact": bool(result.exact_I[number]),
            "log_prob": [round(float(value), 6) for value in result.log_prob_IC[number]],
        }
        for number, item in enumerate(items)
    ]


def by_source(items: list[ChoiceItem], result: ChoiceResult) -> dict[str, dict[str, float]]:
    """The metrics and the number of items of each source, sorted by name."""
    sources = np.array([item.source for item in items])
    return {
        str(source): {"n": int((sources == source).sum()), **result.metrics(sources == source)}
        for source in np.unique(sources)
    }
