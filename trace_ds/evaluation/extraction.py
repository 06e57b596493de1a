"""Extraction strength: how little of a text must be given for the model to finish it word for word?

| metric              | what                                                                        | range | chance |
|---------------------|-----------------------------------------------------------------------------|-------|--------|
| extraction_strength | mean of 1 − k/n, k the shortest beginning of a text of n tokens after which   | 0 … 1 | 0      |
|                     | greedy decoding gives all the rest exactly                                    |       |        |

0: not even the last token is the model's first guess; 1: the whole text comes from nothing but the start token. Higher
means more memorised: bad for forget texts. Reference: Carlini et al., *Extracting Training Data from Large Language
Models*, USENIX Security 2021, as Wang et al., arXiv 2406.13348, section 3, turn it into a score. Greedy decoding gives
the rest exactly if and only if every token of it is the argmax given the true tokens before it, so one forward pass
finds k. Texts longer than the context are cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation.items import beginning
from trace_ds.evaluation.language_model import LanguageModel, Sequence


@dataclass(frozen=True)
class ExtractionResult:
    """Per text: its strength (float64), its scored tokens and how it begins."""

    strength: np.ndarray
    tokens: np.ndarray
    beginnings: list[str]

    def metrics(self) -> dict[str, float]:
        return {"extraction_strength": float(self.strength.mean())}


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
) -> ExtractionResult:
    """Score every text; ``advance`` counts texts.

    Raises:
        UserError: no text has two tokens.
    """
    limit = min(context_length, getattr(model.model.config, "max_position_embeddings", None) or context_length)
    encoded = [(document.text, model.encode(document.text)[:limit]) for document in documents]
    usable = [Sequence(tuple(ids), 1) for _, ids in encoded if len(ids) > 1]
    if not usable:
        raise UserError("no text has two tokens", where, "an extraction of nothing: add text")
    scores = model.score(usable, advance)
    return ExtractionResult(
        np.array([strength(score.is_argmax) for score in scores]),
        np.array([len(score.is_argmax) for score in scores]),
        [beginning(text) for text, ids in encoded if len(ids) > 1],
    )


def item_logs(result: ExtractionResult) -> list[dict[str, object]]:
    """One JSON-ready record per text."""
    return [
        {"id": str(number), "text": text, "tokens": int(tokens), "extraction_strength": round(float(value), 6)}
        for number, (value, tokens, text) in enumerate(
            zip(result.strength, result.tokens, result.beginnings, strict=True)
        )
    ]
