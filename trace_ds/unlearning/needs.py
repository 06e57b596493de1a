"""Which parts of the model, and of a frozen copy, the losses of a job need; without torch, for ``trace-ds plan``."""

from __future__ import annotations

from dataclasses import dataclass

from trace_ds.config.sections.unlearning import UnlearningConfig

FROZEN_LOGITS = ("undial", "kl")  # losses that compare logits with the frozen model's
MEASURED_SCALES = ("median_norm", "mean_norm")  # units of RMU's coefficient that are measured


def layers_held(settings: UnlearningConfig, decoder_layers: int) -> int | None:
    """Number of leading decoder layers that a job loads, without final norm and LM head; None: the whole model, because
    a loss or ``unlearning.evaluate.every`` needs its logits."""
    last = settings.last_layer(decoder_layers)
    return None if last is None or settings.evaluate.every else min(last + 1, decoder_layers)


@dataclass(frozen=True)
class FrozenNeeds:
    """The parts of a frozen copy that a step needs, of a model with ``decoder_layers``.

    Attributes:
        layer: decoder layer whose hidden states a loss uses; None: no loss does.
        logits, hidden: whether the copy's logits and its hidden states at ``layer`` are compared with in every step.
        forget, retain: which rows go through the copy.
        norms: whether the norms of its hidden states are measured before the first step (hidden_norms.py).
    """

    decoder_layers: int
    layer: int | None
    logits: bool
    hidden: bool
    forget: bool
    retain: bool
    norms: bool

    @classmethod
    def of(cls, settings: UnlearningConfig, decoder_layers: int) -> FrozenNeeds:
        """Those of a job's losses."""
        rmu, retain = settings.forget_loss == "rmu", settings.retain_term
        adaptive = rmu and settings.rmu.scale == "adaptive"
        layer = None
        if rmu or retain == "hidden_mse":
            layer = settings.rmu.layer if settings.rmu.layer is not None else decoder_layers // 2
        return cls(
            decoder_layers,
            layer,
            logits=settings.forget_loss in FROZEN_LOGITS or retain in FROZEN_LOGITS,
            hidden=adaptive or retain == "hidden_mse",
            forget=adaptive or settings.forget_loss in FROZEN_LOGITS,
            retain=retain != "nll",
            norms=layer is not None
            and (settings.rmu.sinks == "leave_out" or (rmu and settings.rmu.scale in MEASURED_SCALES)),
        )

    @property
    def stays(self) -> bool:
        """Whether the copy is there in every step."""
        return self.logits or self.hidden

    @property
    def layers(self) -> int:
        """Decoder layers of the copy, from the first one on."""
        return self.decoder_layers if self.logits or self.layer is None else min(self.layer + 1, self.decoder_layers)


def micro_batches_together(trained_rows: int, frozen_rows: int) -> int:
    """Number of micro-batches per pass of the frozen model, given the rows of one that go through either model.

    Without gradients a row takes half the memory or less: the copy has at most twice the rows of a training pass.
    """
    return max(1, 2 * trained_rows // max(frozen_rows, 1))
