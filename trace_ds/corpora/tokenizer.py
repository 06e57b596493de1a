"""The tokenizer of a run: loading without remote code, a fingerprint of its files, documents of any size as ids."""

from __future__ import annotations

import contextlib
import json
import os
import re
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.corpora.records import first_line
from trace_ds.errors import UserError
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

CHUNK_CHARACTERS = 1 << 16  # of a document that is tokenised in one call
LONGEST_CHUNK_CHARACTERS = 1 << 22  # where no place to cut is found earlier
CONTEXT_CHARACTERS = 256
BLOCK = 1 << 20
BATCH_CHARACTERS, BATCH_CHUNKS = 1 << 20, 256
# Places where the tokens of what is before and behind rarely depend on each other, in the order they are tried: after
# the end of a line, before the space between two words, after the end of a sentence, anywhere (in a text without any).
CUTS = (
    re.compile(r"(?<=\n)(?=[^\W\d_])"),
    re.compile(r"(?<=[^\W_])(?= [^\W\d_])"),
    re.compile(r"(?<=[。！？；，、])(?=\w)"),
)
ANYWHERE = re.compile(r"(?<=\S)(?=\S)")
TRIES = 8

BUSY = 16  # more threads cannot be kept busy by the one that reads and packs
AHEAD = 3  # batches under way for each thread
OWN_THREADS = "TOKENIZERS_PARALLELISM"

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Chunk:
    """A part of document ``document`` with the characters before it, whose ids are ``before`` and not the part's."""

    document: int
    text: str
    before: tuple[int, ...]


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
        problem = "there is no tokenizer here (tokenizer.json or tokenizer.model)"
        raise UserError(problem, str(path), "set model.tokenizer")
    return sha256_text(canonical_json({name: sha256_file(file) for name, file in files.items()}))


def check_tokenizer(path: str | Path, vocabulary: int | None) -> None:
    """:class:`UserError` unless a tokenizer is there, all whose ids a model of ``vocabulary`` embeddings has."""
    tokenizer_fingerprint(path)
    file = Path(path) / "tokenizer.json"
    largest = _largest_id(file) if file.is_file() else len(load_tokenizer(path)) - 1
    if vocabulary is not None and largest >= vocabulary:
        problem = f"the tokenizer has ids up to {largest}, the model embeddings for {vocabulary} only"
        raise UserError(problem, str(path), "set model.tokenizer to the model's own")


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
        raise UserError(problem, str(path), "set model.tokenizer") from None


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id used to fill rows of a batch; any valid id does, since filled positions are never counted."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id):
        if token is not None:
            return int(token)
    return 0


def library_tokenizer(tokenizer: PreTrainedTokenizerBase) -> Any:
    """A copy of the tokenizers library's own, where transformers would do no more than call it; else None."""
    from transformers import PreTrainedTokenizerFast

    own: Any = None
    if getattr(type(tokenizer), "_encode_plus", None) is getattr(PreTrainedTokenizerFast, "_encode_plus", ""):
        with contextlib.suppress(Exception):  # a part written in Python cannot be copied
            own = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
            own.no_padding()
            own.no_truncation()
            own.encode_special_tokens = bool(tokenizer.split_special_tokens)
    return own


def encoder(tokenizer: PreTrainedTokenizerBase) -> Encode:
    """Texts → ids, without special tokens and without anything else that takes memory, for any number of threads."""
    own = library_tokenizer(tokenizer)
    options: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
    alone = threading.Lock()  # transformers sets padding and truncation at each call

    def encode(texts: list[str]) -> list[list[int]]:
        try:
            if own is not None:
                return [encoding.ids for encoding in own.encode_batch_fast(texts, add_special_tokens=False)]
            with alone:
                return tokenizer(texts, add_special_tokens=False, **options)["input_ids"]
        except Exception as error:  # a bare one: [UNK] is needed and missing
            fix = "repair it, or set model.tokenizer"
            raise UserError(f"the tokenizer fails ({str(error)[:200]})", str(tokenizer.name_or_path), fix) from None

    return encode


