"""Weights for use elsewhere: parquet files that ``datasets.Dataset.from_parquet`` (or pandas) reads.

``calibration.export: parquet`` (also set for a calibration that is done) writes into ``RUN/export/``
``retain_rows.parquet`` (one line per packed row: input_ids, document_ids, weights, row_weight) and
``retain_documents.parquet`` (one line per document: document, source, text_start, tokens, weight).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trace_ds.calibration.tokens import open_stream
from trace_ds.errors import UserError
from trace_ds.run.artefact import Artefact
from trace_ds.run.files import open_mapped


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
