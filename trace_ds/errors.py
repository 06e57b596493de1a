"""The ways a stage may end early on purpose; everything else is a bug and shows its traceback.

Exit status is part of the command line's contract: 0 done, 2 the user's input is wrong, 75 stopped on
request with a complete checkpoint, anything else a failure.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from trace_ds.terminal import plain

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75
LISTED, NAME_CHARACTERS = 8, 60  # names in a message, and of each


def listed(names: Iterable[object]) -> str:
    """Names for a message: the first few, and how many more there are."""
    texts = [str(name)[:NAME_CHARACTERS] for name in names]
    more = f" … and {len(texts) - LISTED} more" if len(texts) > LISTED else ""
    return f"{', '.join(texts[:LISTED])}{more}" if texts else "none"


def nearest(wrong: str | None, names: Sequence[str], has: str = "it has") -> str:
    """The beginning of a fix: the name that was meant, if one is close, and the names that there are."""
    close = [name for name in difflib.get_close_matches(wrong or "", names, 1) if name != wrong]
    return (f"did you mean {close[0]!r}? " if close else "") + f"{has} {listed(names)}: "


class UserError(Exception):
    """The user's input is wrong: one line saying what, where, and how to fix it; exit status 2.

    Args:
        problem: what is wrong, in a few words with the offending value.
        where: the file, configuration key or artefact it was found in.
        fix: what to do about it.
    """

    exit_status = EXIT_USER_ERROR

    def __init__(self, problem: str, where: str = "", fix: str = "") -> None:
        self.problem, self.where, self.fix = problem, where, fix
        super().__init__(self.line())

    def line(self) -> str:
        """The message as one line without control characters: ``where: problem. Fix: …``."""
        text = f"{self.where}: {self.problem}" if self.where else self.problem
        if self.fix:
            text = f"{text.rstrip('.')}. Fix: {self.fix}"
        return plain(" ".join(text.split()))


class AgreedError(Exception):
    """The main process says what is wrong: the other ranks leave silently, with the exit status of a UserError."""

    exit_status = EXIT_USER_ERROR


class JobFailed(RuntimeError):
    """The computation itself went wrong (a loss that is not finite, a collapsing model): one line; exit status 1.

    Args:
        step: the training step after which the model was of no use, when that is what went wrong.
    """

    exit_status = 1

    def __init__(self, problem: str, step: int | None = None) -> None:
        self.step = step
        super().__init__(problem)


class StopRequested(Exception):
    """Stopped on request after a complete checkpoint was saved; run again to go on; exit status 75."""

    exit_status = EXIT_STOPPED
