"""Convert a checkpoint: plan everything from metadata, refuse what does not fit, stream, prove, rename.

Memory does not depend on the model: blocks of a few megabytes for each job, plus the list of tensors. The fp32 master
weights of the optimizer are the source of truth; cast to the training type they are the engine's parameters bit for
bit, because DeepSpeed makes those by the same rounding after every step.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import re
import shutil
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trace_ds.conversion.card import card_of_conversion, companions, copy_companions
from trace_ds.conversion.safetensors_target import parse_size, place
from trace_ds.errors import UserError
from trace_ds.run.files import (
    commit_directory,
    fsync_directory,
    fsync_tree,
    removed_on_error,
    require_files,
    sha256_file,
    write_json,
    write_text,
)
from trace_ds.run.foreign import file_entries
from trace_ds.run.hub_names import snapshot_name
from trace_ds.run.ours import MANIFEST, MODEL, require_apart, require_directory
from trace_ds.tensors.checkpoint import Checkpoint
from trace_ds.tensors.dtypes import WORDS
from trace_ds.tensors.layouts import (
    ModelLayout,
    disk_to_fused,
    engine_to_fused,
    fused_to_hub,
    missing_and_unexpected,
    read_layout,
)
from trace_ds.tensors.model_files import model_fingerprint, read_json_object
from trace_ds.tensors.model_kinds import refuse_other_kinds
from trace_ds.tensors.opening import ANOTHER, REPORT, family_of, open_model, open_source
from trace_ds.tensors.runs import TensorSource
from trace_ds.tensors.stream import CopyTask, FileHasher, Progress, naming_full_disk, run_tasks
from trace_ds.tensors.torch_archive import check_checksums

FORMAT = 1
DTYPE_WORDS = {
    **{word: word for word in (*WORDS, "same")},
    **{str(dtype).removeprefix("torch."): word for word, dtype in WORDS.items()},
    "half": "fp16",
}


@dataclass(frozen=True)
class Plan:
    """What a conversion will do, decided from metadata alone."""

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
    """What is asked of a conversion.

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
    progress: Progress | None = None,
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
    asked = Options(**options)
    checkpoint, plan = check_conversion(source, destination, asked)
    if verify:
        verify_source(checkpoint)
    remove_abandoned(destination)
    with _new_directory(destination, asked.overwrite) as work:
        report = {"format": FORMAT, "source": source_facts(checkpoint), "max_shard_size": asked.max_shard_size}
        tasks = lay_out(plan, work, asked.max_shard_size)
        hasher = FileHasher()
        report |= run_tasks(tasks, work, asked.jobs, progress, hasher)
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


def check_conversion(source: Path, destination: Path, asked: Options) -> tuple[Checkpoint, Plan]:
    """Everything that can be found wrong before a weight is read; writes nothing.

    Errors are those of :func:`convert_checkpoint`.
    """
    dtype, jobs, base_model = asked.dtype, asked.jobs, asked.base_model
    if DTYPE_WORDS.get(dtype) is None:
        raise UserError(f"there is no type {dtype!r}", "--dtype", "use bf16, fp16, fp32 or same")
    if jobs < 1:
        raise UserError(f"jobs is {jobs}", "--jobs", "use 1 or more")
    parse_size(asked.max_shard_size)
    check_destination(destination, asked.overwrite)
    checkpoint = open_source(Path(source), asked.tag)
    read = {"SOURCE": checkpoint.path} | ({"--base-model": base_model} if base_model is not None else {})
    require_apart([destination], read)
    return checkpoint, make_plan(checkpoint, DTYPE_WORDS[dtype], base_model)


def preview(source: Path, destination: Path, *, verify: bool = False, **options: Any) -> dict[str, Any]:
    """What :func:`convert_checkpoint` would write, from metadata alone: source, parameters, bytes, notes.

    Arguments and errors are those of :func:`convert_checkpoint`; ``verify`` changes nothing here.
    """
    asked = Options(**options)
    checkpoint, plan = check_conversion(source, Path(os.path.realpath(destination)), asked)
    parameters = sum(source.numel for source in plan.fused.values())
    size = sum(source.numel * plan.dtype_of(name, source).itemsize for name, source in plan.fused.items())
    return {"source": source_facts(checkpoint), "notes": plan.notes, "parameters": parameters, "bytes": size}


