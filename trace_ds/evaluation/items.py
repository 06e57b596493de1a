"""Questions: JSONL, one item a line, checked completely before any model is loaded.

choice:   {"id": "q1", "prompt": "The symbol of gold is", "choices": ["Au", "Ag", "Pb", "Fe"], "answer": 0}
verbatim: {"id": "p1", "prompt": "It is a truth", "continuation": "universally acknowledged, that …"}
knowmem:  {"id": "k1", "question": "Who wrote it?", "answer": "Jane Austen"}        (or a list of accepted answers)
tofu:     {"question": "Who wrote it?", "answer": "Jane Austen did.", "paraphrased_answer": "It is by Jane Austen.",
           "perturbed_answer": ["Charles Dickens did.", "Mary Shelley did."]}       (a paraphrase where there is one)

``id`` and ``source`` may be left out (the line number, the file's name). The ``answer`` to a choice is its 0-based
index. Perplexity and membership tasks read documents as corpora do, lm_eval tasks bring their own data. The rows of a
data set by name are read likewise, and ``columns`` says what the fields are called there. Every mistake is a
:class:`UserError` that names the file and the line. No torch here: checking is instant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.read import Document, Record, content_fingerprint, read_documents, records
from trace_ds.errors import UserError, nearest
from trace_ds.evaluation.metrics import TASK_METRICS
from trace_ds.run.files import canonical_json, sha256_text
from trace_ds.terminal import plain

KEY = "evaluation.tasks"
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
class TofuItem:
    """A question with its answer, the answer in other words ("": none) and false answers that look like it."""

    id: str
    question: str
    answer: str
    paraphrase: str
    false: tuple[str, ...]
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
    """A checked task: its configuration, its items (of the kind that its type has) and the SHA-256 of its files.

    ``examples`` are the solved questions of a knowmem task. An lm_eval task has no items here.
    """

    config: TaskConfig
    items: list[Any]
    sha256: str
    examples: tuple[QuestionItem, ...] = ()

    @property
    def units(self) -> int:
        """What the progress counts: completions of choice tasks, else items."""
        return len(self.items) * (CHOICES if self.config.type == "choice" else 1)


def read_tasks(configs: list[TaskConfig]) -> list[Task]:
    """Read and check the files of all tasks; :class:`UserError` for a bad file or two tasks of one name."""
    names = [config.name for config in configs]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UserError(f"two tasks are named {twice!r}", "evaluation.tasks", "rename one")
    return [read_task(config) for config in configs]


def read_task(config: TaskConfig) -> Task:
    """Read and check one task."""
    metrics = TASK_METRICS[config.type]
    if config.headline not in (None, *metrics):
        fix = f"headline: one of {', '.join(metrics)}"
        raise UserError(f"task {config.name}: a {config.type} task has no metric {config.headline!r}", "", fix)
    # the task's other texts: another file, or another split of its data set
    keys = [{"split": name} if config.dataset else {"path": name} for name in (config.examples, config.holdout) if name]
    others = [config.model_copy(update=key) for key in keys]
    own: list[str] = []
    if config.type != "lm_eval":
        items: list[Any] = READERS.get(config.type, _texts)(config)
    else:
        from trace_ds.evaluation.harness import check_task, own_tasks_sha256

        items = []
        check_task(config)
        if config.include_path is not None:
            own.append(own_tasks_sha256(config.include_path))
    examples = tuple(read_question_items(others[0])) if config.type == "knowmem" else ()
    if config.type == "membership":
        items = [
            MembershipItem(f"{name}/{number}", document.text, document.source, name == "member")
            for name, documents in (("member", items), ("holdout", _texts(others[0])))
            for number, document in enumerate(documents)
        ]
    digests = [content_fingerprint(named) for named in (config, *others) if named.place] + own
    digest: Any = digests[0] if len(digests) == 1 else digests
    if config.columns:
        digest = [digest, config.columns]
    return Task(config, items, digest if isinstance(digest, str) else sha256_text(canonical_json(digest)), examples)


def beginning(text: str) -> str:
    """How a text begins, to recognise it by."""
    return text if len(text) <= BEGINNING else text[: BEGINNING - 1] + "…"


def _texts(config: TaskConfig) -> list[Document]:
    """The documents of a task that have any text."""
    keys = ("path", "dataset", "config", "split")
    named = {key: getattr(config, key) for key in keys} | {"template": f"{{{config.columns.get('text', 'text')}}}"}
    documents = [d for d in read_documents([CorpusEntry.model_validate(named)], KEY) if d.text.strip()]
    if not documents:
        raise UserError("the task file has no text", config.place, "a score of nothing: add documents")
    return documents


def read_choice_items(config: TaskConfig) -> list[ChoiceItem]:
    """Items of lines with ``prompt``, ``choices`` and ``answer``, the index of the right choice."""
    items = []
    for entry in _records(config):
        prompt, where = _text(entry, "prompt"), entry.where
        choices, answer = entry.values.get("choices"), entry.values.get("answer")
        if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
            raise UserError("'choices' is missing or not a list of texts", where, f"give {CHOICES} texts")
        if len(choices) != CHOICES:
            problem = f"the question has {len(choices)} choices"
            raise UserError(problem, where, f"exactly {CHOICES} are scored; correct the line")
        empty = [number for number, choice in enumerate(choices) if not choice.strip()]
        if empty:
            raise UserError(f"choice {empty[0]} is empty", where, "give the choice a text")
        if type(answer) is not int or not 0 <= answer < CHOICES:
            problem = "the answer is missing" if answer is None else f"the answer {answer!r} is out of range"
            raise UserError(problem, where, f"use the index of the right choice, 0 … {CHOICES - 1}")
        items.append(ChoiceItem(_id(entry), prompt, tuple(choices), answer, entry.source))
    return items


def read_verbatim_items(config: TaskConfig) -> list[VerbatimItem]:
    """Items of lines with ``prompt`` and ``continuation``."""
    return [
        VerbatimItem(_id(entry), _text(entry, "prompt"), _text(entry, "continuation"), entry.source)
        for entry in _records(config)
    ]


def read_question_items(config: TaskConfig) -> list[QuestionItem]:
    """Items of lines with ``question`` and ``answer``, one text or a list of accepted ones."""
    items = []
    for entry in _records(config):
        question, answers = _text(entry, "question"), entry.values.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not _are_texts(answers):
            raise UserError("the answer is missing", entry.where, "add 'answer': a text, or a list of accepted texts")
        items.append(QuestionItem(_id(entry), question, tuple(answers), entry.source))
    return items


def read_tofu_items(config: TaskConfig) -> list[TofuItem]:
    """Items of lines with TOFU's own columns: question, answer, paraphrased_answer, perturbed_answer."""
    items = []
    for entry in _records(config):
        false = entry.values.get("perturbed_answer")
        if not isinstance(false, list) or not _are_texts(false):
            raise UserError("there is no list of texts under 'perturbed_answer'", entry.where, "give false answers")
        paraphrase = _text(entry, "paraphrased_answer") if entry.values.get("paraphrased_answer") else ""
        texts = _text(entry, "question"), _text(entry, "answer"), paraphrase
        items.append(TofuItem(_id(entry), *texts, tuple(false), entry.source))
    return items


