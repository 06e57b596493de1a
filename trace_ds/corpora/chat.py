"""Documents as tokens: conversations by the tokenizer's own chat template, and the loss mask.

Where the template marks what the assistant says (``{% generation %}``), transformers says which tokens these are. For
other templates the conversation is rendered again up to each answer: the answer is the text that the full rendering
adds. A token counts when any of its characters lies in an answer.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.corpora.dataset import Tokens
from trace_ds.corpora.read import Document
from trace_ds.corpora.records import first_line
from trace_ds.corpora.tokenizer import encode
from trace_ds.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
Messages = Sequence[dict[str, str]]


def chat_template(tokenizer: PreTrainedTokenizerBase, key: str) -> str:
    """The template of conversations; :class:`UserError` when the tokenizer has none."""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        fix = "use an instruct model (or its tokenizer: model.tokenizer), or set a text template for the corpus"
        raise UserError("the corpus has conversations, and the tokenizer has no chat template", key, fix) from None


class DocumentEncoder:
    """Documents → tokens: text between ``bos`` and ``eos``, conversations as the template renders them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, bos: list[int], eos: list[int]) -> None:
        self._tokenizer, self._bos, self._eos = tokenizer, bos, eos

    def __call__(self, documents: list[Document]) -> list[Tokens]:
        """Raises :class:`UserError` where the template refuses a conversation, or answers cannot be told apart."""
        texts = [each.text for each in documents if not (each.messages or each.answers_only)]
        whole = iter(encode(self._tokenizer, texts))
        return [
            self._encode_one(each) if each.messages or each.answers_only else self._with_bos_eos(next(whole))
            for each in documents
        ]

    def _with_bos_eos(self, ids: Sequence[int] | np.ndarray, mask: np.ndarray | None = None) -> Tokens:
        begin, end = (self._bos, self._eos) if len(ids) else ([], [])
        if mask is not None:
            mask = np.concatenate([np.zeros(len(begin), bool), mask, np.ones(len(end), bool)])
        return Tokens(np.array([*begin, *ids, *end], dtype=np.int32), mask)

    def _encode_one(self, document: Document) -> Tokens:
        if document.answers_only and not self._tokenizer.is_fast:
            fix = "use a model with a tokenizer.json, or set loss_on: all"
            raise UserError("this tokenizer does not provide the character offsets of tokens", document.where, fix)
        try:
            if not document.messages:
                return self._with_bos_eos(*self._masked(document.text, [(document.answer_start, len(document.text))]))
            return self._conversation(document)
        except UserError:
            raise
        except Exception as error:  # jinja's, the template's own, and bare ones of the tokenizers library
            refuser = "chat template" if document.messages else "tokenizer"
            problem = f"the {refuser} refuses the document ({first_line(error)})"
            fix = "correct it: most templates want user and assistant in turn, and a system message first or not at all"
            raise UserError(problem, document.where, fix) from None

    def _conversation(self, document: Document) -> Tokens:
        messages = document.messages
        if document.answers_only and not GENERATION.search(chat_template(self._tokenizer, document.where)):
            text, spans = answer_spans(self._render, messages, document.where)
            return Tokens(*self._masked(text, spans))
        out: Any = self._tokenizer.apply_chat_template(
            list(messages),
            return_dict=True,
            return_assistant_tokens_mask=document.answers_only,
            tokenizer_kwargs={"verbose": False},
        )
        mask = np.array(out["assistant_masks"], dtype=bool) if document.answers_only else None
        return Tokens(np.array(out["input_ids"], dtype=np.int32), mask)

    def _render(self, messages: Messages, **options: Any) -> str:
        return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **options))

    def _masked(self, text: str, spans: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, whether a character of the token lies in one of the spans)."""
        out = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets_N2 = np.array(out["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        mask = np.zeros(len(offsets_N2), dtype=bool)
        for start, stop in spans:
            mask |= (offsets_N2[:, 0] < stop) & (offsets_N2[:, 1] > start)
        return np.array(out["input_ids"], dtype=np.int32), mask


def answer_spans(render: Callable[..., str], messages: Messages, where: str) -> tuple[str, list[tuple[int, int]]]:
    """(the conversation as text, where each answer begins and ends in it, with what closes its turn).

    Start: the length of the longest common prefix of the full rendering and that of the preceding messages with
    ``add_generation_prompt``. End: the length of the rendering up to and including this message. Where that is no
    prefix of the full text (Qwen3 drops empty thinking blocks of earlier turns), the message's content followed by the
    same end-of-turn text is searched.

    Args:
        render: messages → text; takes ``add_generation_prompt``.
    """
    whole, spans = render(messages), []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, until, content = "", render(messages[: number + 1]), message["content"].strip()
        if number and whole.startswith(render(messages[:number])):
            asking = render(messages[:number], add_generation_prompt=True)
            before = os.path.commonprefix([whole, asking])  # noqa: RUF071 (of texts, not of paths)
        stop = len(until)
        if not whole.startswith(until):
            ending = content + until.rpartition(content)[2] if content and content in until else until
            stop = whole.find(ending, len(before)) + len(ending) if ending in whole[len(before) :] else 0
        if not before or stop < len(before):
            problem = "cannot determine where answers begin and end with this chat template"
            fix = "start with a user message and use one answer per conversation, or set loss_on: all"
            raise UserError(problem, where, fix)
        spans.append((len(before), stop))
    return whole, spans
