"""Checks of a run: shared storage, model directory, tokenizer, corpora, and whether the cost model says it fits."""

from __future__ import annotations

import codecs
import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from trace_ds.cluster.checks import Check, gigabytes, guarded, nearest_directory, user_error
from trace_ds.config.schema import Config, CorpusFile, TaskConfig
from trace_ds.errors import UserError

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
    needed = max(needed_bytes or 0, MIN_FREE_BYTES)
    if free < needed:
        detail = f"{gigabytes(free)} free, the run needs about {gigabytes(needed)}"
        yield Check(
            group, "free space", "MISS", detail, "free space, lower unlearning.keep, or choose another --run-dir"
        )
    else:
        suffix = "" if needed_bytes is None else f", the run needs about {gigabytes(needed_bytes)}"
        yield Check(group, "free space", "OK", f"{gigabytes(free)} free{suffix}")


def _rename_check(folder: Path) -> Check:
    """Replacing a file and renaming a folder: how every artefact and checkpoint is published."""
    try:
        for content in ("old", "new"):
            (folder / "part").write_text(content, encoding="utf-8")
            os.replace(folder / "part", folder / "whole")
        (folder / "tmp").mkdir()
        os.replace(folder / "tmp", folder / "done")
        renamed = (folder / "whole").read_text(encoding="utf-8") == "new" and (folder / "done").is_dir()
    except OSError as error:
        renamed, why = False, error.strerror or str(error)
    else:
        why = "the old content is still there"
    if renamed:
        return Check("storage", "atomic rename", "OK", "files and folders")
    return Check("storage", "atomic rename", "MISS", why, "use a file system with atomic rename (not an object store)")


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
        return Check(
            "storage", "write speed", "MISS", f"cannot write {gigabytes(PROBE_BYTES)} ({error.strerror})", "free space"
        )
    speed = PROBE_BYTES / (time.perf_counter() - start)
    detail = f"{speed / 1e6:.0f} MB/s with fsync, one process"
    if speed < SLOW_WRITE_BYTES_S:
        return Check("storage", "write speed", "WARN", detail, "checkpoints will be slow; use the parallel file system")
    return Check("storage", "write speed", "OK", detail)


def model_checks(config: Config, world_size: int | None = None) -> Iterator[Check]:
    """Every file of the model whole, a family we support, experts and processes that the configuration divides.

    Args:
        world_size: processes of the job when a launcher started it; None: as configured.
    """
    from trace_ds.models.families import FAMILIES, inspect_model
    from trace_ds.tensors.model_files import read_model_directory

    group = "model"
    try:
        files = read_model_directory(config.model.path)
    except UserError as error:
        yield user_error(group, "files", error)
        return
    detail = (
        f"{len(files.files)} files, {len(files.tensors)} tensors, {gigabytes(files.bytes)}, {', '.join(files.dtypes)}"
    )
    yield Check(group, "files", "OK", detail)
    if files.model_type in FAMILIES:
        yield Check(group, "family", "OK", files.model_type)
        yield from _expert_checks(config, files.config, str(files.path), world_size or config.distributed.nproc)
        return
    try:
        inspect_model(files.path)
    except UserError as error:
        yield user_error(group, "family", error)
    else:
        detail = f"{files.model_type} has no expert parallelism: sharded by ZeRO-3"
        if config.distributed.ep > 1:
            detail += f", and distributed.ep is {config.distributed.ep}"
            yield Check(group, "family", "MISS", detail, "set distributed.ep: 1 (--ep 1)")
        else:
            yield Check(group, "family", "OK", detail)


def _expert_checks(
    config: Config, model_config: dict[str, object], where: str, processes: int | None
) -> Iterator[Check]:
    from trace_ds.cluster.architecture import read_architecture

    group = "model"
    try:
        a = read_architecture(model_config, where)
    except UserError as error:
        yield user_error(group, "experts", error)
        return
    yield Check(group, "experts", "OK", f"{a.experts} in each of {a.moe_layers} layers, {a.top_k} per token")
    ep = config.distributed.ep
    if a.experts % ep:
        sizes = ", ".join(str(size) for size in range(1, a.experts + 1) if a.experts % size == 0)
        detail = f"distributed.ep {ep} does not divide the {a.experts} experts"
        yield Check(group, "expert parallelism", "MISS", detail, f"use one of {sizes}")
    elif processes is not None and processes % ep:
        detail = f"distributed.ep {ep} does not divide the {processes} processes"
        yield Check(group, "expert parallelism", "MISS", detail, "change distributed.ep or distributed.nproc")
    else:
        yield Check(group, "expert parallelism", "OK", f"EP {ep}: {a.experts // ep} experts a process")


