"""The typed configuration of a run, strict: an unknown key is an error.

The keys below ``NAME:`` are in ``sections/NAME.py``; here are the sections of a few keys, and what must hold
between sections. Every field has a default that works, except the paths of the model and of the corpora. The
description of each field is its documentation; ``trace-ds run CONFIG --dry-run`` prints the resolved values.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trace_ds.config.sections.base import ExpertParallelSize, Integer, Name, PathText, Section, Seed
from trace_ds.config.sections.bench import BenchConfig
from trace_ds.config.sections.calibration import CalibrationConfig
from trace_ds.config.sections.data import DataConfig
from trace_ds.config.sections.evaluation import EvaluationConfig
from trace_ds.config.sections.training import FinetuneConfig
from trace_ds.config.sections.unlearning import ROW_SCORES, UnlearningConfig
from trace_ds.errors import listed


class ModelConfig(Section):
    """The model to unlearn from and its tokenizer."""

    path: PathText = Field(
        description="Hugging Face model directory (safetensors), or its name on the hub, ORG/NAME or ORG/NAME@REVISION "
        "(a directory that is there wins)."
    )
    tokenizer: PathText | None = Field(None, description="The tokenizer's, likewise; default: the model's.")
    dtype: Literal["bf16", "fp32"] = Field(
        "bf16", description="Of the parameters in the forward pass, and of the model that is written."
    )

    @property
    def tokenizer_path(self) -> str:
        """The directory (or name) of the tokenizer that is used."""
        return self.tokenizer or self.path


class DistributedConfig(Section):
    """The processes of a job and how they share the experts."""

    nproc: Integer | None = Field(
        None, ge=1, description="Local processes when started without a launcher; default: one per GPU, else 1."
    )
    ep: ExpertParallelSize = Field(
        1,
        description="Expert-parallel size; divides the experts and the world size. auto: the largest that does, and is "
        "not larger than a node.",
    )
    threads: Integer = Field(
        1, ge=1, le=1024, description="CPU threads of each process (fixed: results depend on it bitwise)."
    )
    deterministic: bool = Field(
        False,
        description="Training on a GPU uses only kernels that add in a fixed order: slower, and a job that is stopped "
        "and resumed equals the undisturbed one bit for bit (as it always does on the CPU).",
    )
    timeout_minutes: Integer = Field(30, ge=1, le=525_600, description="Process-group timeout.")


class StatisticsConfig(Section):
    """What `collect` records of the frozen model."""

    batch_rows: Integer = Field(8, ge=1, description="Rows per process and forward pass.")
    save_every: Integer = Field(200, ge=0, description="Batches between saved states of a collection (0: none).")
    trace: bool | None = Field(
        None,
        description="Record the top-k experts of every token; default: where another key needs them (the log says "
        "which; docs/method.md, section 8, what they take).",
    )
    nll: bool = Field(False, description="Record the frozen model's loss of every token (needed by NPO).")


class Config(Section):
    """A whole run. ``variants`` are further runs that differ only in the named keys (a fair comparison)."""

    name: Name
    seed: Seed = 0
    model: ModelConfig
    data: DataConfig
    finetune: FinetuneConfig | None = Field(
        None, description="Make the model to unlearn from model.path first; default: model.path is that model."
    )
    distributed: DistributedConfig = DistributedConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    unlearning: UnlearningConfig = UnlearningConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    bench: BenchConfig | None = Field(None, description="The study that `trace-ds bench` runs with this recipe.")
    variants: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="Name -> {dotted.key: value}: run by `trace-ds run` under RUN/variants/NAME, sharing the data and "
        "the statistics, and compared in the report. Only calibration.* and unlearning.* may differ.",
    )

    @model_validator(mode="after")
    def _unlearning_needs(self) -> Config:
        if self.unlearning.seuf is not None and self.unlearning.trainable != ["all"]:
            raise ValueError("unlearning.seuf chooses what is trained itself: leave unlearning.trainable out")
        loss = self.unlearning.forget_loss
        if loss in ("npo", "dpo") and not self.statistics.nll:
            raise ValueError(f"unlearning.forget_loss {loss} needs statistics.nll: true (the frozen model's losses)")
        if loss == "dpo" and not self.data.alternative:
            raise ValueError(
                "unlearning.forget_loss dpo needs data.alternative: refusals, or a file of the texts to prefer"
            )
        if self.calibration.rule == "literal" and self.unlearning.apply != "loss":
            raise ValueError("calibration.rule: literal gives weights of tokens: it needs unlearning.apply: loss")
        self._check_finetune()
        self._check_scores()
        for name, changes in self.variants.items():
            for key in changes:
                if key.split(".")[0] not in ("calibration", "unlearning"):
                    raise ValueError(f"variants.{name} may not change {key}: only calibration and unlearning")
        return self

    def _check_scores(self) -> None:
        evaluate = self.unlearning.evaluate
        for key in ("tasks", "until", "guards"):
            if getattr(evaluate, key) and evaluate.every is None:
                raise ValueError(f"unlearning.evaluate.{key} needs unlearning.evaluate.every")
        if self.unlearning.keep == 0 and not evaluate.tasks:
            raise ValueError("unlearning.keep 0 needs unlearning.evaluate.tasks: the curve is all that the job leaves")
        names = [task.name for task in self.evaluation.tasks]
        for name in evaluate.tasks:
            if name not in names:
                raise ValueError(
                    f"unlearning.evaluate.tasks names {name!r}, which is not among evaluation.tasks "
                    f"({', '.join(names) or 'there are none'})"
                )
        for bound in [*evaluate.bounds("until"), *evaluate.bounds("guards")]:
            task, _, metric = bound.score.partition(" ")
            if not (task in evaluate.tasks if metric else evaluate.rows and task in ROW_SCORES):
                raise ValueError(
                    f"unlearning.evaluate: {bound.score!r} is not scored while the job trains: use "
                    f"{', '.join(ROW_SCORES)} or 'TASK METRIC' of its tasks ({listed(evaluate.tasks)})"
                )

    def _check_finetune(self) -> None:
        if self.finetune is None:
            return
        if self.bench is not None:
            raise ValueError("a study trains no model of its own: name one in model.path, and leave finetune out")
        for name, sides in self.finetune.models.items():
            for side in sides:
                if side not in self.data.sides:
                    raise ValueError(
                        f"finetune.models.{name}: there is no corpus {side!r}; data has {', '.join(self.data.sides)}"
                    )
        if clash := sorted(self.finetune.models.keys() & self.evaluation.models.keys()):
            raise ValueError(f"finetune.models and evaluation.models both have a model {clash[0]!r}")
