"""``data``: the corpora and how they become rows; how a data set is named, which tasks do as well."""

from __future__ import annotations

import string
from collections.abc import Collection
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trace_ds.config.sections.base import Integer, PathText, Section

DatasetText = Annotated[
    PathText | None,
    Field(
        description="Instead of a path: a data set's id on the Hugging Face hub, ORG/NAME or ORG/NAME@REVISION (from "
        "the cache of datasets, or downloaded into it)."
    ),
]
ConfigText = Annotated[str | None, Field(description="dataset: which of its configurations; default: the only one.")]
SplitText = Annotated[
    str | None, Field(description="dataset: its split, or a part of it (train[:50%]); default: the only one there is.")
]


class PathOrDataset:
    """Properties of a section with the keys ``path`` and ``dataset``, of which one is given."""

    path: str
    dataset: str | None

    @property
    def place(self) -> str:
        """The file, folder or dataset to read."""
        return self.path or self.dataset or ""

    @property
    def dataset_id(self) -> str:
        return self._id_and_revision()[0]

    @property
    def revision(self) -> str | None:
        return self._id_and_revision()[1]

    def _id_and_revision(self) -> tuple[str, str | None]:
        """The parts of ``ORG/NAME@REVISION``."""
        name, _, revision = (self.dataset or "").partition("@")
        return name, revision or None


def require_place(owner: str, path: str, dataset: str | None, **of_dataset: str | None) -> None:
    """ValueError unless a path or a data set is named, and what goes with it."""
    if not path and not dataset:
        raise ValueError(f"{owner} has no path and no dataset")
    if path and dataset:
        raise ValueError(f"{owner} has a path and a dataset: give one")
    for key, value in of_dataset.items():
        if value is not None and not dataset:
            raise ValueError(f"{owner} has a {key}, which goes with dataset, not with path")


Template = str | list[dict[str, str]]  # text, or the messages of a conversation

REFUSALS = "refusals"  # as data.alternative
TEXT = "{text}"
# What rows without a "text" are made into when no template is given: the first whose columns are there.
CONVERSATIONS: tuple[Template, ...] = (
    "{messages}",
    "{conversations}",
    [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{completion}"}],
)


def parts_of(text: str) -> list[tuple[str, str | None]]:
    """A template's text: pieces of it as they stand, each followed by the value of a column (or by none)."""
    parts = []
    for literal, column, style, conversion in string.Formatter().parse(text):
        if column == "" or style or conversion:
            raise ValueError("a template holds names of columns in braces, such as {question}, and nothing else there")
        parts.append((literal, column))
    return parts


def columns_of(template: Template) -> list[str]:
    """The columns that a template names."""
    texts = [template] if isinstance(template, str) else [message["content"] for message in template]
    return list(dict.fromkeys(column for text in texts for _, column in parts_of(text) if column is not None))


class CorpusEntry(PathOrDataset, Section):
    """Documents: files, or a data set by name (docs/data.md shows every form)."""

    path: PathText = Field(
        "",
        description="A file (.jsonl, .json, .csv, .tsv, .parquet, .txt, .md; all but Parquet also .gz or .zst), a "
        "pattern with *, or a folder of such files.",
    )
    dataset: DatasetText = None
    config: ConfigText = None
    split: SplitText = None
    template: Template | None = Field(
        None,
        description="What a document is made of: columns (keys of a JSON object; meta.text of one inside another) in "
        "braces, and text: '{body}', or 'Question: {question}\\nAnswer: {answer}'. {{ and }} stand for braces. A list "
        "of messages, [{role: user, content: '{question}'}, {role: assistant, content: '{answer}'}], is rendered by "
        "the tokenizer's chat template. Default: {text}; without that column {messages}, {conversations} or {prompt} "
        "and {completion}, as a conversation. Columns of a text file: text, or paragraph.",
    )
    loss_on: Literal["answer", "all"] | None = Field(
        None,
        description="Tokens that losses and routing statistics count: answer (what the assistant says; with a "
        "template of text the value of its last column and what follows) or all. Default: answer for conversations, "
        "all for text.",
    )
    rows: Integer | None = Field(None, ge=1, description="Only the first so many rows (documents of a text file).")
    source: str | None = Field(
        None,
        description="Name shown in reports; default: the row's own 'source', else the name of the file or data set.",
    )

    def template_for(self, columns: Collection[str]) -> Template:
        """The template that turns a row with these columns into a document."""
        if self.template is None and "text" not in columns:
            return next((each for each in CONVERSATIONS if set(columns_of(each)) <= set(columns)), TEXT)
        return self.template or TEXT

    @model_validator(mode="after")
    def _says_where(self) -> CorpusEntry:
        require_place("a corpus", self.path, self.dataset, config=self.config)
        template = TEXT if self.template is None else self.template
        if not isinstance(template, str) and any(set(message) != {"role", "content"} for message in template):
            raise ValueError("template: each message has a role and a content, and nothing else")
        try:
            columns = columns_of(template)
            if not columns:
                raise ValueError("the template names no column: write for example {question}")
        except ValueError as error:  # str.format's own are terse: expected '}' before end of string
            raise ValueError(f"template: {error}") from None
        return self


class DataConfig(Section):
    """The corpora of a run and how they are packed into rows."""

    forget: list[CorpusEntry] = Field(min_length=1)
    retain: list[CorpusEntry] = Field(min_length=1)
    alternative: PathText | None = Field(
        None,
        description="dpo: what is preferred to the forget texts. refusals: the forget questions, each with a refusal "
        "of ours as its answer (IdkDPO), picked by the seed; needs packing: single. Else a file of texts: row i of the "
        "forget corpus is paired with row i modulo their number.",
    )
    context_length: Integer = Field(
        2048, ge=2, le=1 << 24, description="Tokens of a row (and the longest piece of a document)."
    )
    packing: Literal["dense", "whole", "single"] = Field(
        "dense",
        description="dense: rows are cut from the stream of documents, no padding; whole: a document that fits into a "
        "row is never cut; single: whole, with one document in each row. Attention never crosses documents.",
    )
    add_bos: bool = True
    add_eos: bool = True

    @property
    def has_refusals(self) -> bool:
        """Whether the alternative corpus is the forget corpus with refusals as its answers."""
        return self.alternative == REFUSALS

    @model_validator(mode="after")
    def _pairs_rows(self) -> DataConfig:
        if self.has_refusals and self.packing != "single":
            raise ValueError("alternative: refusals pairs documents, which needs packing: single")
        return self

    @property
    def sides(self) -> tuple[str, ...]:
        """The corpora there are: the fields of that name, the datasets and the statistics made of them."""
        return ("forget", "retain", *(["alternative"] if self.alternative else []))

    def corpus(self, side: str) -> list[CorpusEntry]:
        """The entries of a corpus by its name."""
        if side == "alternative":
            own = [CorpusEntry(path=self.alternative)] if self.alternative else []
            return self.forget if self.has_refusals else own
        return {"forget": self.forget, "retain": self.retain}[side]
