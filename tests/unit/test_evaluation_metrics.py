"""The metrics, by hand, against brute force and the packages the field uses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stage_calls import evaluate
from test_evaluation_models import opened, save_model
from test_evaluation_stage import Case, case, text, write_lines  # noqa: F401

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.dataset import PackingCounts, TokenDataset, pack, write_rows
from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation import drift, kinds, retrained
from trace_ds.evaluation.items import ChoiceItem, QuestionItem, VerbatimItem, read_task
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.tasks import run_task

CHOICE = {"prompt": "w1 w2", "choices": ["w3", "w4", "w5 w6", "w7"], "answer": 2}
TOFU = {"question": "w1", "answer": "w2", "paraphrased_answer": "w3", "perturbed_answer": ["w4"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    with opened(path) as language_model:
        yield language_model


@pytest.mark.parametrize(
    ("kind", "lines", "message"),
    [
        ("choice", [CHOICE, CHOICE | {"answer": None}], ":2: the answer is missing"),
        ("choice", [CHOICE | {"answer": 4}], ":1: the answer 4 is out of range"),
        ("choice", [CHOICE | {"answer": True}], "the answer True is out of range"),
        ("choice", [CHOICE | {"choices": ["w1"] * 5}], "the question has 5 choices"),
        ("choice", [CHOICE | {"choices": ["w1", "w2", " ", "w4"]}], "choice 2 is empty"),
        ("choice", [CHOICE | {"choices": ["w1", "w2", 3, "w4"]}], "not a list of texts"),
        ("choice", [CHOICE | {"prompt": " "}], "there is no text under 'prompt'"),
        ("choice", [], "the task file is empty"),
        ("choice", b"\n{broken\n", ":2: the line is not a JSON object"),
        ("verbatim", b'{"prompt": "\xff"}\n', ":1: not UTF-8"),
        ("verbatim", [{"prompt": "x"}], "no text under 'continuation'"),
        ("knowmem", [{"question": "q", "answer": ["a", "b"]}, {"question": "q"}], ":2: the answer is missing"),
        ("tofu", [TOFU, TOFU | {"perturbed_answer": ["w4", " "]}], ":2: there is no list of texts under 'perturbed_a"),
        ("tofu", [TOFU | {"paraphrased_answer": 3}], "there is no text under 'paraphrased_answer'"),
        ("perplexity", [{"text": " "}], "has no text"),
        ("perplexity", None, "does not exist"),
    ],
)
def test_a_bad_task_file_names_file_and_line(kind: str, lines: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    if isinstance(lines, bytes):
        path.write_bytes(lines)
    elif lines is not None:
        write_lines(path, lines)
    keys = {"examples": str(path)} if kind == "knowmem" else {}
    config = TaskConfig.model_validate({"name": "t", "type": kind, "path": str(path), "role": "forget", **keys})
    with pytest.raises(UserError, match=message) as caught:
        read_task(config)
    assert str(path) in caught.value.line() and caught.value.fix


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"type": "knowmem", "path": "k"}, "a knowmem task needs examples"),
        ({"type": "choice", "path": "k", "holdout": "h"}, "no other has one"),
        ({"type": "choice"}, "task x has no path"),
        ({"type": "choice", "path": "a.jsonl", "num_fewshot": 0}, "are keys of lm_eval tasks"),
        ({"type": "lm_eval", "task": "mmlu", "num_fewshot": -1}, "greater than or equal to 0"),
        ({"type": "lm_eval", "task": "mmlu", "path": "a.jsonl"}, "lm_eval brings its own data, path is for other"),
    ],
)
def test_a_task_has_the_keys_its_type_needs(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate({"name": "x", "role": "forget", **keys})


def random_questions(count: int) -> list[ChoiceItem]:
    generator = np.random.default_rng(0)

    def words(low: int, high: int) -> str:
        return text(generator, int(generator.integers(low, high)))

    return [
        ChoiceItem(
            str(n), words(2, 9), tuple(words(1, 4) for _ in range(4)), int(generator.integers(0, 4)), "ab"[n % 2]
        )
        for n in range(count)
    ]


def test_choice_equals_brute_force(model: LanguageModel) -> None:
    """Half of the items have what the model really generates as their right choice: that is ``exact``."""
    items = []
    for number, item in enumerate(random_questions(20)):
        greedy = model.continue_greedily([model.encode(item.prompt)], [3])[0]
        texts = list(item.choices)
        if number % 2 and len(greedy) == 3:
            texts[item.answer] = str(model.tokenizer.decode(greedy))
        items.append(ChoiceItem(item.id, item.prompt, tuple(texts), item.answer, item.source))
    result = kinds.evaluate_choice(model, items, "here")
    probability = []
    for item, log in zip(items, result.logs, strict=True):
        sums, exact = [], []
        for choice in item.choices:
            prompt = model.encode(item.prompt)
            ids = [*prompt, *model.tokenizer.encode(choice, add_special_tokens=False)]
            with torch.no_grad():
                log_prob_SV = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
            places = range(len(prompt), len(ids))
            sums.append(sum(float(log_prob_SV[t - 1, ids[t]]) for t in places))
            exact.append(all(int(log_prob_SV[t - 1].argmax()) == ids[t] for t in places))
        assert np.allclose(log["log_prob"], sums, atol=1e-4)
        assert log["predicted"] == int(np.argmax(sums)) and log["exact"] == exact[item.answer]
        by_character = [total / len(choice) for total, choice in zip(sums, item.choices, strict=True)]
        assert log["predicted_norm"] == int(np.argmax(by_character))
        probability.append(np.exp(sums[item.answer]) / np.exp(sums).sum())
    scores, sources = result.metrics(), result.by_source()
    assert scores["accuracy"] == np.mean([log["correct"] for log in result.logs])
    assert scores["choice_probability"] == pytest.approx(np.mean(probability), rel=1e-4)
    assert 0.2 < scores["exact_match"] < 0.8
    assert set(sources) == {"a", "b"} and sources["a"]["n"] == 10
    assert (sources["a"]["accuracy"] + sources["b"]["accuracy"]) / 2 == pytest.approx(scores["accuracy"])


def test_verbmem_equals_the_way_of_muse(model: LanguageModel) -> None:
    """As its authors compute it: transformers' own greedy decoding against the true text cut to as many tokens; beside
    it the mean probability of the true tokens."""
    from rouge_score.rouge_scorer import RougeScorer

    generator, new = np.random.default_rng(4), 6
    items = [VerbatimItem(str(n), text(generator, 5), text(generator, 9), "s") for n in range(8)]
    outcome = kinds.evaluate_verbatim(model, items, new, "here")
    scorer, settings = RougeScorer(["rougeL"], use_stemmer=False), {"do_sample": False, "pad_token_id": 0}
    for number, item in enumerate(items):
        ids = torch.tensor([model.encode(item.prompt)])
        answer = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
        continuation = model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        true_ids = model.tokenizer.encode(item.continuation, add_special_tokens=False)[:new]
        expected = scorer.score(model.tokenizer.decode(true_ids), continuation)["rougeL"].fmeasure
        assert outcome.columns["rouge_l"][number] == expected
        whole = torch.tensor([[*ids[0].tolist(), *true_ids]])
        with torch.no_grad():
            prob_SV = model.model(whole).logits[0].double().softmax(-1)[ids.shape[1] - 1 : -1]
        true_probability = prob_SV.gather(1, torch.tensor(true_ids)[:, None]).mean()
        assert outcome.columns["token_probability"][number] == pytest.approx(float(true_probability), rel=1e-4)
    assert len(set(outcome.columns["rouge_l"])) > 1


@pytest.mark.parametrize(("pair", "expected"), [(("a", "b"), ("a", " b")), (("a\n", " b"), ("a", "\n b"))])
def test_white_space_goes_to_the_continuation(pair: tuple[str, str], expected: tuple[str, str]) -> None:
    assert kinds.boundary(*pair) == expected


def test_knowmem_equals_brute_force(model: LanguageModel) -> None:
    """Prompt and end of an answer are MUSE's; of several accepted answers the best counts."""
    from rouge_score.rouge_scorer import RougeScorer

    generator = np.random.default_rng(1)
    examples, items = (
        [
            QuestionItem(str(n), text(generator, 4), (text(generator, 3), text(generator, 2)), f"s{n % 2}")
            for n in range(count)
        ]
        for count in (12, 5)
    )
    outcome = kinds.evaluate_knowmem(model, items, examples, "here")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    shots = "".join(f"Question: {item.question}\nAnswer: {item.answers[0]}\n\n" for item in examples[:10])
    for item, score, log in zip(items, outcome.columns["rouge_l"], outcome.logs, strict=True):
        prompt = model.encode(f"{shots}Question: {item.question}\nAnswer: ")
        (ids,) = model.continue_greedily([prompt], [32])
        answer = str(model.tokenizer.decode(ids, skip_special_tokens=True))
        assert log["continuation"] == answer
        assert score == max(scorer.score(reference, answer)["rougeL"].fmeasure for reference in item.answers)
    assert outcome.by_source()["s1"] == {"n": 2, "rouge_l": pytest.approx(outcome.columns["rouge_l"][1::2].mean())}
    assert (
        kinds.cut_answer("because\nof it\n\nand more") == "because\nof it"
        and kinds.cut_answer("because\nQuestion: x") == "because"
    )


