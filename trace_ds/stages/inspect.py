"""``trace-ds inspect PATH``: what is this, and is it whole?

Knows artefacts, run directories, checkpoint steps and the folder of them, Hugging Face model directories, DeepSpeed's
own checkpoint folders (or the folder whose ``latest`` names one), and single safetensors files. Only headers and
descriptions are read; with ``--verify`` everything, compared with the manifest, the report of the conversion, or the
files' own checksums. Nothing is written.

Exit status 0 when it is whole, 1 when something is missing, damaged or stale, 2 when the path is none of these.
"""

from __future__ import annotations

import contextlib
import json as json_module
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.checkpoints.manifest import MANIFEST, STEP, read_manifest
from trace_ds.checkpoints.manifest import verify as verify_files
from trace_ds.errors import UserError
from trace_ds.reporting import shapes
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import pointed
from trace_ds.tensors.model_files import (
    CONFIG_NAME,
    INDEX_NAME,
    ModelFiles,
    read_json_object,
    read_model_directory,
    read_safetensors_header,
)
from trace_ds.tensors.model_kinds import refuse_other_kinds
from trace_ds.tensors.opening import REPORT, locate, open_source
from trace_ds.terminal import size, wide_console

EXIT_DAMAGED = 1
SIDES = ("forget", "retain")
SUPPORTED = "an artefact, a run directory, checkpoints, a model directory or a safetensors file"


@dataclass(frozen=True)
class Finding:
    """What a path is.

    Attributes:
        kind: artefact, checkpoint, checkpoints, run, model, deepspeed or safetensors.
        facts: what it holds, by name, in the order shown.
        problems: one line for everything missing, damaged or stale; empty: it is whole.
        compared: what that is known from.
        parts: run directories and checkpoint folders: what they are made of (name, state, detail).
    """

    path: Path
    kind: str
    facts: dict[str, Any]
    problems: list[str] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)
    compared: str = ""


def inspect(path: Path, *, verify: bool = False) -> Finding:
    """Find out what ``path`` is; ``verify`` also compares hashes.

    Raises:
        UserError: nothing is there, or it is nothing we know.
    """
    if not path.exists():
        raise UserError("there is nothing here", str(path), f"give the path of {SUPPORTED}")
    if path.is_file():
        if path.name in (artefact.FILE_NAME, MANIFEST, CONFIG_NAME, INDEX_NAME):
            return inspect(path.parent, verify=verify)
        if path.suffix == ".safetensors":
            return _safetensors(path)
    elif (path / artefact.FILE_NAME).is_file():
        return _artefact(path, verify)
    elif (path / MANIFEST).is_file() or _is_unfinished_step(path):
        return _checkpoint(path, verify)
    elif _is_checkpoints(path):
        return _checkpoints(path, verify)
    elif _is_run(path):
        return _run(path, verify)
    elif (place := _located(path)) is not None:
        return _source(place, verify)
    refuse_other_kinds(path)
    raise UserError("this is nothing trace_ds makes or reads", str(path), f"give the path of {SUPPORTED}")


def _is_unfinished_step(path: Path) -> bool:
    name = re.split(r"\.(?:tmp|unreadable)-", path.name)[0]
    return STEP.fullmatch(name) is not None and not (path / CONFIG_NAME).is_file()


def _is_checkpoints(path: Path) -> bool:
    """A folder of our steps."""
    return not (path / CONFIG_NAME).is_file() and any(
        STEP.fullmatch(child.name) and child.is_dir() and not (child / CONFIG_NAME).is_file()
        for child in path.iterdir()
    )


def _is_run(path: Path) -> bool:
    run = RunDirectory(path)
    has_any = run.config.is_file() or any(part.is_dir() for part in (run.data, run.statistics, run.calibration))
    return has_any and not (path / CONFIG_NAME).is_file()  # a model may lie beside anything


def _located(path: Path) -> Path | None:
    """The folder of a model or of DeepSpeed's files: this one, or the one that it points to."""
    with contextlib.suppress(UserError):
        return locate(path, None)
    return None


