"""WMDP, MMLU and whatever else lm-evaluation-harness knows, through its Python API.

    {name: wmdp_bio, type: lm_eval, task: wmdp_bio, role: forget}                            # from the hub
    {name: wmdp_bio, type: lm_eval, task: wmdp_bio, path: wmdp-bio-test.jsonl, role: forget} # from a file
    {name: mmlu, type: lm_eval, task: mmlu, role: utility, num_fewshot: 5, apply_chat_template: true}
    {name: chem, type: lm_eval, task: my_chem, include_path: my_tasks, role: forget}         # my_tasks/*.yaml

| metric   | what                                                                          | range | chance |
|----------|-------------------------------------------------------------------------------|-------|--------|
| acc      | the letter of the right choice has the largest log-probability, zero-shot*     | 0 … 1 | 0.25   |
| acc_norm | the same per character of the choice, where the task has it                     | 0 … 1 | 0.25   |

*unless ``num_fewshot`` (or the task itself) says otherwise. ``num_fewshot`` and ``apply_chat_template`` are the
command's ``--num_fewshot`` and ``--apply_chat_template``.

Higher means more knowledge: bad for a forget task (WMDP), good for a utility task (MMLU). The prompts, the scoring and
the numbers are those of the ``lm_eval`` command. A file (``.jsonl``, ``.json`` or ``.parquet``) holds what the hub's
data set holds: ``question``, four ``choices`` and the index of the right one as ``answer``; it replaces the test split
of one task (not of a group: every task has its own prompt), and no solved examples are shown. Without a file the
harness downloads the data (set HF_HUB_OFFLINE for its cache only).
References: Li et al., arXiv 2403.03218 (WMDP); Hendrycks et al., arXiv 2009.03300 (MMLU).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.metrics import TASK_METRICS
from trace_ds.run.files import canonical_json, sha256_file, sha256_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trace_ds.parallel.world import World

INSTALL = "pip install 'trace-ds[lm-eval]'"
NAMED_TASKS = 6  # of a group, in a message
COMMIT = re.compile(r"[0-9a-f]{40}")  # the folder that `datasets` keeps a data set of the hub in


Result = tuple[dict[str, float], list[dict[str, Any]]]  # metrics by name, and one record per item for the log


def check_task(task: str, path: str, where: str, include: str | None = None) -> None:
    """Everything about a task that can be wrong before its data are read (``include``: its ``include_path``).

    Raises:
        UserError: lm-eval is missing or knows no such task; the name stands for several tasks and there is one file,
            or no score of all of them.
    """
    import importlib.util

    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the package lm-eval is not installed", where, INSTALL)
    if include is not None and not Path(include).is_dir():
        raise UserError(f"there is no directory {include}", f"{where} include_path", "name the folder of your tasks")
    index = _task_manager(task, include).task_index
    if task not in index:
        close = difflib.get_close_matches(task, index, 1)
        hint = f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists them"
        beside = f", and {include} holds no readable one" if include is not None else ""
        raise UserError(f"lm-eval knows no task {task!r}{beside}", where, hint)
    kind = index[task].kind.name
    if kind == "TAG" or (kind == "GROUP" and path):
        leaves = _leaf_tasks([task], index)
        names = ", ".join(leaves[:NAMED_TASKS]) + (f", … ({len(leaves)} tasks)" if leaves[NAMED_TASKS:] else "")
        what = "and one file can hold only one" if kind == "GROUP" else "without a common score"
        raise UserError(f"{task!r} stands for several tasks of lm-eval, {what}", where, f"name each one: {names}")


def check_template(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError when a task is to be asked through a chat template and the tokenizer has none."""
    if config.apply_chat_template and not tokenizer.chat_template:
        where = f"evaluation.tasks {config.name}"
        raise UserError("the tokenizer has no chat template", where, "leave out apply_chat_template")


def _leaf_tasks(members: list[Any], index: Any) -> list[str]:
    """The single tasks that names of tasks, groups and tags (as in the YAML file of a group) stand for."""
    found: list[str] = []
    for member in members:
        name = member if isinstance(member, str) else member.get("group") or member["task"]
        entry = index.get(name)
        kind = entry.kind.name if entry is not None else ""
        if kind == "TAG":
            found += sorted(entry.tags)
        elif kind == "GROUP" or not isinstance(member, str):
            inside = entry.cfg["task"] if kind == "GROUP" else member["task"]
            found += _leaf_tasks(inside, index) if isinstance(inside, list) else [name]
        else:
            found.append(name)
    return found


def _task_manager(task: str, include: str | None = None) -> Any:
    """An index that has ``task`` and all that it stands for, and the tasks of a folder.

    Of lm-eval's thousands of files it takes those of the folder that the task is called after (``wmdp`` of
    ``wmdp_bio``), where nothing is missing then; else all, for several seconds.
    """
    few = _indexed(re.split(r"\W|_", task)[0], include)
    known = few.task_index
    return few if task in known and known.keys() >= {*_leaf_tasks([task], known)} else _indexed("", include)


@functools.cache
def _indexed(folder: str, include: str | None) -> Any:
    """The tasks in one folder of lm-eval (empty: in all) and in a folder of the user's."""
    import lm_eval.tasks

    own = [include] if include is not None else []
    some = [Path(lm_eval.tasks.__file__).parent / folder] if folder else []
    with _quietly():
        return lm_eval.tasks.TaskManager(include_path=[*some, *own], include_defaults=not folder)


