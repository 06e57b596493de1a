"""Checks between the nodes of a job: ``srun … trace-ds doctor CONFIG`` (or torchrun, deepspeed, mpiexec).

The first rank of each node runs the machine's and the run's checks; here they are merged into one report, and what only
several nodes can show is added: that they reach each other, how fast, that they hold the same versions and files, and
that what one writes into the run directory is what the others read.

A function that takes :class:`JoinedRanks` is a collective: all ranks call it, the main rank's checks are the answer.
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.cluster.checks import Check, Status, first_line, nearest_directory
from trace_ds.cluster.checks_machine import installed, port_checks
from trace_ds.cluster.checks_run import LOCKS_FIX, lock_problem, locked
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.parallel.environment import rank_and_size

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

JOIN_TIMEOUT_MINUTES = 2.0  # for nodes that start a little later than the first
CHECK_TIMEOUT_MINUTES = 30.0  # for the slowest node's storage, model and corpora
NCCL_TIMEOUT_MINUTES = 2.0
SEEN_WITHIN_S = 10.0  # network file systems cache directory entries for a few seconds
TOKEN_BYTES = 1 << 20
SIZE_BYTES, REPEATS = 1 << 25, 5  # of a timed collective
ORDER = ("OK", "WARN", "MISS")


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


def node_name() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def join_job() -> JoinedRanks | Check:
    """Join the launcher's process group over gloo, GPUs or not; when that fails, the check that says why."""
    from trace_ds.parallel.world import join, wait_longer

    port = os.environ.get("MASTER_PORT")
    # torchrun's agent holds the port already and serves its ranks there
    if rank_and_size()[0] == 0 and port and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        for check in port_checks(port):
            if check.status == "MISS":
                return check
    try:
        world = join(threads=1, timeout_minutes=JOIN_TIMEOUT_MINUTES, on_cpu=True)
        nodes = world.gather(node_name())
    except UserError:
        raise
    except Exception as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{port}"
        fix = "open the port between the nodes, and name the network: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        detail = f"the ranks do not meet at {where} ({type(error).__name__}: {first_line(str(error))})"
        return Check("collectives", "process group", "MISS", detail, fix)
    wait_longer(CHECK_TIMEOUT_MINUTES)
    return JoinedRanks(world, nodes)


def leave_job(ranks: JoinedRanks) -> None:
    from trace_ds.parallel.world import leave

    ranks.world.barrier()
    leave()


def merged(ranks: JoinedRanks, own: list[Check]) -> list[Check]:
    """One line per check for all nodes: the worst status, with the nodes that have it when not all do."""
    by_node = {
        node: checks for node, checks in zip(ranks.nodes, ranks.world.gather(own), strict=True) if checks
    }  # the first rank's
    lines: dict[tuple[str, str], dict[str, Check]] = {}
    for node, checks in by_node.items():
        for check in checks:
            lines.setdefault((check.group, check.name), {})[node] = check
    return [_worst(found, len(by_node)) for found in lines.values()]


def _worst(found: dict[str, Check], nodes: int) -> Check:
    status = max((check.status for check in found.values()), key=ORDER.index)
    affected = [node for node, check in found.items() if check.status == status]
    check = found[affected[0]]
    if len(affected) == nodes:
        alike = len({each.detail for each in found.values()}) == 1
        return (
            check if alike else replace(check, detail=f"{check.detail} ({affected[0]}; {status} on all {nodes} nodes)")
        )
    return replace(check, detail=f"on {', '.join(affected)}: {check.detail}")


def time_collectives(device: Any, group: Any = None) -> dict[str, float]:
    """Bus bandwidth (bytes/s, as in NVIDIA's nccl-tests: ``2 (n-1)/n`` times the size over the time for an all-reduce,
    ``(n-1)/n`` for an all-to-all) over a process group of all ranks, by default the default one; the best of several.

    Raises:
        RuntimeError: a collective gave a wrong result.
    """
    import torch
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    elements = SIZE_BYTES // 4 // world * world
    result = {}
    for name, factor in (("all-reduce", 2.0), ("all-to-all", 1.0)):
        best_s = float("inf")
        for _ in range(REPEATS):
            sent = torch.full((elements,), float(rank + 1), device=device)
            received = torch.empty_like(sent)
            distributed.barrier(group)
            start = time.perf_counter()
            if name == "all-reduce":
                distributed.all_reduce(sent, group=group)
            else:
                distributed.all_to_all_single(received, sent, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - start)
        if name == "all-reduce":
            correct = bool((sent == world * (world + 1) / 2).all())
        else:
            blocks = received.view(world, -1)
            correct = all(bool((blocks[peer] == peer + 1).all()) for peer in range(world))
        if not correct:
            raise RuntimeError(f"the {name} gave a wrong result")
        result[name] = factor * (world - 1) / world * elements * 4 / best_s
    return result


