"""``trace-ds doctor``: everything that can be known before a job starts, each line OK, WARN or MISS with its fix.

    trace-ds doctor                       # the machine
    trace-ds doctor CONFIG --run-dir DIR  # and the run's storage, model, corpora, tasks and variants
    trace-ds doctor CONFIG --json
    trace-ds doctor --bandwidth           # as a job of several processes of this machine: their collectives are timed
    srun … trace-ds doctor CONFIG         # every node, and what lies between them; torchrun, deepspeed, mpiexec too

Exit status 0 when no line is MISS, else 1: the report is the answer, not an error of the user's (which would be 2).
Nothing is changed: what the storage checks write they remove, and the run directory is not made.
"""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from trace_ds.cluster import checks_machine as machine
from trace_ds.cluster import checks_nodes as nodes
from trace_ds.cluster import checks_run as run
from trace_ds.cluster.checks import Check, checked, guarded, judged
from trace_ds.cluster.plan import RunPlan, plan
from trace_ds.cluster.spec import ClusterSpec
from trace_ds.config.schema import Config
from trace_ds.corpora.sources import only_looking
from trace_ds.errors import UserError
from trace_ds.parallel.environment import accelerator_count, launched, local_rank_and_size, rank_and_size
from trace_ds.parallel.launch import run_processes
from trace_ds.run.hub_names import hub_name
from trace_ds.stages.by_name import with_cached
from trace_ds.stages.pipeline import process_count

EXIT_MISSING = 1
STYLES = {"OK": "green", "WARN": "yellow", "MISS": "bold red"}


def run_checks(config: Config | None, run_dir: Path | None) -> list[Check]:
    """All checks of a bare start: the machine's always, a run's when ``config`` (and ``run_dir``) are given."""
    return machine_checks(config) + share_checks(config, run_dir)


def machine_checks(config: Config | None, *, joining: bool = False) -> list[Check]:
    """Software, accelerators, launchers and limits of this machine: what may keep it out of a job.

    Args:
        joining: the rendezvous port is the job's own, and whoever joins it looks at it.
    """
    found = guarded("python", "packages", machine.python_checks)
    found += guarded("accelerators", "torch", lambda: machine.accelerator_checks(config))
    found += guarded("collectives", "backend", lambda: machine.backend_checks(joined=joining))
    found += guarded("compiler", "toolchain", lambda: machine.toolchain_checks(config))
    found += guarded("compiler", "kernel cache", machine.cache_checks)
    found += guarded("launchers", "launchers", machine.launcher_checks)
    return found + guarded("limits", "limits", machine.limit_checks)


def share_checks(config: Config | None, run_dir: Path | None, ranks: nodes.JoinedRanks | None = None) -> list[Check]:
    """What this machine's share of a run needs: CPUs, memory, storage, model, corpora, and what `run` itself checks.

    Args:
        ranks: of the job that a launcher started, this process being its first on this node; None: a bare start.
    """
    written, config = config, None if config is None else with_cached(config)
    processes = process_count(config) if config else accelerator_count() or 1
    if ranks:
        processes = ranks.nodes.count(ranks.node)
    here = _plan_on(config, len(set(ranks.nodes)) if ranks else 1, processes)
    needed = None if here is None else here.host_bytes
    found = guarded("cpu", "cpu", lambda: machine.cpu_checks(config, processes, needed))
    if run_dir is not None:
        # the storage does not depend on the machine, which may be a login node that the job would not fit
        anywhere = here or (None if config is None else _plan_on(config, 1, config.distributed.ep))
        needed_storage = None if anywhere is None else anywhere.storage_bytes
        found += guarded("storage", "run directory", lambda: run.storage_checks(run_dir, needed_storage))
    if config is not None and written is not None:
        here_already = hub_name(config.model.path) is None
        found += guarded("hub", "cache", lambda: run.hub_checks(written, run_dir))
        if here_already:
            found += guarded("model", "model", lambda: run.model_checks(config, ranks.world.size if ranks else None))
            found.append(checked("tokenizer", "loads", lambda: run.tokenizer_check(config)))
        found += guarded("corpora", "corpora", lambda: run.corpus_checks(config))
        told = ("model", "tokenizer", "corpora")
        same = any(
            check.status == "MISS" and (check.group in told or check.name.startswith("evaluation.models"))
            for check in found
        )
        if run_dir is not None and here_already and not same:  # it would say the same again
            elsewhere = None if processes % config.distributed.ep == 0 else config.distributed.ep  # from a login node
            size = ranks.world.size if ranks else elsewhere
            found.append(checked("run", "its own checks", lambda: run.own_checks(config, run_dir, size)))
        found += guarded("plan", "memory", lambda: _memory_checks(here))
    return found


