"""Knowledge, extraction and membership: MUSE's definitions by hand, brute force, and scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_calls import evaluate
from test_evaluation_models import opened, save_model
from test_evaluation_stage import Case, case, text, write_lines  # noqa: F401

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation import kinds, membership
from trace_ds.evaluation.items import QuestionItem, VerbatimItem, read_task
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.evaluation.tasks import run_task


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = save_model(tmp_path_factory.mktemp("model"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    with opened(path) as language_model:
        yield language_model


def question(number: int, generator: np.random.Generator) -> QuestionItem:
    return QuestionItem(str(number), text(generator, 4), (text(generator, 3), text(generator, 2)), f"s{number % 2}")


def test_the_prompt_and_the_end_of_an_answer_are_those_of_muse() -> None:
    examples = [QuestionItem(str(n), f"q{n}?", (f"a{n}", "other"), "s") for n in range(12)]
    expected = "".join(f"Question: q{n}?\nAnswer: a{n}\n\n" for n in range(10)) + "Question: why?\nAnswer: "
    assert kinds.prompt_of("why?", examples) == expected
    assert kinds.cut("because\nof it\n\nand more") == "because\nof it"
    assert kinds.cut("because\nQuestion: x") == "because" and kinds.cut("Question: x") == ""


def test_knowmem_equals_brute_force(model: LanguageModel) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    generator = np.random.default_rng(1)
    examples, items = ([question(n, generator) for n in range(count)] for count in (10, 5))
    found = kinds.evaluate_knowmem(model, items, examples, "here")
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    for item, score, log in zip(items, found.columns["rouge_l"], found.logs, strict=True):
        ids = torch.tensor([model.encode(kinds.prompt_of(item.question, examples))])
        for _ in range(32):
            token = model.model(ids, use_cache=False).logits[0, -1].argmax()
            if token == model.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], 1)
        prompt_length = len(model.encode(kinds.prompt_of(item.question, examples)))
        theirs = model.tokenizer.decode(ids[0, prompt_length:], skip_special_tokens=True)
        assert log["continuation"] == theirs
        assert score == max(scorer.score(reference, theirs)["rougeL"].fmeasure for reference in item.answers)
    assert found.by_source()["s1"] == {"n": 2, "rouge_l": pytest.approx(found.columns["rouge_l"][1::2].mean())}


def test_verbmem_equals_the_way_of_muse(model: LanguageModel) -> None:
    """As its authors compute it: transformers' own greedy decoding against the true text cut to as many tokens."""
    from rouge_score.rouge_scorer import RougeScorer

    generator, new = np.random.default_rng(4), 6
    items = [VerbatimItem(str(n), text(generator, 5), text(generator, 9), "s") for n in range(8)]
    found = kinds.evaluate_verbatim(model, items, new, "here")
    scorer, settings = RougeScorer(["rougeL"], use_stemmer=False), {"do_sample": False, "pad_token_id": 0}
    for item, score in zip(items, found.columns["rouge_l"], strict=True):
        ids = torch.tensor([model.encode(item.prompt)])
        answer = model.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, **settings)
        said = model.tokenizer.decode(answer[0, ids.shape[1] :], skip_special_tokens=True)
        true = model.tokenizer.decode(model.tokenizer.encode(item.continuation, add_special_tokens=False)[:new])
        assert score == scorer.score(true, said)["rougeL"].fmeasure
    assert len(set(found.columns["rouge_l"])) > 1


@pytest.mark.parametrize(
    ("guessed", "expected"),
    [([1, 1, 1, 1], 1.0), ([0, 1, 1, 1], 0.75), ([1, 0, 0, 1], 0.25), ([1, 1, 1, 0], 0.0), ([0], 0.0)],
)
def test_extraction_strength_by_hand(guessed: list[int], expected: float) -> None:
    assert kinds.strength(np.array(guessed, dtype=bool)) == expected


def test_extraction_strength_is_what_greedy_decoding_extracts(model: LanguageModel) -> None:
    generator = np.random.default_rng(2)
    start = [model.encode(text(generator, 3)) for _ in range(4)]
    rest = model.continue_greedily(start, [6] * 4)
    texts = [model.tokenizer.decode(ids[1:]) for ids in start]
    texts = [f"{a} {model.tokenizer.decode(b)}".strip() for a, b in zip(texts, rest, strict=True)]
    documents = [Document(text, "s") for text in [*texts, text(generator, 9)]]
    found = kinds.evaluate_extraction(model, documents, 64, "here")
    strength = found.columns["extraction_strength"]
    for document, value in zip(documents, strength, strict=True):
        ids = model.encode(document.text)
        finishes = [model.continue_greedily([ids[:k]], [len(ids) - k])[0] == ids[k:] for k in range(1, len(ids))]
        given = finishes.index(True) + 1 if any(finishes) else len(ids)
        assert value == pytest.approx(1 - (given - 1) / (len(ids) - 1))
    assert strength[:4].min() > 0 and len(found.logs) == 5


