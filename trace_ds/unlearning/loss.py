"""From a micro-batch to its losses: which forward passes an objective needs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from trace_ds.config.schema import UnlearningConfig
from trace_ds.unlearning import objectives
from trace_ds.unlearning.batches import MicroBatch


@dataclass(frozen=True)
class Losses:
    """Losses of this rank's micro-batch, with gradient. The job weights and sums the retain side: the weights of TRACE
    act in one place, under every objective.

    Attributes:
        forget: scalar, the sum over the forget rows.
        retain_RS: per position of the retain rows, 0 where nothing is counted.
        forget_per: "token" or "sequence": which global count divides ``forget``.
    """

    forget: torch.Tensor
    retain_RS: torch.Tensor
    forget_per: str


class Objective(Protocol):
    def __call__(self, engine: Any, batch: MicroBatch) -> Losses: ...


@contextlib.contextmanager
def captured_output(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collect the (first) output tensor of ``module`` during the block."""
    found: list[torch.Tensor] = []
    handle = module.register_forward_hook(
        lambda _module, _inputs, output: found.append(output[0] if isinstance(output, tuple) else output)
    )
    try:
        yield found
    finally:
        handle.remove()


def decoder_layer(model: nn.Module, number: int) -> nn.Module:
    return model.model.layers[number]  # type: ignore[union-attr, index, return-value]


def hidden_at(engine: Any, layer: int, batch: MicroBatch) -> torch.Tensor:
    """The output of decoder layer ``layer`` [B, S, D]; logits are made for one position only, and not used."""
    with captured_output(decoder_layer(engine.module, layer)) as found:
        engine(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False, logits_to_keep=1)
    return found[0]


@dataclass(frozen=True)
class RMU:
    """RMU (Li et al., arXiv 2403.03218): steer forget hidden states to c·u, hold retain ones at the frozen model's.

    L_forget = (1/n) Σ_t ‖h_t − c u‖²/D over forget tokens, L_retain = (1/n) Σ_t w_t ‖h_t − h_t^ref‖²/D over retain
    tokens, both at the output of one decoder layer.

    Attributes:
        layer: decoder layer.
        target_D: c·u.
        reference: frozen engine that ends with that layer.
    """

    layer: int
    target_D: torch.Tensor
    reference: Any

    def __call__(self, engine: Any, batch: MicroBatch) -> Losses:
        split = batch.forget_rows
        with torch.no_grad():
            frozen_BSD = hidden_at(self.reference, self.layer, batch)
        hidden_BSD = hidden_at(engine, self.layer, batch)
        counted_BS = batch.counted_BS.float()
        forget_BS = objectives.hidden_mse(hidden_BSD[:split], self.target_D)
        retain_BS = objectives.hidden_mse(hidden_BSD[split:], frozen_BSD[split:])
        return Losses(
            (forget_BS * counted_BS[:split]).sum(),
            retain_BS * counted_BS[split:],
            "token",
        )


@dataclass(frozen=True)
class TokenLoss:
    """The forget losses that act on token losses, with the NLL of the retain rows."""

    settings: UnlearningConfig

    def __call__(self, engine: Any, batch: MicroBatch) -> Losses:
        split, settings = batch.forget_rows, self.settings
        logits_BSV = engine(input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False).logits
        nll_BS = objectives.token_nll(logits_BSV, batch.input_ids_BS, batch.counted_BS)
        forget_BS, counted_BS = nll_BS[:split], batch.counted_BS[:split]
        per = "token" if settings.forget_loss == "graddiff" else "sequence"
        if settings.forget_loss == "graddiff":
            forget = objectives.graddiff_forget_sum(forget_BS)
        elif settings.forget_loss == "npo":
            reference_BS = batch.reference_nll_BS[:split]
            forget = objectives.npo_forget_sum(forget_BS, reference_BS, counted_BS, settings.npo.beta)
        else:
            forget = objectives.simnpo_forget_sum(forget_BS, counted_BS, settings.simnpo.beta, settings.simnpo.delta)
        return Losses(forget, nll_BS[split:], per)
