"""``trace-ds plan``: what a run needs on a given cluster, before a weight is loaded or a job is queued.

    plan(config, ClusterSpec(nodes=4)).unlearn.memory.peak_bytes

Everything follows from the model's ``config.json``, the run's configuration and the cluster's numbers:
parameters by kind (:mod:`trace_ds.cluster.architecture`), memory by part (:mod:`~trace_ds.cluster.memory`), and here
bytes moved, files, and a lower bound of time: the rated peak of every resource, all of them at work at the same time.
``docs/plan.md`` has the cost model and what of it was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import (
    Architecture,
    Parameters,
    active_parameters,
    count_parameters,
    read_architecture,
)
from trace_ds.cluster.job import GB, ClusterSpec, PlannedJob, ceil_div, corpus_tokens
from trace_ds.config.compose import fragment_of, published_config, published_config_path
from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config
from trace_ds.config.sections.training import FinetuneSettings
from trace_ds.errors import UserError
from trace_ds.hub.models import is_whole
from trace_ds.models.engine_config import RANKS_SUMMED_IN_BF16
from trace_ds.models.families import FAMILIES, ModelInfo, check_expert_parallel
from trace_ds.stages.inputs import with_expert_parallel_sizes
from trace_ds.stages.pipeline import Request
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config, read_model_directory
from trace_ds.terminal import duration

EVALUATION_SHARE = 0.8  # of a GPU's memory may be weights (trace_ds/evaluation/language_model.py)
MAX_ROWS = 4096  # no search for a larger micro-batch than this
MANY_FILES = 5000  # of a checkpoint; parallel file systems take seconds to minutes to create more

ASSUMPTIONS = (
    "every parameter that is loaded has a gradient and moments, also what unlearning.trainable freezes",
    "RMU runs, loads, copies and saves the layers up to its own (unlearning.evaluate needs the whole model)",
    "routed tokens are spread evenly for time, 1.5 times the mean on the busiest GPU for memory",
    "times are lower bounds from rated FLOPs and bandwidth, all at work at once; real steps take several times as long",
)


@dataclass(frozen=True)
class Traffic:
    """One kind of collective in one step: GPUs that take part, bytes that one of them receives, and seconds at rated
    speed on the links inside and between nodes."""

    name: str
    group: int
    received_bytes: float
    intra_s: float
    inter_s: float


@dataclass(frozen=True)
class StagePlan:
    """One distributed stage: memory of a GPU, the largest micro-batch that fits, bytes moved and the least seconds of
    one step (``collect``: one batch) by resource.

    ``steps`` is None when the length of the stage is not known.
    """

    rows: int
    memory: memory.Memory
    fits: bool
    largest_rows: int
    traffic: list[Traffic]
    resources_s: dict[str, float]
    steps: int | None

    @property
    def step_s(self) -> float:
        """Lower bound of one step; everything else hides behind the slowest resource at best."""
        return max(self.resources_s.values())

    @property
    def bound(self) -> str:
        """The resource that dominates."""
        return max(self.resources_s, key=self.resources_s.__getitem__)

    @property
    def at_least_s(self) -> float | None:
        """Lower bound of the stage's steps; None when its length is not known."""
        return None if self.steps is None else self.steps * self.step_s


@dataclass(frozen=True)
class Choice:
    """One combination of expert-parallel size and ZeRO stage for ``unlearn``, at the configured micro-batch."""

    ep: int
    zero_stage: int
    fits: bool
    peak_bytes: float
    largest_rows: int
    received_bytes: float
    checkpoint_files: int
    collect_fits: bool


@dataclass(frozen=True)
class RunPlan:
    """What a run needs on a cluster, as `trace-ds plan` shows it.
    Attributes:
        stages: ``collect``, ``unlearn``, and by name the fine-tunings that come first and the ``unlearn`` of variants.
        recomputed_peak_bytes: the peak of ``unlearn`` if activations were recomputed.
        storage_bytes: of all jobs. evaluation_peak_bytes: what a scored model takes of a GPU.
        choices: what fits by the bytes that a GPU receives in a step, then by files; the rest by memory.
    """

    family: str
    parameters: Parameters
    active: Parameters
    cluster: ClusterSpec
    ep: int
    zero_stage: int
    stages: dict[str, StagePlan]
    recomputed_peak_bytes: float
    checkpoint_bytes: float
    checkpoint_files: int
    storage_bytes: float
    host_bytes: float
    evaluation_peak_bytes: float
    choices: list[Choice]
    warnings: list[str]

    @property
    def collect(self) -> StagePlan:
        return self.stages["collect"]

    @property
    def unlearn(self) -> StagePlan:
        return self.stages["unlearn"]


