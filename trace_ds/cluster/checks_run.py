"""Checks of a run: shared storage, model directory, tokenizer, corpora, and those of the run itself."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trace_ds.cluster.checks import Check, checked, gigabytes, judged, nearest_directory
from trace_ds.config.schema import Config
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.errors import UserError

PROBE_BYTES = 64_000_000
SLOW_WRITE_BYTES_S = 100e6
MIN_FREE_BYTES = 1_000_000_000
LOCKS_FIX = "mount with locks (Lustre: -o flock), and never start two jobs in one run directory"


def storage_checks(run_dir: Path, needed_bytes: float | None) -> Iterator[Check]:
    """The run directory's file system: writable, atomic rename, locks, speed, free space.

    Tested in a temporary folder inside the run directory, or inside its nearest existing parent (which the run
    would make it in); everything is removed again.
    """
    group, home = "storage", nearest_directory(run_dir)
    fix = "choose another --run-dir, or ask for write access"
    if home is None:
        yield Check(group, "run directory", "MISS", f"{run_dir}: a part of the path is a file", fix)
        return
    try:
        folder = Path(tempfile.mkdtemp(prefix=".trace-ds-doctor-", dir=home))
    except OSError as error:
        yield Check(group, "run directory", "MISS", f"{home} cannot be written ({error.strerror})", fix)
        return
    try:
        yield Check(group, "run directory", "OK", f"{home} is writable")
        rename_fix = "use a file system with atomic rename (not an object store)"
        yield checked(group, "atomic rename", lambda: _rename(folder), rename_fix)
        yield _lock_check(folder / "lock")
        yield _speed_check(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(home).free
    enough = free >= max(needed_bytes or 0, MIN_FREE_BYTES)
    needed = needed_bytes if enough else max(needed_bytes or 0, MIN_FREE_BYTES)
    detail = f"{gigabytes(free)} free" + ("" if needed is None else f", the run needs about {gigabytes(needed)}")
    yield judged(group, "free space", enough, detail, "free space, lower unlearning.keep, or choose another --run-dir")


def _rename(folder: Path) -> str:
    """Replacing a file and renaming a folder: how every artefact and checkpoint is published."""
    for content in ("old", "new"):
        (folder / "part").write_text(content, encoding="utf-8")
        os.replace(folder / "part", folder / "whole")
    (folder / "tmp").mkdir()
    os.replace(folder / "tmp", folder / "done")
    if (folder / "whole").read_text(encoding="utf-8") != "new" or not (folder / "done").is_dir():
        raise OSError("the old content is still there")
    return "files and folders"


def _lock_check(path: Path) -> Check:
    """``flock`` keeps two jobs out of one run directory."""
    try:
        path.touch()
        with locked(path):
            problem = lock_problem(path)
    except OSError as error:
        return Check("storage", "locks", "MISS", f"flock fails ({error.strerror})", LOCKS_FIX)
    return judged("storage", "locks", not problem, problem or "flock excludes a second holder", LOCKS_FIX, "WARN")


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; OSError when it is taken or there are no locks."""
    with path.open("r+b") as handle:  # NFS makes a POSIX lock of it, and an exclusive one needs a writable descriptor
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def lock_problem(path: Path) -> str:
    """What is wrong with a lock that somebody else holds; empty when it is respected."""
    try:
        with locked(path):
            return "flock does not exclude a second holder"
    except BlockingIOError:
        return ""
    except OSError as error:
        return f"flock fails ({error.strerror or error})"


