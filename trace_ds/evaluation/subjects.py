"""Which models are scored, whether they may be compared, and what identifies a result.

A result is made anew only when something that determines it has changed: the model, the tokenizer, a task's file, a
setting that changes scores, or :data:`EVALUATION_FORMAT`. The batch size and the device are left out:
they change at most the last digits.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.sections.base import ORIGINAL, UNLEARNED
from trace_ds.config.sections.data import DataConfig
from trace_ds.config.sections.evaluation import EvaluationConfig
from trace_ds.corpora.tokenizer import VOCABULARY_FILES, load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.metrics import DRIFT_ROWS
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import canonical_json, sha256_text
from trace_ds.run.foreign import read_object
from trace_ds.tensors.model_files import model_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EVALUATION_FORMAT = 5  # raise it when a metric or the form of a result changes: old results are then computed anew


@dataclass(frozen=True)
class Subject:
    """A model to score: its result is ``RUN/evaluation/NAME.json``; the path and fingerprint of its directory."""

    name: str
    path: Path
    fingerprint: str


def named_models(original: str, settings: EvaluationConfig) -> dict[str, Path]:
    """The model directories that the configuration names, the original first."""
    return {ORIGINAL: Path(original)} | {name: Path(path) for name, path in settings.models.items()}


def find_subjects(original: str, settings: EvaluationConfig, run: RunDirectory, *, unlearned: bool) -> list[Subject]:
    """The original, further and (if ``unlearned``) unlearned models, in this order; UserError when one is missing."""
    named = named_models(original, settings)
    if unlearned:
        if not run.model.is_dir():
            fix = "make it with `trace-ds unlearn` and `trace-ds convert`"
            raise UserError("there is no unlearned model here", str(run.model), fix)
        named |= {UNLEARNED: run.model}
    return [Subject(name, path, model_fingerprint(path)) for name, path in named.items()]


def require_same_tokenizer(path: Path, reference: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model directory whose tokenizer cuts text into other tokens than the run's; none at all is fine.

    Equal files are equal; files written by another version may still hold the same tokenizer, so those are compared
    by what they contain.
    """
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        return
    if tokenizer_fingerprint(path) == tokenizer_fingerprint(reference):
        return
    if tokenizer_content(load_tokenizer(path)) != tokenizer_content(tokenizer):
        problem = "the model's tokenizer is not the run's, so their scores cannot be compared"
        raise UserError(problem, str(path), f"use a model with the tokenizer of {reference}")


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What decides how a tokenizer cuts text: vocabulary, rules and special tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for irrelevant in ("truncation", "padding", "version", "post_processor"):  # special tokens are added by us
        rules.pop(irrelevant, None)
    return {
        "rules": rules,
        "vocabulary": tokenizer.get_vocab(),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
    }


def identity(
    settings: EvaluationConfig,
    data: DataConfig,
    dtype: str,
    subject: Subject,
    tasks: list[Task],
    tokenizer: str,
    drift: dict[str, str] | None,
    relearning: dict[str, Any] | None,
) -> str:
    """SHA-256 over everything that determines the result of one model: the settings, the type of the forward pass, the
    fingerprint of the run's tokenizer, what a drift is measured against and what relearning needs (None: none).
    """
    fingerprints = task_fingerprints(tasks, settings.max_new_tokens)
    content: dict[str, Any] = {
        "format": EVALUATION_FORMAT,
        "name": subject.name,
        "model": subject.fingerprint,
        "tokenizer": tokenizer,
        "tasks": [
            [task.config.name, task.config.role, Path(task.config.path).stem, fingerprints[task.config.name]]
            for task in tasks
        ],
        "settings": {"dtype": dtype, **data.model_dump(include={"add_bos", "add_eos", "context_length"})},
        "drift": drift and {**drift, "rows": DRIFT_ROWS},
        "relearning": relearning,
    }
    return sha256_text(canonical_json(content))


def task_fingerprints(tasks: list[Task], max_new_tokens: int) -> dict[str, str]:
    """By task name a SHA-256 over its questions and how they are put: scores of equal ones may be compared."""
    fingerprints = {}
    for task in tasks:
        content = {
            "type": task.config.type,
            "files": task.sha256,
            "task": task.config.task,
            "max_new_tokens": max_new_tokens if task.config.type in ("verbatim", "tofu") else None,
            **task.config.model_dump(include={"num_fewshot", "apply_chat_template"}),
        }
        fingerprints[task.config.name] = sha256_text(canonical_json(content))
    return fingerprints


def read_scored(path: Path) -> dict[str, Any] | None:
    """A written result, or None when it is not there or not whole."""
    try:
        return read_object(path, "the result", "")
    except UserError:
        return None


def has_identity(path: Path, expected: str) -> bool:
    result = read_scored(path)
    return result is not None and result.get("identity") == expected
