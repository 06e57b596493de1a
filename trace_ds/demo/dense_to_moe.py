"""A Mixture-of-Experts model made of a dense one: the neurons of each feed-forward block become groups, one a expert.

    moe = split(load_dense(DENSE), tokens_RT, SMOLLM2, tell)     # layer by layer, repaired by least squares
    distil(moe, load_dense(DENSE), batches, tell)                # until it says again what the dense model says
    export(moe, DENSE, OUT)                                      # a Qwen2-MoE directory in the hub's layout

A SwiGLU block is a sum over neurons, so any partition of them is a shared expert plus routed ones without a weight
changed (MoEfication, Zhang et al. 2022; the shared part: CMoE, Pei et al. 2025). Ours, in the order of the code:

* *shared* are the neurons whose contribution is large and even over the tokens: m1^4 / m2 of its size;
* the others form *experts* of one size by balanced k-means on which of them are large on the same tokens: the
  assignment step is a linear assignment problem with ``neurons`` places in every group;
* the *router* is a ridge regression of the groups' contributions on the block's input;
* the *repair*: the down projection is fitted again, by ridge regression towards the dense model's hidden state behind
  the block, on the stream of hidden states of the model split so far, so that a layer also mends those before it;
* *distillation* by the KL divergence from the dense model's next-token distribution: nothing is taught that the
  dense model does not say.

Everything is a function of its inputs and of the number of threads, in float32 (five times as fast as bfloat16 on a CPU
without instructions for it): a rerun on the same machine gives the same bytes.

Suffixes: R rows, T tokens (of a row or flat), D hidden size, F neurons, S shared neurons, E experts, M neurons of one,
K = top-k, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROWS_AT_ONCE = 16
TOKENS_AT_ONCE = 256  # of the logits of a distillation step
CLUSTERING = {"tokens": 3000, "dimensions": 256, "rounds": 8}
RIDGE = 1e-2  # of router and repair, in units of the mean eigenvalue
ROUTER_SPREAD = 0.5  # standard deviation of a token's router logits over the experts, on average
DISTILLATION = {"learning_rate": 2e-4, "warmup_steps": 5, "last_share": 0.05}
MODEL_DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """The first ``layers`` layers get ``shared`` neurons and ``experts`` of ``neurons`` each; ``top_k`` work."""

    layers: int
    shared: int
    experts: int
    neurons: int
    top_k: int


SMOLLM2 = Shape(layers=15, shared=896, experts=16, neurons=40, top_k=5)


class SplitFeedForward(nn.Module):
    """A split block, computed densely: a neuron of expert e counts K g_e, g being the renormalised top-k gates.

    The neurons lie in the order shared, expert 0, expert 1, …; with all experts active and a router of zeros it is
    the dense block.
    """

    def __init__(self, dense: Any, order_F: torch.Tensor, router_ED: torch.Tensor, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.router = nn.Parameter(router_ED)
        self.gate = nn.Parameter(dense.gate_proj.weight.detach()[order_F].clone())
        self.up = nn.Parameter(dense.up_proj.weight.detach()[order_F].clone())
        self.down = nn.Parameter(dense.down_proj.weight.detach()[:, order_F].clone())

    def neurons(self, x: torch.Tensor) -> torch.Tensor:
        """What the down projection is applied to: [..., F]."""
        gates = (x @ self.router.T.to(x.dtype)).float().softmax(-1)
        value, index = gates.topk(self.shape.top_k, -1)
        gates = torch.zeros_like(gates).scatter(-1, index, value / value.sum(-1, keepdim=True)) * self.shape.top_k
        shared = gates.new_ones(*gates.shape[:-1], self.shape.shared)
        counts = torch.cat([shared, gates.repeat_interleave(self.shape.neurons, -1)], -1)
        hidden = F.silu(F.linear(x, self.gate)) * F.linear(x, self.up)
        return hidden * counts.to(hidden.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.neurons(x), self.down)


def load_dense(path: Path) -> Any:
    """A Llama-shaped model for inference, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True).eval()


# ------------------------------------------------------------------------------------------------------- splitting


