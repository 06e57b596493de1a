"""The ids are those of transformers, whatever the tokenizer; the fingerprint covers what decides them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from trace_ds.corpora.read import Document
from trace_ds.corpora.tokenizer import (
    check_tokenizer,
    encode_documents,
    encoder,
    library_tokenizer,
    load_tokenizer,
    tokenizer_fingerprint,
)
from trace_ds.errors import UserError


def byte_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    tiny.make_tokenizer(folder)
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def unigram_tokenizer(_: Path) -> Any:
    """As T5's: text is normalised, spaces become marks, and there is an unknown token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    special = {"special_tokens": ["<s>", "</s>", "<unk>"], "unk_token": "<unk>"}
    trainer = trainers.UnigramTrainer(vocab_size=300, show_progress=False, **special)
    tokenizer.train_from_iterator([" ".join(tiny.WORDS)] * 9, trainer)
    return tokenizer


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("make", [byte_tokenizer, unigram_tokenizer])
def test_the_ids_are_those_of_transformers(make: Callable[[Path], Any], special: bool, tmp_path: Path) -> None:
    """Also of a tokenizer whose file pads and truncates, and of text that looks like a special token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = make(tmp_path)
    own.enable_padding(length=64)
    own.enable_truncation(8)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", split_special_tokens=special
    )
    texts = ["iron gold", "", "lead</s>tin <s> [UNK]", "\n".join(tiny.sentences(20, 0, tiny.WORDS)), "金的 1\n\n  if"]
    encode = encoder(tokenizer)
    assert type(library_tokenizer(tokenizer)) is Tokenizer
    assert encode(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"] == encode(texts)
    assert len(encode([texts[3]])[0]) > 8


def test_documents_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.tokenizer.BATCH_DOCUMENTS", 2)
    tiny.make_tokenizer(tmp_path)
    encode = encoder(load_tokenizer(tmp_path))
    texts = ["iron gold", "", "\n".join(tiny.sentences(600, 1, tiny.WORDS)), "lead", ""]
    documents = [Document(text, "") for text in texts]
    assert list(encode_documents(documents, lambda batch: encode([each.text for each in batch]), 3)) == encode(texts)


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
