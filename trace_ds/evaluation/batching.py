"""Which sequences share a row, and which rows a forward pass: of similar length, longest first, within bounds of
memory; pure."""

from __future__ import annotations

from dataclasses import dataclass

LOGITS_PER_FORWARD = 1 << 28  # one GiB of float32 logits
TOKENS_PER_FORWARD = 1 << 16


@dataclass(frozen=True)
class Sequence:
    """Token ids, of which those from index ``first`` on are scored (``first`` >= 1: the first has no context)."""

    ids: tuple[int, ...]
    first: int


def sharing(sequences: list[Sequence]) -> list[list[int]]:
    """Indices of ``sequences`` in groups that one row serves, that of the first: what the others' last tokens are
    predicted from begins it. Choices of one token after the same question are one row, not four."""
    order = sorted(range(len(sequences)), key=lambda index: (sequences[index].ids[:-1], index), reverse=True)
    groups: list[list[int]] = []
    for index in order:  # what begins like a row stands behind it, before all rows that begin otherwise
        context = sequences[index].ids[:-1]
        if groups and sequences[groups[-1][0]].ids[: len(context)] == context:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def plan_batches(sequences: list[Sequence], batch_rows: int, vocabulary: int) -> list[list[int]]:
    """Indices of ``sequences`` in batches: longest first, at most ``batch_rows``, bounded tokens and logits."""
    order = sorted(range(len(sequences)), key=lambda index: (-len(sequences[index].ids), index))
    batches: list[list[int]] = []
    length = first = 0
    for index in order:
        sequence = sequences[index]
        if batches:
            rows = len(batches[-1]) + 1
            kept = length - min(first, sequence.first) + 1
            fits = rows <= batch_rows and rows * length <= TOKENS_PER_FORWARD
            if fits and rows * kept * vocabulary <= LOGITS_PER_FORWARD:
                batches[-1].append(index)
                first = min(first, sequence.first)
                continue
        batches.append([index])
        length, first = len(sequence.ids), sequence.first
    return batches
