"""Perplexity of a corpus: how surprised is the model by running text?

perplexity = exp(Σ NLL / counted tokens), natural logarithm, float64 sums over the whole corpus (never a mean of
means). Range 1 … ∞; a uniform guess scores the vocabulary's size. Lower is better for utility corpora, higher means
forgotten for forget corpora. Comparable only between models with the same tokenizer.

A document (with BOS and EOS as the run adds them) longer than the context is cut into windows that share one token:
every token but the document's first is predicted exactly once. Reference: the "disjoint windows" of
``loglikelihood_rolling`` in lm-evaluation-harness, which counts all tokens after a prefix token likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from trace_ds.corpora.read import Document
from trace_ds.evaluation.items import beginning
from trace_ds.evaluation.language_model import LanguageModel, Sequence, TokenScores


@dataclass(frozen=True)
class PerplexityResult:
    """Per document: summed NLL (float64, nats) and counted tokens (int64)."""

    nll: np.ndarray
    tokens: np.ndarray
    sources: list[str]

    def metrics(self) -> dict[str, float]:
        return {"perplexity": self.perplexity()}

    def perplexity(self, chosen: np.ndarray | None = None) -> float:
        """Over all documents, or those of a bool mask, infinite on overflow; ``ValueError`` without a counted token."""
        mask = np.ones(len(self.nll), dtype=bool) if chosen is None else chosen
        tokens = int(self.tokens[mask].sum())
        if not tokens:
            raise ValueError("a perplexity of no tokens")
        try:
            return math.exp(float(self.nll[mask].sum()) / tokens)
        except OverflowError:
            return math.inf


def windows(ids: list[int], context_length: int) -> list[Sequence]:
    """Cut a document so that every token but the first is scored exactly once, with at most a full context."""
    if context_length < 2:
        raise ValueError("a window needs two tokens")
    return [
        Sequence(tuple(ids[start : start + context_length]), 1) for start in range(0, len(ids) - 1, context_length - 1)
    ]


def gather(counts: list[int], scores: list[TokenScores], sources: list[str]) -> PerplexityResult:
    """Sum the scores of each document's ``counts[i]`` windows; pure."""
    nll, tokens, position = [], [], 0
    for count in counts:
        mine = scores[position : position + count]
        nll.append(-math.fsum(float(score.log_prob.sum(dtype=np.float64)) for score in mine))
        tokens.append(sum(len(score.log_prob) for score in mine))
        position += count
    return PerplexityResult(np.array(nll, dtype=np.float64), np.array(tokens, dtype=np.int64), sources)


def evaluate_perplexity(
    model: LanguageModel,
    documents: list[Document],
    context_length: int,
    advance: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Score every document; ``advance`` counts documents (in proportion to the windows done)."""
    limit = getattr(model.model.config, "max_position_embeddings", None) or context_length
    cut = [windows(model.encode_document(document.text), min(context_length, limit)) for document in documents]
    share = len(documents) / max(sum(map(len, cut)), 1)
    told = [0.0]

    def counted(sequences: int) -> None:
        before, told[0] = round(told[0]), told[0] + sequences * share
        if advance is not None:
            advance(round(told[0]) - before)

    scores = model.score([window for group in cut for window in group], counted)
    return gather([len(group) for group in cut], scores, [document.source for document in documents])


def item_logs(documents: list[Document], result: PerplexityResult) -> list[dict[str, object]]:
    """One JSON-ready record per document."""
    return [
        {
            "id": str(number),
            "source": document.source,
            "text": beginning(document.text),
            "nll": round(float(nll), 6),
            "tokens": int(tokens),
        }
        for number, (document, nll, tokens) in enumerate(zip(documents, result.nll, result.tokens, strict=True))
    ]


def by_source(result: PerplexityResult) -> dict[str, dict[str, float]]:
    """Perplexity and counted tokens of each source that has any, sorted by name."""
    sources = np.array(result.sources)
    return {
        str(source): {
            "n": int(result.tokens[sources == source].sum()),
            "perplexity": result.perplexity(sources == source),
        }
        for source in np.unique(sources)
        if result.tokens[sources == source].sum()
    }
