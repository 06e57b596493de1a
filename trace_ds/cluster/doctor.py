"""``trace-ds doctor``: everything that can be known before a job starts, each line OK, WARN or MISS with its fix.

    trace-ds doctor                       # the machine
    trace-ds doctor CONFIG --run-dir DIR  # and the run's storage, model, corpora, tasks and variants
    trace-ds doctor CONFIG --json
    srun … trace-ds doctor CONFIG         # every node, and what lies between them; torchrun, deepspeed, mpiexec too

Exit status 0 when no line is MISS, else 1: the report is the answer, not an error of the user's (which would be 2).
Nothing is changed: what the storage checks write they remove, and the run directory is not made.

In a job the first rank of each node checks the node and its share of the run; these are merged into one report, and
what only several nodes can show is added: that they reach each other, how fast, that they hold the same versions and
files, and that what one writes into the run directory is what the others read. A function that takes
:class:`JoinedRanks` is a collective: all ranks call it, the main rank's checks are the answer.
"""

from __future__ import annotations

import contextlib
import functools
import json as json_module
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.cluster import checks
from trace_ds.cluster.checks import Check, Status, checked, guarded, judged
from trace_ds.cluster.job import ClusterSpec
from trace_ds.cluster.plan import RunPlan, plan
from trace_ds.cluster.submit import site_file
from trace_ds.config.schema import Config
from trace_ds.corpora.sources import cache_only
from trace_ds.errors import UserError
from trace_ds.parallel.environment import accelerator_count, launched, local_rank_and_size, rank_and_size
from trace_ds.stages.fetch import with_cached
from trace_ds.stages.inputs import with_sizes_here
from trace_ds.stages.pipeline import STAGES

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

EXIT_MISSING = 1
STYLES = {"OK": "green", "WARN": "yellow", "MISS": "bold red"}  # from good to bad
JOIN_TIMEOUT_MINUTES = 2.0  # for nodes that start a little later than the first
CHECK_TIMEOUT_MINUTES = 30.0  # for the slowest node's storage, model and corpora
NCCL_TIMEOUT_MINUTES = 2.0
SEEN_WITHIN_S = 10.0  # network file systems cache directory entries for a few seconds
TOKEN_BYTES = 1 << 20
SIZE_BYTES, REPEATS = 1 << 25, 5  # of a timed collective


def doctor(config: Config | None, run_dir: Path | None, json: bool) -> int:
    """Print the report (on the main rank of a job); returns exit status 0 when nothing is MISS, else 1."""
    with cache_only():
        results = check_job(config, run_dir) if launched() else run_checks(config, run_dir)
    if results is None:
        return 0
    if json:
        print(json_module.dumps([asdict(check) for check in results], indent=1, ensure_ascii=False))
    else:
        print_report(results)
    return EXIT_MISSING if any(check.status == "MISS" for check in results) else 0


def print_report(results: list[Check]) -> None:
    """The checks as a table, and one line that sums them up."""
    from rich.markup import escape
    from rich.table import Table

    from trace_ds.terminal import wide_console

    console = wide_console()
    table = Table(show_edge=False)
    for column in ("", "status", "check", "found"):
        table.add_column(column, overflow="fold")
    group = None
    for check in results:
        text = escape(check.detail) + (f"\n[bold]fix:[/bold] {escape(check.fix)}" if check.fix else "")
        status = f"[{STYLES[check.status]}]{check.status}[/]"
        table.add_row("" if check.group == group else check.group, status, escape(check.name), text)
        group = check.group
    console.print(table)
    counts = {status: sum(check.status == status for check in results) for status in STYLES}
    console.print(", ".join(f"{number} {status}" for status, number in counts.items()), highlight=False)


def run_checks(config: Config | None, run_dir: Path | None) -> list[Check]:
    """All checks of a bare start: the machine's always, a run's when ``config`` (and ``run_dir``) are given."""
    return machine_checks(config) + share_checks(config, run_dir)


def machine_checks(config: Config | None) -> list[Check]:
    """Check software, accelerators and network of this machine, without which it cannot join a job."""
    results = guarded("python", "packages", checks.python_checks)
    results += guarded("accelerators", "torch", lambda: checks.accelerator_checks(config))
    resolved = functools.partial(socket.gethostbyname, socket.gethostname())  # gloo and NCCL connect by it
    results.append(checked("network", "host name", resolved, "add this host's name to /etc/hosts"))
    results.append(checked("SLURM", "site settings", lambda: site_file() or "none"))
    return (
        results if config is None else results + guarded("compiler", "compiler", lambda: checks.compiler_checks(config))
    )