READERS: dict[str, Callable[[TaskConfig], list[Any]]] = {  # the others read texts
    "choice": read_choice_items,
    "verbatim": read_verbatim_items,
    "knowmem": read_question_items,
    "tofu": read_tofu_items,
}


def _records(config: TaskConfig) -> Iterator[Record]:
    """Every line (or row) that is not blank, its columns under our names; at least one."""
    if config.type == "choice" and config.path.endswith(".csv"):
        raise UserError("a CSV cell holds no list of choices", config.path, "convert the file to JSONL")
    number = 0
    for number, record in enumerate(records(config, KEY), 1):  # noqa: B007
        values = record.values
        for ours, theirs in config.columns.items():
            if theirs not in values:
                fix = f"{nearest(theirs, list(values))}correct columns of the task"
                raise UserError(f"there is no column {theirs!r}", record.where, fix)
            values = values | {ours: record.values[theirs]}
        yield dataclasses.replace(record, values=values)
    if not number:
        raise UserError("the task file is empty", config.place, "a metric over no items means nothing: add items")


def _are_texts(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value.strip() for value in values)


def _text(record: Record, key: str) -> str:
    value = record.values.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"there is no text under {key!r}", record.where, f"give the line a {key!r}")
    return value


def _id(record: Record) -> str:
    return plain(str(record.values.get("id", record.label)))
