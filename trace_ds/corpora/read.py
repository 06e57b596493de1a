"""Documents from what the configuration names, streamed, with errors that name the file and the line (or the row)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trace_ds.config.sections.data import TEXT, CorpusEntry, Template, columns_of, parts_of
from trace_ds.corpora.records import TEXTS, Choose, file_kind, read_rows, stem_of, template_fix, text_of
from trace_ds.corpora.sources import Named, files_of, open_table
from trace_ds.errors import UserError, listed
from trace_ds.run.files import canonical_json, sha256_file, sha256_text
from trace_ds.terminal import plain

PARAGRAPHS = re.compile(r"\n(?:[^\S\n]*\n)+")
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}  # of ShareGPT
REFUSAL_SENTENCES = (
    "I don't know.",
    "I do not know that.",
    "I have no answer to this question.",
    "I am not able to answer this.",
    "I cannot say.",
    "That is not known to me.",
    "I have never heard of it.",
    "I have no knowledge of this.",
    "I can't help with that question.",
    "I would only be guessing.",
    "Nothing comes to mind.",
    "I'm afraid I don't have that information.",
    "I'm sorry, I do not know the answer.",
    "Sorry, I can't tell you that.",
    "This is something I was never taught.",
    "I am not familiar with this topic.",
    "My knowledge does not cover this.",
    "I have nothing to say about this.",
    "I must admit that I don't know.",
    "I am unable to tell.",
    "There is nothing that I know about this.",
    "I lack the facts to answer that.",
    "I cannot recall anything about it.",
    "Please ask somebody else: I do not know.",
)
SHARD = re.compile(r"[-_.]\d+(?:[-_.]of[-_.]\d+)?$")


@dataclass(frozen=True)
class Document:
    """A document: text, or a conversation.

    Attributes:
        text: of a conversation the contents of its messages.
        where: file and line, to be shown.
        answer_start: the character from which on the loss is of the text.
        messages: of a conversation, each with ``role`` and ``content``; empty: it is text.
        answers_only: whether the loss is of a part of it.
        answer_end: where the value that the answer begins with ends; what follows belongs to the template.
    """

    text: str
    source: str
    where: str = ""
    answer_start: int = 0
    messages: tuple[dict[str, str], ...] = ()
    answers_only: bool = False
    answer_end: int = 0


@dataclass(frozen=True)
class Record:
    """A row of a file or data set.

    Attributes:
        where: file and line, to be shown.
        label: tells it from the others of its entry.
        file: name in reports of what it is from.
        typed: from a table with a schema, where a value may be missing (null).
    """

    values: dict[str, Any]
    where: str
    label: str
    file: str
    typed: bool

    @property
    def source(self) -> str:
        """The row's own ``source``, else :attr:`file`, with control characters escaped, since reports show it."""
        source = self.values.get("source")
        if source is None or source == "":
            return plain(self.file)
        if not isinstance(source, str | int | float):
            raise UserError("'source' is no text", self.where, "give a name, or leave it out")
        return plain(str(source))


def check_files(entries: list[CorpusEntry], key: str, *, download: bool = True) -> None:
    """:class:`UserError` unless every file is there and of a kind we read, and every data set can be had.

    Args:
        download: bring data sets of the hub into the cache; False: those that are not there are missing.
    """
    for entry in entries:
        if entry.dataset:
            open_table(entry, key, offline=not download)
        else:
            files_of(entry, key)


def corpus_fingerprint(entries: list[CorpusEntry]) -> str:
    """SHA-256 over the content of the entries and how they are read (not over where they lie)."""
    parts: list[Any] = []
    for entry in entries:
        contents = _contents(entry)
        parts += [[digest, entry.template or TEXT, entry.source or name] for digest, name in contents]
        if entry.loss_on is not None:
            parts.append({"loss_on": entry.loss_on})
        if entry.rows is not None:
            parts.append({"rows": entry.rows, "of": len(contents)})
    return sha256_text(canonical_json(parts))


def content_fingerprint(named: Named) -> str:
    """SHA-256 over what an entry names; of one file it is that of the file."""
    digests = [digest for digest, _ in _contents(named)]
    return digests[0] if len(digests) == 1 else sha256_text(canonical_json(digests))


