"""The shape of a Mixture-of-Experts model and its parameters by kind, from a Hugging Face ``config.json`` alone.

    architecture = read_architecture(read_model_config("/models/Mixtral-8x7B-v0.1"))
    count_parameters(architecture).total          # 46702792704

Counted by hand from the modules each family is made of and checked against the models of transformers on the
meta device (tests/unit/test_plan.py). Buffers (rotary frequencies, DeepSeek-V3's score-correction bias) are not
parameters, and DeepSeek-V3's multi-token-prediction module is not part of the model that is trained.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from trace_ds.errors import UserError
from trace_ds.models.families import EXPERTS_KEYS, FAMILIES

MULTI_LATENT = ("deepseek_v2", "deepseek_v3")
SHARED_GATE = ("qwen2_moe", "qwen3_5_moe_text")


@dataclass(frozen=True)
class LinearAttention:
    """The gated delta rule in the place of attention (Qwen3.5): in which layers, heads and their widths, parameters."""

    layers: tuple[int, ...] = ()
    key_heads: int = 0
    value_heads: int = 0
    key_width: int = 0
    value_width: int = 0
    parameters: int = 0

    @property
    def mixed(self) -> int:
        """Elements of all heads' queries, keys and values of a token, which the convolution goes over."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


@dataclass(frozen=True)
class Architecture:
    """What the cost model needs to know of a model; widths in elements, counts in units.

    Attributes:
        attention: parameters of the attention of one layer, without its norms.
        attention_norms: parameters of the norms inside one attention (queries, keys, latents).
        query_width, key_width, value_width: elements of all heads' queries, keys and values of a token, as
            the attention kernel sees them (keys and values repeated to the number of query heads are not
            counted here).
        linear: layers without attention, and what they have instead.
        ends: whether it has the last norm and the LM head.
        dense_layers: decoder layers with an ordinary MLP; all other layers are MoE layers.
        expert_width: inner width of one routed expert; ``shared_width`` of all shared experts together.
    """

    family: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    kv_heads: int
    query_width: int
    key_width: int
    value_width: int
    attention: int
    attention_norms: int
    linear: LinearAttention
    dense_layers: tuple[int, ...]
    dense_width: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    shared_gate: bool
    tied: bool
    ends: bool

    def first(self, layers: int) -> Architecture:
        """The embedding and the first so many decoder layers, which is what a pass runs whose losses end there."""
        dense = tuple(layer for layer in self.dense_layers if layer < layers)
        return replace(self, layers=layers, dense_layers=dense, ends=False)

    def loaded(self, layers: int) -> Architecture:
        """:meth:`first`, and at least up to the first MoE layer, which is what is loaded (models/loading.py)."""
        return self.first(max(layers, next(filter(self.is_moe, range(self.layers)), 0) + 1))

    @property
    def moe_layers(self) -> int:
        return self.layers - len(self.dense_layers)

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert (gate, up and down projection)."""
        return 3 * self.hidden * self.expert_width

    @property
    def router_parameters(self) -> int:
        return self.experts * self.hidden

    @property
    def shared_parameters(self) -> int:
        """Parameters of one layer's shared experts and of the gate in front of them (Qwen)."""
        return 3 * self.hidden * self.shared_width + (self.hidden if self.shared_gate else 0)

    def attention_of(self, layer: int) -> int:
        return self.linear.parameters if layer in self.linear.layers else self.attention

    def norms_of(self, layer: int) -> int:
        inner = self.linear.value_width if layer in self.linear.layers else self.attention_norms
        return 2 * self.hidden + inner

    def is_moe(self, layer: int) -> bool:
        return layer not in self.dense_layers

    def layer_parameters(self, layer: int, *, experts: bool = True) -> int:
        """Parameters of decoder layer ``layer``, with or without its routed experts."""
        common = self.attention_of(layer) + self.norms_of(layer)
        if not self.is_moe(layer):
            return common + 3 * self.hidden * self.dense_width
        routed = self.experts * self.expert_parameters if experts else 0
        return common + self.router_parameters + self.shared_parameters + routed


@dataclass(frozen=True)
class Parameters:
    """Parameters by kind (elements)."""

    embedding: int
    attention: int
    router: int
    experts: int
    shared_experts: int
    dense_mlp: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def non_expert(self) -> int:
        """Everything that expert parallelism replicates."""
        return self.total - self.experts


def count_parameters(a: Architecture) -> Parameters:
    """All parameters of the model by kind (a tied head counts once, as the embedding)."""
    return Parameters(
        embedding=a.vocabulary * a.hidden,
        attention=sum(map(a.attention_of, range(a.layers))),
        router=a.moe_layers * a.router_parameters,
        experts=a.moe_layers * a.experts * a.expert_parameters,
        shared_experts=a.moe_layers * a.shared_parameters,
        dense_mlp=len(a.dense_layers) * 3 * a.hidden * a.dense_width,
        norms=sum(map(a.norms_of, range(a.layers))) + (a.hidden if a.ends else 0),
        head=a.vocabulary * a.hidden if a.ends and not a.tied else 0,
    )


def active_parameters(a: Architecture) -> Parameters:
    """The parameters that take part in one token's forward pass: ``top_k`` of the experts, everything else whole (the
    embedding too, as in the published "active" figures, although a token reads one row of it)."""
    return replace(count_parameters(a), experts=a.moe_layers * a.top_k * a.expert_parameters)


