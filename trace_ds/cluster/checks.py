"""The checks of ``trace-ds doctor`` on one machine: software, accelerators, limits, the run's storage and input."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trace_ds.config.schema import Config
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.errors import UserError
from trace_ds.parallel.environment import available_memory_bytes

Status = Literal["OK", "WARN", "MISS"]
PACKAGE = "trace-ds"
MIN_OPEN_FILES = 4096
MIN_SHARED_MEMORY_BYTES = MIN_FREE_BYTES = 1_000_000_000
MIN_BF16_CAPABILITY = (8, 0)
PROBE_BYTES = 4 << 20
LOCKS_FIX = "mount with locks (Lustre: -o flock), and never start two jobs in one run directory"


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        group: heading it is listed under.
        name: what was looked at.
        status: OK; WARN (works, but slower or not everywhere); MISS (a job would fail).
        detail: what was found.
        fix: what to do about it; empty when OK.
    """

    group: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def judged(group: str, name: str, good: bool, detail: str, fix: str, otherwise: Status = "MISS") -> Check:
    """An OK, or else a check of another status with its fix."""
    return Check(group, name, "OK", detail) if good else Check(group, name, otherwise, detail, fix)


def checked(group: str, name: str, find: Callable[[], object], fix: str = "") -> Check:
    """OK with what ``find`` returns as its detail, or a MISS: an error of the user's, of the system (when there is a
    ``fix`` for one) or of the check itself."""
    try:
        return Check(group, name, "OK", str(find() or "in order"))
    except UserError as error:
        where = f"{error.where}: " if error.where else ""
        return Check(group, name, "MISS", f"{where}{error.problem}", error.fix)
    except Exception as error:
        if fix and isinstance(error, OSError):
            return Check(group, name, "MISS", error.strerror or str(error), fix)
        detail = f"the check itself failed: {type(error).__name__}: {first_line_of_error(str(error))}"
        return Check(group, name, "MISS", detail, "report it with the output of trace-ds doctor --json")


