"""Checkpoints of real DeepSpeed engines (gloo, CPU) converted to Hugging Face models, compared with the engine itself.

One process group of each world size builds every case (starting Python costs more than the training). The truth is
what the engine holds in memory: its gathered parameters, put together here independently of the tool, and its logits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import made_once
from processes import run_distributed
from safetensors.torch import load_file

from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.parallel.world import World

DEEPSEEK = {
    "n_routed_experts": 4,
    "hidden_size": 10,
    "n_shared_experts": 1,
    "moe_intermediate_size": 7,
    "intermediate_size": 11,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 6,
    "q_lora_rank": 6,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "n_group": 1,
    "topk_group": 1,
}
QWEN = {"num_experts": 4, "moe_intermediate_size": 7, "intermediate_size": 11, "num_key_value_heads": 1}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 7, "head_dim": 4, "num_key_value_heads": 1},
    "qwen2_moe": {**QWEN, "shared_expert_intermediate_size": 5, "hidden_size": 12},
    "qwen3_moe": {**QWEN, "head_dim": 4, "tie_word_embeddings": True},
    "olmoe": {"num_experts": 4, "intermediate_size": 7, "hidden_size": 12, "num_key_value_heads": 1},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": DEEPSEEK,
    "qwen3_5_moe_text": {
        **{key: value for key, value in QWEN.items() if key != "intermediate_size"},
        "shared_expert_intermediate_size": 5,
        "head_dim": 16,
        "linear_key_head_dim": 4,
        "linear_value_head_dim": 5,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 3,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
PRESETS = {"qwen2_moe": "qwen3_moe", "olmoe": "qwen3_moe", "qwen3_5_moe_text": "qwen3_5_moe"}
VOCABULARY = 61
UNTRAINED = "step_000000"


@dataclass(frozen=True)
class Case:
    """One engine: ``ep`` 0 means without AutoEP, ``sub_group`` the elements of a ZeRO-3 sub-group."""

    family: str
    stage: int
    ep: int
    dtype: str = "bf16"
    steps: int = 1
    sub_group: int = 3000
    freeze: bool = False

    @property
    def name(self) -> str:
        frozen = "_frozen" if self.freeze else ""
        return f"{self.family}_zero{self.stage}_ep{self.ep}_{self.dtype}_steps{self.steps}{frozen}"


def base_model(family: str) -> Any:
    """A tiny random model whose sizes divide by nothing, so that every partition has padding."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 9,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "tie_word_embeddings": False,
        **FAMILIES[family],
    }
    torch.manual_seed(sum(map(ord, family)))
    config = AutoConfig.for_model(family, **settings)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config)
    for name, tensor in model.state_dict().items():
        if name.endswith(("layernorm.weight", "norm.weight", "e_score_correction_bias")):
            tensor.add_(torch.randn(tensor.shape) * 0.1)
    return model


def train(engine: Any, rank: int, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * step + rank)
        tokens = torch.randint(0, VOCABULARY, (1, 16), generator=generator)
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()


def probe() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(7))


def ds_config(case: Case) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 60,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage},
    }
    if case.stage == 3:
        config["zero_optimization"] |= {"sub_group_size": case.sub_group, "stage3_param_persistence_threshold": 20}
    if case.ep:
        preset = PRESETS.get(case.family, case.family)
        config["expert_parallel"] = {
            "enabled": True,
            "autoep_size": case.ep,
            "preset_model": preset,
            "use_grouped_mm": False,
        }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    return config


def make_engine(case: Case, more: dict[str, Any] | None = None) -> Any:
    import deepspeed

    from trace_ds.models.autoep import readable_recorders

    model = base_model(case.family)
    if case.dtype == "bf16":
        inv_freq = {n: b.clone() for n, b in model.named_buffers() if n.endswith("inv_freq")}
        model.to(torch.bfloat16)
        for name, buffer in inv_freq.items():
            model.get_submodule(name.rsplit(".", 1)[0]).inv_freq = buffer
    if case.freeze:
        model.get_input_embeddings().weight.requires_grad_(False)
    with readable_recorders():
        engine, *_ = deepspeed.initialize(
            model=model,
            config=ds_config(case) | (more or {}),
            model_parameters=[p for p in model.parameters() if p.requires_grad],
        )
    return engine


def build(world: World, cases: list[Case], root: str) -> None:
    """Body of one process: build, train and save every case, and write down what the engine holds."""
    import deepspeed

    warnings.simplefilter("ignore", FutureWarning)
    for case in cases:
        directory = Path(root) / case.name
        engine = make_engine(case)
        engine.save_checkpoint(str(directory), tag=UNTRAINED, save_latest=False)
        train(engine, world.rank, case.steps)
        engine.save_checkpoint(str(directory), tag="step_000001", save_latest=True)
        engine.eval()
        with torch.no_grad():
            logits = engine(input_ids=probe(), use_cache=False).logits.float()
        tensors = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=case.stage == 3):
                tensors[name] = parameter.detach().clone()
        buffers = {n: b.clone() for n, b in engine.module.named_buffers() if "e_score" in n}
        torch.save({"held": tensors, "buffers": buffers, "logits": logits}, directory / f"truth_{world.rank}.pt")
        world.barrier()
        del engine


def run_world(world: int, cases: list[Case], root: Path) -> Path:
    """Build the cases in ``world`` processes: checkpoints ``root/NAME``, their models ``root/base/FAMILY``."""
    for family in {case.family for case in cases}:
        base_model(family).save_pretrained(root / "base" / family)
    run_distributed(build, world, cases, str(root))
    return root