def read_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The architecture a ``config.json`` describes.

    Raises:
        UserError: not a supported MoE family (the message lists the supported ones); a key is missing or not a number;
            more experts per token than experts.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        kind = f"model_type {family!r}" if family else "no model_type"
        raise UserError(f"the model is not a supported MoE family ({kind})", where, f"use one of {', '.join(FAMILIES)}")
    read = _Reader(config, where)
    hidden, layers, heads = read("hidden_size"), read("num_hidden_layers"), read("num_attention_heads")
    experts = read(*EXPERTS_KEYS)
    top_k = read("num_experts_per_tok")
    if top_k > experts:
        raise UserError(
            f"num_experts_per_tok is {top_k} but the model has {experts} experts",
            where,
            "correct the model's config",
        )
    dense_layers = _dense_layers(family, read, layers)
    expert_width = read("intermediate_size") if family in ("mixtral", "olmoe") else read("moe_intermediate_size")
    if family in SHARED_GATE:
        shared_width = read("shared_expert_intermediate_size")
    elif family in MULTI_LATENT:
        shared_width = read("moe_intermediate_size") * read("n_shared_experts", default=0)
    else:
        shared_width = 0
    attention = _multi_latent(read, hidden, heads) if family in MULTI_LATENT else _grouped(family, read, hidden, heads)
    return Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        vocabulary=read("vocab_size"),
        heads=heads,
        dense_layers=dense_layers,
        dense_width=read("intermediate_size") if dense_layers else 0,
        experts=experts,
        top_k=top_k,
        expert_width=expert_width,
        shared_width=shared_width,
        shared_gate=family in SHARED_GATE,
        tied=bool(config.get("tie_word_embeddings", False)),
        ends=True,
        linear=_linear(read, hidden),
        **attention,
    )


class _Reader:
    """Integer keys of a config, under any of their names; UserError for one that is missing or no whole number."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def __call__(self, *names: str, default: int | None = None) -> int:
        for name in names:
            value = self.config.get(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UserError(f"{name} is {value!r}, not a count", self.where, "correct the model's config")
            return value
        if default is None:
            raise UserError(f"the key {names[0]} is missing", self.where, "use the config.json of a supported model")
        return default


def _dense_layers(family: str, read: _Reader, layers: int) -> tuple[int, ...]:
    """The decoder layers without experts, by each family's own rule."""
    if family in MULTI_LATENT:
        return tuple(range(min(layers, read("first_k_dense_replace", default=3 if family == "deepseek_v3" else 0))))
    if family in ("qwen2_moe", "qwen3_moe"):
        step = max(read("decoder_sparse_step", default=1), 1)
        only = set(read.config.get("mlp_only_layers") or ())
        return tuple(layer for layer in range(layers) if layer in only or (layer + 1) % step)
    return ()


def _grouped(family: str, read: _Reader, hidden: int, heads: int) -> dict[str, int]:
    """Grouped-query attention: parameters and widths of one layer."""
    kv_heads = read("num_key_value_heads", default=8 if family == "mixtral" else heads)
    head = read("head_dim", default=hidden // heads)
    query, key = heads * head, kv_heads * head
    biased = bool(read.config.get("qkv_bias", True)) if family == "qwen2_moe" else False
    all_biased = family in ("olmoe", "qwen3_moe", "qwen3_5_moe_text") and bool(read.config.get("attention_bias", False))
    gate = query if family == "qwen3_5_moe_text" else 0  # of the output, made with the queries
    biases = (query + gate + 2 * key if biased or all_biased else 0) + (hidden if all_biased else 0)
    # OLMoE normalises all heads together, Qwen3 each head with shared weights
    each = {"qwen3_moe": 2 * head, "qwen3_5_moe_text": 2 * head}
    norms = {"olmoe": hidden + (hidden // heads) * kv_heads, **each}.get(family, 0)
    return {
        "kv_heads": kv_heads,
        "query_width": query,
        "key_width": key,
        "value_width": key,
        "attention": hidden * (query + gate + 2 * key) + query * hidden + biases,
        "attention_norms": norms,
    }


def _linear(read: _Reader, hidden: int) -> LinearAttention:
    """The layers with a gated delta rule, if there are any."""
    kinds = read.config.get("layer_types") or ()
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    if not layers:
        return LinearAttention()
    heads = read("linear_num_key_heads"), read("linear_num_value_heads")
    widths = read("linear_key_head_dim"), read("linear_value_head_dim")
    found = LinearAttention(layers, *heads, *widths)
    values = heads[1] * widths[1]
    # queries, keys, values; their gate; two numbers a head (and what they start from); the way out
    projections = hidden * (found.mixed + values + 2 * heads[1] + values) + 2 * heads[1]
    return replace(found, parameters=projections + found.mixed * read("linear_conv_kernel_dim"))


def _multi_latent(read: _Reader, hidden: int, heads: int) -> dict[str, int]:
    """DeepSeek's multi-head latent attention: parameters and widths of one layer."""
    rank_kv, rope = read("kv_lora_rank"), read("qk_rope_head_dim")
    plain, value = read("qk_nope_head_dim"), read("v_head_dim")
    bias = 1 if read.config.get("attention_bias", False) else 0
    query_width = heads * (plain + rope)
    rank_q = read("q_lora_rank", default=0)
    if rank_q:
        query, norms = hidden * rank_q + bias * rank_q + rank_q * query_width, rank_q + rank_kv
    else:
        query, norms = hidden * query_width, rank_kv
    keys_values = hidden * (rank_kv + rope) + bias * (rank_kv + rope) + rank_kv * heads * (plain + value)
    output = heads * value * hidden + bias * hidden
    return {
        "kv_heads": heads,
        "query_width": query_width,
        "key_width": query_width,
        "value_width": heads * value,
        "attention": query + keys_values + output,
        "attention_norms": norms,
    }
