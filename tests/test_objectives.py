"""Each loss against an independent float64 computation, value and gradient; extreme inputs stay finite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trace_ds.unlearning import objectives

COUNTED = torch.tensor([[True, True, True, False], [True, False, False, False], [False] * 4])


def nll(seed: int, scale: float = 3.0) -> torch.Tensor:
    values = torch.rand(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale
    return (values * COUNTED).requires_grad_()


def check(value: torch.Tensor, expected: float, inputs: torch.Tensor, function: object) -> None:
    assert math.isclose(float(value.detach()), expected, rel_tol=1e-12)
    (gradient,) = torch.autograd.grad(value, inputs)
    numeric = torch.zeros_like(inputs)
    for index in np.ndindex(*inputs.shape):
        step = torch.zeros_like(inputs)
        step[index] = 1e-6
        numeric[index] = (function(inputs + step) - function(inputs - step)) / 2e-6  # type: ignore[operator]
    torch.testing.assert_close(gradient, numeric, atol=1e-7, rtol=1e-5)


def test_graddiff() -> None:
    values = nll(0)
    check(objectives.graddiff_forget_sum(values), -float(values.sum()), values, objectives.graddiff_forget_sum)


@pytest.mark.parametrize("beta", [0.03, 0.1, 4.5])
def test_npo(beta: float) -> None:
    values, reference = nll(1), nll(2).detach()
    expected = 0.0
    for row in range(2):  # the third row has no counted token and adds nothing
        difference = float((values[row] - reference[row]).sum())
        expected += 2 / beta * math.log(1 + math.exp(-beta * difference))
    function = lambda x: objectives.npo_forget_sum(x, reference, COUNTED, beta)  # noqa: E731
    check(function(values), expected, values, function)


@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_simnpo(delta: float) -> None:
    values = nll(3)
    expected = sum(
        2 / 4.5 * math.log(1 + math.exp(-4.5 * (float(values[row].sum()) / length - delta)))
        for row, length in ((0, 3), (1, 1))
    )
    function = lambda x: objectives.simnpo_forget_sum(x, COUNTED, 4.5, delta)  # noqa: E731
    check(function(values), expected, values, function)


def test_far_from_the_reference_stays_finite() -> None:
    huge = torch.full((1, 2), 1e6, requires_grad=True)
    counted = torch.ones(1, 2, dtype=torch.bool)
    for reference in (torch.zeros(1, 2), torch.full((1, 2), 2e6)):
        value = objectives.npo_forget_sum(huge, reference, counted, 0.1)
        assert torch.isfinite(value) and torch.isfinite(torch.autograd.grad(value, huge)[0]).all()


def test_token_nll_is_the_log_probability_of_the_next_token() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(3, 4, 7, generator=generator)
    ids = torch.randint(0, 7, (3, 4), generator=generator)
    found = objectives.token_nll(logits, ids, COUNTED)
    for row in range(3):
        for position in range(4):
            expected = 0.0
            if COUNTED[row, position]:
                probabilities = torch.softmax(logits[row, position].double(), 0)
                expected = -math.log(float(probabilities[ids[row, position + 1]]))
            assert math.isclose(float(found[row, position]), expected, rel_tol=1e-5, abs_tol=1e-7)


def test_weights_multiply_and_are_not_renormalised() -> None:
    values, weights = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.5]])
    assert float(objectives.weighted_sum(values, weights)) == 2.0 + 3.0 + 2.0


def test_rmu_target_has_the_length_and_depends_on_the_seed_only() -> None:
    target = objectives.rmu_target(64, seed=3, length=12.5)
    assert math.isclose(float(target.double().norm()), 12.5, rel_tol=1e-6)
    assert torch.equal(target, objectives.rmu_target(64, seed=3, length=12.5))
    assert not torch.equal(target, objectives.rmu_target(64, seed=4, length=12.5))


def test_hidden_mse() -> None:
    hidden, target = torch.tensor([[[1.0, 3.0]]]), torch.tensor([[[0.0, 1.0]]])
    assert objectives.hidden_mse(hidden, target).tolist() == [[2.5]]
