"""Attention inside packed documents equals the documents run alone, and nothing of S × S is made on the way."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import run_distributed
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from trace_ds.models import attention
from trace_ds.models.attention import (
    ATTENTION_NAME,
    PackedDocuments,
    adopt,
    find_attention_problem,
    packed,
    shared_prefixes,
)
from trace_ds.models.families import FAMILIES

# Rows of 151 positions: no size of a model, so that a mask or scores would be seen. What ends a row may be filling.
ROWS = [[7, 61, 83], [31, 17, 83, 5, 15], [151]]
LENGTH = 151
TAKEN = sorted(FAMILIES.keys() - tiny.MIXING)
WINDOW = {"use_sliding_window": True, "sliding_window": 8}


def positions(rows: list[list[int]] = ROWS) -> torch.Tensor:
    return torch.tensor([[place for size in row for place in range(size)] for row in rows])


def spans(rows: list[list[int]] = ROWS) -> list[tuple[int, slice]]:
    """(row, its positions) of each document."""
    ends = [np.cumsum(row) for row in rows]
    return [
        (n, slice(int(end - size), int(end)))
        for n, row in enumerate(rows)
        for size, end in zip(row, ends[n], strict=True)
    ]


class Squares(TorchDispatchMode):
    """The shapes of tensors that have a size of ``sizes`` in two dimensions."""

    def __init__(self, sizes: set[int]) -> None:
        super().__init__()
        self.sizes, self.seen = sizes, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor) and any(value.shape.count(size) > 1 for size in self.sizes):  # type: ignore[attr-defined]
                self.seen.add(tuple(value.shape))
        return result


def tensors(rows: int, length: int, heads: tuple[int, int], widths: tuple[int, int]) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(heads[0], widths[0]), (heads[1], widths[0]), (heads[1], widths[1])]
    return [torch.randn(rows, h, length, d, generator=draw, requires_grad=True) for h, d in shapes]


def alone(inputs: list[torch.Tensor], rows: list[list[int]]) -> torch.Tensor:
    """Attention written out, one document after the other; [B, S, H, D]."""
    query, key, value = inputs
    key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
    output = torch.zeros(*query.shape[:3], value.shape[-1])
    for row, span in spans(rows):
        scores = 0.3 * query[row, :, span] @ key[row, :, span].transpose(1, 2)
        scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        output[row, :, span] = scores.softmax(-1) @ value[row, :, span]
    return output.transpose(1, 2)


def check(inputs: list[torch.Tensor], rows: list[list[int]]) -> None:
    documents = PackedDocuments.of(positions(rows), torch.device("cpu"))
    actual, _ = attention.attend(None, *inputs, None, scaling=0.3, documents=documents)
    expected = alone(inputs, rows)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    gradients = (torch.autograd.grad((output * upstream).sum(), inputs) for output in (actual, expected))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "widths"), [((4, 2), (8, 8)), ((4, 1), (16, 8))])
@pytest.mark.parametrize("rows", [ROWS, [[8, 8], [8, 8]], [[1, 1, 4]]])
def test_each_document_is_attended_to_alone(
    rows: list[list[int]], heads: tuple[int, int], widths: tuple[int, int]
) -> None:
    check(tensors(len(rows), sum(rows[0]), heads, widths), rows)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The families, DeepSeek with values narrower than keys."""
    folder = tmp_path_factory.mktemp("models")
    return {family: tiny.make_model(folder / family, family, layers=2) for family in TAKEN}


def loaded(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def ids_of(rows: list[list[int]] = ROWS) -> torch.Tensor:
    return torch.randint(3, 300, (len(rows), sum(rows[0])), generator=torch.Generator().manual_seed(1))


def weighted(hidden: torch.Tensor, upstream: torch.Tensor) -> torch.Tensor:
    return (hidden * upstream).sum()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8), st.booleans())
def test_every_distinct_beginning_is_one_token_of_the_input(documents: list[list[int]], ordered: bool) -> None:
    documents = sorted(documents) if ordered else documents
    inputs, places = shared_prefixes(documents, torch.device("cpu"))
    ids, positions = inputs["input_ids"][0].numpy(), inputs["position_ids"][0].numpy()
    for document, place in zip(documents, places, strict=True):
        assert ids[place].tolist() == document and positions[place].tolist() == list(range(len(document)))
    if ordered:
        assert len(ids) == len({tuple(document[:end]) for document in documents for end in range(1, len(document) + 1)})


@pytest.mark.parametrize("family", TAKEN)
def test_documents_that_begin_alike_are_seen_alone(family: str, models: dict[str, Path]) -> None:
    ids, model, plain = ids_of([[60]])[0].tolist(), loaded(models[family]), loaded(models[family])
    documents = [ids[:20], ids[:30], ids[:30] + ids[40:45], ids[:10] + ids[50:60], ids[3:9]]
    adopt(model)
    inputs, places = shared_prefixes(documents, torch.device("cpu"))
    assert inputs["input_ids"].shape == (1, 30 + 5 + 10 + 6)
    with torch.no_grad():
        hidden = model.model(**inputs).last_hidden_state[0]
        for document, place in zip(documents, places, strict=True):
            expected = plain.model(torch.tensor([document]), use_cache=False).last_hidden_state[0]
            torch.testing.assert_close(hidden[place], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "recompute"), [*((family, False) for family in TAKEN), ("mixtral", True)])
