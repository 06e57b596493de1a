"""``statistics``: what ``collect`` records of the frozen model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_ds.config.sections.base import Integer, Section


class StatisticsConfig(Section):
    batch_rows: Integer = Field(8, ge=1, description="Rows per process and forward pass.")
    expert_kernel: Literal["auto", "grouped_mm", "eager", "sonicmoe", "deepgemm"] = Field(
        "auto",
        description="How a process computes its experts when ep is 1 (with more, AutoEP decides). auto: on a GPU eager "
        "for experts at least 8,192 wide, else the choice of transformers (grouped_mm where the family allows it). "
        "sonicmoe, deepgemm: kernels for Hopper in bf16, which transformers takes from the hub (pip install "
        "'trace-ds[hopper]'); auto where they cannot be used, and the log says why.",
    )
    save_every: Integer = Field(200, ge=0, description="Batches between saved states of a collection (0: none).")
    trace: bool | None = Field(
        None,
        description="Record the top-k experts of every token; default: where another key needs them (the log says "
        "which; docs/method.md, section 8, what they take).",
    )
    sample_tokens: Integer = Field(
        200_000,
        ge=1,
        description="Counted tokens of a corpus, spread over its documents, whose top-k experts are always recorded.",
    )
    nll: bool = Field(False, description="Record the frozen model's loss of every token (needed by NPO).")