def plan(config: Config, cluster: ClusterSpec) -> RunPlan:
    """Plan ``config`` on ``cluster``.

    Raises:
        UserError: the model directory or its ``config.json`` is missing or not of a supported family; the
            expert-parallel size does not divide the experts or the GPUs; the DeepSpeed file cannot be read.
    """
    values, where = model_config_of(config.model.path)
    return plan_model(values, config, cluster, where)


def summary_line(request: Request) -> str:
    """Training jobs, time and storage of a run on one node of eight 80 GB GPUs, in one line; only the number of jobs
    where the model or its family is not known."""
    others = set(request.written.variants)
    try:
        return jobs_line(plan(request.located("plan", download=False).chosen_config, ClusterSpec()), others)
    except UserError:
        names = ["unlearn", *request.chosen, *(request.written.finetune.models if request.written.finetune else ())]
        return _job_count(len(names), len(others - {*names}))


def jobs_line(result: RunPlan, variants: set[str]) -> str:
    """Training jobs, the least time of all their steps, and the storage of all their files, in one line."""
    names = [name for name in result.stages if name != "collect"]
    spec, seconds = result.cluster, sum(result.stages[name].at_least_s or 0 for name in names)
    left = len(variants - {name.removeprefix("unlearn of ") for name in names})
    gpus = f"{spec.nodes} x {spec.gpus_per_node} GPUs of {spec.gpu_memory_gb:g} GB"
    return (
        f"{_job_count(len(names), left)}; at least {duration(seconds)} on {gpus}; {result.storage_bytes / 1e12:.2f} TB"
    )


def _job_count(jobs: int, left: int) -> str:
    """``jobs`` in words, and how many variants are ``left`` out."""
    return f"{jobs} training job{'s' * (jobs > 1)}" + (f" ({left} more with --variants all)" if left else "")


def model_config_of(model_path: str) -> tuple[dict[str, Any], str]:
    """A model's ``config.json`` and where it is: in its directory, else with the model fragment of that hub id."""
    fragment = None if Path(model_path).is_dir() else fragment_of(model_path)
    if fragment is None:
        if is_whole(Path(model_path)):
            read_model_directory(model_path)  # of weights that are there, what the job would stumble on
        return read_model_config(model_path), str(Path(model_path) / CONFIG_NAME)
    return published_config(fragment), str(published_config_path(fragment))


def plan_model(
    model_config: Mapping[str, Any], config: Config, cluster: ClusterSpec, where: str = CONFIG_NAME
) -> RunPlan:
    """:func:`plan` for a model that is known only by its configuration."""
    a = read_architecture(model_config, where)
    config, *variants = (
        with_expert_parallel_sizes(each, model_config, cluster.world, cluster.gpus_per_node)
        for each in (config, *variants_of(config).values())
    )
    job, *others = unlearning = [PlannedJob.of(a, cluster, each) for each in (config, *variants)]
    for each in unlearning:
        _check(each)
    stages = {"collect": _collect(job), "unlearn": _training(job)}
    saving = [(each, each.kept, len(each.settings.kept_steps(each.steps() or 1))) for each in unlearning]
    if (finetune := config.finetune) is not None:
        for name, corpora in finetune.models.items():
            making = PlannedJob.of(a, cluster, config, FinetuneSettings.of(finetune, config.unlearning))
            stages[f"finetune of {name}"] = _training(making, corpora)
            saving.append((making, a, making.settings.keep))
    stages |= {f"unlearn of {name}": _training(each) for name, each in zip(config.variants, others, strict=True)}
    every = count_parameters(a)
    sizes = [size for size in range(1, a.experts + 1) if a.experts % size == 0 and cluster.world % size == 0]
    choices = [_choice(replace(job, ep=ep, zero=replace(job.zero, stage=stage))) for ep in sizes for stage in (1, 2, 3)]
    choices.sort(
        key=lambda choice: (
            not choice.fits,
            *((choice.received_bytes, choice.checkpoint_files) if choice.fits else (choice.peak_bytes, 0)),
        )
    )
    result = RunPlan(
        family=a.family,
        parameters=every,
        active=active_parameters(a),
        cluster=cluster,
        ep=job.ep,
        zero_stage=job.zero.stage,
        stages=stages,
        recomputed_peak_bytes=memory.unlearn_memory(job, stages["unlearn"].rows, recompute=True).peak_bytes,
        checkpoint_bytes=checkpoint_bytes(job, job.kept),
        checkpoint_files=checkpoint_files(job, job.kept),
        storage_bytes=sum(
            (keep + 1) * checkpoint_bytes(each, saved) + every.total * each.b for each, saved, keep in saving
        ),
        host_bytes=memory.host_bytes(job),
        evaluation_peak_bytes=evaluation_peak_bytes(job, config.evaluation.ep, config.evaluation.zero_stage),
        choices=choices,
        warnings=[],
    )
    result.warnings.extend(_warnings(job, result, sizes))
    return result


