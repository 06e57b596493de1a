"""The ids are those of transformers, whatever the tokenizer; the fingerprint covers what decides them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from trace_ds.corpora.tokenizer import (
    check_tokenizer,
    encode,
    load_tokenizer,
    tokenizer_fingerprint,
)
from trace_ds.errors import UserError


def test_the_ids_are_those_of_the_text_alone(tmp_path: Path) -> None:
    """Also of a tokenizer whose file pads and truncates, and of text that looks like a special token."""
    tiny.make_tokenizer(tmp_path)
    plain, tokenizer = load_tokenizer(tmp_path), load_tokenizer(tmp_path)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    tokenizer.backend_tokenizer.enable_truncation(8)
    texts = ["iron gold", "", "lead</s>tin <s> [UNK]", "\n".join(tiny.sentences(20, 0, tiny.WORDS)), "金的 1\n\n  if"]
    ids = encode(tokenizer, texts)
    assert ids == [plain.encode(text, add_special_tokens=False) for text in texts] and len(ids[3]) > 64
    assert encode(tokenizer, []) == []


def test_every_file_that_decides_ids_is_in_the_fingerprint(tmp_path: Path) -> None:
    tiny.make_tokenizer(tmp_path)
    before = tokenizer_fingerprint(tmp_path)
    (tmp_path / "README.md").write_text("no tokenizer")
    assert tokenizer_fingerprint(tmp_path) == before
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "merges.txt"):
        (tmp_path / name).write_text("{}")
        assert tokenizer_fingerprint(tmp_path) != before
        before = tokenizer_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: "[" * 100_000, "the tokenizer is damaged ("),
        (lambda raw: json.dumps(raw | {"model": None}), "the tokenizer is damaged ("),
        (lambda raw: json.dumps(raw | {"added_tokens": [{"id": 300}]}), "ids up to 300, the model embeddings for 300"),
        (lambda raw: json.dumps(raw | {"pre_tokenizer": {"type": "Nonsense"}}), "the tokenizer cannot be loaded"),
    ],
)
def test_damaged_and_too_large_tokenizers(tmp_path: Path, change: Any, message: str) -> None:
    tiny.make_tokenizer(tmp_path)
    check_tokenizer(tmp_path, 300)
    file = tmp_path / "tokenizer.json"
    file.write_text(change(json.loads(file.read_text())))
    with pytest.raises(UserError) as error:
        check_tokenizer(tmp_path, 300)
        load_tokenizer(tmp_path)
    assert message in error.value.line()
    with pytest.raises(UserError, match="there is no directory with a tokenizer"):
        load_tokenizer(tmp_path / "none")
