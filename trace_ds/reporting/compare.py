"""Whether the numbers of two runs may be put side by side, or told as one: their means over seeds."""

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


def without_tasks(run: RunData, tasks: Sequence[str]) -> RunData:
    """The run as if these tasks had not been evaluated."""

    def kept(evaluation: Evaluation | None) -> Evaluation | None:
        if evaluation is None:
            return None
        scores = [score for score in evaluation.scores if score.task not in tasks]
        items = {task: items for task, items in evaluation.items.items() if task not in tasks}
        return replace(evaluation, scores=scores, items=items, attacks={"expert_forcing": {}, "relearning": []})

    def each(found: dict[Any, Evaluation]) -> dict[Any, Evaluation]:
        return {key: evaluation for key, value in found.items() if (evaluation := kept(value)) is not None}

    arms = [replace(arm, final=kept(arm.final), checkpoints=each(arm.checkpoints)) for arm in run.arms]
    return replace(run, references=each(run.references), arms=arms)


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
            other = without_tasks(other, differing)
        found.append(other)
    return again, found, notes
