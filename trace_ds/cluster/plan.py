"""``trace-ds plan``: what a run needs on a given cluster, before a weight is loaded or a job is queued.

    plan(config, ClusterSpec(nodes=4)).unlearn.memory.peak_bytes

Everything follows from the model's ``config.json``, the run's configuration and the cluster's numbers:
parameters by kind (:mod:`trace_ds.cluster.architecture`), memory by part (:mod:`~trace_ds.cluster.memory`), and here
files, a lower bound of time (the model's FLOPs at the rated peak), and the shapes that fit. ``docs/plan.md`` has the
cost model and what of it was measured.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import Architecture, read_architecture
from trace_ds.cluster.job import GB, ClusterSpec, PlannedJob, ceil_div, corpus_tokens
from trace_ds.config.compose import fragment_of, published_config, published_config_path
from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config
from trace_ds.config.sections.training import FinetuneSettings
from trace_ds.errors import UserError
from trace_ds.hub.models import is_whole
from trace_ds.models.families import FAMILIES, ModelInfo, check_expert_parallel
from trace_ds.stages.inputs import with_expert_parallel_sizes
from trace_ds.stages.pipeline import Request
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config, read_model_directory
from trace_ds.terminal import duration, narrow_table, size, wide_console

EVALUATION_SHARE = 0.8  # of a GPU's memory may be weights (trace_ds/evaluation/language_model.py)
MAX_ROWS = 4096  # no search for a larger micro-batch than this
MANY_FILES = 5000  # of a checkpoint; parallel file systems take seconds to minutes to create more

MAX_NODES = 128  # no search for a larger cluster than this


@dataclass(frozen=True)
class StagePlan:
    """One distributed stage: memory of a GPU, the largest micro-batch that fits, and the least seconds of one step
    (``collect``: one batch).

    ``steps`` is None when the length of the stage is not known.
    """

    rows: int
    memory: memory.Memory
    fits: bool
    largest_rows: int
    step_s: float
    steps: int | None

    @property
    def at_least_s(self) -> float | None:
        """Lower bound of the stage's steps; None when its length is not known."""
        return None if self.steps is None else self.steps * self.step_s


@dataclass(frozen=True)
class Shape:
    """Nodes of a cluster, and the values of keys with which every stage fits on them."""

    nodes: int
    changes: dict[str, int | bool]

    @property
    def options(self) -> str:
        """The changes as options of the command line; empty: as configured."""
        return " ".join(f"--set {key}={str(value).lower()}" for key, value in self.changes.items())


@dataclass(frozen=True)
class RunPlan:
    """What a run needs on a cluster, as `trace-ds plan` shows it.
    Attributes:
        stages: ``collect``, ``unlearn``, and by name the fine-tunings that come first and the ``unlearn`` of variants.
        storage_bytes: of all jobs. evaluation_peak_bytes: what a scored model takes of a GPU.
        parameters: elements. best: what fits on this cluster with the fewest changes. smallest: on the fewest nodes.
    """

    family: str
    parameters: int
    cluster: ClusterSpec
    ep: int
    zero_stage: int
    stages: dict[str, StagePlan]
    checkpoint_bytes: float
    checkpoint_files: int
    storage_bytes: float
    host_bytes: float
    evaluation_peak_bytes: float
    best: Shape | None
    smallest: Shape | None
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
    training = list(unlearning)
    stages = {"collect": _collect(job), "unlearn": _training(job)}
    saving = [(each, each.kept, len(each.settings.kept_steps(each.steps() or 1))) for each in unlearning]
    if (finetune := config.finetune) is not None:
        for name, corpora in finetune.models.items():
            making = PlannedJob.of(a, cluster, config, FinetuneSettings.of(finetune, config.unlearning))
            stages[f"finetune of {name}"] = _training(making, corpora)
            saving.append((making, a, making.settings.keep))
            training.append(making)
    stages |= {f"unlearn of {name}": _training(each) for name, each in zip(config.variants, others, strict=True)}
    every = a.parameters.total
    best = best_shape(training, cluster.nodes)
    fewer = (1 << power for power in range(MAX_NODES.bit_length()))
    smallest = next(filter(None, (best_shape(training, nodes) for nodes in fewer)), best)
    result = RunPlan(
        family=a.family,
        parameters=every,
        cluster=cluster,
        ep=job.ep,
        zero_stage=job.zero.stage,
        stages=stages,
        checkpoint_bytes=checkpoint_bytes(job, job.kept),
        checkpoint_files=checkpoint_files(job, job.kept),
        storage_bytes=sum((keep + 1) * checkpoint_bytes(each, saved) + every * each.b for each, saved, keep in saving),
        host_bytes=memory.host_bytes(job),
        evaluation_peak_bytes=evaluation_peak_bytes(job, config.evaluation.ep, config.evaluation.zero_stage),
        best=best,
        smallest=smallest,
        warnings=[],
    )
    result.warnings.extend(_warnings(job, result))
    return result