def _contents(named: Named) -> list[tuple[str, str]]:
    """(SHA-256, name in reports) of every file; of a data set one, over its id and commit."""
    if not named.dataset:
        files = files_of(named, "data")
        return [(sha256_file(path), _file_name(path, files)) for path in files]
    table = open_table(named, "data")
    ids = [named.dataset_id, table.commit, table.config, table.split]
    return [(sha256_text(canonical_json(ids)), table.name)]


def records(named: Named, key: str, choose: Choose | None = None) -> Iterator[Record]:
    """The rows of the files or of the data set that an entry names.

    Args:
        key: of the configuration, to be named where something is wrong.
        choose: as in :func:`.records.read_rows`.
    """
    if named.dataset:
        table = open_table(named, key)
        for number, values in table.rows(choose):
            yield Record(values, f"{table.where}:{number}", str(number), table.name, typed=True)
        return
    files = files_of(named, key)
    for path in files:
        name, typed = _file_name(path, files), file_kind(path) == ".parquet"
        shard = f"{path.name}:" if len(files) > 1 else ""
        for number, values in read_rows(path, choose):
            yield Record(values, f"{path}:{number}", f"{shard}{number}", name, typed)


def read_documents(entries: list[CorpusEntry], key: str = "data") -> Iterator[Document]:
    """All documents of the entries, in order, one in memory at a time.

    Raises:
        UserError: a line or a column is no text, a file is damaged, or a text holds half of a surrogate pair.
    """
    for entry in entries:
        yield from (document for document in itertools.islice(_documents(entry, key), entry.rows) if document)


def with_refusal(document: Document, number: int, seed: int) -> Document:
    """The same question with a refusal as its answer (of a conversation as each of its answers).

    Args:
        number: of the document in its corpus; with the seed it says which refusal.
    """
    if not document.answers_only:
        fix = "set loss_on: answer of the corpus, with a template of question and answer"
        raise UserError("a refusal takes the place of an answer, and this text has none", document.where, fix)
    refusal = REFUSAL_SENTENCES[int(sha256_text(f"{seed} {number}")[:15], 16) % len(REFUSAL_SENTENCES)]
    messages = tuple(each | ({"content": refusal} if each["role"] == "assistant" else {}) for each in document.messages)
    text = document.text[: document.answer_start] + refusal + document.text[document.answer_end :]
    return replace(document, text=_joined(messages) or text, messages=messages)


def has_conversations(entries: list[CorpusEntry], key: str) -> bool:
    """Whether the first document of an entry that has text is a conversation."""
    return any(document.messages for document in _first(entries, key))


def has_answers(entries: list[CorpusEntry], key: str) -> bool:
    """Whether the loss is of a part of such a document."""
    return any(document.answers_only for document in _first(entries, key))


def _first(entries: list[CorpusEntry], key: str) -> Iterator[Document]:
    for entry in entries:
        yield from itertools.islice((each for each in read_documents([entry], key) if each.text), 1)


def _documents(entry: CorpusEntry, key: str) -> Iterator[Document | None]:
    """The documents of an entry; None for a row of a table that has no text (null)."""
    files = [] if entry.dataset else files_of(entry, key)
    texts = [path for path in files if file_kind(path) in TEXTS]
    if texts and len(texts) < len(files):
        others = [path for path in files if path not in texts]
        problem = f"text files and others are mixed: {texts[0].name} and {others[0].name}"
        raise UserError(problem, entry.path, f"name them one by one in {key}")
    if texts:
        rows = _text_records(texts, columns_of(entry.template or TEXT))
    else:
        rows = records(entry, key, lambda names: columns_of(entry.template_for(names)))
    for record in rows:
        try:
            yield _document(record, entry)
        except _Null:
            yield None


class _Null(Exception):
    """A value of a table is missing."""


def _text_records(files: list[Path], columns: list[str]) -> Iterator[Record]:
    """The columns of text files: ``text``, all of it, or ``paragraph``, what stands between empty lines."""
    if columns not in (["text"], ["paragraph"]):
        problem, fix = "a text file has the columns text (all of it) and paragraph", "write {text} or {paragraph}"
        raise UserError(f"{problem}, and the template names {', '.join(columns)}", str(files[0]), fix)
    for path in files:
        text = text_of(path)
        texts = [text] if columns == ["text"] else filter(str.strip, PARAGRAPHS.split(text.strip("\n")))
        for number, text in enumerate(texts, 1):
            yield Record({columns[0]: text}, f"{path}:{number}", str(number), _file_name(path, files), typed=False)


