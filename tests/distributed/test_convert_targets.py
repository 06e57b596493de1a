"""Round trips of models, and the same bytes whatever the number of threads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_convert_engines import FAMILIES, Case, base_model, checkpoints

from trace_ds.conversion.convert import convert_checkpoint

TRAINED = Case("mixtral", 3, 2)


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def fused_copy(model: Any, base: Path, destination: Path) -> dict[str, torch.Tensor]:
    """The model's directory with the tensors as transformers holds them in memory; these."""
    shutil.copytree(base, destination)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    save_file(tensors, destination / "model.safetensors", {"format": "pt"})
    return tensors


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_of_a_model_leads_back_to_it(tmp_path: Path, family: str) -> None:
    """A directory with transformers' in-memory names leads back to the hub's, exactly."""
    model = base_model(family)
    model.save_pretrained(tmp_path / "base")
    original = weights(tmp_path / "base")
    fused = fused_copy(model, tmp_path / "base", tmp_path / "fused")
    assert any("gate_up_proj" in name for name in fused)
    convert_checkpoint(tmp_path / "fused", tmp_path / "again", verify=True, max_shard_size="3KB", jobs=2)
    assert same(weights(tmp_path / "again"), original)
    index = json.loads((tmp_path / "again" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(original)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    assert len(set(index["weight_map"].values())) > 1


@pytest.mark.parametrize("family", ["gpt_oss", "granitemoe"])
def test_a_family_without_expert_parallelism_goes_round_too(tmp_path: Path, family: str) -> None:
    import tiny
    from transformers import AutoModelForCausalLM

    base = tiny.make_model(tmp_path / "base", family)
    fused_copy(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), base, tmp_path / "fused")
    convert_checkpoint(tmp_path / "fused", tmp_path / "back", verify=True)
    assert same(weights(tmp_path / "back"), weights(base))


def test_reruns_and_jobs_give_the_same_bytes(tmp_path: Path) -> None:
    source = checkpoints(2) / TRAINED.name
    base = checkpoints(2) / "base" / "mixtral"
    for name, jobs in (("one", 1), ("two", 3)):
        convert_checkpoint(source, tmp_path / name / "model", base_model=base, jobs=jobs, max_shard_size="4KB")
    files = sorted(path.name for path in (tmp_path / "one" / "model").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "two" / "model").iterdir())
    for name in files:
        one, two = (tmp_path / run / "model" / name for run in ("one", "two"))
        assert one.read_bytes() == two.read_bytes(), name
