"""The cost model: counts against transformers and published totals, memory against torch and DeepSpeed, links by
hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import plan_jobs
import pytest
import tiny
from plan_tables import clusters_markdown
from processes import run_distributed
from safetensors import safe_open

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import active_parameters, count_parameters, read_architecture
from trace_ds.cluster.job import GB, ClusterSpec, PlannedJob
from trace_ds.cluster.plan import collective, forward_flops_per_token, plan, plan_model, training_traffic
from trace_ds.cluster.plan_view import as_dict, plan_command, print_plan
from trace_ds.config.compose import published_config
from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.models.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]
# name of a model fragment, with hyphens -> (published total in billions, published active in billions)
PUBLISHED = {
    "mixtral-8x7b": (46.7, 12.9),
    "mixtral-8x22b": (140.6, 39.0),
    "olmoe-1b-7b": (6.92, 1.28),
    "qwen3-30b-a3b": (30.5, 3.3),
    "qwen3-235b-a22b": (235.0, 22.0),
    "deepseek-v3": (671.0, 37.0),
}
COUNTED = PUBLISHED | {
    "qwen1-5-moe-a2-7b": (14.3, 2.7),
    "deepseek-v2-lite": (15.7, 2.66),  # the published 2.4 leaves the embeddings out
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


@pytest.mark.parametrize("name", COUNTED)
def test_published_models(name: str) -> None:
    a = read_architecture(model_config(name))
    total, active = COUNTED[name]
    assert count_parameters(a).total / 1e9 == pytest.approx(total, rel=0.005)
    assert active_parameters(a).total / 1e9 == pytest.approx(active, rel=0.02)


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
    assert count_parameters(a).total == sum(counted.values())
    experts = {name: number for name, number in counted.items() if ".experts." in name}
    assert count_parameters(a).experts == sum(experts.values()) > 0
    assert a.blocks[-1].experts == 3 * a.experts * a.hidden * a.expert_width
    assert (a.layers, a.hidden, a.vocabulary) == tuple(
        values[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size")
    )


def test_the_table_in_the_docs_is_current() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    configs = {name: model_config(name) for name in PUBLISHED}
    assert clusters_markdown(configs, run_config(distributed__ep=8, data__context_length=512)) in text


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
    mixtrals: dict[int, Path], tmp_path: Path, world: int, rows: int, changes: dict[str, Any]
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
    assert predicted.peak_bytes == pytest.approx(measured["peak"], rel=0.1), (measured, predicted)


@pytest.mark.slow
@pytest.mark.parametrize("ep", [1, 2])
def test_zero3_keeps_and_moves_what_was_planned(tiny_model: Path, tmp_path: Path, ep: int) -> None:
    """Shards, checkpoint and bytes of every collective of a real step on two ranks; a model this small is gathered
    whole only if told so."""
    eager = {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": eager}), encoding="utf-8")
    sized = {"unlearning__forget_rows": 2, "unlearning__retain_rows": 2, "data__context_length": 8}
    changes = {"unlearning__ds_config": str(tmp_path / "ds.json"), "unlearning__forget_loss": "graddiff"} | sized
    path = tiny.write_config(tmp_path, tiny_model, model__dtype="bf16", distributed__ep=ep, **changes)
    ranks = run_distributed(plan_jobs.zero3_job, 2, str(path), str(tmp_path / "run"), [])
    config, _ = load_config(str(path), [], tmp_path / "run")
    planned, kept = plan(config, ClusterSpec(nodes=1, gpus_per_node=2)), ranks[0]["kept"]
    for part in ("parameters", "gradients", "master and Adam moments"):
        # partitions are padded to equal length, which shows in a model this small
        assert kept[part] == pytest.approx(planned.unlearn.memory.resident[part], rel=0.02), part
    assert kept["checkpoint"] == pytest.approx(planned.checkpoint_bytes, rel=0.15)
    assert kept["files"] == planned.checkpoint_files
    moved: dict[str, float] = {}
    values = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    for entry in training_traffic(job_of(values, ClusterSpec(1, 2), distributed__ep=ep, **sized)):
        name = entry.name.split(" of ")[0]
        moved[name] = moved.get(name, 0) + entry.received_bytes
    measured = {name: sum(rank["traffic"].get(name, 0) for rank in ranks) / 2 for name in ranks[0]["traffic"]}
    routed = measured.pop("all-to-all", 0), moved.pop("all-to-all", 0)
    assert measured == moved
    assert routed[0] == pytest.approx(routed[1], rel=0.25)  # the router decides, the plan spreads evenly
    assert (ep > 1) == (routed[1] > 0)


def test_collectives_by_hand() -> None:
    """Two nodes of four GPUs: all of them, the two that hold the same experts, an exchange among all."""
    spec = ClusterSpec(nodes=2, gpus_per_node=4, intra_gb_s=100, inter_gb_s=10)
    result = collective(spec, "", 8, 4, 8 * GB, 2)
    # 7 of 8 GB arrive inside; 4 GB cross to each node through four ports of 10 GB/s
    assert (result.received_bytes, result.intra_s, result.inter_s) == pytest.approx(
        (14 * GB, 2 * 7 / 100, 2 * 4 / 4 / 10)
    )
    result = collective(spec, "", 2, 1, 8 * GB, 1)
    assert (result.received_bytes, result.intra_s, result.inter_s) == pytest.approx((4 * GB, 0, 4 / 10))
    result = collective(spec, "", 8, 4, 8 * GB, 1, exchange=True)
    assert (result.received_bytes, result.intra_s, result.inter_s) == pytest.approx((7 * GB, 3 / 100, 4 / 10))


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
        every = count_parameters(jobs[1].a)
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


@pytest.mark.parametrize("name", ["olmoe-1b-7b", "deepseek-v3"])
def test_plans_of_published_models(name: str) -> None:
    config = run_config(
        distributed__ep=8, unlearning__forget_rows=1024, unlearning__retain_rows=1024, unlearning__micro_batch_rows=1
    )
    planned = plan_model(model_config(name), config, ClusterSpec(nodes=128))
    a = read_architecture(model_config(name))  # RMU at the middle layer: it and those below are held
    parameters = a.outside.embedding + sum(block.total for block in a.blocks[: a.layers // 2 + 1])
    assert planned.checkpoint_bytes == 12 * parameters < 0.57 * 12 * planned.parameters.total
    low = plan_model(model_config(name), run_config(unlearning__rmu={"layer": 0}), ClusterSpec())
    first = next(layer for layer, block in enumerate(a.blocks) if block.experts)  # it is held in any case
    assert low.checkpoint_bytes == 12 * (a.outside.embedding + sum(block.total for block in a.blocks[: first + 1]))
    watched = plan_model(model_config(name), run_config(unlearning__evaluate={"every": 5}), ClusterSpec())
    assert watched.checkpoint_bytes == 12 * planned.parameters.total
    assert {(choice.ep, choice.zero_stage) for choice in planned.choices} >= {(1, 1), (8, 3)}
    fitting = [choice.fits for choice in planned.choices]
    assert fitting == sorted(fitting, reverse=True)
    moved = [(choice.received_bytes, choice.checkpoint_files) for choice in planned.choices if choice.fits]
    assert moved == sorted(moved)
    json.dumps(as_dict(planned), allow_nan=False)


def test_it_says_what_does_not_fit_and_what_would() -> None:
    config = run_config(distributed__ep=1, unlearning__forget_rows=64, unlearning__retain_rows=64)
    one = plan_model(model_config("mixtral-8x7b"), config, ClusterSpec(nodes=1))
    assert not one.unlearn.fits and not one.collect.fits
    text = " ".join(one.warnings)
    assert "unlearn needs" in text and "no choice fits on this cluster" in text
    assert "collect needs" in text and "--set distributed.ep=8 fits" in text
    small = run_config(
        distributed__ep=8, unlearning__forget_rows=64, unlearning__retain_rows=64, data__context_length=512
    )
    four = plan_model(model_config("mixtral-8x7b"), small, ClusterSpec(nodes=4))
    assert four.unlearn.fits and four.collect.fits
    tight = plan_model(model_config("mixtral-8x7b"), small, ClusterSpec(nodes=4, gpu_memory_gb=36))
    assert not tight.unlearn.fits
    assert tight.unlearn.largest_rows >= 1
    assert f"set unlearning.micro_batch_rows to {tight.unlearn.largest_rows} or less" in " ".join(tight.warnings)


def test_few_rows_and_little_host_memory_are_warned_of() -> None:
    config = run_config(unlearning__forget_rows=8, unlearning__retain_rows=8)
    planned = plan_model(model_config("qwen3-235b-a22b"), config, ClusterSpec(nodes=16, host_memory_gb=200))
    text = " ".join(planned.warnings)
    assert "8 rows per step over 128 GPUs" in text and "host memory" in text


def test_variants_are_jobs_of_their_own() -> None:
    changes = {
        "half": {"unlearning.micro_batch_rows": 1},
        "kept": {"unlearning.keep": 5, "unlearning.zero_stage": 1, "unlearning.steps": 7},
    }
    sized = {"unlearning__forget_rows": 64, "unlearning__retain_rows": 64, "distributed__ep": 8}
    config = run_config(**sized).model_copy(update={"variants": changes})
    mixtral, spec = model_config("mixtral-8x7b"), ClusterSpec(nodes=4)
    result = plan_model(mixtral, config, spec)
    assert list(result.stages)[2:] == ["unlearn of half", "unlearn of kept"]
    storage = plan_model(mixtral, run_config(**sized), spec).storage_bytes
    for name, variant in changes.items():
        own = {key.replace(".", "__"): value for key, value in variant.items()}
        alone = plan_model(mixtral, run_config(**sized, **own), spec)
        assert result.stages[f"unlearn of {name}"] == alone.unlearn != result.unlearn
        storage += alone.storage_bytes
    assert result.storage_bytes == storage
    tight = " ".join(plan_model(mixtral, config, ClusterSpec(nodes=4, gpu_memory_gb=40)).warnings)
    assert "unlearn of kept needs" in tight


def test_the_models_that_are_made_first_are_jobs_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A fine-tuning is what an unlearning job without a frozen model is, on as many rows; its length is in epochs."""
    corpora = {}
    for side, rows in (("forget", 64), ("retain", 192)):
        (tmp_path / f"{side}.txt").write_bytes(b"x" * 4 * 512 * rows)
        path = str(tmp_path / f"{side}.txt")
        corpora[f"data__{side}"] = path if side == "alternative" else [{"path": path}]
    both = {"micro_batch_rows": 2, "recompute": True, "zero_stage": 2}
    sized = {"distributed__ep": 8, "unlearning__forget_loss": "graddiff", "unlearning__forget_rows": 64}
    sized |= {
        "unlearning__retain_rows": 64,
        "data__context_length": 512,
        **{f"unlearning__{key}": value for key, value in both.items()},
        **corpora,
    }
    finetune = {"models": {"target": ["forget", "retain"], "retrained": ["retain"]}, "epochs": 2, "batch_rows": 128}
    finetune = {
        f"finetune__{key}": value for key, value in (finetune | {"recompute": True, "micro_batch_rows": 4}).items()
    }
    mixtral, spec = model_config("mixtral-8x7b"), ClusterSpec(nodes=4)
    result = plan_model(mixtral, run_config(**sized, **finetune), spec)
    target, retrained = (result.stages[f"finetune of {name}"] for name in ("target", "retrained"))
    assert (target.steps, retrained.steps) == (4, 3)
    assert (target.rows, target.memory, target.traffic) == (4, retrained.memory, retrained.traffic)
    same = ("resident", "compute", "layer", "step", "start")
    assert all(getattr(target.memory, phase) == getattr(result.unlearn.memory, phase) for phase in same)
    assert target.memory.head["logits"] > result.unlearn.memory.head["logits"]
    assert (target.resources_s, target.traffic) == (result.unlearn.resources_s, result.unlearn.traffic)
    assert target.largest_rows > 1.5 * result.unlearn.largest_rows  # of unlearning they are pairs
    without = plan_model(mixtral, run_config(**sized), spec)
    assert len(without.stages) == 2 and result.storage_bytes == pytest.approx(3 * without.storage_bytes)
    print_plan(result)
    shown = capsys.readouterr().out
    assert "finetune of retrained" in shown and "all 3" in shown
    assert as_dict(result)["stages"]["finetune of target"]["at_least_s"] == target.at_least_s
    del corpora["data__forget"]
    away = run_config(**sized | corpora | {"data__forget": [{"path": "nowhere.txt"}]}, **finetune)
    assert plan_model(mixtral, away, spec).stages["finetune of target"].at_least_s is None