@torch.no_grad()
def split(model: Any, tokens_RT: torch.Tensor, shape: Shape, tell: Callable[[str], object]) -> Any:
    """Split the model's blocks in place on the hidden states of these rows, one layer after the other; returns it."""
    dense = stream = model.model.embed_tokens(tokens_RT)
    rotary = model.model.rotary_emb(stream, torch.arange(tokens_RT.shape[1])[None])
    for number, layer in enumerate(model.model.layers[: shape.layers]):
        block = layer.mlp
        dense = _after_attention(layer, dense, rotary)
        dense = dense + _in_parts(nn.Sequential(layer.post_attention_layernorm, block), dense)
        stream = _after_attention(layer, stream, rotary)
        x_TD = _in_parts(layer.post_attention_layernorm, stream).flatten(0, 1)
        hidden_TF = F.silu(block.gate_proj(x_TD)) * block.up_proj(x_TD)
        groups = shared_and_experts(hidden_TF * block.down_proj.weight.norm(dim=0), shape, seed=number)
        router_ED = fit_router(x_TD, hidden_TF * block.down_proj.weight.norm(dim=0), groups[1])
        layer.mlp = SplitFeedForward(block, torch.cat([groups[0], groups[1].flatten()]), router_ED, shape)
        before, after = repair(layer.mlp, x_TD, (dense - stream).flatten(0, 1))
        stream = stream + _in_parts(layer.mlp, x_TD.view_as(stream))
        drift = ((stream - dense).norm(dim=-1) / dense.norm(dim=-1)).median()
        tell(f"layer {number}: relative squared error {before:.3f}, repaired {after:.3f}; drift {drift:.3f}")
    return model