def engine_state(directory: Path, ep: int, world: int) -> dict[str, torch.Tensor]:
    """transformers' in-memory state dict of what the engine held, put together by hand from every rank's memory."""
    truth = [torch.load(directory / f"truth_{rank}.pt") for rank in range(world)]
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in (truth[0]["held"] | truth[0]["buffers"]).items():
        if ".experts.w" in name:
            prefix, weight = name.rsplit(".", 1)
            # rank r is expert-parallel rank r % ep and holds the experts r % ep * n … of n each
            experts.setdefault(prefix, {})[weight] = torch.cat([truth[rank]["held"][name] for rank in range(ep)])
        elif ".gate.gate." not in name and ".gate.e_score_correction_bias" not in name.replace(".router.", ".none."):
            state[name.replace(".router.gate.", ".gate.").replace(".router.", ".gate.")] = tensor
        elif ep == 0:
            state[name] = tensor
    for prefix, weights in experts.items():
        state[f"{prefix}.gate_up_proj"] = torch.cat([weights["w1"], weights["w3"]], dim=1)
        state[f"{prefix}.down_proj"] = weights["w2"]
    return state


# Quick: what other files use too. Slow: the other families, and how partitions are joined on four ranks.
QUICK = {
    1: [Case("mixtral", 3, 1, "fp32")],
    2: [
        Case("mixtral", 3, 2),
        Case("mixtral", 1, 2),
        Case("mixtral", 0, 2, "fp32"),
        Case("mixtral", 3, 0, freeze=True),
        Case("deepseek_v3", 3, 2),
        Case("qwen3_moe", 3, 2),
    ],
}
SLOW = {
    2: [
        *(Case(family, 3, 2) for family in ("qwen2_moe", "olmoe", "deepseek_v2", "qwen3_5_moe_text")),
        Case("qwen2_moe", 3, 0),
        Case("qwen3_5_moe_text", 1, 2),
    ],
    4: [Case("mixtral", 3, 2, steps=2), Case("mixtral", 1, 2, steps=2), Case("mixtral", 2, 4, "fp32")],
}


def checkpoints(world: int, slow: bool = False) -> Path:
    """Directory with the checkpoints of that world's cases, built once in a test run by the worker that asks first."""
    cases = (SLOW if slow else QUICK)[world]
    return made_once(f"world{world}{'_slow' * slow}", lambda root: run_world(world, cases, root))


PARAMETERS = [
    pytest.param(world, case, slow, id=f"world{world}-{case.name}", marks=[pytest.mark.slow] * slow)
    for slow, matrix in ((False, QUICK), (True, SLOW))
    for world, cases in matrix.items()
    for case in cases
]


def assert_untrained_is_the_original(root: Path, case: Case, destination: Path) -> None:
    """Model -> engine -> checkpoint -> model: bit for bit what the engine was given (its type's rounding of it)."""
    base = root / "base" / case.family
    convert_checkpoint(root / case.name, destination, tag=UNTRAINED, base_model=base)
    original, converted = (load_file(path / "model.safetensors") for path in (base, destination))
    assert original.keys() == converted.keys()
    for name, tensor in original.items():
        given = tensor.to(torch.bfloat16) if case.dtype == "bf16" else tensor
        assert torch.equal(converted[name], given.to(converted[name].dtype)), name


@pytest.mark.parametrize(("world", "case", "slow"), PARAMETERS)
def test_checkpoint_becomes_the_model_the_engine_held(tmp_path: Path, world: int, case: Case, slow: bool) -> None:
    from transformers import AutoModelForCausalLM

    root = checkpoints(world, slow)
    report = convert_checkpoint(
        root / case.name, tmp_path / "model", base_model=root / "base" / case.family, verify=True, jobs=2
    )
    assert report["source"]["world"] == world and report["source"]["step"] == case.steps
    assert report["source"]["ep"] == max(case.ep, 1) and not report["warnings"]

    assert_untrained_is_the_original(root, case, tmp_path / "untrained")

    # the reference goes through transformers' own save_pretrained
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    reference = AutoModelForCausalLM.from_pretrained(root / "base" / case.family, dtype=dtype)
    own = reference.state_dict()
    state = {
        name if name in own else name.replace(".shared_experts", ".shared_expert"): tensor  # Qwen's name is singular
        for name, tensor in engine_state(root / case.name, case.ep, world).items()
    }
    loaded = reference.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if reference.config.tie_word_embeddings else set()
    assert set(loaded.missing_keys) <= tied and not loaded.unexpected_keys
    reference.save_pretrained(tmp_path / "reference")
    expected = load_file(tmp_path / "reference" / "model.safetensors")
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert set(converted) == set(expected) and len(converted) == report["tensors"]
    for name, tensor in expected.items():
        assert converted[name].dtype == tensor.dtype, name
        # from transformers 5.24 on DeepSeek's gates stay fp32: ours is the master, what the engine held its rounding
        actual = converted[name].to(dtype) if name.endswith("gate.weight") else converted[name]
        assert torch.equal(actual, tensor.to(actual.dtype)), name

    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.dtype == dtype
    with torch.no_grad():
        logits = model(input_ids=probe(), use_cache=False).logits.float()
    engine_logits = torch.load(root / case.name / "truth_0.pt")["logits"]
    # Two things differ, by a unit in the last place of bf16 and 1e-8 in fp32: AutoEP adds up the experts in another
    # order, and ZeRO-3's linear layers round before they add a bias, which Qwen2-MoE's attention has.
    if case.ep or (case.family, case.stage) == ("qwen2_moe", 3):
        assert torch.allclose(logits, engine_logits, rtol=0, atol=2e-3 if case.dtype == "bf16" else 1e-6)
    else:
        assert torch.equal(logits, engine_logits)