@pytest.mark.parametrize(
    ("model", "nodes", "changes", "cure"),
    [
        ("mixtral-8x7b", 2, {}, "set evaluation.ep to 2"),
        ("mixtral-8x7b", 2, {"evaluation__ep": 8}, None),
        ("qwen3-235b-a22b", 4, {"evaluation__zero_stage": 3}, None),
        (
            "qwen3-235b-a22b",
            16,
            {"evaluation__relearning": {}},
            "set evaluation.ep to 1 and evaluation.zero_stage to 3",
        ),
    ],
)
def test_how_ranks_can_share_a_model_that_evaluate_cannot_hold(
    model: str, nodes: int, changes: dict[str, Any], cure: str | None
) -> None:
    config = run_config(distributed__ep=8, **changes)
    warnings = plan_model(model_config(model), config, ClusterSpec(nodes=nodes)).warnings
    said = [text for text in warnings if text.startswith("evaluate needs ")]
    assert len(said) == (cure is not None) and all(text.endswith(f" GB: {cure}") for text in said), said


def test_micro_batches_are_cut_as_the_job_cuts_them() -> None:
    from types import SimpleNamespace

    from trace_ds.unlearning.batches import Batches

    for forget, retain, micro, world in ((8, 8, None, 2), (8, 24, 2, 4), (5, 7, 3, 2), (1, 1, None, 8)):
        changes = {"forget_rows": forget, "retain_rows": retain, "micro_batch_rows": micro}
        job = job_of("olmoe-1b-7b", ClusterSpec(1, world), **{f"unlearning__{k}": v for k, v in changes.items()})
        count, rows = job.micro_batches()
        settings = SimpleNamespace(_settings=job.config.unlearning)
        assert count == Batches.micro_batches_per_step(settings, world)  # type: ignore[arg-type]
        assert rows * count * world >= forget + retain


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
    objective, _ = objective_module.make_forget_retain(config.unlearning, info, world, batches, {}, **settings)  # type: ignore[arg-type]
    passes = job.passes()
    frozen = objective.frozen  # type: ignore[attr-defined]
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