def bandwidth_lines(result: dict[str, float], backend: str, where: str) -> Iterator[Check]:
    """A check per collective of :func:`time_collectives`; ``where`` says between what."""
    for name in ("all-reduce", "all-to-all"):
        detail = f"{result[name] / 1e9:.2f} GB/s bus bandwidth, {where}, {SIZE_BYTES >> 20} MiB, correct"
        yield Check("collectives", f"{backend} {name}", "OK", detail)


def bandwidth_checks(ranks: JoinedRanks) -> Iterator[Check]:
    """All-reduce and all-to-all between all ranks: over NCCL when every rank has a GPU of its own, else over gloo."""
    import torch

    where = f"{ranks.world.size} ranks on {len(set(ranks.nodes))} nodes"
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if not all(ranks.world.gather(local_rank < torch.cuda.device_count())):
        yield from bandwidth_lines(time_collectives(torch.device("cpu")), "gloo", where)
        return
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a collective that hangs raises; else it kills the process
    torch.cuda.set_device(local_rank)
    reason = ""
    try:
        timeout = timedelta(minutes=NCCL_TIMEOUT_MINUTES)
        group = torch.distributed.new_group(backend="nccl", timeout=timeout)
        result = time_collectives(torch.device("cuda", local_rank), group)
    except Exception as error:
        result, reason = {}, first_line(str(error))
    failed = [(rank, text) for rank, text in enumerate(ranks.world.gather(None if result else reason)) if text]
    if not failed:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        yield from bandwidth_lines(result, f"NCCL {version}", where)
        return
    rank, text = failed[0]
    fix = "run again with NCCL_DEBUG=WARN to see NCCL's own reason; name the network: NCCL_SOCKET_IFNAME, NCCL_IB_HCA"
    yield Check("collectives", "NCCL", "MISS", f"rank {rank} on {ranks.nodes[rank]}: {text}", fix)


def sameness_checks(ranks: JoinedRanks, config: Config | None) -> Iterator[Check]:
    """Versions, model, tokenizer and corpora are the same on every node, compared by content."""
    facts = _facts(config) if ranks.first_on_node else {}
    every = {node: found for node, found in zip(ranks.nodes, ranks.world.gather(facts), strict=True) if found}
    for name in dict.fromkeys(name for found in every.values() for name in found):
        values: dict[str, list[str]] = {}
        for node, found in every.items():
            values.setdefault(found.get(name, "not there"), []).append(node)
        if len(values) == 1:
            yield Check("nodes", name, "OK", f"the same on {len(every)} nodes ({next(iter(values))[:40]})")
            continue
        detail = "; ".join(f"{', '.join(nodes)}: {value[:40]}" for value, nodes in values.items())
        fix = "start every node from one environment on shared storage (TRACE_DS_VENV or TRACE_DS_CONTAINER)"
        if name != "versions":
            fix = "keep it on storage that all nodes share, or copy it to the nodes again"
        yield Check("nodes", name, "MISS", f"differs: {detail}", fix)


def _facts(config: Config | None) -> dict[str, str]:
    """{what: its value, or hash, on this node}; what cannot be read is left to the node's own checks."""
    from trace_ds.corpora.sources import files_here
    from trace_ds.corpora.tokenizer import tokenizer_fingerprint
    from trace_ds.models.families import inspect_model
    from trace_ds.run.files import canonical_json, sha256_text
    from trace_ds.tensors.model_files import sample_sha256

    versions = ", ".join(f"{name} {version}" for name, version in installed().items())
    facts = {"versions": f"python {platform.python_version()}, {versions}"}
    if config is None:
        return facts
    with contextlib.suppress(Exception):
        facts[f"model: {config.model.path}"] = inspect_model(config.model.path).fingerprint
    with contextlib.suppress(Exception):
        facts["tokenizer"] = tokenizer_fingerprint(config.model.tokenizer_path)
    for side in config.data.sides:
        for entry in getattr(config.data, side):
            with contextlib.suppress(Exception):
                found = [sample_sha256(path) for path in files_here(entry, f"data.{side}")]
                facts[f"{side}: {entry.place}"] = found[0] if len(found) == 1 else sha256_text(canonical_json(found))
    return facts