def test_perplexity_equals_brute_force(model: LanguageModel) -> None:
    """Every token but the first of a document is predicted once, in windows that share one; the mean is over tokens,
    not documents."""
    documents = [Document(item.prompt + " " + " ".join(item.choices), item.source) for item in random_questions(9)]
    result = kinds.evaluate_perplexity(model, documents, 7, "here")
    total, count = 0.0, 0
    for document in documents:
        ids = model.encode_document(document.text)
        assert (ids[0], ids[-1]) == (0, 1)
        for start in range(0, len(ids) - 1, 6):
            window = torch.tensor([ids[start : start + 7]])
            with torch.no_grad():
                log_prob = torch.log_softmax(model.model(window).logits[0, :-1].double(), -1)
            total -= float(log_prob.gather(1, window[0, 1:, None]).sum())
            count += window.shape[1] - 1
    assert result.count() == count == sum(len(model.encode_document(document.text)) - 1 for document in documents)
    assert math.isclose(result.metrics()["perplexity"], math.exp(total / count), rel_tol=1e-6)
    assert set(result.by_source()) == {"a", "b"}
    unlikely = kinds.PerplexityOutcome({"nll": np.array([1e4]), "tokens": np.array([1])}, [])
    assert unlikely.metrics()["perplexity"] == math.inf


