"""``distributed``: the processes of a job, and how they share the experts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from trace_ds.config.sections.base import ExpertParallelSize, Integer, Section


class AutoEPConfig(Section):
    """How AutoEP does its work where ``distributed.ep`` is above 1, in its own words; by default as it chooses."""

    comm_backend: Literal["comm", "deepep"] = Field(
        "comm", description="deepep: tokens travel by DeepEP's kernels (bf16; package deep_ep, NCCL >= 2.30.4)."
    )
    comm_max_tokens_per_rank: Integer = Field(
        0, ge=0, description="deepep: most tokens of a process in a forward pass: its rows times data.context_length."
    )
    comm_num_sm: Integer = Field(12, ge=1, description="deepep: the GPU's processors that move tokens.")
    comm_qp_margin: Integer = Field(4, ge=0, description="deepep: queue pairs beyond one for each of them.")
    row_weighting_impl: Literal["auto", "eager", "fused"] = Field("auto", description="deepep: fused: one kernel.")
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = Field(
        "auto", description="comm: how a token's experts are added up; fused_weighted_sum: one kernel."
    )
    gate_up_impl: Literal["separate", "fused"] = Field(
        "separate", description="fused: gate and up in one product, their weights laid side by side at each call."
    )
    async_split_plan: bool = Field(False, description="comm: let the host learn the counts beside the GPU's work.")

    @property
    def options(self) -> dict[str, Any]:
        """What is not AutoEP's own default."""
        return self.model_dump(exclude_defaults=True)


class DistributedConfig(Section):
    nproc: Integer | None = Field(
        None, ge=1, description="Local processes when started bare; default: accelerators or 1."
    )
    ep: ExpertParallelSize = Field(
        1,
        description="Expert-parallel size; divides the experts and the world size. auto: the largest that does, and is "
        "not larger than a node.",
    )
    autoep: AutoEPConfig = AutoEPConfig()
    threads: Integer = Field(
        1, ge=1, le=1024, description="CPU threads of each process (fixed: results depend on it bitwise)."
    )
    timeout_minutes: Integer = Field(30, ge=1, le=525_600, description="Process-group timeout.")