def _artefact(path: Path, verify: bool, kind: str = "") -> Finding:
    """An artefact (of a ``kind``, or of any): its description, and whether every file is there with its size (and
    hash)."""
    try:
        if not kind:
            raw = read_json_object(path / artefact.FILE_NAME, "the description of the artefact")
            kind = str(raw.get("kind", "unknown"))
        found = artefact.load(path, kind, verify=verify)
        if kind == "calibration":
            shapes.read_diagnosis(found)
        elif kind == "statistics":
            shapes.read_layers(found)
    except UserError as error:
        return Finding(path, "artefact", {"artefact": kind or "unknown"}, [error.line()])
    facts = {key: getattr(found, key) for key in ("identity", "content", "inputs", "settings", "summary")}
    return Finding(path, "artefact", {"artefact": kind, **facts, **_sizes(found.files)}, compared=_of_files(verify))


def _of_files(verify: bool) -> str:
    """What is compared where a description lists files."""
    return "sizes and SHA-256 of all files" if verify else "sizes; --verify compares SHA-256 too"


def _sizes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """How many files a description lists, and their bytes."""
    return {"files": len(files), "bytes": sum(int(entry["bytes"]) for entry in files.values())}


def _checkpoint(path: Path, verify: bool) -> Finding:
    """One step of a training job: its manifest, compared with the files."""
    from trace_ds.tensors.torch_archive import read_archive

    try:
        manifest = read_manifest(path)
    except UserError as error:
        files = [file for file in path.rglob("*") if file.is_file()]
        return Finding(path, "checkpoint", {"files": len(files), "bytes": _bytes_of(files)}, [error.line()])
    told = ("step", "world", "ep", "zero_stage", "family", "dtype", "job", "model", "calibration", "versions")
    facts: dict[str, Any] = {key: getattr(manifest, key) for key in told}
    if manifest.layers is not None:
        facts["layers"] = f"the first {manifest.layers}, without norm and LM head; the rest is the base model's"
    facts["cursor"] = {key: value for key, value in manifest.cursor.items() if not isinstance(value, list)}  # no theta
    facts |= _sizes(manifest.files)
    shards = sorted(name for name in manifest.files if name.endswith(".pt"))
    try:
        verify_files(path, manifest, hashes=verify)
        for name in shards if verify else [*shards[:1], *shards[-1:]]:  # a file of each kind
            read_archive(path / name)
    except UserError as error:
        return Finding(path, "checkpoint", facts, [error.line()])
    return Finding(path, "checkpoint", facts, compared=_of_files(verify))


def _checkpoints(path: Path, verify: bool) -> Finding:
    """``RUN/checkpoints``: every step, and what ``latest`` points at."""
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    steps = [child for child in folders if (child / MANIFEST).is_file() or _is_unfinished_step(child)]
    parts, problems, complete = [], [], []
    for step in steps:
        found = _checkpoint(step, verify)
        complete += [] if found.problems or STEP.fullmatch(step.name) is None else [step.name]
        part = _part(step.name, found, _tally(found), "complete")
        if ".tmp-" in step.name:
            part["state"] = "left by a killed job"
        elif ".unreadable-" in step.name:
            part["state"] = "set aside"
        parts.append(part)
        problems += found.problems if part["state"] == "damaged" else []
    latest = path / "latest"
    named = pointed(latest) if latest.is_file() else None
    if named not in complete:
        problems.append(f"{latest}: names {named!r}, which is not a complete checkpoint")
    facts = {"latest": named, "complete": complete}
    return Finding(path, "checkpoints", facts, problems, parts, _of_files(verify))


def _model(path: Path, verify: bool) -> Finding:
    """A Hugging Face model directory, from its configuration and the safetensors headers."""
    try:
        files = read_model_directory(path)
    except UserError as error:
        return Finding(path, "model", {}, [error.line()])
    facts = {
        "family": files.model_type,
        "layout": layout_of(files),
        "tensors": len(files.tensors),
        "parameters": files.parameters - _tied_twice(files),
        "types": files.dtypes,
        "files": len(files.files),
        "bytes": files.bytes,
    }
    problems: list[str] = []
    compared = "headers, index and sizes; it comes with no hashes"
    if (path / REPORT).is_file():
        compared = "headers, index, " + _of_files(verify).replace("all files", "the files of weights")
        try:
            facts["converted from"] = _converted(path, verify)
        except UserError as error:
            problems.append(error.line())
    return Finding(path, "model", facts, problems, compared=compared)


