"""What a job trains for: the terms of its loss over a micro-batch, and what it keeps between the steps.

``NextToken`` is fine-tuning, ``Unlearning`` the forget and retain losses under the weights of TRACE. The training loop
(:mod:`trace_ds.unlearning.trainer`) is one for both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from trace_ds.config.sections.unlearning import PDUConfig, UnlearningConfig
from trace_ds.corpora.dataset import Batch
from trace_ds.models.token_nll import nll, weighted_sum
from trace_ds.parallel.device import to_device
from trace_ds.unlearning.batches import CorpusStep, MicroBatch, Step
from trace_ds.unlearning.forward import HeadRequest, forward
from trace_ds.unlearning.grip import Projection
from trace_ds.unlearning.loss import ForgetRetain, Losses
from trace_ds.unlearning.objectives import dual_update

FIRST_STEP_FACTOR = 1.05  # the default bound over the retain loss of the first step (our decision)


class Goal:
    """All that the training loop knows of what is trained for. A goal keeps nothing between the steps, unless it says
    so."""

    @property
    def factors(self) -> dict[str, float]:
        """Weight of each term in the loss of the next step, by the term's name (in the log, ``loss_NAME``)."""
        raise NotImplementedError

    def terms(self, engine: Any, step: Any, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Of each micro-batch of the step (they are on the host), one after the other: scalars with gradient, by the
        names of :attr:`factors`, sums over this rank's rows divided by the global counts of the step."""
        raise NotImplementedError

    def follow(self, losses: dict[str, float]) -> dict[str, float]:
        """Take in the global losses of the step that was just made; returns numbers for the log."""
        return {}

    def after_update(self, engine: Any, step: int) -> None:
        """After the optimizer step of the 0-based ``step`` (collective)."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry (JSON)."""
        return {}


class NextToken(Goal):
    """The mean next-token loss over the counted tokens of a step."""

    factors = {"nll": 1.0}  # noqa: RUF012 (a constant)

    def terms(self, engine: Any, step: CorpusStep, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        for batch in step.micro_batches:
            yield {"nll": next_token_nll(engine, batch, device).sum() / max(step.tokens, 1)}


def next_token_nll(engine: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """NLL of the counted tokens of a batch that is on the host, fp32 [N] on ``device``."""
    rows_N, columns_N = to_device(batch.counted_BS.nonzero().T.contiguous(), device)
    ids_BS = to_device(batch.input_ids_BS, device)
    targets_N = ids_BS[rows_N, columns_N + 1]
    request = HeadRequest(rows_N, columns_N, lambda logits_CV, part: nll(logits_CV, targets_N[part]))
    return forward(engine, ids_BS, batch.position_ids_BS, requests=[request]).values[0]


@dataclass(frozen=True)
class Multiplier:
    """The weight of the retain loss over the steps, α or PDU's, which a checkpoint keeps: ``alpha`` is the next step's.

    Attributes:
        pdu: settings of the dual step; None keeps α constant.
        bound: PDU's ε; None until the first step has shown the retain loss it derives from.
    """

    alpha: float
    pdu: PDUConfig | None = None
    bound: float | None = None

    @classmethod
    def of(cls, settings: UnlearningConfig, cursor: dict[str, Any]) -> Multiplier:
        """As a checkpoint's cursor left it, or as configured."""
        if settings.forget_loss != "pdu":
            return cls(settings.alpha)
        alpha, bound = cursor.get("pdu_multiplier", settings.alpha), cursor.get("pdu_bound", settings.pdu.retain_bound)
        return cls(alpha, settings.pdu, bound)

    def after(self, retain_loss: float) -> Multiplier:
        """The weight of the next step, given this step's (global) retain loss."""
        if self.pdu is None:
            return self
        bound = self.bound if self.bound is not None else FIRST_STEP_FACTOR * retain_loss
        return replace(self, alpha=dual_update(self.alpha, retain_loss, bound, self.pdu.dual_step), bound=bound)

    def cursor(self) -> dict[str, float]:
        """What a checkpoint must hold to go on exactly."""
        if self.pdu is None or self.bound is None:
            return {}
        return {"pdu_multiplier": self.alpha, "pdu_bound": self.bound}


@dataclass
class Unlearning(Goal):
    """γ·L_forget + α·L_retain, and SEUF's anchor where there is one.

    Attributes:
        multiplier: α of the next step.
        routers: GRIP's projection, or None.
    """

    settings: UnlearningConfig
    objective: ForgetRetain
    multiplier: Multiplier
    routers: Projection | None = None

    @property
    def factors(self) -> dict[str, float]:
        anchor = {"anchor": 1.0} if self.settings.seuf is not None else {}
        return {"forget": self.settings.gamma, "retain": self.multiplier.alpha} | anchor

    def terms(self, engine: Any, step: Step, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        batches = [batch.to(device) for batch in step.micro_batches]
        for batch, frozen in zip(batches, self.objective.frozen_states(batches), strict=True):
            yield self._terms(self.objective(engine, batch, frozen), batch, step)

    def _terms(self, losses: Losses, batch: MicroBatch, step: Step) -> dict[str, torch.Tensor]:
        counts = {"token": step.forget_tokens, "sequence": step.forget_sequences}
        weights_RS = batch.weights_BS[batch.forget_rows :]
        terms = {
            "forget": losses.forget / max(counts[losses.forget_per], 1),
            "retain": weighted_sum(losses.retain_RS, weights_RS) / max(step.retain_tokens, 1),
        }
        if losses.penalty is not None:
            terms["anchor"] = losses.penalty / max(step.forget_tokens, 1)
        return terms

    def follow(self, losses: dict[str, float]) -> dict[str, float]:
        alpha = {"alpha": self.multiplier.alpha} if self.settings.forget_loss == "pdu" else {}
        self.multiplier = self.multiplier.after(losses["retain"])
        return alpha

    def after_update(self, engine: Any, step: int) -> None:
        if self.routers is not None:
            self.routers.after_update(engine, step)

    def state(self) -> dict[str, Any]:
        return self.multiplier.cursor()
