"""Whether the numbers of two runs may be put side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    mine, theirs = (data.artefacts["data"].content if "data" in data.artefacts else None for data in (run, other))
    for what, left, right in (("model", run.model_fingerprint, other.model_fingerprint), ("data", mine, theirs)):
        if left is None or right is None:
            missing = run.name if left is None else other.name
            reasons.append(f"the {what} fingerprint of {missing} is not known (that stage has not run)")
        elif left != right:
            reasons.append(f"another {what} ({what} fingerprint {right[:12]} instead of {left[:12]})")
    mine_asked, theirs_asked = asked(run), asked(other)
    if not reasons and mine_asked and theirs_asked:
        if not set(mine_asked) & set(theirs_asked):
            reasons.append("no evaluation task in common")
        elif not set(mine_asked) & set(theirs_asked) - set(other_tasks(run, other)):
            reasons.append(f"other questions in every task ({', '.join(other_tasks(run, other))})")
    return reasons


def asked(run: RunData) -> dict[str, tuple[str | None, set[int | None]]]:
    """By task of a run: the fingerprint of its questions (None in results of older versions) and its item counts."""
    found: dict[str, tuple[str | None, set[int | None]]] = {}
    for evaluation in run.evaluations().values():
        for score in evaluation.scores:
            fingerprint, counts = found.get(score.task, (evaluation.tasks.get(score.task), set()))
            found[score.task] = (fingerprint, {*counts, score.n})
    return found


def other_tasks(run: RunData, other: RunData) -> list[str]:
    """Tasks of both runs that go by one name and ask different questions; without fingerprints, another number."""
    mine, theirs = asked(run), asked(other)
    differing = []
    for task in sorted(set(mine) & set(theirs)):
        (left, left_counts), (right, right_counts) = mine[task], theirs[task]
        same = left == right if left is not None and right is not None else left_counts & right_counts
        if not same:
            differing.append(task)
    return differing


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
            other = replace(other, name=name)
        reasons = why_not_comparable(data, other)
        if reasons:
            notes.append(f"{name} is not compared with {data.name}: {'; '.join(reasons)}")
            continue
        differing = other_tasks(data, other)
        if differing:
            notes.append(
                f"{', '.join(differing)} of {name}: other questions than in {data.name}, so those scores are left out"
            )
            other = replace(gather(path, differing), name=name)
        found.append(other)
    return found, notes
