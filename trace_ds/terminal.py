"""Terminal output: control characters are escaped, libraries are quiet, tables and numbers are short.

Names of sources, tasks and files may come from untrusted files: an escape sequence in one of them could set the
clipboard or rewrite the screen. :func:`plain` escapes one text, :func:`guard_streams` everything that is printed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
# Tabs, line ends, and what rich and tqdm send to a terminal: colours, cursor up, erase line, hide and show the cursor.
VERBOSE = "TRACE_DS_VERBOSE"  # a variable, so that the ranks of a job hear of it too
# The libraries that log of their own accord, and the variable of each with which a user sets what it shows.
LIBRARIES = {
    "transformers": "TRANSFORMERS_VERBOSITY",
    "datasets": "DATASETS_VERBOSITY",
    "huggingface_hub": "HF_HUB_VERBOSITY",
    "DeepSpeed": "",
}
OURS = re.compile("\x1b\\[[0-9;]*m|\x1b\\[[0-9]*[AK]|\x1b\\[\\?25[lh]|[\t\n\r]")


def plain(text: str) -> str:
    """``text`` with control characters, forced directions and lone surrogates written out (``\\u001b``, as in JSON)."""
    return CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


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
    """Guard standard output and error, which then also escape what their encoding lacks (``\\u2193``)."""
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


def narrow_table(title: str, *columns: str, left: Collection[str] = ()) -> Table:
    """A table without lines between its columns, so that most fit 80 characters; numbers to the right."""
    from rich import box
    from rich.table import Table

    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    table = Table(title=f"\n{title}", title_justify="left", **style)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def verbose() -> bool:
    """Whether details are asked for: ``-v``, or the variable in the environment."""
    return bool(os.environ.get(VERBOSE))


class _LibraryLogger(logging.Logger):
    """The logger of a library, which adds a handler of its own when it is imported: that shows errors only."""

    def __init__(self, name: str, level: int = logging.NOTSET) -> None:
        super().__init__(name, level)
        super().addHandler(logging.NullHandler())  # before the library's own: else Python shows what comes first

    def addHandler(self, hdlr: logging.Handler) -> None:
        if isinstance(hdlr, logging.StreamHandler):
            hdlr.setLevel(logging.ERROR)
        super().addHandler(hdlr)

    def __setattr__(self, name: str, value: object) -> None:
        # where CI is set, transformers passes its records on to the root logger too, whose handlers print warnings
        super().__setattr__(name, False if name == "propagate" else value)


def quiet_libraries() -> None:
    """Keep warnings of libraries out of the terminal; errors still show, and ``stage_log`` keeps both. A library whose
    level the user has set is left alone."""
    plain_logger = logging.getLoggerClass()
    logging.setLoggerClass(_LibraryLogger)
    for name, level_variable in LIBRARIES.items():
        if level_variable not in os.environ:
            logger = logging.getLogger(name)
            logger.propagate = False
            for handler in logger.handlers:  # it is imported already
                if isinstance(handler, logging.StreamHandler):
                    handler.setLevel(logging.ERROR)
    logging.setLoggerClass(plain_logger)


@contextlib.contextmanager
def library_records(handler: logging.Handler) -> Iterator[None]:
    """Send what libraries log to ``handler`` too, inside the block."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def size(number: float) -> str:
    """Bytes as a short text in decimal units."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}" if number < 999.5 * scale else f"{number / scale:.0f} {unit}"
    return f"{number:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as a short text; nothing for none."""
    if seconds >= 5400:
        return f"{seconds / 3600:.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:.0f} min"
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return (f"{seconds * 1000:.1f} ms" if seconds >= 5e-5 else "< 0.1 ms") if seconds else ""
