"""``trace-ds plan``: what a run needs on a given cluster, before a weight is loaded or a job is queued.

    plan(config, ClusterSpec(nodes=4)).unlearn.memory.peak_bytes

Everything follows from the model's ``config.json``, the run's configuration and the cluster's numbers:
parameters by kind (:mod:`trace_ds.cluster.architecture`), memory by part (:mod:`~trace_ds.cluster.memory`),
bytes moved and time (:mod:`~trace_ds.cluster.cost`). No torch, no weights, no GPU: it answers in well under a
second. The cost model and what of it was checked against measurements is written down in ``docs/plan.md``.
"""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trace_ds.cluster import cost, memory
from trace_ds.cluster.architecture import (
    Architecture,
    Parameters,
    active_parameters,
    count_parameters,
    read_architecture,
)
from trace_ds.cluster.job import Job, ceil_div, corpus_tokens, variants_of
from trace_ds.cluster.spec import GB, ClusterSpec
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.tensors.model_files import CONFIG_NAME, read_json_object, read_model_config

LOGITS_ELEMENTS = 1 << 26  # `collect` holds so many logits at a time (trace_ds/models/token_nll.py)
EVALUATION_SHARE = 0.8  # of a GPU's memory may be weights (trace_ds/evaluation/language_model.py)
MAX_ROWS = 4096  # no search for a larger micro-batch than this

ASSUMPTIONS = (
    "every parameter has a gradient and moments, also what unlearning.trainable holds still",
    "RMU's passes and its frozen copy end at its layer",
    "routed tokens are spread evenly for time, 1.5 times the mean on the busiest GPU for memory",
    "compute utilisation: measured on one H100; links: rated speed x 0.7, not measured",
)


@dataclass(frozen=True)
class StagePlan:
    """One distributed stage: memory of a GPU, the largest micro-batch that fits, bytes moved and time of one
    step (``collect``: one batch); ``storage_s``: loading the model and saving checkpoints, in the whole stage."""

    rows: int
    memory: memory.Memory
    fits: bool
    largest_rows: int
    traffic: list[cost.Traffic]
    time: cost.StepTime
    tokens_per_s: float
    steps: int | None
    storage_s: float

    @property
    def job_s(self) -> float | None:
        """Seconds of the whole stage, nothing overlapped; None when its length is not known."""
        return None if self.steps is None else self.steps * self.time.serial_s + self.storage_s


