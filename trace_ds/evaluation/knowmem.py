"""Knowledge memorisation (KnowMem of MUSE): does the model answer questions about the text?

| metric  | what                                                                        | range | chance |
|---------|-----------------------------------------------------------------------------|-------|--------|
| rouge_l | mean ROUGE-L F1 of the greedy answer (at most 32 tokens) against the true one | 0 … 1 | none   |

Higher means more known: bad for the forget side, good for the retain side. A model that never saw the text guesses some
words, so compare with one (``gold``). The prompt holds ten solved questions (``examples``) and then the question::

    Question: …\\nAnswer: …\\n\\n  (ten times)  Question: …\\nAnswer:␣

and the answer ends before the first empty line or the next "Question". Reference: Shi et al., *MUSE*, arXiv 2407.06460,
section 3.1, and its authors' code (``knowmem``): ``rouge-score`` without stemming, F-measure. Answers of published
data may be lists of accepted texts; here the best one counts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.evaluation.items import QuestionItem
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.verbatim import rouge_l

NEW_TOKENS = 32
EXAMPLES = 10
ENDS = ("\n\n", "\nQuestion", "Question:")


@dataclass(frozen=True)
class KnowMemResult:
    """Per item: ROUGE-L F1 (float64) and the model's answer."""

    rouge_l: np.ndarray
    answers: list[str]

    def metrics(self) -> dict[str, float]:
        return {"rouge_l": float(self.rouge_l.mean())}


def prompt_of(question: str, examples: list[QuestionItem]) -> str:
    """The few-shot prompt of one question; a model's tokenizer sees it with its own special tokens."""
    shots = "".join(f"Question: {item.question}\nAnswer: {item.answers[0]}\n\n" for item in examples[:EXAMPLES])
    return f"{shots}Question: {question}\nAnswer: "


def cut(text: str) -> str:
    """The answer proper: what comes before the model goes on to another question."""
    for end in ENDS:
        text = text.split(end)[0]
    return text


def evaluate_knowmem(
    model: LanguageModel,
    items: list[QuestionItem],
    examples: list[QuestionItem],
    where: str,
    advance: Callable[[int], None] | None = None,
) -> KnowMemResult:
    """Answer every question greedily; ``advance`` counts items."""
    prompts = [model.encode(prompt_of(item.question, examples)) for item in items]
    for item, ids in zip(items, prompts, strict=True):
        model.check_length(len(ids) + NEW_TOKENS, f"{where} item {item.id}")
    continuations = model.continue_greedily(prompts, [NEW_TOKENS] * len(items), advance)
    answers = [cut(str(model.tokenizer.decode(ids, skip_special_tokens=True))) for ids in continuations]
    scores = [
        max(rouge_l(answer, found) for answer in item.answers) for item, found in zip(items, answers, strict=True)
    ]
    return KnowMemResult(np.array(scores), answers)


def item_logs(items: list[QuestionItem], result: KnowMemResult) -> list[dict[str, object]]:
    """One JSON-ready record per item."""
    return [
        {
            "id": item.id,
            "source": item.source,
            "prompt": item.question,
            "reference": item.answers[0],
            "continuation": result.answers[number],
            "rouge_l": round(float(result.rouge_l[number]), 6),
        }
        for number, item in enumerate(items)
    ]


def by_source(items: list[QuestionItem], result: KnowMemResult) -> dict[str, dict[str, float]]:
    """The metric and the number of items of each source, sorted by name."""
    sources = np.array([item.source for item in items])
    return {
        str(source): {"n": int((sources == source).sum()), "rouge_l": float(result.rouge_l[sources == source].mean())}
        for source in np.unique(sources)
    }
