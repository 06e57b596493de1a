"""Which parameters are trained, by kind or name, and which rows of fused expert tensors; the rest stays bitwise as is.

Nothing is frozen by ``requires_grad``: DeepSpeed's ZeRO-3 refuses to save frozen experts of AutoEP, and a checkpoint
with holes resumes only on its own shape. Instead a held parameter (or row) gets a gradient of exactly 0 before
DeepSpeed sees it, on every rank, so AdamW's moments stay 0 and so does its update; and where weight decay is on, held
parameters are in a group without it. A tensor that is trained in part is in that group too: its trained rows are not
decayed either (our decision). The price is the optimizer memory of what is held. (Layers above the one at which the
losses end are not in the model at all: needs.py.)

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
        return self.experts.get(layer_of(name), ())

    def wholly(self, name: str) -> bool:
        return name in self.names and self.rows(name) is None


def is_expert(name: str) -> bool:
    return ".experts." in name


def layer_of(name: str) -> int:
    """The decoder layer of a parameter, -1 outside the layers."""
    return int(name.split(".layers.")[1].split(".")[0]) if ".layers." in name else -1


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
        left = {n for n in left if layer_of(n) <= last_layer and not n.startswith(("model.norm", "lm_head"))}
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
        names = frozenset(n for n, kind in kinds.items() if kind in ("experts", "routers") and layer_of(n) in experts)
    return Trained(frozenset(kinds), names, experts)


def parameter_groups(model: nn.Module, trained: Trained | None, weight_decay: float) -> list[Any]:
    """The parameters for the optimizer: in two groups where weight decay must not reach some of them (``trained`` None:
    it may reach all)."""
    named = list(model.named_parameters())
    if trained is None or not weight_decay or all(trained.wholly(name) for name, _ in named):
        return [parameter for _, parameter in named]
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay, "name": "decayed"},
        {"params": [], "weight_decay": 0.0, "name": "held"},
    ]
    for name, parameter in named:
        groups[not trained.wholly(name)]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def freeze(model: nn.Module, trained: Trained) -> None:
    """Zero the gradients of all that is not trained, on an engine's converted model (local experts under AutoEP)."""
    # Hooks of tensors run before DeepSpeed's, which reduce each gradient while the backward pass goes on: a change of
    # ``parameter.grad`` afterwards would come too late.
    for name, parameter in model.named_parameters():
        source = autoep.source_name(name, trained.parameters)
        rows = trained.rows(source)
        if source not in trained.names or rows == ():
            parameter.register_hook(torch.zeros_like)
        elif rows is not None:
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
