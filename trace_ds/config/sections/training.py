"""What ``unlearning`` and ``finetune`` have in common: optimizer, ZeRO, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from trace_ds.config.sections.base import Integer, Number, PathText, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Section):
    lr: Number = Field(1e-5, gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), strict=False)  # YAML has lists, no tuples
    eps: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    gradient_clipping: Number = Field(1.0, ge=0, description="0: off.")
    warmup_steps: Integer = Field(0, ge=0)


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
    expert_kernel: Literal["auto", "grouped_mm", "eager", "sonicmoe"] = Field(
        "auto",
        description="As statistics.expert_kernel, for the trained and the frozen model; auto: the choice of "
        "transformers, also on a GPU (deepgemm has no backward pass).",
    )
    deterministic: bool = Field(
        False,
        description="On a GPU, only kernels that add in a fixed order: slower, and a job that is stopped and goes on "
        "is bit for bit the undisturbed one (as it always is on the CPU).",
    )
    save_every: Integer = Field(50, ge=1, description="Steps between checkpoints; the last step is always saved.")
    save_in_background: bool = Field(
        True,
        description="Training waits only until the state is copied to host memory, not until the checkpoint is "
        "written; all the same where there is no room for the copy, and for the last checkpoint.",
    )
    keep: Integer = Field(2, ge=2, description="Checkpoints kept; never fewer than the newest two.")
    keep_every: Integer | None = Field(None, ge=1, description="Steps that are a multiple of this are never pruned.")
    resume: Literal["auto", "required", "never", "replace"] = Field(
        "auto",
        description="auto: go on from the newest complete checkpoint, if there is one; required: refuse to start "
        "without one; never: delete what is there and start; replace: as auto, but delete the checkpoints of another "
        "job (other data, settings or seed), which auto and required refuse.",
    )
    log_every: Integer = Field(1, ge=1)

    @property
    def experts_implementation(self) -> str | None:
        """What is asked of transformers; None: its own choice."""
        return None if self.expert_kernel == "auto" else self.expert_kernel

    def kept_steps(self, steps: int) -> list[int]:
        """The steps whose checkpoints a job of ``steps`` steps leaves."""
        if self.keep == 0:
            return []
        saved = sorted({*range(self.save_every, steps + 1, self.save_every), steps})
        curve = [step for step in saved[: -self.keep] if self.keep_every and step % self.keep_every == 0]
        return [*curve, *saved[-self.keep :]]