def guarded(group: str, name: str, function: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks ``function`` yields; an error on the way becomes one more, so the others still report."""
    results: list[Check] = []
    end = checked(group, name, lambda: results.extend(function()))
    return results if end.status == "OK" else [*results, end]


def first_line_of_error(text: str) -> str:
    """The first non-empty line, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def gigabytes(number: float) -> str:
    """Bytes as GB with one digit after the point, MB below one."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def nearest_directory(path: Path) -> Path | None:
    """``path`` or its nearest parent that exists; None when that is not a directory."""
    absolute = Path(os.path.abspath(path))
    nearest = next(place for place in (absolute, *absolute.parents) if place.exists())
    return nearest if nearest.is_dir() else None


def requirements() -> list[Requirement]:
    """What this package needs on this Python, without its extras; nothing when it is not installed."""
    try:
        needs = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    except importlib.metadata.PackageNotFoundError:
        return []
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def installed_versions() -> dict[str, str]:
    """The versions of the packages that this one needs, as far as they are there."""
    versions = {}
    for need in requirements():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[need.name] = importlib.metadata.version(need.name)
    return versions


def python_checks() -> Iterator[Check]:
    """Python, and the packages with their versions."""
    needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"] if requirements() else ""
    good = SpecifierSet(needed).contains(platform.python_version(), prereleases=True)
    yield judged("python", "python", good, f"{platform.python_version()} at {sys.executable}", f"use Python {needed}")
    versions = installed_versions()
    for need in requirements():
        version = versions.get(need.name)
        if version is None or not need.specifier.contains(version, True):
            detail = "not installed" if version is None else f"{version}, which is not {need.specifier}"
            yield Check("python", need.name, "MISS", detail, f'pip install "{need.name}{need.specifier}"')
    packages = ", ".join(f"{name} {versions[name]}" for name in sorted(versions))
    fix = "pip install it: imported from a folder, what it needs is not known"
    yield judged("python", "packages", bool(packages), packages or f"{PACKAGE} is not installed", fix, "WARN")


def accelerator_checks(config: Config | None) -> Iterator[Check]:
    """Check the GPUs: what torch, SLURM and the driver report, and whether the configuration can run on them."""
    import torch

    group, count = "accelerators", torch.cuda.device_count() if torch.cuda.is_available() else 0
    driver = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = first_line_of_error(
            subprocess.run(command, capture_output=True, text=True, timeout=15, check=True).stdout
        )
    promised = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if promised.isdigit() and int(promised) > count:
        fix = "run nvidia-smi on the node, install the CUDA build of torch, and look at CUDA_VISIBLE_DEVICES"
        yield Check(group, "GPUs", "MISS", f"SLURM promises {promised} on this node, torch sees {count}", fix)
    elif count == 0 and (driver or Path("/dev/nvidiactl").exists()):
        fix = "install the CUDA build of torch that this driver supports (see pytorch.org), or free the GPUs"
        yield Check(group, "GPUs", "MISS", f"a driver ({driver}) but torch sees no GPU", fix)
    elif count == 0:
        fix = "none needed for the demo; for a real model use a GPU node (sbatch slurm/unlearn_mixtral.sh)"
        yield Check(group, "GPUs", "WARN", "none: jobs run on the CPU with gloo", fix)
    for index in range(count):
        gpu = torch.cuda.get_device_properties(index)
        bf16 = config is None or config.model.dtype == "bf16"
        good = not bf16 or (gpu.major, gpu.minor) >= MIN_BF16_CAPABILITY
        detail = f"{gpu.name}, {gigabytes(gpu.total_memory)}, compute {gpu.major}.{gpu.minor}, driver {driver}"
        fix = "use Ampere or newer, or model.dtype fp32: this one has no bf16"
        yield judged(group, f"GPU {index}", good, f"{detail}, torch {torch.__version__}", fix, "WARN")


def compiler_checks(config: Config) -> Iterator[Check]:
    """A C compiler, where Triton compiles the kernels of expert parallelism."""
    import torch

    if config.distributed.ep == 1 or not torch.cuda.is_available():
        return
    header = Path(sysconfig.get_path("include")) / "Python.h"
    compiler = os.environ.get("CC") or shutil.which("clang") or shutil.which("gcc")
    absent = [f"no {part}" for part, there in (("C compiler", compiler), (header, header.is_file())) if not there]
    detail = f"{' and '.join(absent)}: Triton compiles AutoEP's kernels on the GPU node" if absent else compiler
    fix = "apt-get install gcc python3-dev, TRACE_DS_MODULES=gcc in the site file, or distributed.ep: 1"
    yield judged("compiler", "C compiler for Triton", not absent, str(detail), fix)


def capacity_checks(config: Config | None, processes: int, needed_bytes: float | None) -> Iterator[Check]:
    """CPUs against processes x threads, memory against what loading needs, shared memory, open files.

    Args:
        processes: processes of the job on this machine.
        needed_bytes: memory that loading the model in all of them takes; None when no model is known.
    """
    group, cores = "capacity", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 1 if config is None else config.distributed.threads
    detail = f"{cores} cores for {processes} processes x {threads} threads"
    fix = "fewer processes (--nproc), or distributed.threads 1: too many threads are several times slower"
    yield judged(group, "cores", processes * threads <= cores, detail, fix, "WARN")
    available = available_memory_bytes()
    detail = f"{gigabytes(available)} available"
    detail += "" if needed_bytes is None else f", loading needs {gigabytes(needed_bytes)}"
    fix = "fewer processes (--nproc), model.dtype bf16, or a machine with more memory"
    yield judged(group, "memory", (needed_bytes or 0) <= available, detail, fix)
    if Path("/dev/shm").is_dir():
        free = shutil.disk_usage("/dev/shm").free
        fix = "start the container with --shm-size=8g or --ipc=host (NCCL uses /dev/shm)"
        yield judged(group, "/dev/shm", free >= MIN_SHARED_MEMORY_BYTES, f"{gigabytes(free)} free", fix, "WARN")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {MIN_OPEN_FILES} (hard limit {hard})"
    yield judged(group, "open files", soft >= MIN_OPEN_FILES, f"at most {soft}", fix, "WARN")


def storage_checks(run_dir: Path, needed_bytes: float | None) -> Iterator[Check]:
    """The run directory's file system: writable, atomic rename, locks, free space.

    Tested in a temporary folder inside the run directory, or inside its nearest existing parent (which the run
    would make it in); everything is removed again.
    """
    group, home = "storage", nearest_directory(run_dir)
    fix = "choose another --run-dir, or free space and ask for write access there"
    if home is None:
        yield Check(group, "run directory", "MISS", f"{run_dir}: a part of the path is a file", fix)
        return
    try:
        with tempfile.TemporaryDirectory(prefix=".trace-ds-doctor-", dir=home) as folder:
            path = Path(folder) / "file"
            for content in (bytes(PROBE_BYTES), b"new"):
                publish(path, content)
            yield judged(group, "run directory", path.read_bytes() == b"new", f"{home} is writable", fix)
            try:
                with locked_file(path):
                    problem = lock_problem(path)
                yield judged(
                    group, "locks", not problem, problem or "flock excludes a second holder", LOCKS_FIX, "WARN"
                )
            except OSError as error:
                yield Check(group, "locks", "MISS", f"flock fails ({error.strerror})", LOCKS_FIX)
    except OSError as error:
        yield Check(group, "run directory", "MISS", f"{home} cannot be written ({error.strerror})", fix)
        return
    free, needed = shutil.disk_usage(home).free, max(needed_bytes or 0, MIN_FREE_BYTES)
    detail = f"{gigabytes(free)} free, the run needs about {gigabytes(needed)}"
    fix = "free space, lower unlearning.keep, or choose another --run-dir"
    yield judged(group, "free space", free >= needed, detail, fix)


def publish(path: Path, content: bytes) -> None:
    """Write a file under another name and rename it, as every artefact is published."""
    part = path.with_name("part")
    part.write_bytes(content)
    os.replace(part, path)


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Hold the lock of a file; OSError when it is taken or there are no locks."""
    with path.open("r+b") as handle:  # NFS makes a POSIX lock of it, and an exclusive one needs a writable descriptor
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def lock_problem(path: Path) -> str:
    """Try to take a lock that another process holds: the problem where that succeeds, else empty."""
    try:
        with locked_file(path):
            return "flock does not exclude a second holder"
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"flock fails ({error.strerror or error})"


def hub_checks(written: Config) -> Iterator[Check]:
    """Check that the models and data sets that the configuration (as ``written``) names on the hub are cached."""
    from trace_ds.stages.fetch import cached_names

    for key, name, place in cached_names(written):
        detail = f"{name} " + (f"in {place}" if place else "is not in the cache")
        yield judged("hub", key, place is not None, detail, "trace-ds fetch CONFIG")


def corpus_checks(config: Config) -> Iterator[Check]:
    """Check that `prepare` can read the first document of every corpus."""
    for side in config.data.sides:
        for entry in config.data.corpus(side):
            yield checked("corpora", f"{side}: {entry.place}", functools.partial(_corpus, f"data.{side}", entry))


def _corpus(key: str, entry: CorpusEntry) -> str:
    from trace_ds.corpora.read import read_documents
    from trace_ds.corpora.sources import files_here

    files = files_here(entry, key)
    size = sum(path.stat().st_size for path in files)
    if size == 0 or next(read_documents([entry], key), None) is None:
        raise UserError("the file is empty", fix="write it again")
    return gigabytes(size) + (f" in {len(files)} files" if len(files) > 1 else "")


def run_check(config: Config, run_dir: Path, world_size: int | None) -> str:
    """Run the checks that `run` makes before it writes anything: model, shapes, tasks, models to score, variants.

    Args:
        world_size: processes of the job when a launcher started it; None: `run` would start them here.
    """
    from trace_ds.run.directory import RunDirectory
    from trace_ds.stages.pipeline import Request, check_early

    request = Request(config, RunDirectory.at(run_dir)).with_variants("all")
    check_early("run", request, world_size, download=False)
    return f"{len(config.evaluation.tasks)} tasks, {len(config.variants)} variants"
