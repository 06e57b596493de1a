"""Checks between the nodes of a job: ``srun … trace-ds doctor CONFIG`` (or torchrun, deepspeed, mpiexec).

The first rank of each node runs the machine's and the run's checks; here they are merged into one report, and what only
several nodes can show is added: that they reach each other, how fast, that they hold the same versions and files, and
that what one writes into the run directory is what the others read.

Every function that takes a :class:`Job` is a collective: all ranks call it, the main rank's checks are the answer.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trace_ds.cluster.checks import Check, first_line, nearest_directory
from trace_ds.cluster.checks_machine import VERSIONS, port_checks
from trace_ds.config.schema import Config
from trace_ds.errors import UserError

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

JOIN_TIMEOUT_MINUTES = 2
SEEN_WITHIN_S = 10.0  # network file systems cache directory entries for a few seconds
TOKEN_BYTES = 1 << 20
ORDER = ("OK", "WARN", "MISS")


@dataclass(frozen=True)
class Job:
    """The joined process group; ``nodes`` holds each rank's node by name, ``node`` is this rank's."""

    world: World
    nodes: list[str]

    @property
    def node(self) -> str:
        return self.nodes[self.world.rank]

    @property
    def first_on_node(self) -> bool:
        return self.nodes.index(self.node) == self.world.rank


def join_job() -> Job | list[Check] | None:
    """Join the launcher's process group; when that fails the checks that say why (None on ranks other than 0)."""
    from trace_ds.parallel.world import join

    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    port = os.environ.get("MASTER_PORT")
    # torchrun's agent holds the port already and serves its ranks there
    if rank == "0" and port and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        taken = [check for check in port_checks(port) if check.status == "MISS"]
        if taken:
            return taken
    try:
        world = join(threads=1, timeout_minutes=JOIN_TIMEOUT_MINUTES)
        return Job(world, world.gather(os.environ.get("SLURMD_NODENAME") or socket.gethostname()))
    except UserError:
        raise
    except Exception as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{port}"
        fix = "open the port between the nodes, and name the network: NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
        detail = f"the ranks do not meet at {where} ({type(error).__name__}: {first_line(str(error))})"
        return [Check("collectives", "process group", "MISS", detail, fix)] if rank == "0" else None


def leave_job(job: Job) -> None:
    from trace_ds.parallel.world import leave

    job.world.barrier()
    leave()


def merged(job: Job, own: list[Check]) -> list[Check]:
    """One line per check for all nodes: the worst status, with the nodes that have it when not all do."""
    by_node = {
        node: checks for node, checks in zip(job.nodes, job.world.gather(own), strict=True) if checks
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


def bandwidth_checks(job: Job) -> Iterator[Check]:
    """All-reduce and all-to-all over the job's own process group."""
    from trace_ds.cluster.bandwidth import bandwidth_lines, time_collectives

    backend = "nccl" if job.world.device.type == "cuda" else "gloo"
    nodes = len(set(job.nodes))
    yield from bandwidth_lines(time_collectives(job.world.device), backend, f"{job.world.size} ranks on {nodes} nodes")


def sameness_checks(job: Job, config: Config | None) -> Iterator[Check]:
    """Versions, model, tokenizer and corpora are the same on every node, compared by content."""
    facts = _facts(config) if job.first_on_node else {}
    every = {node: found for node, found in zip(job.nodes, job.world.gather(facts), strict=True) if found}
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
    from trace_ds.corpora.tokenizer import tokenizer_fingerprint
    from trace_ds.models.families import inspect_model, sample_sha256

    versions = [f"python {sys.version.split()[0]}"]
    for package in VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions.append(f"{package} {importlib.metadata.version(package)}")
    facts = {"versions": ", ".join(versions)}
    if config is None:
        return facts
    with contextlib.suppress(Exception):
        facts[f"model: {config.model.path}"] = inspect_model(config.model.path).fingerprint
    with contextlib.suppress(Exception):
        facts["tokenizer"] = tokenizer_fingerprint(config.model.tokenizer or config.model.path)
    for side in ("forget", "retain"):
        for file in getattr(config.data, side):
            with contextlib.suppress(Exception):
                facts[f"{side}: {file.path}"] = sample_sha256(Path(file.path))
    return facts


def shared_storage_checks(job: Job, run_dir: Path) -> Iterator[Check]:
    """What the first node writes, renames and locks in the run directory is so for all nodes."""
    name = None
    if job.world.is_main and (home := nearest_directory(run_dir)) is not None:
        with contextlib.suppress(OSError):  # reported by the node's own checks
            name = os.path.relpath(tempfile.mkdtemp(prefix=".trace-ds-doctor-", dir=home), run_dir)
    name = job.world.broadcast(name)
    if name is None:
        return
    folder = Path(os.path.abspath(run_dir / name))  # the same words may be another place on another node
    try:
        yield from _between_nodes(job, folder)
    finally:
        job.world.barrier()
        if job.world.is_main:
            shutil.rmtree(folder, ignore_errors=True)


def _between_nodes(job: Job, folder: Path) -> Iterator[Check]:
    fix = "put the run directory on storage that all nodes mount under the same path"
    tokens = job.world.broadcast([secrets.token_hex(TOKEN_BYTES // 2) for _ in range(2)])
    path = folder / "token"
    for name, token in zip(("same bytes on all nodes", "rename seen by all nodes"), tokens, strict=True):
        if job.world.is_main:
            (folder / "part").write_text(token, encoding="ascii")
            os.replace(folder / "part", path)
        job.world.barrier()
        blind = _nodes_where(job, not _reads(path, token))
        if blind:
            yield Check("storage", name, "MISS", f"{', '.join(blind)} cannot read what {job.nodes[0]} wrote", fix)
            return
        yield Check("storage", name, "OK", f"{len(token) >> 20 or 1} MiB written by {job.nodes[0]}")
    with path.open() as handle:
        if job.world.is_main:
            fcntl.flock(handle, fcntl.LOCK_EX)
        job.world.barrier()
        unlocked = _nodes_where(job, not job.world.is_main and _can_lock(path))
    if unlocked:
        fix = "mount with locks (Lustre: -o flock), and never start two jobs in one run directory"
        detail = f"{', '.join(unlocked)} could lock what {job.nodes[0]} had locked"
        yield Check("storage", "locks between nodes", "WARN", detail, fix)
    else:
        yield Check("storage", "locks between nodes", "OK", "flock excludes the other ranks")


def _nodes_where(job: Job, condition: bool) -> list[str]:
    flags = job.world.gather(condition)
    return list(dict.fromkeys(node for node, flag in zip(job.nodes, flags, strict=True) if flag))


def _reads(path: Path, content: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(encoding="ascii") == content:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)


def _can_lock(path: Path) -> bool:
    with path.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True
