"""Bytes that each collective of a step moves, and a lower bound of the step's time.

A step of ``unlearn`` is ``passes`` forward-and-backward passes on every GPU (micro-batches of forget rows, then of
retain rows) and one optimizer step. The bound takes the rated peak of every resource and lets all of them work at the
same time: no real step is faster, and none was measured on a GPU. ``docs/plan.md`` says what is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from trace_ds.cluster.architecture import Architecture, count_parameters
from trace_ds.cluster.job import PlannedJob, ceil_div
from trace_ds.cluster.memory import MASTER_BYTES, largest_layer
from trace_ds.cluster.spec import (
    GB,
    ClusterSpec,
    Group,
    all_to_all_s,
    data_parallel_group,
    expert_data_parallel_group,
    expert_parallel_group,
    ring_s,
)
from trace_ds.models.engine_config import RANKS_SUMMED_IN_BF16


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step: bytes that one GPU receives, and seconds at rated speed inside and between
    nodes."""

    name: str
    group: int
    received_bytes: float
    intra_s: float
    inter_s: float


@dataclass(frozen=True)
class StepTime:
    """Least seconds of a step by resource; everything else hides behind the slowest one at best."""

    compute_s: float
    hbm_s: float
    intra_s: float
    inter_s: float

    @property
    def resources(self) -> dict[str, float]:
        return {
            "compute": self.compute_s,
            "GPU memory": self.hbm_s,
            "links inside a node": self.intra_s,
            "links between nodes": self.inter_s,
        }

    @property
    def at_least_s(self) -> float:
        return max(self.resources.values())

    @property
    def bound(self) -> str:
        """The resource that dominates."""
        return max(self.resources, key=self.resources.__getitem__)


def forward_flops_per_token(a: Architecture, context: int, *, layers: int | None = None, head: bool = True) -> float:
    """Model FLOPs of one token's forward pass through the first ``layers`` layers (default all) and the head."""
    total = 0.0
    for layer in range(a.layers if layers is None else layers):
        weights = a.layer_parameters(layer, experts=False)
        if a.is_moe(layer):
            weights += a.top_k * a.expert_parameters
        attended = context * (a.query_width + a.value_width // a.kv_heads * a.heads)
        if layer in a.linear.layers:  # a head's state is read twice and written once
            attended = 3 * a.linear.value_heads * a.linear.key_width * a.linear.value_width
        total += 2 * (weights + attended)
    return total + (2 * a.hidden * a.vocabulary if head else 0)


def _ring(spec: ClusterSpec, name: str, group: Group, size_bytes: float, times: float) -> Traffic:
    intra, inter = ring_s(spec, group, size_bytes)
    received = size_bytes * (group.size - 1) / group.size
    return Traffic(name, group.size, times * received, times * intra, times * inter)


def _exchange(job: PlannedJob, tokens: float, exchanges: float) -> Traffic:
    """Tokens to their experts or back, so many times."""
    group = expert_parallel_group(job.spec, job.ep)
    size = tokens * job.a.top_k * job.a.hidden * job.b
    intra, inter = all_to_all_s(job.spec, group, size)
    received = exchanges * size * (job.ep - 1) / job.ep
    return Traffic("all-to-all of tokens", job.ep, received, exchanges * intra, exchanges * inter)


def collect_traffic(job: PlannedJob, tokens: float) -> list[Traffic]:
    """One batch of ``tokens`` tokens per GPU in ``collect``: two exchanges per MoE layer. (The counts are all-reduced
    once per job: layers x experts integers.)"""
    return [entry for entry in (_exchange(job, tokens, 2 * job.a.moe_layers),) if entry.received_bytes]


def unlearn_traffic(job: PlannedJob) -> list[Traffic]:
    """One step of a training job on every GPU.

    ZeRO-3 gathers every layer of the pass for the forward and again for the backward pass, and once more for the
    recomputation when a layer is too large to be kept until its backward pass (more elements than
    ``stage3_max_reuse_distance``); gradients are reduce-scattered in every pass. ZeRO-1 and -2 all-reduce gradients
    (DeepSpeed's default at stage 2 too, each rank keeping its part), stage 2 in every pass, and all-gather the updated
    parameters once per step. An all-reduce is a reduce-scatter and an all-gather.
    """
    a, spec, ep, zero, b, run = job.held, job.spec, job.ep, job.zero, job.b, job.passes()
    passes, rows = job.micro_batches()
    dense, sparse = data_parallel_group(spec), expert_data_parallel_group(spec, ep)
    wider = 4 / b if spec.world > RANKS_SUMMED_IN_BF16 else 1
    every = count_parameters(a)
    frozen_layers = run.frozen_layers if run.frozen_stays else 0
    moe_layers, frozen_moe = (sum(a.is_moe(layer) for layer in range(n)) for n in (run.layers, frozen_layers))
    all_experts, pass_experts, frozen_experts = (
        n * a.experts * a.expert_parameters / ep * b for n in (a.moe_layers, moe_layers, frozen_moe)
    )
    all_dense = every.non_expert * b
    pass_dense = all_dense if run.head else count_parameters(a.first(run.layers)).non_expert * b
    frozen_dense = count_parameters(a.first(frozen_layers)).non_expert * b if frozen_layers else 0.0
    if zero.stage == 3:
        again = 2 if job.settings.recompute and largest_layer(a, ep) > zero.stage3_max_reuse_distance else 1
        frozen_passes = ceil_div(passes, run.frozen_together) / passes
        gathered_dense = (1 + again) * pass_dense + frozen_dense * frozen_passes
        gathered_experts = (1 + again) * pass_experts + frozen_experts * frozen_passes
        parts = [
            _ring(spec, "all-gather of parameters", dense, gathered_dense, passes),
            _ring(spec, "all-gather of expert parameters", sparse, gathered_experts, passes),
            _ring(spec, "reduce-scatter of gradients", dense, pass_dense * wider, passes),
            _ring(spec, "reduce-scatter of expert gradients", sparse, pass_experts * wider, passes),
        ]
    else:
        reductions = 2 * (passes if zero.stage == 2 else 1)
        parts = [
            _ring(spec, "all-reduce of gradients", dense, all_dense * wider, reductions),
            _ring(spec, "all-reduce of expert gradients", sparse, all_experts * wider, reductions),
            _ring(spec, "all-gather of parameters", dense, all_dense, 1),
            _ring(spec, "all-gather of expert parameters", sparse, all_experts, 1),
        ]
    # dispatch and combine: forward and backward (and recomputation, and the frozen copy)
    through = moe_layers * (3 if job.settings.recompute else 2) + frozen_moe * run.frozen_share
    parts.append(_exchange(job, rows * job.context, through * 2 * passes))
    return [part for part in parts if part.received_bytes]


def step_time(
    job: PlannedJob, traffic: list[Traffic], *, flops: float = 0, weights: float = 0, optimized: float = 0
) -> StepTime:
    """Lower bound of one step.

    Args:
        flops: model FLOPs of one GPU (a backward pass counts twice its forward pass; recomputation is not counted).
        weights: elements of weights read from GPU memory by all passes.
        optimized: elements the optimizer updates on one GPU: it reads and writes 12 bytes of state, reads the gradient
            and writes the parameter.
    """
    hbm = (weights * job.b + optimized * (2 * MASTER_BYTES + 4)) / (job.spec.hbm_gb_s * GB)
    links = sum(t.intra_s for t in traffic), sum(t.inter_s for t in traffic)
    return StepTime(flops / (job.spec.tflops * 1e12), hbm, *links)
