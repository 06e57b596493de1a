"""The parameters of a Mixture-of-Experts model by layer, counted in the model that transformers builds.

    architecture = read_architecture(read_model_config("/models/Mixtral-8x7B-v0.1"))
    architecture.parameters.total              # 46702792704

The model is built on the meta device from its ``config.json`` alone: no weights, no memory. Buffers are not parameters,
and DeepSeek-V3's multi-token-prediction module is not part of the model that is trained.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from trace_ds.errors import UserError
from trace_ds.models.families import EXPERTS_KEYS, FAMILIES, TOP_K_KEYS

MULTI_LATENT = ("deepseek_v2", "deepseek_v3")
MAX_LAYERS = 10_000
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Parameters:
    """Parameters (elements): of the embedding, of routed experts, of everything else."""

    embedding: int = 0
    experts: int = 0
    other: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    @property
    def non_expert(self) -> int:
        """Everything that expert parallelism replicates."""
        return self.total - self.experts


@dataclass(frozen=True)
class LinearAttention:
    """The gated delta rule in the place of attention (Qwen3.5): in which layers, its heads and their widths."""

    layers: tuple[int, ...] = ()
    key_heads: int = 0
    value_heads: int = 0
    key_width: int = 0
    value_width: int = 0

    @property
    def mixed(self) -> int:
        """Elements of all heads' queries, keys and values of a token, which the convolution goes over."""
        return 2 * self.key_heads * self.key_width + self.value_heads * self.value_width


@dataclass(frozen=True, eq=False)  # hashed by what it is, not by its hundreds of numbers
class Architecture:
    """What the cost model needs to know of a model; widths in elements.

    Attributes:
        blocks: the parameters of each decoder layer; ``outside`` those of embedding, last norm and LM head.
        attention_norms: parameters of the norms inside one layer's attention (queries, keys, latents).
        query_width, key_width, value_width: elements of all heads' queries, keys and values of a token (keys and
            values before they are repeated); ``output_width`` of the attention's output.
        expert_width: inner width of one routed expert; ``shared_width`` of all shared experts together.
    """

    family: str
    blocks: tuple[Parameters, ...]
    outside: Parameters
    hidden: int
    vocabulary: int
    heads: int
    query_width: int
    key_width: int
    value_width: int
    output_width: int
    attention_norms: int
    linear: LinearAttention
    dense_width: int
    experts: int
    top_k: int
    expert_width: int
    shared_width: int
    shared_gate: bool

    def first(self, layers: int) -> Architecture:
        """The embedding and the first ``layers`` decoder layers: all that a pass runs whose losses end there."""
        return _first(self, layers)

    def loaded(self, layers: int) -> Architecture:
        """:meth:`first`, and at least up to the first MoE layer, which is what is loaded (models/loading.py)."""
        return self.first(max(layers, next(filter(self.is_moe, range(self.layers)), 0) + 1))

    @functools.cached_property
    def parameters(self) -> Parameters:
        """All of the model (a tied head counts once, as the embedding)."""
        return sum(self.blocks, self.outside)

    @property
    def layers(self) -> int:
        return len(self.blocks)

    @property
    def moe_layers(self) -> int:
        return sum(map(self.is_moe, range(self.layers)))

    def is_moe(self, layer: int) -> bool:
        return self.blocks[layer].experts > 0


@functools.lru_cache(maxsize=64)
def _first(a: Architecture, layers: int) -> Architecture:
    return replace(a, blocks=a.blocks[:layers], outside=Parameters(a.outside.embedding))


def read_architecture(config: Mapping[str, Any], where: str = "config.json") -> Architecture:
    """The architecture a ``config.json`` describes.

    Raises:
        UserError: not a supported MoE family (the message lists the supported ones); transformers cannot build the
            model; more experts per token than experts.
    """
    family, layers = str(config.get("model_type", "")), config.get("num_hidden_layers")
    if family not in FAMILIES:
        kind = f"model_type {family!r}" if family else "no model_type"
        raise UserError(f"the model is not a supported MoE family ({kind})", where, f"use one of {', '.join(FAMILIES)}")
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise UserError(f"num_hidden_layers is {layers!r}", where, "correct the model's config")
    try:
        a = _built(family, json.dumps(config, sort_keys=True))
    except Exception as error:  # whatever a value that nobody would write makes of some line in transformers
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        problem = f"transformers cannot build the model that it describes ({reason})"
        raise UserError(problem, where, "copy the model's config again") from None
    if not 0 < a.top_k <= a.experts:
        problem = f"num_experts_per_tok is {a.top_k} but the model has {a.experts} experts"
        raise UserError(problem, where, "correct the model's config")
    return a


@functools.lru_cache(maxsize=16)
def _built(family: str, config: str) -> Architecture:
    """The architecture of the model that transformers builds of a ``config.json``."""
    from transformers import AutoConfig

    from trace_ds.models.routers import without_data

    values = {key: value for key, value in json.loads(config).items() if key not in ("model_type", "architectures")}
    described = AutoConfig.for_model(family, **values)
    model = without_data(described)
    blocks = [Parameters()] * described.num_hidden_layers
    outside, shapes = Parameters(), {}
    for name, parameter in model.named_parameters():
        kind = "embedding" if "embed_tokens" in name else "experts" if "mlp.experts." in name else "other"
        counted = Parameters(**{kind: parameter.numel()})
        if layer := LAYER.fullmatch(name):
            blocks[int(layer[1])] += counted
            shapes[layer[2].removesuffix(".weight")] = tuple(parameter.shape)  # layers of one kind are alike
        else:
            outside += counted
    projections = {name: shapes.get(f"self_attn.{name}", (0, 0)) for name in ("q_proj", "q_b_proj", "k_proj", "v_proj")}
    output_width = shapes.get("self_attn.o_proj", (0, 0))[1]
    query_width = output_width if projections["k_proj"][0] else max(projections[n][0] for n in ("q_proj", "q_b_proj"))
    shared = next((shape for name, shape in shapes.items() if re.search(r"shared_experts?\.down_proj", name)), (0, 0))
    return Architecture(
        family=family,
        blocks=tuple(blocks),
        outside=outside,
        hidden=described.hidden_size,
        vocabulary=described.vocab_size,
        heads=described.num_attention_heads,
        query_width=query_width,
        key_width=projections["k_proj"][0] or query_width,
        value_width=projections["v_proj"][0] or output_width,
        output_width=output_width,
        attention_norms=sum(
            shape[0] for name, shape in shapes.items() if name.startswith("self_attn.") and "norm" in name
        ),
        linear=_linear(described),
        dense_width=shapes.get("mlp.down_proj", (0, 0))[1],
        experts=next(getattr(described, key) for key in EXPERTS_KEYS if hasattr(described, key)),
        top_k=next(getattr(described, key) for key in TOP_K_KEYS if hasattr(described, key)),
        expert_width=shapes["mlp.experts.down_proj"][-1],
        shared_width=shared[1],
        shared_gate="mlp.shared_expert_gate" in shapes,
    )


def _linear(config: Any) -> LinearAttention:
    """The layers with a gated delta rule, if there are any."""
    kinds = getattr(config, "layer_types", None) or ()
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    if not layers:
        return LinearAttention()
    names = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
    return LinearAttention(layers, *(getattr(config, f"linear_{name}") for name in names))
