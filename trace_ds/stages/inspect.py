"""``trace-ds inspect PATH``: what a path is, and whether it is whole.

Knows artefacts, run directories, checkpoint steps and the folder of them, model directories, and DeepSpeed's own
checkpoints. Only headers and descriptions are read; with ``--verify`` everything, compared with the manifest, the
conversion's report, or the files' own checksums. Nothing is written.

Exit status 0 when it is whole, 1 when something is missing or damaged, 2 when the path is none of these.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from trace_ds.checkpoints import manifest as manifests
from trace_ds.errors import UserError
from trace_ds.reporting import shapes
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.tensors.checkpoint import origin
from trace_ds.tensors.model_files import CONFIG_NAME, read_json_object, read_model_directory, refuse_other_kinds
from trace_ds.tensors.opening import REPORT, locate, open_source
from trace_ds.tensors.torch_archive import read_archive
from trace_ds.terminal import size

EXIT_DAMAGED = 1
SUPPORTED = "an artefact, a run directory, checkpoints or a model directory"


@dataclass(frozen=True)
class Inspection:
    """What a path holds.

    Attributes:
        kind: artefact, checkpoint, checkpoints, run, model or deepspeed.
        facts: its contents by name, in the order shown; of a run the state of each part.
        problems: one line for everything missing or damaged; empty: it is whole.
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
    if path.name in (artefact.FILE_NAME, manifests.MANIFEST, CONFIG_NAME) and path.is_file():
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
    if (path / manifests.MANIFEST).is_file() or (manifests.STEP.match(path.name) and not has_model):
        return "checkpoint", path, _checkpoint
    if path.is_dir() and not has_model:
        steps = (child for child in path.iterdir() if manifests.STEP.fullmatch(child.name))
        if any(not (step / CONFIG_NAME).is_file() for step in steps):
            return "checkpoints", path, _checkpoints
        run = RunDirectory(path)
        if run.is_marked() or run.config.is_file():
            return "run", path, _run
    try:
        path = locate(path, None)
    except UserError:
        refuse_other_kinds(path)
        raise UserError("trace_ds does not recognise this path", str(path), f"give the path of {SUPPORTED}") from None
    if (path / manifests.MANIFEST).is_file():
        return "checkpoint", path, _checkpoint
    return ("model", path, _model) if (path / CONFIG_NAME).is_file() else ("deepspeed", path, _deepspeed)


def _compared(verify: bool, files: str = "all files") -> str:
    return f"sizes and SHA-256 of {files}" if verify else "sizes; --verify compares SHA-256 too"


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
    return Inspection(path, "artefact", {"artefact": kind, **facts, "files": len(loaded.files)}, [], _compared(verify))


def _checkpoint(path: Path, verify: bool) -> Inspection:
    """One step of a training job."""
    manifest = manifests.read_manifest(path)
    manifests.verify(path, manifest, hashes=verify)
    shards = sorted(name for name in manifest.files if name.endswith(".pt"))
    for name in shards if verify else [*shards[:1], *shards[-1:]]:  # a file of each kind
        read_archive(path / name)
    facts = {key: value for key, value in asdict(manifest).items() if key not in ("files", "trainer_state")}
    return Inspection(path, "checkpoint", {**facts, "files": len(manifest.files)}, [], _compared(verify))


def _checkpoints(path: Path, verify: bool) -> Inspection:
    """``RUN/checkpoints``: the complete steps, and what is wrong with others and with ``latest``."""
    steps, problems = manifests.complete_steps(path)
    problems += manifests.wrong_latest(path, steps)
    if not steps and not problems:
        problems.append(f"{path}: there is no complete checkpoint")
    for step in steps:
        try:
            _checkpoint(path / manifests.step_name(step), verify)
        except UserError as error:
            problems.append(error.line())
    return Inspection(path, "checkpoints", {"steps": steps}, problems, _compared(verify))


def _model(path: Path, verify: bool) -> Inspection:
    """A Hugging Face model directory."""
    files = read_model_directory(path)
    facts = {
        "family": files.model_type,
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


def _deepspeed(path: Path, verify: bool) -> Inspection:
    """A checkpoint without our manifest, whose files themselves say what belongs to it."""
    from trace_ds.conversion.convert import verify_archives

    facts = open_source(path).summary()
    compared = "descriptions and sizes; --verify compares the files' own CRC-32 too"
    if verify:
        checked, bare = verify_archives(path)
        compared = f"CRC-32 of {size(checked)}" + (f"; {size(bare)} come without one" if bare else "")
    return Inspection(path, "deepspeed", facts, compared=compared)


def _run(path: Path, verify: bool) -> Inspection:
    """A run directory, part by part: done, missing or damaged."""
    run = RunDirectory.at(path)
    facts: dict[str, Any] = {"variant of": str(run.parent)} if run.parent else {}
    problems: list[str] = []

    def add(name: str, is_there: bool, read: Callable[[], Any]) -> None:
        """Record the state of one part, in which ``read`` finds what is wrong."""
        try:
            result = read() if is_there else None
            lines = result.problems if isinstance(result, Inspection) else []
        except UserError as error:
            lines = [error.line()]
        problems.extend(f"{name}: {line}" for line in lines)
        facts[name] = "damaged" if lines else "done" if is_there else "missing"

    def read_checkpoints() -> Inspection:
        shapes.read_points(run.path)  # the newest manifest has the scores while training
        return _checkpoints(run.checkpoints, verify)

    add("data", run.data.exists(), partial(_artefact, run.data, verify, "data"))
    for side in ("forget", "retain"):
        place = run.statistics / side
        add(f"statistics/{side}", place.exists(), partial(_artefact, place, verify, "statistics"))
    add("calibration", run.calibration.exists(), partial(_artefact, run.calibration, verify, "calibration"))
    add("checkpoints", any(run.checkpoints.glob("step_*")), read_checkpoints)
    add("model", run.model.is_dir(), partial(_model, run.model, verify))
    for finetuned in run.finetuned_here():
        name = f"finetune/{finetuned.path.name}"
        add(name, finetuned.model.is_dir(), partial(_model, finetuned.model, verify))
    add("config.yaml", run.config.is_file(), partial(shapes.read_config, run.config))
    add("curve.json", run.curve.is_file(), partial(shapes.read_points, run.path))
    results = sorted(run.evaluation.glob("*.json"))
    add("evaluation", bool(results), lambda: [shapes.read_result(result) for result in results])
    add("report", (run.report / "index.html").is_file(), lambda: None)
    for variant in sorted(run.variants.iterdir()) if run.variants.is_dir() else ():
        if variant.is_dir():
            add(f"variants/{variant.name}", True, partial(_run, variant, verify))
    return Inspection(path, "run", facts, problems, _compared(verify, "all parts' files"))
