"""Question files: JSONL, one item a line, checked completely before any model is loaded.

choice:   {"id": "q1", "prompt": "The symbol of gold is", "choices": ["Au", "Ag", "Pb", "Fe"], "answer": 0}
lm_eval:  {"question": "What is the symbol of gold?", "choices": ["Au", "Ag", "Pb", "Fe"], "answer": 0}
verbatim: {"id": "p1", "prompt": "It is a truth", "continuation": "universally acknowledged, that …"}
knowmem:  {"id": "k1", "question": "Who wrote it?", "answer": "Jane Austen"}        (or a list of accepted answers)

``id`` and ``source`` may be left out (the line number, the file's name). The ``answer`` to a choice is its 0-based
index. Perplexity, extraction and membership tasks read documents as corpora do. Every mistake is a :class:`UserError`
that names the file and the line. No torch here: checking is instant.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.schema import CorpusFile, TaskConfig
from trace_ds.corpora.read import (
    Document,
    json_lines,
    parquet_records,
    read_documents,
    refuse_surrogates,
    source_name,
)
from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, sha256_file, sha256_text
from trace_ds.terminal import plain

CHOICES = 4
BEGINNING = 200  # characters of a text that are kept in the log of its item


@dataclass(frozen=True)
class ChoiceItem:
    """A question with four choices; ``answer`` is the index of the right one."""

    id: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    source: str


@dataclass(frozen=True)
class VerbatimItem:
    """A passage cut in two: the model reads ``prompt`` and is asked for ``continuation``."""

    id: str
    prompt: str
    continuation: str
    source: str


@dataclass(frozen=True)
class QuestionItem:
    """An open question with its accepted answers."""

    id: str
    question: str
    answers: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class MembershipItem:
    """A text that the original model was trained on (a member) or not."""

    id: str
    text: str
    source: str
    member: bool


@dataclass(frozen=True)
class Task:
    """A checked task: its configuration, its items in memory and the SHA-256 of its files.

    ``examples`` are the solved questions of a knowmem task. An lm_eval task from the hub has no items here.
    """

    config: TaskConfig
    items: list[ChoiceItem] | list[VerbatimItem] | list[QuestionItem] | list[MembershipItem] | list[Document]
    sha256: str
    examples: tuple[QuestionItem, ...] = ()

    @property
    def units(self) -> int:
        """What the progress counts: completions of choice tasks, else items."""
        return len(self.items) * (CHOICES if self.config.type == "choice" else 1)


def read_tasks(configs: list[TaskConfig]) -> list[Task]:
    """Read and check the files of all tasks; :class:`UserError` for a bad file or two tasks of one name."""
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two tasks are named {name!r}", "evaluation.tasks", "rename one")
    return [read_task(config) for config in configs]


def read_task(config: TaskConfig) -> Task:
    """Read and check the files of one task."""
    items: Any
    examples: tuple[QuestionItem, ...] = ()
    paths = [path for path in (config.path, config.examples, config.holdout) if path]
    if config.type == "choice":
        items = read_choice_items(config.path)
    elif config.type == "verbatim":
        items = read_verbatim_items(config.path)
    elif config.type == "knowmem":
        items, examples = read_question_items(config.path), tuple(read_question_items(str(config.examples)))
    elif config.type == "membership":
        sides = ((_texts(config.path), True), (_texts(str(config.holdout)), False))
        items = [
            MembershipItem(f"{'member' if member else 'holdout'}/{number}", document.text, document.source, member)
            for documents, member in sides
            for number, document in enumerate(documents)
        ]
    elif config.type == "lm_eval":
        from trace_ds.evaluation.harness import check_task

        items = read_choice_items(config.path, "question") if config.path else []
        check_task(str(config.task), config.path, f"evaluation.tasks {config.name}")
    else:
        items = _texts(config.path)
    digests = [sha256_file(Path(path)) for path in paths]
    return Task(config, items, digests[0] if len(digests) == 1 else sha256_text(canonical_json(digests)), examples)


def beginning(text: str) -> str:
    """How a text begins, to recognise it by."""
    return text if len(text) <= BEGINNING else text[: BEGINNING - 1] + "…"


def _texts(path: str) -> list[Document]:
    """The documents of a task file that have any text."""
    _require_file(path)
    found = [d for d in read_documents([CorpusFile.model_validate({"path": path})]) if d.text.strip()]
    if not found:
        raise UserError("the task file has no text", path, "a score of nothing: add documents")
    return found


def read_choice_items(path: str | Path, prompt_key: str = "prompt") -> list[ChoiceItem]:
    """All questions of a choice file.

    Raises:
        UserError: missing, unreadable or empty file; a line that is no object, has no prompt, not exactly four
            non-empty choices, or an answer that is missing or out of range.
    """
    items = []
    for where, line, record in _records(path):
        prompt = _text(record, prompt_key, where)
        choices = record.get("choices")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError("'choices' is missing or not a list of texts", where, f"give {CHOICES} texts")
        if len(choices) != CHOICES:
            raise UserError(
                f"the question has {len(choices)} choices", where, f"exactly {CHOICES} are scored; correct the line"
            )
        empty = [number for number, choice in enumerate(choices) if not choice.strip()]
        if empty:
            raise UserError(f"choice {empty[0]} is empty", where, "give the choice a text")
        if record.get("answer") is None:
            raise UserError("the answer is missing", where, f"add 'answer': 0 … {CHOICES - 1}")
        answer = record["answer"]
        if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < CHOICES:
            raise UserError(
                f"the answer {answer!r} is out of range", where, f"use the index of the right choice, 0 … {CHOICES - 1}"
            )
        items.append(
            ChoiceItem(_id(record, line), prompt, tuple(choices), answer, source_name(record, Path(path), where))
        )
    return items


def read_verbatim_items(path: str | Path) -> list[VerbatimItem]:
    """All passages of a verbatim file; :class:`UserError` naming file and line for a missing or empty text."""
    return [
        VerbatimItem(
            _id(record, line),
            _text(record, "prompt", where),
            _text(record, "continuation", where),
            source_name(record, Path(path), where),
        )
        for where, line, record in _records(path)
    ]


def read_question_items(path: str | Path) -> list[QuestionItem]:
    """All open questions of a file; :class:`UserError` naming file and line for a missing question or answer."""
    items = []
    for where, line, record in _records(path):
        question = _text(record, "question", where)
        answers = record.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or not all(isinstance(answer, str) and answer.strip() for answer in answers):
            raise UserError("the answer is missing", where, "add 'answer': a text, or a list of accepted texts")
        items.append(QuestionItem(_id(record, line), question, tuple(answers), source_name(record, Path(path), where)))
    return items


def _records(path: str | Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(``FILE:LINE``, line number, object) of every line (or row) that is not blank; at least one."""
    _require_file(path)
    kind = Path(path).suffix
    if kind == ".csv":
        raise UserError("a CSV cell holds no list of choices", str(path), "convert the file to JSONL")
    file = Path(path)
    found = False
    for number, record in parquet_records(file) if kind == ".parquet" else _json_records(file):
        found = True
        yield f"{path}:{number}", number, record
    if not found:
        raise UserError("the task file is empty", str(path), "a metric over no items means nothing: add items")


def _json_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON file: an array of them, or one a line."""
    whole = None
    if path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(whole, list):
        yield from json_lines(path)
        return
    for number, record in enumerate(whole, 1):
        if not isinstance(record, dict):
            raise UserError("the item is not a JSON object", f"{path}:{number}", "an array of objects")
        refuse_surrogates(record, f"{path}:{number}")
        yield number, record


def _require_file(path: str | Path) -> None:
    if Path(path).is_dir():
        raise UserError("the task is a folder, not a file", str(path), "name a file in evaluation.tasks")
    if not Path(path).is_file():
        raise UserError("the task file does not exist", str(path), "correct evaluation.tasks in the configuration")


def _text(record: dict[str, Any], key: str, where: str) -> str:
    value = record.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"there is no text under {key!r}", where, f"give the line a {key!r}")
    return value


def _id(record: dict[str, Any], line: int) -> str:
    return plain(str(record.get("id", line)))
