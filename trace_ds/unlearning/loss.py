"""From a micro-batch to its losses: which forward passes an objective needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from trace_ds.config.schema import UnlearningConfig
from trace_ds.unlearning import objectives
from trace_ds.unlearning.batches import MicroBatch
from trace_ds.unlearning.forward import HeadRequest, forward


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


def hidden_at(engine: Any, layer: int, batch: MicroBatch, *, whole: bool = False) -> torch.Tensor:
    """The output of decoder layer ``layer`` [B, S, D]; nothing above that layer runs, unless ``whole``."""
    found = forward(engine, batch.input_ids_BS, batch.position_ids_BS, layer=layer, last=whole).layer_BSD
    assert found is not None
    return found


@dataclass(frozen=True)
class RMU:
    """RMU (Li et al., arXiv 2403.03218): steer forget hidden states to c·u, hold retain ones at the frozen model's.

    L_forget = (1/n) Σ_t ‖h_t − c u‖²/D over forget tokens, L_retain = (1/n) Σ_t w_t ‖h_t − h_t^ref‖²/D over retain
    tokens, both at the output of one decoder layer.

    Attributes:
        layer: decoder layer.
        target_D: c·u.
        reference: frozen engine that ends with that layer.
        whole: run the layers above too, because live weights look at their routers.
    """

    layer: int
    target_D: torch.Tensor
    reference: Any
    whole: bool = False

    def __call__(self, engine: Any, batch: MicroBatch) -> Losses:
        split = batch.forget_rows
        with torch.no_grad():
            frozen_BSD = hidden_at(self.reference, self.layer, batch)
        hidden_BSD = hidden_at(engine, self.layer, batch, whole=self.whole)
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
        rows_N, columns_N = batch.counted_BS.nonzero(as_tuple=True)
        targets_N = batch.input_ids_BS[rows_N, columns_N + 1]
        request = HeadRequest(rows_N, columns_N, lambda logits_CV, part: objectives.nll(logits_CV, targets_N[part]))
        (nll_N,) = forward(engine, batch.input_ids_BS, batch.position_ids_BS, requests=[request]).values
        nll_BS = torch.zeros(batch.counted_BS.shape, device=nll_N.device).index_put((rows_N, columns_N), nll_N)
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
