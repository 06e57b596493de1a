"""Families beyond the first three through the whole path: statistics, unlearning at EP 2, conversion."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from objective_reference import reference_run
from processes import run_distributed
from safetensors.numpy import load_file
from stage_calls import calibrate
from test_unlearn import GRADIENT_LIKE, copy_of, losses_of, relative, weights_of

from trace_ds.config.load import load_config
from trace_ds.errors import UserError
from trace_ds.models.families import check_expert_parallel, inspect_model, require_plain_logits
from trace_ds.models.routers import find_routers, logits_of, record_routing
from trace_ds.run.directory import RunDirectory


@pytest.mark.slow
@pytest.mark.parametrize(("family", "stage"), [("qwen2_moe", 3), ("deepseek_v3", 1), ("qwen3_5_moe_text", 1)])
def test_unlearning_with_expert_parallelism_equals_the_reference(family: str, stage: int, tmp_path: Path) -> None:
    """Shared experts, a dense first layer, sigmoid and group-limited routing, linear attention, at expert-parallel size
    2."""
    model = tiny.make_model(tmp_path / "model", family)
    config = tiny.write_config(tmp_path, model, data__packing="single" if family == "qwen3_5_moe_text" else "dense")
    run = jobs.prepared_run(config, tmp_path / "run")
    overrides = [
        *GRADIENT_LIKE,
        "unlearning.forget_loss=graddiff",
        f"unlearning.zero_stage={stage}",
        "distributed.ep=2",
        "unlearning.steps=2",
    ]
    run_distributed(jobs.collect_job, 2, str(config), str(run), overrides)
    calibrate(load_config(str(config), [])[0], RunDirectory.at(run))
    run_distributed(jobs.unlearn_job, 2, str(config), str(run), overrides)
    expected = reference_run(str(config), str(run), overrides, 2)
    np.testing.assert_allclose(losses_of(run), expected["losses"], rtol=1e-5)
    actual = weights_of(run, 2, tmp_path / "converted")
    assert relative(actual, expected["weights"], load_file(model / "model.safetensors")) < 2e-3
    if family != "qwen2_moe":
        return
    # Two groups of parameters, and shared experts that AutoEP renames, on another shape after the first step.
    grouped = [*overrides, "unlearning.trainable=[all, '-*.layers.1.*']", "unlearning.optimizer.weight_decay=0.5"]
    straight, moved = (copy_of(run, tmp_path / name) for name in ("straight", "moved"))
    begin = (str(moved), [*grouped, "unlearning.steps=1"])
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, 2, str(config), [(str(straight), grouped), begin])))
    run_distributed(jobs.unlearn_job, 1, str(config), str(moved), [*grouped, "distributed.ep=1"])
    np.testing.assert_allclose(losses_of(moved), losses_of(straight), rtol=1e-6)
    expected_weights = weights_of(straight, 2, tmp_path / "straight-model")
    for name, value in weights_of(moved, 2, tmp_path / "moved-model").items():
        np.testing.assert_allclose(value, expected_weights[name], rtol=1e-6, atol=1e-7, err_msg=name)


def test_families_without_expert_parallelism_are_told_so(tmp_path: Path) -> None:
    granite = inspect_model(tiny.make_model(tmp_path / "granite", "granitemoe"))
    with pytest.raises(UserError, match=r"'granitemoe' has no expert parallelism .* ZeRO-3 .*--ep 1"):
        check_expert_parallel(granite, 2, 2)
    check_expert_parallel(granite, 1, 2)
    with pytest.raises(UserError, match=r"unlearning\.forget_loss: logits_scaling is 2\.0 in this model.*rmu"):
        require_plain_logits(granite, "unlearning.forget_loss")


@pytest.mark.parametrize(
    ("order", "refused"),
    [
        ("logits scores indices", ""),
        ("indices scores logits", ""),  # Granite's before transformers 5.18
        ("scores indices", "GraniteMoeTopKRouter returned (2, 2), (2, 2)"),
        ("scores logits indices", "GraniteMoeTopKRouter returned (2, 2), (2, 4), (2, 2)"),
        ("logits scores scores", "of types torch.float32 and torch.float32"),
    ],
)
def test_a_router_is_tried_before_its_model_is_taken(
    order: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a router returns is transformers' own affair and has changed: the check and the counting read it alike."""
    import torch
    from transformers.models.granitemoe import modeling_granitemoe

    path = tiny.make_model(tmp_path / "granite", "granitemoe")
    kind = modeling_granitemoe.GraniteMoeTopKRouter
    answer = dict.fromkeys(("logits", "scores", "indices"), torch.empty(0))

    def forward(self: Any, hidden_TD: torch.Tensor) -> tuple[torch.Tensor, ...]:
        answer["logits"] = torch.nn.functional.linear(hidden_TD, self.weight)
        answer["scores"], answer["indices"] = answer["logits"].softmax(-1).topk(self.top_k, dim=-1)
        return tuple(answer[name] for name in order.split())

    monkeypatch.setattr(kind, "forward", forward)
    if refused:
        with pytest.raises(UserError, match=re.escape(refused)):
            inspect_model(path)
        return
    assert inspect_model(path).family.model_type == "granitemoe"
    model = modeling_granitemoe.GraniteMoeForCausalLM.from_pretrained(path)
    with record_routing(model) as recorder:
        output = find_routers(model)[0](torch.randn(6, model.config.hidden_size))
    assert torch.equal(recorder.layer(0)[1], answer["indices"]) and torch.equal(recorder.layer(0)[0], answer["scores"])
    assert torch.equal(logits_of(find_routers(model)[0], output), answer["logits"])


def test_models_whose_routing_cannot_be_counted_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    """A family of transformers with experts, but no top-k router: never counted wrong, never silently dense."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("mixtral", num_hidden_layers=1, vocab_size=16, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    vision = {"model_type": "qwen3_5_moe", "text_config": tiny.shape("qwen3_5_moe_text")}
    (tmp_path / "model" / "config.json").write_text(json.dumps(vision))
    with pytest.raises(UserError, match=r"a text model among others.*save it alone"):
        inspect_model(tmp_path / "model")
    longcat = AutoConfig.for_model("longcat_flash", n_routed_experts=8, zero_expert_num=2, num_layers=1)
    for model_type, own, words in (
        ("llama4", {}, "no router that is known"),
        ("switch_transformers", {}, "causal language model"),
        ("longcat_flash", longcat.to_dict(), "its routers choose among 10 experts, its configuration has 8"),
    ):
        (tmp_path / "model" / "config.json").write_text(json.dumps((own or raw) | {"model_type": model_type}))
        with pytest.raises(UserError, match=rf"'{model_type}' is not supported \(.*{words}"):
            inspect_model(tmp_path / "model")
