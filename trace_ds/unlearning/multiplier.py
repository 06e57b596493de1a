"""The weight of the retain loss over the steps: α, or PDU's multiplier, which a checkpoint keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from trace_ds.config.schema import PDUConfig, UnlearningConfig
from trace_ds.unlearning.objectives import dual_update

FIRST_STEP_FACTOR = 1.05  # the default bound over the retain loss of the first step (our decision)


@dataclass(frozen=True)
class Multiplier:
    """``alpha`` multiplies the retain loss of the next step.

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
