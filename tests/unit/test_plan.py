"""The cost model: counts against transformers and published totals, memory against torch and DeepSpeed."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import plan_jobs
import pytest
import tiny
from processes import run_distributed
from safetensors import safe_open

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import read_architecture
from trace_ds.cluster.job import ClusterSpec, PlannedJob
from trace_ds.cluster.plan import forward_flops_per_token, plan, plan_model
from trace_ds.config.compose import published_config, recipe_names, recipes
from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
# name of a model fragment, with hyphens -> published parameters in billions
PUBLISHED = {
    "mixtral-8x7b": 46.7,
    "mixtral-8x22b": 140.6,
    "olmoe-1b-7b": 6.92,
    "qwen3-30b-a3b": 30.5,
    "qwen3-235b-a22b": 235.0,
    "deepseek-v3": 671.0,
    "qwen1-5-moe-a2-7b": 14.3,
    "deepseek-v2-lite": 15.7,
}


def model_config(name: str) -> dict[str, Any]:
    return published_config(name.replace("-", "_"))


def run_config(**changes: Any) -> Config:
    corpora = {side: [{"path": f"{side}.jsonl"}] for side in ("forget", "retain")}
    raw: dict[str, Any] = {"name": "x", "model": {"path": "/nowhere"}, "data": corpora}
    for key, value in changes.items():
        section, _, name = key.partition("__")
        raw.setdefault(section, {})[name] = value
    return Config.model_validate(raw)


def job_of(model: str | dict[str, Any], spec: ClusterSpec | None = None, **changes: Any) -> PlannedJob:
    """A job that runs the whole model with its head and needs no frozen copy, unless the changes say otherwise."""
    config = run_config(**({"unlearning__forget_loss": "graddiff"} | changes))
    values = model_config(model) if isinstance(model, str) else model
    return PlannedJob.of(read_architecture(values), spec or ClusterSpec(), config)


def test_published_models() -> None:
    for name, total in PUBLISHED.items():
        assert read_architecture(model_config(name)).parameters.total / 1e9 == pytest.approx(total, rel=0.005), name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_of_a_family_has_its_kind(family: str, tmp_path: Path) -> None:
    """Those of the file that transformers saves; experts by hand."""
    values = tiny.shape(family)
    model = tiny.make_model(tmp_path / "model", family)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    a = read_architecture(config)
    with safe_open(model / "model.safetensors", "numpy") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    counted = {name: math.prod(shape) for name, shape in shapes.items() if "e_score_correction_bias" not in name}
    assert a.parameters.total == sum(counted.values())
    experts = {name: number for name, number in counted.items() if ".experts." in name}
    assert a.parameters.experts == sum(experts.values()) > 0
    assert a.blocks[-1].experts == 3 * a.experts * a.hidden * a.expert_width
    assert (a.layers, a.hidden, a.vocabulary) == tuple(
        values[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size")
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_activations_are_what_torch_saves(family: str) -> None:
    """The bytes of all tensors kept for the backward pass, layer by layer, in bf16."""
    sized = tiny.shape(family, experts=8, top_k=3) | {"hidden_size": 256, "intermediate_size": 320}
    sized |= {key: 192 for key in ("moe_intermediate_size", "shared_expert_intermediate_size") if key in sized}
    # one kind of layer only: the first is then like every other
    if family in ("qwen2_moe", "qwen3_moe"):
        sized |= {"mlp_only_layers": []}
    if family in ("deepseek_v2", "deepseek_v3"):  # equal head widths: else torch's CPU kernel keeps the scores too
        sized |= {"first_k_dense_replace": 0, "v_head_dim": 16}
    tokens = 128
    for kind in sorted(set(sized.get("layer_types", ["full_attention"]))):
        of = {n: sized | {"num_hidden_layers": n} | ({"layer_types": [kind] * n} if "layer_types" in sized else {})
              for n in (1, 2)}  # fmt: skip
        measured = saved_bytes(family, of[2], tokens) - saved_bytes(family, of[1], tokens)
        a = read_architecture({"model_type": family, **of[1]})
        assert memory.saved_bytes_per_token(a, 0, 2) * tokens == pytest.approx(measured, rel=0.1), kind


def saved_bytes(family: str, values: dict[str, Any], tokens: int) -> int:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **values)
    config._experts_implementation = "grouped_mm"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(torch.bfloat16)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.model(torch.arange(tokens)[None] % 90, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.fixture(scope="module")
def mixtrals(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Of 15 M and of 60 M parameters, by their width in units of 256."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, result = tmp_path_factory.mktemp("models"), {}
    for width in (1, 2):
        sizes = {"hidden_size": 256 * width, "intermediate_size": 512 * width, "vocab_size": 2000 * width}
        sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4 * width, "num_key_value_heads": 4 * width}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, num_local_experts=8))
        model.to(torch.bfloat16).save_pretrained(folder / str(width))
        result[width] = folder / str(width)
    return result


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "rows", "changes"),
    [
        (1, 1, {"forget_loss": "graddiff", "sub_group": 10**9}),
        (1, 3, {"forget_loss": "graddiff", "retain_loss": "kl"}),
        (1, 6, {"forget_loss": "rmu", "rmu": {"layer": 1}, "recompute": True}),  # half of the layers are held
        (1, 3, {"forget_loss": "graddiff", "zero_stage": 1}),
        (2, 3, {"forget_loss": "graddiff"}),
    ],
    ids=["optimizer step", "KL to the frozen copy", "RMU recomputed", "ZeRO-1", "EP 2"],
)
def test_peak_memory_of_a_step_is_what_was_predicted(
    mixtrals: dict[int, Path],
    tmp_path: Path,
    world: int,
    rows: int,
    changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of it, within 10 %: a Mixtral in bf16, ZeRO-3 unless named, every tensor of the process. The smaller one, a
    quarter of everything, but for expert parallelism: it keeps 2 MB more than is planned."""
    width = world
    zero = {"sub_group_size": changes.get("sub_group", 250_000 * width**2), "reduce_bucket_size": 250_000 * width**2}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": zero}), encoding="utf-8")
    settings = {key: value for key, value in changes.items() if key != "sub_group"}
    settings |= {"ds_config": str(tmp_path / "ds.json"), "forget_rows": rows * world, "retain_rows": rows * world}
    prefixed = {f"unlearning__{key}": value for key, value in settings.items()}
    sized = {"data__context_length": 256 * width, "distributed__ep": world}
    path = tiny.write_config(tmp_path, mixtrals[width], model__dtype="bf16", **sized, **prefixed)
    measured = run_distributed(plan_jobs.peak_bytes, world, str(path), str(tmp_path / "run"), [])[0]
    config, _ = load_config(str(path), [], tmp_path / "run")
    predicted = plan(config, ClusterSpec(nodes=1, gpus_per_node=world)).unlearn.memory
    resident = sum(predicted.resident.values())
    if config.unlearning.zero_stage == 1:  # makes its gradients anew in every backward pass
        resident -= predicted.resident["gradients"]
    assert resident == pytest.approx(measured["resident"], rel=0.01), (measured, predicted)
    assert predicted.peak_bytes > 0.9 * measured["peak"]  # the margin for uneven routing is above it
    monkeypatch.setattr(memory, "IMBALANCE", 1.0)  # a random router spreads its tokens evenly
    even = plan(config, ClusterSpec(nodes=1, gpus_per_node=world)).unlearn.memory
    assert even.peak_bytes == pytest.approx(measured["peak"], rel=0.1), (measured, even)


