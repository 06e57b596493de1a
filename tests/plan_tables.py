"""The table of clusters in ``docs/plan.md``; to make it anew, print what the function returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trace_ds.cluster.architecture import read_architecture
from trace_ds.cluster.job import ClusterSpec
from trace_ds.cluster.plan import RunPlan, plan_model
from trace_ds.config.schema import Config
from trace_ds.terminal import duration, size


def clusters_markdown(configs: Mapping[str, Mapping[str, Any]], config: Config) -> str:
    """For each model the smallest cluster of 8-GPU nodes (a power of two, up to 128) and expert-parallel size on which
    ``config`` fits, in Markdown; rows per step are set to one of each side per GPU. Stored in ``docs/plan.md``."""
    columns = (
        "GPUs | EP | collect | unlearn | if recomputed | step, at least | bound | checkpoint | files | host, a node"
    )
    lines = [f"| model | {columns} |", "| --- |" + " ---: |" * 10]
    for name, model_config in configs.items():
        plan = _smallest(model_config, config, name)
        if plan is None:
            lines.append(f"| {name} | more than 1024 |" + " |" * 8)
            continue
        cells = [
            name,
            str(plan.cluster.world),
            str(plan.ep),
            size(plan.collect.memory.peak_bytes),
            size(plan.unlearn.memory.peak_bytes),
            size(plan.recomputed_peak_bytes),
            duration(plan.unlearn.step_s),
            plan.unlearn.bound,
            size(plan.checkpoint_bytes),
            str(plan.checkpoint_files),
            size(plan.host_bytes),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _smallest(model_config: Mapping[str, Any], config: Config, name: str) -> RunPlan | None:
    """The plan with the fewest nodes, then the smallest expert-parallel size, that fits; None: not on 1,024 GPUs."""
    for nodes in (1, 2, 4, 8, 16, 32, 64, 128):
        spec = ClusterSpec(nodes=nodes)
        sized = {"forget_rows": spec.world, "retain_rows": spec.world, "micro_batch_rows": 1}
        for ep in (8, 16, 32, 64):
            if spec.world % ep or read_architecture(model_config, name).experts % ep:
                continue
            changed = {
                "unlearning": config.unlearning.model_copy(update=sized),
                "distributed": config.distributed.model_copy(update={"ep": ep}),
            }
            plan = plan_model(model_config, config.model_copy(update=changed), spec, name)
            if plan.collect.fits and plan.unlearn.fits:
                return plan
    return None
