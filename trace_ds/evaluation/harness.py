"""WMDP, MMLU and whatever else lm-evaluation-harness knows, through its Python API.

    {name: wmdp_bio, type: lm_eval, task: wmdp_bio, role: forget}                            # from the hub
    {name: mmlu, type: lm_eval, task: mmlu, role: utility, num_fewshot: 5, apply_chat_template: true}
    {name: chem, type: lm_eval, task: my_chem, include_path: my_tasks, role: forget}         # my_tasks/*.yaml

The prompts, the scoring and the numbers (``acc``, ``acc_norm``; zero-shot unless ``num_fewshot`` or the task says
otherwise) are those of the ``lm_eval`` command, which downloads the data (set HF_HUB_OFFLINE for its cache only).
References: Li et al., arXiv 2403.03218 (WMDP); Hendrycks et al., arXiv 2009.03300 (MMLU).

A task is code of others, also where it is only a template: all calls into lm-eval go through :func:`_task_code`, which
makes a :class:`UserError` of whatever is raised there. Of a job of several processes only the main one runs lm-eval;
the others take part in the forward passes that it asks for.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import io
import itertools
import logging
import random
import re
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.evaluation.language_model import LanguageModel, Sequence
from trace_ds.evaluation.metrics import TASK_METRICS
from trace_ds.run.files import canonical_json, sha256_file, sha256_text
from trace_ds.run.foreign import read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INSTALL = "pip install 'trace-ds[lm-eval]'"
MAX_TASK_BYTES = 1 << 24
NAMED_TASKS = 6  # of a group, in a message
FETCH = "`trace-ds fetch CONFIG` where there is a network (gated data: log in first)"

Result = tuple[dict[str, float], list[dict[str, Any]]]  # metrics by name, and one record per item for the log


class ForwardFailed(BaseException):
    """Carries an error of the model's forward pass through lm-eval."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


def check_task(config: TaskConfig) -> None:
    """Everything about a task that can be wrong before its data are read.

    Raises:
        UserError: lm-eval is missing or knows no such task; a file of ``include_path`` is no YAML; the name stands for
            several tasks that have no common score.
    """
    where, task, include = f"evaluation.tasks {config.name}", str(config.task), config.include_path
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("the package lm-eval is not installed", where, _INSTALL)
    if include is not None:
        if not Path(include).is_dir():
            raise UserError(f"there is no directory {include}", f"{where} include_path", "name a folder of tasks")
        for path in _yaml_files(include):
            _check_yaml(path)
    with _task_code(config):
        index = _task_manager(task, include).task_index
        leaves = _leaf_tasks([task], index) if task in index else []
    if task not in index:
        close = difflib.get_close_matches(task, map(str, index), 1)  # a task file may be named by a number
        hint = f"did you mean {close[0]!r}?" if close else "`lm_eval ls tasks` lists them"
        beside = f", and no file in {include} defines it" if include is not None else ""
        raise UserError(f"lm-eval knows no task {task!r}{beside}", where, hint)
    if index[task].kind.name == "TAG":
        names = ", ".join(leaves[:NAMED_TASKS]) + (f", … ({len(leaves)} tasks)" if leaves[NAMED_TASKS:] else "")
        problem = f"{task!r} stands for several tasks of lm-eval, without a common score"
        raise UserError(problem, where, f"name each one: {names}")


