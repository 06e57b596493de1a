"""Routing drift: do the same tokens still go to the same experts after unlearning?

Unlearning can cheat by sending forget text to other experts instead of changing what the experts know; drift shows it.
Both models read the same rows of a corpus; compared are the top-k sets at every counted position, per MoE layer l:

| metric    | what                                                                    | range     | unchanged |
|-----------|-------------------------------------------------------------------------|-----------|-----------|
| overlap_l | mean over tokens of |A ∩ B| / K, A and B the experts before and after    | 0 … 1     | 1         |
| kl_l      | KL(before ‖ after) between the experts' shares of selections, nats       | 0 … ∞     | 0         |

Two independent uniform choices of K out of E experts overlap by K / E on average (``chance_overlap``). The overlap
sees every re-routed token, the KL only shifts of the totals. Shares carry half a count per expert so that an unused
expert gives a finite KL (our decision; the Krichevsky-Trofimov estimate).

Shape legend: T counted tokens, L MoE layers, K = top-k, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_ds.corpora.dataset import TokenDataset
from trace_ds.evaluation.language_model import Advance, LanguageModel
from trace_ds.evaluation.metrics import DRIFT_ROWS
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.device import to_device
from trace_ds.run.artefact import Artefact
from trace_ds.run.log import Progress, StageLog

_SIDES = ("forget", "retain")
_TOKENS_PER_FORWARD = 1 << 14
PSEUDO_COUNT = 0.5


@dataclass(frozen=True)
class RoutingSample:
    """``indices_TLK`` int32: the experts chosen at the counted positions of the first ``rows`` rows, in flat order."""

    indices_TLK: np.ndarray
    rows: int


def compare(before: RoutingSample, after: RoutingSample, experts: int) -> dict[str, Any]:
    """Drift between two samples of the same rows, JSON-ready; lists are indexed by MoE layer.

    Returns:
        rows, tokens, overlap [L], kl [L], overlap_mean, kl_mean, and the experts' frequencies (selections per
        counted token, each layer sums to K) frequency_before and frequency_after [L][E].
    """
    from scipy.stats import entropy

    tokens, layers, top_k = before.indices_TLK.shape
    overlap_L = []
    for layer in range(layers):  # not all at once: tokens × layers × K² can be gigabytes
        before_TK, after_TK = (side.indices_TLK[:, layer] for side in (before, after))
        common_T = (before_TK[:, :, None] == after_TK[:, None, :]).any(2).sum(1)
        overlap_L.append(float(common_T.mean() / top_k))
    before_LE, after_LE = (
        [np.bincount(side.indices_TLK[:, layer].reshape(-1), minlength=experts) for layer in range(layers)]
        for side in (before, after)
    )
    kl_L = [
        max(0.0, float(entropy(before_E + PSEUDO_COUNT, after_E + PSEUDO_COUNT)))
        for before_E, after_E in zip(before_LE, after_LE, strict=True)
    ]
    return {
        "rows": before.rows,
        "tokens": tokens,
        "chance_overlap": top_k / experts,
        "overlap": overlap_L,
        "kl": kl_L,
        "overlap_mean": float(np.mean(overlap_L)),
        "kl_mean": float(np.mean(kl_L)),
        "frequency_before": [[round(float(n) / tokens, 6) for n in counts_E] for counts_E in before_LE],
        "frequency_after": [[round(float(n) / tokens, 6) for n in counts_E] for counts_E in after_LE],
    }


@torch.no_grad()
def sample_routing(
    language_model: LanguageModel,
    dataset: TokenDataset,
    rows: int,
    batch_rows: int,
    advance: Advance | None = None,
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
        if advance is not None:
            advance(min(step, rows - begin))

    return RoutingSample(np.concatenate(language_model.shared_out(list(range(0, rows, step)), choices, report)), rows)


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


def routing_drift(info: ModelInfo, before: dict[str, RoutingSample], after: dict[str, RoutingSample]) -> dict[str, Any]:
    """Overlap and KL per layer on both corpora, as in a result."""
    return {
        "experts": info.experts,
        "top_k": info.top_k,
        **{side: compare(before[side], after[side], info.experts) for side in _SIDES},
    }