def check_destination(destination: Path, overwrite: bool) -> None:
    """Refuse what the finished directory could not be renamed to."""
    if os.path.ismount(destination):
        raise UserError("the destination is a mount point", str(destination), "choose a new directory below it")
    if overwrite:
        require_directory(destination, MODEL)
    elif destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise _not_empty(destination)
    parent = destination.parent
    while not parent.exists():
        parent = parent.parent
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
    """What the report says of the source: no paths, so that a rerun elsewhere gives the same bytes."""
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
    absent, why = {name for name in layout.fused if name not in fused}, ""
    if checkpoint.decoder_layers is not None:
        absent = layout.above(checkpoint.decoder_layers)
        why = f"the checkpoint holds the first {checkpoint.decoder_layers} decoder layers"
    elif checkpoint.lacks_frozen and checkpoint.manifest is None and fused.keys() <= layout.fused.keys():
        why = "the checkpoint holds no frozen parameters (exclude_frozen_parameters)"
    if absent and why:
        fused = _from_base(checkpoint, layout, directory, absent, why) | fused
        problems = missing_and_unexpected(layout.fused, fused)
        notes.append(f"{why}: {len(absent)} tensors are the base model's, the first: {min(absent)}")
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
    checkpoint: Checkpoint, layout: ModelLayout, base: Path, names: set[str], why: str
) -> dict[str, TensorSource]:
    """The tensors ``names``, which the checkpoint does not hold, as they are in the model that the job started from.

    Raises:
        UserError: that model's weights are not at ``base``.
    """
    fix = "give the model that was trained, with its weights, with --base-model"
    what = f"{why}, so {len(names)} tensors are the base model's, the first: {min(names)}"
    try:
        tensors = open_model(base, layout)
        fingerprint = model_fingerprint(base) if checkpoint.base is not None else None
    except UserError as error:
        raise UserError(f"{what}. That model cannot be read ({error.what})", str(base), fix) from None
    if fingerprint != checkpoint.base:
        raise UserError(f"{what}. This is another model than the job started from", str(base), fix)
    return {name: tensors[name] for name in names}


def find_base_model(checkpoint: Checkpoint, base_model: Path | None) -> Path:
    """The directory with the model's configuration: given, the source itself, or what the manifest names."""
    candidate, name = base_model, None
    if candidate is None:
        recorded = ((checkpoint.manifest or {}).get("model") or {}).get("path")
        # Transformers' Trainer saves into a folder below the model.
        for place in [checkpoint.path] if recorded else [checkpoint.path, checkpoint.path.parent]:
            if (place / "config.json").is_file():
                return place
        if not recorded:
            raise UserError(
                "a DeepSpeed checkpoint does not say which model it is of",
                str(checkpoint.path),
                "give the model that was trained with --base-model",
            )
        candidate = Path(recorded)
        name = snapshot_name(candidate)
    if (candidate / "config.json").is_file():
        return candidate
    refuse_other_kinds(candidate)
    what = "there is no config.json here, so this is not the model that was trained"
    fix = "give the directory of the model that was trained with --base-model"
    if name:
        what = f"the model that was trained, {name}, is no longer in this cache of the hub"
        again = f"hf download {name.id} --revision {name.revision}"
        fix = f"bring it back (`{again}`) and name its folder with --base-model"
    raise UserError(what, str(candidate), fix)


def lay_out(plan: Plan, work: Path, max_shard_size: str) -> list[CopyTask]:
    """A model directory that is complete but for its weights, which are the tasks, its model card and its report."""
    tensors = fused_to_hub(plan.layout, plan.fused)
    dtypes = {name: plan.dtype_of(name, source) for name, source in tensors.items()}
    tasks = place(tensors, dtypes, parse_size(max_shard_size), work)
    copy_companions(plan.base_model, work, plan.dtype)
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
    """Compare all of the source's files with its manifest, their own checksums, or what a conversion wrote with its
    report."""
    require_files(checkpoint.path, (checkpoint.manifest or {}).get("files", {}), ANOTHER, hashes=True)
    if checkpoint.kind == "huggingface":
        if (checkpoint.path / REPORT).is_file():
            verify_huggingface(checkpoint.path)
    elif checkpoint.manifest is None:
        verify_archives(checkpoint.path)
