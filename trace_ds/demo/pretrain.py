"""Train the demo's base model: a tiny Mixtral that knows the facts and verses of ``trace_ds.demo.corpora``.

    pretrain(Path("corpora"), Path("original"), gold=False, seed=0)     # knows everything
    pretrain(Path("corpora"), Path("gold"), gold=True, seed=0)          # never saw what is to be forgotten

One thread and one process: the result is bitwise the same on a rerun.

Suffixes: B rows of a batch, T tokens of a row, N counted positions of a batch, E experts, L layers, V vocabulary.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.corpora.dataset import Batch, PackedRow, PackingCounts, batch_of, pack
from trace_ds.demo.corpora import BOS, CONTEXT_TOKENS, EOS, PAD
from trace_ds.errors import UserError
from trace_ds.run.files import DEMO_MODEL, replacing_directory, safetensors_errors, write_text

if TYPE_CHECKING:
    import torch
    from transformers import MixtralForCausalLM

STEPS = 900
LEARNING_RATE = 4e-3
WARMUP_STEPS = 20
BALANCE_LOSS = 0.01  # weight of the load-balancing loss (Switch Transformer, Fedus et al. 2022, eq. 4)
# Rows of a batch by the first part of a document's source. Facts and verses must be seen some thirty times each to be
# known by heart; running text is seen about once.
ROWS = {"facts": 20, "passages": 4, "general": 3}
KIND = {"forget": "facts", "near": "facts", "mid": "facts", "passages": "passages", "general": "general"}
_MODEL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 3}
_MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 128}
_MODEL |= {"num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.0}
_MODEL |= {"tie_word_embeddings": False, "attention_dropout": 0.0}


def pretrain(
    corpora: Path,
    destination: Path,
    *,
    gold: bool,
    seed: int,
    steps: int = STEPS,
    on_step: Callable[[float], object] = lambda loss: None,
) -> dict[str, Any]:
    """Train from scratch and save a Hugging Face model directory (hub layout, safetensors, fp32).

    Args:
        corpora: a directory written by ``build_corpora``.
        destination: the model directory; must not exist yet. It appears whole or not at all.
        gold: train on pretrain_gold.jsonl, which lacks the forget facts and verses.
        seed: of the initial weights and of the order of the rows.
        steps: optimizer steps.
        on_step: called with the loss (nats per token) of every step.

    Returns:
        What training.json in ``destination`` holds: corpus, seed, steps, parameters, and the loss of every step.

    Raises:
        UserError: ``corpora`` is not such a directory, or ``destination`` exists.
    """
    import torch
    from tokenizers import Tokenizer

    name = "pretrain_gold.jsonl" if gold else "pretrain_original.jsonl"
    if not (corpora / name).is_file() or not (corpora / "tokenizer" / "tokenizer.json").is_file():
        raise UserError(f"no {name} and tokenizer here", str(corpora), "trace-ds demo")
    if destination.exists():
        raise UserError("the model directory exists already", str(destination), "remove it")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    tokenizer = Tokenizer.from_file(str(corpora / "tokenizer" / "tokenizer.json"))
    batches = _batches(_read(corpora / name), tokenizer, random.Random(f"pretrain {seed}"))
    model = _new_model(tokenizer, seed)
    losses = _train(model, batches, steps, on_step)
    training = {
        "corpus": name,
        "seed": seed,
        "steps": steps,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": [round(loss, 6) for loss in losses],
    }
    _save(model, corpora / "tokenizer", training, destination)
    return training


def _read(path: Path) -> dict[str, list[str]]:
    """Texts by kind (the keys of ROWS)."""
    texts: dict[str, list[str]] = {kind: [] for kind in ROWS}
    for line in path.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        texts[KIND[document["source"].split("/")[0]]].append(document["text"])
    return texts


def _endless(texts: Sequence[str], tokenizer: Any, rng: random.Random) -> Iterator[PackedRow]:
    """Rows, forever: the documents are shuffled and packed anew for every pass."""
    end = tokenizer.token_to_id(EOS)
    documents = [[*encoding.ids, end] for encoding in tokenizer.encode_batch(list(texts))]  # BOS is put in front
    while True:
        rng.shuffle(documents)
        rows = list(pack(documents, CONTEXT_TOKENS, "whole", PackingCounts()))
        rng.shuffle(rows)
        yield from rows


def _batches(texts: dict[str, list[str]], tokenizer: Any, rng: random.Random) -> Iterator[Batch]:
    """Endless."""
    streams = {kind: _endless(texts[kind], tokenizer, rng) for kind in ROWS}
    while True:
        rows = [next(streams[kind]) for kind, count in ROWS.items() for _ in range(count)]
        yield batch_of(rows, tokenizer.token_to_id(PAD), CONTEXT_TOKENS)


def _new_model(tokenizer: Any, seed: int) -> MixtralForCausalLM:
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=tokenizer.get_vocab_size(),
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
        **_MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MixtralForCausalLM(config).train()


def _train(
    model: MixtralForCausalLM, batches: Iterator[Batch], steps: int, on_step: Callable[[float], object]
) -> list[float]:
    """Adam with a linear warm-up and a cosine decay to a tenth; the loss (nats per token) of every step."""
    import torch

    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), fused=True)
    losses = []
    for step in range(1, steps + 1):
        warm, done = min(1.0, step / WARMUP_STEPS), step / steps
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.55 + 0.45 * math.cos(math.pi * done))
        loss, balance = _losses(model, next(batches))
        optimizer.zero_grad()
        (loss + BALANCE_LOSS * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        on_step(losses[-1])
    return losses


def _losses(model: MixtralForCausalLM, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean next-token loss and load-balancing loss over the counted positions (the next token is of the same document).

    Attention stays within a document: the model sees each as if it stood alone in a row.
    """
    import torch

    document_BT, counted_BT = batch.document_ids_BS, batch.counted_BS
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    mask_B1TT = same_BTT.tril()[:, None]
    outputs = model.model(
        batch.input_ids_BS,
        attention_mask=mask_B1TT,
        position_ids=batch.position_ids_BS,
        use_cache=False,
        output_router_logits=True,
    )
    hidden_ND = outputs.last_hidden_state[counted_BT]
    target_N = batch.input_ids_BS.roll(-1, dims=1)[counted_BT]
    loss = torch.nn.functional.cross_entropy(model.lm_head(hidden_ND), target_N)
    balance = torch.zeros(())
    for logits_NE in (logits[counted_BT.flatten()] for logits in outputs.router_logits):
        experts = logits_NE.shape[-1]
        chosen_NK = logits_NE.topk(model.config.num_experts_per_tok, dim=-1).indices
        load_E = torch.zeros_like(logits_NE).scatter_(1, chosen_NK, 1.0).mean(0)
        balance = balance + experts * (load_E * logits_NE.softmax(-1).mean(0)).sum() / len(outputs.router_logits)
    return loss, balance


def _save(model: MixtralForCausalLM, tokenizer: Path, training: dict[str, Any], destination: Path) -> None:
    from transformers.utils import logging

    with replacing_directory(destination, DEMO_MODEL) as temporary:
        with safetensors_errors(temporary):
            logging.disable_progress_bar()  # of one shard
            model.save_pretrained(temporary)
        for file in sorted(tokenizer.iterdir()):
            shutil.copyfile(file, temporary / file.name)
        write_text(temporary / "training.json", json.dumps(training, indent=1) + "\n")
