"""Checkpoints on disk: which are complete, what they hold, and the ``latest`` pointer. No torch, no DeepSpeed.

``RUN/checkpoints/step_000100/`` holds DeepSpeed's shard files and, written last, ``manifest.json`` with the size and
SHA-256 of each. A directory without a manifest, or with a file that does not match it, is not a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import MANIFEST, require_files, write_json, write_text
from trace_ds.run.foreign import file_entries, pointed, read_object, text_values, typed

LATEST = "latest"
_FORMAT = 1
_TEXTS = ("family", "job", "calibration", "dtype")
STEP = re.compile(r"step_(\d{6,})")


@dataclass(frozen=True)
class Manifest:
    """The description of a checkpoint, ``manifest.json``.

    Attributes:
        step: optimizer steps done.
        world, ep, zero_stage: the shape of the job that wrote it.
        family: model family.
        job: identity of the job (model, data, calibration, settings): only the same job may resume from it.
        model: ``{"path", "fingerprint"}`` of the model the job started from.
        calibration: content fingerprint of the calibration.
        dtype: parameter type of the forward pass.
        trainer_state: ``{"step", "seed", ...}``: with the seed, the position in the data; and job constants.
        versions: of trace_ds, deepspeed, torch, transformers.
        files: name -> {bytes, sha256}.
    """

    step: int
    world: int
    ep: int
    zero_stage: int
    family: str
    job: str
    model: dict[str, str]
    calibration: str
    dtype: str
    trainer_state: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        write_json(directory / MANIFEST, {"format": _FORMAT, **asdict(self)})


def step_name(step: int) -> str:
    return f"step_{step:06d}"


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint directory; :class:`UserError` when missing, damaged, or another version's."""
    path = directory / MANIFEST
    if not path.is_file():
        raise UserError("there is no manifest: the checkpoint is incomplete", str(directory), "use another step")
    raw = read_object(path, "the manifest", "use another step")
    if (version := raw.pop("format", None)) != _FORMAT:
        problem = f"the manifest is of format {str(version)[:20]}, and this version of trace_ds reads {_FORMAT}"
        fix = "go on with the version that wrote it (`versions` in the manifest), or use another step"
        raise UserError(problem, str(path), fix)
    try:
        kinds = {**dict.fromkeys(("step", "world", "ep", "zero_stage"), int), **dict.fromkeys(_TEXTS, str)}
        typed(raw, {**kinds, **dict.fromkeys(("model", "trainer_state", "versions", "files"), dict)})
        text_values(raw, "model")
        text_values(raw, "versions")
        file_entries(raw["files"])
        return Manifest(**raw)
    except (ValueError, TypeError) as error:
        raise UserError(f"the manifest is damaged ({str(error)[:200]})", str(path), "use another step") from None


def verify(directory: Path, manifest: Manifest, *, hashes: bool, part: int = 0, parts: int = 1) -> None:
    """Compare every file with the manifest: sizes always, SHA-256 when ``hashes``; names the first bad file.

    With ``parts``, only every ``parts``-th file from ``part`` on, so that processes share the work.
    """
    share = dict(sorted(manifest.files.items())[part::parts])
    require_files(directory, share, "restore the file, or use another step", hashes=hashes)


def complete_steps(checkpoints: Path) -> tuple[list[int], list[str]]:
    """(steps of the checkpoints complete by size, ascending; one line for each damaged or incomplete directory)."""
    steps, problems = [], []
    for path in sorted(checkpoints.glob("step_*")) if checkpoints.is_dir() else []:
        match = STEP.fullmatch(path.name)
        if match is None or not path.is_dir():
            continue
        try:
            verify(path, read_manifest(path), hashes=False)
            steps.append(int(match[1]))
        except UserError as error:
            problems.append(error.line())
    return sorted(steps), problems


def newest_complete(checkpoints: Path) -> tuple[int | None, list[str]]:
    """The newest complete step by sizes (None: there is none) and what is wrong with other steps and with ``latest``.

    ``latest`` is a hint for people and for other tools; completeness is what counts, so an empty or wrong ``latest``
    is reported and survived.
    """
    steps, problems = complete_steps(checkpoints)
    return (steps[-1] if steps else None), problems + wrong_latest(checkpoints, steps)


def wrong_latest(checkpoints: Path, steps: list[int]) -> list[str]:
    """A line about a ``latest`` that names none of the complete ``steps``; empty when all is well."""
    pointer = checkpoints / LATEST
    if not pointer.is_file():
        return []
    named = pointed(pointer)
    match = STEP.fullmatch(named)
    is_complete = match is not None and int(match[1]) in steps
    return [] if is_complete else [f"{pointer}: names {named!r}, which is not a complete checkpoint"]


def point_latest(checkpoints: Path, step: int) -> None:
    """Make ``latest`` name this step (untouched when it does)."""
    pointer, text = checkpoints / LATEST, step_name(step) + "\n"
    if not pointer.is_file() or pointed(pointer) != step_name(step):
        write_text(pointer, text)
