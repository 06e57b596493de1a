"""Which parameters are trained, by kind or name, and which rows of fused expert tensors; the rest stays bitwise as is.

A parameter of which nothing is trained is frozen: ``requires_grad`` is off, so it has no gradient, no fp32 master and
no optimizer state, and checkpoints leave it out (``convert`` takes it from the base model). A fused expert tensor of
which only some rows are trained gets a gradient of exactly 0 in the others before DeepSpeed sees it, on every rank, so
AdamW's moments stay 0 there and so does its update; where weight decay is on, such a tensor is in a group without it:
its trained rows are not decayed either (our decision). (Layers above the one at which the losses end are not in the
model at all: needs.py.)

Names are those of the Hugging Face model, whether or not AutoEP has replaced its layers.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.errors import UserError
from trace_ds.models import autoep
from trace_ds.models.routers import find_routers
from trace_ds.tensors.layouts import decoder_layer

SELECTED = "selected_experts"
PARAMETER_KINDS = ("all", "experts", SELECTED, "attention", "routers")


@dataclass(frozen=True)
class Trained:
    """The parameters, and the rows of expert tensors, that a job trains.
    Attributes:
        parameters: all parameters of the model.
        names: those that are trained, wholly or in some rows.
        experts: by decoder layer, the experts whose rows of the fused tensors are trained; a layer that is not there
            has none. None: all of them.
    """

    parameters: frozenset[str]
    names: frozenset[str]
    experts: dict[int, tuple[int, ...]] | None = None

    def rows(self, name: str) -> tuple[int, ...] | None:
        """The experts trained in the tensor ``name``; None where it is not cut into rows."""
        if self.experts is None or not is_expert(name):
            return None
        return self.experts.get(decoder_layer(name), ())

    def wholly(self, name: str) -> bool:
        return name in self.names and self.rows(name) is None


def is_expert(name: str) -> bool:
    return ".experts." in name


def parameter_kinds(model: nn.Module) -> dict[str, str]:
    """Parameter name -> experts, routers, attention or other, of a Hugging Face model not yet converted."""
    routers = {id(parameter) for router in find_routers(model) for parameter in router.parameters()}
    kinds = {}
    for name, parameter in model.named_parameters():
        if id(parameter) in routers:
            kinds[name] = "routers"
        else:
            kinds[name] = "experts" if is_expert(name) else "attention" if ".self_attn." in name else "other"
    return kinds


def choose_parameters(kinds: dict[str, str], patterns: list[str], last_layer: int | None) -> frozenset[str]:
    """The names that ``unlearning.trainable`` matches, up to the layer at which the losses end (None: the logits
    are needed).

    Raises:
        UserError: a pattern matches no parameter, or none is left.
    """
    left = _matching(kinds, [pattern for pattern in patterns if not pattern.startswith("-")])
    left -= _matching(kinds, [pattern[1:] for pattern in patterns if pattern.startswith("-")])
    ends = ""
    if last_layer is not None:  # what is above has no gradient, but would be decayed
        left = {n for n in left if decoder_layer(n) <= last_layer and not n.startswith(("model.norm", "lm_head"))}
        ends = f" (the losses end at layer {last_layer})"
    if not left:
        raise UserError(f"no parameter is left to train{ends}", "unlearning.trainable", "name more, or take out less")
    return frozenset(left)


def _matching(kinds: dict[str, str], patterns: Iterable[str]) -> set[str]:
    matched: set[str] = set()
    for pattern in patterns:
        if pattern in PARAMETER_KINDS:
            names = {name for name, kind in kinds.items() if pattern.removeprefix("selected_") in ("all", kind)}
        else:
            names = set(fnmatch.filter(kinds, pattern))
        if not names:
            raise UserError(
                f"{pattern!r} matches no parameter of the model (one is {min(kinds)})",
                "unlearning.trainable",
                f"use one of {', '.join(PARAMETER_KINDS)}, or a name pattern with * such as *.self_attn.*",
            )
        matched |= names
    return matched


def trained_by(
    model: nn.Module, settings: UnlearningConfig, experts: dict[int, tuple[int, ...]] | None, last_layer: int | None
) -> Trained:
    """The trained parameters of a job, from the whole model, not yet converted: patterns of names may match layers that
    the job does not load.

    Args:
        experts: the experts selected by the calibration or by SEUF, by decoder layer; None: all.
        last_layer: the layer at which the losses end, see :func:`choose_parameters`.
    """
    kinds = parameter_kinds(model)
    names = choose_parameters(kinds, settings.trainable, last_layer)
    if settings.seuf is not None:
        assert experts is not None
        names = frozenset(
            n for n, kind in kinds.items() if kind in ("experts", "routers") and decoder_layer(n) in experts
        )
    return Trained(frozenset(kinds), names, experts)


def freeze(model: nn.Module, trained: Trained) -> None:
    """Turn ``requires_grad`` off for what is not trained, on a model as it was loaded (AutoEP renames parameters)."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained.names and trained.rows(name) != ())


def parameter_groups(model: nn.Module, trained: Trained | None, weight_decay: float) -> list[Any]:
    """The parameters for the optimizer, those that are not frozen: in two groups where weight decay must not reach
    some of them (``trained`` None: it may reach all)."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if trained is None or not weight_decay or all(trained.wholly(name) for name, _ in named):
        return [parameter for _, parameter in named]
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [], "weight_decay": 0.0, "name": "in_part"},
    ]
    for name, parameter in named:
        groups[not trained.wholly(name)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def zero_untrained_rows(model: nn.Module, trained: Trained) -> None:
    """Zero the gradients of the untrained rows of expert tensors, on an engine's converted model (local experts under
    AutoEP)."""
    # Hooks of tensors run before DeepSpeed's, which reduce each gradient while the backward pass goes on: a change of
    # ``parameter.grad`` afterwards would come too late.
    for name, parameter in model.named_parameters():
        rows = trained.rows(autoep.source_name(name, trained.parameters))
        if parameter.requires_grad and rows is not None:
            experts = autoep.experts_here(model, name, parameter)
            frozen_E = torch.tensor([expert not in rows for expert in experts])
            parameter.register_hook(_zeroing(frozen_E))


def _zeroing(frozen_E: torch.Tensor) -> Any:
    there: dict[torch.device, torch.Tensor] = {}  # copied once: each copy would be waited for

    def zero(gradient_EXX: torch.Tensor) -> torch.Tensor:
        device = gradient_EXX.device
        if device not in there:
            there[device] = frozen_E.to(device)
        return gradient_EXX.masked_fill(there[device][:, None, None], 0.0)

    return zero
