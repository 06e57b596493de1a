"""Which directories are ours: a stage replaces and deletes what carries a marker of ours, and nothing else.

A run directory is marked by :data:`MARKER`, what a stage makes in it by the description that the stage writes last. In
a marked run directory the names that stages write are theirs. Everything that writes asks here before its first byte.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from trace_ds.errors import UserError

MARKER = ".trace_ds.json"  # of a run directory
ARTEFACT = "artefact.json"
MANIFEST = "manifest.json"  # of a checkpoint
MODEL = "conversion.json"  # of a converted model
DEMO_MODEL = "training.json"
PARTIAL = "shape.json"  # of statistics that are being collected
FIX = "move it away, or choose another --run-dir"
# NAME.tmp-PID, .NAME.tmp-PID; NAME.tmp-old-PID on its way out, NAME.tmp-replaced-PID until the new NAME is there;
# NAME.tmp-HOST-PID-8hex of a conversion (twice the ending where a checkpoint is converted to be scored).
_ENDING = r"(?:\.tmp-(?:(?:old-|replaced-)?[1-9]\d{0,9}|[\w.-]+-[1-9]\d{0,9}-[0-9a-f]{8}|spool)){1,2}"


def leftover(name: str, of: str) -> re.Match[str] | None:
    """Whether ``name`` is what a killed writer of a file or folder called ``of`` (a regular expression) leaves."""
    return re.fullmatch(rf"\.?(?P<name>{of}){_ENDING}", name)


def require_directory(path: Path, *markers: str) -> None:
    """Refuse a directory that may not be replaced: one that holds something, and none of these marker files."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError("a directory of trace_ds's would take the place of this", str(path), FIX)
    if any(path.iterdir()) and not any((path / marker).is_file() for marker in markers):
        raise UserError(f"trace_ds did not make this (it has no {markers[0]}) and would replace it", str(path), FIX)


def require_file(path: Path) -> None:
    """Refuse what is in the way of a file."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError("this is not a file, and trace_ds would write one", str(path), FIX)


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
    """Where a path leads, as written and with its links resolved."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}
