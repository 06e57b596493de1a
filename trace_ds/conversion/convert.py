"""Convert a checkpoint: plan everything from metadata, refuse what does not fit, stream, prove, rename.

Memory does not depend on the model: blocks of a few megabytes for each job, plus the list of tensors. The fp32 master
weights of the optimizer are the source of truth; cast to the training type they are the engine's parameters bit for
bit, because DeepSpeed makes those by the same rounding after every step. Shapes and types decide where every tensor
lies, so the headers are written first and any thread can put any tensor in its place. Shards are filled as
``huggingface_hub`` does; file names and index are those of ``save_pretrained``.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import itertools
import json
import os
import re
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from trace_ds.conversion.card import card_of_conversion, companions, copy_companions
from trace_ds.errors import UserError
from trace_ds.run.files import (
    MANIFEST,
    MODEL,
    commit_directory,
    fsync_directory,
    fsync_tree,
    removed_on_error,
    require_apart,
    require_directory,
    require_files,
    sha256_file,
    write_json,
    write_text,
)
from trace_ds.run.foreign import file_entries
from trace_ds.run.hub_names import snapshot_name
from trace_ds.run.log import StageLog, byte_progress
from trace_ds.tensors.checkpoint import Checkpoint, origin
from trace_ds.tensors.layouts import (
    ModelLayout,
    disk_to_fused,
    engine_to_fused,
    fused_to_hub,
    missing_and_unexpected,
    read_layout,
)
from trace_ds.tensors.model_files import (
    INDEX_NAME,
    SINGLE_NAME,
    model_fingerprint,
    read_json_object,
    refuse_other_kinds,
)
from trace_ds.tensors.opening import ANOTHER, REPORT, family_of, open_model, open_source
from trace_ds.tensors.runs import TensorSource
from trace_ds.tensors.stream import ByteProgress, CopyTask, FileHasher, naming_full_disk, run_tasks
from trace_ds.tensors.torch_archive import DTYPE_NAMES, WORDS, check_checksums
from trace_ds.terminal import size

_FORMAT = 1
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Plan:
    """A conversion, planned from metadata alone."""

    checkpoint: Checkpoint
    layout: ModelLayout
    fused: dict[str, TensorSource]
    dtype: str
    base_model: Path
    notes: list[str]

    def dtype_of(self, name: str, source: TensorSource) -> torch.dtype:
        """Type of a tensor of the result: integers as they are, what transformers keeps in fp32 stays fp32."""
        if not source.dtype.is_floating_point or self.dtype == "same":
            return source.dtype
        return torch.float32 if self.layout.keeps_fp32(name) else WORDS[self.dtype]


@dataclass(frozen=True)
class Options:
    """The options of a conversion.

    Attributes:
        tag: name of the step below the source; default: what ``latest`` says.
        dtype: bf16, fp16, fp32, or same (the type that the engine trained in; of a Hugging Face source, each tensor's).
        max_shard_size: largest safetensors file, like "5GB".
        jobs: threads; each takes a few megabytes.
        base_model: directory with the model's ``config.json`` and tokenizer, and its weights where the job held only a
            part of it; default: what the manifest names.
        overwrite: replace what is at the destination (it stays until the new directory is complete).
    """

    tag: str | None = None
    dtype: str = "same"
    max_shard_size: str = "5GB"
    jobs: int = 1
    base_model: Path | None = None
    overwrite: bool = False


def convert_checkpoint(
    source: Path,
    destination: Path,
    *,
    verify: bool = False,
    progress: ByteProgress | None = None,
    card: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert ``source`` to a new directory ``destination``.

    Args:
        source: a DeepSpeed checkpoint (ZeRO 0-3, AutoEP or not), the directory above it, or a Hugging Face
            model directory; recognised, not declared.
        destination: must not exist or be empty; it appears complete or not at all.
        verify: compare the source's files with its manifest or their own checksums, and read back what was written.
        progress: called with (bytes written, bytes in all).
        card: facts of the run for the model card (see :mod:`trace_ds.conversion.card`).
        options: see :class:`Options`.

    Returns:
        The report, which is also ``destination/conversion.json``: source, target, notes, warnings (tensors with NaN),
        and of every file with weights its size and SHA-256.

    Raises:
        UserError: anything wrong with the source, the model or the destination, naming the file or the tensor. Nothing
            is left at ``destination`` then.
    """
    destination = Path(os.path.realpath(destination))
    request = Options(**options)
    plan = check_conversion(source, destination, request)
    if verify:
        verify_source(plan.checkpoint)
    remove_abandoned(destination)
    with _new_directory(destination, request.overwrite) as work:
        report = {"format": _FORMAT, "source": source_facts(plan.checkpoint), "max_shard_size": request.max_shard_size}
        tensors = fused_to_hub(plan.layout, plan.fused)
        dtypes = {name: plan.dtype_of(name, tensor) for name, tensor in tensors.items()}
        tasks = create_shards(tensors, dtypes, parse_size(request.max_shard_size), work)
        copy_companions(plan.base_model, work, plan.dtype)
        hasher = FileHasher()
        report |= run_tasks(tasks, work, request.jobs, progress, hasher)
        hashes = sorted(hasher.finish().items())
        report["files"] = {path.name: {"bytes": path.stat().st_size, "sha256": hashed} for path, hashed in hashes}
        report |= {"dtype": plan.dtype, "parameters": sum(task.source.numel for task in tasks), "notes": plan.notes}
        write_text(work / "README.md", card_of_conversion(destination.name, plan.base_model, report, card or {}))
        write_json(work / REPORT, report)
        if verify:
            verify_huggingface(work)
            report["verified"] = True
            write_json(work / REPORT, report)
    return report


def check_conversion(source: Path, destination: Path, request: Options) -> Plan:
    """Check everything that can be found wrong before a weight is read; writes nothing.

    Errors are those of :func:`convert_checkpoint`.
    """
    if request.dtype not in (*WORDS, "same"):
        raise UserError(f"there is no type {request.dtype!r}", "--dtype", "use bf16, fp16, fp32 or same")
    if request.jobs < 1:
        raise UserError(f"jobs is {request.jobs}", "--jobs", "use 1 or more")
    parse_size(request.max_shard_size)
    check_destination(destination, request.overwrite)
    checkpoint = open_source(Path(source), request.tag)
    read = {"SOURCE": checkpoint.path} | ({"--base-model": request.base_model} if request.base_model else {})
    require_apart([destination], read)
    return make_plan(checkpoint, request.dtype, request.base_model)


def convert_command(source: Path, destination: Path, *, dry_run: bool = False, **options: Any) -> int:
    """``trace-ds convert SOURCE DESTINATION``: convert, and show the progress; exit status 0.

    Args:
        dry_run: check everything that needs no weights, say what would be written, and write nothing.
        options: and the errors, see :func:`convert_checkpoint`.
    """
    if dry_run:
        options.pop("verify", None)
        plan = check_conversion(source, Path(os.path.realpath(destination)), Options(**options))
        for note in plan.notes:
            print(f"note: {note}")
        parameters = sum(tensor.numel for tensor in plan.fused.values())
        nbytes = sum(tensor.numel * plan.dtype_of(name, tensor).itemsize for name, tensor in plan.fused.items())
        print(f"would write {destination}: {parameters:,} parameters, {size(nbytes)}, "
              f"from {origin(plan.checkpoint.summary())}")  # fmt: skip
        return 0
    log = StageLog("convert", None, None)
    log.enabled = True  # of no run: the terminal's alone
    report = convert_checkpoint(source, destination, progress=byte_progress(log), **options)
    for warning in report["warnings"]:
        print(f"warning: {warning}", file=sys.stderr)
    for note in report["notes"]:
        print(f"note: {note}")
    print(
        f"{destination}: {report['parameters']:,} parameters in {report['tensors']} tensors, "
        f"{size(report['bytes'])}, from {origin(report['source'])}{', verified' if 'verified' in report else ''}"
    )
    return 0


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse what the finished directory could not be renamed to."""
    if os.path.ismount(destination):
        raise UserError("the destination is a mount point", str(destination), "choose a new directory below it")
    if overwrite:
        require_directory(destination, MODEL)
    elif destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise _not_empty(destination)
    parent = next(folder for folder in destination.parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError("the destination cannot be written", str(parent), "choose a directory you may write to")


def _not_empty(destination: Path) -> UserError:
    return UserError("the destination is not empty", str(destination), "choose a new directory, or remove this one")


def remove_abandoned(destination: Path) -> None:
    """Delete the temporary directories of conversions to the same place whose process is gone (killed).

    Only those of this host: on shared storage another node's process cannot be seen from here.
    """
    for path in destination.parent.glob(f"{glob.escape(destination.name)}.tmp-*"):
        match = TEMPORARY.fullmatch(path.name[len(destination.name) :])
        if match and match["host"] == socket.gethostname() and not Path(f"/proc/{match['pid']}").exists():
            shutil.rmtree(path, ignore_errors=True)


TEMPORARY = re.compile(r"\.tmp-(?P<host>.+)-(?P<pid>\d+)-[0-9a-f]{8}")


@contextlib.contextmanager
def _new_directory(destination: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes ``destination`` when the block ends without an error (and is deleted else)."""
    name = f"{destination.name}.tmp-{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
    work = destination.with_name(name)
    with removed_on_error(work), naming_full_disk(work):
        work.mkdir(parents=True)
        yield work
        if overwrite:
            commit_directory(work, destination, MODEL)
            return
        fsync_tree(work)
        try:
            os.replace(work, destination)  # an empty directory may be there, and nothing else
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise _not_empty(destination) from None
            raise
        fsync_directory(destination.parent)


def source_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts of the source for the report: no paths, so that a rerun elsewhere gives the same bytes."""
    manifest = checkpoint.path / MANIFEST
    return {
        **checkpoint.summary(),
        "name": checkpoint.path.name,
        "manifest_sha256": sha256_file(manifest) if manifest.is_file() else None,
    }


def make_plan(checkpoint: Checkpoint, dtype: str, base_model: Path | None) -> Plan:
    """Bring the source's tensors to transformers' in-memory names and prove that they are the model, all of it."""
    directory = find_base_model(checkpoint, base_model)
    companions(directory)  # refuses links that leave it
    checkpoint.family = checkpoint.family or family_of(directory)
    layout = read_layout(directory)
    notes = list(checkpoint.notes)
    tensors = {name: source for name, source in checkpoint.tensors.items() if name not in layout.tied}
    ignored = sorted(name for name in tensors if checkpoint.kind == "huggingface" and layout.ignores(name))
    if ignored:
        tensors = {name: source for name, source in tensors.items() if name not in ignored}
        notes.append(f"transformers does not load {len(ignored)} of the tensors, left out: {ignored[0]}, …")
    if checkpoint.kind == "huggingface":
        fused, problems = disk_to_fused(layout, tensors)
    if checkpoint.kind != "huggingface" or (problems and fused):  # an engine's names
        fused = engine_to_fused(layout, tensors)
        problems = missing_and_unexpected(layout.fused, fused)
    absent = {name for name in layout.fused if name not in fused}
    if absent and checkpoint.lacks_frozen and fused.keys() <= layout.fused.keys():
        note = "the checkpoint holds no frozen parameters: "
        note += f"{len(absent)} tensors are the base model's, the first: {min(absent)}"
        fused = _from_base(checkpoint, layout, directory, absent, note) | fused
        problems = missing_and_unexpected(layout.fused, fused)
        notes.append(note)
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(
            f"the checkpoint is not of this model: {problems[0]}{more}",
            str(checkpoint.path),
            f"give the model that was trained with --base-model (this was {directory})",
        )
    if dtype == "same":
        dtype = checkpoint.dtype or "same"
    return Plan(checkpoint, layout, fused, dtype, directory, notes)


def _from_base(
    checkpoint: Checkpoint, layout: ModelLayout, base: Path, names: set[str], note: str
) -> dict[str, TensorSource]:
    """The tensors ``names``, which the checkpoint does not hold, as they are in the model that the job started from.

    Raises:
        UserError: that model's weights are not at ``base``.
    """
    fix = "give the model that was trained, with its weights, with --base-model"
    try:
        tensors = open_model(base, layout)
        fingerprint = model_fingerprint(base) if checkpoint.base is not None else None
    except UserError as error:
        raise UserError(f"{note}. That model cannot be read ({error.problem})", str(base), fix) from None
    if fingerprint != checkpoint.base:
        raise UserError(f"{note}. This is another model than the job started from", str(base), fix)
    return {name: tensors[name] for name in names}


def find_base_model(checkpoint: Checkpoint, base_model: Path | None) -> Path:
    """The directory with the model's configuration: given, the source itself, or the one that the manifest names."""
    recorded: str = ((checkpoint.manifest or {}).get("model") or {}).get("path") or ""
    if base_model is None and not recorded:
        for folder in (checkpoint.path, checkpoint.path.parent):  # Trainer saves into a folder below the model
            if (folder / "config.json").is_file():
                return folder
        problem = "a DeepSpeed checkpoint does not say which model it is of"
        raise UserError(problem, str(checkpoint.path), "give the model that was trained with --base-model")
    if base_model is None and (checkpoint.path / "config.json").is_file():
        return checkpoint.path
    model = base_model or Path(recorded)
    if (model / "config.json").is_file():
        return model
    refuse_other_kinds(model)
    problem = "there is no config.json here, so this is not the model that was trained"
    fix = "give the directory of the model that was trained with --base-model"
    if base_model is None and (name := snapshot_name(model)):
        problem = f"the model that was trained, {name}, is no longer in this cache of the hub"
        fix = f"run `hf download {name.id} --revision {name.revision}` and name its folder with --base-model"
    raise UserError(problem, str(model), fix)


def parse_size(text: str, where: str = "max_shard_size") -> int:
    """Bytes of "5GB", "500 MiB" or "1000000"; decimal units as on the hub."""
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*([A-Za-z]*)\s*", text)
    size = int(float(match[1]) * UNITS.get(match[2].upper(), 0)) if match else 0
    if not size:
        raise UserError(f"{text!r} is not a size", where, "write it like 5GB or 500MB")
    return size


def create_shards(
    tensors: Mapping[str, TensorSource], dtypes: Mapping[str, torch.dtype], max_shard_bytes: int, directory: Path
) -> list[CopyTask]:
    """Make the shards at their full length (sparse) with their headers, and the index if there are several; returned is
    what is still to be written into them, in the order of the files."""
    shards: list[list[CopyTask]] = [[]]
    filled = 0
    for name, source in tensors.items():
        task = CopyTask(source, dtypes[name], directory, 0)
        if shards[-1] and filled + task.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(task)
        filled += task.nbytes
    tasks: list[CopyTask] = []
    for number, shard in enumerate(shards, 1):
        file = SINGLE_NAME if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        shard.sort(key=lambda task: -task.dtype.itemsize)  # as the safetensors library: every tensor is aligned
        ends = list(itertools.accumulate(task.nbytes for task in shard))
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        for task, end in zip(shard, ends, strict=True):
            entry = {"dtype": DTYPE_NAMES[task.dtype], "shape": list(task.source.shape)}
            entries[task.source.name] = {**entry, "data_offsets": [end - task.nbytes, end]}
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        # as the safetensors library does: the data begin at a multiple of 8 bytes
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        for task, end in zip(shard, ends, strict=True):
            tasks.append(replace(task, path=directory / file, offset_bytes=start + end - task.nbytes))
        with naming_full_disk(directory / file), (directory / file).open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text)
            handle.truncate(start + ends[-1])
    if len(shards) > 1:
        numel = sum(task.source.numel for task in tasks)
        metadata = {"total_size": sum(task.nbytes for task in tasks), "total_parameters": numel}
        weight_map = {task.source.name: task.path.name for task in sorted(tasks, key=lambda task: task.source.name)}
        write_json(directory / INDEX_NAME, {"metadata": metadata, "weight_map": weight_map})
    return tasks


