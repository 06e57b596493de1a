"""Which files on the disk are ours: a stage replaces and deletes those, and refuses to touch any other.

A run directory is a folder of the user's. What a stage is about to replace there must carry the mark of what that stage
makes (:data:`Owner`: a description that lists the files), and must hold nothing beside it; leftovers of killed writers
are recognised by a name that only we make (:func:`leftover`) in a place where we write. Everything that writes asks
here first, before its first byte.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.foreign import read_object

# Of a directory: which of the (relative) names in it are of our making; None: the directory is not.
Owner = Callable[[Path], Callable[[str], bool] | None]

FIX = "move it away, or choose another --run-dir"
SHOWN = 3
MANIFEST = "manifest.json"  # of a checkpoint
CONFIG_BYTES = 1 << 20  # a larger one nobody's run has stored
# NAME.tmp-PID, .NAME.tmp-PID; NAME.tmp-old-PID on its way out, NAME.tmp-replaced-PID until the new NAME is there;
# NAME.tmp-HOST-PID-8hex of a conversion (twice the ending where a checkpoint is converted to be scored).
_ENDING = r"(?:\.tmp-(?:(?:old-|replaced-)?[1-9]\d{0,9}|[\w.-]+-[1-9]\d{0,9}-[0-9a-f]{8}|spool)){1,2}"
_PARTIAL = re.compile(
    r"\.?(?:(?:shape|artefact)\.json|statistics\.safetensors|state-\d{5}-\d{9}\.safetensors|\w+-\d{5}-of-\d{5}\.npy)"
    rf"(?:{_ENDING})?"
)
_MODEL_FILES = re.compile(
    r"config\.json|generation_config\.json|README\.md|conversion\.json|training\.json|model\.safetensors(?:\.index\.json)?|"
    r"model-\d{5}-of-\d{5}\.safetensors|tokenizer\.(?:json|model)|tokenizer_config\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|chat_template\.(?:jinja|json)"
)


def leftover(name: str, of: str) -> re.Match[str] | None:
    """Whether ``name`` is what a killed writer of a file or folder called ``of`` (a regular expression) leaves."""
    return re.fullmatch(rf"\.?(?P<name>{of}){_ENDING}", name)


# ------------------------------------------------------------------------------------------------- what is whose


def artefact(kind: str) -> Owner:
    """An artefact of one kind: ``artefact.json`` says which files it has."""

    def owned(path: Path) -> Callable[[str], bool] | None:
        raw = _json_object(path / "artefact.json")
        if raw.get("kind") != kind or "identity" not in raw or not isinstance(raw.get("files"), dict):
            return None
        return {"artefact.json", *raw["files"]}.__contains__

    return owned


def partial_statistics(path: Path) -> Callable[[str], bool] | None:
    """A collection that has not ended (``SIDE.partial``); its place and its files' names are the mark."""
    return lambda name: _PARTIAL.fullmatch(name) is not None


def converted_model(path: Path) -> Callable[[str], bool] | None:
    """A model that a conversion of ours wrote: ``conversion.json`` says of what."""
    raw = _json_object(path / "conversion.json")
    return _is_model_file if {"source", "target", "tensors"} <= raw.keys() else None


def demo_model(path: Path) -> Callable[[str], bool] | None:
    """A model that the demo trained: ``training.json`` says how."""
    return _is_model_file if "parameters" in _json_object(path / "training.json") else None


def _is_model_file(name: str) -> bool:
    return _MODEL_FILES.fullmatch(name) is not None


def checkpoint(path: Path) -> Callable[[str], bool] | None:
    """One step of a job, whose manifest lists its files; where the manifest is damaged, they have DeepSpeed's names."""
    if not (path / MANIFEST).is_file():
        return None
    files = _json_object(path / MANIFEST).get("files")
    names = {MANIFEST, *(files if isinstance(files, dict) else ())}
    return lambda name: name in names or name.endswith("_states.pt")


def is_result(path: Path) -> bool:
    """A model's scores, ``evaluation/NAME.json``."""
    return isinstance(_json_object(path).get("scores"), list)


