"""What is trained: everything else stays bitwise as it was, weight decay or not, on any shape; SEUF and GRIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from objective_reference import GripReference
from processes import run_distributed
from safetensors.numpy import load_file
from test_objective_jobs import calibrated  # noqa: F401  (a fixture)
from test_unlearn import GRADIENT_LIKE, copy_of, weights_of
from transformers import AutoModelForCausalLM

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.config.load import load_config
from trace_ds.config.sections.unlearning import SEUFConfig
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.unlearn import check as check_unlearn
from trace_ds.stages.unlearn import make_unlearn_batches
from trace_ds.unlearning import grip, seuf, trainable

STEPS = 2
DECAY = "unlearning.optimizer.weight_decay=0.5"
CASES = {
    "routers_attention": ["unlearning.trainable=[routers, '*.self_attn.[qk]_proj.*']", "forget_loss=graddiff"],
    "selected": ["unlearning.trainable=[selected_experts]", "forget_loss=simnpo"],
    "seuf": ["unlearning.seuf={experts: 2}", "forget_loss=graddiff"],
    "ends_at_layer": ["forget_loss=rmu"],
}  # fmt: skip


def overrides_of(name: str, ep: int, stage: int) -> list[str]:
    own = [key if key.startswith("unlearning.") else f"unlearning.{key}" for key in CASES[name]]
    shape = [f"distributed.ep={ep}", f"unlearning.zero_stage={stage}"]
    return [*GRADIENT_LIKE, DECAY, *own, *shape, f"unlearning.steps={STEPS}"]


def place(name: str) -> tuple[int, int]:
    """(layer, expert) of a tensor in the hub layout, -1 where it has none."""
    parts = name.split(".")
    return tuple(int(parts[parts.index(key) + 1]) if key in parts else -1 for key in ("layers", "experts"))  # type: ignore[return-value]


def affinity_of(run: Path) -> np.ndarray:
    """SEUF's, as test_collect proves it."""
    result = RoutingStatistics.load(run / "statistics" / "forget" / "statistics.safetensors").row_gate_LE
    assert result is not None
    return result


def expected_changes(case: str, names: list[str], prepared: Path) -> set[str]:
    """The tensors that may move, by rules written for the test's own model (3 layers)."""
    if case == "routers_attention":
        return {n for n in names if "gate.weight" in n or "q_proj" in n or "k_proj" in n}
    if case == "selected":
        selected = load_file(prepared / "calibration" / "calibration.safetensors")["selected_LE"]
        return {n for n in names if place(n)[1] >= 0 and selected[place(n)]}
    if case == "seuf":
        affinity = affinity_of(prepared)
        layer = int(np.unravel_index(affinity.argmax(), affinity.shape)[0])
        best = set(np.argsort(affinity[layer])[-2:].tolist())
        return {n for n in names if place(n)[0] == layer and ("gate.weight" in n or place(n)[1] in best)}
    if case == "ends_at_layer":
        return {n for n in names if place(n)[0] in (0, 1) or "embed" in n}
    return set(names)


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "stage"), [(2, 3), (1, 3), (1, 1)])
def test_the_rest_stays_bitwise(
    calibrated: tuple[Path, Path],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    ep: int,
    stage: int,
) -> None:
    config, prepared = calibrated
    start = {name: value for path in tiny_model.glob("*.safetensors") for name, value in load_file(path).items()}
    runs = [(str(copy_of(prepared, tmp_path / name)), overrides_of(name, ep, stage)) for name in CASES]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, 2, str(config), runs)))
    for name, (run, _) in zip(CASES, runs, strict=True):
        actual = weights_of(Path(run), STEPS, tmp_path / f"{name}-model")
        moved = {tensor for tensor, value in start.items() if not np.array_equal(value, actual[tensor])}
        assert moved == expected_changes(name, list(start), prepared), name
    run = Path(dict(zip(CASES, runs, strict=True))["seuf"][0])
    lines = map(json.loads, (run / "logs" / "unlearn.jsonl").read_text().splitlines())
    first = next(line for line in lines if line.get("step") == 1 and "loss_anchor" in line)
    expected = first_anchor_loss(config, prepared, overrides_of("seuf", 1, 3), tiny_model)
    assert abs(first["loss_anchor"] / expected - 1) < 1e-5
    total = first["loss_forget"] + 4 * first["loss_retain"] + first["loss_anchor"]
    assert abs(first["loss"] - total) < 1e-4


