"""The typed configuration of a run: one pydantic model per stage, strict (an unknown key is an error).

Every field has a default that works, except the paths of the model and of the corpora. The description of each field
is its documentation; ``trace-ds run CONFIG --dry-run`` prints the resolved values.
"""

from __future__ import annotations

import difflib
import os
import string
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from trace_ds.config.names import UNLEARNED, ModelName, Name

# Those that are not to bring the forget-critical experts closer: baseline, controls, oracle.
CONTROL_RULES = ("uniform", "permuted", "random_experts", "lowest_experts", "inverse", "sources")
RULES = ("raking", "ratio_mean", "ratio_max", *CONTROL_RULES)
WITHOUT_TRACE = ("uniform", "sources")  # no routing is needed for their weights
TARGET, RETRAINED = "target", "retrained"  # models that `finetune` makes: the one that knows, the one that never saw

T = TypeVar("T", int, float)
LARGEST, FP32_LARGEST = 10**9, 3.4e38
MAX_NAME_BYTES, MAX_PATH_BYTES = 255, 4095


def expanded(path: str) -> str:
    """``~`` in place of the home directory, here and nowhere else; no name that a file cannot have."""
    path = os.path.expanduser(path)  # noqa: PTH111 (which would fail for ~nobody)
    try:
        encoded = path.encode()
    except UnicodeEncodeError:
        raise ValueError("a path cannot hold lone surrogates") from None
    if b"\0" in encoded:
        raise ValueError("a path cannot hold the character NUL")
    if len(encoded) > MAX_PATH_BYTES or max(map(len, encoded.split(b"/"))) > MAX_NAME_BYTES:
        raise ValueError(f"no file can have a name over {MAX_NAME_BYTES} or a path over {MAX_PATH_BYTES} bytes")
    return path


PathText = Annotated[str, AfterValidator(expanded)]


def _bounded(value: T) -> T:
    limit = LARGEST if isinstance(value, int) else FP32_LARGEST
    if abs(value) > limit:
        raise ValueError(f"no number here can be above {limit:,}")
    return value


