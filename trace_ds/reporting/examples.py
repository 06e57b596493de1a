"""What the models say: a few questions with every model's answers, and the perplexity that tells whether they still
speak."""

from __future__ import annotations

from dataclasses import dataclass

from trace_ds.reporting.gather import Evaluation, RunData
from trace_ds.reporting.tables import item_cells

EXAMPLES = 3


@dataclass(frozen=True)
class Answered:
    model: str
    text: str
    score: float | None
    wrote: bool  # free text, no choice


def examples(run: RunData, role: str, main: str) -> list[tuple[str, list[Answered]]]:
    """Up to three questions of a task with the models' answers, of free text where there is any, in proportion to how
    they came out: the middle of each third, from those that the model ``main`` answers worst to its best ones."""
    evaluations = run.evaluations()
    task = _task(evaluations[main], role) if main in evaluations else None
    if task is None:
        return []
    items = sorted(evaluations[main].items[task], key=lambda item: item_cells(item)[3] or 0.0)
    count = min(EXAMPLES, len(items))
    by_id = {name: {each.get("id"): each for each in one.items.get(task) or []} for name, one in evaluations.items()}
    found = []
    for item in (items[(2 * number + 1) * len(items) // (2 * count)] for number in range(count)):
        own = {name: logs[item.get("id")] for name, logs in by_id.items() if item.get("id") in logs}
        cells = {name: item_cells(each) for name, each in own.items()}
        answers = [Answered(name, c[2] or "nothing", c[3], "continuation" in own[name]) for name, c in cells.items()]
        found.append((item_cells(item)[1], answers))
    return found


def _task(evaluation: Evaluation, role: str) -> str | None:
    """The first task of a role with free text, else with any answers."""
    tasks = dict.fromkeys(score.task for score in evaluation.scores if score.role == role)
    first = {task: items[0] for task in tasks if (items := evaluation.items.get(task))}
    return next((task for kind in ("continuation", "predicted") for task in first if kind in first[task]), None)


def perplexities(run: RunData) -> tuple[str, dict[str, float | None]]:
    """The first task of text to keep whose perplexity tells whether a model still speaks, and the models' values."""
    models = run.evaluations()
    found = (score for each in models.values() for score in each.scores if score.role == "utility")
    task = next((score.task for score in found if score.metric == "perplexity"), "")
    return task.replace("_", " "), {name: each.value(task, "perplexity") for name, each in models.items() if task}


def fluency(run: RunData, label: str) -> list[str]:
    """A sentence with the perplexity on text to keep, before and after."""
    task, values = perplexities(run)
    after, before = values.get(label), values.get("original")
    if after is None or before is None:
        return []
    return [f"Fluency (perplexity of {task}, lower is better): {after:.1f} after, {before:.1f} before."]
