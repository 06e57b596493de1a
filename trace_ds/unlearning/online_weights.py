"""Retain weights of a micro-batch: the calibrated ones, or ones that follow what the router decides right now.

``reference``  the weights of the artefact (frozen model's routing): nothing happens here.
``online``     w_t = exp(Σ θ a_live(t)) / Z with a_live from this very forward pass, and θ from 0 by dual ascent on the
               mismatch that is left in the batches:

                   θ ← θ + η (p^F_live − q_batch − decay · θ),     q_batch = Σ w a_live / Σ w over the retain tokens

               The gradient of raking's dual (calibration/raking.py) at the forget frequencies of the moment, with an L2
               pull that bounds θ at (p^F − q) / decay. It acts on the experts in the calibration's scope (none, and so
               nothing happens, where that is empty), in the layers that the objective runs (RMU ends at its layer).

Normalisation: the weights of one batch are never rescaled to mean 1 (that would cancel the differences between
documents); the job divides by the batch's n tokens. log Z goes along with θ to first order, since ∂ log Z / ∂θ = q, and
what drifts is taken out: log Z ← log Z + q · Δθ + η log(mean weight). So the mean weight is 1 over some 1/η steps.
Weights are capped at the larger of the calibration's largest weight and its ``clip``: live routing can have patterns
that the corpus never had. All of this is our decision.

Cost: a table look-up per MoE layer and token, no host synchronisation per layer; the sums that ``online`` needs travel
in the step's one all-reduce, in float64, so θ is the same on all ranks and whatever their number.

Shape legend: B rows (forget rows first), R retain rows, S positions, T = B·S, L MoE layers, E experts, K = top-k.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.models.routers import RoutingRecorder, record_routing
from trace_ds.parallel.device import to_device
from trace_ds.run.artefact import Artefact
from trace_ds.unlearning.batches import MicroBatch


class RetainWeights:
    """The reference weights, those that the batch brings along. What the others keep between the steps is asked and
    told as in :class:`~trace_ds.unlearning.goals.Goal`."""

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the forward passes of one micro-batch."""
        yield

    def of(self, batch: MicroBatch) -> torch.Tensor:
        """Weights of the retain rows, fp32 [R, S], 0 where nothing is counted; after :meth:`recording`."""
        return batch.weights_BS[batch.forget_rows :]

    def local_sums(self) -> torch.Tensor | None:
        return None

    def follow(self, sums: np.ndarray, forget_tokens: int, retain_tokens: int) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}


