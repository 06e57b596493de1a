"""Documents from what the configuration names, streamed, with errors that name the file and the line (or the row)."""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.sections.data import CorpusEntry
from trace_ds.corpora.records import file_kind, read_rows, stem_of, text_of
from trace_ds.corpora.sources import Named, files_of, open_table
from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, sha256_file, sha256_text
from trace_ds.terminal import plain

SHARD = re.compile(r"[-_.]\d+(?:[-_.]of[-_.]\d+)?$")


@dataclass(frozen=True)
class Document:
    text: str
    source: str


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
        parts += [[digest, entry.template, entry.source or name] for digest, name in contents]
        if entry.rows is not None:
            parts.append({"rows": entry.rows, "of": len(contents)})
    return sha256_text(canonical_json(parts))


def content_fingerprint(named: Named) -> str:
    """SHA-256 over what an entry names; of one file it is that of the file."""
    digests = [digest for digest, _ in _contents(named)]
    return digests[0] if len(digests) == 1 else sha256_text(canonical_json(digests))


def _contents(named: Named) -> list[tuple[str, str]]:
    """(SHA-256, name in reports) of every file; of a data set one, over its id and commit, or over its files."""
    if not named.dataset:
        files = files_of(named, "data")
        return [(sha256_file(path), _file_name(path, files)) for path in files]
    table = open_table(named, "data")
    ids = (
        [named.dataset_id, table.commit, table.config] if table.commit else [sha256_file(path) for path in table.files]
    )
    return [(sha256_text(canonical_json([*ids, table.split])), table.name)]


def records(named: Named, key: str, columns: list[str] | None = None) -> Iterator[Record]:
    """The rows of the files or of the data set that an entry names.

    Args:
        key: of the configuration, to be named where something is wrong.
        columns: as in :func:`.records.read_rows`.
    """
    if named.dataset:
        table = open_table(named, key)
        for number, values in table.rows(columns):
            yield Record(values, f"{table.where}:{number}", str(number), table.name, typed=True)
        return
    files = files_of(named, key)
    for path in files:
        name, typed = _file_name(path, files), file_kind(path) == ".parquet"
        shard = f"{path.name}:" if len(files) > 1 else ""
        for number, values in read_rows(path, columns):
            yield Record(values, f"{path}:{number}", f"{shard}{number}", name, typed)


def read_documents(entries: list[CorpusEntry], key: str = "data") -> Iterator[Document]:
    """All documents of the entries, in order, one in memory at a time.

    Raises:
        UserError: a line or a column is no text, a file is damaged, or a text holds half of a surrogate pair.
    """
    for entry in entries:
        yield from (document for document in itertools.islice(_documents(entry, key), entry.rows) if document)


def _documents(entry: CorpusEntry, key: str) -> Iterator[Document | None]:
    """The documents of an entry; None for a row of a table that has no text (null)."""
    files = [] if entry.dataset else files_of(entry, key)
    texts = [path for path in files if file_kind(path) == ".txt"]
    if texts and len(texts) < len(files):
        raise UserError("text files and others are mixed", entry.path, f"name them one by one in {key}")
    if texts and entry.template != "{text}":
        raise UserError("a text file has no columns", entry.path, f"take template out of {key}")
    for path in texts:
        yield Document(text_of(path), entry.source or plain(_file_name(path, texts)))
    if not texts:
        parts = entry.parts
        for record in records(entry, key, entry.columns):
            text = _text(record, parts)
            yield None if text is None else Document(text, entry.source or record.source)


def _text(record: Record, parts: list[tuple[str, str | None]]) -> str | None:
    text = ""
    for literal, column in parts:
        value = "" if column is None else record.values.get(column)
        if value is None and record.typed:
            return None
        if not isinstance(value, str):
            close = difflib.get_close_matches(str(column), record.values, 1)
            hint = f"did you mean {close[0]!r}? " if close and close[0] != column else ""
            fix = f"{hint}correct the line, or set the corpus' template"
            raise UserError(f"the line has no text under {column!r}", record.where, fix)
        text += literal + value
    return text


def _file_name(path: Path, files: list[Path]) -> str:
    """What reports call a file: its name without the kind, and without the number where it is one shard of several
    (``train`` for train-00001-of-00004)."""
    stem = stem_of(path)
    return SHARD.sub("", stem) or stem if len(files) > 1 else stem
