"""What ``unlearning`` and ``finetune`` have in common (optimizer, ZeRO, checkpoints), and ``finetune``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_ds.config.sections.base import Integer, ModelName, Number, PathText, Section

BETAS = (0.9, 0.99)  # of AdamW
RESUME_TEXT = (
    "auto: go on from the newest complete checkpoint, if there is one; required: refuse to start without one; never: "
    "delete what is there and start; replace: as auto, but delete the checkpoints of another job (other data, settings "
    "or seed), which auto and required refuse."
)


class OptimizerConfig(Section):
    """AdamW; its betas are :data:`BETAS`."""

    lr: Number = Field(1e-5, gt=0)
    eps: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    gradient_clipping: Number = Field(1.0, ge=0, description="0: off.")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="The learning rate over the job's steps, without warm-up: constant, or transformers' linear or "
        "cosine decay from lr to 0. A job that decays can only be resumed with the same number of steps.",
    )


class TrainingConfig(Section):
    """What every training job has, whatever it trains for."""

    micro_batch_rows: Integer | None = Field(
        None, ge=1, description="Rows per process and forward pass (in unlearning: of each side)."
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


TARGET, RETRAINED = "target", "retrained"  # models that `finetune` makes: the one that knows, the one that never saw


class FinetuneConfig(Section):
    """Makes the run's model, and references for it, from ``model.path``: mean next-token loss, all parameters.

    Engine and checkpoints are configured in ``unlearning``: zero_stage, ds_config, save_every, and the optimizer's eps,
    gradient_clipping and schedule.
    """

    models: dict[ModelName, list[str]] = Field(
        description="Name -> the corpora (forget, retain, alternative) it is trained on. The target is the model of "
        "the later stages; the others are scored beside it, the one named retrained as the reference of PrivLeak.",
    )
    steps: Integer | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    epochs: Number | None = Field(
        None, gt=0, description="Passes over the rows, instead of steps; the last step is filled from the next pass."
    )
    batch_rows: Integer = Field(8, ge=1, description="Rows per step, over all processes.")
    micro_batch_rows: Integer | None = Field(None, ge=1, description="Rows per process and forward.")
    lr: Number = Field(1e-5, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    recompute: bool = Field(False, description="As unlearning.recompute.")
    resume: Literal["auto", "required", "never", "replace"] = Field("auto", description=RESUME_TEXT)

    @model_validator(mode="after")
    def _sound(self) -> FinetuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("finetune has either steps or epochs: give one of the two")
        if TARGET not in self.models:
            raise ValueError(f"finetune.models has no {TARGET}, which is the model of the later stages")
        for name, sides in self.models.items():
            if not sides or len(set(sides)) != len(sides):
                raise ValueError(f"finetune.models.{name} is no list of different corpora")
        return self


class FinetuneSettings(TrainingConfig):
    """The settings of a fine-tuning job: the section, completed from ``unlearning``."""

    models: dict[str, list[str]]
    steps: Integer | None
    epochs: Number | None
    batch_rows: Integer

    @classmethod
    def of(cls, own: FinetuneConfig, shared: TrainingConfig) -> FinetuneSettings:
        optimizer = shared.optimizer.model_copy(update={"lr": own.lr, "weight_decay": own.weight_decay})
        values = own.model_dump(exclude={"lr", "weight_decay"})
        engine = {key: getattr(shared, key) for key in ("zero_stage", "ds_config", "save_every")}
        return cls(optimizer=optimizer, **engine, **values)