class OnlineWeights(RetainWeights):
    """w = exp(Σ θ a_live − log Z), at most ``cap``, times 1 where the batch counts; see the module's docstring.

    Args:
        model: the engine's module.
        theta_LE: float64. log_mean: log Z.
        per_row: level row: a row's tokens share exp(mean of Σ θ a − log Z).
        scope_LE: bool, experts whose θ moves.
    """

    def __init__(
        self,
        model: nn.Module,
        theta_LE: np.ndarray,
        log_mean: float,
        cap: float,
        per_row: bool,
        device: torch.device,
        *,
        step_size: float,
        decay: float,
        scope_LE: np.ndarray,
    ) -> None:
        self._model, self._device = model, device
        self._cap, self._per_row = cap, per_row
        self._step_size, self._decay, self._scope_LE = step_size, decay, scope_LE
        self._recorder: RoutingRecorder | None = None
        self._mass = torch.zeros(2, dtype=torch.float64, device=device)
        self._sums_2LE = torch.zeros(2, *scope_LE.shape, dtype=torch.float64, device=device)
        self.set(theta_LE, log_mean)

    def set(self, theta_LE: np.ndarray, log_mean: float) -> None:
        self.theta_LE, self.log_mean = theta_LE, log_mean
        self._theta = to_device(torch.from_numpy(np.ascontiguousarray(theta_LE)), self._device)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Only the forward pass: a recomputation in the backward pass comes after the block."""
        with record_routing(self._model) as self._recorder:
            yield

    def layers(self) -> list[int]:
        """The MoE layers that the objective ran."""
        assert self._recorder is not None
        return [number for number, indices_TK in enumerate(self._recorder.indices_TK) if indices_TK is not None]

    def indices(self, layer: int, batch: MicroBatch) -> torch.Tensor:
        """Experts of every token [B, S, K] as just recorded (without the alternative rows, which come last)."""
        assert self._recorder is not None
        indices_TK = self._recorder.layer(layer)[1][: batch.counted_BS.numel()]
        return indices_TK.reshape(*batch.counted_BS.shape, -1)

    @torch.no_grad()
    def of(self, batch: MicroBatch) -> torch.Tensor:
        split = batch.forget_rows
        counted_RS = batch.counted_BS[split:]
        score_RS = torch.zeros(counted_RS.shape, dtype=torch.float64, device=counted_RS.device)
        for layer in self.layers():
            score_RS += self._theta[layer][self.indices(layer, batch)[split:]].sum(-1)
        if self._per_row:
            mean_R = (score_RS * counted_RS).sum(1) / counted_RS.sum(1).clamp(min=1)
            score_RS = mean_R[:, None].expand_as(score_RS)
        live_RS = (score_RS - self.log_mean).clamp(max=math.log(self._cap)).exp()
        weights_RS = live_RS * batch.weights_BS[split:] * counted_RS
        self._mass += torch.stack([weights_RS.sum(), weights_RS.square().sum()])
        self._add(batch, weights_RS)
        return weights_RS.float()

    def _add(self, batch: MicroBatch, weights_RS: torch.Tensor) -> None:
        """Selections by forget tokens and weighted selections by retain tokens.

        A product with a dense 0/1 matrix: one order of summation on every device, unlike atomic float additions.
        """
        split = batch.forget_rows
        forget_T = batch.counted_BS[:split].reshape(-1).double()
        for layer in self.layers():
            indices_BSK = self.indices(layer, batch)
            for side, (weight_T, indices) in enumerate(
                ((forget_T, indices_BSK[:split]), (weights_RS.reshape(-1), indices_BSK[split:]))
            ):
                dense_TE = torch.zeros(len(weight_T), self._theta.shape[1], dtype=torch.float64, device=self._device)
                dense_TE.scatter_(1, indices.reshape(len(weight_T), -1), 1.0)
                self._sums_2LE[side, layer] += weight_T @ dense_TE

    def local_sums(self) -> torch.Tensor:
        sums = torch.cat([self._mass, self._sums_2LE.reshape(-1)])
        self._mass.zero_()
        self._sums_2LE.zero_()
        return sums

    def follow(self, sums: np.ndarray, forget_tokens: int, retain_tokens: int) -> dict[str, float]:
        n, total, square = max(retain_tokens, 1), float(sums[0]), float(sums[1])
        told = {"retain_weight_mean": total / n, "retain_weight_ess": total * total / max(n * square, 1e-300)}
        if not total or not forget_tokens:
            return told
        forget_LE, retain_LE = sums[2:].reshape(2, *self._scope_LE.shape)
        p_LE, q_LE = forget_LE / forget_tokens, retain_LE / total
        change_LE = self._step_size * np.where(self._scope_LE, p_LE - q_LE - self._decay * self.theta_LE, 0.0)
        drift = self._step_size * math.log(told["retain_weight_mean"])
        self.set(self.theta_LE + change_LE, self.log_mean + float((q_LE * change_LE).sum()) + drift)
        return told | {"routing_gap": float(np.abs(p_LE - q_LE)[self._scope_LE].sum())}

    def state(self) -> dict[str, Any]:
        return {"theta_LE": self.theta_LE.tolist(), "log_mean": self.log_mean}


def make_weights(
    settings: UnlearningConfig, calibration: Artefact, model: nn.Module, device: torch.device, cursor: dict[str, Any]
) -> RetainWeights:
    """The weights that ``settings.weights`` asks for, where a checkpoint's ``cursor`` left them."""
    from safetensors.numpy import load_file

    if settings.weights == "reference":
        return RetainWeights()
    scope_LE = load_file(calibration.file("calibration.safetensors"))["scope_LE"].astype(bool)
    return OnlineWeights(
        model,
        np.array(cursor["theta_LE"]) if "theta_LE" in cursor else np.zeros(scope_LE.shape),
        float(cursor.get("log_mean", 0.0)),
        max(float(calibration.summary["max_weight"]), float(calibration.settings["clip"])),
        calibration.settings["level"] != "token",
        device,
        step_size=settings.online.step_size,
        decay=settings.online.decay,
        scope_LE=scope_LE,
    )
