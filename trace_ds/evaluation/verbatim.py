"""Verbatim memorisation: does the model continue a passage word for word (VerbMem of MUSE)?

Higher means more memorised: bad for forget tasks, good for utility tasks. Two different passages of the same language
share words, so a model that never saw the text scores above 0: compare with a model that never saw it (``gold``).
Reference: Shi et al., *MUSE: Machine Unlearning Six-Way Evaluation for Language Models*, section 3 (128 greedy tokens,
``rouge-score`` without stemming, F-measure, true continuation cut to the same number of tokens). Our decision: a
continuation is also cut to the length of a true continuation that is *shorter* than ``max_new_tokens``, so that
perfect recall scores 1; with longer ones nothing differs. ``rouge-score`` keeps only the letters a-z and digits:
a passage without any scores 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trace_ds.evaluation.items import VerbatimItem
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.outcome import Outcome, item_logs


def rouge_l(reference: str, continuation: str) -> float:
    """ROUGE-L F1 of the ``rouge-score`` package without stemming (longest common subsequence of words)."""
    from rouge_score.rouge_scorer import RougeScorer

    return float(RougeScorer(["rougeL"], use_stemmer=False).score(reference, continuation)["rougeL"].fmeasure)


def exact_tokens(reference: list[int], continuation: list[int]) -> float:
    """Share of the reference's positions at which ``continuation`` has the same token."""
    if not reference:
        raise ValueError("an empty reference")
    return sum(a == b for a, b in zip(reference, continuation, strict=False)) / len(reference)


def boundary(prompt: str, continuation: str) -> tuple[str, str]:
    """The passage cut where tokens do not straddle: white space between the two belongs to the continuation."""
    joined = prompt if prompt[-1:].isspace() or continuation[:1].isspace() else prompt + " "
    stripped = joined.rstrip()
    return stripped, joined[len(stripped) :] + continuation


def evaluate_verbatim(
    model: LanguageModel,
    items: list[VerbatimItem],
    max_new_tokens: int,
    where: str,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Continue every prompt greedily and compare; ``advance`` counts items."""
    prompts, references = [], []
    for item in items:
        prompt, continuation = boundary(item.prompt, item.continuation)
        ids = model.encode(prompt)
        passage = model.encode(prompt + continuation)
        shared = 0  # as in encode_completion; a token that spans the boundary belongs to the reference
        while shared < min(len(ids), len(passage) - 1) and ids[shared] == passage[shared]:
            shared += 1
        prompts.append(passage[:shared] if shared else ids)
        references.append(passage[shared : shared + max_new_tokens])
        model.check_length(len(prompts[-1]) + len(references[-1]), f"{where} item {item.id}")
    continuations = model.continue_greedily(prompts, [len(reference) for reference in references], advance)
    decode = model.tokenizer.decode
    reference_texts = [str(decode(ids, skip_special_tokens=True)) for ids in references]
    texts = [str(decode(ids, skip_special_tokens=True)) for ids in continuations]
    columns = {
        "rouge_l": np.array([rouge_l(*pair) for pair in zip(reference_texts, texts, strict=True)]),
        "exact_tokens": np.array([exact_tokens(*pair) for pair in zip(references, continuations, strict=True)]),
    }
    prompts_given = [item.prompt for item in items]
    logs = item_logs(items, columns, prompt=prompts_given, reference=reference_texts, continuation=texts)
    return Outcome(columns, logs, [item.source for item in items])