def is_curve(path: Path) -> bool:
    """What a job leaves of which the curve is all that is wanted, ``RUN/curve.json``."""
    return is_described("identity", "curve", "diverged")(path)


def is_pointer(path: Path) -> bool:
    """``checkpoints/latest``, which names a step of ours or (damaged) nothing."""
    return re.fullmatch(r"(step_\d{6,})?\s*", _text(path)) is not None


def is_log(path: Path) -> bool:
    """``logs/STAGE.jsonl``; a killed job may have torn the last line."""
    first, newline, _ = _text(path).partition("\n")
    try:
        if not newline:
            return '{"event": '.startswith(first[:10])
        record = json.loads(first)
        return isinstance(record, dict) and not {"event", "time_s", "step"}.isdisjoint(record)
    except (ValueError, RecursionError):
        return False


def is_stored_config(path: Path) -> bool:
    """``config.yaml`` as we store it: every key written out, and no comment or layout of a person's."""
    from trace_ds.config.load import is_resolved

    return path.stat().st_size <= CONFIG_BYTES and is_resolved(_text(path))


def is_described(*keys: str) -> Callable[[Path], bool]:
    """A JSON file of ours that has these keys."""
    return lambda path: set(keys) <= _json_object(path).keys()


def _json_object(path: Path) -> dict[str, Any]:
    """Empty when it is not there, cannot be read or is no object."""
    with contextlib.suppress(UserError):
        return read_object(path, "", "", infinite=True)
    return {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "\0"  # nobody's


# ------------------------------------------------------------------------------------------------------ asking


def names_below(path: Path) -> list[str]:
    """Every file and link below a directory, relative to it; what NFS (``.nfs…``) or a killed writer of ours
    (``.NAME.tmp-PID``) left of a file does not count."""
    found = []
    for folder, directories, files in os.walk(path):
        links = [name for name in directories if (Path(folder) / name).is_symlink()]
        found += [os.path.relpath(Path(folder) / name, path) for name in (*files, *links)]
    gone = re.compile(rf"\.nfs.*|\..+{_ENDING}")
    return sorted(name for name in found if not gone.fullmatch(Path(name).name))


def require_directory(path: Path, owner: Owner) -> None:
    """Refuse a directory that may not be replaced; nothing at all, or an empty directory, may.

    Raises:
        UserError: it is not ours, or holds something that is not.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError("a directory of trace_ds's would take the place of this", str(path), FIX)
    names = names_below(path)
    if not names:
        return
    owned = owner(path)
    if owned is None:
        raise UserError(
            "trace_ds did not make this (or its description is damaged) and would replace it", str(path), FIX
        )
    if strangers := [name for name in names if not owned(name)]:
        raise UserError(f"this would be replaced, and trace_ds did not make {_shown(strangers)} in it", str(path), FIX)


def require_file(path: Path, is_ours: Callable[[Path], bool]) -> None:
    """Refuse a file that may not be replaced or added to; nothing at all, or an empty file, may."""
    if not os.path.lexists(path):
        return
    if not path.is_file() or (path.stat().st_size and not is_ours(path)):
        raise UserError("trace_ds did not write this (or it is damaged) and would replace it", str(path), FIX)


def require_folders(*paths: Path) -> None:
    """Refuse what is in the way of a folder that files are added to."""
    for path in paths:
        if os.path.lexists(path) and not path.is_dir():
            raise UserError("this is not a directory, and trace_ds would write into one", str(path), FIX)


def require_apart(outputs: Iterable[Path], inputs: Mapping[str, Path]) -> None:
    """Refuse to write to, into or around what is read: a model, a tokenizer, a corpus, a task.

    Args:
        outputs: what will be written.
        inputs: what the configuration names, by its key.
    """
    written = {place for path in outputs for place in _places(path)}
    for key, path in inputs.items():
        for place in _places(path):
            for output in written:
                if place == output or output in place.parents or place in output.parents:
                    raise UserError(
                        f"this command writes to {output}, and {key} is {path}",
                        key,
                        "choose a --run-dir (or destination) whose files are apart from what is read",
                    )


def _places(path: Path) -> set[Path]:
    """Where a path leads, by its words and with its links resolved."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