def share_checks(config: Config | None, run_dir: Path | None, ranks: JoinedRanks | None = None) -> list[Check]:
    """Check this machine's share of a run: CPUs, memory, storage, models, data, and what `run` itself checks.

    Args:
        ranks: of the job that a launcher started, this process being its first on this node; None: a bare start.
    """
    written, config = config, None if config is None else with_sizes_here(with_cached(config))
    processes = STAGES["unlearn"].processes(config) if config else accelerator_count() or 1
    if ranks:
        processes = ranks.nodes.count(ranks.node)
    planned = None if config is None else _plan(config, len(set(ranks.nodes)) if ranks else 1, processes)
    needed, stored = (planned.host_bytes, planned.storage_bytes) if planned else (None, None)
    results = guarded("capacity", "capacity", lambda: checks.capacity_checks(config, processes, needed))
    if run_dir is not None:
        results += guarded("storage", "run directory", lambda: checks.storage_checks(run_dir, stored))
    if config is not None and written is not None:
        inputs = guarded("hub", "cache", lambda: checks.hub_checks(written))
        inputs += guarded("corpora", "corpora", lambda: checks.corpus_checks(config))
        results += inputs
        missing = [check for check in inputs if check.status == "MISS" and "evaluation.tasks" not in check.name]
        if run_dir is not None and not missing:  # else it would say that again
            size = ranks.world.size if ranks else None
            results.append(checked("run", "its own checks", lambda: checks.run_check(config, run_dir, size)))
    return results


def _plan(config: Config, nodes: int, processes: int) -> RunPlan | None:
    """The cost model's answer for machines like this one, so many processes on each; None: `run` says why not."""
    try:
        return plan(config, ClusterSpec(nodes=nodes, gpus_per_node=processes))
    except UserError:
        return None


# The nodes of a job


@dataclass(frozen=True)
class JoinedRanks:
    """The joined process group; ``nodes`` holds each rank's node by name, ``node`` is this rank's."""

    world: World
    nodes: list[str]

    @property
    def node(self) -> str:
        return self.nodes[self.world.rank]

    @property
    def first_on_node(self) -> bool:
        return self.nodes.index(self.node) == self.world.rank


def check_job(config: Config | None, run_dir: Path | None) -> list[Check] | None:
    """The checks of every node of a job that a launcher started, merged, and those between nodes; None: not the main
    rank.

    The machines are looked at before they join: when the ranks do not meet, what is wrong with a machine is mostly why,
    and then each node says it for itself.
    """
    own = machine_checks(config) if local_rank_and_size()[0] == 0 else []
    ranks = join_job()
    if isinstance(ranks, Check):
        if rank_and_size()[0] == 0:
            return [*own, ranks]
        for check in own:
            if check.status == "MISS":
                where = f"trace-ds doctor on {node_name()}"
                print(f"{where}: {check.name}: {check.detail}. Fix: {check.fix}", file=sys.stderr)
        return None
    if ranks.first_on_node:
        own += share_checks(config, run_dir, ranks)
    results = merged(ranks, own)
    results += guarded("nodes", "same files", lambda: sameness_checks(ranks, config and with_cached(config)))
    if run_dir is not None:
        results += guarded("storage", "shared", lambda: shared_storage_checks(ranks, run_dir))
    results += guarded("collectives", "bandwidth", lambda: bandwidth_checks(ranks))
    leave_job(ranks)
    return results if ranks.world.is_main else None


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join_job() -> JoinedRanks | Check:
    """Join the launcher's process group over gloo, GPUs or not; when that fails, the check that says why."""
    from trace_ds.parallel.world import join, wait_longer

    try:
        world = join(threads=1, timeout_minutes=JOIN_TIMEOUT_MINUTES, on_cpu=True)
        nodes = world.gather(node_name())
    except UserError:
        raise
    except Exception as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        fix = "open the port between the nodes, and name the network: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        detail = f"the ranks do not meet at {where} ({type(error).__name__}: {checks.first_line_of_error(str(error))})"
        return Check("network", "process group", "MISS", detail, fix)
    wait_longer(CHECK_TIMEOUT_MINUTES)
    return JoinedRanks(world, nodes)


def leave_job(ranks: JoinedRanks) -> None:
    from trace_ds.parallel.world import leave

    ranks.world.barrier()
    leave()