def test_membership_aucs_equal_scikit_learn(model: LanguageModel, tmp_path: Path) -> None:
    from sklearn.metrics import roc_auc_score

    generator = np.random.default_rng(3)
    paths = [
        write_lines(tmp_path / f"{side}.jsonl", [{"text": text(generator, 12)} for _ in range(count)])
        for side, count in (("member", 7), ("holdout", 9))
    ]
    config = TaskConfig(name="mia", type="membership", path=paths[0], holdout=paths[1], role="forget")
    task = read_task(config)
    outcome = run_task(model, task, max_new_tokens=4, context_length=64)
    values = {score["metric"]: score for score in outcome.scores}
    assert values["priv_leak"]["value"] is None and values["priv_leak"]["n"] == 16
    for attack in membership.ATTACKS:
        scores, labels = zip(*[(item[attack], item["member"]) for item in outcome.items], strict=True)
        assert values[f"auc_{attack}"]["value"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
        assert values[f"auc_{attack}"]["direction"] == "reference"
    ids = [model.encode(item.text) for item in task.items]  # type: ignore[union-attr]
    log_prob = [torch.log_softmax(model.model(torch.tensor([i])).logits[0].double(), -1) for i in ids]
    means = [
        float(np.mean([p[t - 1, i[t]].item() for t in range(1, len(i))])) for p, i in zip(log_prob, ids, strict=True)
    ]
    assert [item["loss"] for item in outcome.items] == pytest.approx(means, abs=1e-5)


def test_priv_leak_is_measured_against_the_retrained_model_or_says_that_it_is_not(case: Case) -> None:  # noqa: F811
    forget = case.raw["data"]["forget"][0]["path"]
    holdout = case.raw["data"]["retain"][0]["path"]
    task = {"name": "mia", "type": "membership", "path": forget, "holdout": holdout, "role": "forget"}
    evaluate(case.config(tasks=[task], drift=False), case.run)
    scores = {name: {s["metric"]: s for s in case.result(name)["scores"]} for name in ("gold", "original", "unlearned")}
    retrained = scores["gold"]["auc_min_k"]["value"]
    assert scores["gold"]["priv_leak"]["value"] == 0.0
    for found in scores.values():
        theirs = 1 - retrained  # MUSE's AUC counts holdout above member
        expected = 100 * ((1 - found["auc_min_k"]["value"]) - theirs) / theirs
        assert found["priv_leak"]["value"] == pytest.approx(expected)
        assert found["priv_leak"]["note"] == f"AUC of the retrained model gold: {retrained:.4f}"
        assert found["auc_loss"]["reference"] == scores["gold"]["auc_loss"]["value"]
    before = case.files()
    evaluate(case.config(tasks=[task], drift=False), case.run)
    assert case.files() == before
    evaluate(case.config(tasks=[task], drift=False, models={}), case.run)
    found = {s["metric"]: s for s in case.result("unlearned")["scores"]}
    assert found["priv_leak"]["value"] == pytest.approx(100 * (0.5 - found["auc_min_k"]["value"]) / 0.5)
    assert "assumed to be 0.5" in found["priv_leak"]["note"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"type": "knowmem", "path": "k"}, "a knowmem task needs examples"),
        ({"type": "membership", "path": "k"}, "a membership task needs holdout"),
        ({"type": "lm_eval"}, "a lm_eval task needs task"),
        ({"type": "choice", "path": "k", "holdout": "h"}, "no other has one"),
        ({"type": "choice"}, "task x has no path"),
    ],
)
def test_a_task_has_the_files_its_type_needs(task: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig.model_validate({"name": "x", "role": "forget", **task})


def test_a_question_without_an_answer_names_file_and_line(tmp_path: Path) -> None:
    good = write_lines(tmp_path / "good.jsonl", [{"question": "q", "answer": ["a", "b"]}])
    bad = write_lines(tmp_path / "bad.jsonl", [{"question": "q", "answer": "a"}, {"question": "q"}])
    config = TaskConfig(name="k", type="knowmem", path=bad, examples=good, role="forget")
    with pytest.raises(UserError, match="the answer is missing") as caught:
        read_task(config)
    assert "bad.jsonl:2" in caught.value.line()
