"""``unlearning``: losses, what is trained, how retain weights act, and what is looked at on the way."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_ds.config.sections.base import Integer, Number, Section
from trace_ds.config.sections.training import TrainingConfig


class RMUConfig(Section):
    layer: Integer | None = Field(
        None, ge=0, description="Decoder layer steered by rmu and held by hidden_mse; default: the middle."
    )
    coefficient: Number = Field(3.0, gt=0, description="Steering length c, in the unit that scale says.")
    scale: Literal["median_norm", "mean_norm", "absolute", "adaptive"] = Field(
        "median_norm",
        description="Unit of the coefficient: the median or mean norm of the frozen hidden states over forget tokens "
        "(attention sinks of pretrained models spoil the mean); 1 (as in the paper); or the frozen norm of each token "
        "by itself (Adaptive RMU).",
    )
    sinks: Literal["leave_out", "keep"] = Field(
        "leave_out",
        description="Attention sinks (first tokens of documents with hidden states over 10 medians long, found before "
        "the first step): left out of hidden-state losses, or not.",
    )


class NPOConfig(Section):
    beta: Number = Field(0.1, gt=0, description="Inverse temperature; acts on sequence sums of NLL.")


class SimNPOConfig(Section):
    beta: Number = Field(4.5, gt=0)
    delta: Number = 0.0


class DPOConfig(Section):
    beta: Number = Field(0.1, gt=0, description="Inverse temperature; acts on sequence sums of NLL.")


class WGAConfig(Section):
    beta: Number = Field(1.0, ge=0, description="Power of the token's probability that weights its ascent.")


class SatImpConfig(Section):
    beta1: Number = Field(5.0, ge=0, description="Power of p: how far saturation weights a token.")
    beta2: Number = Field(1.0, ge=0, description="Power of 1 - p: how far importance weights a token.")


class UNDIALConfig(Section):
    strength: Number = Field(10.0, gt=0, description="How much the frozen model's logit of the target is lowered.")


class PDUConfig(Section):
    retain_bound: Number | None = Field(
        None, gt=0, description="Largest retain loss allowed; default: 1.05 times that of the first step (ours)."
    )
    dual_step: Number = Field(1.0, gt=0, description="Step of the multiplier, which starts at alpha.")


class TrainableConfig(Section):
    include: list[str] = Field(
        default_factory=lambda: ["all"],
        min_length=1,
        description="What is trained: kinds (all, experts, attention, routers) or patterns of parameter names with *.",
    )
    exclude: list[str] = Field(default_factory=list, description="Kinds or patterns taken out again.")
    selected_experts: bool = Field(
        False, description="Of the experts, train the forget-critical ones only: the other rows stay as they are."
    )


class SEUFConfig(Section):
    """Baseline SEUF: train the experts of highest affinity of one layer and its router (instead of ``trainable``)."""

    layer: Integer | None = Field(
        None, ge=0, description="Decoder layer; default: that of the expert of highest affinity."
    )
    experts: Integer = Field(1, ge=1, description="M, experts trained.")
    anchor: Number = Field(1.0, ge=0, description="Weight of the router's anchor, a mean over forget tokens.")


class GRIPConfig(Section):
    """Baseline GRIP: every update of a router is projected, so that it keeps to what retain tokens selected."""

    tokens: Integer = Field(1024, ge=1, description="Retain inputs of each layer's router that it looks at.")
    steps: Integer = Field(8, ge=1, description="Steps whose retain rows are looked at, before training.")


class EvaluateConfig(Section):
    """Scores while training, on the sharded model: NLL and routing of fixed rows of both corpora."""

    every: Integer | None = Field(None, ge=1, description="Steps between evaluations; default: none.")
    rows: Integer = Field(32, ge=1, description="Rows of each corpus, evenly spaced; the same ones each time.")
    tasks: list[str] = Field(
        default_factory=list,
        description="Names of evaluation.tasks that are scored as well, on the model as it is being trained: the job's "
        "forgetting-utility curve, without a kept checkpoint. Each costs what it costs in evaluate, at every look.",
    )
    at_end: list[str] = Field(default_factory=list, description="Those of the tasks that the last look alone scores.")
    curve_only: bool = Field(
        False,
        description="The curve is all that is wanted, as in a study: RUN/curve.json, without step 0, is what the job "
        "leaves, also of a model that breaks down on the way; its checkpoints, which are there to go on from, go.",
    )
    target_forget_nll: Number | None = Field(
        None,
        gt=0,
        description="End the job, with a checkpoint, when the forget rows' mean NLL (nats a token) is at least this.",
    )
    until: dict[str, Number] = Field(
        default_factory=dict,
        description="End the job, with a checkpoint, when each score here is at most so much: 'TASK METRIC' of one of "
        "the tasks -> value.",
    )


class GuardsConfig(Section):
    """What to do when an evaluation finds that the model is breaking down."""

    max_retain_ratio: Number | None = Field(
        None, gt=1, description="Bound on the retain rows' NLL, in units of the frozen model's; default: none."
    )
    min_retain_overlap: Number | None = Field(
        None,
        gt=0,
        lt=1,
        description="Least share of the retain tokens' top-k experts that are still the frozen model's; default: none.",
    )
    action: Literal["stop", "back_off"] = Field(
        "stop",
        description="stop: end as a failure, the last checkpoint stands; back_off: halve the learning rate, and stop "
        "when max_back_offs halvings did not help. A state that breaks a bound is never saved.",
    )
    max_back_offs: Integer = Field(3, ge=1)

    @property
    def on(self) -> bool:
        return self.max_retain_ratio is not None or self.min_retain_overlap is not None


class UnlearningConfig(TrainingConfig):
    forget_loss: Literal["rmu", "graddiff", "npo", "simnpo", "dpo", "wga", "satimp", "undial", "ceu", "pdu"] = Field(
        "rmu", description="See docs/objectives.md."
    )
    retain_loss: Literal["nll", "kl", "hidden_mse"] | None = Field(
        None,
        description="nll, KL to the frozen model, or squared distance to its hidden states; default: hidden_mse under "
        "rmu, nll under the others. The retain weights multiply whichever it is.",
    )
    alpha: Number = Field(1.0, ge=0, description="Weight of the retain loss.")
    gamma: Number = Field(1.0, ge=0, description="Weight of the forget loss.")
    apply: Literal["sampling", "loss"] = Field(
        "sampling",
        description="How the retain weights act: sampling draws retain rows in proportion to their mean weight; loss "
        "multiplies the token losses (the literal reading of the abstract).",
    )
    steps: Integer = Field(100, ge=1)
    forget_rows: Integer = Field(8, ge=1, description="Forget rows per step, over all processes.")
    retain_rows: Integer = Field(8, ge=1, description="Retain rows per step, over all processes.")
    rmu: RMUConfig = RMUConfig()
    npo: NPOConfig = NPOConfig()
    simnpo: SimNPOConfig = SimNPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    guards: GuardsConfig = GuardsConfig()
    dpo: DPOConfig = DPOConfig()
    wga: WGAConfig = WGAConfig()
    satimp: SatImpConfig = SatImpConfig()
    undial: UNDIALConfig = UNDIALConfig()
    pdu: PDUConfig = PDUConfig()
    trainable: TrainableConfig = TrainableConfig()
    seuf: SEUFConfig | None = Field(None, description="The baseline SEUF, with any losses; default: off.")
    grip: GRIPConfig | None = Field(None, description="The baseline GRIP, with any losses; default: off.")

    def last_layer(self, decoder_layers: int) -> int | None:
        """The decoder layer at which both losses end; None when one of them needs the logits."""
        if self.forget_loss != "rmu" or self.retain_term != "hidden_mse":
            return None
        return self.rmu.layer if self.rmu.layer is not None else decoder_layers // 2

    @property
    def retain_term(self) -> str:
        """The retain loss that is used: the one asked for, or the forget loss's own."""
        return self.retain_loss or ("hidden_mse" if self.forget_loss == "rmu" else "nll")