def shared_storage_checks(ranks: JoinedRanks, run_dir: Path) -> Iterator[Check]:
    """What the first node writes, renames and locks in the run directory is so for all nodes."""
    name = None
    if ranks.world.is_main and (home := nearest_directory(run_dir)) is not None:
        with contextlib.suppress(OSError):  # reported by the node's own checks
            name = os.path.relpath(tempfile.mkdtemp(prefix=".trace-ds-doctor-", dir=home), run_dir)
    name = ranks.world.broadcast(name)
    if name is None:
        return
    folder = Path(os.path.abspath(run_dir / name))  # the same words may be another place on another node
    try:
        yield from _between_nodes(ranks, folder)
    finally:
        ranks.world.barrier()
        if ranks.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _between_nodes(ranks: JoinedRanks, folder: Path) -> Iterator[Check]:
    fix = "put the run directory on storage that all nodes mount under the same path"
    tokens = ranks.world.broadcast([secrets.token_hex(TOKEN_BYTES // 2) for _ in range(2)])
    path = folder / "token"
    for name, token in zip(("same bytes on all nodes", "rename seen by all nodes"), tokens, strict=True):
        if failure := _on_main(ranks, functools.partial(_publish, path, token)):
            detail = f"{ranks.nodes[0]} cannot write {len(token) >> 20} MiB ({failure})"
            yield Check("storage", name, "MISS", detail, "free space there, or choose another --run-dir")
            return
        blind = _nodes_where(ranks, not _reads(path, token))
        if blind:
            yield Check("storage", name, "MISS", f"{', '.join(blind)} cannot read what {ranks.nodes[0]} wrote", fix)
            return
        yield Check("storage", name, "OK", f"{len(token) >> 20} MiB written by {ranks.nodes[0]}")
    yield _locks_between_nodes(ranks, path)


def _locks_between_nodes(ranks: JoinedRanks, path: Path) -> Check:
    """Whether a lock that the main rank holds keeps the other ranks out."""
    with contextlib.ExitStack() as held:
        failure = _on_main(ranks, lambda: held.enter_context(locked(path)))
        found = "" if failure or ranks.world.is_main else lock_problem(path)
        found_by_rank = ranks.world.gather(found)  # the lock is held until all have tried
    found_by_rank[0] = failure and f"flock fails ({failure})"
    if any(found_by_rank):
        rank = next(rank for rank, text in enumerate(found_by_rank) if text)
        # without locks a run is refused by the main rank, the only one that takes them
        status: Status = "MISS" if failure else "WARN"
        return Check("storage", "locks between nodes", status, f"{ranks.nodes[rank]}: {found_by_rank[rank]}", LOCKS_FIX)
    return Check("storage", "locks between nodes", "OK", "flock excludes the other ranks")


def _on_main(ranks: JoinedRanks, action: Callable[[], object]) -> str:
    """Run ``action`` on the main rank; on every rank why it failed, or an empty text (collective, and a barrier)."""
    failure = ""
    if ranks.world.is_main:
        try:
            action()
        except OSError as error:
            failure = error.strerror or str(error)
    return ranks.world.broadcast(failure)


def _publish(path: Path, content: str) -> None:
    """Write a file under another name and rename it, as every artefact is published."""
    part = path.with_name("part")
    part.write_text(content, encoding="ascii")
    os.replace(part, path)


def _nodes_where(ranks: JoinedRanks, condition: bool) -> list[str]:
    flags = ranks.world.gather(condition)
    return list(dict.fromkeys(node for node, flag in zip(ranks.nodes, flags, strict=True) if flag))


def _reads(path: Path, content: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if path.read_bytes() == content.encode("ascii"):
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
