"""``trace-ds inspect PATH``: what a run, artefact, checkpoint or model is, and whether it is complete.

Sizes are compared with the descriptions; with ``--verify`` SHA-256 too. Nothing is written. Exit status 0 when it is
whole, 1 when something is missing or damaged, 2 when the path is none of these.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.checkpoints import manifest as manifests
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.tensors.model_files import CONFIG_NAME, read_json_object, read_model_directory, refuse_other_kinds
from trace_ds.tensors.opening import REPORT
from trace_ds.tensors.torch_archive import read_archive
from trace_ds.terminal import size

EXIT_DAMAGED = 1


@dataclass(frozen=True)
class Inspection:
    """What a path holds, by name (of a run the state of each part), and a line for everything missing or damaged."""

    kind: str
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def inspect_path(path: Path, verify: bool = False) -> int:
    """Print what ``path`` is; exit status 0 when whole, 1 otherwise."""
    result = inspect(path, verify)
    print(f"{path}: {result.kind}")
    for name, value in result.facts.items():
        text = size(value) if name == "bytes" else value
        print(f"  {name}: {text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)}")
    for problem in result.problems:
        print(f"PROBLEM  {problem}")
    if not result.problems:
        print(f"whole (compared: sizes{' and SHA-256' if verify else '; --verify compares SHA-256 too'})")
    return EXIT_DAMAGED if result.problems else 0


def inspect(path: Path, verify: bool = False) -> Inspection:
    """Find out what ``path`` is; :class:`UserError` where it is nothing that we know."""
    read = _reader(path)
    try:
        return read(path, verify)
    except UserError as error:
        return Inspection(read.__name__.strip("_"), problems=[error.line()])


def _reader(path: Path) -> Callable[[Path, bool], Inspection]:
    if (path / artefact.FILE_NAME).is_file():
        return _artefact
    if (path / CONFIG_NAME).is_file():
        return _model
    if (path / manifests.MANIFEST).is_file() or manifests.STEP.match(path.name):
        return _checkpoint
    if any(manifests.STEP.match(child.name) for child in path.glob("*")):
        return _checkpoints
    if RunDirectory(path).is_marked():
        return _run
    refuse_other_kinds(path)
    fix = "give the path of an artefact, a run directory, checkpoints or a model directory"
    raise UserError("trace_ds does not recognise this path", str(path), fix)


def _artefact(path: Path, verify: bool) -> Inspection:
    description = read_json_object(path / artefact.FILE_NAME, "the description of the artefact")
    loaded = artefact.load_artefact(path, str(description.get("kind")), verify=verify)
    facts = {key: getattr(loaded, key) for key in ("identity", "content", "inputs", "settings", "summary")}
    return Inspection("artefact", {"artefact": loaded.kind, **facts, "files": len(loaded.files)})


def _checkpoint(path: Path, verify: bool) -> Inspection:
    """One step of a training job."""
    manifest = manifests.read_manifest(path)
    manifests.verify(path, manifest, hashes=verify)
    shards = sorted(name for name in manifest.files if name.endswith(".pt"))
    for name in shards if verify else [*shards[:1], *shards[-1:]]:  # a file of each kind
        read_archive(path / name)
    facts = {key: value for key, value in asdict(manifest).items() if key not in ("files", "trainer_state")}
    return Inspection("checkpoint", {**facts, "files": len(manifest.files)})


def _checkpoints(path: Path, verify: bool) -> Inspection:
    """``RUN/checkpoints``: the complete steps, and what is wrong with others and with ``latest``."""
    steps, problems = manifests.complete_steps(path)
    problems += manifests.wrong_latest(path, steps)
    if not steps and not problems:
        problems.append(f"{path}: there is no complete checkpoint")
    for step in steps:
        problems += inspect(path / manifests.step_name(step), verify).problems
    return Inspection("checkpoints", {"steps": steps}, problems)


def _model(path: Path, verify: bool) -> Inspection:
    """A Hugging Face model directory; one that `convert` wrote has hashes to compare."""
    from trace_ds.conversion.convert import verify_huggingface

    files = read_model_directory(path)
    if verify and (path / REPORT).is_file():
        verify_huggingface(path)
    facts = {"family": files.model_type, "tensors": len(files.tensors), "parameters": files.parameters}
    return Inspection("model", {**facts, "types": files.dtypes, "files": len(files.files), "bytes": files.bytes})


def _run(path: Path, verify: bool) -> Inspection:
    """A run directory, part by part: done, missing or damaged."""
    run = RunDirectory.at(path)
    result = Inspection("run", {"variant of": str(run.parent)} if run.parent else {})
    parts = {"data": run.data, **{f"statistics/{side}": run.statistics / side for side in ("forget", "retain")}}
    parts |= {"calibration": run.calibration, "checkpoints": run.checkpoints, "model": run.model}
    parts |= {f"finetune/{each.path.name}": each.model for each in run.finetuned_here()}
    parts |= {"config.yaml": run.config, "curve.json": run.curve, "evaluation": run.evaluation, "report": run.report}
    parts |= {f"variants/{each.name}": each for each in sorted(run.variants.glob("*/"))}
    for name, place in parts.items():
        exists = place.is_file() or any(place.glob("*"))
        try:
            problems = inspect(place, verify).problems if exists and place.is_dir() and name != "evaluation" else []
        except UserError as error:
            problems = [error.line()]
        result.problems.extend(f"{name}: {line}" for line in problems)
        result.facts[name] = "missing" if not exists else "damaged" if problems else "done"
    return result
