"""Checkpoints that DeepSpeed alone wrote, with the options that change how it lays them out: each converts to exactly
the fp32 masters of the engine, or is refused with the reason.

All engines of a world size are made in one process group, one after the other.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import made_once
from processes import run_distributed
from safetensors.torch import load_file

from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.parallel.world import World

STAGES, WORLDS = (0, 1, 2, 3), (1, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "round_robin": {"zero_optimization": {"round_robin_gradients": True}},
    "elastic": {"zero_optimization": {"elastic_checkpoint": True}},
    "frozen_excluded": {},
    "not_contiguous": {"zero_optimization": {"contiguous_gradients": False}},
    "fp16": {"bf16": {"enabled": False}, "fp16": {"enabled": True, "initial_scale_power": 4}},
    "fp32_accumulation": {"data_types": {"grad_accum_dtype": "fp32"}},
    "fp32": {"bf16": {"enabled": False}},
}
# DeepSpeed itself has no engine of stage 0 with bf16 and fp32 accumulation.
CASES = [(s, v) for s in STAGES for v in VARIANTS if (s, v) != (0, "fp32_accumulation")]
FROZEN = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")


def base_model() -> Any:
    """A tiny random model whose sizes divide by nothing, so that partitions are cut anywhere and padded."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=31,
            hidden_size=9,
            intermediate_size=7,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            head_dim=4,
            max_position_embeddings=32,
        )
    )
    return model.to(torch.bfloat16).float()  # frozen weights in bf16 are the model's own


def build(world: World, root: str) -> None:
    """Body of one process: every engine makes a step, saves, and notes what it holds."""
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.utils import safe_get_full_fp32_param
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    warnings.simplefilter("ignore", FutureWarning)
    # DeepSpeed asks for native fp16 arithmetic, which few processors have; torch computes it on all of them.
    get_accelerator().is_fp16_supported = lambda: True
    for stage, variant in CASES:
        name = f"zero{stage}_{variant}"
        model = base_model()
        if variant == "frozen_excluded":
            for frozen in FROZEN:
                model.get_parameter(frozen).requires_grad_(False)
        options = VARIANTS[variant]
        zero = {"stage": stage, **options.get("zero_optimization", {})}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "steps_per_print": 1 << 60,
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "bf16": {"enabled": True},
            **options,
            "zero_optimization": zero,
        }
        engine, *_ = deepspeed.initialize(
            model=model, config=config, model_parameters=[p for p in model.parameters() if p.requires_grad]
        )
        tokens = torch.randint(0, 31, (1, 16), generator=torch.Generator().manual_seed(world.rank))
        engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
        engine.step()
        exclude = variant == "frozen_excluded"
        engine.save_checkpoint(f"{root}/{name}", tag="step_1", exclude_frozen_parameters=exclude)
        own, masters = {}, {}
        for key, parameter in engine.module.named_parameters():
            master = safe_get_full_fp32_param(parameter) if stage and parameter.requires_grad else None
            with deepspeed.zero.GatheredParameters([parameter], enabled=stage == 3):
                own[key] = parameter.detach().clone()
            masters[key] = own[key].float() if master is None else master.clone()
        if world.is_main:
            if variant == "round_robin" and stage:  # of which safe_get_full_fp32_param knows nothing
                masters = get_fp32_state_dict_from_zero_checkpoint(f"{root}/{name}")
            torch.save({"masters": masters, "own": own}, f"{root}/{name}/truth.pt")
        world.barrier()
        del engine


def checkpoints(world: int) -> Path:
    def make(root: Path) -> None:
        base_model().save_pretrained(root / "base")
        run_distributed(build, world, str(root))

    return made_once(f"foreign{world}", make)


@pytest.mark.parametrize(("stage", "variant"), CASES)
@pytest.mark.parametrize("world", WORLDS)
def test_a_checkpoint_of_deepspeed_alone_becomes_its_masters(
    tmp_path: Path, world: int, stage: int, variant: str
) -> None:
    root = checkpoints(world)
    checkpoint = root / f"zero{stage}_{variant}"
    truth = torch.load(checkpoint / "truth.pt")
    for name, master in truth["masters"].items():  # the truth itself: the engine computes with its masters, rounded
        assert torch.equal(master.to(truth["own"][name].dtype), truth["own"][name]), name
    report = convert_checkpoint(checkpoint, tmp_path / "model", base_model=root / "base", dtype="fp32", verify=True)
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert converted.keys() == truth["masters"].keys()
    for name, master in truth["masters"].items():
        assert torch.equal(converted[name], master), name
    notes = " ".join(report["notes"])
    assert ("stores fp32 masters without their names" in notes) == (stage == 0 and variant != "fp32")
    assert ("holds no frozen parameters: 2 tensors are the base model's" in notes) == (variant == "frozen_excluded")
    assert len(report["notes"]) == notes.count("masters without") + notes.count("no frozen parameters")


@pytest.mark.parametrize("stage", STAGES)
def test_frozen_parameters_that_are_nowhere_are_named(tmp_path: Path, stage: int) -> None:
    root = checkpoints(1)
    shutil.copytree(root / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(
        UserError, match=r"holds no frozen parameters: .* the first: model.embed_tokens\.weight\. That model"
    ):
        convert_checkpoint(root / f"zero{stage}_frozen_excluded", tmp_path / "model", base_model=tmp_path / "base")


@pytest.mark.parametrize("stage", [1, 2])
def test_masters_that_are_not_the_modules_weights_are_refused(tmp_path: Path, stage: int) -> None:
    """What the sizes do not show: the parameters in another order than that of the masters, or one value changed."""
    root = checkpoints(2)
    for change in ("order", "value"):
        shutil.copytree(root / f"zero{stage}_round_robin", tmp_path / change)
        path = tmp_path / change / "step_1" / "mp_rank_00_model_states.pt"
        state = torch.load(path, weights_only=False)
        if change == "order":
            state["param_shapes"] = [{name: group[name] for name in state["module"]} for group in state["param_shapes"]]
        else:
            state["module"]["model.norm.weight"][4] += 1
        torch.save(state, path)
        with pytest.raises(UserError, match=r"fp32 master of .* is not the weight in this file") as raised:
            convert_checkpoint(tmp_path / change, tmp_path / "model", base_model=root / "base")
        assert raised.value.where == str(path)