def check_template(config: TaskConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """UserError when a task needs a chat template and the tokenizer has none."""
    if config.apply_chat_template and not tokenizer.chat_template:
        where = f"evaluation.tasks {config.name}"
        raise UserError("the tokenizer has no chat template", where, "leave out apply_chat_template")


def _yaml_files(include: str) -> list[Path]:
    return [path for path in sorted(Path(include).rglob("*.yaml")) if not path.is_dir()]


def _read_task_file(path: Path) -> str:
    return read_text(path, "the task", "correct the file, or take it out of the folder", MAX_TASK_BYTES)


def _check_yaml(path: Path) -> None:
    """UserError for a file with a syntax error, which lm-eval skips silently."""
    import yaml

    try:
        yaml.compose(_read_task_file(path), Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
        line = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"the file is not valid YAML ({problem})", f"{path}{line}", "correct the file") from None


@contextlib.contextmanager
def _task_code(config: TaskConfig) -> Iterator[None]:
    """The boundary around lm-eval and the code of tasks: an error there, of any kind, becomes a :class:`UserError`.
    lm-eval's own logs and progress bars (at length, on stderr) are not shown."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    except ForwardFailed as failure:
        raise failure.error from None
    except (UserError, MemoryError):
        raise
    except (Exception, SystemExit) as error:
        text = str(error).strip()
        reason = f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__
        if isinstance(error, RecursionError):
            reason = "a group of tasks contains itself, or a function never ends"
        where = _find_place(error, config) or "the hub"
        fix = "correct the task" if config.include_path else FETCH
        raise UserError(f"lm-eval cannot run the task {config.task} ({reason})", where, fix) from error
    finally:
        logger.setLevel(level)


def _find_place(error: BaseException, config: TaskConfig) -> str:
    """Where in the user's folder of tasks an error arose: the line of a function, else the file of the task."""
    if config.include_path is None:
        return ""
    folder = Path(config.include_path).resolve()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if folder in Path(f.filename).resolve().parents]
    if frames:
        return f"{frames[-1].filename} line {frames[-1].lineno}"
    name = re.compile(rf"(?m)^(task|group):\s*['\"]?{re.escape(str(config.task))}['\"]?\s*$")
    files = (path for path in _yaml_files(config.include_path) if name.search(_read_task_file(path)))
    return str(next(files, config.include_path))


def _leaf_tasks(members: list[Any], index: Any) -> list[str]:
    """The single tasks that names of tasks, groups and tags (as in the YAML file of a group) stand for."""
    leaves: list[str] = []
    for member in members:
        name = member if isinstance(member, str) else member.get("group") or member["task"]
        entry = index.get(name)
        kind = entry.kind.name if entry is not None else ""
        if kind == "TAG":
            leaves += sorted(entry.tags)
        elif kind == "GROUP" or not isinstance(member, str):
            inside = entry.cfg["task"] if kind == "GROUP" else member["task"]
            leaves += _leaf_tasks(inside, index) if isinstance(inside, list) else [name]
        else:
            leaves.append(name)
    return leaves


def _task_manager(task: str, include: str | None = None) -> Any:
    """An index that has ``task`` and all that it stands for, and the tasks of a folder.

    Of lm-eval's thousands of files it takes those of the folder that the task is called after (``wmdp`` of
    ``wmdp_bio``), where nothing is missing then; else all, for several seconds.
    """
    own = include and own_tasks_sha256(include)
    few = _indexed(re.split(r"\W|_", task)[0], include, own)
    index = few.task_index
    return few if task in index and index.keys() >= {*_leaf_tasks([task], index)} else _indexed("", include, own)


@functools.lru_cache(8)
def _indexed(folder: str, include: str | None, own: str | None) -> Any:
    """The tasks in one folder of lm-eval (empty: in all) and in a folder of the user's (``own``: its hash)."""
    import lm_eval.tasks

    some = [Path(lm_eval.tasks.__file__).parent / folder] if folder else []
    paths = [*some, *([include] if include is not None else [])]
    return lm_eval.tasks.TaskManager(include_path=paths, include_defaults=not folder)


def own_tasks_sha256(include: str) -> str:
    """SHA-256 over the names and contents of all files in a folder of tasks."""
    files = [path for path in sorted(Path(include).rglob("*")) if path.is_file() and "__pycache__" not in path.parts]
    return sha256_text(canonical_json([[str(path.relative_to(include)), sha256_file(path)] for path in files]))


