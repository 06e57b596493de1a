"""``finetune``: the models that are made before there is something to unlearn."""

from __future__ import annotations

from pydantic import Field, model_validator

from trace_ds.config.names import ModelName
from trace_ds.config.sections.base import Integer, Number
from trace_ds.config.sections.training import TrainingConfig

TARGET, RETRAINED = "target", "retrained"  # models that `finetune` makes: the one that knows, the one that never saw


class FinetuneConfig(TrainingConfig):
    """Makes the run's model, and references for it, from ``model.path``: mean next-token loss, all parameters."""

    models: dict[ModelName, list[str]] = Field(
        description="Name -> the corpora (forget, retain, alternative) it is trained on. The target is the model of "
        "the later stages; the others are scored beside it, the one named retrained as the reference of PrivLeak.",
    )
    steps: Integer | None = Field(None, ge=1, description="Optimizer steps, instead of epochs.")
    epochs: Number | None = Field(
        None, gt=0, description="Passes over the rows, instead of steps; the last step is filled from the next pass."
    )
    batch_rows: Integer = Field(8, ge=1, description="Rows per step, over all processes.")

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