def _converted(path: Path, verify: bool) -> str:
    """Where a model's weights came from, by the report of the conversion; ``verify`` compares every file's hash."""
    from trace_ds.tensors.checkpoint import origin

    report = read_json_object(path / REPORT, "the report of the conversion")
    if verify:
        from trace_ds.conversion.convert import verify_huggingface

        verify_huggingface(path)
    source = report.get("source")
    return origin(source) if isinstance(source, dict) else "not said"


def _tied_twice(files: ModelFiles) -> int:
    """Parameters of the head where it is the embedding and the files hold it all the same."""
    head, embedding = (files.tensors.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    tied = files.config.get("tie_word_embeddings") is True and head is not None and embedding is not None
    return head.elements if tied and head and embedding and head.shape == embedding.shape else 0


def layout_of(files: ModelFiles) -> str:
    """How the experts are stored: ``hub`` (a tensor per expert), ``fused`` (one tensor for all), or ``dense``."""
    names = files.tensors
    if any(re.search(r"\.experts\.\d+\.", name) for name in names):
        return "hub"
    if any(name.endswith((".experts.gate_up_proj", ".experts.down_proj")) for name in names):
        return "fused"
    return "dense"


def _source(path: Path, verify: bool) -> Finding:
    """A model, or a folder of DeepSpeed's or of the conversion, whose files themselves say what belongs to it."""
    from trace_ds.conversion.convert import verify_archives

    if (path / MANIFEST).is_file():
        return _checkpoint(path, verify)
    if (path / CONFIG_NAME).is_file():
        return _model(path, verify)
    total = _bytes_of(file for file in path.rglob("*.pt") if file.is_file())
    try:
        facts = open_source(path).summary()
        compared = "descriptions and sizes; --verify compares the files' own CRC-32 too"
        if verify:
            checked, bare = verify_archives(path)
            compared = f"CRC-32 of {size(checked)}" + (f"; {size(bare)} come without one" if bare else "")
    except UserError as error:
        return Finding(path, "deepspeed", {"bytes": total}, [error.line()])
    facts |= {"format": facts["kind"], "kind": None, "bytes": total}
    return Finding(path, "deepspeed", facts, compared=compared)


def _safetensors(path: Path) -> Finding:
    try:
        entries = read_safetensors_header(path)
    except UserError as error:
        return Finding(path, "safetensors", {}, [error.line()])
    facts = {
        "tensors": {name: f"{entry.dtype} {list(entry.shape)}" for name, entry in sorted(entries.items())},
        "bytes": path.stat().st_size,
    }
    return Finding(path, "safetensors", facts, compared="header and size; the file comes with no hashes")


def _part(name: str, found: Finding | None, detail: str, good: str = "done") -> dict[str, str]:
    """What there is to say of a part; ``found``: None where it is not there."""
    if found is None:
        return {"name": name, "state": "missing", "detail": ""}
    if found.problems:
        return {"name": name, "state": "damaged", "detail": found.problems[0]}
    return {"name": name, "state": good, "detail": detail}


def _tally(found: Finding | None) -> str:
    return "" if found is None or found.problems else f"{found.facts['files']} files, {size(found.facts['bytes'])}"


def _run(path: Path, verify: bool) -> Finding:
    """A run directory, stage by stage: done, missing, damaged, or stale (made from other inputs than are there now)."""
    run = RunDirectory.at(path)
    data, sides = {"data": "data"}, {side: f"statistics/{side}" for side in SIDES}
    places = {"data": run.data, **{name: run.statistics / side for side, name in sides.items()}}
    made_from: dict[str, dict[str, str]] = {
        "data": {},
        **dict.fromkeys(sides.values(), data),
        "calibration": data | sides,
    }
    parts: list[dict[str, str]] = []
    content: dict[str, str | None] = {}
    for name, place in (places | {"calibration": run.calibration}).items():
        found = _artefact(place, verify, name.split("/")[0]) if place.exists() else None
        facts = {} if found is None else found.facts
        content[name] = facts.get("content")
        parts.append(_part(name, found, _tally(found)))
        made_of = facts.get("inputs", {})
        if stale := [key for key, of in made_from[name].items() if made_of.get(key, content[of]) != content[of]]:
            parts[-1] |= {"state": "stale", "detail": f"made from another {' and '.join(stale)}"}
    parts += [_run_checkpoints(run, content["calibration"], verify), _model_part("model", run.model, verify)]
    of_run: list[tuple[str, Path, Callable[[Path], Any]]] = [
        ("configuration", run.config, shapes.read_config),
        ("curve", run.path / "curve.json", lambda file: shapes.read_points(file.parent)),
    ]
    read = [_read_part(name, [file], reader) for name, file, reader in of_run if file.exists()]
    parts += [part for part in read if part["state"] == "damaged"]
    parts.append(_read_part("evaluation", sorted(run.evaluation.glob("*.json")), shapes.read_result))
    written = (run.report / "index.html").is_file()
    parts.append({"name": "report", "state": "done" if written else "missing", "detail": ""})
    parts += [_model_part(f"finetune/{made.path.name}", made.model, verify) for made in run.finetuned_here()]
    for variant in sorted(run.variants.iterdir()) if run.variants.is_dir() else []:
        if variant.is_dir():
            found_parts = _run(variant, verify).parts
            states = {part["name"]: part["state"] for part in found_parts}
            detail = ", ".join(f"{name} {states[name]}" for name in ("calibration", "checkpoints", "model"))
            detail = next((part["detail"] for part in found_parts if part["state"] == "damaged"), detail)
            worst = next((state for state in ("damaged", "stale") if state in states.values()), states["model"])
            parts.append({"name": f"variants/{variant.name}", "state": worst, "detail": detail})
    problems = [f"{part['name']}: {part['detail']}" for part in parts if part["state"] in ("damaged", "stale")]
    facts_of_run = {"variant of": str(run.parent) if run.parent else None}
    return Finding(
        path, "run", facts_of_run, problems, parts, _of_files(verify).replace("all files", "all parts' files")
    )


def _read_part(name: str, files: list[Path], reader: Callable[[Path], Any]) -> dict[str, str]:
    """Files that a report reads: damaged where it would refuse one."""
    try:
        for file in files:
            reader(file)
    except UserError as error:
        return {"name": name, "state": "damaged", "detail": error.line()}
    detail = ", ".join(file.stem for file in files)
    return {"name": name, "state": "done" if files else "missing", "detail": detail}


def _model_part(name: str, path: Path, verify: bool) -> dict[str, str]:
    found = _model(path, verify) if path.is_dir() else None
    detail = f"{found.facts['family']}, {size(found.facts['bytes'])}" if found and found.facts else ""
    return _part(name, found, detail + (", comes with no hashes" if found and "no hashes" in found.compared else ""))


def _run_checkpoints(run: RunDirectory, calibration: str | None, verify: bool) -> dict[str, str]:
    there = any(run.checkpoints.glob("step_*"))
    found = _checkpoints(run.checkpoints, verify) if there else None
    if found is None or found.problems:
        return _part("checkpoints", found, "")
    newest = found.facts["complete"][-1]
    try:
        shapes.read_points(run.path)
    except UserError as error:
        return {"name": "checkpoints", "state": "damaged", "detail": error.line()}
    if read_manifest(run.checkpoints / newest).calibration != calibration:
        return _part("checkpoints", found, "trained with another calibration", "stale")
    return _part("checkpoints", found, f"newest {newest}")


def inspect_path(path: Path, json: bool, verify: bool = False) -> int:
    """Print what ``path`` is; exit status 0 when whole, 1 otherwise."""
    found = inspect(path, verify=verify)
    if json:
        value = {**asdict(found), "path": str(found.path), "whole": not found.problems}
        print(json_module.dumps(value, indent=1, ensure_ascii=False))
    else:
        _print(found)
    return EXIT_DAMAGED if found.problems else 0


def _print(found: Finding) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True, markup=False)
    console.print(f"{found.path}: {found.kind}")
    for name, value in found.facts.items():
        if name == "tensors" and isinstance(value, dict):
            for tensor, shape in value.items():
                console.print(f"  {tensor}: {shape}")
        elif value is not None:
            console.print(f"  {name}: {_shown(name, value)}")
    if found.parts:
        table = Table(show_edge=False)
        for column in ("part", "state", ""):
            table.add_column(column, overflow="fold")
        for part in found.parts:
            table.add_row(part["name"], part["state"], part["detail"])
        wide_console().print(table)
    for problem in found.problems:
        console.print(f"PROBLEM  {problem}", style="bold red")
    if not found.problems:
        console.print(f"whole (compared: {found.compared})")


def _shown(name: str, value: Any) -> str:
    if name == "bytes":
        return size(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json_module.dumps(value, ensure_ascii=False)


def _bytes_of(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)