def _load(config: TaskConfig) -> Any:
    """What lm-eval makes of a name: its ``tasks``, with their data, and ``groups``."""
    task = str(config.task)
    return _task_manager(task, config.include_path).load([task])


def evaluate_harness(model: LanguageModel, config: TaskConfig) -> Result:
    """Run one task (or group of tasks) on a loaded model, the forward passes shared out between the processes.

    Raises:
        UserError: lm-eval cannot get the data, the task is not multiple-choice, or its code fails.
        Diverged: a log-probability is not finite.
    """
    world = model.world
    if world is None or world.size == 1:
        return _evaluate(config, model)
    if not world.is_main:
        while (sequences := world.broadcast(None)) is not None:
            model.score(sequences)

    def run_and_release() -> Result:
        try:
            result = _evaluate(config, model)
        except UserError:
            world.broadcast(None)
            raise
        world.broadcast(None)
        return result

    return world.run_on_main_and_broadcast(run_and_release)


def _evaluate(config: TaskConfig, model: LanguageModel) -> Result:
    rehearse(config)
    with _task_code(config):
        return _read_results(_run(_harness_model(model), config, config.apply_chat_template), str(config.task))


def rehearse(config: TaskConfig) -> None:
    """Run a task of the user's own once without a model: :class:`UserError` where it fails, or where a question has no
    right choice (its accuracy would be 0 for any model)."""
    if config.include_path is not None:
        _rehearse(config.model_dump_json(), own_tasks_sha256(config.include_path))


@functools.lru_cache(64)
def _rehearse(config_json: str, own: str) -> None:
    from lm_eval.models.dummy import DummyLM

    config = TaskConfig.model_validate_json(config_json)
    with _task_code(config):
        _read_results(_run(DummyLM(), config, False), str(config.task))


def _run(lm: Any, config: TaskConfig, apply_chat_template: bool) -> dict[str, Any]:
    """lm-eval's results of a task, with the random states of its command."""
    from lm_eval import simple_evaluate

    with _random_states(), _without_environment():  # random states before tasks are read, which some shuffle
        loaded = _load(config)
        for name, single in loaded["tasks"].items():
            if single.OUTPUT_TYPE != "multiple_choice":
                where = f"lm-eval task {config.task}"
                raise UserError(f"{name} is not multiple-choice", where, "choose a task that is")
        results: Any = simple_evaluate(
            model=lm,
            tasks=[next(iter([*loaded["groups"].values(), *loaded["tasks"].values()]))],
            task_manager=_task_manager(str(config.task), config.include_path),
            bootstrap_iters=0,
            num_fewshot=config.num_fewshot,
            apply_chat_template=apply_chat_template,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        if config.include_path is not None:
            for single in loaded["tasks"].values():
                _require_right_choices(single, config)
        return dict(results)


@contextlib.contextmanager
def _without_environment() -> Iterator[None]:
    """Keep lm-eval from asking git and pip about this machine.

    Outside a repository git complains on the terminal, and nothing here reads the answers.
    """
    from lm_eval import evaluator

    kept = evaluator.get_git_commit_hash, evaluator.add_env_info
    evaluator.get_git_commit_hash = evaluator.add_env_info = lambda *_: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash, evaluator.add_env_info = kept


@contextlib.contextmanager
def _random_states() -> Iterator[None]:
    """Those of the ``lm_eval`` command inside the block; the job's own are put back."""
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_available() else []):
            random.seed(DEFAULT_RANDOM_SEED)
            np.random.seed(DEFAULT_OTHER_SEED)
            torch.manual_seed(DEFAULT_OTHER_SEED)
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _require_right_choices(task: Any, config: TaskConfig) -> None:
    """Refuse a task with a question that stays wrong whichever choice a model prefers: its target names no choice."""
    for number, group in itertools.groupby(task.instances, key=lambda instance: instance.doc_id):
        requests = list(group)
        for best in range(len(requests)):
            answers = [(0.0, True) if place == best else (-1.0, False) for place in range(len(requests))]
            metrics = task.process_results(requests[0].doc, answers)
            scores = [metrics[name] for name in TASK_METRICS["lm_eval"] if name in metrics]
            if not scores or any(scores):
                break
        else:
            target = repr(task.doc_to_target(requests[0].doc))
            raise UserError(
                f"question {number} of lm-eval's task {task.task_name} has the target {target[:80]}, which names none "
                f"of its {len(requests)} choices",
                _find_place(ValueError(), config),
                "doc_to_target must give the index or the text of a choice",
            )


