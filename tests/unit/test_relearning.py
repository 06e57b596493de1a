"""Relearning: what it does to a model, and its place in a result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from stage_calls import evaluate
from test_evaluation_metrics import packed
from test_evaluation_models import opened, save_model
from test_evaluation_stage import Case, case  # noqa: F401

from trace_ds.config.sections.evaluation import EvaluationConfig, RelearningConfig
from trace_ds.evaluation import relearning
from trace_ds.parallel.world import World
from trace_ds.unlearning.trainer import NumericalFailure


def test_relearning_is_plain_fine_tuning_on_a_share_of_the_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    dataset = packed(tmp_path / "rows.arrow", [generator.integers(3, 63, 15).tolist() for _ in range(20)], 16)
    settings = RelearningConfig(steps=6, lr=1e-3)
    path = save_model(tmp_path / "model")
    with opened(path) as model:
        result = relearning.relearn(model, dataset, settings, 5)
        trained = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert result["rows"] == 2 and result["loss"] < 5
    rows = relearning.EpochRows(
        np.sort(relearning.generator(5, relearning.SHARE_STREAM, 0).permutation(np.arange(len(dataset)))[:2]),
        2,
        5,
        relearning.ORDER_STREAM,
    )
    with opened(path) as model:
        optimizer = torch.optim.AdamW(model.model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
        for step in range(6):
            losses = []
            for row in rows.at(step).tolist():
                batch = dataset.batch([row], 0)
                logits = model.model(batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits[0]
                log_prob = torch.log_softmax(logits.double(), -1)
                losses += [
                    -log_prob[t, batch.input_ids_BS[0, t + 1]] for t in range(15) if bool(batch.counted_BS[0, t])
                ]
            optimizer.zero_grad()
            (sum(losses) / len(losses)).backward()  # type: ignore[union-attr]
            optimizer.step()
        for name, value in model.model.state_dict().items():
            assert torch.allclose(value, trained[name], atol=2e-4), name


def test_a_sharded_attack_that_diverges_has_no_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is not finite ends the training on all processes, as it does in a job, but not the evaluation."""
    dataset = packed(tmp_path / "rows.arrow", [list(range(3, 18))] * 4, 16)
    modes: list[str] = []
    engine = SimpleNamespace(train=lambda: modes.append("train"), eval=lambda: modes.append("eval"))
    model: Any = SimpleNamespace(world=World(0, 1, torch.device("cpu")), model=None, engine=engine)

    def run_step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] == 5:
            raise NumericalFailure("the loss is not finite")
        return {"loss": 1.0}

    monkeypatch.setattr(relearning, "run_step", run_step)
    settings = EvaluationConfig(relearning=RelearningConfig(steps=9, lr=1e-3))
    result: dict[str, Any] = {"scores": []}
    relearning.attack(model, result, settings, [], dataset, context_length=16, seed=5)
    assert result == {"relearning": None, "scores": []}
    assert modes == ["train", "eval"] * 6


def test_relearning_is_part_of_the_result_of_the_unlearned_and_the_retrained_model(case: Case) -> None:  # noqa: F811
    settings = {"relearning": {"steps": 2, "lr": 1e-3}}
    evaluate(case.config(**settings), case.run)
    assert "relearning" not in case.result("original")
    for name in ("gold", "unlearned"):
        result = case.result(name)
        values = {(s["task"], s["metric"]): s["value"] for s in result["scores"]}
        assert result["relearning"]["rows"] == 2 and result["relearning"]["loss"] > 0
        assert values["facts", "relearned_choice_probability"] != values["facts", "choice_probability"]
        assert ("general", "relearned_perplexity") not in values
    before = case.files()
    evaluate(case.config(**settings), case.run)
    assert case.files() == before
    evaluate(case.config(), case.run)
    assert "relearning" not in case.result("unlearned")