def test_flops_of_mixtral_by_hand() -> None:
    a = read_architecture(model_config("mixtral-8x7b"))
    attention = 4096 * (4096 + 2 * 1024) + 4096 * 4096
    layer = attention + 2 * 4096 + 8 * 4096 + 2 * 3 * 4096 * 14336 + 2048 * (4096 + 4096)
    assert forward_flops_per_token(a, 2048) == 2 * (32 * layer + 4096 * 32000)
    assert forward_flops_per_token(a, 2048, layers=3, head=False) == 2 * 3 * layer


def test_stages_shard_what_they_should() -> None:
    for ep in (1, 8):
        jobs = {
            stage: job_of("mixtral-8x7b", ClusterSpec(8), distributed__ep=ep, unlearning__zero_stage=stage)
            for stage in (1, 2, 3)
        }
        parts = {stage: memory.unlearn_memory(job, 2).resident for stage, job in jobs.items()}
        every = jobs[1].a.parameters
        whole, share = 2 * (every.non_expert + every.experts / ep), 2 * every.total / 64
        assert parts[1]["parameters"] == parts[2]["parameters"] == pytest.approx(whole)
        assert parts[1]["gradients"] == pytest.approx(whole)
        assert parts[3]["parameters"] == parts[2]["gradients"] == parts[3]["gradients"] == pytest.approx(share)
        assert {part["master and Adam moments"] for part in parts.values()} == {12 * every.total / 64}