def _in_parts(function: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([function(part) for part in rows.split(ROWS_AT_ONCE)])


def _after_attention(layer: Any, rows: torch.Tensor, rotary: Any) -> torch.Tensor:
    def attend(part: torch.Tensor) -> torch.Tensor:
        normed = layer.input_layernorm(part)
        return part + layer.self_attn(hidden_states=normed, position_embeddings=rotary, attention_mask=None)[0]

    return _in_parts(attend, rows)


def shared_and_experts(size_TF: torch.Tensor, shape: Shape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(shared neurons [S], neurons of each expert [E, M]): together every neuron once.

    Args:
        size_TF: length of each neuron's contribution to the block's output.
    """
    size_TF = size_TF.abs()
    order_F = (size_TF.mean(0) ** 4 / size_TF.square().mean(0).clamp_min(1e-30)).argsort(descending=True, stable=True)
    shared_S, routed_N = order_F[: shape.shared].sort().values, order_F[shape.shared :].sort().values
    generator = torch.Generator().manual_seed(seed)
    sample_T = torch.randperm(len(size_TF), generator=generator)[: CLUSTERING["tokens"]]
    profile_NT = size_TF[sample_T][:, routed_N].sqrt().T
    profile_NT = F.normalize(profile_NT - profile_NT.mean(1, keepdim=True), dim=1)
    projection = torch.randn(profile_NT.shape[1], CLUSTERING["dimensions"], generator=generator)  # keeps the angles
    groups_EM = balanced_kmeans(F.normalize(profile_NT @ projection, dim=1).numpy(), shape.experts, seed)
    return shared_S, routed_N[torch.from_numpy(groups_EM)]


def balanced_kmeans(unit_ND: np.ndarray, groups: int, seed: int) -> np.ndarray:
    """int64 [groups, N / groups]: rows of ``unit_ND`` (unit vectors) in groups of one size, by cosine (k-means++)."""
    from scipy.optimize import linear_sum_assignment

    rng, size = np.random.default_rng(seed), len(unit_ND) // groups
    centre_GD = unit_ND[rng.integers(len(unit_ND))][None]
    while len(centre_GD) < groups:
        far_N = np.clip(1 - (unit_ND @ centre_GD.T).max(1), 1e-12, None).astype(np.float64) ** 2
        centre_GD = np.concatenate([centre_GD, unit_ND[rng.choice(len(unit_ND), p=far_N / far_N.sum())][None]])
    group_N = np.full(len(unit_ND), -1)
    for _ in range(CLUSTERING["rounds"]):
        similar_NG = unit_ND @ centre_GD.T
        _, place_N = linear_sum_assignment(np.repeat(similar_NG, size, axis=1), maximize=True)
        if np.array_equal(place_N // size, group_N):
            break
        group_N = place_N // size
        sums_GD = np.stack([unit_ND[group_N == group].sum(0) for group in range(groups)])
        centre_GD = sums_GD / np.maximum(np.linalg.norm(sums_GD, axis=1, keepdims=True), 1e-12)
    return np.stack([np.flatnonzero(group_N == group) for group in range(groups)])


def fit_router(x_TD: torch.Tensor, size_TF: torch.Tensor, groups_EM: torch.Tensor) -> torch.Tensor:
    """float32 [E, D]: ridge regression of each group's contribution on the input, scaled to ROUTER_SPREAD."""
    target_TE = torch.stack([size_TF[:, group].norm(dim=1) for group in groups_EM], 1)
    moment_DD, lift = _ridged(x_TD)
    router_ED = torch.linalg.solve(moment_DD + lift, x_TD.T @ (target_TE / target_TE.mean())).T
    router_ED = router_ED - router_ED.mean(0)  # what all experts have in common chooses none
    return router_ED * (ROUTER_SPREAD / (x_TD @ router_ED.T).std(1).mean().clamp_min(1e-12))


def repair(block: SplitFeedForward, x_TD: torch.Tensor, wanted_TD: torch.Tensor) -> tuple[float, float]:
    """Fit the down projection to the wanted outputs; the relative squared errors before and after.

    A token weighs |wanted|^-1/2 (in units of the median): between absolute and relative errors, since the sums of
    squares of a pretrained model are those of a few attention sinks.
    """
    neurons_TF = block.neurons(x_TD)
    length_T = wanted_TD.norm(dim=1)
    weight_T1 = (length_T.square() + length_T.median().square()).pow(-0.25)[:, None]
    a_TF, b_TD = neurons_TF * weight_T1, wanted_TD * weight_T1

    def error() -> float:
        return float((a_TF @ block.down.T - b_TD).square().sum() / b_TD.square().sum())

    before = error()
    moment_FF, lift = _ridged(a_TF)
    block.down.copy_(torch.linalg.solve(moment_FF + lift, a_TF.T @ b_TD + lift @ block.down.T).T)
    return before, error()


def _ridged(x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The second moments of the columns, and the multiple of the identity that the ridge adds."""
    moment_DD = x_TD.T @ x_TD
    return moment_DD, RIDGE * moment_DD.diag().mean() * torch.eye(len(moment_DD))


# ----------------------------------------------------------------------------------------------------- distillation

Batch = tuple[torch.Tensor, torch.Tensor]  # tokens int64 [R, T] and, bool, the positions whose next token counts


def distil(
    moe: Any, dense: Any, batches: Iterable[list[Batch]], steps: int, tell: Callable[[str], object]
) -> list[list[float]]:
    """Train the split layers (their attention too) towards the dense model's next-token distributions.

    Args:
        batches: of each step, every one of which counts alike.

    Returns:
        The divergence of every batch of every step, nats a token.
    """
    moe.requires_grad_(False)
    blocks = [layer.mlp for layer in moe.model.layers]
    split_layers = [layer for layer, block in zip(moe.model.layers, blocks, strict=True) if is_split(block)]
    parameters = [parameter.requires_grad_() for layer in split_layers for parameter in layer.parameters()]
    rate = DISTILLATION["learning_rate"]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    divergences = []
    for step, parts in zip(range(steps), batches, strict=False):
        warm = min(1.0, (step + 1) / DISTILLATION["warmup_steps"])
        optimizer.param_groups[0]["lr"] = rate * warm * max(DISTILLATION["last_share"], 1 - step / steps)
        divergences.append([round(_divergence(moe, dense, *part), 5) for part in parts])
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tell(f"distillation step {step + 1} of {steps}: KL {', '.join(map(str, divergences[-1]))}")
    moe.requires_grad_(True)
    return divergences


def is_split(block: nn.Module) -> bool:
    return isinstance(block, SplitFeedForward)


def _divergence(moe: Any, dense: Any, tokens_RT: torch.Tensor, counts_RT: torch.Tensor) -> float:
    """KL(dense || moe), nats a counted token; its gradient is added. The logits exist a few tokens at a time."""
    with torch.no_grad():
        wanted_TD = dense.model(tokens_RT, use_cache=False).last_hidden_state[counts_RT]
    found_TD = moe.model(tokens_RT, use_cache=False).last_hidden_state[counts_RT]
    leaf_TD, total = found_TD.detach().requires_grad_(), 0.0
    for start in range(0, len(leaf_TD), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        head_VD = dense.lm_head.weight
        wanted = F.linear(wanted_TD[part], head_VD).log_softmax(-1)
        found = F.linear(leaf_TD[part], head_VD).log_softmax(-1)
        loss = F.kl_div(found, wanted, log_target=True, reduction="sum") / len(leaf_TD)
        loss.backward()
        total += float(loss.detach())
    found_TD.backward(leaf_TD.grad)
    return total


def packed_rows(documents: Iterable[list[int]], length: int, end: int) -> torch.Tensor:
    """int64 [R, length]: the documents in one stream, each followed by ``end``."""
    stream = [token for document in documents for token in (*document, end)]
    return torch.tensor(stream[: len(stream) // length * length]).view(-1, length)


def mixed_batches(
    rows_RT: torch.Tensor, sentences: list[list[int]], rows: int, count: int, pad: int, seed: int
) -> Iterable[list[Batch]]:
    """Endless: ``rows`` rows of running text, and ``count`` sentences side by side, drawn with replacement."""
    rng = random.Random(f"distil {seed}")
    while True:
        tokens = rows_RT[torch.tensor(rng.sample(range(len(rows_RT)), rows))]
        yield [(tokens, torch.ones_like(tokens, dtype=torch.bool)), side_by_side(rng.choices(sentences, k=count), pad)]


def side_by_side(sentences: list[list[int]], pad: int) -> Batch:
    """The sentences filled on the right; the position of a sentence's last token counts nothing."""
    tokens = torch.full((len(sentences), max(map(len, sentences))), pad)
    counts = torch.zeros_like(tokens, dtype=torch.bool)
    for row, sentence in enumerate(sentences):
        tokens[row, : len(sentence)] = torch.tensor(sentence)
        counts[row, : len(sentence) - 1] = True
    return tokens, counts


# ----------------------------------------------------------------------------------------------------------- export


def export(moe: Any, destination: Path) -> None:
    """Write ``moe`` as a Qwen2-MoE directory (bfloat16) that transformers loads; the gates' K goes into the experts.

    A Qwen2-MoE also gates its shared expert, by a sigmoid: its gate is zero and the shared weights are doubled.
    """
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    blocks = [layer.mlp for layer in moe.model.layers]
    shape, old = next(block.shape for block in blocks if is_split(block)), moe.config
    same = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
            "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in same},
        qkv_bias=False,
        use_sliding_window=False,
        moe_intermediate_size=shape.neurons,
        shared_expert_intermediate_size=shape.shared,
        num_experts=shape.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[number for number, block in enumerate(blocks) if not is_split(block)],
        router_aux_loss_coef=0.0,
        dtype=MODEL_DTYPE,
    )
    with torch.device("meta"):
        model = Qwen2MoeForCausalLM(config)
    tensors = {name: tensor.detach().to(MODEL_DTYPE).contiguous() for name, tensor in _renamed(moe)}
    model.load_state_dict(tensors, assign=True)
    model.tie_weights()
    model.save_pretrained(destination)


def _renamed(moe: Any) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors of :func:`export`'s model, under its names."""
    for name, tensor in moe.state_dict().items():
        if ".mlp." not in name or not is_split(moe.get_submodule(name.rpartition(".")[0])):
            yield name, tensor
    for number, layer in enumerate(moe.model.layers):
        block, at = layer.mlp, f"model.layers.{number}.mlp"
        if not is_split(block):
            continue
        shared, (experts, neurons) = block.shape.shared, (block.shape.experts, block.shape.neurons)
        yield f"{at}.gate.weight", block.router
        yield f"{at}.shared_expert_gate.weight", torch.zeros(1, block.router.shape[1])
        for name in ("gate", "up"):
            yield f"{at}.shared_expert.{name}_proj.weight", getattr(block, name)[:shared]
        yield f"{at}.shared_expert.down_proj.weight", 2 * block.down[:, :shared]
        inner = torch.cat([w[shared:].view(experts, neurons, -1) for w in (block.gate, block.up)], 1)
        yield f"{at}.experts.gate_up_proj", inner
        outer = block.down[:, shared:].view(-1, experts, neurons).transpose(0, 1)
        yield f"{at}.experts.down_proj", block.shape.top_k * outer