def test_a_model_sees_documents_alone(family: str, recompute: bool, models: dict[str, Path]) -> None:
    """Values and gradients of all parameters, packed against alone through transformers; and no square in sight."""
    ids, model, plain = ids_of(), loaded(models[family]), loaded(models[family])
    assert find_attention_problem(model) is None
    adopt(model)
    assert model.config._attn_implementation == ATTENTION_NAME
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    upstream = torch.randn(*ids.shape, 32, generator=torch.Generator().manual_seed(2))
    with Squares({LENGTH, 61, 83, 31, 17, 96, 64}) as squares:
        hidden = model.model(ids, **packed(model, positions(), ids.device)).last_hidden_state
        weighted(hidden, upstream).backward()
    assert squares.seen == set()
    for row, span in spans():
        expected = plain.model(ids[row : row + 1, span], use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(hidden[row, span], expected, rtol=1e-5, atol=1e-5)
        weighted(expected, upstream[row, span]).backward()
    for (name, one), (_, other) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if other.grad is not None:
            largest = float(other.grad.abs().max())
            assert one.grad is not None, name
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-5 * max(1.0, largest), msg=name)


def test_without_documents_a_model_is_as_it_was(models: dict[str, Path]) -> None:
    """A mask of someone else's (filling at the left), a cache, positions that restart: transformers' own affair."""
    model, plain = loaded(models["mixtral"]), loaded(models["mixtral"])
    adopt(model)
    ids = ids_of()
    mask = torch.ones_like(ids)
    mask[0, :40] = 0
    calls: list[dict[str, Any]] = [
        {"attention_mask": mask},
        {"position_ids": positions(), "use_cache": False},
        {"use_cache": True},
    ]
    with torch.no_grad():
        for call in calls:
            assert torch.equal(model(ids, **call).logits, plain(ids, **call).logits)
        options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


@pytest.mark.parametrize(
    ("family", "own", "reason"),
    [
        ("mixtral", WINDOW, "sliding window"),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 8}, None),
        ("qwen3_5_moe_text", {}, "linear attention"),
        ("gpt_oss", {}, "the family gpt_oss"),
    ],
)
def test_what_is_not_known_is_left_alone(family: str, own: dict[str, Any], reason: str | None, tmp_path: Path) -> None:
    path = tiny.make_model(tmp_path / family, family, layers=2)
    raw = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(raw | own))
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    before = model.config._attn_implementation
    adopt(model)
    assert (reason or "") in (find_attention_problem(model) or "") and (find_attention_problem(model) is None) == (
        reason is None
    )
    assert model.config._attn_implementation == (ATTENTION_NAME if reason is None else before)
    inputs = packed(model, positions(), torch.device("cpu"))
    assert ("documents" in inputs) == (reason is None)
    with torch.no_grad():
        assert torch.isfinite(model(ids_of(), **inputs).logits).all()


def test_engines_see_documents_alone(models: dict[str, Path]) -> None:
    """Expert-parallel and partitioned by ZeRO-3, one kind at least: values, and gradients at the embedding."""
    for rank, actual in enumerate(run_distributed(jobs.packed_passes, 2, {k: str(v) for k, v in models.items()}, ROWS)):
        assert len(actual) == 2 + len(models)
        for (family, shape), (hidden, gradient) in actual.items():
            ids, model = ids_of().roll(rank, 0), loaded(models[family])
            for row, span in spans():
                expected = jobs.pass_with_gradient(model.model, model.model, ids[row : row + 1, span], {})
                for one, other in zip((hidden, gradient), expected, strict=True):
                    tolerance = 1e-5 * max(1.0, float(np.abs(other).max()))
                    summary = f"{family} {shape}, rank {rank}, row {row}, {span}"
                    np.testing.assert_allclose(one[row, span], other[0], rtol=1e-5, atol=tolerance, err_msg=summary)


def documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, scale: float
) -> torch.Tensor:
    """What ``varlen_attn`` with a causal window is documented to do."""
    parts = []
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        one = [tensor[begin:end].transpose(0, 1)[None] for tensor in (query, key, value)]
        result = functional.scaled_dot_product_attention(*one, is_causal=True, scale=scale, enable_gqa=True)
        parts.append(result[0].transpose(0, 1))
    return torch.cat(parts)


def test_the_kernel_of_gpus_is_called_as_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself runs on GPUs only: its interface stands in."""
    from torch.nn.attention import varlen

    signature = inspect.signature(varlen.varlen_attn)

    def varlen_attn(query: Any, key: Any, value: Any, *others: Any, **options: Any) -> torch.Tensor:
        signature.bind(query, key, value, *others, **options)
        assert query.shape[2] == key.shape[2] == value.shape[2] and others[2:] == (LENGTH, LENGTH)
        assert query.shape[1] == key.shape[1] or options["enable_gqa"]
        assert options["window_size"] == (-1, 0) and all(one.dtype == torch.int32 for one in others[:2])
        assert torch.equal(others[0], others[1])
        return documented(query, key, value, others[0], options["scale"])

    varlen_attn.__signature__ = signature  # type: ignore[attr-defined]
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_has_kernel", lambda query: True)
    attention._parameters.cache_clear()
    for heads, widths in (((4, 2), (8, 8)), ((4, 4), (16, 8))):
        check(tensors(len(ROWS), LENGTH, heads, widths), ROWS)