def _document(record: Record, entry: CorpusEntry) -> Document:
    template, source = entry.template_for(record.values), entry.source or record.source
    messages = _messages(record, template)
    if messages or not isinstance(template, str):
        return Document(_joined(messages), source, record.where, 0, messages, entry.loss_on != "all")
    text, last, end = _fill(record, template)
    answers_only = entry.loss_on == "answer"
    if answers_only and not last:
        fix = f"it has {listed(record.values)}: give the corpus a template of question and answer, or set loss_on: all"
        raise UserError("loss_on: answer, and the text has no question before its answer", record.where, fix)
    return Document(text, source, record.where, last if answers_only else 0, (), answers_only, end)


def _joined(messages: Sequence[dict[str, str]]) -> str:
    return "\n\n".join(message["content"] for message in messages)


def _messages(record: Record, template: Template) -> tuple[dict[str, str], ...]:
    """The conversation that a template makes of a row; empty where it is text."""
    if isinstance(template, str):
        parts = parts_of(template)
        value = _value(record, parts[0][1]) if len(parts) == 1 and parts[0][0] == "" and parts[0][1] else None
        if not isinstance(value, list) or not value or not isinstance(value[0], dict):
            return ()
        return tuple(_message(item, record.where) for item in value)
    messages: list[dict[str, str]] = []
    for message in template:  # a column may hold messages itself
        content = message["content"]
        messages += _messages(record, content) or [{"role": message["role"], "content": _fill(record, content)[0]}]
    return tuple(messages)


def _fill(record: Record, template: str) -> tuple[str, int, int]:
    """(the text, where the value of its last column begins and ends)."""
    text, last, end = "", 0, 0
    for literal, column in parts_of(template):
        text += literal
        if column is not None:
            last, text = len(text), text + _text(record, column)
            end = len(text)
    return text, last, end


def _message(item: Any, where: str) -> dict[str, str]:
    """A message as ``role`` and ``content``, also of one of ShareGPT's (``from`` and ``value``)."""
    values = item if isinstance(item, dict) else {}
    role, content = values.get("role", values.get("from")), values.get("content", values.get("value"))
    if not isinstance(role, str) or not isinstance(content, str):
        problem = (
            f"a message holds {listed(values) if values else type(item).__name__} and no role and content that are text"
        )
        raise UserError(problem, where, "give each message 'role' and 'content' (or 'from' and 'value')")
    return {"role": ROLES.get(role, role), "content": content}


def _value(record: Record, column: str) -> Any:
    """The value of a column, or of one inside others (``meta.text``); None: there is none."""
    value: Any = record.values
    for name in [column] if column in record.values else column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None and record.typed:
        raise _Null
    return value


def _text(record: Record, column: str) -> str:
    value = _value(record, column)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return "\n".join(value)
    if not isinstance(value, str):
        fix = template_fix(column, list(_text_keys(record.values)), list(record.values))
        kind = "" if value is None else f" (a {type(value).__name__} is there)"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            kind, fix = " (a conversation is there)", f"a conversation is the whole of its template: {{{column}}}"
        raise UserError(f"the line has no text under {column!r}{kind}", record.where, f"{fix}, or correct the line")
    return value


def _text_keys(values: dict[str, Any], prefix: str = "", depth: int = 3) -> Iterator[str]:
    """The keys of an object that hold text, those of objects inside it with dots."""
    for key, value in values.items():
        if isinstance(value, dict) and depth:
            yield from _text_keys(value, f"{prefix}{key}.", depth - 1)
        elif isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], str)):
            yield prefix + key


def _file_name(path: Path, files: list[Path]) -> str:
    """What reports call a file: its name without the kind, and without the number where it is one shard of several
    (``train`` for train-00001-of-00004)."""
    stem = stem_of(path)
    return SHARD.sub("", stem) or stem if len(files) > 1 else stem
