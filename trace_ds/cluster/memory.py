"""Memory of one GPU, part by part, for the forward pass of ``collect`` and the training step of ``unlearn`` and
``finetune``.

Notation: N parameters, of which X experts; W ranks, P = expert-parallel size, so W/P ranks hold the same
experts; T tokens of a micro-batch; h hidden size, f expert width, K experts per token; b bytes per element
(bf16 2, fp32 4).

    rank(stage 0-2) = N - X + X/P        elements of parameters on a rank
    shard           = N/W                elements of a rank's share (experts: X/P over W/P ranks, the same)

``docs/plan.md`` has the table of the parts. What DeepSpeed 0.19.8 keeps was read in its source: ZeRO-1 shards the
optimizer, ZeRO-2 the gradients too, ZeRO-3 the parameters too, of which it gathers a layer's for its computation and
keeps up to ``stage3_max_live_parameters``. What torch keeps for the backward pass of a decoder layer (Hugging Face
modules, SDPA attention) is compared with the tensors torch really saves in tests/unit/test_plan.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from trace_ds.cluster.architecture import MULTI_LATENT, Architecture, LinearAttention
from trace_ds.cluster.job import Passes, PlannedJob, ZeroSettings

MASTER_BYTES = 12  # fp32 copy and two Adam moments
STEP_BYTES = 4  # fp32 gradient of the sub-group being stepped, made of its flattened 16-bit one; AdamW has no temporary
LOGIT_BYTES = 10  # beside the logits: log-softmax in fp32 (4), its gradient (4), the logits' gradient (b, 2 in bf16)
FROZEN_LOGIT_BYTES = 12  # beside the frozen model's logits: log-softmax, its exponential and the difference in fp32
_LOGITS_PER_CHUNK = 1 << 26  # elements, as in trace_ds/unlearning/forward.py and trace_ds/models/token_nll.py
_CHUNKS_PER_PRODUCT = 4  # as in trace_ds/unlearning/forward.py
WORKING_SHARE = 0.25  # of what a layer saved, again in its backward pass: measured 0 to 0.1, the rest is our margin
IMBALANCE = 1.5  # the busiest rank's share of the routed tokens over the mean; our margin, not measured
LOADING_FACTOR = 1.3  # at most; docs/plan.md has what was measured


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part: what stays, and what is added at most at each of the moments that may be the peak.

    Attributes:
        resident: what stays.
        compute: what there is on top between a forward and a backward pass, beside ``layer`` or ``head``.
        layer: while the backward pass works on a layer.
        head: while the LM head works on a chunk of the tokens (before any layer's backward pass).
        step: in the optimizer step.
        start: before the first step.
    """

    resident: dict[str, float]
    compute: dict[str, float] = field(default_factory=dict)
    layer: dict[str, float] = field(default_factory=dict)
    head: dict[str, float] = field(default_factory=dict)
    step: dict[str, float] = field(default_factory=dict)
    start: dict[str, float] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> float:
        resident, compute, *moments = (sum(getattr(self, name).values()) for name in PHASES)
        layer, head, step, start = moments
        return resident + max(compute + max(layer, head), step, start)


PHASES = tuple(entry.name for entry in fields(Memory))


def rank_parameters(a: Architecture, ep: int) -> float:
    """Elements of parameters on a rank that shards nothing but experts."""
    every = a.parameters
    return every.non_expert + every.experts / ep


def largest_layer(a: Architecture, ep: int) -> float:
    """Elements of the largest decoder layer as one rank sees it (its share of the experts)."""
    return max(block.non_expert + block.experts / ep for block in a.blocks)


