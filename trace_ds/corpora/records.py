"""Rows of one file, streamed: JSON Lines, an array of JSON objects, CSV, Parquet; errors name the file and the line.

All but Parquet may be compressed (.gz, .zst). Lines and arrays have limits of size, text is UTF-8, and what cannot be
read is a :class:`UserError`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError, listed, nearest

TEXTS = (".txt", ".md")
FILE_KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", *TEXTS)
COMPRESSED = (".gz", ".zst")
MAX_LINE_BYTES = 1 << 28
MAX_CHARACTERS = 1 << 28  # of a text file or a JSON array, which are read whole
FIRST_BYTES = 1 << 20  # that may be white space before it
Choose = Callable[[list[str]], list[str]]
PARQUET_ROWS = 64  # read at a time: a row can be a book


def file_kind(path: Path) -> str:
    """``.jsonl`` for notes.jsonl and notes.jsonl.gz; the last suffix, whatever it is, for others."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def stem_of(path: Path) -> str:
    """The file's name without its kind."""
    return Path(path.stem).stem if path.suffix in COMPRESSED else path.stem


def can_read(path: Path) -> bool:
    return file_kind(path) in FILE_KINDS and not (path.suffix in COMPRESSED and file_kind(path) == ".parquet")


@contextlib.contextmanager
def open_decompressed(path: Path) -> Iterator[io.BufferedReader]:
    """The bytes of a file, decompressed; :class:`UserError` when the compression is damaged."""
    import pyarrow as pa

    try:
        with pa.input_stream(str(path), compression="detect" if path.suffix in COMPRESSED else None) as stream:
            yield io.BufferedReader(stream)
    except OSError as error:
        if path.suffix not in COMPRESSED or error.errno is not None:
            raise
        raise UserError(f"not a whole {path.suffix} file ({first_line(error)})", str(path), "copy it again") from None


def text_of(path: Path) -> str:
    """The text of a file; :class:`UserError` when it is not UTF-8, or larger than any document."""
    try:
        with open_decompressed(path) as handle:
            text = io.TextIOWrapper(handle, encoding="utf-8-sig").read(MAX_CHARACTERS + 1)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (near byte {error.start})", str(path), "convert the file to UTF-8") from None
    if len(text) > MAX_CHARACTERS:
        fix = "write JSON Lines (one object a line), which is read as a stream"
        raise UserError(f"the file has over {MAX_CHARACTERS:,} characters", str(path), fix)
    return text


