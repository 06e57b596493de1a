"""``trace-ds plan``: what a run needs on a given cluster, before a weight is loaded or a job is queued.

    plan(config, ClusterSpec(nodes=4)).unlearn.memory.peak_bytes

Everything follows from the model's ``config.json``, the run's configuration and the cluster's numbers:
parameters by kind (:mod:`trace_ds.cluster.architecture`), memory by part (:mod:`~trace_ds.cluster.memory`),
bytes moved and a lower bound of time (:mod:`~trace_ds.cluster.cost`). No torch, no weights, no GPU: it answers in well
under a second. The cost model and what of it was checked against measurements is written down in ``docs/plan.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from trace_ds.cluster.job import PlannedJob, ceil_div, corpus_tokens
from trace_ds.cluster.spec import GB, ClusterSpec
from trace_ds.config.compose import fragment_of, published_config, published_config_path
from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config
from trace_ds.config.sections.finetune import TARGET, FinetuneSettings
from trace_ds.errors import UserError
from trace_ds.hub.models import is_whole
from trace_ds.models.families import FAMILIES, ModelInfo, check_expert_parallel
from trace_ds.stages.inputs import with_expert_parallel_sizes
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config, read_model_directory

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
class StagePlan:
    """One distributed stage: memory of a GPU, the largest micro-batch that fits, bytes moved and a lower bound of the
    time of one step (``collect``: one batch); ``loaded_bytes`` are what all ranks read of the model.

    ``steps`` is None when the length of the stage is not known.
    """

    rows: int
    memory: memory.Memory
    fits: bool
    largest_rows: int
    traffic: list[cost.Traffic]
    time: cost.StepTime
    steps: int | None
    loaded_bytes: float

    @property
    def at_least_s(self) -> float | None:
        """Lower bound of the stage's steps; None when its length is not known."""
        return None if self.steps is None else self.steps * self.time.at_least_s


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
    """The answer; ``choices`` are ranked (what fits by the bytes that a GPU receives in a step, then by files of a
    checkpoint; the rest by memory); ``variants`` are the ``unlearn`` of each, by name, ``finetune`` the job of each
    model that is made first; storage is that of all jobs; ``evaluated`` are the models that all jobs score,
    ``evaluate_bytes`` is what is read for it, and ``evaluation_peak_bytes`` what a model takes of each GPU."""

    family: str
    parameters: Parameters
    active: Parameters
    cluster: ClusterSpec
    ep: int
    zero_stage: int
    collect: StagePlan
    unlearn: StagePlan
    finetune: dict[str, StagePlan]
    variants: dict[str, StagePlan]
    recomputed_peak_bytes: float
    checkpoint_bytes: float
    checkpoint_files: int
    storage_bytes: float
    host_bytes: float
    evaluation_peak_bytes: float
    evaluated: int
    evaluate_bytes: float
    choices: list[Choice]
    warnings: list[str]


def plan(config: Config, cluster: ClusterSpec) -> RunPlan:
    """Plan ``config`` on ``cluster``.

    Raises:
        UserError: the model directory or its ``config.json`` is missing or not of a supported family; the
            expert-parallel size does not divide the experts or the GPUs; the DeepSpeed file cannot be read.
    """
    values, where = model_config_of(config.model.path)
    return plan_model(values, config, cluster, where)


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
    job, *others = (PlannedJob.of(a, cluster, each) for each in (config, *variants))
    for each in (job, *others):
        _check(each)
    unlearn = _training(job)
    made = config.finetune.models if config.finetune is not None else {}
    settings = FinetuneSettings.of(config.finetune, config.unlearning) if config.finetune is not None else None
    making = {name: PlannedJob.of(a, cluster, config, settings) for name in made}
    every = count_parameters(a)
    sizes = [size for size in range(1, a.experts + 1) if a.experts % size == 0 and cluster.world % size == 0]
    training = (job, *others)
    kept = [len(each.settings.kept_steps(each.steps() or 1)) for each in training]
    saving = [(each, each.held, number) for each, number in zip(training, kept, strict=True)]
    saving += [(each, a, each.settings.keep) for each in making.values()]
    # a run's variants take the scores of the models that they share from it
    references = {*config.evaluation.models, *made} - {TARGET}
    evaluated, model_bytes = 1 + len(references) + len(kept), every.total * job.b
    result = RunPlan(
        family=a.family,
        parameters=every,
        active=active_parameters(a),
        cluster=cluster,
        ep=job.ep,
        zero_stage=job.zero.stage,
        collect=_collect(job),
        unlearn=unlearn,
        finetune={name: _training(making[name], corpora) for name, corpora in made.items()},
        variants={name: _training(each) for name, each in zip(config.variants, others, strict=True)},
        recomputed_peak_bytes=memory.unlearn_memory(job, unlearn.rows, recompute=True).peak_bytes,
        checkpoint_bytes=checkpoint_bytes(job, job.held),
        checkpoint_files=checkpoint_files(job, job.held),
        storage_bytes=sum(
            (keep + 1) * checkpoint_bytes(each, saved) + every.total * each.b for each, saved, keep in saving
        ),
        host_bytes=memory.host_bytes(job),
        evaluation_peak_bytes=evaluation_peak_bytes(job, config.evaluation.ep, config.evaluation.zero_stage),
        evaluated=evaluated,
        evaluate_bytes=evaluated * model_bytes,
        choices=sorted(
            (
                _choice(replace(job, ep=size, zero=replace(job.zero, stage=stage)))
                for size in sizes
                for stage in (1, 2, 3)
            ),
            key=lambda choice: (
                not choice.fits,
                *((choice.received_bytes, choice.checkpoint_files) if choice.fits else (choice.peak_bytes, 0)),
            ),
        ),
        warnings=[],
    )
    result.warnings.extend(_warnings(job, result, sizes))
    return result


