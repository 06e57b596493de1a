"""Whether the numbers of two runs may be put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from trace_ds.reporting.gather import Evaluation, RunData, gather


def label(runs: Sequence[RunData], run: RunData, name: str) -> str:
    """The name of a model in a comparison: its own in the first run, ``RUN/NAME`` in the others."""
    return name if run is runs[0] else f"{run.name}/{name}"


def models(runs: Sequence[RunData]) -> Iterator[tuple[str, Evaluation]]:
    """Every evaluated model of a comparison by label; a reference that the first run also has comes once."""
    for run in runs:
        for name, evaluation in run.evaluations().items():
            known = runs[0].references.get(name) if name in run.references and run is not runs[0] else None
            if known is None or evaluation.fingerprint is None or known.fingerprint != evaluation.fingerprint:
                yield label(runs, run, name), evaluation


def why_not_comparable(run: RunData, other: RunData) -> list[str]:
    """Reasons, in words, why numbers of two runs must not be put side by side; empty when they may be."""
    reasons = []
    pairs = [("model", run.model_fingerprint, other.model_fingerprint)]
    mine, theirs = (data.artefacts.get("data", {}).get("content") for data in (run, other))
    pairs.append(("data", mine, theirs))
    for what, left, right in pairs:
        if left is None or right is None:
            missing = run.name if left is None else other.name
            reasons.append(f"the {what} fingerprint of {missing} is not known (that stage has not run)")
        elif left != right:
            reasons.append(f"another {what} ({what} fingerprint {right[:12]} instead of {left[:12]})")
    tasks = [
        {(s.task, s.metric, s.n) for evaluation in data.evaluations().values() for s in evaluation.scores}
        for data in (run, other)
    ]
    if not reasons and tasks[0] and tasks[1] and not tasks[0] & tasks[1]:
        reasons.append("no evaluation task in common")
    return reasons


def compared(data: RunData, paths: list[Path]) -> tuple[list[RunData], list[str]]:
    """The runs at ``paths`` that can be compared with ``data`` (named apart), and why the others cannot."""
    found: list[RunData] = []
    notes: list[str] = []
    names = {data.name}
    for path in paths:
        other = gather(path)
        name, number = other.name, 2
        while name in names:
            name, number = f"{other.name}-{number}", number + 1
        names.add(name)
        if name != other.name:
            other = gather(path, name)
        reasons = why_not_comparable(data, other)
        if reasons:
            notes.append(f"{name} is not compared with {data.name}: {'; '.join(reasons)}")
        else:
            found.append(other)
    return found, notes
