"""Whether the numbers of two runs may be put side by side, and the mean of runs that differ in their seed only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trace_ds.reporting.gather import Evaluation, RunData, gather


def label(runs: Sequence[RunData], run: RunData, name: str) -> str:
    """The name of a model in a comparison: its own in the first run, ``RUN/NAME`` in the others."""
    return name if run is runs[0] else f"{run.name}/{name}"


def models(runs: Sequence[RunData]) -> Iterator[tuple[str, Evaluation, RunData]]:
    """Every evaluated model of a comparison by label, with its run; references that the first has come once."""
    for run in runs:
        for name, evaluation in run.evaluations().items():
            known = runs[0].references.get(name) if name in run.references and run is not runs[0] else None
            if known is None or evaluation.fingerprint is None or known.fingerprint != evaluation.fingerprint:
                yield label(runs, run, name), evaluation, run


def compared(data: RunData, paths: list[Path]) -> tuple[list[RunData], list[RunData], list[str]]:
    """Of the runs at ``paths``: those that repeat ``data`` with other seeds, those that can be compared with it (named
    apart), and why the rest cannot."""
    again: list[RunData] = []
    found: list[RunData] = []
    notes: list[str] = []
    names = {data.name}
    for path in paths:
        other = gather(path)
        if repeats(data, other) and all(repeats(other, each) for each in again):
            again.append(other)
            continue
        name, number = other.name, 2
        while name in names:
            name, number = f"{other.name}-{number}", number + 1
        names.add(name)
        if reasons := why_not_comparable(data, other):
            notes.append(f"{name} is not compared with {data.name}: {'; '.join(reasons)}")
        else:
            found.append(replace(other, name=name))
    return again, found, notes


def why_not_comparable(run: RunData, other: RunData) -> list[str]:
    """Reasons, in words, why numbers of two runs must not be put side by side; empty when they may be."""
    reasons = []
    data = [each.artefacts["data"].content if "data" in each.artefacts else None for each in (run, other)]
    for what, (left, right) in {"model": (run.model_fingerprint, other.model_fingerprint), "data": data}.items():
        if left is None or right is None:
            missing = run.name if left is None else other.name
            reasons.append(f"the {what} fingerprint of {missing} is not known (that stage has not run)")
        elif left != right:
            reasons.append(f"another {what} ({what} fingerprint {right[:12]} instead of {left[:12]})")
    mine, theirs = (
        {s.task: each.tasks.get(s.task) for each in one.evaluations().values() for s in each.scores}
        for one in (run, other)
    )
    if differing := sorted(task for task in set(mine) & set(theirs) if mine[task] != theirs[task]):
        reasons.append(f"other questions in {', '.join(differing)}")
    elif mine and theirs and not set(mine) & set(theirs):
        reasons.append("no evaluation task in common")
    return reasons


def averaged(runs: Sequence[RunData]) -> RunData:
    """The first of several runs with the scores that all have as means over them; what else it holds is its own."""
    if len(runs) == 1:
        return runs[0]

    def mean(found: Sequence[Evaluation | None]) -> Evaluation | None:
        known = [evaluation for evaluation in found if evaluation is not None]
        if len(known) < len(runs):
            return None
        scores = []
        for score in known[0].scores:
            values = [value for each in known if (value := each.value(score.task, score.metric)) is not None]
            if len(values) == len(runs):
                scores.append(replace(score, value=math.fsum(values) / len(values), by_seed=tuple(values)))
        return replace(known[0], scores=scores)

    def over(found: Sequence[dict[Any, Evaluation]]) -> dict[Any, Evaluation]:
        means = {key: mean([each.get(key) for each in found]) for key in found[0]}
        return {key: evaluation for key, evaluation in means.items() if evaluation is not None}

    arms = []
    for arm in runs[0].arms:
        same = [other for run in runs for other in run.arms if other.label == arm.label]
        final = mean([other.final for other in same])
        arms.append(replace(arm, final=final, checkpoints=over([other.checkpoints for other in same])))
    return replace(runs[0], references=over([run.references for run in runs]), arms=arms)


def repeats(run: RunData, other: RunData) -> bool:
    """Whether two runs differ only in their seed, and in files of their own that were made with it."""

    def settings(value: Any, own: tuple[str, ...]) -> Any:
        if isinstance(value, dict):
            return {key: settings(each, own) for key, each in value.items()}
        if isinstance(value, list):
            return [settings(each, own) for each in value]
        if not isinstance(value, str):
            return value
        parts = value.split("/")  # a path: from the run's folder (or the one that it lies in) on
        return parts[max((place + 1 for place, part in enumerate(parts[:-1]) if part in own), default=0) :]

    mine, theirs = (
        settings({**each.config, "seed": 0, "name": "", "report": None}, each.path.resolve().parts[-2:])
        for each in (run, other)
    )
    return bool(run.config) and mine == theirs and run.config.get("seed") != other.config.get("seed")
