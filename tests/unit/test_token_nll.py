"""Losses in pieces: the same numbers as the full logits."""

from __future__ import annotations

import pytest
import torch

from trace_ds.models.token_nll import chunked_nll


@pytest.mark.parametrize("logits_elements", [1, 64 * 5, 1 << 20])
@pytest.mark.parametrize("bias", [False, True])
def test_pieces_give_the_loss_of_the_full_logits(logits_elements: int, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    weight_VD, hidden_ND = torch.randn(64, 8, generator=generator), torch.randn(23, 8, generator=generator)
    bias_V = torch.randn(64, generator=generator) if bias else None
    targets_N = torch.randint(0, 64, (23,), generator=generator)
    found = chunked_nll(weight_VD, bias_V, hidden_ND, targets_N, logits_elements=logits_elements)
    logits = torch.nn.functional.linear(
        hidden_ND.double(), weight_VD.double(), None if bias_V is None else bias_V.double()
    )
    expected = torch.nn.functional.cross_entropy(logits, targets_N, reduction="none")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_no_token_has_no_loss() -> None:
    assert chunked_nll(torch.ones(4, 2), None, torch.ones(0, 2), torch.zeros(0, dtype=torch.int64)).shape == (0,)