def read_rows(path: Path, choose: Choose | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number from 1, row) of a file; the number is that of its line where it has lines.

    Args:
        choose: of the columns of a Parquet file those to read, which must hold text; none but ``source`` is read
            beside them. None: all of them.
    """
    kind = file_kind(path)
    if kind == ".parquet":
        return _parquet_rows(path, choose)
    if kind in (".csv", ".tsv"):
        return _csv_rows(path, "," if kind == ".csv" else "\t")
    return _array_rows(path) if kind == ".json" and _is_array(path) else _json_lines(path)


def columns_to_read(schema: Any, choose: Choose, where: str) -> list[str]:
    """The columns of ``choose`` and, where there is one, ``source``; :class:`UserError` unless the Arrow schema has
    them and they can hold text, also inside structures and lists."""
    import pyarrow as pa

    columns = {"source"} & set(schema.names)
    for column in choose(schema.names):
        root, *inner = [column] if column in schema.names else column.split(".")
        kind: Any = schema.field(root).type if root in schema.names else None
        for name in inner:
            exists = kind is not None and pa.types.is_struct(kind) and kind.get_field_index(name) >= 0
            kind = kind.field(name).type if exists else None
        if kind is None or not (pa.types.is_struct(_item_type(kind)) or _is_text(kind)):
            problem = (
                f"there is no column {column!r}" if kind is None else f"the column {column!r} holds {kind}, no text"
            )
            raise UserError(problem, where, template_fix(column, list(_text_columns(schema)), schema.names))
        columns.add(root)
    return [name for name in schema.names if name in columns]


def _item_type(kind: Any) -> Any:
    """The Arrow type of what stands in a list, or in a list of lists; of anything else its own."""
    while str(kind).startswith(("list", "large_list", "fixed_size_list", "dictionary")):
        kind = kind.value_type
    return kind


def _is_text(kind: Any) -> bool:
    return str(_item_type(kind)).endswith(("string", "string_view"))


def _text_columns(fields: Any, prefix: str = "") -> Iterator[str]:
    """Names of the columns of an Arrow schema that hold text, those of structures with dots."""
    import pyarrow as pa

    for field in fields:
        if pa.types.is_struct(field.type):
            yield from _text_columns(field.type.fields, f"{prefix}{field.name}.")
        elif _is_text(field.type):
            yield prefix + field.name


def template_fix(column: str, texts: Sequence[str], names: Sequence[str]) -> str:
    """What to do where ``column`` is no text: name one of those that are (``texts``), of all that there are."""
    if not texts:
        return f"no column holds text, of {listed(names)}: write one that does"
    return f"{nearest(column, texts)}set the corpus' template to one of them in braces"


def first_line(error: Exception) -> str:
    """First line of an exception's message, shortened; its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line with its end); a byte order mark is skipped."""
    with open_decompressed(path) as handle:
        for number, line in enumerate(iter(lambda: handle.readline(MAX_LINE_BYTES), b""), 1):
            where = f"{path}:{number}"
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"the line has {MAX_LINE_BYTES:,} bytes or more", where, "cut the document")
            try:
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                fix = "convert the file to UTF-8"
                raise UserError(f"not UTF-8 (byte {error.start} of the line)", where, fix) from None


def _json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    problem, fix = "the line is not a JSON object", "one JSON object per line"
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(problem, where, fix) from None
            yield number, _checked(record, line, problem, where, fix)


def _is_array(path: Path) -> bool:
    with open_decompressed(path) as handle:
        return handle.read(FIRST_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of an array, which is read whole."""
    text, fix = text_of(path), "an array of objects"
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"the file is not a JSON array ({str(error)[:100]})", str(path), fix) from None
    for number, record in enumerate(records, 1):
        yield number, _checked(record, text, "the item is not a JSON object", f"{path}:{number}", fix)


def _checked(record: Any, text: str, problem: str, where: str, fix: str) -> dict[str, Any]:
    """``record``, parsed from ``text``; refused with ``what`` when it is no object, or holds half a surrogate pair."""
    if not isinstance(record, dict):
        raise UserError(problem, where, fix)
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start].encode("unicode_escape").decode()
            fix = "write the file again as UTF-8"
            raise UserError(f"{half} is half of a surrogate pair and no character", where, fix) from None
    return record


def _csv_rows(path: Path, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE_BYTES)  # of the process; the default is 128 KiB
    reader = csv.reader((line for _, line in _lines(path)), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            where = f"{path}:{reader.line_num}"
            if not header:
                header = cells
                if twice := [name for number, name in enumerate(header) if name in header[:number]]:
                    raise UserError(f"two columns are named {twice[0]!r}", where, "rename one in the first line")
            elif cells and len(cells) != len(header):
                raise UserError(f"the row has {len(cells)} cells, the first line {len(header)}", where, "correct it")
            elif cells:
                yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"not CSV ({error})", f"{path}:{reader.line_num}", "quote cells as CSV does") from None


def _parquet_rows(path: Path, choose: Choose | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as parquet:
            columns = None if choose is None else columns_to_read(parquet.schema_arrow, choose, str(path))
            batches = parquet.iter_batches(batch_size=PARQUET_ROWS, columns=columns)
            yield from enumerate((record for batch in batches for record in batch.to_pylist()), 1)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"not a whole Parquet file ({first_line(error)})", str(path), "copy it again") from None
