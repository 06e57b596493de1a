"""Recognise a checkpoint or a model on disk and open it; only metadata is read.

:func:`open_source` takes a DeepSpeed checkpoint of ZeRO stage 3, 2, 1 or 0 with or without AutoEP, or a
Hugging Face directory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import MANIFEST, require_files
from trace_ds.run.foreign import file_entries, named_by, read_object
from trace_ds.tensors.checkpoint import MODEL_FILE, RANK_FILE, Checkpoint
from trace_ds.tensors.deepspeed_source import open_deepspeed
from trace_ds.tensors.layouts import ModelLayout, disk_to_fused
from trace_ds.tensors.model_files import COPY_AGAIN, read_model_directory, refuse_other_kinds
from trace_ds.tensors.runs import Run, TensorSource
from trace_ds.tensors.torch_archive import COPY_CHECKPOINT, DTYPES, Storage

REPORT = "conversion.json"
ANOTHER = "convert another step"


def locate(path: Path, tag: str | None) -> Path:
    """The directory that holds the files: ``path``, ``path/tag``, or the step that ``path/latest`` names."""
    if not path.is_dir():
        raise UserError("there is no such directory", str(path), "give the directory of a checkpoint or model")
    refuse_other_kinds(path)
    roots = [path, path / "checkpoints"]
    tags = sorted(
        entry.name for root in roots if root.is_dir() for entry in root.iterdir()
        if entry.is_dir() and _holds_checkpoint(entry)
    )  # fmt: skip
    if tag is not None:
        if path.name == tag and _holds_checkpoint(path):
            return locate(path, None)
        for root in roots:
            if (root / tag).is_dir():
                return locate(root / tag, None)  # a folder of transformers' Trainer has its own `latest`
        raise UserError(f"there is no checkpoint {tag!r} here", str(path), f"use one of {tags}")
    named = [step for root in roots if (step := named_by(root, "latest"))]
    if named and named[0].parent == path and _holds_deepspeed(named[0]):
        return named[0]  # before config.json: transformers' Trainer puts its checkpoints into the folder of a model
    if _holds_checkpoint(path):
        return path
    if named:
        return named[0]
    raise UserError(
        "neither a DeepSpeed checkpoint nor a Hugging Face model (no *_model_states.pt, no config.json, no latest that "
        "names a step)",
        str(path),
        f"give the step's directory, or --tag {tags}",
    )


def _holds_checkpoint(path: Path) -> bool:
    return (path / "config.json").is_file() or (path / "zero").is_dir() or _holds_deepspeed(path)


def _holds_deepspeed(path: Path) -> bool:
    return any(RANK_FILE.match(name.name) or MODEL_FILE.match(name.name) for name in path.iterdir())


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The checkpoint's ``manifest.json`` with every file's size compared; None when it has none."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        return None
    manifest = read_object(manifest_path, "the manifest", ANOTHER)
    try:
        files = file_entries(manifest.get("files"))
        if not isinstance((manifest.get("model") or {}).get("path", ""), str):
            raise ValueError("the model's path is no text")
    except (ValueError, AttributeError) as error:
        raise UserError(f"the manifest is damaged ({error})", str(manifest_path), ANOTHER) from None
    require_files(path, files, ANOTHER, hashes=False)
    return manifest


def open_source(path: Path, tag: str | None = None) -> Checkpoint:
    """Recognise and open a source.

    Raises:
        UserError: it is none of the known kinds, or a file of it is missing, truncated, damaged or inconsistent.
    """
    directory = locate(path, tag)
    manifest = _read_manifest(directory)
    if (directory / "config.json").is_file() and not any(directory.glob("*_model_states.pt")):
        checkpoint = open_huggingface(directory)
    elif (directory / "zero").is_dir():
        problem = "a DeepSpeed universal folder, which is for DeepSpeed's own loading"
        raise UserError(problem, str(directory), "convert the checkpoint that it was made from")
    else:
        checkpoint = open_deepspeed(directory)
    checkpoint.manifest = manifest
    facts = manifest or {}
    families = (facts.get("family"), family_of(directory))
    checkpoint.family = next((family for family in families if isinstance(family, str) and family), None)
    if checkpoint.kind != "huggingface":
        checkpoint.base = (facts.get("model") or {}).get("fingerprint")
    for key in ("step", "world", "ep"):
        if None not in (pair := (facts.get(key), getattr(checkpoint, key))) and pair[0] != pair[1]:
            problem = f"the manifest says {key} {pair[0]}, the files say {pair[1]}: they are of different checkpoints"
            raise UserError(problem, str(directory / MANIFEST), COPY_CHECKPOINT)
    return checkpoint


def open_huggingface(directory: Path) -> Checkpoint:
    """Every tensor of a model directory under its name on disk (its header and index are checked, nothing is read)."""
    files = read_model_directory(directory)
    tensors: dict[str, TensorSource] = {}
    paths = {file: directory / file for file in files.files}  # fewer than there are tensors
    for name, entry in files.tensors.items():
        path = paths[entry.file]
        if entry.dtype not in DTYPES:
            problem = f"{name} is stored as {entry.dtype}, which cannot be converted"
            raise UserError(problem, str(path), "use a model in bf16, fp16 or fp32")
        storage = Storage(path, name, entry.begin, entry.elements, DTYPES[entry.dtype])
        tensors[name] = TensorSource(name, tuple(entry.shape), storage.dtype, (Run(storage, 0, entry.elements),))
    return Checkpoint(directory, "huggingface", tensors, files=list(files.files))


def open_model(directory: Path, layout: ModelLayout) -> dict[str, TensorSource]:
    """The tensors of a model directory by their names in memory, from either layout; its files may hold tensors that
    transformers ignores.

    Raises:
        UserError: the directory is not whole; a tensor is missing, has another shape, or is not part of the model.
    """
    tensors = {
        name: source
        for name, source in open_huggingface(directory).tensors.items()
        if name not in layout.tied and not layout.ignores(name)
    }
    fused, problems = disk_to_fused(layout, tensors)
    if problems:
        problem = f"{len(problems)} tensors do not fit the model, the first: {problems[0]}"
        raise UserError(problem, str(directory), COPY_AGAIN)
    return fused


def family_of(directory: Path) -> str | None:
    """``model_type`` of a Hugging Face directory's configuration."""
    try:
        family = read_object(directory / "config.json", "", "").get("model_type")
    except UserError:  # what it says is only shown
        return None
    return family if isinstance(family, str) else None
