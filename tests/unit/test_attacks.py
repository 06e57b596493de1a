"""Relearning and expert forcing: what they do to a model, by recording it; and their place in a result."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from stage_calls import evaluate
from test_evaluation_metrics import packed
from test_evaluation_models import opened, save_model
from test_evaluation_stage import Case, case  # noqa: F401

from trace_ds.config.sections.evaluation import RelearningConfig
from trace_ds.errors import UserError
from trace_ds.evaluation import attacks
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.models.attention import ATTENTION_NAME
from trace_ds.models.routers import find_routers, meta_model, record_routing
from trace_ds.parallel.world import World
from trace_ds.unlearning.trainer import NumericalFailure

IDS = torch.tensor([[0, 5, 9, 13, 20, 41, 8, 7], [0, 3, 4, 5, 6, 7, 8, 9]])


def outputs(model: LanguageModel) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits and each layer's (gates, experts) as what follows the routers sees them."""
    with torch.no_grad(), record_routing(model.model) as recorder:
        logits = model.model(IDS, use_cache=False).logits
        return logits, [recorder.layer(layer) for layer in range(len(find_routers(model.model)))]


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2", "deepseek_v3", "qwen3_5_moe_text", "gpt_oss"])
def test_forcing_sends_tokens_where_it_says(family: str, tmp_path: Path) -> None:
    path = tiny.make_model(tmp_path / family, family)
    with opened(path) as model:
        expected = {"gpt_oss": "eager", "qwen3_5_moe_text": "sdpa"}  # the fast one, where the family has it
        assert model.model.config._attn_implementation == expected.get(family, ATTENTION_NAME)
        free, chosen = outputs(model)
        with attacks.forced(model.model, lambda layer, logits_TE, indices_TK: indices_TK):
            assert torch.allclose(outputs(model)[0], free, atol=1e-5)
        forbidden_LE = np.zeros((len(chosen), 4), dtype=bool)
        forbidden_LE[0, :2] = True
        forbidden_LE[1, :3] = True  # fewer than two others: this layer keeps its choice
        for decide in (attacks.without_first, attacks.without_experts(forbidden_LE)):
            with attacks.forced(model.model, decide):
                forced, taken = outputs(model)
            assert not torch.allclose(forced, free, atol=1e-3)
            experts, first = taken[0][1], chosen[0][1].gather(1, chosen[0][0].argmax(1, keepdim=True))[:, 0]
            assert (experts[:, 0] != experts[:, 1]).all()
            if decide is attacks.without_first:
                assert not (experts == first[:, None]).any()
            else:
                assert set(experts.flatten().tolist()) == {2, 3}
                gates = taken[0][0].sum(-1)
                free_gates = chosen[0][0].sum(-1)
                assert torch.allclose(gates, torch.ones(()), atol=1e-5) == torch.allclose(
                    free_gates, torch.ones(()), atol=1e-5
                )
        assert torch.equal(outputs(model)[0], free)  # nothing stays behind


@pytest.mark.parametrize(
    ("family", "rule"),
    [
        ("mixtral", ("softmax", True, 1.0)),
        ("deepseek_v2", ("softmax", False, 1.5)),
        ("deepseek_v3", ("sigmoid", True, 1.5)),
        ("gpt_oss", ("softmax", True, 1.0)),
    ],
)
def test_the_rule_of_a_router_is_found_before_a_weight_is_read(
    family: str, rule: tuple[str, bool, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.make_model(tmp_path / family, family)
    (path / "model.safetensors").unlink()
    attacks.check_forcing(path)
    result = attacks.gate_rule(find_routers(meta_model(path))[0])
    assert (result.function, result.normalised, result.scale) == (*rule[:2], pytest.approx(rule[2], rel=1e-4))
    monkeypatch.setattr(attacks, "FUNCTIONS", {"sigmoid": torch.sigmoid})
    if rule[0] == "softmax":
        with pytest.raises(UserError, match="follow no rule that is known"):
            attacks.check_forcing(path)


def test_relearning_is_plain_fine_tuning_on_a_share_of_the_rows(tmp_path: Path) -> None:
    generator = np.random.default_rng(4)
    dataset = packed(tmp_path / "rows.arrow", [generator.integers(3, 63, 15).tolist() for _ in range(20)], 16)
    settings = RelearningConfig(steps=6, lr=1e-3)
    path = save_model(tmp_path / "model")
    seen: list[int] = []
    with opened(path) as model:
        result = attacks.relearn(model, dataset, settings, 5, lambda: seen.append(len(seen)))
        trained = {name: value.clone() for name, value in model.model.state_dict().items()}
    assert result["rows"] == 2 and [entry["step"] for entry in result["curve"]] == [0, 5, 6] and len(seen) == 3
    assert result["curve"][-1]["loss"] < 5
    rows = attacks.EpochRows(
        np.sort(attacks.generator(5, attacks.SHARE_STREAM, 0).permutation(np.arange(len(dataset)))[:2]),
        2,
        5,
        attacks.ORDER_STREAM,
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


def test_a_sharded_attack_that_diverges_ends_its_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that is not finite ends the training on all processes, as it does in a job, but not the evaluation."""
    dataset = packed(tmp_path / "rows.arrow", [list(range(3, 18))] * 4, 16)
    modes: list[str] = []
    engine = SimpleNamespace(train=lambda: modes.append("train"), eval=lambda: modes.append("eval"))
    model: Any = SimpleNamespace(world=World(0, 1, torch.device("cpu")), model=None, engine=engine)

    def run_step(*arguments: Any) -> dict[str, float]:
        if arguments[-1] == 5:
            raise NumericalFailure("the loss is not finite")
        return {"loss": 1.0}

    monkeypatch.setattr(attacks, "run_step", run_step)
    settings = RelearningConfig(steps=6, lr=1e-3)
    curve = attacks.relearn(model, dataset, settings, 5, lambda: {"facts accuracy": 0.5})["curve"]
    assert [(entry["step"], entry["loss"], len(entry["scores"])) for entry in curve] == [
        (0, None, 1), (5, 1.0, 1), (6, None, 0),
    ]  # fmt: skip
    assert modes == ["train", "eval"] * 6


def test_attacks_are_part_of_the_result_of_the_unlearned_and_the_retrained_model(case: Case) -> None:  # noqa: F811
    settings = {"relearning": {"steps": 2, "lr": 1e-3}, "expert_forcing": True}
    evaluate(case.config(**settings), case.run)
    assert "attacks" not in case.result("original")
    for name in ("gold", "unlearned"):
        result = case.result(name)
        curve = result["attacks"]["relearning"]["curve"]
        assert [entry["step"] for entry in curve] == [0, 2]
        values = {(s["task"], s["metric"]): s["value"] for s in result["scores"]}
        forcing = result["attacks"]["expert_forcing"]
        assert list(forcing) == ["none", "without_first"]  # there is no calibration here
        assert forcing["none"]["facts accuracy"] == values["facts", "accuracy"] == curve[0]["scores"]["facts accuracy"]
        attacked = [scores["facts accuracy"] for kind, scores in forcing.items() if kind != "none"]
        assert values["facts", "forced_accuracy"] == max(attacked)
        assert values["facts", "relearned_accuracy"] == curve[-1]["scores"]["facts accuracy"]
        assert ("general", "relearned_perplexity") not in values
    before = case.files()
    evaluate(case.config(**settings), case.run)
    assert case.files() == before
    evaluate(case.config(), case.run)
    assert "attacks" not in case.result("unlearned")
