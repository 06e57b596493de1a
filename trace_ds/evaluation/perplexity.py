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
from trace_ds.evaluation.language_model import LanguageModel, Sequence
from trace_ds.evaluation.outcome import Outcome, rounded


@dataclass(frozen=True)
class PerplexityOutcome(Outcome):
    """Its columns, by document: ``nll``, summed (float64, nats), and ``tokens``, counted."""

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """The perplexity over all documents or those of a mask, infinite on overflow."""
        tokens, mask = self.count(chosen_I), slice(None) if chosen_I is None else chosen_I
        if not tokens:
            raise ValueError("a perplexity of no tokens")
        try:
            return {"perplexity": math.exp(float(self.columns["nll"][mask].sum()) / tokens)}
        except OverflowError:
            return {"perplexity": math.inf}

    def count(self, chosen_I: np.ndarray | None = None) -> int:
        """Counted tokens."""
        return int(self.columns["tokens"][slice(None) if chosen_I is None else chosen_I].sum())


def windows(ids: list[int], context_length: int) -> list[Sequence]:
    """Cut a document so that every token but the first is scored exactly once, with at most a full context."""
    if context_length < 2:
        raise ValueError("a window needs two tokens")
    return [
        Sequence(tuple(ids[start : start + context_length]), 1) for start in range(0, len(ids) - 1, context_length - 1)
    ]


def evaluate_perplexity(
    model: LanguageModel,
    documents: list[Document],
    context_length: int,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Score every document; ``advance`` counts documents (in proportion to the windows done)."""
    limit = getattr(model.model.config, "max_position_embeddings", None) or context_length
    cut = [windows(model.encode_document(document.text), min(context_length, limit)) for document in documents]
    share = len(documents) / max(sum(map(len, cut)), 1)
    told = [0.0]

    def counted(sequences: int) -> None:
        before, told[0] = round(told[0]), told[0] + sequences * share
        if advance is not None:
            advance(round(told[0]) - before)

    scores = iter(model.score([window for group in cut for window in group], counted))
    logs, nll, tokens = [], [], []
    for number, (document, group) in enumerate(zip(documents, cut, strict=True)):
        mine = [next(scores) for _ in group]
        nll.append(-math.fsum(float(score.log_prob.sum(dtype=np.float64)) for score in mine))
        tokens.append(sum(len(score.log_prob) for score in mine))
        log = {"id": str(number), "source": document.source, "text": beginning(document.text)}
        logs.append(log | {"nll": rounded(nll[-1]), "tokens": tokens[-1]})
    columns = {"nll": np.array(nll, dtype=np.float64), "tokens": np.array(tokens, dtype=np.int64)}
    return PerplexityOutcome(columns, logs, [document.source for document in documents])
