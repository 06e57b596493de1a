"""Artefacts: what one stage leaves for the next, with the fingerprints that keep them from being mixed up.

An artefact is a directory with an ``artefact.json`` that says what it is (``kind``), what it was made from
(``inputs``: fingerprints by name), with which ``settings``, which ``files`` belong to it (bytes and SHA-256), and a
``summary`` for people. Two fingerprints follow from it: ``identity`` (kind, inputs, settings: *would running the stage
again give this?*) and ``content`` (the hashes of the files: *is this the thing that the next stage was computed
from?*). Nothing in it depends on the time, the machine or the launcher.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, once_a_process, require_files, sha256_file, sha256_text, write_json
from trace_ds.run.foreign import file_entries, read_object, reading, text_values, typed

FILE_NAME = "artefact.json"
_FORMAT = 1
# By kind: the command that makes it.
MADE_BY = {
    "data": "prepare CONFIG",
    "statistics": "collect CONFIG",
    "calibration": "calibrate CONFIG",
    "demo_corpora": "demo",
}


@dataclass(frozen=True)
class Artefact:
    """The description of an artefact on disk; see the module's docstring for the fields."""

    kind: str
    inputs: dict[str, str]
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None

    @property
    def identity(self) -> str:
        return identity_of(self.kind, self.inputs, self.settings)

    @property
    def content(self) -> str:
        return sha256_text(canonical_json({"kind": self.kind, "files": self.files}))

    @property
    def fix(self) -> str:
        """The fix that errors about this artefact name: the verb that makes it again."""
        return fix_of(self.kind)

    def file(self, name: str) -> Path:
        """The path of one of the artefact's files; ``ValueError`` for a name it does not list."""
        if self.path is None or name not in self.files:
            raise ValueError(f"artefact {self.kind} has no file {name!r}; it has {sorted(self.files)}")
        return self.path / name

    def require_same(self, **expected: str) -> None:
        """Refuse an artefact made from other inputs (``model``, ``tokenizer``, ``data``) than these fingerprints."""
        for name, value in expected.items():
            recorded = self.inputs.get(name)
            if recorded != value:
                raise UserError(
                    f"this {self.kind} artefact was made with another {name} "
                    f"({str(recorded)[:12]}, this job has {value[:12]})",
                    str(self.path),
                    f"{self.fix}, or point the job at the {name} it was made with",
                )


def fix_of(kind: str) -> str:
    return f"make it again with `trace-ds {MADE_BY.get(kind, 'run CONFIG')}`"


def identity_of(kind: str, inputs: Mapping[str, str], settings: Mapping[str, Any]) -> str:
    """SHA-256 over what determines an artefact: its kind, format, inputs and settings."""
    return sha256_text(
        canonical_json({"kind": kind, "format": _FORMAT, "inputs": dict(inputs), "settings": dict(settings)})
    )


def file_entry(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of one file, as a description lists them."""
    return {"bytes": path.stat().st_size, "sha256": sha256_file(path)}


def describe(
    directory: Path,
    kind: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    summary: Mapping[str, Any],
    *,
    files: Mapping[str, dict[str, Any]] | None = None,
) -> Artefact:
    """Write the ``artefact.json`` of ``directory`` (last, so that it marks completeness).

    Args:
        files: the files that belong to it, by name, as :func:`file_entry` says; None: hash every file that is there.
    """
    if files is None:
        paths = (path for path in directory.rglob("*") if path.is_file() and path.name != FILE_NAME)
        files = {str(path.relative_to(directory)): file_entry(path) for path in paths}
    files = dict(sorted(files.items()))
    artefact = Artefact(kind, dict(inputs), dict(settings), files, dict(summary), directory)
    write_json(
        directory / FILE_NAME,
        {
            "kind": kind,
            "format": _FORMAT,
            "inputs": artefact.inputs,
            "settings": artefact.settings,
            "files": files,
            "summary": artefact.summary,
            "identity": artefact.identity,
            "content": artefact.content,
        },
    )
    return artefact


def load_artefact(directory: Path, kind: str, *, verify: bool = True) -> Artefact:
    """Read an artefact and prove that it is whole.

    Sizes are always compared with the description, hashes when ``verify``. Any damage is a :class:`UserError` that
    names the file and the verb that makes it anew.
    """
    description, fix = directory / FILE_NAME, fix_of(kind)
    if not description.is_file():
        raise UserError(f"there is no {kind} artefact here", str(directory), fix)
    artefact = _read(description)
    if artefact.kind != kind:
        raise UserError(f"this is a {artefact.kind} artefact where a {kind} artefact is needed", str(directory), fix)
    require_files(directory, artefact.files, fix, hashes=verify)
    return artefact


@once_a_process
def _read(description: Path) -> Artefact:
    fix = fix_of(next((folder.name for folder in description.parents[:2] if folder.name in MADE_BY), ""))
    raw = {"summary": {}, **read_object(description, "the description of the artefact", fix)}
    with reading(description, "the description of the artefact", fix):
        kinds = {"kind": str, "identity": str, "content": str, **dict.fromkeys(("inputs", "settings", "files"), dict)}
        typed(raw, kinds | {"summary": dict})
        text_values(raw, "inputs")
        files = file_entries(raw["files"])
        artefact = Artefact(raw["kind"], raw["inputs"], raw["settings"], files, raw["summary"], description.parent)
        if (raw["identity"], raw["content"]) != (artefact.identity, artefact.content):
            raise UserError("the description of the artefact was altered after it was written", str(description), fix)
    return artefact


def find_current(directory: Path, kind: str, identity: str, *, verify: bool = True) -> Artefact | None:
    """The artefact of that identity in ``directory``, None without a whole one (see :func:`load_artefact`)."""
    try:
        artefact = load_artefact(directory, kind, verify=verify)
    except UserError:
        return None
    return artefact if artefact.identity == identity else None


def is_done(directory: Path, kind: str, identity: str) -> bool:
    """Whether ``directory`` already holds a whole artefact of that identity (damage counts as not done)."""
    return find_current(directory, kind, identity) is not None
