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


def user_error(group: str, name: str, error: UserError, status: Status = "MISS") -> Check:
    """The check that a :class:`UserError` amounts to."""
    where = f"{error.where}: " if error.where else ""
    return Check(group, name, status, f"{where}{error.what}", error.fix)


def guarded(group: str, name: str, function: Callable[[], Iterable[Check]]) -> list[Check]:
    """The checks ``function`` yields; an unexpected error becomes a MISS of its own, so the others still report."""
    try:
        return list(function())
    except UserError as error:
        return [user_error(group, name, error)]
    except Exception as error:
        detail = f"the check itself failed: {type(error).__name__}: {first_line(str(error))}"
        return [Check(group, name, "MISS", detail, "report it with the output of trace-ds doctor --json")]


def find_program(name: str) -> str | None:
    """Path of a program, looking beside this Python first (an environment that is not activated still counts)."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def nearest_directory(path: Path) -> Path | None:
    """``path`` or its nearest parent that exists; None when that is not a directory."""
    absolute = Path(os.path.abspath(path))
    for candidate in (absolute, *absolute.parents):
        if candidate.is_dir():
            return candidate
        if candidate.exists():
            return None
    return None


def output_of(*command: str, timeout_s: float = COMMAND_TIMEOUT_S) -> tuple[int, str]:
    """Exit status and combined output of a short command; (-1, reason) when it cannot run or does not end."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return -1, f"no answer in {timeout_s:g} s"
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