@given(st.integers(2, 9), st.integers(1, 30), st.integers(0, 2**32), st.data())
def test_overlap_equals_brute_force(experts: int, tokens: int, seed: int, data: st.DataObject) -> None:
    top_k, generator = data.draw(st.integers(1, experts)), np.random.default_rng(seed)
    before_TLK, after_TLK = (
        np.array([generator.permutation(experts)[:top_k] for _ in range(tokens)])[:, None] for _ in range(2)
    )
    result = drift.compare(drift.RoutingSample(before_TLK, 3), drift.RoutingSample(after_TLK, 3))
    sets = [[set(each[0]) for each in side.tolist()] for side in (before_TLK, after_TLK)]
    assert result["overlap"] == pytest.approx([np.mean([len(a & b) / top_k for a, b in zip(*sets, strict=True)])])
    same = drift.compare(*[drift.RoutingSample(side, 3) for side in (before_TLK, before_TLK[:, :, ::-1])])
    assert same["overlap_mean"] == 1.0  # the order of the K experts does not matter


def packed(path: Path, documents: list[list[int]], context: int) -> TokenDataset:
    write_rows(path, pack(documents, context, "dense", PackingCounts()))
    return TokenDataset.open(path)


def test_routing_of_packed_rows_is_that_of_the_documents_alone(model: LanguageModel, tmp_path: Path) -> None:
    """Attention must not cross documents within a row, and filling must not count."""
    from trace_ds.models.routers import record_routing

    generator = np.random.default_rng(5)
    documents = [generator.integers(3, 63, size).tolist() for size in (7, 1, 12, 5, 3, 9, 2, 11)]
    dataset = packed(tmp_path / "rows.arrow", documents, 20)
    sample = drift.sample_routing(model, dataset, 99, 2)
    assert sample.rows == len(dataset)
    assert sample.indices_TLK.shape == (int(dataset.counted(0, dataset.tokens).sum()), 2, 2)
    expected = []
    for row in range(len(dataset)):
        packed_row = dataset.row(row)
        for document in dict.fromkeys(packed_row.document_ids.tolist()):
            piece = packed_row.input_ids[packed_row.document_ids == document]
            with record_routing(model.model) as recorder, torch.no_grad():
                model.model(torch.tensor([piece.tolist()]))
            layers = [recorder.layer(layer)[1].numpy()[:-1] for layer in range(2)]  # the last position predicts nothing
            expected.append(np.stack(layers, axis=1))
    assert np.array_equal(np.sort(sample.indices_TLK, -1), np.sort(np.concatenate(expected), -1))


