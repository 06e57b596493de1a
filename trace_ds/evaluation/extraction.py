"""Extraction strength: how little of a text must be given for the model to finish it word for word?

The score is 1 − k/n, k the shortest beginning of a text of n tokens after which greedy decoding gives all the rest.
0: not even the last token is the model's first guess; 1: the whole text comes from nothing but the start token. Higher
means more memorised: bad for forget texts. Reference: Carlini et al., *Extracting Training Data from Large Language
Models*, USENIX Security 2021, as Wang et al., arXiv 2406.13348, section 3, turn it into a score. Greedy decoding gives
the rest exactly if and only if every token of it is the argmax given the true tokens before it, so one forward pass
finds k. Texts longer than the context are cut.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation.items import beginning
from trace_ds.evaluation.language_model import LanguageModel, Sequence
from trace_ds.evaluation.outcome import Outcome, rounded


def strength(is_argmax: np.ndarray) -> float:
    """1 − k/n from whether each of the n tokens is the model's first guess (bool [n], n >= 1)."""
    if not len(is_argmax):
        raise ValueError("a text without tokens")
    misses = np.flatnonzero(~is_argmax)
    needed = int(misses[-1]) + 1 if len(misses) else 0
    return 1 - needed / len(is_argmax)


def evaluate_extraction(
    model: LanguageModel,
    documents: list[Document],
    context_length: int,
    where: str,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Score every text; ``advance`` counts texts.

    Raises:
        UserError: no text has two tokens.
    """
    limit = min(context_length, getattr(model.model.config, "max_position_embeddings", None) or context_length)
    encoded = [(document.text, model.encode(document.text)[:limit]) for document in documents]
    usable = [(text, Sequence(tuple(ids), 1)) for text, ids in encoded if len(ids) > 1]
    if not usable:
        raise UserError("no text has two tokens", where, "an extraction of nothing: add text")
    scores = model.score([sequence for _, sequence in usable], advance)
    strength_I = np.array([strength(score.is_argmax) for score in scores])
    logs = [
        {
            "id": str(number),
            "text": beginning(text),
            "tokens": len(sequence.ids) - 1,
            "extraction_strength": rounded(strength_I[number]),
        }
        for number, (text, sequence) in enumerate(usable)
    ]
    return Outcome({"extraction_strength": strength_I}, logs)
