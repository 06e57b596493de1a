"""What is trained: everything else stays bitwise as it was, weight decay or not, on any shape; SEUF and GRIP."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
import torch
from distributed import run_distributed
from safetensors.numpy import load_file
from test_forward import Plain
from test_objective_jobs import calibrated  # noqa: F401  (a fixture)
from test_unlearn import GRADIENT_LIKE, copy_of, weights_of
from transformers import AutoModelForCausalLM

from trace_ds.config.load import load_config
from trace_ds.config.schema import GRIPConfig, SEUFConfig, TrainableConfig
from trace_ds.errors import UserError
from trace_ds.models import autoep
from trace_ds.models.families import FAMILIES
from trace_ds.models.routers import find_routers, meta_model
from trace_ds.parallel.world import World
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.unlearn import check_unlearn, make_batches
from trace_ds.tensors.layouts import engine_pieces, read_layout
from trace_ds.unlearning import grip, seuf, trainable

STEPS = 2
DECAY = "unlearning.optimizer.weight_decay=0.5"
CASES = {
    "routers_attention": ["unlearning.trainable.include=[routers, '*.self_attn.[qk]_proj.*']", "forget_loss=graddiff"],
    "selected": ["unlearning.trainable={include: [experts], selected_experts: true}", "forget_loss=simnpo"],
    "seuf": ["unlearning.seuf={experts: 2, anchor: 4}", "forget_loss=graddiff"],
    "ends_at_layer": ["forget_loss=rmu"],
    "grip": ["unlearning.grip={tokens: 8, steps: 1}", "forget_loss=graddiff"],
}  # fmt: skip


def overrides_of(name: str, ep: int, stage: int) -> list[str]:
    own = [key if key.startswith("unlearning.") else f"unlearning.{key}" for key in CASES[name]]
    shape = [f"distributed.ep={ep}", f"unlearning.zero_stage={stage}"]
    return [*GRADIENT_LIKE, DECAY, *own, *shape, f"unlearning.steps={STEPS}"]


def place(name: str) -> tuple[int, int]:
    """(layer, expert) of a tensor in the hub layout, -1 where it has none."""
    parts = name.split(".")
    return tuple(int(parts[parts.index(key) + 1]) if key in parts else -1 for key in ("layers", "experts"))  # type: ignore[return-value]


def expected_changes(case: str, names: list[str], prepared: Path) -> set[str]:
    """The tensors that may move, by rules written for the test's own model (3 layers)."""
    if case == "routers_attention":
        return {n for n in names if "gate.weight" in n or "q_proj" in n or "k_proj" in n}
    if case == "selected":
        selected = load_file(prepared / "calibration" / "calibration.safetensors")["selected_LE"]
        return {n for n in names if place(n)[1] >= 0 and selected[place(n)]}
    if case == "seuf":
        mass = RoutingStatistics.load(prepared / "statistics" / "forget" / "statistics.safetensors").gate_mass_LE
        layer = int(np.unravel_index(mass.argmax(), mass.shape)[0])
        best = set(np.argsort(mass[layer])[-2:].tolist())
        return {n for n in names if place(n)[0] == layer and ("gate.weight" in n or place(n)[1] in best)}
    if case == "ends_at_layer":
        return {n for n in names if place(n)[0] in (0, 1) or "embed" in n}
    return set(names)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep", "stage"), [(2, 1, 3), (2, 2, 3), (2, 2, 1)])
def test_the_rest_stays_bitwise(
    calibrated: tuple[Path, Path],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
    world: int,
    ep: int,
    stage: int,
) -> None:
    config, prepared = calibrated
    start = {name: value for path in tiny_model.glob("*.safetensors") for name, value in load_file(path).items()}
    runs = [(str(copy_of(prepared, tmp_path / name)), overrides_of(name, ep, stage)) for name in CASES]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, world, str(config), runs)))
    for name, (run, _) in zip(CASES, runs, strict=True):
        found = weights_of(Path(run), STEPS, tmp_path / f"{name}-model")
        moved = {tensor for tensor, value in start.items() if not np.array_equal(value, found[tensor])}
        assert moved == expected_changes(name, list(start), prepared), name
    run = Path(dict(zip(CASES, runs, strict=True))["seuf"][0])
    lines = map(json.loads, (run / "logs" / "unlearn.jsonl").read_text().splitlines())
    first = next(line for line in lines if line.get("step") == 1 and "loss_anchor" in line)
    expected = first_anchor_loss(config, prepared, overrides_of("seuf", 1, 3), tiny_model)
    assert abs(first["loss_anchor"] / expected - 1) < 1e-5
    total = first["loss_forget"] + 4 * first["loss_retain"] + first["loss_anchor"]
    assert abs(first["loss"] - total) < 1e-4


