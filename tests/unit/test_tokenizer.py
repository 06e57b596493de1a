"""The ids are those of transformers, whatever the tokenizer; the fingerprint covers what decides them."""

from __future__ import annotations

import json
from functools import cache
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

# How the families cut text into words, before merges: (normalizers, pre-tokenizers), by the names of the library.
GPT2: list[tuple[str, Any]] = [("ByteLevel", {"add_prefix_space": False})]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = ("ByteLevel", {"add_prefix_space": False, "use_regex": False})
KINDS: dict[str, tuple[str, list[tuple[str, Any]], list[tuple[str, Any]]]] = {
    "gpt2, olmoe": ("BPE", [], GPT2),
    "mixtral: no words at all": (
        "BPE",
        [("Prepend", {"prepend": "▁"}), ("Replace", {"pattern": " ", "content": "▁"})],
        [],
    ),
    "llama 3, qwen": ("BPE", [("NFC", {})], [("Split", {"pattern": LLAMA3, "behavior": "isolated"}), BYTES]),
    "deepseek": (
        "BPE",
        [],
        [
            ("Split", {"pattern": r"[\r\n]", "behavior": "isolated"}),
            ("Split", {"pattern": r"\s?[A-Za-zµÀ-ÖØ-ö]+", "behavior": "isolated"}),
            ("Split", {"pattern": r"\s?[!-/:-~！-／]+", "behavior": "isolated"}),
            ("Split", {"pattern": r"\s+$", "behavior": "isolated"}),
            ("Split", {"pattern": r"[一-龥ࠀ-一가-퟿]+", "behavior": "isolated"}),
            ("Digits", {"individual_digits": True}),
            BYTES,
        ],
    ),
    "t5: unigram": ("Unigram", [("NFKC", {})], [("Metaspace", {})]),
    "bert": ("WordPiece", [("BertNormalizer", {})], [("BertPreTokenizer", {})]),
}


@cache
def made_tokenizer(kind: str) -> Any:
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    def sequence(module: Any, parts: list[tuple[str, Any]]) -> Any:
        steps = []
        for name, options in parts:
            if name == "Split":
                options = options | {"pattern": Regex(options["pattern"])}
            steps.append(getattr(module, name)(**options))
        return module.Sequence(steps) if steps else None

    model, normalizer, words = KINDS[kind]
    tokenizer = Tokenizer(getattr(models, model)())
    tokenizer.normalizer = sequence(normalizers, normalizer)
    # SentencePiece trains tokens within words, and uses them without any
    tokenizer.pre_tokenizer = sequence(pre_tokenizers, words or [("Metaspace", {})])
    texts = [
        " ".join(tiny.WORDS),
        "金的符号是铁 日本語 (x+1) 12345 it's\n" * 3,
        "\n    if gold:\n        iron\n" * 3,
    ] * 3
    options: dict[str, Any] = {"show_progress": False, "vocab_size": 500}
    options |= {"special_tokens": ["<s>", "</s>", "<unk>", "[UNK]"]}
    options |= {"unk_token": "<unk>"} if model == "Unigram" else {}
    options |= {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if model != "WordPiece" else {}
    tokenizer.train_from_iterator(
        texts, getattr(trainers, f"{model.title().replace('piece', 'Piece')}Trainer")(**options)
    )
    tokenizer.pre_tokenizer = sequence(pre_tokenizers, words)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ids_are_those_of_transformers(kind: str, special: bool) -> None:
    """Also of a tokenizer whose file pads and truncates, and of text that looks like a special token."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    own = Tokenizer.from_str(made_tokenizer(kind).backend_tokenizer.to_str())
    own.enable_padding(length=64)
    own.enable_truncation(8)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, bos_token="<s>", eos_token="</s>", split_special_tokens=special
    )
    texts = ["iron gold", "", "lead</s>tin <s> [UNK]", "\n".join(tiny.sentences(20, 0, tiny.WORDS)), "金的 1\n\n  if"]
    result = encoder(tokenizer)
    assert type(library_tokenizer(tokenizer)) is Tokenizer
    assert result(texts) == tokenizer(texts, add_special_tokens=False)["input_ids"] == result(texts)
    assert len(result([texts[3]])[0]) > 8


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
