"""TRACE for people who keep their own training loop: plain PyTorch pieces and nothing else.

* :func:`collate_rows` makes a batch of exported rows (``calibration/export.py``), weights and labels included;
* :func:`weighted_retain_loss` is the retain loss with those weights;
* :func:`record_routing` (from :mod:`trace_ds.models.routers`) records the top-k experts of every forward pass.

``docs/trainer_example.py`` uses them with a transformers ``Trainer``.

Shape legend: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from trace_ds.corpora.dataset import batch_of
from trace_ds.corpora.pack import PackedRow
from trace_ds.models.routers import RoutingRecorder, record_routing
from trace_ds.models.token_nll import token_nll, weighted_sum

__all__ = ["RoutingRecorder", "collate_rows", "record_routing", "weighted_retain_loss"]

IGNORED = -100


def collate_rows(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Exported rows as one batch, filled at the right.

    Returns:
        ``input_ids`` int64 [B, S]; ``position_ids`` int64, restarting with each document (this is what keeps attention
        inside documents; never pass an attention mask beside it); ``weights`` fp32, the weight of predicting token
        t + 1 at position t, 0 where nothing is counted; ``labels`` int64, the token itself where predicting it is
        counted and -100 elsewhere (for frameworks that count labels; they are shifted as usual).
    """
    batch = batch_of([PackedRow(row["input_ids"], row["document_ids"]) for row in rows], pad_id)
    ids, weights = batch.input_ids_BS, torch.zeros(batch.input_ids_BS.shape)
    for number, row in enumerate(rows):
        weights[number, : len(row["weights"])] = torch.tensor(row["weights"], dtype=torch.float32)
    labels = torch.full_like(ids, IGNORED)
    labels[:, 1:] = torch.where(batch.counted_BS[:, :-1], ids[:, 1:], IGNORED)
    return {"input_ids": ids, "position_ids": batch.position_ids_BS, "weights": weights, "labels": labels}


def weighted_retain_loss(
    logits_BSV: torch.Tensor,
    labels_BS: torch.Tensor,
    weights_BS: torch.Tensor,
    tokens: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """L_retain = Σ_t w_t ℓ_t / n, a scalar with gradient; ℓ_t is the cross-entropy of token t + 1 in nats, fp32.

    Args:
        logits_BSV: the model's logits.
        labels_BS: token ids, -100 where predicting the token is not counted (as :func:`collate_rows` makes them).
        weights_BS: calibration weights (mean 1 over the corpus).
        tokens: n, counted tokens of the *global* batch (all processes and accumulation steps); default: of this
            batch. Divide by n and never by Σ w: renormalising each batch would cancel the differences between
            documents, which is where the gain is (our decision).
    """
    counted_BS = torch.zeros(labels_BS.shape, dtype=torch.bool, device=labels_BS.device)
    counted_BS[:, :-1] = labels_BS[:, 1:] != IGNORED
    losses_BS = token_nll(logits_BSV, labels_BS, counted_BS)
    total = weighted_sum(losses_BS, weights_BS.to(losses_BS.device))
    return total / (counted_BS.sum().clamp(min=1) if tokens is None else tokens)