def first_anchor_loss(config: Path, run: Path, overrides: list[str], model_path: Path) -> float:
    """SEUF's anchor of the first step by plain transformers: the mean over forget tokens of ‖softmax − chosen‖²."""
    loaded, path = load_config(str(config), overrides, run)
    batches = make_unlearn_batches(check_unlearn(loaded, RunDirectory.at(path), 1))
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    affinity = affinity_of(run)
    layer = int(np.unravel_index(affinity.argmax(), affinity.shape)[0])
    chosen = torch.zeros(affinity.shape[1]).index_fill(0, torch.tensor(np.argsort(affinity[layer])[-2:].copy()), 1.0)
    total, tokens = 0.0, 0
    for batch in batches.at(0, 0, 1).micro_batches:
        rows = slice(0, batch.forget_rows)
        ids, positions = batch.input_ids_BS[rows], batch.position_ids_BS[rows]
        with torch.no_grad():
            result = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
        gates = torch.softmax(result.router_logits[layer].double(), -1)[batch.counted_BS[rows].reshape(-1)]
        total += float((gates - chosen).square().sum())
        tokens += len(gates)
    return total / tokens


def test_names_and_kinds(tiny_model: Path) -> None:
    kinds = trainable.parameter_kinds(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32))
    assert {kind: list(kinds.values()).count(kind) for kind in set(kinds.values())} == {
        "experts": 6,
        "routers": 3,
        "attention": 12,
        "other": 9,
    }
    everything = trainable.choose_parameters(kinds, ["all"], None)
    assert everything == set(kinds)
    without = trainable.choose_parameters(kinds, ["all", "-routers", "-*.layers.0.*"], None)
    assert not any(".layers.0." in name or kinds[name] == "routers" for name in without) and len(without) == 20 - 1
    with pytest.raises(UserError, match="no parameter is left to train"):
        trainable.choose_parameters(kinds, ["routers", "-*.mlp.*"], None)
    reached = trainable.choose_parameters(kinds, ["all"], 1)
    assert reached == {n for n in kinds if ".layers.0." in n or ".layers.1." in n or "embed" in n}


def test_wrong_choices_are_refused_before_a_weight_is_loaded(
    calibrated: tuple[Path, Path],  # noqa: F811
) -> None:
    config, run = calibrated
    for change, message in (
        ("unlearning.trainable=[all, -attn]", "'attn' matches no parameter"),
        ("unlearning.trainable=['*.layers.2.*']", "no parameter is left to train .the losses end at layer 1"),
        ("unlearning.seuf={layer: 2}", "layer 2 is no MoE layer that the losses reach"),  # RMU ends at layer 1
        ("unlearning.seuf={experts: 9}", "9 experts, and a layer has 4"),
    ):
        loaded, path = load_config(str(config), [change], run)
        with pytest.raises(UserError, match=message):
            check_unlearn(loaded, RunDirectory.at(path), 1)
    with pytest.raises(UserError, match=r"unlearning\.seuf chooses what is trained itself"):
        load_config(str(config), ["unlearning.seuf={}", "unlearning.trainable=[experts]"], run)


