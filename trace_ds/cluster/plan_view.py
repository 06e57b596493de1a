"""What ``trace-ds plan`` prints: tables, or JSON."""

from __future__ import annotations

import json as json_module
from dataclasses import asdict
from typing import Any

from rich.table import Table

from trace_ds.cluster.job import GB, ClusterSpec
from trace_ds.cluster.memory import PHASES
from trace_ds.cluster.plan import ASSUMPTIONS, MAX_ROWS, RunPlan, StagePlan, jobs_line, plan
from trace_ds.config.schema import Config
from trace_ds.terminal import duration, narrow_table, size, wide_console

SHOWN_CHOICES = 8


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
    value["parameters"]["total"], value["active"]["total"] = result.parameters.total, result.active.total
    for name, stage in result.stages.items():
        entry = value["stages"][name]
        entry["memory"]["peak_bytes"] = stage.memory.peak_bytes
        entry.update(step_s=stage.step_s, bound=stage.bound, at_least_s=stage.at_least_s)
    value["assumptions"] = list(ASSUMPTIONS)
    return value


def print_plan(result: RunPlan) -> None:
    """All tables of a result."""
    console, spec = wide_console(), result.cluster
    console.print(
        f"{result.family}, {billions(result.parameters.total)} parameters "
        f"({billions(result.active.total)} active a token) "
        f"on {spec.nodes} x {spec.gpus_per_node} GPUs of {spec.gpu_memory_gb:g} GB; "
        f"expert-parallel size {result.ep}, ZeRO-{result.zero_stage}",
        highlight=False,
    )
    console.print(_parameters(result))
    console.print(_memory(result))
    console.print(_traffic(result))
    if len(result.stages) > 2:
        console.print(_jobs(result))
    console.print(_choices(result))
    for line in (
        f"\ncheckpoint {size(result.checkpoint_bytes)} in {result.checkpoint_files:,} files (at "
        f"{spec.storage_gb_s:g} GB/s {_storage_time(result, result.checkpoint_bytes)} at least); the run needs "
        f"{size(result.storage_bytes)} of storage and {size(result.host_bytes)} of host memory a node",
        f"evaluate: {size(result.evaluation_peak_bytes)} a GPU",
    ):
        console.print(line, highlight=False)
    for warning in result.warnings:
        console.print(f"WARN  {warning}", style="yellow", highlight=False)
    for assumption in ASSUMPTIONS:
        console.print(f"assumed: {assumption}", style="dim", highlight=False)


def _table(title: str, first: str, *columns: str) -> Table:
    return narrow_table(title, first, *columns, left=[first])


def _parameters(result: RunPlan) -> Table:
    table = _table("Parameters", "kind", "all", "active a token")
    active = asdict(result.active)
    for kind, number in asdict(result.parameters).items():
        if number:
            table.add_row(kind.replace("_", " "), f"{number:,}", f"{active[kind]:,}")
    table.add_row("total", f"{result.parameters.total:,}", f"{result.active.total:,}")
    return table


def _memory(result: RunPlan) -> Table:
    collect, unlearn = result.collect, result.unlearn
    table = _table(
        "Memory of one GPU",
        "part",
        f"collect, {collect.rows} rows",
        f"unlearn, {unlearn.rows} rows",
    )
    for phase in PHASES:
        of_collect, of_unlearn = getattr(collect.memory, phase), getattr(unlearn.memory, phase)
        for part in dict.fromkeys((*of_collect, *of_unlearn)):
            table.add_row(
                f"{phase}: {part}",
                *(size(parts[part]) if part in parts else "" for parts in (of_collect, of_unlearn)),
            )
    table.caption = "peak: resident + the largest of compute with layer or head, step, start"
    table.caption_justify = "left"
    table.add_row("peak", size(collect.memory.peak_bytes), size(unlearn.memory.peak_bytes))
    table.add_row("peak if activations were recomputed", "", size(result.recomputed_peak_bytes))
    table.add_row("usable", *[size(result.cluster.usable_bytes)] * 2)
    table.add_row("fits", *("yes" if stage.fits else "NO" for stage in (collect, unlearn)))
    table.add_row("largest batch_rows, micro_batch_rows", *(rows(stage.largest_rows) for stage in (collect, unlearn)))
    return table


def _traffic(result: RunPlan) -> Table:
    """Bytes moved, and the least seconds of a step."""
    table = _table("A step (collect: a batch) of one GPU", "", "GPUs", "received", "time at least")
    for name, stage in (("collect", result.collect), ("unlearn", result.unlearn)):
        for entry in stage.traffic:
            seconds = duration(max(entry.intra_s, entry.inter_s))
            table.add_row(f"{name}: {entry.name}", str(entry.group), size(entry.received_bytes), seconds)
        table.add_row(f"{name}: bound by {stage.bound}", "", "", duration(stage.step_s))
        table.add_row(f"{name}: all steps", "", "", _stage_time(stage))
    return table


def _storage_time(result: RunPlan, number: float) -> str:
    return duration(number / (result.cluster.storage_gb_s * GB))


def _stage_time(stage: StagePlan) -> str:
    return "corpora not found" if stage.at_least_s is None else duration(stage.at_least_s)


def _jobs(result: RunPlan) -> Table:
    """The models that are made first, the run's own ``unlearn`` and that of each variant."""
    table = _table("Training jobs", "", "fits", "peak", "all steps, at least")
    jobs = {name: stage for name, stage in result.stages.items() if name != "collect"}
    for name, stage in jobs.items():
        table.add_row(name, "yes" if stage.fits else "NO", size(stage.memory.peak_bytes), _stage_time(stage))
    table.add_row(f"all {len(jobs)}", "", "", duration(sum(stage.at_least_s or 0 for stage in jobs.values())))
    return table


def _choices(result: RunPlan) -> Table:
    table = _table(
        "Choices, fewest bytes moved first", "EP x ZeRO", "fits", "peak", "micro-batch", "moved", "files", "collect"
    )
    for choice in result.choices[:SHOWN_CHOICES]:
        table.add_row(
            f"{choice.ep} x {choice.zero_stage}",
            "yes" if choice.fits else "NO",
            size(choice.peak_bytes),
            rows(choice.largest_rows),
            size(choice.received_bytes),
            f"{choice.checkpoint_files:,}",
            "fits" if choice.collect_fits else "NO",
        )
    best = result.choices[0]
    table.caption = f"first: --set distributed.ep={best.ep} --set unlearning.zero_stage={best.zero_stage}"
    table.caption_justify = "left"
    return table


def rows(number: int) -> str:
    """A number of rows as found by the search of the largest micro-batch."""
    return "none" if number == 0 else f">= {number}" if number == MAX_ROWS else str(number)


def billions(number: int) -> str:
    """A number of parameters in billions."""
    return f"{number / 1e9:.4g} B" if number >= 1e8 else f"{number / 1e6:.4g} M"