def _check(job: PlannedJob) -> None:
    a, cluster = job.a, job.spec
    info = ModelInfo(Path(), FAMILIES[a.family], {}, a.experts, a.top_k, a.layers, "")
    check_expert_parallel(info, job.ep, cluster.world)
    check_expert_parallel(info, job.config.evaluation.ep, cluster.world, "evaluation.ep")


# Stages


def forward_flops_per_token(a: Architecture, context: int, *, layers: int | None = None, head: bool = True) -> float:
    """Model FLOPs of one token's forward pass through the first ``layers`` layers (default all) and the head."""
    total = 0.0
    for layer, block in enumerate(a.blocks[:layers]):
        attended = context * (a.query_width + a.output_width)
        if layer in a.linear.layers:  # a head's state is read twice and written once
            attended = 3 * a.linear.value_heads * a.linear.key_width * a.linear.value_width
        total += 2 * (block.non_expert + block.experts * a.top_k / a.experts + attended)
    return total + (2 * a.hidden * a.vocabulary if head else 0)


def _stage(
    job: PlannedJob, rows: int, used: Callable[[int], memory.Memory], flops: float, steps: int | None, sides: int = 1
) -> StagePlan:
    """A stage whose step takes ``rows`` rows of all ``sides`` on a GPU at a time; ``used``: memory of so many rows."""
    limit, needed = job.spec.usable_bytes, used(rows)
    largest = _largest(lambda number: used(sides * number).peak_bytes, limit)
    return StagePlan(rows, needed, needed.peak_bytes <= limit, largest, flops / (job.spec.tflops * 1e12), steps)


def _collect(job: PlannedJob) -> StagePlan:
    rows, corpus = job.config.statistics.batch_rows, corpus_tokens(job.config)
    tokens = rows * job.context
    flops = forward_flops_per_token(job.a, job.context, head=job.config.statistics.nll) * tokens
    steps = None if corpus is None else max(ceil_div(corpus, tokens * job.spec.world), 1)
    return _stage(job, rows, lambda number: memory.collect_memory(job, number), flops, steps)


def _training(job: PlannedJob, corpora: list[str] | None = None) -> StagePlan:
    """``unlearn``, or the fine-tuning of one model on ``corpora``."""
    (passes, rows), run, sides = job.micro_batches(), job.passes(), len(job.rows_per_step)
    flops = 3 * forward_flops_per_token(job.kept, job.context, layers=run.layers, head=run.head)
    if run.frozen_stays:
        copy = forward_flops_per_token(job.a, job.context, layers=run.frozen_layers, head=run.frozen_head)
        flops += copy * run.frozen_share
    flops *= rows * job.context * passes
    return _stage(job, rows, lambda number: memory.unlearn_memory(job, number), flops, job.steps(corpora), sides)


def checkpoint_bytes(job: PlannedJob, saved: Architecture) -> float:
    """fp32 parameters and two Adam moments; below ZeRO-3 the 16-bit parameters are saved beside them."""
    return saved.parameters.total * (memory.MASTER_BYTES + (job.b if job.zero.stage < 3 else 0))


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
        elements, gathered = job.a.parameters.total / job.spec.world, 2 * memory.largest_layer(job.a, ep)
    states = 8 if (ep > 1 or zero_stage == 3) and job.config.model.dtype == "bf16" else 4
    return (elements * (states if job.config.evaluation.relearning is not None else 1) + gathered) * job.b


# Shapes that fit