def test_affinity_and_anchor() -> None:
    affinity = np.array([[5.0, 1.0, 0.0], [2.0, 9.0, 9.0], [9.5, 0.0, 1.0]])
    assert seuf.choose_seuf_experts(affinity, [1, 2, 3], None, SEUFConfig()) == (2, (0,))
    assert seuf.choose_seuf_experts(affinity, [1, 2, 3], 2, SEUFConfig()) == (1, (1,))  # a tie: the lower number
    assert seuf.choose_seuf_experts(affinity, [1, 2, 3], None, SEUFConfig(layer=1, experts=2)) == (0, (0, 1))
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    counted = torch.tensor([[True, False], [True, True]])  # the last two tokens are retain rows
    anchor = seuf.Anchor(0, torch.tensor([0.0, 1.0, 1.0]))
    value = anchor.penalty(logits, counted)
    expected, gradient = 0.0, np.zeros((6, 3))
    for token in (0, 2, 3):
        z = logits[token].detach().numpy()
        g = np.exp(z) / np.exp(z).sum()
        difference = g - np.array([0.0, 1.0, 1.0])
        expected += (difference**2).sum()
        gradient[token] = 2 * (np.diag(g) - np.outer(g, g)) @ difference
    assert abs(float(value.detach()) / expected - 1) < 1e-6
    np.testing.assert_allclose(torch.autograd.grad(value, logits)[0].numpy(), gradient, atol=1e-6)


def test_an_update_is_projected_as_one_expert_and_one_input_after_the_other() -> None:
    """No job: a direction too weak to be protected, an expert that nothing selected, one that a bias kept out."""
    rng = np.random.default_rng(0)
    tokens, hidden, experts = 30, 24, 5
    x = rng.normal(size=(tokens, hidden))
    x[1] = x[0]
    x[1, 3] += 0.05  # what parts the two is a direction with S² of some 0.001
    logits = x @ rng.normal(size=(hidden, experts)) * 0.1
    logits[:, 4] = -1.0
    chosen = np.argsort(-logits)[:, :2]
    constraints = GripReference.constraints_of(x, logits, chosen)
    layer = grip.LayerConstraints.of(*map(torch.tensor, (x, logits, chosen)))
    assert [basis.shape[1] for basis in layer.bases] == [round(hidden - np.trace(off)) for off, _, _ in constraints]
    selected = [sum(expert in k for k in chosen) for expert in range(experts)]
    spans = [inputs - (expert in chosen[0]) for expert, inputs in enumerate(selected)]
    assert [basis.shape[1] for basis in layer.bases] == spans and spans[4] == 0 and max(spans) < hidden
    update, draws = rng.normal(size=(experts, hidden)) * 0.3, rng.random((experts, grip.ITERATIONS))
    broken: list[int] = []
    expected = [
        GripReference.projected(one, *of_expert, draw, broken)
        for one, of_expert, draw in zip(update, constraints, draws, strict=True)
    ]
    actual = layer.project(torch.tensor(update), torch.tensor(draws)).numpy()
    np.testing.assert_allclose(actual, expected, atol=1e-6)
    assert len(set(broken)) > 9, broken
    logits[0, 4] = logits[0].max() + 1.0  # left out all the same: it has no margin, so nothing holds it there
    layer = grip.LayerConstraints.of(*map(torch.tensor, (x, logits, chosen)))
    assert torch.isinf(layer.limits_ET[4]).tolist() == [True] + [False] * 29


@pytest.mark.slow
def test_grip_goes_on_bitwise(calibrated: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """What it computes is compared with a reference in test_objective_jobs."""
    config, prepared = calibrated
    project = [*GRADIENT_LIKE, "unlearning.forget_loss=graddiff", "unlearning.optimizer.lr=0.03", "distributed.ep=2"]
    project += [DECAY, "unlearning.grip={tokens: 24, steps: 2}", "unlearning.zero_stage=1"]
    work = [("straight", 3), ("broken", 2), ("broken", 3)]
    for name in dict(work):
        copy_of(prepared, tmp_path / name)
    runs = [(str(tmp_path / name), [*project, f"unlearning.steps={steps}"]) for name, steps in work]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, 2, str(config), runs)))
    manifests = [read_manifest(tmp_path / name / "checkpoints" / "step_000003") for name in ("broken", "straight")]
    assert manifests[0] == manifests[1]  # every file's hash