def verify_huggingface(directory: Path) -> None:
    """Compare the weights of a written model with the report beside it, every byte.

    Raises:
        UserError: names the file that is missing or was altered, or the report where it is damaged.
    """
    report = read_json_object(directory / REPORT, "the report of the conversion")
    try:
        files = file_entries(report.get("files"))
    except ValueError as error:
        raise UserError(f"the report is damaged ({error})", str(directory / REPORT), "convert again") from None
    require_files(directory, files, "convert again; check the disk if it happens twice", hashes=True)
    if strange := sorted({path.name for path in directory.glob("*.safetensors")} - files.keys()):
        raise UserError("the file is not in the report of the conversion", str(directory / strange[0]), "convert again")


def verify_archives(directory: Path) -> tuple[int, int]:
    """Open a DeepSpeed folder and compare all of its files with their own checksums: bytes with and without one.

    Raises:
        UserError: it is not whole, or a file was altered after it was written.
    """
    files = [path for path in sorted(open_source(directory).path.rglob("*.pt")) if path.is_file()]
    counted = [check_checksums(path) for path in files]
    return sum(summed for summed, _ in counted), sum(bare for _, bare in counted)


def verify_source(checkpoint: Checkpoint) -> None:
    """Compare all of the source's files with its manifest, a conversion's report, or their own checksums."""
    require_files(checkpoint.path, (checkpoint.manifest or {}).get("files", {}), ANOTHER, hashes=True)
    if checkpoint.kind == "huggingface":
        if (checkpoint.path / REPORT).is_file():
            verify_huggingface(checkpoint.path)
    elif checkpoint.manifest is None:
        verify_archives(checkpoint.path)