def _check(job: PlannedJob) -> None:
    a, cluster = job.a, job.spec
    if min(cluster.nodes, cluster.gpus_per_node) < 1:
        raise UserError("the cluster has no GPU", "--nodes, --gpus-per-node", "give both as 1 or more")
    info = ModelInfo(Path(), FAMILIES[a.family], {}, a.experts, a.top_k, a.layers, "")
    check_expert_parallel(info, job.ep, cluster.world)
    check_expert_parallel(info, job.config.evaluation.ep, cluster.world, "evaluation.ep")


def _collect(job: PlannedJob) -> StagePlan:
    a, spec, rows = job.a, job.spec, job.config.statistics.batch_rows
    tokens, corpus = rows * job.context, corpus_tokens(job.config)
    used = memory.collect_memory(job, rows)
    traffic = cost.collect_traffic(job, tokens)
    flops = cost.forward_flops_per_token(a, job.context, head=job.config.statistics.nll)
    time = cost.step_time(job, traffic, flops=flops * tokens, weights=memory.rank_parameters(a, job.ep))
    return StagePlan(
        rows=rows,
        memory=used,
        fits=used.peak_bytes <= spec.usable_bytes,
        largest_rows=_largest(lambda n: memory.collect_memory(job, n).peak_bytes, spec.usable_bytes),
        traffic=traffic,
        time=time,
        steps=None if corpus is None else max(ceil_div(corpus, tokens * spec.world), 1),
        loaded_bytes=_loaded_bytes(job, a, whole=True),
    )


def _training(job: PlannedJob, corpora: list[str] | None = None) -> StagePlan:
    """``unlearn``, or the fine-tuning of one model on ``corpora``."""
    a, spec, (passes, rows) = job.held, job.spec, job.micro_batches()
    run, tokens, sides = job.passes(), rows * job.context * passes, len(job.rows_per_step)
    used = memory.unlearn_memory(job, rows)
    traffic = cost.unlearn_traffic(job)
    flops = cost.forward_flops_per_token(a, job.context, layers=run.layers, head=run.head)
    frozen_flops, weights = 0.0, 2 * memory.rank_parameters(a if run.head else a.first(run.layers), job.ep)
    if run.frozen_stays:
        frozen_flops = cost.forward_flops_per_token(a, job.context, layers=run.frozen_layers, head=run.frozen_head)
        weights += memory.rank_parameters(a.first(run.frozen_layers), job.ep)
    time = cost.step_time(
        job,
        traffic,
        flops=(frozen_flops * run.frozen_share + 3 * flops) * tokens,
        weights=weights * passes,
        optimized=count_parameters(a).total / spec.world,
    )
    return StagePlan(
        rows=rows,
        memory=used,
        fits=used.peak_bytes <= spec.usable_bytes,
        largest_rows=_largest(lambda n: memory.unlearn_memory(job, sides * n).peak_bytes, spec.usable_bytes),
        traffic=traffic,
        time=time,
        steps=job.steps(corpora),
        loaded_bytes=_loaded_bytes(job, a, whole=job.zero.stage < 3) * (2 if run.frozen_layers else 1),
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


def _loaded_bytes(job: PlannedJob, loaded: Architecture, *, whole: bool) -> float:
    """What all ranks read from the shared storage: each its partition, else (``whole``) its experts and all that is not
    an expert."""
    elements = job.spec.world * memory.rank_parameters(loaded, job.ep) if whole else count_parameters(loaded).total
    return elements * job.b


def evaluation_peak_bytes(job: PlannedJob, ep: int, zero_stage: int) -> float:
    """What ``evaluate`` holds of a model on each GPU, all ranks of the job sharing it so.

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
        checkpoint_files=checkpoint_files(job, job.held),
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
    for name, stage in (result.finetune | {f"unlearn of variant {k}": v for k, v in result.variants.items()}).items():
        if not stage.fits:
            what = f"finetune of {name}" if name in result.finetune else name
            most = f": set finetune.micro_batch_rows to {stage.largest_rows} or less" if name in result.finetune else ""
            warnings.append(f"{what} needs {stage.memory.peak_bytes / GB:.0f} GB of {usable}{most}")
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
        if name == "unlearn" and choice.fits:
            return f"--set distributed.ep={choice.ep} --set unlearning.zero_stage={choice.zero_stage} fits"
        if name == "collect" and choice.collect_fits:
            return f"--set distributed.ep={choice.ep} fits"
    return "nothing fits on this cluster: use shorter rows (data.context_length), more nodes, or GPUs with more memory"