@dataclass(frozen=True)
class Choice:
    """One combination of expert-parallel size and ZeRO stage for ``unlearn``, at the configured
    micro-batch.
    """

    ep: int
    zero_stage: int
    fits: bool
    peak_bytes: float
    largest_rows: int
    step_s: float
    bound: str
    collect_fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer; ``choices`` are ranked (what fits by step time, then the rest by memory); ``variants`` are the
    ``unlearn`` of each, by name; storage is that of all jobs."""

    family: str
    parameters: Parameters
    active: Parameters
    cluster: ClusterSpec
    ep: int
    zero_stage: int
    collect: StagePlan
    unlearn: StagePlan
    variants: dict[str, StagePlan]
    recomputed_peak_bytes: float
    checkpoint_bytes: float
    save_s: float
    storage_bytes: float
    host_bytes: float
    evaluation_gpus: int
    choices: list[Choice]
    warnings: list[str]


def plan(config: Config, cluster: ClusterSpec) -> Plan:
    """Plan ``config`` on ``cluster``.

    Raises:
        UserError: the model directory or its ``config.json`` is missing or not of a supported family; the
            expert-parallel size does not divide the experts or the GPUs; the DeepSpeed file cannot be read.
    """
    where = str(Path(config.model.path) / CONFIG_NAME)
    return plan_model(read_model_config(config.model.path), config, cluster, where)


def plan_model(model_config: Mapping[str, Any], config: Config, cluster: ClusterSpec, where: str = CONFIG_NAME) -> Plan:
    """:func:`plan` for a model that is known only by its configuration."""
    a = read_architecture(model_config, where)
    ep, stage = config.distributed.ep, config.unlearning.zero_stage
    _check(a, cluster, ep)
    job, *others = (_job(a, cluster, each) for each in (config, *variants_of(config).values()))
    collect, unlearn = _collect(job, ep), _unlearn(job, ep, stage)
    choices = sorted(
        (_choice(job, size, level) for size in _expert_parallel_sizes(a, cluster) for level in (1, 2, 3)),
        key=lambda choice: (not choice.fits, choice.step_s if choice.fits else choice.peak_bytes),
    )
    every = count_parameters(a)
    checkpoint = checkpoint_bytes(job, stage)
    storage = sum(
        (each.config.unlearning.keep + 1) * checkpoint_bytes(each, each.config.unlearning.zero_stage)
        + every.total * each.b
        for each in (job, *others)
    )
    host = memory.host_bytes(
        a, gpus_per_node=cluster.gpus_per_node, b=job.b, zero=job.zero(stage), world=cluster.world, ep=ep
    )
    result = Plan(
        family=a.family,
        parameters=every,
        active=active_parameters(a),
        cluster=cluster,
        ep=ep,
        zero_stage=stage,
        collect=collect,
        unlearn=unlearn,
        variants={
            name: _unlearn(each, ep, each.config.unlearning.zero_stage)
            for name, each in zip(config.variants, others, strict=True)
        },
        recomputed_peak_bytes=_unlearn_memory(job, ep, stage, unlearn.rows, recompute=True).peak_bytes,
        checkpoint_bytes=checkpoint,
        save_s=checkpoint / (cluster.storage_gb_s * GB),
        storage_bytes=storage,
        host_bytes=host,
        evaluation_gpus=evaluation_gpus(config, every.total * job.b, cluster.gpu_memory_gb),
        choices=choices,
        warnings=[],
    )
    result.warnings.extend(_warnings(job, result))
    return result


def _job(a: Architecture, cluster: ClusterSpec, config: Config) -> Job:
    path = config.unlearning.ds_config
    return Job(a, cluster, config, read_json_object(Path(path), "the DeepSpeed configuration") if path else {})


def _check(a: Architecture, cluster: ClusterSpec, ep: int) -> None:
    if min(cluster.nodes, cluster.gpus_per_node) < 1:
        raise UserError("the cluster has no GPU", "--nodes, --gpus-per-node", "give both as 1 or more")
    if a.experts % ep:
        fitting = [size for size in range(1, a.experts + 1) if a.experts % size == 0]
        raise UserError(
            f"expert-parallel size {ep} does not divide the model's {a.experts} experts",
            "distributed.ep",
            f"use one of {', '.join(map(str, fitting))}",
        )
    if cluster.world % ep:
        raise UserError(
            f"expert-parallel size {ep} does not divide the {cluster.world} GPUs",
            "distributed.ep",
            "change it, or the number of nodes or GPUs",
        )


def _expert_parallel_sizes(a: Architecture, cluster: ClusterSpec) -> list[int]:
    return [size for size in range(1, a.experts + 1) if a.experts % size == 0 and cluster.world % size == 0]


def _collect_memory(job: Job, ep: int, rows: int) -> memory.Memory:
    return memory.collect_memory(
        job.a,
        ep=ep,
        rows=rows,
        context=job.context,
        b=job.b,
        logit_tokens=min(rows * job.context, max(1, LOGITS_ELEMENTS // job.a.vocabulary))
        if job.config.statistics.nll
        else 0,
    )


def _collect(job: Job, ep: int) -> StagePlan:
    a, spec, rows = job.a, job.spec, job.config.statistics.batch_rows
    tokens = rows * job.context
    used = _collect_memory(job, ep, rows)
    traffic = cost.collect_traffic(a, spec, ep=ep, tokens=tokens, b=job.b)
    flops = cost.forward_flops_per_token(a, job.context, head=job.config.statistics.nll)
    time = cost.step_time(
        a,
        spec,
        traffic,
        forward_flops=flops * tokens,
        training_flops=0,
        weight_bytes=memory.rank_parameters(a, ep) * job.b,
    )
    corpus = corpus_tokens(job.config)
    return StagePlan(
        rows=rows,
        memory=used,
        fits=used.peak_bytes <= spec.usable_bytes,
        largest_rows=_largest(lambda n: _collect_memory(job, ep, n).peak_bytes, spec.usable_bytes),
        traffic=traffic,
        time=time,
        tokens_per_s=tokens * spec.world / time.serial_s,
        steps=None if corpus is None else max(ceil_div(corpus, tokens * spec.world), 1),
        storage_s=_load_s(job, ep, 0),
    )


def _unlearn_memory(job: Job, ep: int, stage: int, rows: int, recompute: bool | None = None) -> memory.Memory:
    return memory.unlearn_memory(
        job.a,
        world=job.spec.world,
        ep=ep,
        zero=job.zero(stage),
        rows=rows,
        context=job.context,
        b=job.b,
        passes=job.passes(),
        recompute=job.config.unlearning.recompute if recompute is None else recompute,
    )


def _unlearn(job: Job, ep: int, stage: int) -> StagePlan:
    a, spec, (passes, rows) = job.a, job.spec, job.micro_batches()
    tokens, run = rows * job.context, job.passes()
    used = _unlearn_memory(job, ep, stage, rows)
    traffic = cost.unlearn_traffic(
        a,
        spec,
        ep=ep,
        zero=job.zero(stage),
        passes=passes,
        tokens=tokens,
        b=job.b,
        run=run,
        recompute=job.config.unlearning.recompute,
    )
    flops = cost.forward_flops_per_token(a, job.context, layers=run.layers, head=run.head)
    frozen_flops = weights = 0.0
    if run.frozen_stays:
        frozen_flops = cost.forward_flops_per_token(a, job.context, layers=run.frozen_layers, head=run.frozen_head)
        weights = memory.rank_parameters(a, ep, run.frozen_layers)
    weights += 2 * memory.rank_parameters(a, ep, None if run.head else run.layers)
    time = cost.step_time(
        a,
        spec,
        traffic,
        forward_flops=frozen_flops * run.frozen_share * tokens * passes,
        training_flops=3 * flops * tokens * passes,
        weight_bytes=weights * job.b * passes,
        optimizer_elements=count_parameters(a).total / spec.world,
    )
    settings = job.config.unlearning
    return StagePlan(
        rows=rows,
        memory=used,
        fits=used.peak_bytes <= spec.usable_bytes,
        largest_rows=_largest(lambda n: _unlearn_memory(job, ep, stage, 2 * n).peak_bytes, spec.usable_bytes),
        traffic=traffic,
        time=time,
        tokens_per_s=(settings.forget_rows + settings.retain_rows) * job.context / time.serial_s,
        steps=settings.steps,
        storage_s=(
            _load_s(job, ep, stage) * (2 if run.frozen_layers else 1)
            + ceil_div(settings.steps, settings.save_every) * checkpoint_bytes(job, stage) / (spec.storage_gb_s * GB)
        ),
    )


def checkpoint_bytes(job: Job, stage: int) -> float:
    """fp32 parameters and two Adam moments; below ZeRO-3 the 16-bit parameters are saved beside them."""
    return count_parameters(job.a).total * (memory.MASTER_BYTES + (job.b if stage < 3 else 0))


def _load_s(job: Job, ep: int, stage: int) -> float:
    """Every process reads from the shared storage what it will hold: its partition with ZeRO-3, else its experts and
    all that is not an expert."""
    whole = job.spec.world * memory.rank_parameters(job.a, ep)
    elements = count_parameters(job.a).total if stage == 3 else whole
    return elements * job.b / (job.spec.storage_gb_s * GB)


def evaluation_gpus(config: Config, weights_bytes: float, gpu_memory_gb: float) -> int:
    """GPUs that ``evaluate`` needs to hold one model of ``weights_bytes``, in one process.

    The relearning attack trains it with AdamW: gradients and two moments beside the weights.
    """
    held = weights_bytes * (4 if config.evaluation.relearning is not None else 1)
    return max(math.ceil(held / (EVALUATION_SHARE * gpu_memory_gb * GB)), 1)


def _choice(job: Job, ep: int, stage: int) -> Choice:
    unlearn = _unlearn(job, ep, stage)
    collect = _collect_memory(job, ep, job.config.statistics.batch_rows)
    return Choice(
        ep=ep,
        zero_stage=stage,
        fits=unlearn.fits,
        peak_bytes=unlearn.memory.peak_bytes,
        largest_rows=unlearn.largest_rows,
        step_s=unlearn.time.serial_s,
        bound=unlearn.time.bound,
        collect_fits=collect.peak_bytes <= job.spec.usable_bytes,
    )


def _largest(peak_bytes: Any, limit_bytes: float) -> int:
    """The largest number of rows whose peak stays within the limit (0: not even one row; at most MAX_ROWS).

    The peak grows with the rows, so bisection finds it.
    """
    low, high = 0, MAX_ROWS
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak_bytes(middle) <= limit_bytes else (low, middle - 1)
    return low


def _warnings(job: Job, result: Plan) -> list[str]:
    """What the user should know before pressing enter."""
    spec, settings, warnings = job.spec, job.config.unlearning, []
    usable = f"{spec.usable_bytes / GB:.0f} GB usable on a GPU"
    for name, stage in (("collect", result.collect), ("unlearn", result.unlearn)):
        if not stage.fits:
            needs = f"{name} needs {stage.memory.peak_bytes / GB:.0f} GB of {usable}"
            if name == "unlearn" and not settings.recompute and result.recomputed_peak_bytes <= spec.usable_bytes:
                needs += " (it fits with unlearning.recompute)"
            if stage.largest_rows:
                key = "statistics.batch_rows" if name == "collect" else "unlearning.micro_batch_rows"
                warnings.append(f"{needs}: set {key} to {stage.largest_rows} or less")
            else:
                warnings.append(f"{needs}, and even one row does not fit: {_way_out(result, name)}")
    for name, stage in result.variants.items():
        if not stage.fits:
            warnings.append(f"unlearn of variant {name} needs {stage.memory.peak_bytes / GB:.0f} GB of {usable}")
    world_rows = min(settings.forget_rows, settings.retain_rows)
    if world_rows < spec.world:
        warnings.append(
            f"{world_rows} rows per step over {spec.world} GPUs: most GPUs have nothing to do; "
            "raise unlearning.forget_rows and retain_rows"
        )
    if result.host_bytes > spec.host_memory_gb * GB:
        warnings.append(
            f"each of a node's {spec.gpus_per_node} processes reads its share of the model: "
            f"{result.host_bytes / GB:.0f} GB of {spec.host_memory_gb:.0f} GB of host memory; "
            "raise distributed.ep, start fewer processes per node, or use nodes with more memory"
        )
    if result.evaluation_gpus > spec.gpus_per_node:
        warnings.append(
            f"evaluate holds a model on one node and needs {result.evaluation_gpus} GPUs, a node has "
            f"{spec.gpus_per_node}: its stage would run out of memory"
        )
    if job.config.evaluation.nproc * result.evaluation_gpus > max(spec.gpus_per_node, result.evaluation_gpus):
        warnings.append(
            f"each of evaluation.nproc {job.config.evaluation.nproc} processes holds a whole model and needs "
            f"{result.evaluation_gpus} GPUs, a node has {spec.gpus_per_node}: lower it"
        )
    if result.ep > spec.gpus_per_node:
        warnings.append(
            f"expert-parallel size {result.ep} is larger than a node: tokens cross between nodes in every layer"
        )
    best = result.choices[0]
    if best.fits and best.step_s < 0.8 * result.unlearn.time.serial_s:
        warnings.append(
            f"distributed.ep {best.ep} with ZeRO-{best.zero_stage} would take "
            f"{best.step_s / result.unlearn.time.serial_s:.0%} of the step time"
        )
    return warnings


def _way_out(result: Plan, name: str) -> str:
    """What would fit, for a stage that does not."""
    for choice in result.choices:
        if name == "unlearn" and choice.fits:
            return f"distributed.ep {choice.ep} with unlearning.zero_stage {choice.zero_stage} fits"
        if name == "collect" and choice.collect_fits:
            return f"distributed.ep {choice.ep} fits"
    return "nothing fits on this cluster: use shorter rows (data.context_length), more nodes, or GPUs with more memory"


def as_dict(result: Plan) -> dict[str, Any]:
    """The plan as JSON-ready values, with the totals that are properties of its parts."""
    value = asdict(result)
    value["parameters"]["total"], value["active"]["total"] = result.parameters.total, result.active.total
    stages = [(value["collect"], result.collect), (value["unlearn"], result.unlearn)]
    stages += [(value["variants"][name], stage) for name, stage in result.variants.items()]
    for entry, stage in stages:
        entry["memory"]["peak_bytes"] = stage.memory.peak_bytes
        entry["time"].update(overlapped_s=stage.time.overlapped_s, serial_s=stage.time.serial_s, bound=stage.time.bound)
        entry["job_s"] = stage.job_s
    value["assumptions"] = list(ASSUMPTIONS)
    return value


def plan_command(config: Config, spec: ClusterSpec, json: bool) -> int:
    """Print the plan as tables, or as JSON; exit status 0 also when nothing fits (the warnings say so)."""
    result = plan(config, spec)
    if json:
        print(json_module.dumps(as_dict(result), indent=1, sort_keys=True))
    else:
        from trace_ds.cluster.plan_view import print_plan

        print_plan(result)
    return 0
