"""``trace-ds prepare``: corpora → token datasets, streaming; tokenised on all cores."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.corpora.chat import DocumentEncoder, chat_template
from trace_ds.corpora.dataset import (
    DOCUMENT_SCHEMA,
    ArrowWriter,
    PackingCounts,
    Tokens,
    pack,
    text_start,
    write_rows,
)
from trace_ds.corpora.read import (
    REFUSAL_SENTENCES,
    Document,
    check_files,
    corpus_fingerprint,
    has_answers,
    has_conversations,
    read_documents,
    with_refusal,
)
from trace_ds.corpora.tokenizer import batches, load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import canonical_json, replacing_directory, sha256_text
from trace_ds.run.log import stage_log
from trace_ds.stages.inputs import check_vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trace_ds.parallel.world import World


@dataclass(frozen=True)
class PrepareJob:
    """The corpora of a configuration (forget, retain, and the alternative one if there is one), to be tokenised and
    packed into ``RUN/data``; ``inputs`` and ``settings`` are the artefact's."""

    config: Config
    place: RunDirectory
    inputs: dict[str, str]
    settings: dict[str, Any]

    @property
    def identity(self) -> str:
        return artefact.identity_of("data", self.inputs, self.settings)

    def done(self) -> bool:
        return artefact.is_done(self.place.data, "data", self.identity)

    def run(self, world: World | None = None) -> None:
        run, data = self.place, self.config.data
        tokenizer = load_tokenizer(self.config.model.tokenizer_path)
        with stage_log(run, "prepare") as log, replacing_directory(run.data) as directory:
            each = {side: _prepare_side(self.config, side, directory, tokenizer) for side in data.sides}
            if data.has_refusals and (split := each["forget"].documents_split + each["alternative"].documents_split):
                problem = (
                    f"{split:,} documents are longer than {data.context_length} tokens, so that rows make no pairs"
                )
                raise UserError(problem, "data.alternative: refusals", "raise data.context_length")
            for side, counts in each.items():
                log.detail(
                    f"{side}: {counts.documents:,} documents, {counts.rows:,} rows, {counts.tokens:,} tokens "
                    f"({counts.counted_tokens:,} loss-bearing), {counts.documents_split:,} documents split at "
                    f"{data.context_length} tokens, {counts.empty_documents:,} empty"
                )
            summary = {side: vars(counts) for side, counts in each.items()}
            artefact.describe(directory, "data", self.inputs, self.settings, summary)
            log.done("; ".join(f"{side} {c.documents:,} documents, {c.tokens:,} tokens" for side, c in each.items()))


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    check_vocabulary(config)
    for side in config.data.sides:
        check_files(config.data.corpus(side), f"data.{side}", download=download)


def check(config: Config, run: RunDirectory, processes: int = 1) -> PrepareJob:
    """The job; :class:`UserError` when a file is missing."""
    for side in config.data.sides:
        check_files(config.data.corpus(side), f"data.{side}")
    inputs = {"tokenizer": tokenizer_fingerprint(config.model.tokenizer_path)}
    inputs |= {side: corpus_fingerprint(config.data.corpus(side)) for side in config.data.sides}
    if config.data.has_refusals:
        inputs["alternative"] = sha256_text(canonical_json([inputs["forget"], REFUSAL_SENTENCES, config.seed]))
    with_conversations = [
        side for side in config.data.sides if has_conversations(config.data.corpus(side), f"data.{side}")
    ]
    if with_conversations:
        template = chat_template(load_tokenizer(config.model.tokenizer_path), f"data.{with_conversations[0]}")
        inputs["chat_template"] = sha256_text(template)
    settings = config.data.model_dump(mode="json", exclude={"forget", "retain", "alternative"})
    return PrepareJob(config, run, inputs, settings)


def _prepare_side(config: Config, side: str, directory: Path, tokenizer: PreTrainedTokenizerBase) -> PackingCounts:
    data = config.data
    entries, refuses = data.corpus(side), side == "alternative" and data.has_refusals
    bos = [tokenizer.bos_token_id] if data.add_bos and tokenizer.bos_token_id is not None else []
    eos = [tokenizer.eos_token_id] if data.add_eos and tokenizer.eos_token_id is not None else []
    table = ArrowWriter(directory / f"{side}_documents.arrow", DOCUMENT_SCHEMA)

    encode = DocumentEncoder(tokenizer, bos, eos)
    masked = has_answers(entries, f"data.{side}")

    def documents() -> Iterator[Document]:
        for number, read in enumerate(read_documents(entries, f"data.{side}")):
            document = with_refusal(read, number, config.seed) if refuses else read
            if document.answers_only and not masked:
                fix = "give each an entry of its own"
                raise UserError("conversations among texts, in one entry", document.where, fix)
            yield document

    def tokenised() -> Iterator[Tokens]:
        for batch in batches(documents()):
            for document, tokens in zip(batch, encode(batch), strict=True):
                table.add(document.source, len(tokens), text_start(document.text))
                yield tokens

    counts = PackingCounts()
    try:
        rows = pack(tokenised(), data.context_length, data.packing, counts)
        write_rows(directory / f"{side}.arrow", rows, masked=masked)
    finally:
        table.close()
    where = ", ".join(entry.place for entry in entries)
    if counts.documents == 0:
        raise UserError(f"the {side} corpus is empty", where, "give at least one document")
    if counts.counted_tokens == 0:
        raise UserError(
            f"the {side} corpus has no usable token (no document has two tokens)",
            where,
            "give documents with text",
        )
    return counts
