"""TOFU's metrics: the paper's definitions by hand, brute force on a model, and through the stage."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stage_calls import evaluate
from test_evaluation_models import opened, save_model
from test_evaluation_stage import Case, case, text, write_lines  # noqa: F401

from trace_ds.evaluation import retrained
from trace_ds.evaluation.items import TofuItem


def test_the_definitions_by_hand() -> None:
    assert retrained.truth_ratio(0.4, np.array([0.1, 0.2, 0.3])) == pytest.approx(0.5)
    # the harmonic mean of 1, 1/2 and 1/4 is 3 / (1 + 2 + 4)
    assert retrained.model_utility([1, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert retrained.model_utility([1, 0.5, 0]) == 0
    # two samples of three without overlap: of the C(6, 3) = 20 ways to deal them two are as extreme
    assert retrained.forget_quality([0.1, 0.2, 0.3], [1, 2, 3]) == pytest.approx(0.1)
    assert retrained.forget_quality([0.1, 2, 0.3], [2, 0.3, 0.1]) == 1
    # three of four words are there: recall 3/4, whatever else is said; "books" and "book" are one stem
    assert retrained.rouge_l_recall("he wrote four books", "she wrote four book and more") == 0.75


def items(generator: np.random.Generator, paraphrased: bool) -> list[TofuItem]:
    return [
        TofuItem(
            str(number),
            text(generator, 4),
            text(generator, 3),
            text(generator, 2) if paraphrased else "",
            tuple(text(generator, 1 + n) for n in range(3)),
            "s",
        )
        for number in range(5)
    ]


@pytest.mark.parametrize("paraphrased", [True, False])
def test_a_models_scores_equal_brute_force(paraphrased: bool, tmp_path: Path) -> None:
    questions = items(np.random.default_rng(2), paraphrased)

    def per_token(model: Any, item: TofuItem, answer: str) -> float:
        """P(answer | question)^(1 / tokens), one token at a time."""
        prompt = model.tokenizer.encode(f"Question: {item.question}\nAnswer:", add_special_tokens=False)
        ids = [0, *prompt, *model.tokenizer.encode(f" {answer}", add_special_tokens=False)]
        log_prob = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
        result = [float(log_prob[t - 1, ids[t]]) for t in range(1 + len(prompt), len(ids))]
        return math.exp(sum(result) / len(result))

    with opened(save_model(tmp_path / "model")) as model, torch.inference_mode():
        outcome = retrained.evaluate_tofu(model, questions, 6, "here")
        for number, item in enumerate(questions):
            true = per_token(model, item, item.answer)
            false = [per_token(model, item, answer) for answer in item.false]
            other = per_token(model, item, item.paraphrase) if paraphrased else true
            ratio = sum(false) / 3 / other
            share = true if paraphrased else true / (true + sum(false))
            log = outcome.logs[number]
            assert log["truth_ratio"] == pytest.approx(ratio, rel=1e-5)
            assert outcome.columns["probability"][number] == pytest.approx(share, rel=1e-5)
            assert outcome.columns["truth"][number] == pytest.approx(max(0, 1 - ratio), abs=1e-5)
            expected = retrained.rouge_l_recall(item.answer, log["continuation"])
            assert outcome.columns["rouge_l_recall"][number] == expected
    assert len({log["continuation"] for log in outcome.logs}) > 1 and 0 < outcome.metrics()["truth"] < 1


def test_through_the_stage(case: Case) -> None:  # noqa: F811
    """Forget quality is measured against the retrained model, utility over both tasks; without it there is none."""
    generator, folder = np.random.default_rng(3), case.run.path.parent
    tasks = []
    for name, role, paraphrased in (
        ("forgotten", "forget", True),
        ("kept", "utility", True),
        ("world", "utility", False),
    ):
        records = [
            {"question": item.question, "answer": item.answer, "perturbed_answer": list(item.false)}
            | ({"paraphrased_answer": item.paraphrase} if paraphrased else {})
            for item in items(generator, paraphrased)
        ]
        path = write_lines(folder / f"{name}.jsonl", records)
        tasks.append({"name": name, "type": "tofu", "path": path, "role": role})
    evaluate(case.config(tasks=tasks, drift=False), case.run)
    result = {
        name: {(score["task"], score["metric"]): score for score in case.result(name)["scores"]}
        for name in ("original", "gold", "unlearned")
    }
    ratios = {name: [item["truth_ratio"] for item in case.result(name)["items"]["forgotten"]] for name in result}
    for name, scores in result.items():
        assert {key for key in scores if key[1] == "forget_quality"} == {("forgotten", "forget_quality")}
        quality = scores["forgotten", "forget_quality"]
        assert quality["value"] == retrained.forget_quality(ratios[name], ratios["gold"])
        assert (quality["direction"], scores["forgotten", "truth"]["direction"]) == ("higher", "lower")
        six = [scores[task, metric]["value"] for task in ("kept", "world") for metric in retrained.UTILITY_PARTS]
        assert scores["kept", "model_utility"]["value"] == retrained.model_utility(six)
        assert scores["world", "model_utility"]["value"] == retrained.model_utility(six)
    assert result["gold"]["forgotten", "forget_quality"]["value"] == 1
    evaluate(case.config(tasks=tasks, drift=False, models={}), case.run)
    score = next(s for s in case.result("unlearned")["scores"] if s["metric"] == "forget_quality")
    assert score["value"] is None and score["note"] == "no retrained model was evaluated"