def best_shape(jobs: list[PlannedJob], nodes: int) -> Shape | None:
    """What to set so that all stages fit on so many nodes, the first of ``jobs`` being the run's own ``unlearn``.

    Of all expert-parallel sizes and ZeRO stages, that with the fewest other changes; then without thousands of files,
    with expert parallelism inside a node, as configured as possible, the lowest stage, the largest size.
    """
    own, spec, changes = jobs[0], replace(jobs[0].spec, nodes=nodes), []
    configured = {"distributed.ep": own.ep, "unlearning.zero_stage": own.zero.stage}
    for ep in _expert_parallel_sizes(own.a, spec):
        for stage in (1, 2, 3):
            shaped = [replace(job, spec=spec, ep=ep, zero=replace(job.zero, stage=stage)) for job in jobs]
            parts = [_collect_changes(shaped[0]), _evaluation_changes(shaped[0]), *map(_training_changes, shaped)]
            others = {key: value for part in parts if part is not None for key, value in part.items()}
            if None in parts or memory.host_bytes(shaped[0]) > spec.host_memory_gb * GB:
                continue
            sizes = {"distributed.ep": ep, "unlearning.zero_stage": stage}
            sizes = {name: value for name, value in sizes.items() if value != configured[name]}
            files = checkpoint_files(shaped[0], shaped[0].kept) > MANY_FILES
            key = (len(others), files, max(ep, spec.gpus_per_node), len(sizes), stage, -ep)
            changes.append((key, sizes | others))
    return Shape(nodes, min(changes, key=lambda entry: entry[0])[1]) if changes else None


def _collect_changes(job: PlannedJob) -> dict[str, int | bool] | None:
    """What to set so that ``collect`` fits; None: nothing makes it fit."""
    rows = job.config.statistics.batch_rows
    fitting = _largest(lambda number: memory.collect_memory(job, number).peak_bytes, job.spec.usable_bytes, rows)
    return None if fitting == 0 else {} if fitting == rows else {"statistics.batch_rows": fitting}


def _training_changes(job: PlannedJob) -> dict[str, int | bool] | None:
    """The same of a training job."""
    section = "finetune" if isinstance(job.settings, FinetuneSettings) else "unlearning"
    rows, sides, limit = job.micro_batches()[1], len(job.rows_per_step), job.spec.usable_bytes
    changes: dict[str, int | bool] = {}
    if memory.unlearn_memory(job, rows).peak_bytes <= limit:
        return changes
    if not job.settings.recompute:
        changes[f"{section}.recompute"] = True
        if memory.unlearn_memory(job, rows, recompute=True).peak_bytes <= limit:
            return changes
    fitting = _largest(
        lambda number: memory.unlearn_memory(job, sides * number, recompute=True).peak_bytes, limit, rows // sides
    )
    return changes | {f"{section}.micro_batch_rows": fitting} if fitting else None


def _evaluation_changes(job: PlannedJob) -> dict[str, int | bool] | None:
    """What to set so that the ranks of the job can share a model that is too large for ``evaluate`` as configured."""
    settings, sizes = job.config.evaluation, _expert_parallel_sizes(job.a, job.spec)
    for stage in dict.fromkeys((settings.zero_stage, 0, 3)):
        for ep in sorted(sizes, key=lambda each: each != settings.ep):
            if evaluation_peak_bytes(job, ep, stage) <= _evaluation_limit(job.spec):
                chosen = {"ep": ep, "zero_stage": stage}
                return {f"evaluation.{key}": chosen[key] for key in chosen if chosen[key] != getattr(settings, key)}
    return None


def _expert_parallel_sizes(a: Architecture, spec: ClusterSpec) -> list[int]:
    return [ep for ep in range(1, a.experts + 1) if a.experts % ep == 0 == spec.world % ep]


def _evaluation_limit(spec: ClusterSpec) -> float:
    return EVALUATION_SHARE * spec.gpu_memory_gb * GB


def _largest(peak_bytes: Callable[[int], float], limit_bytes: float, most: int = MAX_ROWS) -> int:
    """The largest number of rows, at most ``most``, whose peak stays within the limit (0: not even one row).

    The peak grows with the rows, so bisection finds it.
    """
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if peak_bytes(middle) <= limit_bytes else (low, middle - 1)
    return low


