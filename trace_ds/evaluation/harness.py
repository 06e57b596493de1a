"""WMDP, MMLU and whatever else lm-evaluation-harness knows, through its Python API.

    {name: wmdp_bio, type: lm_eval, task: wmdp_bio, role: forget}                            # from the hub
    {name: wmdp_bio, type: lm_eval, task: wmdp_bio, path: wmdp-bio-test.jsonl, role: forget} # from a file

| metric   | what                                                                          | range | chance |
|----------|-------------------------------------------------------------------------------|-------|--------|
| acc      | the letter of the right choice has the largest log-probability, zero-shot      | 0 … 1 | 0.25   |
| acc_norm | the same per character of the choice, where the task has it                     | 0 … 1 | 0.25   |

Higher means more knowledge: bad for a forget task (WMDP), good for a utility task (MMLU). The prompts, the scoring and
the numbers are those of the ``lm_eval`` command. A file holds what the hub's data set holds: one object a line with
``question``, four ``choices`` and the index of the right one as ``answer``; it replaces the task's test split, and no
solved examples are shown. Without a file the harness downloads the data (set HF_HUB_OFFLINE for its cache only).
References: Li et al., arXiv 2403.03218 (WMDP); Hendrycks et al., arXiv 2009.03300 (MMLU).
"""

from __future__ import annotations

import contextlib
import difflib
import io
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.evaluation.language_model import LanguageModel

INSTALL = "pip install 'trace-ds[lm-eval]'"
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class HarnessResult:
    """``metrics`` by name, ``items`` asked, and one record per item for the log."""

    metrics: dict[str, float]
    items: int
    logs: list[dict[str, Any]]


def require_harness(where: str) -> None:
    """:class:`UserError` with the install line when lm-evaluation-harness is missing."""
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the package lm-eval is not installed", where, INSTALL)


def task_spec(task: str, path: str) -> str | dict[str, Any]:
    """What the harness is asked for: the task by name, its test split read from ``path`` if there is one."""
    if not path:
        return task
    kind = {".parquet": "parquet", ".csv": "csv"}.get(Path(path).suffix, "json")
    files = {"data_files": {"test": str(Path(path).absolute())}}
    changed: dict[str, Any] = {"task": task, "dataset_path": kind, "dataset_name": None, "dataset_kwargs": files}
    changed |= {"num_fewshot": 0, "fewshot_split": "test"}  # a file holds no other split
    return {"group": "local_files", "task": [changed]}  # a member of a group is the known task with keys changed


def evaluate_harness(model: LanguageModel, task: str, path: str) -> HarnessResult:
    """Run one task (or group of tasks) on a loaded model; of several processes the main one does it for all.

    Raises:
        UserError: lm-eval is missing, knows no such task, or cannot get the data.
    """
    if model.world is None or model.world.size == 1:
        return _run(model, task, path)
    found: dict[str, Any] = model.world.broadcast_agreed(lambda: vars(_run(model, task, path)))
    return HarnessResult(**found)


def _run(model: LanguageModel, task: str, path: str) -> HarnessResult:
    require_harness(f"evaluation task {task}")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = manager.all_tasks
    if task not in known:
        close = difflib.get_close_matches(task, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists them"
        raise UserError(f"lm-eval knows no task {task!r}", "evaluation.tasks", hint)
    with _quietly():
        wrapped = HFLM(
            pretrained=model.model, tokenizer=model.tokenizer, batch_size=model.settings.batch_rows, backend="causal"
        )
        try:
            found: Any = simple_evaluate(
                model=wrapped,
                tasks=[task_spec(task, path)],
                task_manager=manager,
                bootstrap_iters=0,
            )
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(
                f"lm-eval cannot run {task} ({reason[:200]})", path or "the hub", "check the task's name and its data"
            ) from error
    numbers = found["groups"].get(task) if found.get("groups") else None
    numbers = numbers or found["results"][task]
    metrics = {name: float(numbers[f"{name},none"]) for name in METRICS if f"{name},none" in numbers}
    if not metrics:
        raise UserError(f"the task has none of {', '.join(METRICS)}", task, "choose a multiple-choice task")
    logs = [_log(name, sample) for name, samples in sorted(found["samples"].items()) for sample in samples]
    return HarnessResult(metrics, len(logs), logs)


def _log(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": f"{name}/{sample['doc_id']}",
        "source": name,
        "prompt": sample["doc"].get("question", ""),
        "answer": sample["target"],
        "log_prob": [round(float(pair[0]), 6) for pair in sample["filtered_resps"]],
        "correct": bool(sample["acc"]) if "acc" in sample else None,
    }


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The harness logs at length and draws progress bars (on stderr); neither belongs into a run's log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
