"""What a check of ``trace-ds doctor`` says, and the small helpers all checks share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trace_ds.errors import UserError

Status = Literal["OK", "WARN", "MISS"]
COMMAND_TIMEOUT_S = 15


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        group: heading it is listed under.
        name: what was looked at.
        status: OK; WARN (works, but slower or not everywhere); MISS (a job would fail).
        detail: what was found.
        fix: what to do about it; empty when OK.
    """

    group: str
    name: str
    status: Status
    detail: str
    fix: str = ""


def judged(group: str, name: str, good: bool, detail: str, fix: str, otherwise: Status = "MISS") -> Check:
    """An OK, or else a check of another status with its fix."""
    return Check(group, name, "OK", detail) if good else Check(group, name, otherwise, detail, fix)


def checked(group: str, name: str, find: Callable[[], object], fix: str = "", otherwise: Status = "MISS") -> Check:
    """OK with what ``find`` returns as its detail; an error of the user's, of the system (when there is a ``fix`` for
    one) or of the check itself makes it another status."""
    try:
        return Check(group, name, "OK", str(find() or "in order"))
    except UserError as error:
        where = f"{error.where}: " if error.where else ""
        return Check(group, name, otherwise, f"{where}{error.what}", error.fix)
    except Exception as error:
        if fix and isinstance(error, OSError):
            return Check(group, name, otherwise, error.strerror or str(error), fix)
        detail = f"the check itself failed: {type(error).__name__}: {first_line(str(error))}"
        return Check(group, name, "MISS", detail, "report it with the output of trace-ds doctor --json")


def guarded(group: str, name: str, function: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks ``function`` yields; an error on the way becomes one more, so the others still report."""
    found: list[Check] = []
    end = checked(group, name, lambda: found.extend(function()))
    return found if end.status == "OK" else [*found, end]


def find_program(name: str) -> str | None:
    """Path of a program, looking beside this Python first (an environment that is not activated still counts)."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def nearest_directory(path: Path) -> Path | None:
    """``path`` or its nearest parent that exists; None when that is not a directory."""
    absolute = Path(os.path.abspath(path))
    found = next(place for place in (absolute, *absolute.parents) if place.exists())
    return found if found.is_dir() else None


def output_of(*command: str) -> tuple[int, str]:
    """Exit status and combined output of a short command; (-1, reason) when it cannot run or does not end."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=COMMAND_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer in {COMMAND_TIMEOUT_S} s"
    except OSError as error:
        return -1, error.strerror or str(error)
    return done.returncode, done.stdout.strip()


def first_line(text: str) -> str:
    """The first non-empty line, shortened."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0][:200] if lines else ""


def gigabytes(number: float) -> str:
    """Bytes as GB with one digit after the point, MB below one."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
