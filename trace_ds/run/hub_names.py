"""What a model is called on the hub, and what the folders of the hub's cache say; no client library needed, but for
the names of revisions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from trace_ds.errors import UserError

# The hub's own rules for an id, with an organisation; a revision is a branch, a tag, refs/pr/N or a commit.
NAME = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>\w[\w./-]*))?", re.ASCII)


@dataclass(frozen=True)
class HubName:
    """``ORG/NAME``, or ``ORG/NAME@REVISION``."""

    id: str
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.id}@{self.revision}" if self.revision else self.id


def hub_name(text: str) -> HubName | None:
    """Parse a name on the hub; None for an existing directory, and for text that can be no name."""
    match = NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["id"] or match["id"].endswith((".git", ".", "-")):
        return None
    return None if Path(text).is_dir() else HubName(match["id"], match["revision"])


def snapshot_name(directory: str | Path) -> HubName | None:
    """The name, with its commit, of a model in a hub cache: ``…/models--ORG--NAME/snapshots/COMMIT``."""
    directory = Path(directory)
    cache = directory.parent.parent.name
    if directory.parent.name != "snapshots" or not cache.startswith("models--"):
        return None
    return HubName(cache.removeprefix("models--").replace("--", "/"), directory.name)


def revisions(name: str, kind: str) -> list[str]:
    """Branches and tags of a ``model`` or ``dataset`` on the hub, for a message; none where it does not say."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(name, repo_type=kind)
    except Exception:
        return []
    return [ref.name for ref in (*refs.branches, *refs.tags)]


def provenance(directory: str | Path, key: str = "source") -> dict[str, str]:
    """``{key: "ORG/NAME@COMMIT"}`` of a model that came from the hub, else nothing: what artefacts say of it."""
    name = snapshot_name(directory)
    return {key: str(name)} if name else {}


def no_directory(path: str | Path, problem: str, otherwise: str) -> UserError:
    """``path`` is no directory; it may be a name on the hub of which nothing is in the cache.

    Args:
        problem: what there is not, as in "there is no model directory".
        otherwise: the fix when it can be no name on the hub.
    """
    if hub_name(str(path)) is None:
        return UserError(problem, str(path), otherwise)
    fix = "where there is a network, `trace-ds fetch CONFIG` brings it from the hub; or name a directory"
    return UserError(
        "no directory of this name is here, and no model of this name is in the hub's cache", str(path), fix
    )