def test_the_command_prints_tables_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config("olmoe-1b-7b")), encoding="utf-8")
    config = run_config(model__path=str(tmp_path), distributed__ep=8)
    assert plan_command(config, ClusterSpec(nodes=2), True, set()) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["parameters"]["total"] == 6_919_161_856
    assert value["stages"]["unlearn"]["memory"]["peak_bytes"] > 0
    assert plan_command(config, ClusterSpec(nodes=2), False, set()) == 0
    printed = capsys.readouterr().out
    for word in (
        "6.919 B",
        "all-to-all of tokens",
        "resident",
        "unlearn: bound by",
        "EP x ZeRO",
        "checkpoint 46.5 GB in 32 files",
    ):
        assert word in printed
    text = (" on ", "checkpoint ", "evaluate: ", "WARN ", "assumed: ")  # wrapped by the terminal
    assert max(len(line) for line in printed.splitlines() if not any(word in line for word in text)) <= 80


def test_a_model_alone_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    from trace_ds.cli import app

    assert app(["plan", "mixtral_8x7b", "--nodes", "4"], standalone_mode=False) == 0
    printed = capsys.readouterr().out
    assert "mixtral, 46.7 B parameters" in printed and "corpora not found" in printed


def test_the_checkpoints_that_are_kept_are_counted() -> None:
    mixtral, spec = model_config("mixtral-8x7b"), ClusterSpec(nodes=4)
    base = {"unlearning__steps": 100, "unlearning__save_every": 10, "distributed__ep": 8}
    base |= {"unlearning__forget_loss": "graddiff"}  # it holds the whole model
    plain = plan_model(mixtral, run_config(**base), spec)
    curve = {"unlearning__keep": 6}
    config = run_config(**base, **curve).model_copy(update={"variants": {"even": {"calibration.rule": "uniform"}}})
    planned = plan_model(mixtral, config, spec)
    kept = config.unlearning.kept_steps(100)
    assert kept == [50, 60, 70, 80, 90, 100]
    more = planned.storage_bytes - 2 * plain.storage_bytes
    assert more == pytest.approx(2 * (len(kept) - 2) * plain.checkpoint_bytes)