def test_membership_scores_by_hand() -> None:
    assert retrained.lowest_mean(np.array([-1, -5, -2, -4, -3], dtype=np.float32)) == -4.5  # the two lowest of five
    assert retrained.auc(np.array([3.0, 2.0]), np.array([2.0, 1.0])) == (3 + 0.5) / 4  # a tie counts half
    assert retrained.priv_leak(1.0) == -100.0  # every forget text looks like a member: not unlearned
    assert math.isclose(retrained.priv_leak(0.85, 0.48), 100 * (0.15 - 0.52) / 0.52)


def test_membership_aucs_equal_scikit_learn(model: LanguageModel, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(3)
    paths = [
        write_lines(tmp_path / f"{side}.jsonl", [{"text": text(generator, 12)} for _ in range(count)])
        for side, count in (("member", 7), ("holdout", 9))
    ]
    task = read_task(TaskConfig(name="mia", type="membership", path=paths[0], holdout=paths[1], role="forget"))
    outcome = run_task(model, task, max_new_tokens=4, context_length=64)
    values = {score["metric"]: score for score in outcome.scores}
    assert values["priv_leak"]["value"] is None and values["priv_leak"]["n"] == 16
    scores, labels = zip(*[(item["min_k"], item["member"]) for item in outcome.items], strict=True)
    assert values["auc_min_k"]["value"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert values["auc_min_k"]["direction"] == "reference"


def test_priv_leak_is_measured_against_the_retrained_model_or_says_that_it_is_not(case: Case) -> None:  # noqa: F811
    forget, holdout = (case.raw["data"][side][0]["path"] for side in ("forget", "retain"))
    task = {"name": "mia", "type": "membership", "path": forget, "holdout": holdout, "role": "forget"}
    evaluate(case.config(tasks=[task], drift=False), case.run)
    scores = {name: {s["metric"]: s for s in case.result(name)["scores"]} for name in ("gold", "original", "unlearned")}
    gold_auc = scores["gold"]["auc_min_k"]["value"]
    assert scores["gold"]["priv_leak"]["value"] == 0.0
    for result in scores.values():
        theirs = 1 - gold_auc  # MUSE's AUC counts holdout above member
        expected = 100 * ((1 - result["auc_min_k"]["value"]) - theirs) / theirs
        assert result["priv_leak"]["value"] == pytest.approx(expected)
        assert result["priv_leak"]["note"] == f"AUC of the retrained model gold: {gold_auc:.4f}"
        assert result["auc_min_k"]["reference"] == gold_auc
    evaluate(case.config(tasks=[task], drift=False, models={}), case.run)
    result = {s["metric"]: s for s in case.result("unlearned")["scores"]}
    assert result["priv_leak"]["value"] == pytest.approx(100 * (0.5 - result["auc_min_k"]["value"]) / 0.5)
    assert "assumed to be 0.5" in result["priv_leak"]["note"]