def own_tasks_sha256(include: str) -> str:
    """SHA-256 over the names and contents of all files in a folder of tasks."""
    files = [path for path in sorted(Path(include).rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return sha256_text(canonical_json([[str(path.relative_to(include)), sha256_file(path)] for path in files]))


def task_spec(task: str, path: str) -> str | dict[str, Any]:
    """What the harness is asked for: the task by name, its test split read from ``path`` if there is one."""
    if not path:
        return task
    kind = "parquet" if path.endswith(".parquet") else "json"
    files = {"data_files": {"test": str(Path(path).absolute())}}
    changed: dict[str, Any] = {"task": task, "dataset_path": kind, "dataset_name": None, "dataset_kwargs": files}
    changed |= {"num_fewshot": 0, "fewshot_split": "test"}  # a file holds no other split
    return {"group": "local_files", "task": [changed]}  # a member of a group is the known task with keys changed


def evaluate_harness(model: LanguageModel, config: TaskConfig) -> Result:
    """Run one task (or group of tasks) on a loaded model, the forward passes shared out between the processes.

    Raises:
        UserError: lm-eval cannot get the data, or the task is not multiple-choice.
        Diverged: a log-probability is not finite.
    """
    from lm_eval import simple_evaluate

    from trace_ds.evaluation.harness_model import SharedLM

    world, task = model.world, str(config.task)
    built = _built(task, config.path, config.include_path, world)
    with _quietly():
        found: Any = simple_evaluate(
            model=SharedLM(model),
            tasks=[built],
            task_manager=_task_manager(task, config.include_path),
            bootstrap_iters=0,
            num_fewshot=config.num_fewshot,
            apply_chat_template=config.apply_chat_template,
        )
    if world is None or world.size == 1:
        return _result(found, task)
    told: Result = world.broadcast_agreed(lambda: _result(found, task))
    return told


def _built(task: str, path: str, include: str | None, world: World | None) -> Any:
    """The task with its data; the main process gets them first, so a download happens once."""

    def build() -> Any:
        loaded = _loaded(task, path, include)
        for name, single in loaded["tasks"].items():
            if single.OUTPUT_TYPE != "multiple_choice":
                raise UserError(f"{name} is not multiple-choice", f"lm-eval task {task}", "choose a task that is")
        return next(iter([*loaded["groups"].values(), *loaded["tasks"].values()]))

    return build() if world is None or world.size == 1 else world.agree_each(lambda _: build())


def _loaded(task: str, path: str, include: str | None) -> Any:
    """What lm-eval makes of a name: its ``tasks``, with their data, and ``groups``."""
    try:
        with _quietly():
            return _task_manager(task, include).load([task_spec(task, path)])
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        fix = (
            "check the file" if path else "`trace-ds fetch CONFIG` where there is a network (gated data: log in first)"
        )
        raise UserError(f"lm-eval cannot read {task} ({reason[:200]})", path or "the hub", fix) from error


def require_data(config: TaskConfig, *, download: bool) -> None:
    """Find out before anything else is done that the data of a task are not in the cache: bring them, or (without
    ``download``) refuse. Nothing is read of what is there.

    Raises:
        UserError: as :func:`fetch_task`.
    """
    from trace_ds.corpora.sources import in_cache

    include = config.include_path
    task, where = str(config.task), f"evaluation.tasks.{config.name}"
    index = _task_manager(task, include).task_index
    for leaf in _leaf_tasks([task], index):
        of_leaf = getattr(index.get(leaf), "cfg", None) or {}
        data, name = of_leaf.get("dataset_path"), of_leaf.get("dataset_name")
        on_hub = isinstance(data, str) and "/" in data and not Path(data).is_dir()
        if on_hub and not in_cache(str(data), name):
            if not download:
                what = f"{data} ({name}), which lm-eval's {leaf} asks, is not in the cache"
                raise UserError(what, where, "where there is a network, `trace-ds fetch CONFIG` brings it")
            fetch_task(task, where, include)
            return


def fetch_task(task: str, where: str, include: str | None = None) -> dict[str, str]:
    """Bring the data of a task, or of a group of tasks, to the cache of ``datasets``.

    Args:
        where: the key that names it. include: its ``include_path``.

    Returns:
        {data set on the hub: commit}.

    Raises:
        UserError: as :func:`check_task`, or the data cannot be had.
    """
    check_task(task, "", where, include)
    commits: dict[str, str] = {}
    for single in _loaded(task, "", include)["tasks"].values():
        for split in single.dataset.values():
            for file in split.cache_files:
                if COMMIT.fullmatch(folder := Path(file["filename"]).parent.name):
                    commits[str(single.DATASET_PATH)] = folder
    return dict(sorted(commits.items()))


def _result(found: dict[str, Any], task: str) -> Result:
    numbers = found["groups"].get(task) if found.get("groups") else None
    numbers = numbers or found["results"][task]
    metrics = {name: float(numbers[f"{name},none"]) for name in TASK_METRICS["lm_eval"] if f"{name},none" in numbers}
    if not metrics:
        raise UserError(
            f"the task has none of {', '.join(TASK_METRICS['lm_eval'])}", task, "choose another multiple-choice task"
        )
    logs = [_log(name, sample) for name, samples in sorted(found["samples"].items()) for sample in samples]
    return metrics, logs


def _log(name: str, sample: dict[str, Any]) -> dict[str, Any]:
    log_prob = [float(pair[0]) for pair in sample["filtered_resps"]]
    choices = sample["doc"].get("choices")
    if not isinstance(choices, list) or len(choices) != len(log_prob):
        choices = [str(arguments[1]).strip() for arguments in sample["arguments"]]  # what was scored: texts or letters
    return {
        "id": f"{name}/{sample['doc_id']}",
        "source": name,
        "prompt": str(sample["doc"].get("question", "")),
        "choices": choices,
        "answer": sample["target"],
        "predicted": log_prob.index(max(log_prob)),
        "correct": bool(sample["acc"]) if "acc" in sample else None,
        "log_prob": [round(value, 6) for value in log_prob],
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