def test_many_files_of_a_checkpoint_are_warned_of() -> None:
    """DeepSeek-V3 below ZeRO-3: 58 MoE layers of 256 experts, a file each."""
    config = run_config(distributed__ep=64, unlearning__zero_stage=1, unlearning__forget_loss="graddiff")
    planned = plan_model(model_config("deepseek-v3"), config, ClusterSpec(nodes=128))
    assert planned.checkpoint_files == 58 * 256 + 1024 + 1
    assert "15,873 files" in " ".join(planned.warnings)
    sharded = plan_model(model_config("deepseek-v3"), run_config(distributed__ep=64), ClusterSpec(nodes=128))
    assert sharded.checkpoint_files == 2 * 1024 and "files" not in " ".join(sharded.warnings)


def test_every_option_of_the_command_reaches_the_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    from trace_ds.cli import app

    given: list[ClusterSpec] = []
    monkeypatch.setattr(
        "trace_ds.cluster.plan_view.plan_command", lambda config, spec, json, variants: given.append(spec) or 0
    )
    options = {
        "nodes": 3,
        "gpus_per_node": 5,
        "gpu_memory": 141.0,
        "tflops": 7.0,
        "intra": 11.0,
        "inter": 13.0,
        "storage": 17.0,
        "host_memory": 19.0,
    }
    fields = {"gpu_memory": "gpu_memory_gb", "host_memory": "host_memory_gb"}
    fields |= {name: f"{name}_gb_s" for name in ("intra", "inter", "storage")}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    with pytest.raises(SystemExit) as ended:
        app(["plan", "wmdp_cyber", "mixtral_8x7b", *words])
    assert ended.value.code == 0
    assert given == [ClusterSpec(**{fields.get(name, name): value for name, value in options.items()})]