def first_anchor_loss(config: Path, run: Path, overrides: list[str], model_path: Path) -> float:
    """SEUF's anchor of the first step by plain transformers: 4 · mean over forget tokens of ‖softmax − chosen‖²."""
    loaded, path = load_config(str(config), overrides, run)
    batches = make_batches(loaded, check_unlearn(loaded, RunDirectory.at(path), 1))
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    mass = RoutingStatistics.load(run / "statistics" / "forget" / "statistics.safetensors").gate_mass_LE
    layer = int(np.unravel_index(mass.argmax(), mass.shape)[0])
    chosen = torch.zeros(mass.shape[1]).index_fill(0, torch.tensor(np.argsort(mass[layer])[-2:].copy()), 1.0)
    total, tokens = 0.0, 0
    for batch in batches.at(0, 0, 1).micro_batches:
        rows = slice(0, batch.forget_rows)
        ids, positions = batch.input_ids_BS[rows], batch.position_ids_BS[rows]
        with torch.no_grad():
            found = model(input_ids=ids, position_ids=positions, use_cache=False, output_router_logits=True)
        gates = torch.softmax(found.router_logits[layer].double(), -1)[batch.counted_BS[rows].reshape(-1)]
        total += 4 * float((gates - chosen).square().sum())
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
    everything = trainable.choose(kinds, TrainableConfig(), None)
    assert everything == set(kinds)
    without = trainable.choose(kinds, TrainableConfig(exclude=["routers", "*.layers.0.*"]), None)
    assert not any(".layers.0." in name or kinds[name] == "routers" for name in without) and len(without) == 20 - 1
    with pytest.raises(UserError, match=r"trainable\.include: '\*\.attention\.\*' matches no parameter"):
        trainable.choose(kinds, TrainableConfig(include=["*.attention.*"]), None)
    with pytest.raises(UserError, match="no parameter is left to train"):
        trainable.choose(kinds, TrainableConfig(include=["routers"], exclude=["*.mlp.*"]), None)
    reached = trainable.choose(kinds, TrainableConfig(), 1)
    assert reached == {n for n in kinds if ".layers.0." in n or ".layers.1." in n or "embed" in n}
    with pytest.raises(UserError, match=r"no parameter is left to train \(the losses end at layer 1\)"):
        trainable.choose(kinds, TrainableConfig(include=["*.layers.2.*", "lm_head.*"]), 1)


@pytest.mark.parametrize("family", [*sorted(FAMILIES)])
def test_every_name_of_autoep_is_known(family: str, tmp_path: Path) -> None:
    """A parameter whose source is not found would be held; the names are the conversion's, which tests load."""
    path = tiny.make_model(tmp_path / "model", family, layers=2)
    parameters = dict(meta_model(path).named_parameters())
    pieces = {n: p.whole for n, p in engine_pieces(read_layout(path)).items() if not n.endswith("correction_bias")}
    assert {name: autoep.source_name(name, parameters) for name in pieces} == pieces
    assert all(autoep.source_name(name, parameters) == name for name in parameters)
    with pytest.raises(AssertionError, match=r"model\.layers\.1\.mlp\.new is no parameter of the model"):
        autoep.source_name("model.layers.1.mlp.new", parameters)


def test_wrong_choices_are_refused_before_a_weight_is_loaded(
    calibrated: tuple[Path, Path],  # noqa: F811
) -> None:
    config, run = calibrated
    for change, message in (
        ("unlearning.trainable.exclude=[attn]", "'attn' matches no parameter"),
        ("unlearning.trainable.include=['*.layers.2.*']", "no parameter is left to train .the losses end at layer 1"),
        ("unlearning.seuf={layer: 2}", "layer 2 is no MoE layer that the losses reach"),  # RMU ends at layer 1
        ("unlearning.seuf={experts: 9}", "9 experts of 4"),
    ):
        loaded, path = load_config(str(config), [change], run)
        with pytest.raises(UserError, match=message):
            check_unlearn(loaded, RunDirectory.at(path), 1)
    with pytest.raises(UserError, match=r"unlearning\.seuf chooses what is trained itself"):
        load_config(str(config), ["unlearning.seuf={}", "unlearning.trainable.include=[experts]"], run)


def test_affinity_and_anchor() -> None:
    mass = np.array([[5.0, 1.0, 0.0], [2.0, 9.0, 9.0], [9.5, 0.0, 1.0]])
    assert seuf.choose_experts(mass, [1, 2, 3], None, SEUFConfig()) == (2, (0,))
    assert seuf.choose_experts(mass, [1, 2, 3], 2, SEUFConfig()) == (1, (1,))  # a tie: the lower number
    assert seuf.choose_experts(mass, [1, 2, 3], None, SEUFConfig(layer=1, experts=2)) == (0, (0, 1))
    logits = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    counted = torch.tensor([[True, False], [True, True]])  # the last two tokens are retain rows
    anchor = seuf.Anchor(0, torch.tensor([0.0, 1.0, 1.0]), 2.5)
    value = anchor.penalty(logits, counted)
    expected, gradient = 0.0, np.zeros((6, 3))
    for token in (0, 2, 3):
        z = logits[token].detach().numpy()
        g = np.exp(z) / np.exp(z).sum()
        difference = g - np.array([0.0, 1.0, 1.0])
        expected += 2.5 * (difference**2).sum()
        gradient[token] = 2.5 * 2 * (np.diag(g) - np.outer(g, g)) @ difference
    assert abs(float(value.detach()) / expected - 1) < 1e-6
    np.testing.assert_allclose(torch.autograd.grad(value, logits)[0].numpy(), gradient, atol=1e-6)


