"""Four-choice questions by the log-likelihood of the completions (the WMDP and MMLU pattern).

Scored text: ``prompt + " " + choice``, with a BOS token before it where ``data.add_bos`` puts one before the documents
of the run. Ties go to the first choice. Higher means that the model knows more: good for utility tasks, bad for forget
tasks. Accuracy sits at a ceiling long before recall does; exact_match is the stricter one. Reference: accuracy and
accuracy_norm are ``acc`` and ``acc_norm`` of lm-evaluation-harness (multiple_choice) of texts that begin alike. The
harness leaves the BOS token to the tokenizer: where that adds none by itself and ``data.add_bos`` does (or the other
way round), its numbers are those of another text, which a model can find harder. Greedy decoding reproduces a text
exactly if and only if every one of its tokens is the argmax given the tokens before it, so exact_match needs no
generation. choice_probability does not sit at a ceiling: softmax over the choices of their log-probabilities (our
decision: summed over tokens, as accuracy compares them).

Shape legend: I items, C choices.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trace_ds.evaluation.items import CHOICES, ChoiceItem
from trace_ds.evaluation.language_model import LanguageModel, TokenScores
from trace_ds.evaluation.outcome import Outcome, rounded


def decide(items: list[ChoiceItem], scores: list[TokenScores]) -> Outcome:
    """From the token scores of all completions (item by item, choice by choice) to decisions; pure."""
    from scipy.special import softmax

    if len(scores) != len(items) * CHOICES:
        raise ValueError(f"{len(scores)} scores for {len(items)} items of {CHOICES} choices")
    log_prob_IC = np.array([score.log_prob.sum(dtype=np.float64) for score in scores]).reshape(-1, CHOICES)
    characters_IC = np.array([[len(choice) for choice in item.choices] for item in items], dtype=np.float64)
    exact_IC = np.array([bool(score.is_argmax.all()) for score in scores]).reshape(-1, CHOICES)
    answer_I = np.array([item.answer for item in items])
    predicted_I, predicted_norm_I = log_prob_IC.argmax(1), (log_prob_IC / characters_IC).argmax(1)
    exact_I = exact_IC[np.arange(len(items)), answer_I]
    logs = [
        {
            "id": item.id,
            "source": item.source,
            "prompt": item.prompt,
            "choices": list(item.choices),
            "answer": item.answer,
            "predicted": int(predicted_I[number]),
            "predicted_norm": int(predicted_norm_I[number]),
            "correct": bool(predicted_I[number] == item.answer),
            "exact": bool(exact_I[number]),
            "log_prob": [rounded(value) for value in log_prob_IC[number]],
        }
        for number, item in enumerate(items)
    ]
    probability_IC = softmax(log_prob_IC, axis=1)
    columns = {
        "accuracy": predicted_I == answer_I,
        "accuracy_norm": predicted_norm_I == answer_I,
        "exact_match": exact_I,
        "choice_probability": probability_IC[np.arange(len(items)), answer_I],
    }
    return Outcome(columns, logs, [item.source for item in items])


def evaluate_choice(
    model: LanguageModel, items: list[ChoiceItem], where: str, advance: Callable[[int], None] | None = None
) -> Outcome:
    """Score all choices of all items with a model; ``advance`` counts completions."""
    sequences = [
        model.encode_completion(item.prompt, " " + choice, f"{where} item {item.id}")
        for item in items
        for choice in item.choices
    ]
    return decide(items, model.score(sequences, advance))