def _check(job: PlannedJob) -> None:
    a, cluster = job.a, job.spec
    info = ModelInfo(Path(), FAMILIES[a.family], {}, a.experts, a.top_k, a.layers, "")
    check_expert_parallel(info, job.ep, cluster.world)
    check_expert_parallel(info, job.config.evaluation.ep, cluster.world, "evaluation.ep")


# Bytes moved, and time


def forward_flops_per_token(a: Architecture, context: int, *, layers: int | None = None, head: bool = True) -> float:
    """Model FLOPs of one token's forward pass through the first ``layers`` layers (default all) and the head."""
    total = 0.0
    for layer, block in enumerate(a.blocks[:layers]):
        attended = context * (a.query_width + a.output_width)
        if layer in a.linear.layers:  # a head's state is read twice and written once
            attended = 3 * a.linear.value_heads * a.linear.key_width * a.linear.value_width
        total += 2 * (block.non_expert + block.experts * a.top_k / a.experts + attended)
    return total + (2 * a.hidden * a.vocabulary if head else 0)


def collective(
    spec: ClusterSpec, name: str, group: int, local: int, size_bytes: float, times: float, *, exchange: bool = False
) -> Traffic:
    """``times`` collectives among ``group`` GPUs, ``local`` of them on each node.

    Rings (all-gather or reduce-scatter, of ``size_bytes`` gathered), where what a node needs comes in once, through the
    ports of all its GPUs; or, with ``exchange``, all-to-all, in which each GPU holds ``size_bytes``.
    """
    between = size_bytes * (1 - local / group) / (1 if exchange else local)
    within = size_bytes * ((local - 1 if exchange else (group - 1) * (local > 1)) / group)
    intra_s, inter_s = within / (spec.intra_gb_s * GB), between / (spec.inter_gb_s * GB)
    return Traffic(name, group, times * size_bytes * (group - 1) / group, times * intra_s, times * inter_s)


def _all_to_all(job: PlannedJob, tokens: float, times: float) -> Traffic:
    """Tokens to their experts or back, so many times: among ``ep`` consecutive ranks."""
    size_bytes, local = tokens * job.a.top_k * job.a.hidden * job.b, min(job.ep, job.spec.gpus_per_node)
    return collective(job.spec, "all-to-all of tokens", job.ep, local, size_bytes, times, exchange=True)


