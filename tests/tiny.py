"""Tiny models, tokenizers, corpora and configurations that the tests make on the spot (seeded, random weights)."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import yaml

WORDS = [
    "iron",
    "gold",
    "lead",
    "tin",
    "zinc",
    "acid",
    "base",
    "salt",
    "river",
    "mountain",
    "city",
    "king",
    "queen",
    "harbour",
    "letter",
    "bridge",
    "winter",
    "summer",
    "garden",
    "window",
    "teacher",
    "doctor",
    "street",
    "house",
    "water",
    "stone",
    "paper",
    "silver",
    "copper",
    "carbon",
    "oxygen",
    "helium",
    "neon",
]


MIXING = ("qwen3_5_moe_text", "gpt_oss")  # the families that mix the documents of a packed row

# DeepSeek's shape: latent attention, one dense layer, shared experts, two groups of experts of which one is used.
DEEPSEEK: dict[str, Any] = {
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.5,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}


def make_tokenizer(directory: Path) -> None:
    """A byte-level BPE tokenizer over :data:`WORDS`, 300 tokens, loadable by transformers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)


def shape(family: str, *, layers: int = 3, experts: int = 4, top_k: int = 2, tied: bool = False) -> dict[str, Any]:
    """The configuration of a tiny model of ``family``."""
    common: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "num_experts_per_tok": top_k,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": tied,
    }
    own: dict[str, dict[str, Any]] = {
        "mixtral": {"num_local_experts": experts, "intermediate_size": 48},
        "qwen3_moe": {"num_experts": experts, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 8},
        "olmoe": {"num_experts": experts, "intermediate_size": 24},
        "qwen2_moe": {
            "num_experts": experts,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "intermediate_size": 48,
            "mlp_only_layers": [0],
        },
        "qwen3_5_moe_text": {
            "vocab_size": 301,  # its class of tokenizers brings a token of its own
            "num_experts": experts,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 16,
            "head_dim": 16,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_conv_kernel_dim": 4,
            "layer_types": [("linear_attention", "full_attention")[number % 2] for number in range(layers)],
        },
        "deepseek_v2": {
            **DEEPSEEK,
            "n_routed_experts": experts,
            "topk_method": "group_limited_greedy",
            "norm_topk_prob": False,
            "num_key_value_heads": 4,
        },
        "deepseek_v3": {**DEEPSEEK, "n_routed_experts": experts, "num_key_value_heads": 4},
        "gpt_oss": {"num_local_experts": experts, "intermediate_size": 48, "head_dim": 8, "sliding_window": 64},
        "phimoe": {"num_local_experts": experts, "intermediate_size": 48},
        "granitemoe": {"num_local_experts": experts, "intermediate_size": 48, "logits_scaling": 2.0},
    }
    return common | own[family]


def make_model(
    directory: Path,
    family: str = "mixtral",
    *,
    layers: int = 3,
    experts: int = 4,
    top_k: int = 2,
    seed: int = 0,
    tied: bool = False,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """A random model of ``family`` with its tokenizer, saved in the hub layout; ``changes`` are of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    sizes = shape(family, layers=layers, experts=experts, top_k=top_k, tied=tied)
    config = AutoConfig.for_model(family, **(sizes | changes))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # routers that decide something: the default initialisation is nearly flat
        for name, parameter in model.named_parameters():
            if name.endswith(("gate.weight", "router.weight")):
                parameter.mul_(25.0)
            elif name.endswith("router.bias"):  # gpt_oss
                parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    make_tokenizer(directory)
    return directory


def sentences(count: int, seed: int, words: list[str]) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(words, k=draw.randint(2, 14))) for _ in range(count)]


def write_corpora(directory: Path) -> dict[str, Path]:
    """forget.jsonl and retain.jsonl: short documents of different words, plus an empty and a long one."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for side, words, count in (("forget", WORDS[:10], 40), ("retain", WORDS[8:], 90)):
        texts = sentences(count, len(side), words)
        texts[3] = ""
        texts[5] = " ".join(texts[6:16])
        paths[side] = directory / f"{side}.jsonl"
        lines = [json.dumps({"text": text, "source": f"{side}-{number % 3}"}) for number, text in enumerate(texts)]
        paths[side].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return paths


def write_tasks(directory: Path) -> list[dict[str, str]]:
    """A 4-choice and a verbatim task for each role."""
    tasks = []
    draw = random.Random(7)
    for role in ("forget", "utility"):
        questions = []
        for number in range(6):
            choices = draw.sample(WORDS, 4)
            questions.append(
                {"id": f"q{number}", "prompt": f"{draw.choice(WORDS)} is", "choices": choices, "answer": 1}
            )
        path = directory / f"questions_{role}.jsonl"
        path.write_text("".join(json.dumps(item | {"source": role}) + "\n" for item in questions), encoding="utf-8")
        tasks.append({"name": f"questions_{role}", "type": "choice", "path": str(path), "role": role})
    return tasks


def write_config(directory: Path, model: Path, **changes: Any) -> Path:
    """A configuration that runs every stage on ``model`` in seconds; ``changes`` are dotted keys (``__`` for dots)."""
    corpora = write_corpora(directory / "corpora")
    config: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(model), "dtype": "fp32"},
        "data": {
            "forget": [{"path": str(corpora["forget"])}],
            "retain": [{"path": str(corpora["retain"])}],
            "context_length": 24,
            "packing": "whole",
        },
        "statistics": {"batch_rows": 4},
        "calibration": {"if_none_found": "continue", "detection": {"layers": None}},
        "unlearning": {
            "steps": 4,
            "forget_rows": 4,
            "retain_rows": 4,
            "save_every": 2,
            "alpha": 4.0,
            "optimizer": {"lr": 1e-3},
        },
        "evaluation": {"tasks": write_tasks(directory / "corpora"), "max_new_tokens": 8},
    }
    for key, value in changes.items():
        node = config
        *parents, last = key.split("__")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


if __name__ == "__main__":  # python tests/tiny.py FOLDER: a model, corpora and a config.yaml to try commands with
    folder = Path(sys.argv[1]).absolute()
    print(write_config(folder, make_model(folder / "model")))