def tokenizer_checks(config: Config) -> Iterator[Check]:
    """The tokenizer loads, and its ids fit the model's vocabulary."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.tensors.model_files import read_model_config

    tokenizer = load_tokenizer(config.model.tokenizer or config.model.path)
    size = len(tokenizer)
    try:
        vocabulary = read_model_config(config.model.path).get("vocab_size")
    except UserError:
        vocabulary = None  # reported by the model's own check
    if isinstance(vocabulary, int) and size > vocabulary:
        detail = f"{size} tokens, but the model has {vocabulary}"
        yield Check("tokenizer", "loads", "MISS", detail, "set model.tokenizer to the model's own tokenizer")
    else:
        yield Check("tokenizer", "loads", "OK", f"{type(tokenizer).__name__}, {size} tokens")


def corpus_checks(config: Config) -> Iterator[Check]:
    """Every corpus file is there, not empty, UTF-8, and (JSONL) has text under its key in the first line."""
    for side in config.data.sides:
        for file in getattr(config.data, side):
            yield _corpus_check(side, file)


def _corpus_check(side: str, file: CorpusFile) -> Check:
    group, name, path = "corpora", f"{side}: {file.path}", Path(file.path)
    if not path.is_file():
        return Check(group, name, "MISS", "the file does not exist", f"correct data.{side} in the configuration")
    size = path.stat().st_size
    if size == 0:
        return Check(group, name, "MISS", "the file is empty", "write it again")
    if path.suffix == ".parquet":
        with path.open("rb") as handle:
            if handle.read(4) != b"PAR1":
                return Check(group, name, "MISS", "no Parquet file", "write it again")
        return Check(group, name, "OK", gigabytes(size))
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with path.open("rb") as handle:
        try:
            while position < READ_LIMIT_BYTES and (block := handle.read(READ_BLOCK_BYTES)):
                decoder.decode(block)
                position += len(block)
            if position >= size:
                decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            detail = f"not UTF-8 (near byte {position + error.start})"
            return Check(group, name, "MISS", detail, "convert it: iconv -f ENCODING -t UTF-8")
    if path.suffix in (".jsonl", ".json"):
        with path.open(encoding="utf-8") as lines:
            first = next((line for line in lines if line.strip()), "")
        try:
            record = json.loads(first)
        except ValueError:
            return Check(group, name, "MISS", "the first line is no JSON object", "write one JSON object a line")
        if not isinstance(record, dict) or not isinstance(record.get(file.field), str):
            return Check(
                group, name, "MISS", f"the first line has no text under {file.field!r}", "set the corpus' field"
            )
    read = "" if position >= size else f", the first {gigabytes(position)} of it read"
    return Check(group, name, "OK", f"{gigabytes(size)}, UTF-8{read}")


def evaluation_checks(config: Config) -> Iterator[Check]:
    """Every task's files can be read (and lm-eval is there and knows the tasks asked of it), every model is whole."""
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
    for task in settings.tasks:

        def checked(task: TaskConfig = task) -> Iterator[Check]:
            if names.count(task.name) > 1:
                raise UserError(f"two tasks are named {task.name!r}", "evaluation.tasks", "rename one")
            items = len(read_task(task).items)
            yield Check(group, task.name, "OK", f"{task.type}, {f'{items} items' if items else task.task}")

        yield from guarded(group, task.name, checked)
    for name, path in named_models(config.model.path, config.evaluation).items():
        if name == ORIGINAL:
            continue  # the run's own model

        def whole(name: str = name, path: Path = path) -> Iterator[Check]:
            yield Check(group, f"model {name}", "OK", f"{len(read_model_directory(path).tensors)} tensors")

        yield from guarded(group, f"model {name}", whole)


def variant_checks(config: Config) -> Iterator[Check]:
    """Every variant is a job of its own: its settings fit the model, and its DeepSpeed file can be read."""
    from trace_ds.cluster.job import variants_of
    from trace_ds.models.families import inspect_model
    from trace_ds.stages.unlearn import check_settings

    variants = variants_of(config)
    info = inspect_model(config.model.path) if variants else None
    for name, variant in variants.items():

        def fits(name: str = name, variant: Config = variant) -> Iterator[Check]:
            assert info is not None
            check_settings(variant, info)
            yield Check("variants", name, "OK", ", ".join(config.variants[name]) or "as the run itself")

        yield from guarded("variants", name, fits)