def training_traffic(job: PlannedJob) -> list[Traffic]:
    """One step of a training job on every GPU.

    ZeRO-3 gathers every layer of the pass for the forward and again for the backward pass, and once more for the
    recomputation when a layer is too large to be kept until its backward pass; gradients are reduce-scattered in
    every pass. ZeRO-1 and -2 all-reduce gradients (a reduce-scatter and an all-gather; DeepSpeed's default at stage 2
    too), stage 2 in every pass, and all-gather the updated parameters once per step.
    """
    a, spec, ep, zero, run = job.kept, job.spec, job.ep, job.zero, job.passes()
    passes, rows = job.micro_batches()
    wider = 4 / job.b if spec.world > RANKS_SUMMED_IN_BF16 else 1
    again = job.settings.recompute and memory.largest_layer(a, ep) > memory.reuse_distance(a, zero)
    frozen = a.first(run.frozen_layers) if run.frozen_stays else None
    traffic: list[Traffic] = []

    def rings(kind: str, group: int, local: int, size_of: Callable[[Parameters], float]) -> None:
        """Those of the parameters that a group of GPUs shares: experts, or all others."""

        def ring(name: str, size_bytes: float, times: float) -> None:
            traffic.append(collective(spec, name.format(kind), group, local, size_bytes, times))

        whole = size_of(count_parameters(a)) * job.b
        ran = whole if run.head else size_of(count_parameters(a.first(run.layers))) * job.b
        if zero.stage == 3:
            copy = size_of(count_parameters(frozen)) * job.b if frozen else 0.0
            gathered = (3 if again else 2) * ran + copy * ceil_div(passes, run.frozen_together) / passes
            ring("all-gather of {}parameters", gathered, passes)
            ring("reduce-scatter of {}gradients", ran * wider, passes)
        else:
            ring("all-reduce of {}gradients", whole * wider, 2 * (passes if zero.stage == 2 else 1))
            ring("all-gather of {}parameters", whole, 1)

    same_experts = spec.world // ep  # GPUs, `ep` apart
    rings("", spec.world, spec.gpus_per_node, lambda every: every.non_expert)
    local = min(max(spec.gpus_per_node // ep, 1), same_experts)
    rings("expert ", same_experts, local, lambda every: every.experts / ep)
    # dispatch and combine: forward and backward (and recomputation, and the frozen copy)
    through: float = sum(map(a.is_moe, range(run.layers))) * (3 if job.settings.recompute else 2)
    through += frozen.moe_layers * run.frozen_share if frozen else 0
    traffic.append(_all_to_all(job, rows * job.context, through * 2 * passes))
    return [entry for entry in traffic if entry.received_bytes]


# Stages


def _stage(
    job: PlannedJob,
    rows: int,
    used: Callable[[int], memory.Memory],
    traffic: list[Traffic],
    flops: float,
    *,
    sides: int = 1,
    steps: int | None,
) -> StagePlan:
    """A stage whose step takes ``rows`` rows of all ``sides`` on a GPU at a time; ``used``: memory of so many rows."""
    limit, needed = job.spec.usable_bytes, used(rows)
    largest = _largest(lambda number: used(sides * number).peak_bytes, limit)
    resources_s = {
        "compute": flops / (job.spec.tflops * 1e12),
        "links inside a node": sum(entry.intra_s for entry in traffic),
        "links between nodes": sum(entry.inter_s for entry in traffic),
    }
    return StagePlan(rows, needed, needed.peak_bytes <= limit, largest, traffic, resources_s, steps)


def _collect(job: PlannedJob) -> StagePlan:
    rows, corpus = job.config.statistics.batch_rows, corpus_tokens(job.config)
    tokens = rows * job.context
    traffic = [_all_to_all(job, tokens, 2 * job.a.moe_layers)] if job.ep > 1 else []
    flops = forward_flops_per_token(job.a, job.context, head=job.config.statistics.nll) * tokens
    steps = None if corpus is None else max(ceil_div(corpus, tokens * job.spec.world), 1)
    return _stage(
        job,
        rows,
        lambda number: memory.collect_memory(job, number),
        traffic,
        flops,
        steps=steps,
    )


def _training(job: PlannedJob, corpora: list[str] | None = None) -> StagePlan:
    """``unlearn``, or the fine-tuning of one model on ``corpora``."""
    (passes, rows), run, sides = job.micro_batches(), job.passes(), len(job.rows_per_step)
    flops = 3 * forward_flops_per_token(job.kept, job.context, layers=run.layers, head=run.head)
    if run.frozen_stays:
        copy = forward_flops_per_token(job.a, job.context, layers=run.frozen_layers, head=run.frozen_head)
        flops += copy * run.frozen_share
    return _stage(
        job,
        rows,
        lambda number: memory.unlearn_memory(job, number),
        training_traffic(job),
        flops * rows * job.context * passes,
        sides=sides,
        steps=job.steps(corpora),
    )


def checkpoint_bytes(job: PlannedJob, saved: Architecture) -> float:
    """fp32 parameters and two Adam moments; below ZeRO-3 the 16-bit parameters are saved beside them."""
    return count_parameters(saved).total * (memory.MASTER_BYTES + (job.b if job.zero.stage < 3 else 0))


def checkpoint_files(job: PlannedJob, saved: Architecture) -> int:
    """Files of one checkpoint: with ZeRO-3 two a rank; below, one optimizer state a rank, one file of the module, and
    with expert parallelism one file of every expert of every MoE layer."""
    if job.zero.stage == 3:
        return 2 * job.spec.world
    return job.spec.world + 1 + (saved.moe_layers * saved.experts if job.ep > 1 else 0)


def evaluation_peak_bytes(job: PlannedJob, ep: int, zero_stage: int) -> float:
    """Peak bytes that ``evaluate`` holds on each GPU, a model being shared by all ranks of the job.

    The relearning attack trains it with AdamW: gradients and two moments beside the weights, in fp32 with fp32 masters
    where the model is sharded.
    """
    elements, gathered = memory.rank_parameters(job.a, ep), 0.0
    if zero_stage == 3:
        elements, gathered = count_parameters(job.a).total / job.spec.world, 2 * memory.largest_layer(job.a, ep)
    states = 8 if (ep > 1 or zero_stage == 3) and job.config.model.dtype == "bf16" else 4
    return (elements * (states if job.config.evaluation.relearning is not None else 1) + gathered) * job.b


def _evaluation_cure(job: PlannedJob, sizes: list[int], limit_bytes: float) -> str:
    """How the ranks of the job can share a model that is too large for ``evaluate`` as configured."""
    for zero_stage in (0, 3):
        for size in sizes:
            if evaluation_peak_bytes(job, size, zero_stage) <= limit_bytes:
                return f"set evaluation.ep to {size}" + (" and evaluation.zero_stage to 3" if zero_stage else "")
    return "use more nodes, or GPUs with more memory"


def _choice(job: PlannedJob) -> Choice:
    unlearn = _training(job)
    collect = memory.collect_memory(job, job.config.statistics.batch_rows)
    return Choice(
        ep=job.ep,
        zero_stage=job.zero.stage,
        fits=unlearn.fits,
        peak_bytes=unlearn.memory.peak_bytes,
        largest_rows=unlearn.largest_rows,
        received_bytes=sum(entry.received_bytes for entry in unlearn.traffic),
        checkpoint_files=checkpoint_files(job, job.kept),
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


def _warnings(job: PlannedJob, result: RunPlan, sizes: list[int]) -> list[str]:
    """What the user should know before pressing enter."""
    spec, settings, warnings = job.spec, job.config.unlearning, []
    for name, stage in result.stages.items():
        if stage.fits:
            continue
        needs = f"{name} needs {stage.memory.peak_bytes / GB:.0f} GB of {spec.usable_bytes / GB:.0f} GB usable on a GPU"
        if name == "unlearn" and not settings.recompute and result.recomputed_peak_bytes <= spec.usable_bytes:
            needs += " (it fits with unlearning.recompute)"
        if stage.largest_rows:
            section = "finetune" if name.startswith("finetune") else "unlearning"
            key = "statistics.batch_rows" if name == "collect" else f"{section}.micro_batch_rows"
            warnings.append(f"{needs}: set {key} to {stage.largest_rows} or less")
        else:
            warnings.append(f"{needs}, and even one row does not fit: {_way_out(result, name)}")
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
    limit_bytes = EVALUATION_SHARE * spec.gpu_memory_gb * GB
    if result.evaluation_peak_bytes > limit_bytes:
        warnings.append(
            f"evaluate needs {result.evaluation_peak_bytes / GB:.0f} GB for a model on each GPU, of "
            f"{limit_bytes / GB:.0f} GB: {_evaluation_cure(job, sizes, limit_bytes)}"
        )
    if result.ep > spec.gpus_per_node:
        warnings.append(
            f"expert-parallel size {result.ep} is larger than a node: tokens cross between nodes in every layer"
        )
    if result.checkpoint_files > MANY_FILES:
        warnings.append(
            f"a checkpoint has {result.checkpoint_files:,} files (one an expert and layer below ZeRO-3): "
            "unlearning.zero_stage=3 writes two a process"
        )
    return warnings


def _way_out(result: RunPlan, name: str) -> str:
    """What would fit, for a stage that does not."""
    for choice in result.choices:
        if name.startswith("unlearn") and choice.fits:
            return f"--set distributed.ep={choice.ep} --set unlearning.zero_stage={choice.zero_stage} fits"
        if name == "collect" and choice.collect_fits:
            return f"--set distributed.ep={choice.ep} fits"
    return (
        "no choice fits on this cluster: use shorter rows (data.context_length), more nodes, or GPUs with more memory"
    )