def _warnings(job: PlannedJob, result: RunPlan) -> list[str]:
    """What the user should know before pressing enter."""
    spec, settings, warnings = job.spec, job.config.unlearning, []
    for name, stage in result.stages.items():
        if not stage.fits:
            peak, usable = stage.memory.peak_bytes / GB, spec.usable_bytes / GB
            warnings.append(f"{name} needs {peak:.0f} GB of {usable:.0f} GB usable on a GPU: {_way_out(result)}")
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
    if result.evaluation_peak_bytes > (limit_bytes := _evaluation_limit(spec)):
        warnings.append(
            f"evaluate needs {result.evaluation_peak_bytes / GB:.0f} GB for a model on each GPU, of "
            f"{limit_bytes / GB:.0f} GB: {_way_out(result)}"
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


def _way_out(result: RunPlan) -> str:
    """What would fit, for a stage that does not."""
    if result.best is not None:
        return f"it fits with {result.best.options}"
    if result.smallest is not None:
        return f"it fits with --nodes {result.smallest.nodes} {result.smallest.options}".rstrip()
    return "no shape fits: use shorter rows (data.context_length), or GPUs and nodes with more memory"


# The command


def plan_command(config: Config, spec: ClusterSpec, json: bool, variants: set[str]) -> int:
    """Print the plan as tables, or as JSON; exit status 0 also when nothing fits (the warnings say so).

    ``variants``: all that the configuration has; ``config`` has those that run.
    """
    result = plan(config, spec)
    if json:
        print(json_module.dumps(as_dict(result), indent=1, sort_keys=True))
    else:
        print(jobs_line(result, variants))
        print_plan(result)
    return 0


def as_dict(result: RunPlan) -> dict[str, Any]:
    """The plan as JSON-ready values, with the totals that are properties of its parts."""
    value = asdict(result)
    for name, stage in result.stages.items():
        entry = value["stages"][name]
        entry["memory"]["peak_bytes"] = stage.memory.peak_bytes
        entry["at_least_s"] = stage.at_least_s
    return value


def print_plan(result: RunPlan) -> None:
    """The shapes that fit, the stages, and the memory of one GPU."""
    console, spec = wide_console(), result.cluster
    gpus = f"{spec.nodes} x {spec.gpus_per_node} GPUs of {spec.gpu_memory_gb:g} GB"
    lines = [f"best on {gpus}: {'nothing fits' if result.best is None else result.best.options or 'as configured'}"]
    if result.smallest is not None and result.smallest.nodes != spec.nodes:
        lines.append(f"smallest that fits: --nodes {result.smallest.nodes} {result.smallest.options}".rstrip())
    lines.append(
        f"as configured: {result.family}, {_billions(result.parameters)} parameters, expert-parallel size {result.ep}, "
        f"ZeRO-{result.zero_stage}; a checkpoint is {size(result.checkpoint_bytes)} in "
        f"{result.checkpoint_files:,} files; host memory of a node {size(result.host_bytes)}; "
        f"evaluate takes {size(result.evaluation_peak_bytes)} of a GPU"
    )
    for line in lines:
        console.print(line, highlight=False)
    console.print(_stages(result))
    console.print(_memory(result))
    for warning in result.warnings:
        console.print(f"WARN  {warning}", style="yellow", highlight=False)


def _stages(result: RunPlan) -> Any:
    names = ("stage", "fits", "peak", "largest rows", "step at least", "all steps")
    table = narrow_table("Stages: memory of one GPU, and lower bounds of time", *names, left=["stage"])
    for name, stage in result.stages.items():
        rows = {0: "none", MAX_ROWS: f">= {MAX_ROWS}"}.get(stage.largest_rows, str(stage.largest_rows))
        peak, seconds = size(stage.memory.peak_bytes), stage.at_least_s
        steps = "corpora not found" if seconds is None else duration(seconds)
        table.add_row(name, "yes" if stage.fits else "NO", peak, rows, duration(stage.step_s), steps)
    return table


def _memory(result: RunPlan) -> Any:
    stages = {f"{name}, {stage.rows} rows": stage.memory for name, stage in list(result.stages.items())[:2]}
    table = narrow_table("Memory of one GPU", "part", *stages, left=["part"])
    for phase in memory.PHASES:
        of_stages: list[dict[str, float]] = [getattr(each, phase) for each in stages.values()]
        for part in dict.fromkeys(name for parts in of_stages for name in parts):
            cells = (size(parts[part]) if part in parts else "" for parts in of_stages)
            table.add_row(f"{phase}: {part}", *cells)
    table.caption = "peak: resident + the largest of compute with layer or head, step, start"
    table.caption_justify = "left"
    table.add_row("peak", *(size(each.peak_bytes) for each in stages.values()))
    table.add_row("usable", *[size(result.cluster.usable_bytes)] * 2)
    return table


def _billions(number: int) -> str:
    return f"{number / 1e9:.4g} B" if number >= 1e8 else f"{number / 1e6:.4g} M"
