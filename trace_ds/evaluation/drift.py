"""Routing drift: do the same tokens still go to the same experts after unlearning?

Unlearning can cheat by sending forget text to other experts instead of changing what the experts know; drift shows it.
Both models read the same rows of a corpus; compared are the top-k sets at every counted position. The overlap of an MoE
layer is the mean over tokens of |A ∩ B| / K, A and B the experts before and after: 0 … 1, 1 where nothing has changed.
Two independent uniform choices of K out of E experts overlap by K / E on average.

Shape legend: T counted tokens, L MoE layers, K = top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_ds.corpora.dataset import TokenDataset
from trace_ds.evaluation.language_model import LanguageModel, OnProgress
from trace_ds.evaluation.metrics import DRIFT_ROWS
from trace_ds.parallel.device import to_device
from trace_ds.run.artefact import Artefact
from trace_ds.run.log import Progress, StageLog

_SIDES = ("forget", "retain")
_TOKENS_PER_FORWARD = 1 << 14


@dataclass(frozen=True)
class RoutingSample:
    """``indices_TLK`` int32: the experts chosen at the counted positions of the first ``rows`` rows, in flat order."""

    indices_TLK: np.ndarray
    rows: int


def compare(before: RoutingSample, after: RoutingSample) -> dict[str, Any]:
    """Drift between two samples of the same rows, JSON-ready; lists are indexed by MoE layer.

    Returns:
        rows, tokens, overlap [L] and overlap_mean.
    """
    tokens, layers, top_k = before.indices_TLK.shape
    overlap_L = []
    for layer in range(layers):  # not all at once: tokens × layers × K² can be gigabytes
        before_TK, after_TK = (side.indices_TLK[:, layer] for side in (before, after))
        common_T = (before_TK[:, :, None] == after_TK[:, None, :]).any(2).sum(1)
        overlap_L.append(float(common_T.mean() / top_k))
    return {
        "rows": before.rows,
        "tokens": tokens,
        "overlap": overlap_L,
        "overlap_mean": float(np.mean(overlap_L)),
    }


@torch.no_grad()
def sample_routing(
    language_model: LanguageModel,
    dataset: TokenDataset,
    rows: int,
    batch_rows: int,
    progress: OnProgress | None = None,
) -> RoutingSample:
    """Run the first ``rows`` rows of a dataset through a plain Hugging Face model and keep the routers' choices."""
    from trace_ds.models.attention import packed
    from trace_ds.models.routers import find_routers, record_routing

    model, device = language_model.model, language_model.device
    rows = min(rows, len(dataset))
    layers = len(find_routers(model))
    longest = int(np.diff(dataset.row_starts_R1[: rows + 1]).max(initial=1))
    step = max(1, min(batch_rows, _TOKENS_PER_FORWARD // longest))

    def choices(begin: int) -> np.ndarray:
        batch = dataset.batch(range(begin, min(begin + step, rows)), pad_id=0)
        with record_routing(model) as recorder:
            model(
                input_ids=to_device(batch.input_ids_BS, device),
                logits_to_keep=1,
                **packed(model, batch.position_ids_BS, device),
            )
        chosen_TLK = torch.stack([recorder.layer(layer)[1] for layer in range(layers)], dim=1).cpu()
        return chosen_TLK[batch.counted_BS.reshape(-1)].numpy().astype(np.int32)

    def report(begin: int) -> None:
        if progress is not None:
            progress(min(step, rows - begin))

    return RoutingSample(np.concatenate(language_model.map_batches(list(range(0, rows, step)), choices, report)), rows)


def routing_samples(data: Artefact, model: LanguageModel, log: StageLog) -> dict[str, RoutingSample]:
    """By corpus (forget, retain), how a model routes its first :data:`DRIFT_ROWS` rows."""
    samples = {}
    for side in _SIDES:
        dataset = TokenDataset.open(data.file(f"{side}.arrow"))
        rows = min(DRIFT_ROWS, len(dataset))
        progress = Progress(log, f"routing of {side} rows", rows, unit="row")
        samples[side] = sample_routing(model, dataset, rows, model.settings.batch_rows, progress.advance)
        progress.close()
    return samples


def routing_drift(before: dict[str, RoutingSample], after: dict[str, RoutingSample]) -> dict[str, Any]:
    """The overlap by layer on both corpora, as in a result."""
    return {side: compare(before[side], after[side]) for side in _SIDES}
