"""Documents from files: JSONL, plain text, Parquet; streamed, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.schema import CorpusFile
from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, sha256_file, sha256_text
from trace_ds.terminal import plain

TEXT_BLOCK_CHARACTERS = 1 << 20
MAX_LINE_BYTES = 1 << 30
PARQUET_ROWS = 64  # read at a time: a row can be a book


@dataclass(frozen=True)
class Document:
    text: str
    source: str


@dataclass(frozen=True)
class TextStream:
    """A document as blocks of text, to be used up before the next one is asked for."""

    blocks: Iterable[str]
    source: str


def check_files(files: list[CorpusFile], key: str) -> None:
    """Every file is there and of a kind we read; :class:`UserError` otherwise."""
    for item in files:
        path = Path(item.path)
        if path.is_dir():
            raise UserError("the corpus is a folder, not a file", str(path), f"name its files one by one in {key}")
        if not path.is_file():
            raise UserError("the corpus file does not exist", str(path), f"correct {key} in the configuration")
        if path.suffix not in (".jsonl", ".json", ".txt", ".parquet"):
            raise UserError(f"cannot read files of the kind {path.suffix!r}", str(path), "use .jsonl, .txt or .parquet")


def corpus_fingerprint(files: list[CorpusFile]) -> str:
    """SHA-256 over the content of the files and how they are read (not over where they lie)."""
    return sha256_text(
        canonical_json(
            [
                [
                    sha256_file(Path(item.path)),
                    item.field,
                    item.source or Path(item.path).stem,
                    item.separator,
                ]
                for item in files
            ]
        )
    )


def read_documents(files: list[CorpusFile]) -> Iterator[Document]:
    """All documents of the files, in order, one in memory at a time."""
    for stream in read_streams(files):
        yield Document("".join(stream.blocks), stream.source)


def read_streams(files: list[CorpusFile]) -> Iterator[TextStream]:
    """The same, a text file without a separator in blocks of :data:`TEXT_BLOCK_CHARACTERS`.

    Raises:
        UserError: a line or a column is no text, a file is damaged, or a text holds half of a surrogate pair.
    """
    for item in files:
        path = Path(item.path)
        if path.suffix == ".parquet":
            yield from _read_parquet(path, item)
        elif path.suffix == ".txt":
            yield from _read_text(path, item)
        else:
            yield from _read_jsonl(path, item)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line of a JSONL file that is not blank; a byte order mark is skipped."""
    with path.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b""), 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES:
                raise UserError("the line has a gigabyte or more", where, "cut the document, or make it a .txt file")
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                fix = "convert the file to UTF-8"
                raise UserError(f"not UTF-8 (byte {error.start} of the line)", where, fix) from None
            except (ValueError, RecursionError):
                raise UserError("the line is not a JSON object", where, "one JSON object per line") from None
            if not isinstance(record, dict):
                raise UserError("the line is not a JSON object", where, "one JSON object per line")
            if b"\\ud" in line.lower():  # an escaped surrogate
                refuse_surrogates(record, where)
            yield number, record


def parquet_records(path: Path, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, record) of a Parquet file, :data:`PARQUET_ROWS` in memory at a time."""
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            for batch in parquet.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
                for record in batch.to_pylist():
                    number += 1
                    yield number, record
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _bad_parquet(path, error) from None


def source_name(record: dict[str, Any], path: Path, where: str) -> str:
    """Where a record says that it is from, else the file's name; without control characters: it will be shown."""
    source = record.get("source")
    if source is None or source == "":
        return plain(path.stem)
    if not isinstance(source, str | int | float):
        raise UserError("'source' is no text", where, "give a name, or leave it out")
    return plain(str(source))


def _read_jsonl(path: Path, item: CorpusFile) -> Iterator[TextStream]:
    for number, record in json_lines(path):
        where = f"{path}:{number}"
        text = record.get(item.field)
        if not isinstance(text, str):
            fix = "correct the line, or set the corpus' field"
            raise UserError(f"the line has no text under {item.field!r}", where, fix)
        yield TextStream([text], item.source or source_name(record, path, where))


def _read_text(path: Path, item: CorpusFile) -> Iterator[TextStream]:
    source = item.source or plain(path.stem)
    try:
        with path.open(encoding="utf-8-sig") as handle:
            blocks = iter(lambda: handle.read(TEXT_BLOCK_CHARACTERS), "")
            if not item.separator:
                yield TextStream(blocks, source)
                return
            rest = ""
            for block in blocks:
                *documents, rest = (rest + block).split(item.separator)
                yield from (TextStream([text], source) for text in documents)
            yield TextStream([rest], source)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (near byte {error.start})", str(path), "convert the file to UTF-8") from None


def _read_parquet(path: Path, item: CorpusFile) -> Iterator[TextStream]:
    import pyarrow
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(path)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise _bad_parquet(path, error) from None
    if item.field not in schema.names:
        raise UserError(
            f"there is no column {item.field!r}", str(path), f"set the corpus' field to one of {schema.names}"
        )
    kind = schema.field(item.field).type
    if not str(getattr(kind, "value_type", kind)).endswith(("string", "string_view")) or pyarrow.types.is_nested(kind):
        raise UserError(f"the column {item.field!r} holds {kind}, no text", str(path), "set the corpus' field")
    columns = [item.field, *(["source"] if "source" in schema.names and item.field != "source" else [])]
    for number, record in parquet_records(path, columns):
        where = f"{path}: row {number}"
        if record[item.field] is not None:
            yield TextStream([record[item.field]], item.source or source_name(record, path, where))


def _bad_parquet(path: Path, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return UserError(f"not a whole Parquet file ({reason})", str(path), "convert or copy it again")


def refuse_surrogates(record: Any, where: str) -> None:
    """:class:`UserError` for parsed JSON that holds half of a surrogate pair, which no file can hold as UTF-8."""
    try:
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        found = error.object[error.start].encode("unicode_escape").decode()
        fix = "write the file again as UTF-8"
        raise UserError(f"{found} is half of a surrogate pair and no character", where, fix) from None
