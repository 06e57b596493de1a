"""``calibration``: which experts are forget-critical, and which rule weights the retain tokens."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from pydantic import Field, model_validator

from trace_ds.config.sections.base import Integer, Number, Section

# Those that are not to bring the forget-critical experts closer.
ControlRule = Literal["uniform", "permuted", "random_experts", "lowest_experts"]
Rule = Literal["raking", "literal", ControlRule]
CONTROL_RULES, RULES = get_args(ControlRule), get_args(Rule)

Layer = Annotated[Integer, Field(ge=0)]


class DetectionConfig(Section):
    """How forget-critical experts are detected (calibration/detect.py)."""

    min_load: Number = Field(1.0, ge=0, description="p_forget must be >= min_load * K / E.")
    min_ratio: Number = Field(1.25, gt=0, description="rho, the ratio that p_forget / p_retain must exceed.")
    layers: list[Layer] | Literal["trained"] | None = Field(
        "trained",
        description="Only these MoE layers (0-based); trained: those that the losses of unlearning train, which end at "
        "RMU's layer where no loss is made of logits; null: all.",
    )


class CalibrationConfig(Section):
    """The weights of the retain text (calibration/rules.py)."""

    detection: DetectionConfig = DetectionConfig()
    experts: Literal["all", "selected"] = Field("all", description="Experts whose frequencies the weights match.")
    rule: Rule = "raking"
    source_weights: dict[str, Annotated[Number, Field(gt=0)]] = Field(
        default_factory=dict,
        description="uniform: weight of the documents whose source matches a pattern ('near/*': 8.0) against 1 for all "
        "others, before the floor; where several patterns match, their product.",
    )
    ess_floor: Number = Field(
        0.5,
        gt=0,
        le=1,
        description="Least effective sample size (sum w)^2 / (n sum w^2) of rows, or of tokens (apply: loss).",
    )
    clip: Number = Field(20.0, gt=1, description="Largest ratio of frequencies asked of an expert.")
    if_none_found: Literal["stop", "uniform", "continue"] = Field(
        "stop",
        description="No forget-critical expert found: stop with exit status 2; go on with uniform weights; or continue "
        "with the rule over what experts says (all: every expert is matched; selected: nothing is, uniform weights).",
    )

    @model_validator(mode="after")
    def _sources(self) -> CalibrationConfig:
        if self.source_weights and self.rule != "uniform":
            raise ValueError(f"source_weights are the weights of rule: uniform, not of rule: {self.rule}")
        return self
