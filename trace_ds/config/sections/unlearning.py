"""``unlearning``: losses, trained parameters, how retain weights act, and scores while training."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator

from trace_ds.config.sections.base import Integer, Number, Section
from trace_ds.config.sections.training import TrainingConfig


class RMUConfig(Section):
    """Losses of hidden states: RMU, and ``hidden_mse`` (unlearning/losses.py)."""

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
    """NPO's constant."""

    beta: Number = Field(0.1, gt=0, description="Inverse temperature; acts on sequence sums of NLL.")


class SimNPOConfig(Section):
    """SimNPO's constant."""

    beta: Number = Field(4.5, gt=0)


class DPOConfig(Section):
    """DPO's constant."""

    beta: Number = Field(0.1, gt=0, description="Inverse temperature; acts on sequence sums of NLL.")


class SEUFConfig(Section):
    """Baseline SEUF: train the experts of highest affinity of one layer and its router (instead of ``trainable``)."""

    layer: Integer | None = Field(
        None, ge=0, description="Decoder layer; default: that of the expert of highest affinity."
    )
    experts: Integer = Field(1, ge=1, description="M, experts trained.")


class GRIPConfig(Section):
    """Baseline GRIP: every update of a router is projected, so that it keeps to what retain tokens selected."""

    tokens: Integer = Field(1024, ge=1, description="Retain tokens whose router inputs constrain each layer's update.")
    steps: Integer = Field(8, ge=1, description="Steps whose retain rows these tokens are taken from, before training.")


BOUND = re.compile(r"(\S+(?: \S+)?) (<=|>=) ([-+]?[0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)")
ROW_SCORES = ("forget_nll", "retain_nll", "forget_overlap", "retain_overlap")  # those of fixed rows of the corpora


@dataclass(frozen=True)
class Bound:
    """A bound on a score, ``"retain_nll <= 3.2"``."""

    score: str
    is_upper: bool
    value: float

    @classmethod
    def parse(cls, text: str) -> Bound:
        """``ValueError`` when it is none."""
        parts = BOUND.fullmatch(text)
        if parts is None:
            raise ValueError(
                f"{text!r} is no bound on a score, such as 'retain_nll <= 3.2' or 'questions accuracy >= 0.4'"
            )
        return cls(parts[1], parts[2] == "<=", float(parts[3]))

    def holds(self, value: float | None) -> bool:
        """Whether ``value`` meets the bound; None and NaN meet none."""
        return value is not None and (value <= self.value if self.is_upper else value >= self.value)

    def __str__(self) -> str:
        return f"{self.score} {'<=' if self.is_upper else '>='} {self.value:g}"


class EvaluateConfig(Section):
    """Scores while training, on the sharded model, and what ends the job.

    Bounds are on ``forget_nll`` and ``retain_nll`` (mean NLL of the rows, nats a token), ``forget_overlap`` and
    ``retain_overlap`` (share of the top-k experts that are still the frozen model's), and 'TASK METRIC' of the tasks.
    """

    every: Integer | None = Field(None, ge=1, description="Steps between evaluations; default: none.")
    rows: Integer = Field(
        32, ge=0, description="Rows of each corpus, evenly spaced, whose NLL and routing are scored; 0: none."
    )
    tasks: list[str] = Field(
        default_factory=list,
        description="Names of evaluation.tasks that are scored on the model as it is being trained: the job's "
        "forgetting-utility curve, RUN/curve.json. Each costs what it costs in evaluate, every time.",
    )
    until: list[str] = Field(
        default_factory=list,
        description="Bounds such as 'questions accuracy <= 0.3' or 'forget_nll >= 6'. The job ends, with a checkpoint, "
        "at the first evaluation at which all of them hold.",
    )
    guards: list[str] = Field(
        default_factory=list,
        description="Bounds such as 'retain_nll <= 3.2' or 'retain_overlap >= 0.7'. The job fails, saving nothing, at "
        "the first evaluation at which one of them does not hold: the last checkpoint stands.",
    )

    @field_validator("until", "guards")
    @classmethod
    def _are_bounds(cls, texts: list[str]) -> list[str]:
        for text in texts:
            Bound.parse(text)
        return texts

    def bounds(self, kind: Literal["until", "guards"]) -> list[Bound]:
        return [Bound.parse(text) for text in (self.until if kind == "until" else self.guards)]

    @property
    def compares_routing(self) -> bool:
        """Whether a bound is on the routing."""
        return any(bound.score.endswith("_overlap") for bound in [*self.bounds("until"), *self.bounds("guards")])


class UnlearningConfig(TrainingConfig):
    """The unlearning job: losses, their weights, rows of a step, trained parameters."""

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
    keep: Integer = Field(
        2,
        ge=0,
        description="Checkpoints kept; never fewer than the newest two. 0: none once the job is done, also where the "
        "model breaks down on the way: RUN/curve.json is what it leaves, as in a study.",
    )
    rmu: RMUConfig = RMUConfig()
    npo: NPOConfig = NPOConfig()
    simnpo: SimNPOConfig = SimNPOConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    dpo: DPOConfig = DPOConfig()
    trainable: list[str] = Field(
        default_factory=lambda: ["all"],
        min_length=1,
        description="What is trained: kinds (all, experts, selected_experts: the forget-critical ones alone, "
        "attention, routers) or patterns of parameter names with *; -KIND or -PATTERN takes out again.",
    )
    seuf: SEUFConfig | None = Field(None, description="The baseline SEUF, with any losses; default: off.")
    grip: GRIPConfig | None = Field(None, description="The baseline GRIP, with any losses; default: off.")

    @field_validator("keep")
    @classmethod
    def _keeps_two(cls, keep: int) -> int:
        if keep == 1:
            raise ValueError("must be 0, or 2 or more")
        return keep

    def last_layer(self, decoder_layers: int) -> int | None:
        """The decoder layer at which both losses end; None when one of them needs the logits."""
        if self.forget_loss != "rmu" or self.retain_term != "hidden_mse":
            return None
        return self.rmu.layer if self.rmu.layer is not None else decoder_layers // 2

    @property
    def retain_term(self) -> str:
        """The retain loss that is used: the one asked for, or the forget loss's own."""
        return self.retain_loss or ("hidden_mse" if self.forget_loss == "rmu" else "nll")
