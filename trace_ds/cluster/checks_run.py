"""Checks of a run: shared storage, model directory, tokenizer, corpora, and whether the cost model says it fits."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import functools
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trace_ds.cluster.checks import Check, gigabytes, guarded, judged, nearest_directory, user_error
from trace_ds.config.schema import Config, CorpusEntry, TaskConfig
from trace_ds.errors import UserError
from trace_ds.run.hub_names import hub_name

PROBE_BYTES = 64_000_000
SLOW_WRITE_BYTES_S = 100e6
READ_BLOCK_BYTES = 1 << 22
READ_LIMIT_BYTES = 1 << 30
MIN_FREE_BYTES = 1_000_000_000


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
        yield _rename_check(folder)
        yield _lock_check(folder)
        yield _speed_check(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(home).free
    enough = free >= max(needed_bytes or 0, MIN_FREE_BYTES)
    needed = needed_bytes if enough else max(needed_bytes or 0, MIN_FREE_BYTES)
    detail = f"{gigabytes(free)} free" + ("" if needed is None else f", the run needs about {gigabytes(needed)}")
    yield judged(group, "free space", enough, detail, "free space, lower unlearning.keep, or choose another --run-dir")


def _rename_check(folder: Path) -> Check:
    """Replacing a file and renaming a folder: how every artefact and checkpoint is published."""
    try:
        for content in ("old", "new"):
            (folder / "part").write_text(content, encoding="utf-8")
            os.replace(folder / "part", folder / "whole")
        (folder / "tmp").mkdir()
        os.replace(folder / "tmp", folder / "done")
        renamed = (folder / "whole").read_text(encoding="utf-8") == "new" and (folder / "done").is_dir()
        detail = "files and folders" if renamed else "the old content is still there"
    except OSError as error:
        renamed, detail = False, error.strerror or str(error)
    fix = "use a file system with atomic rename (not an object store)"
    return judged("storage", "atomic rename", renamed, detail, fix)


def _lock_check(folder: Path) -> Check:
    """``flock`` keeps two jobs out of one run directory."""
    try:
        with (folder / "lock").open("w") as first, (folder / "lock").open("w") as second:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return Check("storage", "locks", "OK", "flock excludes a second holder")
    except OSError as error:
        detail = f"flock fails ({error.strerror})"
        return Check("storage", "locks", "MISS", detail, "mount with locks (Lustre: -o flock), or another --run-dir")
    fix = "mount with locks (Lustre: -o flock), and never start two jobs in one run directory"
    return Check("storage", "locks", "WARN", "flock does not exclude a second holder", fix)


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
    from trace_ds.hub.models import require_same_commit
    from trace_ds.run.directory import RunDirectory
    from trace_ds.stages.by_name import fetched
    from trace_ds.stages.fetch import look

    run = None if run_dir is None else RunDirectory.at(run_dir)
    recorded = {} if run is None else fetched(run)["models"]
    for item in look(config, run):
        if item.where is None:
            yield Check("hub", item.key, "MISS", f"{item.name} is not in the cache", "trace-ds fetch CONFIG")
            continue
        try:
            if item.kind == "models":
                require_same_commit(item.name, item.key, item.where.name, recorded.get(item.name, {}).get("commit"))
            yield Check("hub", item.key, "OK", f"{item.name} in {item.where}")
        except UserError as error:
            yield user_error("hub", item.key, error)


def model_checks(config: Config, world_size: int | None = None) -> Iterator[Check]:
    """Every file of the model whole, a family we support, experts and processes that the configuration divides.

    Args:
        world_size: processes of the job when a launcher started it; None: as configured.
    """
    from trace_ds.cluster.architecture import read_architecture
    from trace_ds.models.families import check_expert_parallel, inspect_model
    from trace_ds.tensors.model_files import read_model_directory

    group, ep = "model", config.distributed.ep
    try:
        files = read_model_directory(config.model.path)
    except UserError as error:
        yield user_error(group, "files", error)
        return
    sizes = f"{len(files.files)} files, {len(files.tensors)} tensors, {gigabytes(files.bytes)}"
    yield Check(group, "files", "OK", f"{sizes}, {', '.join(files.dtypes)}")
    try:
        info = inspect_model(files.path)
    except UserError as error:
        yield user_error(group, "family", error)
        return
    parallel = info.family.autoep_preset is not None
    detail = "" if parallel else " has no expert parallelism: sharded by ZeRO-3"
    yield Check(group, "family", "OK", f"{info.family.model_type}{detail}")
    if parallel:
        a = read_architecture(files.config, str(files.path))
        yield Check(group, "experts", "OK", f"{a.experts} in each of {a.moe_layers} layers, {a.top_k} per token")
    try:
        check_expert_parallel(info, ep, world_size or config.distributed.nproc or ep)
        if parallel:
            yield Check(group, "expert parallelism", "OK", f"EP {ep}: {info.experts // ep} experts a process")
    except UserError as error:
        yield user_error(group, "expert parallelism", error)


def tokenizer_checks(config: Config) -> Iterator[Check]:
    """The tokenizer loads, and its ids fit the model's vocabulary."""
    from trace_ds.corpora.tokenizer import check_tokenizer, load_tokenizer
    from trace_ds.tensors.model_files import read_model_config

    path, vocabulary = config.model.tokenizer or config.model.path, None
    with contextlib.suppress(UserError):  # reported by the model's own check
        vocabulary = read_model_config(config.model.path).get("vocab_size")
    check_tokenizer(path, vocabulary)
    tokenizer = load_tokenizer(path)
    yield Check("tokenizer", "loads", "OK", f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")


def corpus_checks(config: Config) -> Iterator[Check]:
    """Every corpus file is there, its text is UTF-8, and `prepare` reads its first document."""
    for side in config.data.sides:
        for entry in getattr(config.data, side):
            name = f"{side}: {entry.place}"
            yield from guarded("corpora", name, functools.partial(_corpus_check, name, f"data.{side}", entry))


def _corpus_check(name: str, key: str, entry: CorpusEntry) -> Iterator[Check]:
    from trace_ds.corpora.read import read_documents
    from trace_ds.corpora.records import kind_of
    from trace_ds.corpora.sources import files_here, is_table

    files = files_here(entry, key)
    size, position = sum(path.stat().st_size for path in files), 0
    encoded = [] if is_table(entry) else [path for path in files if path.suffix == kind_of(path) != ".parquet"]
    for path in encoded:
        position += _decoded_bytes(path, READ_LIMIT_BYTES - position)
    if size == 0 or next(read_documents([entry], key), None) is None:
        raise UserError("the file is empty", fix="write it again")
    encoding = ", UTF-8" if encoded else ""
    read = f", the first {gigabytes(position)} of it read" if encoded and position < size else ""
    many = f" in {len(files)} files" if len(files) > 1 else ""
    yield Check("corpora", name, "OK", f"{gigabytes(size)}{many}{encoding}{read}")


def _decoded_bytes(path: Path, limit: int) -> int:
    """How much of a file was found to be UTF-8: the whole, or ``limit`` bytes; :class:`UserError` when it is not."""
    position, decoder = 0, codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as handle:
        try:
            while position < limit and (block := handle.read(READ_BLOCK_BYTES)):
                decoder.decode(block)
                position += len(block)
            if position >= path.stat().st_size:
                decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            what = f"not UTF-8 (near byte {position + error.start})"
            raise UserError(what, fix="convert it: iconv -f ENCODING -t UTF-8") from None
    return position


def evaluation_checks(config: Config) -> Iterator[Check]:
    """Every task's files can be read (and lm-eval is there and knows the tasks asked of it), every model is whole."""
    from trace_ds.corpora.sources import files_here
    from trace_ds.evaluation.items import read_task
    from trace_ds.evaluation.subjects import ORIGINAL, named_models
    from trace_ds.parallel.environment import accelerator_count
    from trace_ds.parallel.launch import check_process_count
    from trace_ds.tensors.model_files import read_model_directory

    group, settings = "evaluation", config.evaluation
    try:
        check_process_count(settings.nproc, accelerator_count(), os.cpu_count() or 1, "evaluation.nproc")
    except UserError as error:
        yield user_error(group, "processes", error)
    names = [task.name for task in settings.tasks]

    def task_check(task: TaskConfig) -> Iterator[Check]:
        if names.count(task.name) > 1:
            raise UserError(f"two tasks are named {task.name!r}", "evaluation.tasks", "rename one")
        if task.dataset:
            files_here(task, "evaluation.tasks")  # it would be downloaded
        items = len(read_task(task).items)
        yield Check(group, task.name, "OK", f"{task.type}, {f'{items} items' if items else task.task}")

    def model_check(name: str, path: Path) -> Iterator[Check]:
        yield Check(group, name, "OK", f"{len(read_model_directory(path).tensors)} tensors")

    for task in settings.tasks:
        yield from guarded(group, task.name, functools.partial(task_check, task))
    for name, path in named_models(config.model.path, config.evaluation).items():
        if name != ORIGINAL and hub_name(str(path)) is None:  # the run's own model, and what the hub's check misses
            yield from guarded(group, f"model {name}", functools.partial(model_check, f"model {name}", path))


def variant_checks(config: Config) -> Iterator[Check]:
    """Every variant is a job of its own: its settings fit the model, and its DeepSpeed file can be read."""
    from trace_ds.cluster.job import variants_of
    from trace_ds.models.families import inspect_model
    from trace_ds.stages.unlearn import check_settings

    variants = variants_of(config)
    info = inspect_model(config.model.path) if variants else None

    def fits(name: str, variant: Config) -> Iterator[Check]:
        assert info is not None
        check_settings(variant, info)
        yield Check("variants", name, "OK", ", ".join(config.variants[name]) or "as the run itself")

    for name, variant in variants.items():
        yield from guarded("variants", name, functools.partial(fits, name, variant))