def _gpus() -> tuple[int, float]:
    """Number of GPUs here and the smallest one's bytes; (0, 0) without torch or GPU."""
    try:
        import torch

        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        sizes = [torch.cuda.get_device_properties(index).total_memory for index in range(count)]
    except ImportError:
        return 0, 0.0
    return count, float(min(sizes, default=0))


def _plan_on(config: Config | None, nodes: int, processes: int) -> RunPlan | None:
    """The cost model's answer for machines like this one, so many processes on each; None: nothing to plan for."""
    if config is None:
        return None
    count, memory_bytes = _gpus()
    memory_gb = memory_bytes / 1e9 if count else 80.0
    try:
        return plan(config, ClusterSpec(nodes=nodes, gpus_per_node=processes, gpu_memory_gb=memory_gb))
    except UserError:
        return None  # the model's own checks say why


def _memory_checks(here: RunPlan | None) -> Iterator[Check]:
    """Whether the stages fit into this machine's GPUs, by the cost model."""
    if here is None or not _gpus()[0]:
        return
    variants = {f"unlearn, variant {name}": stage for name, stage in here.variants.items()}
    for name, stage in {"collect": here.collect, "unlearn": here.unlearn, **variants}.items():
        detail = (
            f"about {stage.memory.peak_bytes / 1e9:.0f} of {here.cluster.usable_bytes / 1e9:.0f} GB usable on a GPU"
        )
        fix = "see trace-ds plan CONFIG --nodes N for what would fit"
        yield judged("plan", f"{name} fits", stage.fits, detail, fix, "WARN")


def doctor(config: Config | None, run_dir: Path | None, json: bool, bandwidth: bool) -> int:
    """Print the report; 0 when nothing is MISS, else 1. Of a job's ranks the main one prints.

    ``bandwidth``: start the same command again as such a job, one process per accelerator, or two.
    """
    if bandwidth and not launched():
        count = max(process_count(config) if config else accelerator_count(), 2)
        words = [word for word in sys.argv[1:] if word != "--bandwidth"]
        return run_processes(words, count, {}, (), config.distributed.threads if config else 1)
    with only_looking():
        found = check_job(config, run_dir) if launched() else run_checks(config, run_dir)
    if found is None:
        return 0
    if json:
        print(json_module.dumps([asdict(check) for check in found], indent=1, ensure_ascii=False))
    else:
        print_report(found)
    return EXIT_MISSING if any(check.status == "MISS" for check in found) else 0


def check_job(config: Config | None, run_dir: Path | None) -> list[Check] | None:
    """The checks of every node of a job that a launcher started, merged, and those between nodes; None: not the main
    rank. Timings of collectives are always part of it.

    The machines are looked at before they join: when the ranks do not meet, what is wrong with a machine is mostly why,
    and then each node says it for itself.
    """
    own = machine_checks(config, joining=True) if local_rank_and_size()[0] == 0 else []
    ranks = nodes.join_job()
    if isinstance(ranks, Check):
        if rank_and_size()[0] == 0:
            return [*own, ranks]
        _print_faults(nodes.node_name(), own)
        return None
    if ranks.first_on_node:
        own += share_checks(config, run_dir, ranks)
    found = nodes.merged(ranks, own)
    found += guarded("nodes", "same files", lambda: nodes.sameness_checks(ranks, config and with_cached(config)))
    if run_dir is not None:
        found += guarded("storage", "shared", lambda: nodes.shared_storage_checks(ranks, run_dir))
    found += guarded("collectives", "bandwidth", lambda: nodes.bandwidth_checks(ranks))
    nodes.leave_job(ranks)
    return found if ranks.world.is_main else None


def _print_faults(node: str, found: list[Check]) -> None:
    """One line on standard error for each MISS of a node that cannot join the others."""
    for check in found:
        if check.status == "MISS":
            print(f"trace-ds doctor on {node}: {check.name}: {check.detail}. Fix: {check.fix}", file=sys.stderr)


def print_report(found: list[Check]) -> None:
    """The checks as a table, and one line that sums them up."""
    from rich.markup import escape
    from rich.table import Table

    from trace_ds.terminal import wide_console

    console = wide_console()
    table = Table(show_edge=False)
    for column in ("", "status", "check", "found"):
        table.add_column(column, overflow="fold")
    group = None
    for check in found:
        text = escape(check.detail) + (f"\n[bold]fix:[/bold] {escape(check.fix)}" if check.fix else "")
        status = f"[{STYLES[check.status]}]{check.status}[/]"
        table.add_row("" if check.group == group else check.group, status, escape(check.name), text)
        group = check.group
    console.print(table)
    counts = {status: sum(check.status == status for check in found) for status in STYLES}
    console.print(", ".join(f"{number} {status}" for status, number in counts.items()), highlight=False)