# Every number is bounded (a validator, since a second `le` would take the place of a field's own).
Integer = Annotated[int, AfterValidator(_bounded)]
Number = Annotated[float, AfterValidator(_bounded)]
Layer = Annotated[Integer, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """Base of all sections: unknown keys are refused, values are not coerced between kinds, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, found: Any) -> Any:
        unknown = [str(key) for key in found if key not in cls.model_fields] if isinstance(found, dict) else []
        if unknown:
            close = difflib.get_close_matches(unknown[0], cls.model_fields, 1, cutoff=0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"valid keys here: {', '.join(cls.model_fields)}"
            raise PydanticCustomError("unknown_key", "unknown key", {"key": unknown[0], "hint": hint})
        return found


class ModelConfig(Section):
    path: PathText = Field(
        description="Hugging Face model directory (safetensors), or its name on the hub, ORG/NAME or ORG/NAME@REVISION "
        "(a directory that is there wins)."
    )
    tokenizer: PathText | None = Field(None, description="The tokenizer's, likewise; default: the model's.")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="Parameter type of the forward pass.")

    @property
    def tokenizer_path(self) -> str:
        """The directory (or name) of the tokenizer that is used."""
        return self.tokenizer or self.path


DatasetText = Annotated[
    PathText | None,
    Field(
        description="Instead of a path: a data set's id on the Hugging Face hub (taken from the cache of datasets, or "
        "downloaded into it), or a directory in the hub's layout."
    ),
]
ConfigText = Annotated[str | None, Field(description="dataset: which of its configurations; default: the only one.")]
SplitText = Annotated[
    str | None, Field(description="dataset, and a path to what save_to_disk left: its split; default: train.")
]
RevisionText = Annotated[str | None, Field(description="dataset on the hub: a commit, tag or branch; default: main.")]


def _one_place(found: CorpusEntry | TaskConfig, name: str) -> None:
    """ValueError unless it names a path or a data set, and what goes with it."""
    if not found.path and not found.dataset:
        raise ValueError(f"{name} has no path and no dataset")
    if found.path and found.dataset:
        raise ValueError(f"{name} has a path and a dataset: give one")
    for key in ("config", "revision"):
        if getattr(found, key) is not None and not found.dataset:
            raise ValueError(f"{name} has a {key}, which goes with dataset, not with path")


class CorpusEntry(Section):
    """Documents: files, or a data set by name (docs/data.md shows every form)."""

    path: PathText = Field(
        "",
        description="A file (.jsonl, .json, .csv, .parquet, .txt; all but Parquet also .gz or .zst), a pattern with *, "
        "a folder of such files, or what datasets' save_to_disk left.",
    )
    dataset: DatasetText = None
    config: ConfigText = None
    split: SplitText = None
    revision: RevisionText = None
    field: str = Field("text", description="Column (key of a JSON object) with the text of a document.")
    template: str | None = Field(
        None,
        description="Makes a document of several columns, instead of field: 'Question: {question}\\nAnswer: {answer}'; "
        "{{ and }} stand for braces.",
    )
    rows: Integer | None = Field(None, ge=1, description="Only the first so many rows (documents of a text file).")
    source: str | None = Field(
        None,
        description="Name shown in reports; default: the row's own 'source', else the name of the file or data set.",
    )
    separator: str | None = Field(None, description="Splits a text file into documents; default: the file is one.")

    @property
    def place(self) -> str:
        """What is read."""
        return self.path or self.dataset or ""

    @property
    def parts(self) -> list[tuple[str, str | None]]:
        """The text of a document: pieces of it as they stand, each followed by the value of a column (or by none)."""
        if self.template is None:
            return [("", self.field)]
        found = []
        for text, column, style, conversion in string.Formatter().parse(self.template):
            if column == "" or style or conversion:
                raise ValueError(
                    "a template holds names of columns in braces, such as {question}, and nothing else there"
                )
            found.append((text, column))
        return found

    @property
    def columns(self) -> list[str]:
        """The columns that make the text of a document."""
        return list(dict.fromkeys(column for _, column in self.parts if column is not None))

    @model_validator(mode="after")
    def _says_where(self) -> CorpusEntry:
        _one_place(self, "a corpus")
        if self.template is not None and self.field != "text":
            raise ValueError("field and template exclude each other: give one")
        try:
            if not self.columns:
                raise ValueError("the template names no column: write for example {question}")
        except ValueError as error:  # str.format's own are terse: expected '}' before end of string
            raise ValueError(f"template: {error}") from None
        return self


class DataConfig(Section):
    forget: list[CorpusEntry] = Field(min_length=1)
    retain: list[CorpusEntry] = Field(min_length=1)
    alternative: list[CorpusEntry] = Field(
        default_factory=list,
        description="dpo: texts preferred to the forget ones (refusals, for IdkDPO); row i of the forget corpus is "
        "paired with row i modulo their number. Pack 'whole', one document per row, to pair documents.",
    )
    context_length: Integer = Field(
        2048, ge=2, le=1 << 24, description="Tokens of a row (and the longest piece of a document)."
    )
    packing: Literal["dense", "whole"] = Field(
        "dense",
        description="dense: rows are cut from the stream of documents, no padding; whole: a document that fits into a "
        "row is never cut. Attention never crosses documents in either.",
    )
    documents_per_row: Integer | None = Field(
        None, ge=1, description="Upper bound of documents in a row; default: none."
    )
    add_bos: bool = True
    add_eos: bool = True
    num_proc: Integer | None = Field(
        None,
        ge=1,
        le=1024,
        description="Threads that tokenise; default: the cores it may use, up to 16. The data are the same whatever "
        "their number.",
    )

    @property
    def sides(self) -> tuple[str, ...]:
        """The corpora there are: the fields of that name, the datasets and the statistics made of them."""
        return ("forget", "retain", *(["alternative"] if self.alternative else []))


class AutoEPConfig(Section):
    """How AutoEP does its work where ``distributed.ep`` is above 1, in its own words; by default as it chooses."""

    comm_backend: Literal["comm", "deepep"] = Field(
        "comm", description="deepep: tokens travel by DeepEP's kernels (bf16; package deep_ep, NCCL >= 2.30.4)."
    )
    comm_max_tokens_per_rank: Integer = Field(
        0, ge=0, description="deepep: most tokens of a process in a forward pass: its rows times data.context_length."
    )
    comm_num_sm: Integer = Field(12, ge=1, description="deepep: the GPU's processors that move tokens.")
    comm_qp_margin: Integer = Field(4, ge=0, description="deepep: queue pairs beyond one for each of them.")
    row_weighting_impl: Literal["auto", "eager", "fused"] = Field("auto", description="deepep: fused: one kernel.")
    combine_impl: Literal["auto", "weighted_sum", "fused_weighted_sum", "legacy_bmm"] = Field(
        "auto", description="comm: how a token's experts are added up; fused_weighted_sum: one kernel."
    )
    gate_up_impl: Literal["separate", "fused"] = Field(
        "separate", description="fused: gate and up in one product, their weights laid side by side at each call."
    )
    async_split_plan: bool = Field(False, description="comm: let the host learn the counts beside the GPU's work.")

    @property
    def options(self) -> dict[str, Any]:
        """What is not AutoEP's own default."""
        return self.model_dump(exclude_defaults=True)


class DistributedConfig(Section):
    nproc: Integer | None = Field(
        None, ge=1, description="Local processes when started bare; default: accelerators or 1."
    )
    ep: Integer = Field(1, ge=1, description="Expert-parallel size; divides the experts and the world size.")
    autoep: AutoEPConfig = AutoEPConfig()
    threads: Integer = Field(
        1, ge=1, le=1024, description="CPU threads of each process (fixed: results depend on it bitwise)."
    )
    timeout_minutes: Integer = Field(30, ge=1, le=525_600, description="Process-group timeout.")


class StatisticsConfig(Section):
    batch_rows: Integer = Field(8, ge=1, description="Rows per process and forward pass.")
    expert_kernel: Literal["auto", "grouped_mm", "eager", "sonicmoe", "deepgemm"] = Field(
        "auto",
        description="How a process computes its experts when ep is 1 (with more, AutoEP decides). auto: on a GPU eager "
        "for experts at least 8,192 wide, else the choice of transformers (grouped_mm where the family allows it). "
        "sonicmoe, deepgemm: kernels for Hopper in bf16, which transformers takes from the hub (pip install "
        "'trace-ds[hopper]'); auto where they cannot be used, and the log says why.",
    )
    save_every: Integer = Field(200, ge=0, description="Batches between saved states of a collection (0: none).")
    trace: bool | None = Field(
        None,
        description="Record the top-k experts of every token; default: where another key needs them (the log says "
        "which; docs/method.md, section 10, what they take).",
    )
    sample_tokens: Integer = Field(
        200_000,
        ge=1,
        description="Counted tokens of a corpus, spread over its documents, whose top-k experts are always recorded.",
    )
    recorded: dict[str, PathText] | None = Field(
        None,
        description="Corpus -> file of the experts that vLLM returned for it (docs/data.md): they are counted, and the "
        "model is not run.",
    )
    nll: bool = Field(False, description="Record the frozen model's loss of every token (needed by NPO).")
    hidden: bool = Field(
        False,
        description="Record the mean hidden state of every row (output of decoder layer num_hidden_layers // 2).",
    )


class DetectionConfig(Section):
    method: Literal["significance", "top_difference", "top_ratio", "top_kl", "top_gate_mass"] = "significance"
    min_load: Number = Field(1.0, ge=0, description="significance: p_forget must be >= min_load * K / E.")
    min_ratio: Number = Field(1.25, gt=0, description="significance: rho, the ratio the forget side must exceed.")
    false_discovery_rate: Number = Field(0.05, gt=0, lt=1, description="significance: Benjamini-Hochberg level.")
    top_n: Integer = Field(4, ge=1, description="top_*: experts selected (per layer or in all, see per_layer).")
    per_layer: bool = True
    ratio_floor: Number = Field(0.25, ge=0, description="top_ratio: retain frequencies are floored at this * K / E.")
    layers: list[Layer] | Literal["trained"] | None = Field(
        "trained",
        description="Only these MoE layers (0-based); trained: those that the losses of unlearning train, which end at "
        "RMU's layer where no loss is made of logits; null: all.",
    )
    exclude_layers: list[Layer] = Field(default_factory=list)


class RetrievalConfig(Section):
    """Which rows of the retain data (the pool) are used at all; the rule weights those."""

    rows: Number | None = Field(
        None, gt=0, description="Rows to keep: a whole number, or a fraction below 1 of the pool; default: all."
    )
    similarity: Literal["weight", "routing", "hidden", "tfidf"] = Field(
        "weight",
        description="weight: mean raking weight of the row; routing: cosine of expert profiles; hidden (needs "
        "statistics.hidden) and tfidf: cosines, the baselines.",
    )
    random_share: Number = Field(0.5, ge=0, le=1, description="Share of the kept rows that is drawn at random.")

    @model_validator(mode="after")
    def _whole(self) -> RetrievalConfig:
        if self.rows is not None and self.rows >= 1 and self.rows != int(self.rows):
            raise ValueError("a whole number of rows, or a fraction below 1")
        return self


class CalibrationConfig(Section):
    detection: DetectionConfig = DetectionConfig()
    experts: Literal["all", "selected"] = Field("all", description="Experts whose frequencies the weights match.")
    rule: Literal[
        "raking",
        "ratio_mean",
        "ratio_max",
        "uniform",
        "permuted",
        "random_experts",
        "lowest_experts",
        "inverse",
        "sources",
    ] = "raking"
    draw: Integer = Field(0, ge=0, description="random_experts: which of several draws (of one seed).")
    source_weights: dict[str, Annotated[Number, Field(gt=0)]] = Field(
        default_factory=dict,
        description="sources: weight of the documents whose source matches a pattern ('near/*': 8.0) against 1 for all "
        "others, before the floor; where several patterns match, their product.",
    )
    level: Literal["token", "row"] = Field(
        "token",
        description="row: one weight a row, from its selections and a sample of tokens (no trace), the floor being "
        "about rows.",
    )
    ess_floor: Number = Field(0.5, gt=0, le=1, description="Least effective sample size (sum w)^2 / (n sum w^2).")
    clip: Number = Field(20.0, gt=1, description="Largest ratio of frequencies asked of an expert.")
    if_none_found: Literal["stop", "uniform", "continue"] = Field(
        "stop",
        description="No forget-critical expert found: stop with exit status 2; go on with uniform weights; or continue "
        "with the rule over what experts says (all: every expert is matched; selected: nothing is, uniform weights).",
    )
    retrieve: RetrievalConfig = RetrievalConfig()
    export: Literal["none", "parquet"] = Field(
        "none", description="parquet: also write the weights as a Hugging Face dataset, RUN/export/*.parquet."
    )

    @model_validator(mode="after")
    def _sources(self) -> CalibrationConfig:
        if (self.rule == "sources") != bool(self.source_weights):
            raise ValueError("rule: sources and source_weights belong together: give both, or neither")
        if self.level == "row" and self.rule in ("ratio_mean", "ratio_max"):
            raise ValueError(f"level: row is for raking and its controls, not for rule: {self.rule}")
        return self


class OptimizerConfig(Section):
    lr: Number = Field(1e-5, gt=0)
    betas: tuple[Beta, Beta] = Field((0.9, 0.99), strict=False)  # YAML has lists, no tuples
    eps: Number = Field(1e-8, gt=0)
    weight_decay: Number = Field(0.0, ge=0)
    gradient_clipping: Number = Field(1.0, ge=0, description="0: off.")
    warmup_steps: Integer = Field(0, ge=0)


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
    """Baseline GRIP: routers keep to what retain tokens selected."""

    method: Literal["project", "realign"] = Field(
        "project",
        description="project (A): every update of a router is projected; realign (B): routers are fitted to the frozen "
        "ones' scores after the last step (a job that is given more steps later goes on from there).",
    )
    tokens: Integer = Field(1024, ge=1, description="project: retain inputs of each layer's router that it looks at.")
    steps: Integer = Field(8, ge=1, description="Steps whose retain rows are looked at, before training.")


class OnlineWeightsConfig(Section):
    step_size: Number = Field(0.3, gt=0, description="eta of theta <- theta + eta (p_forget - q_retain - decay theta).")
    decay: Number = Field(0.1, ge=0, description="Pulls theta back to 0 (uniform weights).")


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
        saved = sorted({*range(self.save_every, steps + 1, self.save_every), steps})
        curve = [step for step in saved[: -self.keep] if self.keep_every and step % self.keep_every == 0]
        return [*curve, *saved[-self.keep :]]


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
    weights: Literal["reference", "online"] = Field(
        "reference",
        description="Routing that decides a token's weight: reference (the frozen model's, as calibrated), online "
        "(theta follows, from 0, the live mismatch of the batches by dual ascent; with sampling, on top of rows drawn "
        "by reference weights).",
    )
    online: OnlineWeightsConfig = OnlineWeightsConfig()
    steps: Integer = Field(100, ge=1)
    forget_rows: Integer = Field(8, ge=1, description="Forget rows per step, over all processes.")
    retain_rows: Integer = Field(8, ge=1, description="Retain rows per step, over all processes.")
    snapshot_every: Integer | None = Field(
        None,
        ge=1,
        description="Steps between snapshots: the model's weights alone, as `convert` would write them, in "
        "RUN/snapshots/step_N. Training waits for them; all are kept. Default: none.",
    )
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

    @model_validator(mode="before")
    @classmethod
    def _older_default(cls, found: Any) -> Any:
        """A configuration written out by a version that had ``weights: live`` names its unused setting."""
        if isinstance(found, dict) and found.get("live") == {"refresh_steps": None}:
            return {key: value for key, value in found.items() if key != "live"}
        return found

    @field_validator("weights", mode="before")
    @classmethod
    def _no_live_weights(cls, found: Any) -> Any:
        if found == "live":
            raise ValueError("was taken out, it added nothing to reference (docs/method.md); use reference or online")
        return found

    def last_layer(self, decoder_layers: int) -> int | None:
        """The decoder layer at which both losses end; None when one of them needs the logits."""
        if self.forget_loss != "rmu" or self.retain_term != "hidden_mse":
            return None
        return self.rmu.layer if self.rmu.layer is not None else decoder_layers // 2

    @property
    def snapshots(self) -> int:
        """How many a job leaves."""
        return self.steps // self.snapshot_every if self.snapshot_every else 0

    @property
    def retain_term(self) -> str:
        """The retain loss that is used: the one asked for, or the forget loss's own."""
        return self.retain_loss or ("hidden_mse" if self.forget_loss == "rmu" else "nll")


class ConversionConfig(Section):
    dtype: Literal["bf16", "fp32", "same"] = Field("same", description="same: the run's model.dtype.")
    max_shard_size: str = "5GB"
    step: Integer | None = Field(None, ge=1, description="Checkpoint to convert; default: the newest.")


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


class TaskConfig(Section):
    """One evaluation task; ``role`` says which way is good: forget (lower), utility (higher)."""

    name: Name
    type: Literal["choice", "verbatim", "perplexity", "knowmem", "membership", "extraction", "tofu", "lm_eval"]
    path: PathText = Field("", description="The task's file; an lm_eval task without one is read from the hub.")
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
    revision: RevisionText = None
    columns: dict[TaskColumn, str] = Field(
        default_factory=dict, description="Our names of the columns -> theirs, where they differ: {answer: gt}."
    )

    @model_validator(mode="after")
    def _files_fit_the_type(self) -> TaskConfig:
        for key, kind in (("examples", "knowmem"), ("holdout", "membership"), ("task", "lm_eval")):
            if (getattr(self, key) is not None) != (self.type == kind):
                raise ValueError(f"task {self.name}: a {kind} task needs {key}, and no other has one")
        if self.type == "lm_eval":
            for key in ("dataset", "config", "split", "revision", "columns"):
                if getattr(self, key):
                    raise ValueError(f"task {self.name}: lm_eval brings its own data set; {key} is for other types")
        else:
            _one_place(self, f"task {self.name}")
        return self

    @model_validator(mode="after")
    def _prompt_keys(self) -> TaskConfig:
        asked = self.num_fewshot is not None or self.apply_chat_template or self.include_path is not None
        if asked and self.type != "lm_eval":
            keys = "include_path, num_fewshot and apply_chat_template"
            raise ValueError(f"task {self.name}: {keys} are keys of lm_eval tasks")
        if self.num_fewshot and self.path:
            raise ValueError(f"task {self.name}: a file holds no solved examples: leave out num_fewshot, or path")
        return self

    @property
    def place(self) -> str:
        """What its questions are read from."""
        return self.path or self.dataset or ""


class RelearningConfig(Section):
    """The relearning attack: fine-tune on a share of the forget corpus and score in between."""

    share: Number = Field(0.1, gt=0, le=1, description="Share of the forget rows that the attacker has.")
    steps: Integer = Field(20, ge=1)
    rows: Integer = Field(8, ge=1, description="Rows a step.")
    lr: Number = Field(1e-4, gt=0, le=100)
    score_every: Integer = Field(5, ge=1)


class EvaluationConfig(Section):
    tasks: list[TaskConfig] = Field(default_factory=list)
    models: dict[ModelName, PathText] = Field(
        default_factory=dict,
        description="Further models scored beside the original and the unlearned one, for example {gold: PATH}; "
        "directories, or names on the hub.",
    )
    references_only: bool = Field(
        False, description="Score the original and these models alone, which needs no unlearned one."
    )
    retrained: str = Field(
        "gold", description="Which of the models was trained without the forget set: PrivLeak is measured against it."
    )
    batch_rows: Integer = Field(64, ge=1)
    nproc: Integer = Field(1, ge=1, description="Local processes when started bare; they share out the batches.")
    ep: Integer = Field(1, ge=1, description="So many processes share the experts of a model; 1: each holds them all.")
    zero_stage: Literal[0, 3] = Field(
        0, description="3: a process holds a part of every weight, 0: of the experts only, or (ep 1) a whole model."
    )
    checkpoints: bool = Field(False, description="Also score every kept checkpoint: the forgetting-utility curve.")
    relearning: RelearningConfig | None = Field(
        None, description="Attack the unlearned (and the retrained) model so; the weights need their gradients too."
    )
    expert_forcing: bool = Field(
        False, description="Attack them by sending forget queries through other experts than the router's."
    )
    drift: bool = Field(True, description="Routing drift of the unlearned model on both corpora.")
    drift_rows: Integer = Field(256, ge=1, description="Rows of each corpus used for the drift.")
    max_new_tokens: Integer = Field(128, ge=1, description="verbatim, tofu: tokens generated.")

    @property
    def needs_data(self) -> bool:
        """Whether the run's token datasets are read: for the drift, and by the attacker who learns again."""
        return self.drift or self.relearning is not None

    @property
    def attacked(self) -> tuple[str, ...]:
        """The models that are attacked: the unlearned one, and the retrained one as the reference."""
        return (UNLEARNED, self.retrained) if self.relearning is not None or self.expert_forcing else ()


class ReportConfig(Section):
    title: str | None = None


class BenchConfig(Section):
    """A study: forget losses x methods x a grid of strengths x seeds, compared at matched forgetting.

    Every run is a job of `trace-ds unlearn`; the recipe's own values of the grid's keys are the point that all share.
    """

    regime: Literal["standard", "scarce", "absent", "entangled"] | None = Field(
        None, description="Make the demo's inputs of this regime for every seed; null: the recipe names its own."
    )
    seeds: list[Seed] = Field(default_factory=lambda: [0, 1, 2, 3, 4, 5], min_length=2)
    screening: list[Seed] | None = Field(
        None,
        min_length=1,
        description="Seeds on which the grid is tried; on `seeds`, which are others, only what was best there (and the "
        "recipe's own point) is run and told. null: the grid is tried on `seeds`, each fold choosing for the other.",
    )
    baseline: str = Field("uniform", description="The method all others are compared with.")
    methods: dict[Name, dict[str, Any]] = Field(description="Name -> {dotted.key: value}.", min_length=2)
    losses: dict[Name, dict[str, Any]] = Field(
        {"recipe": {}}, description="Forget losses: name -> {dotted.key: value}.", min_length=1
    )
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="Strengths to choose from, in the order of tuning: dotted.key -> values."
    )
    grids: dict[str, dict[str, list[Any]]] = Field(
        default_factory=dict, description="Other values for one METHOD, one LOSS, or one 'LOSS METHOD' (wins last)."
    )
    score_every: Integer = Field(10, ge=1, description="Steps between scores; the last step is always scored.")
    score_at_end: list[str] = Field(
        default_factory=list, description="Tasks scored after the last step only (scoring is most of a run's time)."
    )
    margin: Number = Field(
        0.03, ge=0, description="Forgotten: a forget score of at most the gold model's, or chance, plus this."
    )
    forget: str = Field(description="'TASK METRIC' that says what is forgotten (lower is more).")
    utility: list[str] = Field(
        min_length=1,
        description="'TASK METRIC' or 'TASK METRIC SOURCES' (a pattern such as near/*). The first one, where higher is "
        "better, is what strengths are chosen by.",
    )

    @model_validator(mode="after")
    def _names_agree(self) -> BenchConfig:
        if self.baseline not in self.methods:
            raise ValueError(f"the baseline {self.baseline!r} is not among the methods {', '.join(self.methods)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds one number twice")
        if both := sorted(set(self.seeds) & set(self.screening or ())):
            raise ValueError(f"seed {both[0]} is among screening and seeds: strengths are confirmed on other seeds")
        known = {*self.methods, *self.losses, *(f"{a} {b}" for a in self.losses for b in self.methods)}
        for name in self.grids:
            if name not in known:
                raise ValueError(f"grids names {name!r}, which is no method, loss or 'LOSS METHOD'")
            for key in self.grids[name]:
                if key not in self.grid:
                    raise ValueError(f"grids.{name} has {key}, which grid lacks: it would be run and never tuned")
        sections = [*self.methods.values(), *self.losses.values(), self.grid, *self.grids.values()]
        for key in {key for section in sections for key in section}:
            if key.split(".")[0] not in ("calibration", "unlearning"):
                raise ValueError(f"a study may not change {key}: only calibration and unlearning")
        return self


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
    conversion: ConversionConfig = ConversionConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    report: ReportConfig = ReportConfig()
    bench: BenchConfig | None = Field(None, description="The study that `trace-ds bench` runs with this recipe.")
    variants: dict[Name, dict[str, Any]] = Field(
        default_factory=dict,
        description="Name -> {dotted.key: value}: run by `trace-ds run` under RUN/variants/NAME, sharing the data and "
        "the statistics, and compared in the report. Only calibration.*, unlearning.* and conversion.* may differ.",
    )

    @property
    def conversion_dtype(self) -> str:
        """The type that checkpoints of the run are converted to."""
        return self.model.dtype if self.conversion.dtype == "same" else self.conversion.dtype

    @model_validator(mode="after")
    def _unlearning_needs(self) -> Config:
        if self.unlearning.seuf is not None and self.unlearning.trainable != TrainableConfig():
            raise ValueError("unlearning.seuf chooses what is trained itself: leave unlearning.trainable out")
        loss = self.unlearning.forget_loss
        if loss in ("npo", "dpo") and not self.statistics.nll:
            raise ValueError(f"unlearning.forget_loss {loss} needs statistics.nll: true (the frozen model's losses)")
        if loss == "dpo" and not self.data.alternative:
            raise ValueError("unlearning.forget_loss dpo needs data.alternative: the texts to prefer")
        drawn = ("ratio_mean", "ratio_max") if self.unlearning.apply == "sampling" else ()
        if self.unlearning.weights == "online" and self.calibration.rule not in ("raking", "random_experts", *drawn):
            raise ValueError(
                "unlearning.weights online moves towards the forget frequencies whatever the rule, so calibration.rule "
                f"{self.calibration.rule} would not be what it says: use raking, or unlearning.weights reference"
            )
        if self.distributed.autoep.comm_backend == "deepep" and self.model.dtype != "bf16":
            raise ValueError(
                f"distributed.autoep.comm_backend deepep carries bf16, and model.dtype is {self.model.dtype}"
            )
        self._check_finetune()
        self._check_recorded()
        evaluate, guards = self.unlearning.evaluate, self.unlearning.guards
        for key, value in (
            ("evaluate.tasks", evaluate.tasks or None),
            ("evaluate.curve_only", evaluate.curve_only or None),
            ("evaluate.target_forget_nll", evaluate.target_forget_nll),
            ("guards.max_retain_ratio", guards.max_retain_ratio),
            ("guards.min_retain_overlap", guards.min_retain_overlap),
        ):
            if value is not None and evaluate.every is None:
                raise ValueError(f"unlearning.{key} needs unlearning.evaluate.every")
        names = [task.name for task in self.evaluation.tasks]
        for name in evaluate.tasks:
            if name not in names:
                raise ValueError(
                    f"unlearning.evaluate.tasks names {name!r}, which is not among evaluation.tasks "
                    f"({', '.join(names) or 'there are none'})"
                )
        if evaluate.curve_only and not evaluate.tasks:
            raise ValueError(
                "unlearning.evaluate.curve_only needs evaluate.tasks: the curve is all that the job leaves"
            )
        for name in evaluate.at_end:
            if name not in evaluate.tasks:
                raise ValueError(f"unlearning.evaluate.at_end names {name!r}, which is not among its tasks")
        for name, changes in self.variants.items():
            for key in changes:
                if key.split(".")[0] not in ("calibration", "unlearning", "conversion"):
                    raise ValueError(f"variants.{name} may not change {key}: only calibration, unlearning, conversion")
        return self

    def _check_recorded(self) -> None:
        recorded = self.statistics.recorded
        if recorded is None:
            return
        if set(recorded) != set(self.data.sides):
            raise ValueError(f"statistics.recorded names a file for each of {', '.join(self.data.sides)}, and no other")
        for key, needs in (
            ("statistics.nll", self.statistics.nll),
            ("statistics.hidden", self.statistics.hidden),
            ("calibration.detection.method top_gate_mass", self.calibration.detection.method == "top_gate_mass"),
            ("unlearning.seuf", self.unlearning.seuf is not None),
        ):
            if needs:
                raise ValueError(f"{key} needs the model to be run: statistics.recorded has its experts only")

    def _check_finetune(self) -> None:
        if self.finetune is None:
            return
        for name, sides in self.finetune.models.items():
            for side in sides:
                if side not in self.data.sides:
                    raise ValueError(
                        f"finetune.models.{name}: there is no corpus {side!r}; data has {', '.join(self.data.sides)}"
                    )
        if clash := sorted(self.finetune.models.keys() & self.evaluation.models.keys()):
            raise ValueError(f"finetune.models and evaluation.models both have a model {clash[0]!r}")
