"""A small synthetic world for calibration tests: routing with topics, documents and layers, as counts and as a trace.

Shape legend: T tokens, L MoE layers, E experts, K = top-k, D documents.

Documents have a topic; a topic prefers some experts in each layer; tokens of a document also share a document-level
taste, so their selections are correlated as real ones are. Expert choice is top-k of (layer, topic) logits + taste +
Gumbel noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from trace_ds.calibration.tokens import RowSelections, TokenMap, Trace
from trace_ds.routing.statistics import RoutingStatistics


@dataclass(frozen=True)
class Corpus:
    trace_TLK: np.ndarray
    tokens: TokenMap
    topic_D: np.ndarray

    @property
    def counted_T(self) -> np.ndarray:
        return self.tokens.counted(0, self.tokens.tokens)

    def dense(self, experts: int) -> np.ndarray:
        """bool [counted tokens, L * E]."""
        selected = self.trace_TLK[self.counted_T]
        active = np.zeros((len(selected), selected.shape[1], experts), dtype=bool)
        np.put_along_axis(active, selected.astype(np.int64), True, axis=2)
        return active.reshape(len(selected), -1)

    def statistics(self, experts: int) -> RoutingStatistics:
        """The statistics, the slow way: one document after the other."""
        counted_T = self.counted_T
        active = self.dense(experts).astype(np.int64)
        documents = np.asarray(self.tokens.document_ids_T)[counted_T]
        layers = self.trace_TLK.shape[1]
        square = cross = np.zeros(active.shape[1], np.int64)
        square_tokens = filled = 0
        for d in np.unique(documents):
            c, n = active[documents == d].sum(axis=0), int((documents == d).sum())
            square, cross = square + c * c, cross + c * n
            square_tokens, filled = square_tokens + n * n, filled + 1
        shape = (layers, experts)
        counts = active.sum(axis=0)
        return RoutingStatistics(
            counts.reshape(shape),
            counts.reshape(shape) * 0.5,
            square.reshape(shape),
            cross.reshape(shape),
            square_tokens,
            int(counted_T.sum()),
            filled,
            self.trace_TLK.shape[2],
        )

    def row_counts(self, experts: int) -> np.ndarray:
        """The selections of each row, uint16 [rows, L, E]."""
        row_T = self.tokens.row_of(0, self.tokens.tokens)[self.counted_T]
        counts = np.zeros((self.tokens.rows, self.trace_TLK.shape[1], experts), np.uint16)
        for layer in range(counts.shape[1]):
            np.add.at(counts[:, layer], (row_T[:, None], self.trace_TLK[self.counted_T][:, layer]), 1)
        return counts

    def selections(self, experts: int, parts: int = 1) -> RowSelections:
        """What ``collect`` records of rows, all counted tokens sampled."""
        counts = tuple(np.array_split(self.row_counts(experts), parts))
        sampled = self.trace_TLK[self.counted_T], np.flatnonzero(self.counted_T)
        return RowSelections(counts, self.trace_TLK.shape[2], *sampled)

    def as_trace(self, parts: int = 1) -> Trace:
        return Trace(tuple(np.array_split(self.trace_TLK, parts)))


def make_corpus(
    rng: np.random.Generator,
    topic_D: np.ndarray,
    logits_PLE: np.ndarray,
    top_k: int,
    *,
    document_tokens: int = 24,
    row_tokens: int = 64,
    taste: float = 0.5,
) -> Corpus:
    """A corpus whose documents have the given topics; document lengths vary around ``document_tokens``."""
    _, layers, experts = logits_PLE.shape
    lengths = rng.integers(max(2, document_tokens // 2), document_tokens * 3 // 2 + 1, len(topic_D))
    documents = np.repeat(np.arange(len(topic_D), dtype=np.int32), lengths)
    total = len(documents)
    logits_DLE = logits_PLE[topic_D] + taste * rng.normal(size=(len(topic_D), layers, experts))
    noisy = logits_DLE[documents] + rng.gumbel(size=(total, layers, experts))
    chosen = np.sort(np.argsort(-noisy, axis=2, kind="stable")[:, :, :top_k], axis=2)
    starts = np.append(np.arange(0, total, row_tokens), total).astype(np.int64)
    dtype = np.uint8 if experts <= 256 else np.uint16
    return Corpus(chosen.astype(dtype), TokenMap(starts, documents, len(topic_D)), topic_D)


def make_world(
    seed: int = 0,
    *,
    layers: int = 3,
    experts: int = 8,
    top_k: int = 2,
    documents: int = 300,
    near_share: float = 0.1,
) -> tuple[Corpus, Corpus]:
    """(forget, retain): topic 0 is the forget topic, topic 1 resembles it, 2 … 4 are general text."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(scale=0.7, size=(5, layers, experts))
    logits[1] = 0.8 * logits[0] + 0.2 * logits[1]
    logits[0, :, 0] += 1.5
    logits[1, :, 0] += 1.2
    retain_topics = np.where(rng.random(documents) < near_share, 1, rng.integers(2, 5, documents))
    forget = make_corpus(rng, np.zeros(documents // 3, np.int64), logits, top_k)
    return forget, make_corpus(rng, retain_topics, logits, top_k)
