"""``trace-ds inspect PATH``: what a path is, and whether it is whole.

Knows artefacts, run directories, checkpoint steps and the folder of them, model directories, and DeepSpeed's own
checkpoints (or the folder whose ``latest`` names one). Only headers and descriptions are read; with ``--verify``
everything, compared with the manifest, the conversion's report, or the files' own checksums. Nothing is written.

Exit status 0 when it is whole, 1 when something is missing, damaged or stale, 2 when the path is none of these.
"""

from __future__ import annotations

import json as json_module
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trace_ds.checkpoints.manifest import LATEST, MANIFEST, STEP, read_manifest
from trace_ds.checkpoints.manifest import verify as verify_files
from trace_ds.errors import UserError
from trace_ds.reporting import shapes
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import pointed
from trace_ds.tensors.checkpoint import origin
from trace_ds.tensors.model_files import (
    CONFIG_NAME,
    ModelFiles,
    read_json_object,
    read_model_directory,
    refuse_other_kinds,
)
from trace_ds.tensors.opening import REPORT, locate, open_source
from trace_ds.tensors.torch_archive import read_archive
from trace_ds.terminal import size

EXIT_DAMAGED = 1
_SIDES = ("forget", "retain")
SUPPORTED = "an artefact, a run directory, checkpoints or a model directory"


@dataclass(frozen=True)
class Inspection:
    """What was found at a path.

    Attributes:
        kind: artefact, checkpoint, checkpoints, run, model or deepspeed.
        facts: its contents by name, in the order shown; of a run and a folder of checkpoints, the state of each part.
        problems: one line for everything missing, damaged or stale; empty: it is whole.
        compared: what was compared to know that.
    """

    path: Path
    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    compared: str = ""


def inspect_path(path: Path, json: bool, verify: bool = False) -> int:
    """Print what ``path`` is; exit status 0 when whole, 1 otherwise."""
    result = inspect(path, verify=verify)
    if json:
        value = {**asdict(result), "path": str(path), "whole": not result.problems}
        print(json_module.dumps(value, indent=1, ensure_ascii=False))
        return EXIT_DAMAGED if result.problems else 0
    print(f"{path}: {result.kind}")
    for name, value in result.facts.items():
        text = size(value) if name == "bytes" else value
        print(f"  {name}: {text if isinstance(text, str) else json_module.dumps(text, ensure_ascii=False)}")
    for problem in result.problems:
        print(f"PROBLEM  {problem}")
    if not result.problems:
        print(f"whole (compared: {result.compared})")
    return EXIT_DAMAGED if result.problems else 0


def inspect(path: Path, *, verify: bool = False) -> Inspection:
    """Find out what ``path`` is; ``verify`` also compares hashes.

    Raises:
        UserError: nothing is there, or it is nothing we know.
    """
    if not path.exists():
        raise UserError("no such file or directory", str(path), f"give the path of {SUPPORTED}")
    if path.name in (artefact.FILE_NAME, MANIFEST, CONFIG_NAME) and path.is_file():
        path = path.parent
    kind, place, read = _recognise(path)
    try:
        return read(place, verify)
    except UserError as error:
        return Inspection(place, kind, problems=[error.line()])


def _recognise(path: Path) -> tuple[str, Path, Callable[[Path, bool], Inspection]]:
    """The kind of a path, the directory that it names, and what reads it."""
    has_model = (path / CONFIG_NAME).is_file()  # a model may lie beside anything
    if (path / artefact.FILE_NAME).is_file():
        return "artefact", path, _artefact
    if (path / MANIFEST).is_file() or (STEP.match(path.name) and not has_model):
        return "checkpoint", path, _checkpoint
    if path.is_dir() and not has_model:
        if any(STEP.fullmatch(child.name) and not (child / CONFIG_NAME).is_file() for child in path.iterdir()):
            return "checkpoints", path, _checkpoints
        run = RunDirectory(path)
        if run.is_marked() or run.config.is_file():
            return "run", path, _run
    try:
        path = locate(path, None)
    except UserError:
        refuse_other_kinds(path)
        raise UserError("trace_ds does not recognise this path", str(path), f"give the path of {SUPPORTED}") from None
    if (path / MANIFEST).is_file():
        return "checkpoint", path, _checkpoint
    return ("model", path, _model) if (path / CONFIG_NAME).is_file() else ("deepspeed", path, _deepspeed)


