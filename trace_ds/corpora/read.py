"""Documents from files: JSONL, plain text, Parquet; streamed, with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trace_ds.config.schema import CorpusFile
from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, sha256_file, sha256_text

TEXT_BLOCK_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Document:
    text: str
    source: str


def check_files(files: list[CorpusFile], key: str) -> None:
    """Every file is there and of a kind we read; :class:`UserError` otherwise."""
    for item in files:
        path = Path(item.path)
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
    for item in files:
        path = Path(item.path)
        if path.suffix == ".parquet":
            yield from _read_parquet(path, item)
        elif path.suffix == ".txt":
            yield from _read_text(path, item)
        else:
            yield from _read_jsonl(path, item)


def _read_jsonl(path: Path, item: CorpusFile) -> Iterator[Document]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(
                    f"not UTF-8 (byte {error.start} of the line)", where, "convert the file to UTF-8"
                ) from None
            except ValueError:
                raise UserError("the line is not a JSON object", where, "one JSON object per line") from None
            if not isinstance(record, dict) or not isinstance(record.get(item.field), str):
                raise UserError(
                    f"the line has no text under {item.field!r}",
                    where,
                    "correct the line, or set the corpus' field",
                )
            yield Document(record[item.field], item.source or str(record.get("source", path.stem)))


def _read_text(path: Path, item: CorpusFile) -> Iterator[Document]:
    source = item.source or path.stem
    try:
        with path.open(encoding="utf-8") as handle:
            if not item.separator:
                yield Document(handle.read(), source)
                return
            rest = ""
            while block := handle.read(TEXT_BLOCK_CHARACTERS):
                *documents, rest = (rest + block).split(item.separator)
                yield from (Document(text, source) for text in documents)
            yield Document(rest, source)
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (near byte {error.start})", str(path), "convert the file to UTF-8") from None


def _read_parquet(path: Path, item: CorpusFile) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    try:
        parquet = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise UserError(f"not a Parquet file ({error})", str(path), "write it again") from None
    names = parquet.schema_arrow.names
    if item.field not in names:
        raise UserError(f"there is no column {item.field!r}", str(path), f"set the corpus' field to one of {names}")
    columns = [item.field] + (["source"] if "source" in names else [])
    for batch in parquet.iter_batches(columns=columns):
        for record in batch.to_pylist():
            if record[item.field] is not None:
                yield Document(record[item.field], item.source or str(record.get("source") or path.stem))
