"""What ``unlearning`` and ``finetune`` have in common: optimizer, ZeRO, checkpoints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trace_ds.config.sections.base import Integer, Number, PathText, Section

BETAS = (0.9, 0.99)  # of AdamW
RESUME_TEXT = (
    "auto: go on from the newest complete checkpoint, if there is one; required: refuse to start without one; never: "
    "delete what is there and start; replace: as auto, but delete the checkpoints of another job (other data, settings "
    "or seed), which auto and required refuse."
)


class OptimizerConfig(Section):
    lr: Number = Field(1e-5, gt=0)
    eps: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    gradient_clipping: Number = Field(1.0, ge=0, description="0: off.")


class TrainingConfig(Section):
    """What every training job has, whatever it trains for."""

    micro_batch_rows: Integer | None = Field(
        None, ge=1, description="Rows (of unlearning: forget rows, and retain rows) per process and forward."
    )
    zero_stage: Literal[1, 2, 3] = 3
    ds_config: PathText | None = Field(None, description="DeepSpeed JSON file whose keys are added (see ds_configs/).")
    optimizer: OptimizerConfig = OptimizerConfig()
    recompute: bool = Field(
        False,
        description="Keep only each decoder layer's input and compute its activations again in the backward pass: much "
        "less memory for a third more compute (`trace-ds plan` shows both).",
    )
    save_every: Integer = Field(50, ge=1, description="Steps between checkpoints; the last step is always saved.")
    keep: Integer = Field(2, ge=2, description="Checkpoints kept; never fewer than the newest two.")
    resume: Literal["auto", "required", "never", "replace"] = Field(
        "auto",
        description=RESUME_TEXT,
    )

    def kept_steps(self, steps: int) -> list[int]:
        """The steps whose checkpoints a job of ``steps`` steps leaves."""
        if self.keep == 0:
            return []
        saved = sorted({*range(self.save_every, steps + 1, self.save_every), steps})
        return saved[-self.keep :]
