"""Each loss against an independent float64 computation, value and gradient; extreme inputs stay finite."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import pytest
import torch
from objective_reference import FORMULAS, token_values

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.unlearning import losses
from trace_ds.unlearning.forget_retain import ForgetRetain
from trace_ds.unlearning.objective import Unlearning

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


@pytest.mark.parametrize("beta", [0.03, 0.1, 4.5])
def test_npo(beta: float) -> None:
    values, reference = nll(1), nll(2).detach()
    expected = 0.0
    for row in range(2):  # the third row has no counted token and adds nothing
        difference = float((values[row] - reference[row]).sum())
        expected += 2 / beta * math.log(1 + math.exp(-beta * difference))
    function = lambda x: losses.npo_forget_sum(x, reference, COUNTED, beta)  # noqa: E731
    check(function(values), expected, values, function)


def test_simnpo() -> None:
    values = nll(3)
    expected = sum(
        2 / 4.5 * math.log(1 + math.exp(-4.5 * (float(values[row].sum()) / length))) for row, length in ((0, 3), (1, 1))
    )
    function = lambda x: losses.simnpo_forget_sum(x, COUNTED, 4.5)  # noqa: E731
    check(function(values), expected, values, function)


TOKEN_LOSSES = sorted(FORMULAS)


def logits_of(seed: int, spread: float = 1.5) -> torch.Tensor:
    return torch.randn(9, 13, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread


def values_and_gradient(function: object, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    upstream = torch.linspace(-1, 2, len(logits), dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    values = function(leaf)  # type: ignore[operator]
    (gradient,) = torch.autograd.grad((values.double() * upstream).sum(), leaf)
    return values.detach().double(), gradient.double()


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_against_other_algebra_in_float64(name: str) -> None:
    settings = UnlearningConfig()
    logits, frozen = logits_of(0), logits_of(1)
    targets = torch.randint(0, 13, (9,), generator=torch.Generator().manual_seed(2))
    function = losses.TOKEN_LOSSES[name]
    actual = values_and_gradient(lambda z: function(settings, z, targets, frozen), logits)
    expected = values_and_gradient(lambda z: token_values(name, z, targets, frozen, settings), logits)
    for part, target, tolerance in zip(actual, expected, (5e-6, 5e-6), strict=True):
        assert float((part - target).abs().max() / target.abs().max()) < tolerance
        assert float((-part - target).abs().max() / target.abs().max()) > 0.1  # a broken sign is seen
    assert float(actual[1].abs().max()) > 1e-6


@pytest.mark.parametrize("name", TOKEN_LOSSES)
def test_token_losses_stay_finite_on_extreme_logits(name: str) -> None:
    settings = UnlearningConfig()
    logits = torch.zeros(4, 5, dtype=torch.bfloat16)
    logits[0, 0], logits[1, 1], logits[2], logits[3, 2] = 1e4, -1e4, 50.0, 300.0
    targets = torch.tensor([0, 1, 2, 3])
    function = losses.TOKEN_LOSSES[name]
    for part in values_and_gradient(lambda z: function(settings, z, targets, logits.roll(1, 0)), logits):
        assert torch.isfinite(part).all()


def test_dpo_prefers_the_alternative() -> None:
    values, preferred = nll(5), nll(6)
    reference, preferred_reference = nll(7).detach(), nll(8).detach()
    beta, expected = 0.4, 0.0
    for row in range(2):
        margin = float((values[row] - reference[row]).sum() - (preferred[row] - preferred_reference[row]).sum())
        expected += 2 / beta * math.log(1 + math.exp(-beta * margin))

    def of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return losses.dpo_forget_sum(losses.SequenceNLL(x, reference, COUNTED, y, preferred_reference), beta)

    check(of(values, preferred), expected, values, lambda x: of(x, preferred.detach()))
    check(of(values, preferred), expected, preferred, lambda y: of(values.detach(), y))
    gradients = torch.autograd.grad(of(values, preferred), (values, preferred))
    assert (gradients[0][:2] <= 0).all() and (gradients[1][:2] >= 0).all()  # descent forgets y and learns the other


def test_the_multiplier_rises_above_the_bound_only_and_resumes() -> None:
    settings, nothing = UnlearningConfig(forget_loss="pdu", alpha=2.0), cast(ForgetRetain, None)
    state: dict[str, float] = {}
    path = []
    for retain in (1.0, 2.05, 0.05, 0.05, 0.05, 0.05, 0.05):
        objective = Unlearning(settings, nothing, state)  # as after a checkpoint of the step before
        assert objective.update_state({"retain": retain}) == {"alpha": path[-1] if path else 2.0}
        path.append(objective.factors["retain"])
        state = objective.state()
    assert np.allclose(path[:3], [2 - 0.05, 2.95, 1.95]) and path[-1] == 0.0
    constant = Unlearning(UnlearningConfig(alpha=3.0), nothing, {})
    assert constant.update_state({"retain": 100.0}) == {} == constant.state() and constant.factors["retain"] == 3.0
