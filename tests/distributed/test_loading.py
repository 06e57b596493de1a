"""Each process reads its share of the files and no more, and holds what transformers would have loaded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
from jobs import family_model
from processes import run_distributed

FAMILIES = ("mixtral", "qwen2_moe", "deepseek_v3", "qwen3_5_moe_text", "gpt_oss")


def compare_with_transformers(world: Any, paths: list[str]) -> list[str]:
    """Every parameter and buffer of every model, both types, against ``from_pretrained``; returns what differs."""
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.models.engine import base_ds_config
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts, load_share

    different = []
    for path in paths:
        for dtype in (torch.float32, torch.bfloat16):
            info = inspect_model(path)
            ds_config = base_ds_config(ep=1, info=info, zero_stage=0)
            actual, files = load_share(info.path, dtype, world, ep=1, ds_config=ds_config, parts=ModelParts())
            expected = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            for kind in ("named_parameters", "named_buffers"):
                ours = dict(getattr(actual, kind)(remove_duplicate=False))
                theirs = dict(getattr(expected, kind)(remove_duplicate=False))
                different += [f"{path} {name}" for name in ours.keys() ^ theirs.keys()]
                for name in ours.keys() & theirs.keys():
                    if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name]):
                        different.append(f"{path} {dtype} {name} {ours[name].dtype} {theirs[name].dtype}")
            files.prove(actual, 1, 0)
            for name, buffer in actual.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer[0] += 1.0
                    with pytest.raises(AssertionError, match="e_score_correction_bias differs from the files"):
                        files.prove(actual, 1, 0)
                    buffer[0] -= 1.0
            if "tied" in path and actual.lm_head.weight is not actual.model.embed_tokens.weight:
                different.append(f"{path} is not tied")
    return different


@pytest.mark.slow
def test_the_share_of_one_process_is_what_transformers_loads(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    paths = [str(family_model(family)) for family in FAMILIES]
    config = AutoConfig.from_pretrained(paths[0])
    config.tie_word_embeddings = True
    torch.manual_seed(3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "tied", max_shard_size="100KB")
    assert run_distributed(compare_with_transformers, 1, [*paths, str(tmp_path / "tied")]) == [[]]


def load_and_count(world: Any, path: str, stage: int) -> dict[str, Any]:
    """Bytes this rank read from disk while loading, what a proof says of the weights, and of a damaged one."""
    import torch

    from trace_ds.models.autoep import readable_recorders, require_converted
    from trace_ds.models.engine import TORCH_DTYPES, base_ds_config
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts, load_share
    from trace_ds.models.weight_files import full_shape, local_elements
    from trace_ds.parallel.world import quiet_deepspeed

    info = inspect_model(path)
    ep = world.size if stage < 3 else 1
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage)
    arguments = {"ep": ep, "ds_config": ds_config, "parts": ModelParts()}
    load_share(info.path, TORCH_DTYPES["fp32"], world, **arguments)  # whatever is imported on the way is not counted
    before = read_bytes()
    model, files = load_share(info.path, TORCH_DTYPES["fp32"], world, **arguments)
    counted = read_bytes() - before
    with readable_recorders():
        engine, *_ = quiet_deepspeed().initialize(model=model.requires_grad_(False), config=ds_config)
    proved = files.prove(engine.module, ep, world.rank % ep)
    wrong = None
    parameter = next(p for name, p in engine.module.named_parameters() if ".experts." in name)
    with torch.no_grad():  # the second of the experts that this rank holds
        values, size = local_elements(parameter)[0], math.prod(full_shape(parameter)[1:])
        values[size : 2 * size] = 0.0
    try:
        files.prove(engine.module, ep, world.rank % ep)
    except AssertionError as error:
        wrong = str(error)
    if stage == 0:  # a layer that AutoEP left as it is, without a word
        require_converted(engine.module, 3, ep)
        engine.module.model.layers[1] = type(engine.module.model.layers[1])(engine.module.config, 1)
        with pytest.raises(AssertionError, match="AutoEP converted 2 of 3 MoE layers"):
            require_converted(engine.module, 3, ep)
    frequencies = {buffer.dtype for name, buffer in engine.module.named_buffers() if name.endswith("inv_freq")}
    return {"read": counted, "proved": proved, "wrong": wrong, "rotary": frequencies == {torch.float32}}


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_rank_reads_only_what_it_holds_and_proves_it(stage: int, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    model = tiny.make_model(tmp_path / "model", experts=128)
    tensors = load_file(model / "model.safetensors")
    total = sum(array.nbytes for array in tensors.values())
    experts = sum(array.nbytes for name, array in tensors.items() if ".experts." in name)
    share = total - experts / 2 if stage == 0 else total / 2
    for result in run_distributed(load_and_count, 2, str(model), stage):
        assert result["read"] < 1.05 * share + 400_000, "configuration and headers apart, a rank reads its share"
        assert result["read"] < 0.8 * total
        assert result["proved"] == 2 + 1 + 3 * (4 + 2 + 1 + (3 if stage == 0 else 2))
        assert result["wrong"] and "differs from the files" in result["wrong"]
        assert result["rotary"]