def _harness_model(model: LanguageModel) -> Any:
    """The harness's own Hugging Face model cuts text into tokens; ``model`` computes the log-probabilities."""
    from lm_eval.models.huggingface import HFLM

    class SharedLM(HFLM):
        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: Any = None) -> Any:
            sequences = []
            for (_, text), context, continuation in requests:
                if not continuation:
                    raise ValueError(f"the choice {text!r} has no token of its own")
                ids = tuple(context + continuation)[-(self.max_length + 1) :]
                sequences.append(Sequence(ids, max(1, len(ids) - len(continuation))))
            try:
                if model.world is not None and model.world.size > 1:
                    model.world.broadcast(sequences)
                scores = model.score(sequences)
            except BaseException as error:
                raise ForwardFailed(error) from error
            return [(float(each.log_prob.sum(dtype=np.float64)), bool(each.is_argmax.all())) for each in scores]

    # not the model itself: of a sharded one nothing may be done on the main process alone
    described: Any = SimpleNamespace(config=model.model.config, device=model.device)
    return SharedLM(described, backend="causal", tokenizer=model.tokenizer, batch_size=model.settings.batch_rows)


def hub_data_of(config: TaskConfig) -> list[tuple[str, str, str | None]]:
    """(task, data set on the hub, its configuration) of each task that a name stands for."""
    task = str(config.task)
    with _task_code(config):
        index = _task_manager(task, config.include_path).task_index
        leaves = _leaf_tasks([task], index)
    keys = ((leaf, getattr(index.get(leaf), "cfg", None) or {}) for leaf in leaves)
    named = ((leaf, str(cfg.get("dataset_path")), cfg.get("dataset_name")) for leaf, cfg in keys)
    return [each for each in named if "/" in each[1] and not Path(each[1]).is_dir()]


def require_data(config: TaskConfig, *, download: bool) -> None:
    """Check that the data of a task are in the cache, and that a task of the user's own runs: download missing data, or
    (without ``download``) refuse."""
    from trace_ds.corpora.sources import in_cache

    where = f"evaluation.tasks.{config.name}"
    for leaf, data, name in hub_data_of(config):
        if not in_cache(data, name):
            if not download:
                problem = f"{data} ({name}), which lm-eval's {leaf} needs, is not in the cache"
                raise UserError(problem, where, "where there is a network, `trace-ds fetch CONFIG` brings it")
            fetch_task(config)
            break
    rehearse(config)


def fetch_task(config: TaskConfig) -> None:
    """Bring the data of a task, or of a group of tasks, to the cache of ``datasets``."""
    check_task(config)
    with _task_code(config):
        _load(config)


def _read_results(results: dict[str, Any], task: str) -> Result:
    numbers = results["groups"].get(task) if results.get("groups") else None
    numbers = numbers or results["results"][task]
    metrics = {name: float(numbers[f"{name},none"]) for name in TASK_METRICS["lm_eval"] if f"{name},none" in numbers}
    if not metrics:
        names = ", ".join(TASK_METRICS["lm_eval"])
        raise UserError(f"the task has none of {names}", f"lm-eval task {task}", "choose another multiple-choice task")
    logs = [_log(name, sample) for name, samples in sorted(results["samples"].items()) for sample in samples]
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