def merged(ranks: JoinedRanks, own: list[Check]) -> list[Check]:
    """One line per check for all nodes: the worst status, with the nodes that have it when not all do."""
    every = {node: results for node, results in zip(ranks.nodes, ranks.world.gather(own), strict=True) if results}
    lines: dict[tuple[str, str], dict[str, Check]] = {}
    for node, results in every.items():
        for check in results:
            lines.setdefault((check.group, check.name), {})[node] = check
    return [_worst(by_node, len(every)) for by_node in lines.values()]


def _worst(by_node: dict[str, Check], nodes: int) -> Check:
    status = max((check.status for check in by_node.values()), key=list(STYLES).index)
    affected = [node for node, check in by_node.items() if check.status == status]
    check = by_node[affected[0]]
    if len(affected) < nodes:
        return replace(check, detail=f"on {', '.join(affected)}: {check.detail}")
    if len({each.detail for each in by_node.values()}) > 1:
        return replace(check, detail=f"{check.detail} ({affected[0]}; {status} on all {nodes} nodes)")
    return check


def bandwidth_checks(ranks: JoinedRanks) -> Iterator[Check]:
    """All-reduce and all-to-all between all ranks: over NCCL when every rank has a GPU of its own, else over gloo."""
    import torch

    local_rank, backend = int(os.environ.get("LOCAL_RANK", "0")), "gloo"
    device, group, reason, speeds = torch.device("cpu"), None, "", {}
    try:
        if all(ranks.world.gather(local_rank < torch.cuda.device_count())):
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # one that hangs raises; else it kills the process
            backend, device = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}", torch.device("cuda", local_rank)
            torch.cuda.set_device(device)
            timeout = timedelta(minutes=NCCL_TIMEOUT_MINUTES)
            group = torch.distributed.new_group(backend="nccl", timeout=timeout)
        speeds = time_collectives(device, group)
    except Exception as error:
        reason = checks.first_line_of_error(str(error)) or type(error).__name__
    failed = ((rank, text) for rank, text in enumerate(ranks.world.gather(reason)) if text)
    for rank, text in failed:
        fix = "NCCL_DEBUG=WARN shows NCCL's own reason; name the network: NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
        yield Check("collectives", backend, "MISS", f"rank {rank} on {ranks.nodes[rank]}: {text}", fix)
        return
    where = f"{ranks.world.size} ranks on {len(set(ranks.nodes))} nodes, {SIZE_BYTES >> 20} MiB, correct"
    for name, speed in speeds.items():
        yield Check("collectives", f"{backend} {name}", "OK", f"{speed / 1e9:.2f} GB/s bus bandwidth, {where}")


