"""``statistics``: what ``collect`` records of the frozen model."""

from __future__ import annotations

from pydantic import Field

from trace_ds.config.sections.base import Integer, Section


class StatisticsConfig(Section):
    batch_rows: Integer = Field(8, ge=1, description="Rows per process and forward pass.")
    save_every: Integer = Field(200, ge=0, description="Batches between saved states of a collection (0: none).")
    trace: bool | None = Field(
        None,
        description="Record the top-k experts of every token; default: where another key needs them (the log says "
        "which; docs/method.md, section 8, what they take).",
    )
    nll: bool = Field(False, description="Record the frozen model's loss of every token (needed by NPO).")
