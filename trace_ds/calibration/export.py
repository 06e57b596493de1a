"""Weights in a training loop of your own: the retain rows of a run with their weights, and plain PyTorch pieces.

``docs/trainer_example.py`` trains on them with a transformers ``Trainer``. :func:`record_routing` shows the routing.

Shape legend: B rows, S positions, V vocabulary, R rows of the corpus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trace_ds.corpora.dataset import TokenDataset, batch_of
from trace_ds.errors import UserError
from trace_ds.models.routers import RoutingRecorder, record_routing
from trace_ds.models.token_nll import token_nll, weighted_sum
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import open_mapped

__all__ = ["RetainRows", "RoutingRecorder", "collate_rows", "record_routing", "weighted_retain_loss"]

IGNORED = -100


class RetainRows(torch.utils.data.Dataset[dict[str, Any]]):
    """The packed retain rows of a run and their weights, read from the disk; each is what :func:`collate_rows` takes.

    ``row_weight_R`` float64: by which ``unlearning.apply: sampling`` draws the rows.

    Raises:
        UserError: the run has no data or no weights, or the weights were made from other data.
    """

    def __init__(self, run: str | Path) -> None:
        place = RunDirectory.at(Path(run))
        data, calibration = (
            artefact.load_artefact(place.data, "data"),
            artefact.load_artefact(place.calibration, "calibration"),
        )
        if calibration.inputs.get("data") != data.content:
            problem = "this calibration was made from other data"
            raise UserError(problem, str(calibration.path), "run `trace-ds calibrate CONFIG` again")
        self._dataset = TokenDataset.open(data.file("retain.arrow"))
        self._weight_T = open_mapped(calibration.file("weights.npy"))
        self.row_weight_R = np.array(open_mapped(calibration.file("row_weights.npy")))

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        tokens = slice(*self._dataset.row_starts_R1[index : index + 2])
        return {"row": self._dataset.row(index), "weights": torch.tensor(self._weight_T[tokens])}


def collate_rows(rows: Sequence[Mapping[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Rows of :class:`RetainRows` as one batch, filled at the right.

    Returns:
        ``input_ids`` int64 [B, S]; ``position_ids`` int64, restarting with each document (this is what keeps attention
        inside documents; never pass an attention mask beside it); ``weights`` fp32, the weight of predicting token
        t + 1 at position t, 0 where nothing is counted; ``labels`` int64, the token itself where predicting it is
        counted and -100 elsewhere (for frameworks that count labels; they are shifted as usual).
    """
    batch = batch_of([row["row"] for row in rows], pad_id)
    ids, weights = batch.input_ids_BS, torch.zeros(batch.input_ids_BS.shape)
    for number, row in enumerate(rows):
        weights[number, : len(row["weights"])] = row["weights"]
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