def reuse_distance(a: Architecture, zero: ZeroSettings) -> int:
    """Elements that ZeRO-3 keeps gathered for their next use (models/engine.py:stage3_limits)."""
    chosen = min(2 * _largest_block(a), 1_000_000_000)
    limits = (zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
    return min(chosen if limit is None else limit for limit in limits)


def _largest_block(a: Architecture) -> int:
    return max(a.outside.embedding, *(block.total for block in a.blocks))


def gathered_parameters(a: Architecture, ep: int, zero: ZeroSettings) -> float:
    """Elements of whole parameters that ZeRO-3 holds at a time: the layer at work and the prefetched ones, or
    what is kept for its next use near the turn from forward to backward."""
    prefetched = zero.stage3_prefetch_bucket_size
    working = largest_layer(a, ep) + (min(_largest_block(a), 50_000_000) if prefetched is None else prefetched)
    return min(rank_parameters(a, ep), max(working, reuse_distance(a, zero)))


def saved_bytes_per_token(a: Architecture, layer: int, b: int, ep: int = 1) -> float:
    """Bytes per token that decoder layer ``layer`` keeps for its backward pass: two RMSNorms with their fp32 copies,
    the attention's queries, keys, values and output (OLMoE and Qwen3 also normalise queries and keys), and for each of
    the K experts its input and output, the gate-and-up product, the activation and its product."""
    norms = 2 * (4 + 2 * b) * a.hidden if b < 4 else 2 * 3 * b * a.hidden
    norms += (4 + b) * (a.query_width + a.key_width) if a.family in ("olmoe", "qwen3_moe") else 0
    norms += 2 * (4 - b) * a.hidden if a.family == "qwen3_5_moe_text" else 0  # scaled before the cast back
    if a.family in MULTI_LATENT:  # the norms of the latents, and the router's fp32 copy of its input
        norms += (4 + 2 * b) * a.attention_norms + (4 * a.hidden if b < 4 and a.is_moe(layer) else 0)
    attention: float = b * (a.query_width + a.key_width + a.value_width + a.output_width) + 4 * a.heads
    if layer in a.linear.layers:
        attention = _linear_attention_bytes(a.linear, b)
    elif a.family == "qwen3_5_moe_text":  # the output's gate, and the norms of queries and keys
        attention += 3 * b * a.query_width + 8 * (a.query_width + a.key_width)
    if not a.is_moe(layer):
        return norms + attention + 4 * b * a.dense_width
    routed = a.top_k * b * (2 * a.hidden + 4 * a.expert_width) * busiest(ep)
    exchanged = a.top_k * b * 2 * a.hidden if ep > 1 else 0  # tokens before and after the two exchanges
    shared = b * (4 * a.shared_width + (a.hidden if a.shared_gate else 0))
    return norms + attention + routed + exchanged + shared + 8 * a.experts


def _linear_attention_bytes(linear: LinearAttention, b: int) -> float:
    """What transformers' own gated delta rule keeps per token (its chunks are of 64 tokens; kernels keep less)."""
    key, value = linear.key_width, linear.value_width
    per_head = 5 * 64 + 8 * key + 7.5 * value + key * value / 64 + 18
    return 4 * linear.value_heads * per_head + 2 * b * linear.mixed


def collect_memory(job: PlannedJob, rows: int) -> Memory:
    """``collect``: a forward pass over ``rows`` rows with whole parameters and 1/ep of the experts on a GPU."""
    a, b, ep, tokens = job.a, job.b, job.ep, rows * job.context
    logit_tokens = _chunk(a, tokens) if job.config.statistics.nll else 0  # whose logits exist at a time
    moving = max(a.hidden, a.dense_width)
    compute = {
        "activations": tokens * (4 + 4 * b) * moving,
        "expert activations": tokens * a.top_k * b * (2 * a.hidden + 3 * a.expert_width) * busiest(ep),
        "all-to-all buffers": _exchange_bytes(a, tokens, ep, b),
        "logits": logit_tokens * a.vocabulary * (b + 8),
    }
    return Memory({"parameters": rank_parameters(a, ep) * b}, _without_zeros(compute))


def unlearn_memory(job: PlannedJob, rows: int, *, recompute: bool | None = None) -> Memory:
    """A training job: one micro-batch of ``rows`` rows (of all sides together), and the optimizer step.

    ``recompute`` (None: as configured): keep only each layer's input and compute the layer again in the backward pass.
    """
    a, b, ep, zero, world, passes = job.kept, job.b, job.ep, job.zero, job.spec.world, job.passes()
    recompute = job.settings.recompute if recompute is None else recompute
    every = a.parameters
    whole, shard, tokens = rank_parameters(a, ep), every.total / world, rows * job.context
    stage = zero.stage
    copy = frozen_parameters(job.a, passes, ep=ep, world=world, stage=stage) * b
    side = -(-tokens // len(job.rows_per_step))
    together = min(passes.frozen_together, job.micro_batches()[0])
    resident = {
        "parameters": (shard if stage == 3 else whole) * b * (0 if zero.offload_param else 1),
        "gradients": (shard if stage >= 2 else whole) * b * (0 if zero.offload_optimizer else 1),
        "master and Adam moments": 0 if zero.offload_optimizer else shard * MASTER_BYTES,
        "reduce bucket": zero.reduce_bucket_size * b * (1 if stage == 3 else 2),
        "frozen copy": copy if passes.frozen_stays else 0,
        "frozen LM head": a.vocabulary * a.hidden * b if passes.frozen_head else 0,
    }
    per_layer = [saved_bytes_per_token(a, layer, b, ep) for layer in range(passes.layers)]
    compute = {
        "gathered parameters": gathered_parameters(a, ep, zero) * b if stage == 3 else 0,
        "saved activations": tokens * (len(per_layer) * b * a.hidden if recompute else sum(per_layer)),
        "frozen hidden states": tokens * passes.frozen_share * a.hidden * b * together,
    }
    layer = {
        "gradients being reduced": largest_layer(a, ep) * b if stage >= 2 else 0,
        # recomputation brings back the whole of what the layer saved
        "working activations": tokens * max(per_layer) * (WORKING_SHARE + (1 if recompute else 0)),
        "all-to-all buffers": _exchange_bytes(a, tokens, ep, b),
    }
    head = {
        "logits": _head_bytes(a, tokens, side, b) if passes.head else 0,
        "frozen logits": _chunk(a, side) * a.vocabulary * (b + FROZEN_LOGIT_BYTES) if passes.frozen_head else 0,
    }
    stepped = min(shard, zero.sub_group_size) if stage == 3 else shard
    step = {"optimizer step": 0 if zero.offload_optimizer else stepped * (STEP_BYTES + (b if b < 4 else 0))}
    start = {"frozen copy": 0 if passes.frozen_stays else copy}
    return Memory(*(_without_zeros(phase) for phase in (resident, compute, layer, head, step, start)))


def frozen_parameters(a: Architecture, passes: Passes, *, ep: int, world: int, stage: int) -> float:
    """Elements on a rank of the frozen copy (unlearning/objective.py:reference_engine): partitioned with ZeRO-3, else
    whole but for the experts."""
    if not passes.frozen_layers:
        return 0.0
    copied = a if passes.frozen_head else a.loaded(passes.frozen_layers)
    return copied.parameters.total / world if stage == 3 else rank_parameters(copied, ep)


def host_bytes(job: PlannedJob) -> float:
    """Memory of one node's host while loading, plus what is offloaded.

    Every process reads its share: with X/P of the experts for `collect` (the larger one; ZeRO-3 reads less), and
    :data:`LOADING_FACTOR` of that while AutoEP cuts out the experts of a layer.
    """
    zero, shard = job.zero, job.kept.parameters.total / job.spec.world
    offloaded = (MASTER_BYTES + 4 if zero.offload_optimizer else 0) + (job.b if zero.offload_param else 0)
    share = rank_parameters(job.a, job.ep)
    return job.spec.gpus_per_node * (share * job.b * LOADING_FACTOR + shard * offloaded)


def _head_bytes(a: Architecture, tokens: int, side: int, b: int) -> float:
    """The LM head's backward pass: logits of a chunk of one ``side``'s tokens at a time; in bf16 their gradients, of
    both sides, wait for a product with the head's weight; the sum of the products in fp32, if there are several."""
    product = min(tokens, _chunk(a, tokens) * (_CHUNKS_PER_PRODUCT if b < 4 else 1))
    waiting = product if product > _chunk(a, side) else 0
    gradient = a.vocabulary * a.hidden * (b if tokens <= product else 4 + b)
    return (_chunk(a, side) * (b + LOGIT_BYTES) + waiting * b) * a.vocabulary + gradient


def _chunk(a: Architecture, tokens: int) -> int:
    """Tokens whose logits exist at a time."""
    return min(tokens, max(_LOGITS_PER_CHUNK // a.vocabulary, 1))


def busiest(ep: int) -> float:
    """The busiest rank's routed tokens over the mean of all ranks that share the experts."""
    return IMBALANCE if ep > 1 else 1.0


def _exchange_bytes(a: Architecture, tokens: int, ep: int, b: int) -> float:
    """Send, receive and combine buffers of one MoE layer's all-to-all on the busiest rank."""
    return 3 * tokens * a.top_k * a.hidden * b * busiest(ep) if ep > 1 and a.moe_layers else 0


def _without_zeros(parts: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in parts.items() if value}