def time_collectives(device: Any, group: Any) -> dict[str, float]:
    """Bus bandwidth (bytes/s, as in NVIDIA's nccl-tests: ``2 (n-1)/n`` times the size over the time for an all-reduce,
    ``(n-1)/n`` for an all-to-all); the best of several.

    Raises:
        RuntimeError: a collective gave a wrong result.
    """
    import torch
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    elements = SIZE_BYTES // 4 // world * world
    speeds = {}
    for name, factor in (("all-reduce", 2), ("all-to-all", 1)):
        times_s = []
        for _ in range(REPEATS):
            sent = torch.full((elements,), float(rank + 1), device=device)
            received = sent if factor == 2 else torch.empty_like(sent)
            distributed.barrier(group)
            start = time.perf_counter()
            if factor == 2:
                distributed.all_reduce(sent, group=group)
            else:
                distributed.all_to_all_single(received, sent, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times_s.append(time.perf_counter() - start)
        peers = torch.arange(1, world + 1, device=device)
        expected = peers.sum() if factor == 2 else peers[:, None]
        if not bool((received.view(world, -1) == expected).all()):
            raise RuntimeError(f"the {name} gave a wrong result")
        speeds[name] = factor * (world - 1) / world * elements * 4 / min(times_s)
    return speeds


def sameness_checks(ranks: JoinedRanks, config: Config | None) -> Iterator[Check]:
    """Check that versions, model, tokenizer and corpora are the same on every node, compared by content."""
    facts = _facts(config) if ranks.first_on_node else {}
    by_node = {node: facts for node, facts in zip(ranks.nodes, ranks.world.gather(facts), strict=True) if facts}
    for name in dict.fromkeys(name for facts in by_node.values() for name in facts):
        values: dict[str, list[str]] = {}
        for node, facts in by_node.items():
            values.setdefault(facts.get(name, "not there"), []).append(node)
        detail = f"the same on {len(by_node)} nodes ({next(iter(values))[:40]})"
        if len(values) > 1:
            detail = "differs: " + "; ".join(f"{', '.join(nodes)}: {value[:40]}" for value, nodes in values.items())
        fix = "keep it on storage that all nodes share, or copy it to the nodes again"
        if name == "versions":
            fix = "start every node from one environment on shared storage (TRACE_DS_VENV or TRACE_DS_CONTAINER)"
        yield judged("nodes", name, len(values) == 1, detail, fix)


def _facts(config: Config | None) -> dict[str, str]:
    """Values and hashes of what should be alike on all nodes, by name; what cannot be read is left to the node's own
    checks."""
    from trace_ds.corpora.sources import files_here
    from trace_ds.corpora.tokenizer import tokenizer_fingerprint
    from trace_ds.models.families import inspect_model
    from trace_ds.tensors.model_files import sample_sha256

    versions = ", ".join(f"{name} {version}" for name, version in checks.installed_versions().items())
    facts = {"versions": f"python {platform.python_version()}, {versions}"}
    if config is None:
        return facts
    with contextlib.suppress(Exception):
        facts[f"model: {config.model.path}"] = inspect_model(config.model.path).fingerprint
    with contextlib.suppress(Exception):
        facts["tokenizer"] = tokenizer_fingerprint(config.model.tokenizer_path)
    for side in config.data.sides:
        for entry in config.data.corpus(side):
            with contextlib.suppress(Exception):
                hashes = [sample_sha256(path) for path in files_here(entry, f"data.{side}")]
                facts[f"{side}: {entry.place}"] = " ".join(hashes)
    return facts


def shared_storage_checks(ranks: JoinedRanks, run_dir: Path) -> Iterator[Check]:
    """Check that all nodes see what the first node writes, renames and locks in the run directory."""
    name = None
    if ranks.world.is_main and (home := checks.nearest_directory(run_dir)) is not None:
        with contextlib.suppress(OSError):  # reported by the node's own checks
            name = os.path.relpath(tempfile.mkdtemp(prefix=".trace-ds-doctor-", dir=home), run_dir)
    name = ranks.world.broadcast(name)
    if name is None:
        return
    folder = Path(os.path.abspath(run_dir / name))  # the same words may be another place on another node
    try:
        yield from _between_nodes(ranks, folder / "token")
    finally:
        ranks.world.barrier()
        if ranks.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _between_nodes(ranks: JoinedRanks, path: Path) -> Iterator[Check]:
    tokens = ranks.world.broadcast([secrets.token_bytes(TOKEN_BYTES) for _ in range(2)])
    for name, token in zip(("same bytes on all nodes", "rename seen by all nodes"), tokens, strict=True):
        if failure := _on_main(ranks, functools.partial(checks.publish, path, token)):
            detail = f"{ranks.nodes[0]} cannot write {len(token) >> 20} MiB ({failure})"
            yield Check("storage", name, "MISS", detail, "free space there, or choose another --run-dir")
            return
        seen = zip(ranks.nodes, ranks.world.gather(_reads(path, token)), strict=True)
        if blind := dict.fromkeys(node for node, reads in seen if not reads):
            fix = "put the run directory on storage that all nodes mount under the same path"
            yield Check("storage", name, "MISS", f"{', '.join(blind)} cannot read what {ranks.nodes[0]} wrote", fix)
            return
        yield Check("storage", name, "OK", f"{len(token) >> 20} MiB written by {ranks.nodes[0]}")
    with contextlib.ExitStack() as stack:
        failure = _on_main(ranks, lambda: stack.enter_context(checks.locked_file(path)))
        problem = "" if failure or ranks.world.is_main else checks.lock_problem(path)
        problems = ranks.world.gather(problem)  # the lock is held until all have tried
    problems[0] = failure and f"flock fails ({failure})"
    broken = next((f"{node}: {text}" for node, text in zip(ranks.nodes, problems, strict=True) if text), "")
    # without locks a run is refused by the main rank, the only one that takes them
    status: Status = "MISS" if failure else "WARN"
    detail = broken or "flock excludes the other ranks"
    yield judged("storage", "locks between nodes", not broken, detail, checks.LOCKS_FIX, status)


def _on_main(ranks: JoinedRanks, action: Callable[[], object]) -> str:
    """Run ``action`` on the main rank; on every rank why it failed, or an empty text (collective, and a barrier)."""
    failure = ""
    if ranks.world.is_main:
        try:
            action()
        except OSError as error:
            failure = error.strerror or str(error)
    return ranks.world.broadcast(failure)


def _reads(path: Path, content: bytes) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if path.read_bytes() == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
