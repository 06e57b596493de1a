"""The pass of a loss: chunked values of logits equal the plain ones; a pass ended at a layer equals a whole one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

from trace_ds.models.token_nll import chunked_nll, nll
from trace_ds.unlearning import forward as passes

TOKENS, SIZE, VOCABULARY = 11, 16, 37


class Plain:
    """What the pass needs of an engine: a module, and calling it."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __call__(self) -> Any:
        return self.module()


def head_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, SIZE, generator=generator).to(dtype)
    weight = torch.randn(VOCABULARY, SIZE, generator=generator).to(dtype)
    targets = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets, upstream


def chunked(dtype: torch.dtype, chunk: int, first: int = TOKENS) -> tuple[torch.Tensor, ...]:
    """The losses and their gradients, the ``first`` tokens' by a function of their own, as the forget side's are."""
    hidden, weight, targets, upstream = head_inputs(dtype)
    functions = [
        (len(own), lambda logits, part, own=own: nll(logits, own[part])) for own in (targets[:first], targets[first:])
    ]
    values = passes.head_values(hidden, weight, functions, chunk)
    return values.detach(), *torch.autograd.grad((values * upstream).sum(), (hidden, weight))


def exact(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """The same from the same rounded inputs in float64, gradients written out: softmax minus one-hot."""
    hidden, weight, targets, upstream = (tensor.detach() for tensor in head_inputs(dtype))
    logits = hidden.double() @ weight.double().T
    probabilities = torch.softmax(logits, 1)
    values = -torch.log(probabilities[torch.arange(TOKENS), targets])
    probabilities[torch.arange(TOKENS), targets] -= 1
    gradient = probabilities * upstream[:, None].double()
    return values, gradient @ weight.double(), gradient.T @ hidden.double()


@pytest.mark.parametrize("first", [TOKENS, 4])
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_chunked_values_and_gradients_are_the_exact_ones(chunk: int, first: int) -> None:
    for actual, expected in zip(chunked(torch.float32, chunk, first), exact(torch.float32), strict=True):
        assert float((actual - expected).abs().max() / expected.abs().max()) < 1e-6


@pytest.mark.parametrize("chunk", [1, 3])
def test_bf16_errs_no_more_than_without_chunks(chunk: int) -> None:
    whole, pieces = chunked(torch.bfloat16, TOKENS), chunked(torch.bfloat16, chunk, 4)
    assert torch.equal(pieces[0], whole[0])
    for actual, reference, expected in zip(pieces, whole, exact(torch.bfloat16), strict=True):
        error, allowed = ((value - expected).abs().max() for value in (actual, reference))
        # the weight's gradient is rounded once per product, then summed in fp32
        assert float(error) <= 2 * float(allowed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_head_runs_again_in_backward_only_where_the_logits_are_many(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    products: list[int] = []
    linear = functional.linear

    def counted(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        products.append(len(hidden))
        return linear(hidden, weight)

    monkeypatch.setattr(passes.functional, "linear", counted)
    kept = chunked(dtype, TOKENS)
    assert products == [TOKENS]
    monkeypatch.setattr(passes._HeadValues, "forward", staticmethod(_forgetful(passes._HeadValues.forward)))
    again = chunked(dtype, TOKENS)
    assert products == [TOKENS] * 3
    assert all(torch.equal(*pair) for pair in zip(kept, again, strict=True))
    monkeypatch.undo()
    monkeypatch.setattr(passes.functional, "linear", counted)
    products.clear()
    chunked(dtype, TOKENS - 1)  # one token more than a chunk holds: nothing is kept
    assert len(products) == 4 and sum(products) == 2 * TOKENS


def _forgetful(forward: Any) -> Any:
    """The head's forward pass without what it keeps."""

    def run(ctx: Any, *arguments: Any) -> torch.Tensor:
        values = forward(ctx, *arguments)
        ctx.logits.clear()
        return values

    return run


@pytest.mark.parametrize("bias", [False, True])
def test_losses_in_pieces_are_those_of_the_full_logits(bias: bool) -> None:
    hidden, weight, targets, _ = (tensor.detach() for tensor in head_inputs(torch.float32))
    bias_V = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(1)) if bias else None
    actual = chunked_nll(weight, bias_V, hidden, targets, logits_elements=VOCABULARY * 5)
    logits = functional.linear(hidden.double(), weight.double(), None if bias_V is None else bias_V.double())
    expected = functional.cross_entropy(logits, targets, reduction="none")
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)


def batch(rows: int = 2, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))
    return ids, torch.arange(length).expand(rows, length)


def test_a_pass_that_ends_at_a_layer_equals_the_whole_one(tiny_model: Path) -> None:
    layer = 1
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids, positions = batch()
    ran: list[int] = []
    for number, module in enumerate(model.model.layers):
        module.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.lm_head.register_forward_hook(lambda *_: ran.append(-1))
    actual = passes.forward(Plain(model), ids, positions, layer=layer)
    assert ran == list(range(layer + 1))
    assert actual.values == [] and actual.last_BSD is None and actual.layer_BSD is not None
    expected = []  # by a hook: transformers' own last hidden state is the one after the norm
    model.model.layers[layer].register_forward_hook(lambda *arguments: expected.append(arguments[2]))
    logits = model(input_ids=ids, position_ids=positions).logits  # everything is as it was
    assert torch.equal(actual.layer_BSD, expected[0]) and logits.shape == (2, 6, 300)


def test_layer_and_values_come_from_one_pass(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    ids, positions = batch()
    rows, columns = torch.tensor([0, 0, 1]), torch.tensor([0, 3, 4])
    picked = passes.HeadRequest(rows, columns, lambda logits, part: nll(logits, ids[rows, columns + 1][part]))
    largest = passes.HeadRequest(rows[:1], columns[:1], lambda logits, part: logits.max(dim=1).values)
    actual = passes.forward(Plain(model), ids, positions, layer=1, requests=[picked, largest], last=True)
    output = model(input_ids=ids, position_ids=positions, output_hidden_states=True)
    log_probabilities = torch.log_softmax(output.logits.double(), -1)
    expected = -log_probabilities[rows, columns, ids[rows, columns + 1]]
    torch.testing.assert_close(actual.values[0].double(), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(actual.values[1], output.logits[0, 0].max()[None])
    assert actual.layer_BSD is not None and actual.last_BSD is not None
    assert torch.equal(actual.layer_BSD, output.hidden_states[2])
    assert torch.equal(actual.last_BSD, output.hidden_states[-1])
    with pytest.raises(ValueError, match="nothing was requested"):
        passes.forward(Plain(model), ids, positions)
