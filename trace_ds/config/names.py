"""Names that become the names of files and folders: of runs, variants, tasks, models, methods, checkpoint tags."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
ORIGINAL, UNLEARNED = "original", "unlearned"  # models that every run has
CHECKPOINT = re.compile(r"step_\d+")
MAX_LENGTH = 100  # with the endings that writers add, a file's name stays below the 255 bytes of file systems


def check_name(name: str) -> str:
    """``name``, when it can be a file's name everywhere and no path; else ``ValueError``.

    What looks like a temporary file of ours (``x.tmp-1``) could be taken for one, and deleted.
    """
    if not PATTERN.fullmatch(name) or ".tmp-" in name:
        raise ValueError(
            "a name is made of letters, digits, '.', '_' and '-', begins with one of the first two, no .tmp-"
        )
    if len(name) > MAX_LENGTH:
        raise ValueError(f"a name has at most {MAX_LENGTH} characters")
    return name


def check_model_name(name: str) -> str:
    """``name``, when it can be that of a further model of a run; else ``ValueError``."""
    if name in (ORIGINAL, UNLEARNED) or CHECKPOINT.fullmatch(name):
        raise ValueError(f"a model cannot be named {name!r}, which every run has: use another name")
    return check_name(name)


Name = Annotated[str, AfterValidator(check_name)]
ModelName = Annotated[str, AfterValidator(check_model_name)]
