"""The tokenizer of a run: loading without remote code, a fingerprint of its files, documents as ids."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from trace_ds.corpora.records import first_line
from trace_ds.errors import UserError, listed
from trace_ds.run.files import canonical_json, once_a_process, sha256_file, sha256_text
from trace_ds.run.foreign import MAX_BYTES, read_bytes, reading
from trace_ds.run.hub_names import no_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What text becomes tokens by, and which of them begin and end a document.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
TOKENIZER_FILES = (*VOCABULARY_FILES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

BATCH_CHARACTERS, BATCH_DOCUMENTS = 1 << 20, 256


class HasText(Protocol):
    """A document with its text, to be tokenised."""

    @property
    def text(self) -> str: ...


_D = TypeVar("_D", bound=HasText)


def tokenizer_fingerprint(path: str | Path) -> str:
    """SHA-256 over the files that define how text becomes tokens; :class:`UserError` when there are none."""
    directory = Path(path)
    if not directory.is_dir():
        fix = "set model.path (or model.tokenizer) to a directory on this machine"
        raise no_directory(path, "there is no directory with a tokenizer", fix)
    names = (*TOKENIZER_FILES, *(item.name for item in sorted(directory.glob("*.tiktoken"))))
    files = {name: directory / name for name in names if os.path.lexists(directory / name)}
    for file in files.values():
        if not file.is_file():  # to take it for absent could change the tokens without a word
            raise UserError("this is not a regular file", str(file), "copy the tokenizer again")
        if file.stat().st_size > MAX_BYTES:
            raise UserError(f"more than {MAX_BYTES:,} bytes: no file of a tokenizer", str(file), "copy it again")
    if not any(name in VOCABULARY_FILES or name.endswith(".tiktoken") for name in files):
        present = listed(sorted(item.name for item in directory.iterdir()))
        fix = f"it has {present}: set model.tokenizer to a folder with one"
        raise UserError("there is no tokenizer here (tokenizer.json or tokenizer.model)", str(path), fix)
    return sha256_text(canonical_json({name: sha256_file(file) for name, file in files.items()}))


def check_tokenizer(path: str | Path, vocabulary: int | None) -> None:
    """:class:`UserError` unless a tokenizer is there, all whose ids a model of ``vocabulary`` embeddings has."""
    tokenizer_fingerprint(path)
    file = Path(path) / "tokenizer.json"
    largest = _largest_id(file) if file.is_file() else len(load_tokenizer(path)) - 1
    if vocabulary is not None and largest >= vocabulary:
        problem = f"the tokenizer has ids up to {largest}, the model embeddings for {vocabulary} only"
        fix = "set model.tokenizer to the one the model was trained with, or take out the tokens that were added to it"
        raise UserError(problem, str(path), fix)


@once_a_process
def _largest_id(file: Path) -> int:
    """The largest token id of a tokenizer.json (-1: it has none)."""
    with reading(file, "the tokenizer", "copy it again"):
        raw = json.loads(read_bytes(file))
        vocabulary = raw["model"].get("vocab", ())
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return int(max([-1, *ids, *(token["id"] for token in raw.get("added_tokens") or ())]))


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory; never executes code that ships with it."""
    from transformers import AutoTokenizer

    tokenizer_fingerprint(path)  # a clear error when there is none
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare ones
        problem = f"the tokenizer cannot be loaded ({first_line(error)})"
        raise UserError(problem, str(path), "copy it again, or set model.tokenizer to another folder") from None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id used to fill rows of a batch; any valid id does, since filled positions are never counted."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    return 0


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Texts → ids, without special tokens; a fast tokenizer works on all cores."""
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    try:
        return tokenizer(texts, add_special_tokens=False, **options)["input_ids"] if texts else []
    except Exception as error:  # a bare one: [UNK] is needed and missing
        fix = "repair it, or set model.tokenizer to another folder"
        raise UserError(f"the tokenizer fails ({str(error)[:200]})", str(tokenizer.name_or_path), fix) from None


def batches(documents: Iterable[_D]) -> Iterator[list[_D]]:
    """Documents in batches that are tokenised together."""
    batch: list[_D] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_DOCUMENTS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch
