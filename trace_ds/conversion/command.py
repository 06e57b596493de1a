"""What ``trace-ds convert SOURCE DESTINATION`` prints."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from trace_ds.run.log import StageLog, byte_progress
from trace_ds.terminal import size


def convert_command(source: Path, destination: Path, *, dry_run: bool = False, **options: Any) -> int:
    """``trace-ds convert SOURCE DESTINATION``: convert, and show how far it is; exit status 0.

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
        print(f"would write {destination}: {facts['parameters']:,} parameters, "
              f"{size(facts['bytes'])}, from {origin(facts['source'])}")  # fmt: skip
        return 0
    log = StageLog("convert", None, None)
    log.enabled = True  # of no run: the terminal's alone
    report = convert_checkpoint(source, destination, progress=byte_progress(log), **options)
    for warning in report.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    for note in report.get("notes", []):
        print(f"note: {note}")
    print(
        f"{destination}: {report['parameters']:,} parameters in {report['tensors']} tensors, "
        f"{size(report['bytes'])}, from {origin(report['source'])}"
        f"{', verified' if report.get('verified') else ''}"
    )
    return 0