def _compared(verify: bool, files: str = "all files") -> str:
    return f"sizes and SHA-256 of {files}" if verify else "sizes; --verify compares SHA-256 too"


def _sizes(files: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    return {"files": len(files), "bytes": sum(int(entry["bytes"]) for entry in files.values())}


def _artefact(path: Path, verify: bool, kind: str = "") -> Inspection:
    """An artefact of a ``kind`` ("": of any)."""
    if not kind:
        description = read_json_object(path / artefact.FILE_NAME, "the description of the artefact")
        kind = str(description.get("kind", "unknown"))
    loaded = artefact.load_artefact(path, kind, verify=verify)
    if kind == "calibration":
        shapes.read_diagnosis(loaded)
    elif kind == "statistics":
        shapes.read_layers(loaded)
    facts = {key: getattr(loaded, key) for key in ("identity", "content", "inputs", "settings", "summary")}
    return Inspection(path, "artefact", {"artefact": kind, **facts, **_sizes(loaded.files)}, compared=_compared(verify))


def _checkpoint(path: Path, verify: bool) -> Inspection:
    """One step of a training job."""
    manifest = read_manifest(path)
    verify_files(path, manifest, hashes=verify)
    shards = sorted(name for name in manifest.files if name.endswith(".pt"))
    for name in shards if verify else [*shards[:1], *shards[-1:]]:  # a file of each kind
        read_archive(path / name)
    names = ("step", "world", "ep", "zero_stage", "family", "dtype", "job", "model", "calibration", "versions")
    facts: dict[str, Any] = {key: getattr(manifest, key) for key in names}
    if manifest.layers is not None:
        facts["layers"] = f"the first {manifest.layers}, without norm and LM head; the rest is the base model's"
    return Inspection(path, "checkpoint", facts | _sizes(manifest.files), compared=_compared(verify))


def _checkpoints(path: Path, verify: bool) -> Inspection:
    """``RUN/checkpoints``: the state of every step, and what ``latest`` names."""
    states, problems = {}, []
    for step in sorted(path.iterdir()):
        if not step.is_dir() or not STEP.match(step.name):
            continue
        if ".tmp-" in step.name:
            states[step.name] = "left by a killed job"
        elif ".unreadable-" in step.name:
            states[step.name] = "set aside"
        else:
            try:
                _checkpoint(step, verify)
                states[step.name] = "complete"
            except UserError as error:
                states[step.name] = "damaged"
                problems.append(error.line())
    latest = pointed(path / LATEST) if (path / LATEST).is_file() else ""
    if states.get(latest) != "complete":
        problems.append(f"{path / LATEST}: names {latest!r}, which is not a complete checkpoint")
    return Inspection(path, "checkpoints", {"latest": latest, **states}, problems, _compared(verify))


def _model(path: Path, verify: bool) -> Inspection:
    """A Hugging Face model directory."""
    files = read_model_directory(path)
    facts = {
        "family": files.model_type,
        "layout": layout_of(files),
        "tensors": len(files.tensors),
        "parameters": files.parameters,
        "types": files.dtypes,
        "files": len(files.files),
        "bytes": files.bytes,
    }
    if not (path / REPORT).is_file():
        return Inspection(path, "model", facts, compared="headers, index and sizes; it comes with no hashes")
    report = read_json_object(path / REPORT, "the report of the conversion")
    if verify:
        from trace_ds.conversion.convert import verify_huggingface

        verify_huggingface(path)
    source = report.get("source")
    facts["converted from"] = origin(source) if isinstance(source, dict) else "not recorded"
    return Inspection(path, "model", facts, compared="headers, index, " + _compared(verify, "the files of weights"))


def layout_of(files: ModelFiles) -> str:
    """How the experts are stored: ``hub`` (a tensor per expert), ``fused`` (one tensor for all), or ``dense``."""
    if any(re.search(r"\.experts\.\d+\.", name) for name in files.tensors):
        return "hub"
    fused = (".experts.gate_up_proj", ".experts.down_proj")
    return "fused" if any(name.endswith(fused) for name in files.tensors) else "dense"


def _deepspeed(path: Path, verify: bool) -> Inspection:
    """A checkpoint without our manifest, whose files themselves say what belongs to it."""
    from trace_ds.conversion.convert import verify_archives

    facts = open_source(path).summary()
    compared = "descriptions and sizes; --verify compares the files' own CRC-32 too"
    if verify:
        checked, bare = verify_archives(path)
        compared = f"CRC-32 of {size(checked)}" + (f"; {size(bare)} come without one" if bare else "")
    facts["format"] = facts.pop("kind")
    facts["bytes"] = sum(file.stat().st_size for file in path.rglob("*.pt") if file.is_file())
    return Inspection(path, "deepspeed", facts, compared=compared)


def _run(path: Path, verify: bool) -> Inspection:
    """A run directory, part by part: done, missing, damaged, or stale (made from other inputs than are there now)."""
    run = RunDirectory.at(path)
    states: dict[str, str] = {}
    problems: list[str] = []

    def add(name: str, is_there: bool, read: Callable[[], str]) -> None:
        """Record the state of one part, which ``read`` returns."""
        try:
            states[name] = read() if is_there else "missing"
        except UserError as error:
            states[name] = "damaged"
            problems.append(f"{name}: {error.line()}")
        if states[name].startswith("stale"):
            problems.append(f"{name}: {states[name]}")

    content: dict[str, str] = {}  # fingerprints of the artefacts that are there, by the names of later inputs

    def read_artefact(place: Path, kind: str, name: str) -> str:
        facts = _artefact(place, verify, kind).facts
        content[name] = facts["content"]
        inputs = facts["inputs"]
        # the inputs of data/ are corpora, which have the names of the statistics made from them
        names = () if kind == "data" else ("data", *_SIDES)
        stale = [key for key in names if key in inputs and inputs[key] != content.get(key)]
        return f"stale (made from another {' and '.join(stale)})" if stale else "done"

    places = {"data": run.data, **{f"statistics/{side}": run.statistics / side for side in _SIDES}}
    for name, place in (places | {"calibration": run.calibration}).items():
        kind, _, side = name.partition("/")
        add(name, place.exists(), lambda place=place, kind=kind, side=side: read_artefact(place, kind, side or kind))  # type: ignore[misc]

    def read_checkpoints() -> str:
        shapes.read_points(run.path)
        result = _checkpoints(run.checkpoints, verify)
        if result.problems:
            raise UserError(result.problems[0])
        latest = result.facts["latest"]
        is_current = read_manifest(run.checkpoints / latest).calibration == content.get("calibration")
        return f"done (newest {latest})" if is_current else "stale (trained with another calibration)"

    def read_model(place: Path) -> str:
        result = _model(place, verify)
        return f"done ({result.facts['family']}{', no hashes' if 'no hashes' in result.compared else ''})"

    add("checkpoints", any(run.checkpoints.glob("step_*")), read_checkpoints)
    add("model", run.model.is_dir(), lambda: read_model(run.model))
    for finetuned in run.finetuned_here():
        add(f"finetune/{finetuned.path.name}", finetuned.model.is_dir(), partial(read_model, finetuned.model))
    add("config.yaml", run.config.is_file(), lambda: "done" if shapes.read_config(run.config) else "missing")
    add("curve.json", run.curve.is_file(), lambda: "done" if shapes.read_points(run.path) else "missing")
    results = sorted(run.evaluation.glob("*.json"))
    add("evaluation", bool(results), lambda: f"done ({', '.join(_names(results))})")
    add("report", (run.report / "index.html").is_file(), lambda: "done")
    for variant in sorted(run.variants.iterdir()) if run.variants.is_dir() else ():
        if variant.is_dir():
            result, name = _run(variant, verify), f"variants/{variant.name}"
            problems += [f"{name} {problem}" for problem in result.problems]
            kinds = [str(state).partition(" (")[0] for state in result.facts.values()]
            worst = next((kind for kind in ("damaged", "stale") if kind in kinds), result.facts["model"])
            states[name] = worst
    facts = {"variant of": str(run.parent)} if run.parent else {}
    return Inspection(path, "run", facts | states, problems, _compared(verify, "all parts' files"))


def _names(results: list[Path]) -> list[str]:
    """The models that were scored; every result is read."""
    for path in results:
        shapes.read_result(path)
    return [path.stem for path in results]
