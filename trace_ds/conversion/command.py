"""What ``trace-ds convert SOURCE DESTINATION`` prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def convert_command(source: Path, destination: Path, *, dry_run: bool = False, **options: Any) -> int:
    """``trace-ds convert SOURCE DESTINATION``: convert with a line of progress now and then; exit status 0.

    Args:
        dry_run: check everything that needs no weights, say what would be written, and write nothing.

    Raises:
        UserError: see :func:`trace_ds.conversion.convert.convert_checkpoint`.
    """
    from trace_ds.conversion.convert import convert_checkpoint, preview
    from trace_ds.tensors.checkpoint import origin

    if dry_run:
        facts = preview(source, destination, **options)
        for note in facts["notes"]:
            print(f"note: {note}")
        print(f"would write {destination}: {facts['parameters']:,} parameters as {facts['target']}, "
              f"{facts['bytes'] / 1e9:.3f} GB, from {origin(facts['source'])}")  # fmt: skip
        return 0
    report = convert_checkpoint(source, destination, progress=_Lines(), **options)
    for warning in report.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    for note in report.get("notes", []):
        print(f"note: {note}")
    print(
        f"{destination}: {report['parameters']:,} parameters in {len(report['tensors'])} tensors, "
        f"{report['bytes'] / 1e9:.3f} GB, from {origin(report['source'])}"
        f"{', verified' if report.get('verified') else ''}"
    )
    return 0


class _Lines:
    """Progress: a line that rewrites itself on a terminal, one line every tenth otherwise."""

    def __init__(self) -> None:
        self._tenth = 0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        tenth = 10 * done_bytes // max(total_bytes, 1)
        terminal = sys.stderr.isatty()
        if tenth <= self._tenth and not terminal:
            return
        self._tenth = tenth
        text = f"{done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB written"
        print(f"\r{text}" if terminal else text, end="" if terminal and done_bytes < total_bytes else "\n",
              file=sys.stderr, flush=True)  # fmt: skip