def encode_documents(
    documents: Iterable[Iterable[str]], encode: Encode, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """(document number, int32 ids of its next part): together those of the whole document, which is never in memory.

    A long document is cut where the tokens before and behind do not depend on each other (:func:`cut`). Every document
    comes at least once. The threads encode while this one reads and packs: the tokenizers library runs beside Python.

    Args:
        documents: each as blocks of text, which are used up one document after the other.
        encode: texts → ids, as :func:`encoder` gives.
    """
    under_way: deque[Future[list[tuple[int, np.ndarray]]]] = deque()
    before, os.environ[OWN_THREADS] = os.environ.get(OWN_THREADS), "false"  # of the library, for each batch
    pool = ThreadPoolExecutor(threads)
    try:
        chunks = (chunk for number, blocks in enumerate(documents) for chunk in cut(number, blocks, encode))
        for batch in _batches(chunks):
            under_way.append(pool.submit(_encode_batch, batch, encode))
            if len(under_way) == AHEAD * threads:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        del os.environ[OWN_THREADS]
        os.environ |= {} if before is None else {OWN_THREADS: before}


def default_threads() -> int:
    """As many as this process may use cores, up to :data:`BUSY`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, BUSY)


def _batches(chunks: Iterable[Chunk]) -> Iterator[list[Chunk]]:
    batch: list[Chunk] = []
    characters = 0
    for chunk in chunks:
        batch.append(chunk)
        characters += len(chunk.text)
        if characters >= BATCH_CHARACTERS or len(batch) == BATCH_CHUNKS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _encode_batch(batch: list[Chunk], encode: Encode) -> list[tuple[int, np.ndarray]]:
    """(document, int32 ids) of each chunk, without those of the context before it."""
    result = []
    for chunk, ids in zip(batch, encode([chunk.text for chunk in batch]), strict=True):
        size = len(chunk.before)
        if tuple(ids[:size]) != chunk.before:
            problem = "this tokenizer does not tokenise a long document in pieces as it does the whole"
            raise UserError(problem, f"{chunk.text[:40]!r}…", "cut it into documents of fewer than 65,536 characters")
        result.append((chunk.document, np.array(ids[size:], dtype=np.int32)))
    return result


def cut(number: int, blocks: Iterable[str], encode: Encode, size: int = CHUNK_CHARACTERS) -> Iterator[Chunk]:
    """The chunks of one document, of about ``size`` characters each.

    A cut needs proof from the tokenizer itself: encoded with :data:`CONTEXT_CHARACTERS` on either side, no token lies
    across it, the tokens before it are those without what follows, and the tokens behind it are the same with a
    shorter context. Each chunk is encoded behind that context, whose ids are then taken away: a tokenizer that treats
    the start of a text differently (a space put before it) sees no start there.
    """
    text, context, target = "", "", size
    before: tuple[int, ...] = ()
    for more in (block[begin : begin + BLOCK] for block in blocks for begin in range(0, len(block), BLOCK)):
        text += more
        while len(text) >= target + CONTEXT_CHARACTERS:
            position = _cut_position(context, text, target, encode)
            if position is None and target >= LONGEST_CHUNK_CHARACTERS:
                problem = f"a document has {target:,} characters that cannot be tokenised in pieces"
                raise UserError(problem, f"{text[:40]!r}…", "cut it into documents")
            if position is None:
                target *= 2
                continue
            end, context_ids = position
            yield Chunk(number, context + text[:end], before)
            context = (context + text[:end])[-CONTEXT_CHARACTERS:]
            text, before, target = text[end:], context_ids, size
    yield Chunk(number, context + text, before)


def _cut_position(context: str, text: str, target: int, encode: Encode) -> tuple[int, tuple[int, ...]] | None:
    """The last good position to cut in the second half of ``text[:target]``, and the ids of the context before it."""
    for pattern in (*CUTS, *([ANYWHERE] if target >= LONGEST_CHUNK_CHARACTERS else [])):
        positions = [match.start() for match in pattern.finditer(text, target // 2, target)][-TRIES:]
        for position in reversed(positions):
            left = (context + text[:position])[-CONTEXT_CHARACTERS:]
            right = text[position : position + CONTEXT_CHARACTERS]
            near = left[-CONTEXT_CHARACTERS // 4 :]
            alone, both, near_alone, near_both = encode([left, left + right, near, near + right])
            whole = both[: len(alone)] == alone and near_both[: len(near_alone)] == near_alone
            if whole and both[len(alone) :] == near_both[len(near_alone) :]:
                return position, tuple(alone)
    return None