def test_ds_config_changes_what_it_changes(tmp_path: Path) -> None:
    section = {
        "reduce_bucket_size": 1000,
        "stage3_max_live_parameters": "auto",
        "offload_optimizer": {"device": "cpu"},
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": section}))
    plain, offloading = job_of("olmoe-1b-7b"), job_of("olmoe-1b-7b", unlearning__ds_config=str(tmp_path / "ds.json"))
    zero = offloading.zero
    assert (zero.reduce_bucket_size, zero.stage3_max_live_parameters) == (1000, None)
    assert zero.offload_optimizer and not zero.offload_param
    assert "master and Adam moments" in memory.unlearn_memory(plain, 2).resident
    offloaded = memory.unlearn_memory(offloading, 2)
    assert "master and Adam moments" not in offloaded.resident and not offloaded.step
    assert memory.host_bytes(offloading) > memory.host_bytes(plain)


@pytest.mark.parametrize(
    ("forget", "retain", "scale", "sinks"),
    [
        ("rmu", "hidden_mse", "median_norm", "leave_out"),
        ("rmu", "hidden_mse", "adaptive", "keep"),
        ("rmu", "kl", "absolute", "keep"),
        ("rmu", "nll", "absolute", "leave_out"),
        ("graddiff", "nll", "absolute", "keep"),
        ("graddiff", "hidden_mse", "absolute", "leave_out"),
        ("undial", "kl", "absolute", "keep"),
    ],
)
def test_the_frozen_copy_is_planned_as_the_job_makes_it(
    forget: str, retain: str, scale: str, sinks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers, whether it stays, whether its head is whole, which rows it sees: as the objective of the job has it."""
    from types import SimpleNamespace

    from trace_ds.unlearning import objective as objective_module
    from trace_ds.unlearning.hidden_norms import HiddenNorms

    losses = {"unlearning__forget_loss": forget, "unlearning__retain_loss": retain}
    job = job_of("olmoe-1b-7b", **losses, unlearning__rmu={"scale": scale, "sinks": sinks, "layer": 5})
    a, config = job.a, job.config
    layers: list[int] = []
    monkeypatch.setattr(
        objective_module, "reference_engine", lambda _, info, world, parts, *job: layers.append(parts.layers)
    )
    monkeypatch.setattr(objective_module, "_whole_head", lambda engine: "head")
    monkeypatch.setattr(objective_module, "measure", lambda *arguments: HiddenNorms(1.0, 1.0, (), 0.0))
    info = SimpleNamespace(decoder_layers=a.layers, config={"hidden_size": 8}, experts=a.experts)
    settings: dict[str, Any] = {"dtype": "bf16", "ep": 1, "seed": 0}
    world, batches = SimpleNamespace(device="cpu"), None
    objective, _ = objective_module.make_objective(config.unlearning, info, world, batches, {}, **settings)  # type: ignore[arg-type]
    passes = job.passes()
    frozen = objective.forget_retain.frozen
    assert [passes.frozen_layers] == (layers or [0])
    assert passes.frozen_stays == (frozen is not None)
    assert passes.frozen_head == (frozen is not None and frozen.head_VD is not None)
    sides = {"undial": 0.5, "rmu": 0.5 * (scale == "adaptive")}.get(forget, 0.0) + 0.5 * (retain != "nll")
    assert passes.frozen_share == sides
    ends_at_layer = forget == "rmu" and retain == "hidden_mse"
    assert (passes.layers, passes.head) == ((6, False) if ends_at_layer else (a.layers, True))


def refused(action: Any, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        action()
    for word in words:
        assert word in caught.value.line()
    assert caught.value.fix


def test_wrong_input_is_one_clear_line(tmp_path: Path) -> None:
    mixtral = model_config("mixtral-8x7b")
    spec = ClusterSpec()
    refused(lambda: plan(run_config(model__path=str(tmp_path / "no")), spec), "no model directory")
    refused(lambda: plan_model(mixtral, run_config(distributed__ep=3), spec), "3 does not divide", "8 experts")
    refused(lambda: plan_model(mixtral, run_config(distributed__ep=8), ClusterSpec(1, 4)), "the world size 4")
    refused(lambda: plan_model({"model_type": "llama"}, run_config(), spec), "llama", ", ".join(FAMILIES))
    refused(lambda: plan_model(mixtral | {"num_experts_per_tok": 9}, run_config(), spec), "9", "8 experts")
    refused(lambda: plan_model(mixtral | {"hidden_size": "big"}, run_config(), spec), "hidden_size")
    refused(lambda: plan_model(mixtral | {"num_hidden_layers": 10**9}, run_config(), spec), "num_hidden_layers")
    alone = ClusterSpec(nodes=2, gpus_per_node=1)
    refused(lambda: plan_model(mixtral, run_config(evaluation__ep=4, evaluation__nproc=4), alone), "evaluation.ep")
    missing = run_config(unlearning__ds_config=str(tmp_path / "no.json"))
    refused(lambda: plan_model(mixtral, missing, spec), "DeepSpeed")


def test_every_shipped_model_fits_its_own_nodes() -> None:
    """As many nodes of eight 80 GB GPUs as the recipe's first line says; the table in the docs is of these plans."""
    documented = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for name in recipe_names("model"):
        nodes = re.search(r"; (\d+) nodes?", recipes()[name].read_text(encoding="utf-8").splitlines()[0])
        assert nodes is not None, name
        config, _ = load_config(["wmdp_cyber", name], [])
        planned = plan(config, ClusterSpec(nodes=int(nodes[1])))
        assert all(stage.fits for stage in planned.stages.values()) and planned.best is not None, (name, planned)
        assert not [text for text in planned.warnings if "fits" in text or "needs" in text or "reads" in text], name
        collect, unlearn, *variants = (stage.memory.peak_bytes for stage in planned.stages.values())
        sizes = (collect, unlearn, max(variants), planned.checkpoint_bytes, planned.host_bytes)
        cells = (name.removesuffix("_instruct"), nodes[1], planned.ep, *(f"{each / 1e9:.3g}" for each in sizes))
        assert f"| {' | '.join(map(str, cells))} |\n" in documented


def test_the_best_shape_comes_first_with_the_keys_to_type(capsys: pytest.CaptureFixture[str]) -> None:
    """After the line of jobs; what it names fits, and what does not fit is told with the same keys."""
    from trace_ds.cli import app

    app(["plan", "wmdp_cyber", "mixtral_8x7b", "--set", "distributed.ep=1"], standalone_mode=False)
    jobs, best, *rest = capsys.readouterr().out.splitlines()
    assert jobs.startswith("1 training job")
    assert best.startswith("best on 1 x 8 GPUs of 80 GB: --set distributed.ep=8")
    assert best.partition(": ")[2] in " ".join(rest[rest.index(next(x for x in rest if "collect needs" in x)) :])
    app(["plan", "wmdp_cyber", "mixtral_8x7b", *best.partition(": ")[2].split()], standalone_mode=False)
    again = capsys.readouterr().out
    assert again.splitlines()[1].endswith(": as configured") and "NO" not in again and "WARN" not in again
    app(["plan", "wmdp_cyber", "deepseek_v3", "--nodes", "8", "--gpu-memory", "55"], standalone_mode=False)
    _, best, smallest, *rest = capsys.readouterr().out.splitlines()
    assert best.endswith("nothing fits")
    options = smallest.removeprefix("smallest that fits: ").split()
    app(["plan", "wmdp_cyber", "deepseek_v3", "--gpu-memory", "55", "--json", *options], standalone_mode=False)
    value = json.loads(capsys.readouterr().out)
    assert value["best"] == {"nodes": int(options[1]), "changes": {}}
    assert value["stages"]["collect"]["fits"] and value["stages"]["unlearn"]["fits"]


def test_fewer_rows_or_recomputation_are_part_of_what_fits() -> None:
    sized = {"distributed__ep": 8, "unlearning__forget_rows": 64, "unlearning__retain_rows": 64, "evaluation__ep": 8}
    for memory_gb, keys in ((80, set()), (36, {"unlearning.recompute"})):
        config = run_config(**sized, data__context_length=1024)
        spec = ClusterSpec(nodes=4, gpu_memory_gb=memory_gb)
        best = plan_model(model_config("mixtral-8x7b"), config, spec).best
        assert best is not None and {*best.changes} - {"unlearning.zero_stage", "distributed.ep"} == keys


def test_routing_is_uneven_for_expert_activations() -> None:
    """The busiest GPU has 1.5 times the mean of a layer's routed tokens, where GPUs share the experts."""
    alone, shared = (job_of("mixtral-8x7b", distributed__ep=ep) for ep in (1, 8))
    one, other = (memory.collect_memory(job, 4).compute["expert activations"] for job in (alone, shared))
    assert other == 1.5 * one
    a = alone.a
    routed = a.top_k * 2 * (2 * a.hidden + 4 * a.expert_width)
    kept = [memory.saved_bytes_per_token(a, 0, 2, ep) for ep in (1, 8)]
    assert kept[1] - kept[0] == 0.5 * routed + a.top_k * 2 * 2 * a.hidden  # and the exchanged tokens


def test_every_training_job_is_planned(tmp_path: Path) -> None:
    """Variants and the models that are made first: steps of a fine-tuning in epochs, storage of all checkpoints."""
    for side, rows in (("forget", 64), ("retain", 192)):
        (tmp_path / f"{side}.txt").write_bytes(b"x" * 4 * 512 * rows)
    corpora = {f"data__{side}": [{"path": str(tmp_path / f"{side}.txt")}] for side in ("forget", "retain")}
    sized = {"distributed__ep": 8, "data__context_length": 512, "unlearning__forget_loss": "graddiff", **corpora}
    sized |= {"unlearning__forget_rows": 64, "unlearning__retain_rows": 64, "unlearning__steps": 100}
    tuned = {"finetune__models": {"target": ["forget", "retain"], "retrained": ["retain"]}, "finetune__epochs": 2}
    mixtral, spec = model_config("mixtral-8x7b"), ClusterSpec(nodes=4)
    alone = plan_model(mixtral, run_config(**sized), spec)
    variants = {"kept": {"unlearning.keep": 6, "unlearning.save_every": 10}}
    config = run_config(**sized, **tuned, finetune__batch_rows=128).model_copy(update={"variants": variants})
    result = plan_model(mixtral, config, spec)
    assert list(result.stages) == [
        *("collect", "unlearn", "finetune of target", "finetune of retrained", "unlearn of kept"),
    ]
    assert [result.stages[f"finetune of {name}"].steps for name in ("target", "retrained")] == [4, 3]
    own = {"unlearning__keep": 6, "unlearning__save_every": 10}
    kept = plan_model(mixtral, run_config(**sized, **own), spec)
    assert kept.storage_bytes - alone.storage_bytes == pytest.approx(4 * alone.checkpoint_bytes)
    assert result.storage_bytes == pytest.approx(3 * alone.storage_bytes + kept.storage_bytes)
    away = run_config(**sized | {"data__forget": [{"path": "nowhere.txt"}]}, **tuned)
    assert plan_model(mixtral, away, spec).stages["finetune of target"].at_least_s is None


def test_checkpoints_hold_what_is_trained_in_few_files() -> None:
    """RMU at a layer holds those up to it, an evaluation while training all; DeepSeek-V3 below ZeRO-3 has a file an
    expert."""
    deepseek, spec = model_config("deepseek-v3"), ClusterSpec(nodes=128)
    a = read_architecture(deepseek)
    planned = plan_model(deepseek, run_config(distributed__ep=64), spec)
    trained = a.outside.embedding + sum(block.total for block in a.blocks[: a.layers // 2 + 1])
    assert planned.checkpoint_bytes == 12 * trained and planned.checkpoint_files == 2 * 1024
    watched = run_config(distributed__ep=64, unlearning__evaluate={"every": 5})
    assert plan_model(deepseek, watched, spec).checkpoint_bytes == 12 * planned.parameters
    below = run_config(distributed__ep=64, unlearning__zero_stage=1, unlearning__forget_loss="graddiff")
    many = plan_model(deepseek, below, spec)
    assert many.checkpoint_files == 58 * 256 + 1024 + 1 and "15,873 files" in " ".join(many.warnings)
