"""``distributed``: the processes of a job, and how they share the experts."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from trace_ds.config.sections.base import ExpertParallelSize, Integer, Section


class DistributedConfig(Section):
    nproc: Integer | None = Field(
        None, ge=1, description="Local processes when started bare; default: accelerators or 1."
    )
    ep: ExpertParallelSize = Field(
        1,
        description="Expert-parallel size; divides the experts and the world size. auto: the largest that does, and is "
        "not larger than a node.",
    )
    autoep: dict[str, Any] = Field(
        default_factory=dict,
        description="AutoEP's own options (DeepSpeed's section expert_parallel), such as {gate_up_impl: fused}.",
    )
    threads: Integer = Field(
        1, ge=1, le=1024, description="CPU threads of each process (fixed: results depend on it bitwise)."
    )
    deterministic: bool = Field(
        False,
        description="Training on a GPU uses only kernels that add in a fixed order: slower, and a job that is stopped "
        "and resumed equals the undisturbed one bit for bit (as it always does on the CPU).",
    )
    timeout_minutes: Integer = Field(30, ge=1, le=525_600, description="Process-group timeout.")
