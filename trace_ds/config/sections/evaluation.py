"""``evaluation``: tasks, models that are scored beside the run's own, relearning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from trace_ds.config.sections.base import (
    UNLEARNED,
    ExpertParallelSize,
    Integer,
    ModelName,
    Name,
    Number,
    PathText,
    Section,
)
from trace_ds.config.sections.data import ConfigText, DatasetText, PathOrDataset, SplitText, require_place

TaskColumn = Literal[
    "prompt",
    "choices",
    "answer",
    "continuation",
    "question",
    "text",
    "paraphrased_answer",
    "perturbed_answer",
    "id",
    "source",
]


class TaskConfig(PathOrDataset, Section):
    """One evaluation task; ``role`` says which way is good: forget (lower), utility (higher)."""

    name: Name
    type: Literal["choice", "verbatim", "perplexity", "knowmem", "membership", "tofu", "lm_eval"]
    headline: str | None = Field(
        None,
        description="The metric that the report begins with and averages over. Where any task has one, those without "
        "are left out; where none has, it is the first metric of every task, perplexities aside.",
    )
    path: PathText = Field("", description="The task's file; not for lm_eval.")
    role: Literal["forget", "utility"]
    examples: PathText | None = Field(
        None,
        description="knowmem: file (with dataset: split) of the solved questions in the prompt (MUSE: ten).",
    )
    holdout: PathText | None = Field(
        None, description="membership: file (with dataset: split) of texts like the members that no model ever saw."
    )
    task: str | None = Field(None, description="lm_eval: its name there, such as wmdp_bio or mmlu.")
    include_path: PathText | None = Field(
        None, description="lm_eval: folder with tasks of your own (its YAML files), as the command's --include_path."
    )
    num_fewshot: Integer | None = Field(
        None, ge=0, description="lm_eval: solved examples in the prompt; default: the task's own number."
    )
    apply_chat_template: bool = Field(False, description="lm_eval: ask through the tokenizer's chat template.")
    dataset: DatasetText = None
    config: ConfigText = None
    split: SplitText = None
    columns: dict[TaskColumn, str] = Field(
        default_factory=dict, description="Our names of the columns -> theirs, where they differ: {answer: gt}."
    )

    @model_validator(mode="after")
    def _files_fit_the_type(self) -> TaskConfig:
        for key, kind in (("examples", "knowmem"), ("holdout", "membership"), ("task", "lm_eval")):
            if (getattr(self, key) is not None) != (self.type == kind):
                raise ValueError(f"task {self.name}: a {kind} task needs {key}, and no other has one")
        if self.type == "lm_eval":
            for key in ("path", "dataset", "config", "split", "columns"):
                if getattr(self, key):
                    raise ValueError(f"task {self.name}: lm_eval brings its own data, {key} is for other types")
        else:
            require_place(f"task {self.name}", self.path, self.dataset, config=self.config)
        return self

    @model_validator(mode="after")
    def _prompt_keys(self) -> TaskConfig:
        has_prompt_keys = self.num_fewshot is not None or self.apply_chat_template or self.include_path is not None
        if has_prompt_keys and self.type != "lm_eval":
            keys = "include_path, num_fewshot and apply_chat_template"
            raise ValueError(f"task {self.name}: {keys} are keys of lm_eval tasks")
        return self


class RelearningConfig(Section):
    """The relearning attack: fine-tune on a tenth of the forget rows, then score."""

    steps: Integer = Field(20, ge=1)
    lr: Number = Field(1e-4, gt=0, le=100)


class EvaluationConfig(Section):
    """What `evaluate` scores: tasks, models, relearning and drift, and on how many processes."""

    tasks: list[TaskConfig] = Field(default_factory=list)
    models: dict[ModelName, PathText] = Field(
        default_factory=dict,
        description="Further models scored beside the original and the unlearned one, for example {gold: PATH}; "
        "directories, or names on the hub.",
    )
    batch_rows: Integer = Field(64, ge=1)
    nproc: Integer = Field(
        1, ge=1, description="Local processes when started without a launcher; they share the batches."
    )
    ep: ExpertParallelSize = Field(
        1,
        description="Expert-parallel size: processes that share a model's experts; 1: none; auto: as distributed.ep.",
    )
    zero_stage: Literal[0, 3] = Field(
        0, description="3: every weight is partitioned over the processes; 0: the experts alone are (ep 1: nothing is)."
    )
    relearning: RelearningConfig | None = Field(
        None, description="Run this attack on the unlearned (and the retrained) model; needs memory for gradients too."
    )
    drift: bool = Field(True, description="Routing drift of the unlearned model on both corpora.")
    max_new_tokens: Integer = Field(128, ge=1, description="verbatim, tofu: tokens generated.")

    @property
    def retrained(self) -> str:
        """Which of the models never saw the forget set: the one of that name, else gold."""
        return "retrained" if "retrained" in self.models else "gold"

    @property
    def needs_data(self) -> bool:
        """Whether the run's token datasets are read: for the drift, and by the attacker who learns again."""
        return self.drift or self.relearning is not None

    @property
    def attacked(self) -> tuple[str, ...]:
        """The models that are attacked: the unlearned one, and the retrained one as the reference."""
        return (UNLEARNED, self.retrained) if self.relearning is not None else ()
