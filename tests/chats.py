"""Chat templates of three kinds, conversations, and by hand which of their tokens the loss is of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tiny

MARKED = (  # SmolLM3's way: the template says what the assistant generates
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m['content'] }}"
    "<|im_end|>{% endgeneration %}{{ '\n' }}{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INSTRUCT = (  # Mixtral's: no marks, no prompt for an answer, and it refuses what is not in turn
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('user and assistant must alternate') }}{% endif %}{% if m['role'] == 'user' %}"
    " [INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
THINKING = (  # Qwen3's: no marks, and only the last answer keeps its empty thoughts
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<think>\n\n"
    "</think>\n\n{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Pieces = list[tuple[str, bool]]


def marked(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        pieces += [
            (f"<|im_start|>{message['role']}\n", False),
            (message["content"] + "<|im_end|>", answer),
            ("\n", False),
        ]
    return pieces


def instruct(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = [("<s>", False)]
    for message in messages:
        answer = message["role"] == "assistant"
        pieces.append(
            (f" {message['content'].strip()}</s>" if answer else f" [INST] {message['content']} [/INST]", answer)
        )
    return pieces


def thinking(messages: list[dict[str, str]]) -> Pieces:
    pieces: Pieces = []
    for message in messages:
        answer = message["role"] == "assistant"
        thoughts = "<think>\n\n</think>\n\n" if answer and message is messages[-1] else ""
        pieces += [(f"<|im_start|>{message['role']}\n", False), (f"{thoughts}{message['content']}<|im_end|>\n", answer)]
    return pieces


TEMPLATES: dict[str, tuple[str, Callable[[list[dict[str, str]]], Pieces]]] = {
    "marked": (MARKED, marked),
    "instruct": (INSTRUCT, instruct),
    "thinking": (THINKING, thinking),
}
WORDS = tiny.sentences(60, 5, tiny.WORDS)
CHATS = [
    [
        {"role": ("user", "assistant")[turn % 2], "content": WORDS[(number + 7 * turn) % 60]}
        for turn in range(2 * (1 + number % 3))
    ]
    for number in range(30)
]


def by_hand(tokenizer: Any, pieces: Pieces) -> tuple[list[int], list[bool]]:
    """(ids, whether a character of the token is of an answer), from the lengths of the tokens (all is ASCII)."""
    ids = tokenizer("".join(text for text, _ in pieces), add_special_tokens=False)["input_ids"]
    answer = [of for text, of in pieces for _ in text]
    mask, at = [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        mask.append(any(answer[at : at + len(token)]))
        at += len(token)
    assert at == len(answer)
    return ids, mask


def counted_by_hand(dataset: Any, mask_T: Any) -> list[bool]:
    """Of each token in flat order: whether the next one is of its row, of its document, and of an answer."""
    counted = []
    for number in range(len(dataset)):
        start, stop = dataset.row_starts_R1[number : number + 2]
        ids, size = dataset.document_ids_T[start:stop], stop - start
        counted += [t + 1 < size and ids[t + 1] == ids[t] and bool(mask_T[start + t + 1]) for t in range(size)]
    return counted
