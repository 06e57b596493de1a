"""One forward pass of an engine that makes only what a loss needs: layers up to one, or values of chosen tokens.

Logits are never whole: the LM head works through the tokens in chunks, forward and backward, inside one call of its
module, so that ZeRO-3 gathers its weight once. Everything runs inside ``engine(...)``, under DeepSpeed's own hooks.

Shape legend: B sequences (rows), S positions, D hidden size, V vocabulary, N tokens of a request, C of one chunk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from trace_ds.models.attention import packed

LOGITS_PER_CHUNK = 1 << 26  # elements: 0.25 GB in fp32, of which a few copies exist at a time
CHUNKS_PER_PRODUCT = 4  # of bf16: 0.5 GB of gradients of logits for one product with the head's weight

# (logits [C, V] in the parameters' dtype, which of the request's tokens they are) -> one fp32 value a token, [C].
TokenFunction = Callable[[torch.Tensor, slice], torch.Tensor]


@dataclass(frozen=True)
class HeadRequest:
    """Tokens whose logits are looked at, as row and column indices [N], and what is computed from them."""

    rows_N: torch.Tensor
    columns_N: torch.Tensor
    function: TokenFunction


@dataclass(frozen=True)
class PassOutputs:
    """The outputs of a pass.

    Attributes:
        layer_BSD: output of the requested decoder layer, or None.
        last_BSD: the final hidden states (after the norm), or None when the pass stopped at ``layer``.
        values: one fp32 tensor [N] per request.
    """

    layer_BSD: torch.Tensor | None
    last_BSD: torch.Tensor | None
    values: list[torch.Tensor]


def forward(
    engine: Any,
    input_ids_BS: torch.Tensor,
    position_ids_BS: torch.Tensor,
    *,
    layer: int | None = None,
    requests: Sequence[HeadRequest] = (),
    last: bool = False,
) -> PassOutputs:
    """One pass of ``engine`` (DeepSpeed, training or frozen) over the rows, with gradients where they are enabled.

    Args:
        position_ids_BS: on the host, restarting with each document.
        layer: decoder layer whose output is wanted. When nothing else is requested, the pass ends there: the layers
            above and the LM head do not run on any rank, and their parameters get no gradient.
        requests: values computed from logits; on every rank, or on none.
        last: the final hidden states are wanted.

    Activation checkpointing must be the non-reentrant kind, or the layer's output would have no gradient.
    """
    whole = bool(requests) or last
    if not whole and layer is None:
        raise ValueError("nothing was requested of the pass")
    model = engine.module
    captured: list[torch.Tensor] = []

    def body() -> tuple[torch.Tensor, ...]:
        with _layers(model, None if whole else layer), _captured(model, layer, captured):
            last_BSD = model.model(
                input_ids=input_ids_BS, **packed(model, position_ids_BS, input_ids_BS.device)
            ).last_hidden_state
        if not whole:
            return tuple(captured)
        if not requests:
            return (*captured, last_BSD)
        # all requests in one call of the head's module, for which ZeRO-3 gathers its weight once
        chosen_2N = torch.cat([torch.stack([request.rows_N, request.columns_N]) for request in requests], dim=1)
        parts = [(len(request.rows_N), request.function) for request in requests]
        with _replaced_forward(model.lm_head, _head_forward(model.lm_head, parts)):
            values_N = model.lm_head(last_BSD[chosen_2N[0], chosen_2N[1]])
        return (*captured, *([last_BSD] if last else []), values_N)

    with _replaced_forward(model, body):
        outputs = list(engine())
    layer_BSD = outputs.pop(0) if layer is not None else None
    last_BSD = outputs.pop(0) if last else None
    values = outputs[0].split([len(request.rows_N) for request in requests]) if requests else ()
    return PassOutputs(layer_BSD, last_BSD, list(values))


def head_values(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, functions: Sequence[tuple[int, TokenFunction]], chunk: int
) -> torch.Tensor:
    """A function of the logits ``hidden @ weightᵀ``, at most ``chunk`` tokens at a time; fp32 [N].

    ``functions``: the first so many tokens' function, the next ones', and so on to the last token; each numbers its own
    from 0. The matrix products are in the dtype of the parameters. Gradients flow to ``hidden_ND`` and ``weight_VD``.
    Up to ``chunk`` tokens' logits are kept for the backward pass, which needs that much memory anyway; of more tokens
    nothing of size N × V is kept, and each chunk's logits are made again. In bf16 the gradients of some
    chunks' logits wait for one product, whoever's they are: each reads and writes a whole gradient of the weight, which
    costs more than to multiply by one chunk. The products are summed in fp32.
    """
    return _HeadValues.apply(hidden_ND, weight_VD, functions, chunk)


class _HeadValues(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        functions: Sequence[tuple[int, TokenFunction]],
        chunk: int,
    ) -> torch.Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD)
        ctx.chunks, ctx.chunk = _chunks(functions, chunk), chunk
        ctx.logits = {}  # by the chunk's first token
        keep = len(hidden_ND) <= chunk and any(ctx.needs_input_grad)
        values_N = torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device)
        for tokens, own, function in ctx.chunks:
            logits_CV = functional.linear(hidden_ND[tokens], weight_VD)
            values_N[tokens] = function(logits_CV, own)
            if keep:
                ctx.logits[tokens.start] = logits_CV
        return values_N

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient_N,) = gradients
        hidden_ND, weight_VD = ctx.saved_tensors
        hidden_gradient_ND = torch.zeros_like(hidden_ND)
        in_place = weight_VD.dtype == torch.float32
        products = _products(ctx.chunks, ctx.chunk * (1 if in_place else CHUNKS_PER_PRODUCT))
        # a sum in bf16 would lose the small ones of several products; a single one is rounded once anyway
        dtype = torch.float32 if len(products) > 1 else weight_VD.dtype
        weight_gradient_VD = torch.zeros_like(weight_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        for chunks in products:
            begin, end = chunks[0][0].start, chunks[-1][0].stop
            gradient_PV = _logit_gradients(hidden_ND, weight_VD, chunks, gradient_N, ctx.logits)
            hidden_gradient_ND[begin:end] = gradient_PV @ weight_VD
            if weight_gradient_VD is not None and weight_gradient_VD.dtype == gradient_PV.dtype:
                weight_gradient_VD.addmm_(gradient_PV.T, hidden_ND[begin:end])
            elif weight_gradient_VD is not None:
                weight_gradient_VD += gradient_PV.T @ hidden_ND[begin:end]
            del gradient_PV  # before the next are made
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD.to(weight_VD.dtype)
        return hidden_gradient_ND, weight_gradient_VD, None, None


# Tokens of one function: where they are among all, which of the function's they are, and the function.
_Chunk = tuple[slice, slice, TokenFunction]


def _logit_gradients(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    chunks: Sequence[_Chunk],
    gradient_N: torch.Tensor,
    kept: dict[int, torch.Tensor],
) -> torch.Tensor:
    """The gradients of the logits of some chunks that follow each other, from those of the values.

    ``kept``: logits that the forward pass left, by a chunk's first token; they are taken out.
    """

    def of(tokens: slice, own: slice, function: TokenFunction) -> torch.Tensor:
        logits_CV = kept.pop(tokens.start, None)
        if logits_CV is None:
            logits_CV = functional.linear(hidden_ND[tokens], weight_VD)
        logits_CV.requires_grad_()
        with torch.enable_grad():
            values_C = function(logits_CV, own)
        return torch.autograd.grad(values_C, logits_CV, gradient_N[tokens])[0]

    if len(chunks) == 1:
        return of(*chunks[0])
    begin, end = chunks[0][0].start, chunks[-1][0].stop
    gradient_PV = weight_VD.new_empty(end - begin, len(weight_VD))
    for tokens, own, function in chunks:
        gradient_PV[tokens.start - begin : tokens.stop - begin] = of(tokens, own, function)
    return gradient_PV


def _chunks(functions: Sequence[tuple[int, TokenFunction]], size: int) -> list[_Chunk]:
    chunks, begin = [], 0
    for count, function in functions:
        for start in range(0, count, size):
            own = slice(start, min(start + size, count))
            chunks.append((slice(begin + own.start, begin + own.stop), own, function))
        begin += count
    return chunks


def _products(chunks: Sequence[_Chunk], tokens: int) -> list[list[_Chunk]]:
    """Chunks in their order, as many together as have no more than so many ``tokens``."""
    groups: list[list[_Chunk]] = []
    for chunk in chunks:
        if groups and chunk[0].stop - groups[-1][0][0].start <= tokens:
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups


def _head_forward(head: Any, functions: Sequence[tuple[int, TokenFunction]]) -> Callable[..., torch.Tensor]:
    """A forward for the LM head's module: the values of every request from all requests' hidden states."""

    def run(hidden_ND: torch.Tensor) -> torch.Tensor:
        assert getattr(head, "bias", None) is None, "an LM head with a bias"
        return head_values(hidden_ND, head.weight, functions, max(1, LOGITS_PER_CHUNK // head.weight.shape[0]))

    return run


@contextlib.contextmanager
def _replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """``module(...)`` runs its hooks and ``function`` during the block."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward  # the class's own method again


@contextlib.contextmanager
def _layers(model: Any, last_layer: int | None) -> Iterator[None]:
    """The body runs its decoder layers up to ``last_layer`` only (transformers reads the number from the config)."""
    config = model.model.config
    number = config.num_hidden_layers
    try:
        config.num_hidden_layers = number if last_layer is None else last_layer + 1
        yield
    finally:
        config.num_hidden_layers = number


@contextlib.contextmanager
def _captured(model: Any, layer: int | None, outputs: list[torch.Tensor]) -> Iterator[None]:
    """Collect the output tensor of decoder layer ``layer`` during the block."""
    if layer is None:
        yield
        return
    with model.model.layers[layer].register_forward_hook(
        lambda _module, _inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    ):
        yield
