"""What may reach a terminal or a log: text without control characters, in whatever encoding the stream has.

Names of sources, tasks and files are the users', and some come from files of others: an escape sequence in one of them
could set the clipboard or rewrite what is on the screen. :func:`plain` is for one text; :func:`guard_streams` puts the
same rule below everything that the command prints.
"""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Tabs, line ends, and what rich and tqdm send to a terminal: colours, cursor up, erase line, hide and show the cursor.
OURS = re.compile("\x1b\\[[0-9;]*m|\x1b\\[[0-9]*[AK]|\x1b\\[\\?25[lh]|[\t\n\r]")


def plain(text: str) -> str:
    """``text`` with control characters, forced directions and lone surrogates written out (``\\u001b``, as in JSON)."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


class GuardedStream:
    """A text stream that writes out control characters, but for line ends and, on a terminal, what draws our tables."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._kept = OURS if stream.isatty() else re.compile("[\t\n\r]")

    def write(self, text: str) -> int:
        end = 0
        for kept in self._kept.finditer(text):
            self._stream.write(plain(text[end : kept.start()]) + kept[0])
            end = kept.end()
        self._stream.write(plain(text[end:]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def guard_streams() -> None:
    """Guard standard output and error, which from now on also write out what their encoding lacks (``\\u2193``)."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or isinstance(stream, GuardedStream):
            continue
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, GuardedStream(stream))


def wide_console(log_width: int = 140) -> Console:
    """A console as wide as the terminal; in a log or a pipe as wide as the tables want to be, not 80 columns."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=log_width)
