"""Norms of the frozen model's hidden states at the layer of a hidden-state loss, and where the attention sinks are.

In most pretrained models the first token of each document (sometimes one or two after it) takes the attention that
nothing else wants, and its hidden state is a hundred times as long as the others from some layer on (Xiao et al.,
arXiv 2309.17453, "attention sinks"; Sun et al., arXiv 2402.17762, "massive activations"). A mean of norms then measures
that token, and a loss of hidden states fits it alone. So the unit of RMU's coefficient is the median norm, and sinks
are left out of hidden-state losses: the offsets in a document (0 … :data:`OFFSETS` − 1) at which at least half of the
tokens are longer than :data:`SINK_NORM` medians (our decisions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_ds.parallel.world import World
from trace_ds.unlearning.batches import Batches
from trace_ds.unlearning.forward import forward

MEASURED_STEPS = 4
OFFSETS, SINK_NORM = 4, 10.0


@dataclass(frozen=True)
class HiddenNorms:
    """Norms of the frozen model's hidden states at the counted tokens of the first steps.

    Attributes:
        mean, median: over the forget tokens. sinks: offsets in a document. longest: the largest norm of a sink.
    """

    mean: float
    median: float
    sinks: tuple[int, ...]
    longest: float

    def warning(self, layer: int, left_out: bool) -> str:
        """One line about the sinks; empty without any."""
        if not self.sinks:
            return ""
        offsets = ", ".join(map(str, self.sinks))
        treatment = "left out of hidden-state losses" if left_out else "kept in hidden-state losses (rmu.sinks: keep)"
        return (
            f"attention sinks: the tokens at offset {offsets} of a document have hidden norms up "
            f"to {self.longest:,.0f} at layer {layer}, against a median of {self.median:,.1f}: {treatment}"
        )


def measure(reference: Any, layer: int, world: World, batches: Batches) -> HiddenNorms:
    """Over the rows of the first :data:`MEASURED_STEPS` steps (collective); independent of their sharding."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    totals = np.zeros(2)
    for step in range(MEASURED_STEPS):
        for micro_batch in batches.at(step, world.rank, world.size).micro_batches:
            batch = micro_batch.to(world.device)
            with torch.no_grad():
                hidden_BSD = forward(reference, batch.input_ids_BS, batch.position_ids_BS, layer=layer).layer_BSD
            assert hidden_BSD is not None
            norm_BS = hidden_BSD.float().norm(dim=-1).cpu()
            forget_BS = torch.zeros_like(micro_batch.counted_BS)
            forget_BS[: batch.forget_rows] = True
            tensors = norm_BS, micro_batch.position_ids_BS, forget_BS
            norm_N, offset_N, forget_N = (x[micro_batch.counted_BS].numpy() for x in tensors)
            totals += [float(norm_N[forget_N].astype(np.float64).sum()), int(forget_N.sum())]
            parts.append((norm_N, offset_N, forget_N))
    totals = world.sum_float64(totals)
    norm_N, offset_N, forget_N = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    median = _median(norm_N[forget_N], world)
    long_N = norm_N > SINK_NORM * median
    counts = world.sum_float64(
        np.array([[float((mask & (offset_N == p)).sum()) for p in range(OFFSETS)] for mask in (long_N, offset_N >= 0)])
    )
    sinks = tuple(int(p) for p in range(OFFSETS) if counts[0, p] > 0 and counts[0, p] >= counts[1, p] / 2)
    longest = max(world.gather(float(norm_N[np.isin(offset_N, sinks)].max(initial=0.0))))
    return HiddenNorms(float(totals[0] / totals[1]), median, sinks, longest)


def _median(norm_N: np.ndarray, world: World) -> float:
    """The lower median of all ranks' norms, exactly: by the upper, then the lower half of its bits (two sums)."""
    bits_N = norm_N.astype(np.float32).view(np.int32)  # non-negative floats are in the order of their bits
    below, median = 0.0, 0
    for shift, digits in ((16, 1 << 15), (0, 1 << 16)):
        counts = world.sum_float64(np.bincount(bits_N >> shift & (digits - 1), minlength=digits).astype(np.float64))
        if shift:
            half = counts.sum() / 2
        reached = below + np.cumsum(counts)
        digit = int(np.searchsorted(reached, half))
        below = float(reached[digit] - counts[digit])
        bits_N, median = bits_N[bits_N >> shift == digit], median | digit << shift
    return float(np.array([median], np.int32).view(np.float32)[0])