def _speed_check(folder: Path) -> Check:
    """Write speed of one process, fsync included."""
    block = os.urandom(1 << 20)
    start = time.perf_counter()
    try:
        with (folder / "speed").open("wb") as handle:
            for _ in range(PROBE_BYTES // len(block)):
                handle.write(block)
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        detail = f"cannot write {gigabytes(PROBE_BYTES)} ({error.strerror})"
        return Check("storage", "write speed", "MISS", detail, "free space")
    speed = PROBE_BYTES / (time.perf_counter() - start)
    detail, fix = f"{speed / 1e6:.0f} MB/s with fsync", "checkpoints will be slow; use the parallel file system"
    return judged("storage", "write speed", speed >= SLOW_WRITE_BYTES_S, f"{detail}, one process", fix, "WARN")


def hub_checks(config: Config, run_dir: Path | None) -> Iterator[Check]:
    """What the configuration names on the hub is in the caches, models at the commit that was fetched for this run.

    Args:
        config: as it was written, with names.
    """
    from trace_ds.run.directory import RunDirectory
    from trace_ds.stages.fetch import Found, look

    def found(item: Found) -> str:
        if item.where is None:
            raise UserError(f"{item.name} is not in the cache", fix="trace-ds fetch CONFIG")
        return f"{item.name} in {item.where}"

    for item in look(config, None if run_dir is None else RunDirectory.at(run_dir)):
        yield checked("hub", item.key, functools.partial(found, item))


def model_checks(config: Config, world_size: int | None = None) -> Iterator[Check]:
    """Every file of the model whole, a family we support, experts and processes that the configuration divides.

    Args:
        world_size: processes of the job when a launcher started it; None: as configured.
    """
    from trace_ds.models.families import check_expert_parallel, inspect_model
    from trace_ds.tensors.model_files import read_model_directory

    path, ep = config.model.path, config.distributed.ep

    def files() -> str:
        found = read_model_directory(path)
        sizes = f"{len(found.files)} files, {len(found.tensors)} tensors, {gigabytes(found.bytes)}"
        return f"{sizes}, {', '.join(found.dtypes)}"

    def family() -> str:
        info = inspect_model(path)
        name = info.family.model_type + (
            "" if info.family.autoep_preset else " has no expert parallelism (ZeRO-3 does)"
        )
        return f"{name}, {info.experts} experts in a layer, {info.top_k} per token"

    def parallel() -> str:
        info = inspect_model(path)
        options = config.distributed.autoep.options
        check_expert_parallel(info, ep, world_size or config.distributed.nproc or ep, options=options)
        return f"EP {ep}: {info.experts // ep} experts a process"

    for name, find in (("files", files), ("family", family), ("expert parallelism", parallel)):
        check = checked("model", name, find)
        yield check
        if check.status != "OK":  # what comes after it would say the same
            return


def tokenizer_check(config: Config) -> str:
    """The tokenizer loads, and its ids fit the model's vocabulary."""
    from trace_ds.corpora.tokenizer import check_tokenizer, load_tokenizer
    from trace_ds.tensors.model_files import read_model_config

    path, vocabulary = config.model.tokenizer_path, None
    with contextlib.suppress(UserError):  # reported by the model's own check
        vocabulary = read_model_config(config.model.path).get("vocab_size")
    check_tokenizer(path, vocabulary)
    tokenizer = load_tokenizer(path)
    return f"{type(tokenizer).__name__}, {len(tokenizer)} tokens"


def corpus_checks(config: Config) -> Iterator[Check]:
    """Every corpus file is there, and `prepare` reads its first document."""
    for side in config.data.sides:
        for entry in getattr(config.data, side):
            yield checked("corpora", f"{side}: {entry.place}", functools.partial(_corpus, f"data.{side}", entry))


def _corpus(key: str, entry: CorpusEntry) -> str:
    from trace_ds.corpora.read import read_documents
    from trace_ds.corpora.sources import files_here

    files = files_here(entry, key)
    size = sum(path.stat().st_size for path in files)
    if size == 0 or next(read_documents([entry], key), None) is None:
        raise UserError("the file is empty", fix="write it again")
    return gigabytes(size) + (f" in {len(files)} files" if len(files) > 1 else "")


def own_checks(config: Config, run_dir: Path, world_size: int | None) -> str:
    """What `run` itself looks at before it writes anything: shapes, tasks, models that are scored, fine-tuning,
    variants."""
    from trace_ds.run.directory import RunDirectory
    from trace_ds.stages.pipeline import Request, check_early

    run = RunDirectory.at(run_dir)
    for verb in ("run",) if run.parent is None else ("calibrate", "unlearn", "evaluate"):  # in a variant's directory
        check_early(verb, Request(config, run), world_size, download=False)
    parts = [f"{len(config.evaluation.tasks)} tasks", f"{len(config.variants)} variants"]
    return ", ".join([*parts, *(["fine-tuning"] if config.finetune is not None else [])])
