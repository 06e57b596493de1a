"""Weights for use elsewhere: parquet files, and plain PyTorch pieces for a training loop of your own.

``calibration.export: parquet`` (also set for a calibration that is done) writes into ``RUN/export/``
``retain_rows.parquet`` (one line per packed row: input_ids, document_ids, weights, row_weight) and
``retain_documents.parquet`` (one line per document: document, source, text_start, tokens, weight). ``datasets`` and
pandas read them; ``docs/trainer_example.py`` trains on them with a transformers ``Trainer``, with
:func:`collate_rows`, :func:`weighted_retain_loss` and, to see routing, :func:`record_routing`.

Shape legend: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trace_ds.corpora.dataset import PackedRow, batch_of, open_stream
from trace_ds.errors import UserError
from trace_ds.models.routers import RoutingRecorder, record_routing
from trace_ds.models.token_nll import token_nll, weighted_sum
from trace_ds.run.artefact import Artefact
from trace_ds.run.files import open_mapped

__all__ = ["RoutingRecorder", "collate_rows", "export", "record_routing", "weighted_retain_loss"]

IGNORED = -100


def export(data: Artefact, calibration: Artefact, directory: Path) -> list[Path]:
    """Write both parquet files into ``directory`` (created); memory is bounded by one Arrow batch.

    Columns of the rows: input_ids list<int32>, document_ids list<int32>, weights list<float> (0 at positions that are
    not loss-bearing), row_weight double. Of the documents: document int64, source, text_start string, tokens int64
    (loss-bearing), weight double (their mean; null for a document without any).

    Raises:
        UserError: the calibration was made from other data.
    """
    import pyarrow as pa
    import pyarrow.parquet as parquet

    if calibration.inputs.get("data") != data.content:
        raise UserError(
            "this calibration was made from other data", str(calibration.path), "run `trace-ds calibrate CONFIG` again"
        )
    directory.mkdir(parents=True, exist_ok=True)
    weights_T = open_mapped(calibration.file("weights.npy"))
    row_weight_R = open_mapped(calibration.file("row_weights.npy"))
    table = open_stream(data.file("retain_documents.arrow")).read_all()
    sums_D, counts_D = np.zeros(len(table)), np.zeros(len(table), np.int64)
    rows_path, documents_path = directory / "retain_rows.parquet", directory / "retain_documents.parquet"
    schema = pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("document_ids", pa.list_(pa.int32())),
            ("weights", pa.list_(pa.float32())),
            ("row_weight", pa.float64()),
        ]
    )
    row = token = 0
    with parquet.ParquetWriter(rows_path, schema) as writer:
        for batch in open_stream(data.file("retain.arrow")):
            offsets = np.asarray(batch.column("input_ids").offsets)
            size = int(offsets[-1] - offsets[0])
            w = np.array(weights_T[token : token + size])
            starts = pa.array((offsets - offsets[0]).astype(np.int32))
            columns = [batch.column("input_ids"), batch.column("document_ids")]
            columns.append(pa.ListArray.from_arrays(starts, pa.array(w)))
            columns.append(pa.array(np.array(row_weight_R[row : row + len(batch)])))
            writer.write_batch(pa.record_batch(columns, schema=schema))
            ids = np.asarray(batch.column("document_ids").values)[offsets[0] : offsets[-1]]
            sums_D += np.bincount(ids, w, len(table))
            counts_D += np.bincount(ids[w > 0], minlength=len(table))
            row, token = row + len(batch), token + size
    mean_D = np.where(counts_D > 0, sums_D / np.maximum(counts_D, 1), np.nan)
    documents = pa.table(
        {
            "document": pa.array(np.arange(len(table))),
            "source": table.column("source"),
            "text_start": table.column("text_start"),
            "tokens": pa.array(counts_D),
            "weight": pa.array(mean_D, from_pandas=True),
        }
    )
    parquet.write_table(documents, documents_path)
    return [rows_path, documents_path]


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