def test_projected_router_gradients_are_blind_to_the_retain_inputs(
    calibrated: tuple[Path, Path],  # noqa: F811
    tiny_model: Path,
) -> None:
    config, run = calibrated
    loaded, path = load_config(str(config), [], run)
    batches = make_batches(loaded, check_unlearn(loaded, RunDirectory.at(path), 1))
    batch = batches.at(0, 0, 1).micro_batches[0]
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokens = 6
    alone = World(0, 1, torch.device("cpu"))
    held_bytes = grip.install(Plain(model), batches, alone, GRIPConfig(tokens=tokens, steps=1))
    assert held_bytes == 3 * 4 * tokens * 32 * 4  # layers, experts, inputs (all independent), hidden size, fp32
    seen: dict[int, torch.Tensor] = {}
    chosen: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            seen[number], chosen[number] = inputs[0].detach().reshape(-1, 32), output[2]

        return hook

    handles = [router.register_forward_hook(keep(number)) for number, router in enumerate(find_routers(model))]
    retain = slice(batch.forget_rows, None)
    model(input_ids=batch.input_ids_BS[retain], position_ids=batch.position_ids_BS[retain], use_cache=False)
    for handle in handles:
        handle.remove()
    model(
        input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
    ).logits.square().sum().backward()
    counted = batch.counted_BS[retain].reshape(-1)
    for number, router in enumerate(find_routers(model)):
        for expert, gradient in enumerate(router.weight.grad):
            inputs = seen[number][(chosen[number] == expert).any(1) & counted][:tokens]
            assert len(inputs) == tokens and float(gradient.norm()) > 0
            assert float((inputs @ gradient).abs().max() / (inputs.norm(dim=1).max() * gradient.norm())) < 1e-5


@pytest.mark.slow
def test_grip_does_not_depend_on_the_world_and_realigned_routers_choose_as_before(
    calibrated: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """The ranks share bases and equations; retain text is routed more as by the frozen model after realignment."""
    config, prepared = calibrated
    common = [*GRADIENT_LIKE, "unlearning.forget_loss=graddiff", "unlearning.optimizer.lr=0.03", "unlearning.steps=3"]
    common += ["unlearning.evaluate.every=3", "unlearning.evaluate.rows=16"]
    cases = {"projected": "{tokens: 8, steps: 2}", "realigned": "{tokens: 8, steps: 2, realign: true}"}
    weights, overlap = {}, {}
    for world, ep, stages in ((1, 1, (3,)), (2, 2, (3, 1))):
        work = [
            (str(copy_of(prepared, tmp_path / f"{case}-{world}-{stage}")), [
                *common, f"unlearning.grip={settings}", f"distributed.ep={ep}", f"unlearning.zero_stage={stage}"
            ])
            for stage in stages for case, settings in cases.items()
        ]  # fmt: skip
        if world == 1:  # a longer job that reaches its target at the same step
            longer = ["unlearning.steps=9", "unlearning.evaluate.target_forget_nll=0.01"]
            work.append((str(copy_of(prepared, tmp_path / "early-1-3")), [*work[1][1], *longer]))
        assert not any(map(any, run_distributed(jobs.unlearn_jobs, world, str(config), work)))
        for run, _ in work:
            name = Path(run).name
            weights[name] = weights_of(Path(run), 3, tmp_path / f"{name}-model")
            lines = [json.loads(line) for line in (Path(run) / "logs" / "unlearn.jsonl").read_text().splitlines()]
            overlap[name] = next(x for x in lines if x["event"] == "evaluation" and x["step"] == 3)["retain_overlap"]
    for case in cases:
        for other in ("2-3", "2-1"):
            for name, value in weights[f"{case}-1-3"].items():
                found = weights[f"{case}-{other}"][name]
                np.testing.assert_allclose(found, value, rtol=1e-4, atol=1e-5, err_msg=f"{case} {other} {name}")
    assert overlap["realigned-1-3"] > overlap["projected-1-3"] + 0.03, overlap
    routers = [name for name in weights["realigned-1-3"] if name.endswith("gate.weight")]
    assert len(routers) == 3
    assert all(np.array_equal(value, weights["early-1-3"][name]) for name, value in weights["realigned-1-3"].items())
    for name, value in weights["projected-1-3"].items():  # nothing but the routers was touched
        assert np.array_equal(value, weights["realigned-1-3"][name]) != (name in routers), name


def test_a_basis_spans_its_inputs_and_nothing_else() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 8, generator=generator)
    basis = grip.basis(torch.cat([inputs, inputs[:1] * 2]))
    assert basis.shape == (8, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(3))
    vector = torch.randn(8, generator=generator)
    left = grip.project(vector, basis)
    assert float((inputs @ left).abs().max()) < 1e-5
    torch.testing.assert_close(grip.project(left, basis), left)
    assert torch.equal(grip.project(vector, grip.basis(inputs[:0])), vector)
