"""``trace-ds calibrate``: routing statistics → forget-critical experts and one weight per retain token.

Reads ``data/`` and ``statistics/{forget,retain}/``, writes ``calibration/`` (see :func:`_calibrate` for its files). No
GPU is needed; the routing trace is read chunk by chunk, so memory is bounded whatever the corpus. On several ranks the
main process does everything but the passes of raking over the tokens: there each rank takes its share, and the sums are
all-reduced.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.calibration.detect import Detection, detect
from trace_ds.calibration.diagnose import Documents, diagnose, document_sums, likeness, likeness_tables
from trace_ds.calibration.raking import Context, RakeArguments, rake
from trace_ds.calibration.rows import RowSelections
from trace_ds.calibration.rules import LIMITS, Calibrated, apply_rule, scope_of, source_log_weights
from trace_ds.calibration.tokens import (
    RowSpread,
    TokenMap,
    Trace,
    count_selections,
    open_stream,
    open_trace,
    read_token_map,
)
from trace_ds.calibration.units import Units
from trace_ds.config.schema import Config
from trace_ds.config.sections.calibration import WITHOUT_TRACE
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.routing.token_files import open_parts
from trace_ds.run import artefact as artefacts
from trace_ds.run.artefact import Artefact
from trace_ds.run.files import new_array, replacing_directory, safetensors_errors, write_json
from trace_ds.run.foreign import read_object
from trace_ds.run.log import StageLog, already_done, stage_log
from trace_ds.stages.inputs import Inputs

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.directory import RunDirectory


def calibrate(config: Config, run: RunDirectory, world: World | None = None) -> Artefact | None:
    """Make (or find done) the calibration artefact of a run; see :func:`_calibrate`. With a ``world`` (collective) the
    main process gets the artefact, and the others, which help it solve, None.

    Raises:
        UserError: on the main process; AgreedError elsewhere.
    """
    import torch

    threads, device = torch.get_num_threads(), "cuda" if torch.cuda.is_available() else "cpu"
    if world is None or world.size == 1:
        return _calibrate(config, run, Context(threads, None, device))
    if world.is_main:
        good = False
        try:
            made = _calibrate(config, run, Context(threads, world, device))
            good = True
            return made
        finally:
            world.broadcast(("end", good))
    while True:
        message: tuple[str, Any] = ("", None)
        what, job = world.broadcast(message)
        if what == "end":
            if not job:
                from trace_ds.parallel.world import AgreedError

                raise AgreedError
            return None
        _help(world, threads, job)


@dataclass(frozen=True)
class _Job:
    """What the other ranks need to take their share: files, the rows that count, and the arguments of ``rake``."""

    data: Path
    trace: tuple[Path, ...]
    documents: int
    scope_LE: np.ndarray
    top_k: int
    rake: RakeArguments


def _help(world: World, threads: int, job: _Job) -> None:
    tokens = read_token_map(job.data, job.documents)
    trace = open_trace(list(job.trace), len(job.scope_LE), job.top_k, tokens.tokens, "")
    rake(Units(trace, job.scope_LE, tokens), *job.rake, Context(threads, world))


def _calibrate(config: Config, run: RunDirectory, context: Context) -> Artefact:
    """Make (or find done) the calibration artefact of a run.

    Files: ``calibration.safetensors`` (theta_LE, frequency_forget_LE, frequency_retain_LE, log_ratio_LE,
    log_ratio_error_LE, ratio_low_LE, ratio_high_LE, target_LE, achieved_LE, drawn_LE, log_mean float64; selected_LE,
    scope_LE uint8), ``weights.npy`` float32 [retain tokens], ``row_weights.npy`` float64 [rows], ``diagnosis.json``.
    achieved_LE and drawn_LE are the frequencies under the token weights and where rows are drawn by their mean weight
    (NaN, as target_LE, where rows were retrieved without a trace: nobody knows how those are routed).

    Raises:
        UserError: missing, damaged or mismatched inputs; no forget-critical expert while
            ``calibration.if_none_found`` is ``stop``.
    """
    asked = Asked.of(config, run)
    if artefacts.is_done(run.calibration, "calibration", asked.identity):
        made = artefacts.load(run.calibration, "calibration", verify=False)
        export_weights(config, run, asked.data, made)
        already_done("calibrate", run)
        return made

    forget, retain = (load_statistics(side) for side in asked.sides)
    try:
        detection = detect(forget, retain, asked.config.calibration.detection)
    except ValueError as error:
        raise UserError(
            str(error), "calibration.detection", "let MoE layers take part that the model has (0-based numbers)"
        ) from None
    if not detection.selected_LE.any() and config.calibration.if_none_found == "stop":
        raise UserError(none_found(detection), "calibration.detection", NONE_FOUND_FIX)

    with stage_log(run, "calibrate") as log:
        if asked.config.calibration.detection.layers is not None:
            log.detail(
                f"{int(detection.eligible_LE.any(axis=1).sum())} of {len(detection.eligible_LE)} MoE layers take part"
            )
        made = _make(asked, run, Routing(forget, retain, detection), replace(context, say=Sparing(log.line)), log)
        export_weights(config, run, asked.data, made)
        log.done(told(made))
    return made


@dataclass(frozen=True)
class Asked:
    """What a calibration is made from and how: data, (forget, retain) statistics, whole and made for one another and
    for the model of the configuration, which is that :func:`with_trained_layers`."""

    config: Config
    data: Artefact
    sides: tuple[Artefact, Artefact]

    @classmethod
    def of(cls, config: Config, run: RunDirectory) -> Asked:
        from trace_ds.tensors.model_files import model_fingerprint

        found = Inputs.read(config, run, model_fingerprint(Path(config.model.path)))
        sides = found.statistics("forget"), found.statistics("retain")
        for key in ("top_k", "experts", "layers"):
            values = [side.summary.get(key) for side in sides]
            if values[0] is None or values[0] != values[1]:
                what = f"the forget statistics have {key} {values[0]}, the retain statistics {values[1]}"
                raise UserError(what, str(run.statistics), sides[0].fix)
        return cls(with_trained_layers(config, sides[1].summary["layers"]), found.data, sides)

    @property
    def inputs(self) -> dict[str, str]:
        forget, retain = self.sides
        made_of = {name: retain.inputs[name] for name in ("model", "tokenizer")}
        return {"data": self.data.content, "forget": forget.content, "retain": retain.content, **made_of}

    @property
    def settings(self) -> dict[str, Any]:
        return {**self.config.calibration.model_dump(mode="json", exclude={"export"}), "seed": self.config.seed}

    @property
    def identity(self) -> str:
        return artefacts.identity_of("calibration", self.inputs, self.settings)


@dataclass(frozen=True)
class Routing:
    """How both corpora are routed, and where they differ."""

    forget: RoutingStatistics
    retain: RoutingStatistics
    detection: Detection


@dataclass(frozen=True)
class Retained:
    """The retain tokens that are weighted, and what is known of each."""

    documents: Documents
    tokens: TokenMap
    trace: Trace | None
    selections: RowSelections | None


def with_trained_layers(config: Config, layers: Sequence[int]) -> Config:
    """The configuration with the numbers of the MoE layers (which lie in the decoder layers ``layers``) that take part
    in place of ``trained``: experts above the last layer that gets a gradient would be matched for nothing."""
    from trace_ds.tensors.model_files import read_model_config

    detection = config.calibration.detection
    if detection.layers != "trained":
        return config
    count = int(read_model_config(config.model.path).get("num_hidden_layers", max(layers) + 1))
    last = config.unlearning.last_layer(count)
    trained = None if last is None or last >= max(layers) else [n for n, layer in enumerate(layers) if layer <= last]
    changed = detection.model_copy(update={"layers": trained})
    return config.model_copy(update={"calibration": config.calibration.model_copy(update={"detection": changed})})


def export_weights(config: Config, run: RunDirectory, data: Artefact, calibration: Artefact) -> None:
    """``calibration.export``: the weights as parquet files in ``RUN/export/`` (skipped when they are there)."""
    if config.calibration.export == "none":
        return
    from trace_ds.calibration.export import export

    inputs = {"data": data.content, "calibration": calibration.content}
    if not artefacts.is_done(run.export, "export", artefacts.identity_of("export", inputs, {})):
        with replacing_directory(run.export) as directory:
            export(data, calibration, directory)
            artefacts.describe(directory, "export", inputs, {}, {"rows": calibration.summary["rows"]})


def _make(asked: Asked, run: RunDirectory, routing: Routing, context: Context, log: StageLog) -> Artefact:
    """Weights by the rule, diagnosis, artefact. Large arrays live in a spool directory that is deleted at the end."""
    config, settings, statistics = asked.config, asked.config.calibration, asked.sides[1]
    retain, detection = routing.retain, routing.detection
    run.calibration.parent.mkdir(parents=True, exist_ok=True)
    spool = run.calibration.with_name(f"{run.calibration.name}.tmp-spool")
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir()
    try:
        documents = read_documents(asked.data.file("retain_documents.arrow"))
        log_weight_D = document_weights(config, documents)
        tokens = read_token_map(asked.data.file("retain.arrow"), len(documents.source_D))
        trace = load_trace(config, statistics, retain, tokens)
        selections = load_selections(config, statistics, retain, tokens)
        held = Retained(documents, tokens, trace, selections)
        log.detail(
            f"{int(detection.selected_LE.sum())} forget-critical experts; rule {settings.rule} over "
            f"{retain.tokens:,} retain tokens"
        )
        world = context.world
        if world is not None and trace is not None:
            parts = tuple(statistics.file(name) for name in sorted(statistics.files) if name.startswith("trace-"))

            def begin(scope_LE: np.ndarray, arguments: RakeArguments) -> None:
                told = asked.data.file("retain.arrow"), parts, tokens.documents, scope_LE, trace.top_k
                world.broadcast(("rake", _Job(*told, arguments)))

            context = replace(context, begin=begin)
        calibrated = apply_rule(
            settings,
            tokens,
            trace,
            scope_of(settings, detection.selected_LE, detection.eligible_LE, config.seed, detection.log_ratio_LE),
            routing.forget.frequency_LE,
            retain.frequency_LE,
            config.seed,
            spool,
            detection.selected_LE,
            log_weight_D,
            np.sqrt(retain.variance_LE()),
            context,
            selections,
        )
        refuse_uniform(config, calibrated, run)
        with replacing_directory(run.calibration) as directory:
            summary = write(directory, config, routing, calibrated, held)
            summary["layers"] = statistics.summary["layers"]
            artefacts.describe(directory, "calibration", asked.inputs, asked.settings, summary)
    finally:
        shutil.rmtree(spool, ignore_errors=True)
    return artefacts.load(run.calibration, "calibration", verify=False)


class Sparing:
    """Passes lines on, but one every so often, with the time since the beginning."""

    def __init__(
        self, say: Callable[[str], None], every_s: float = 15.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._every_s, self._clock = say, every_s, clock
        self._begun_s = self._last_s = clock()

    def __call__(self, line: str) -> None:
        now_s = self._clock()
        if now_s - self._last_s >= self._every_s:
            self._last_s = now_s
            self._say(f"{line} ({now_s - self._begun_s:.0f} s so far)")


def refuse_uniform(config: Config, calibrated: Calibrated, run: RunDirectory) -> None:
    """Weights that do nothing are no calibration, unless the floor or the configuration asks for them.

    Raises:
        UserError: the weights are uniform, or so nearly that nothing would be calibrated.
    """
    settings = config.calibration
    if settings.rule in WITHOUT_TRACE or not calibrated.scope_LE.any():
        return
    if calibrated.ess > UNIFORM_ESS and settings.ess_floor <= UNIFORM_ESS:
        why = f"lambda {calibrated.strength:.3g}: {LIMITS[calibrated.limit]}"
        raise UserError(
            f"the rule {settings.rule} gave uniform weights (effective sample size {calibrated.ess:.6f}; {why})",
            str(run.calibration),
            "set calibration.rule: uniform if that is what you want; otherwise give retain text that is routed "
            "differently in different documents, or another calibration.experts",
        )


UNIFORM_ESS = 0.999
NONE_FOUND_FIX = (
    "lower calibration.detection.min_ratio or min_load, choose a top_* method, or set calibration.if_none_found: "
    "uniform (go on with uniform weights) or continue (with the rule, over all experts if calibration.experts is all)"
)


def none_found(detection: Detection) -> str:
    """What came closest, so that the user sees how far away 'found' was."""
    ratio_LE = np.where(detection.eligible_LE, detection.log_ratio_LE, -np.inf)
    layer, expert = (int(x) for x in np.unravel_index(int(np.argmax(ratio_LE)), ratio_LE.shape))
    text = (
        "no forget-critical expert was found; the largest forget/retain frequency ratio is "
        f"{np.exp(detection.log_ratio_LE[layer, expert]):.2f} (layer {layer}, expert {expert}, p-value "
        f"{detection.p_value_LE[layer, expert]:.2g})"
    )
    return "; ".join([text, *detection.warnings])


def told(made: Artefact) -> str:
    """What was made, in one line."""
    d = read_object(made.file("diagnosis.json"), "the diagnosis", made.fix)
    experts = "NO forget-critical expert found" if d["none_found"] else f"{len(d['selected'])} forget-critical experts"
    effect = f"{d['rule']} closes {d['gap_closed']:.0%} of the gap" if d["constraints"] else f"{d['rule']} weights"
    warnings = len(d["warnings"])
    many = f", {warnings} warning{'s' * (warnings > 1)} in diagnosis.json" if warnings else ""
    return f"{experts}, {effect}{many}"


def load_statistics(side: Artefact) -> RoutingStatistics:
    """The numbers of a statistics artefact, checked against its summary and for having any tokens."""
    path, fix = side.file("statistics.safetensors"), side.fix
    try:
        statistics = RoutingStatistics.load(path)
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"the statistics cannot be read ({error})", str(path), fix) from None
    shape = (len(side.summary["layers"]), side.summary["experts"])
    if statistics.counts_LE.shape != shape or statistics.top_k != side.summary["top_k"]:
        raise UserError("the statistics do not fit their own summary", str(path), fix)
    if statistics.tokens < 1:
        raise UserError("the corpus has no counted tokens", str(path), "give it documents of two tokens or more")
    return statistics


def load_trace(config: Config, side: Artefact, statistics: RoutingStatistics, tokens: TokenMap) -> Trace | None:
    """The retain trace, proven to be of these tokens: its counts equal the statistics. None if there is none
    and the rule needs none."""
    paths = [side.file(name) for name in sorted(side.files) if name.startswith("trace-")]
    if not paths:
        if config.calibration.rule in WITHOUT_TRACE or config.calibration.level == "row":
            return None
        what = f"the rule {config.calibration.rule} needs the routing trace, which was not recorded"
        raise UserError(what, str(side.path), "set statistics.trace: true and run `trace-ds collect CONFIG` again")
    layers, experts = statistics.counts_LE.shape
    trace = open_trace(paths, layers, statistics.top_k, tokens.tokens, side.fix)
    try:
        agrees = np.array_equal(count_selections(trace, tokens, experts), statistics.counts_LE)
    except ValueError as error:
        raise UserError(str(error), str(side.path), side.fix) from None
    if not agrees:
        raise UserError("the routing trace does not add up to the statistics beside it", str(side.path), side.fix)
    return trace


def load_selections(
    config: Config, side: Artefact, retain: RoutingStatistics, tokens: TokenMap
) -> RowSelections | None:
    """What level ``row`` goes by, proven to be of these tokens; None at the other level."""
    settings = config.calibration
    if settings.level != "row" or settings.rule in WITHOUT_TRACE:
        return None
    parts = tuple(open_parts(side, "row_counts"))
    sampled = [open_parts(side, name) for name in ("sample", "sample_positions")]
    if not parts or not all(sampled):
        what = "calibration.level: row needs the selections of each row and a sample of tokens, which were not recorded"
        raise UserError(what, str(side.path), "run `trace-ds collect CONFIG` again")
    found = RowSelections(parts, retain.top_k, *(np.concatenate(arrays) for arrays in sampled))
    fits = found.rows == tokens.rows and found.selected_NLK.shape[1:] == (len(retain.counts_LE), retain.top_k)
    if not fits or not np.array_equal(found.sums(np.ones(found.rows)), retain.counts_LE):
        what = "the selections of the rows do not add up to the statistics beside them"
        raise UserError(what, str(side.path), side.fix)
    return found


def document_weights(config: Config, documents: Documents) -> np.ndarray | None:
    """The log-weights of the retain documents by their sources, for the rule that asks for them."""
    if config.calibration.rule != "sources":
        return None
    try:
        return source_log_weights(config.calibration.source_weights, documents.names, documents.source_D)
    except ValueError as error:
        raise UserError(
            str(error),
            "calibration.source_weights",
            "name sources as the reports do: a line's own 'source', or the corpus file's",
        ) from None


def read_documents(path: Path) -> Documents:
    """Sources and first characters of the retain documents; the text stays in the memory-mapped file."""
    table = open_stream(path).read_all()
    coded = table.column("source").combine_chunks().dictionary_encode()
    return Documents(
        coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64), table.column("text_start")
    )


def write(directory: Path, config: Config, routing: Routing, calibrated: Calibrated, held: Retained) -> dict[str, Any]:
    """Write the artefact's files; returns its summary."""
    from safetensors.numpy import save_file

    detection, forget, retain = routing.detection, routing.forget, routing.retain
    tokens, trace, selections = held.tokens, held.trace, held.selections
    weights = new_array(directory / "weights.npy", np.float32, (tokens.tokens,))
    for start, stop in tokens.spans():
        weights[start:stop] = calibrated.weight_T[start:stop]
    rows = new_array(directory / "row_weights.npy", np.float64, calibrated.row_weight_R.shape)
    rows[:] = calibrated.row_weight_R
    del weights, rows
    achieved_LE = drawn_LE = calibrated.target_LE  # without a trace the weights are uniform
    if trace is not None:
        experts, counted = retain.counts_LE.shape[1], tokens.counted_total()
        achieved_LE = count_selections(trace, tokens, experts, calibrated.weight_T) / counted
        drawn_LE = count_selections(trace, tokens, experts, RowSpread(tokens, calibrated.row_weight_R))
    elif selections is not None and (config.calibration.level == "row" or config.calibration.rule == "uniform"):
        drawn_LE = selections.sums(calibrated.row_weight_R)
        achieved_LE = drawn_LE / tokens.counted_total()
    if drawn_LE is not calibrated.target_LE:
        drawn_LE = drawn_LE * (retain.top_k / drawn_LE.sum(axis=1, keepdims=True))
    tensors = {
        "theta_LE": calibrated.theta_LE,
        "selected_LE": detection.selected_LE.astype(np.uint8),
        "scope_LE": calibrated.scope_LE.astype(np.uint8),
        "frequency_forget_LE": detection.forget_LE,
        "frequency_retain_LE": detection.retain_LE,
        "log_ratio_LE": detection.log_ratio_LE,
        "log_ratio_error_LE": detection.error_LE,
        "ratio_low_LE": detection.low_LE,
        "ratio_high_LE": detection.high_LE,
        "target_LE": calibrated.target_LE,
        "achieved_LE": achieved_LE,
        "drawn_LE": drawn_LE,
        "log_mean": np.array([calibrated.log_mean]),
    }
    path = directory / "calibration.safetensors"
    with safetensors_errors(path):
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    score_LE, retain_mean, forget_mean = likeness_tables(forget.frequency_LE, retain.frequency_LE, retain.tokens)
    sums = document_sums(tokens, trace, calibrated.weight_T, score_LE)
    likeness_D = likeness(sums, retain_mean, forget_mean)
    made = (config.calibration, detection, calibrated, achieved_LE, drawn_LE, sums, likeness_D)
    diagnosis = diagnose(*made, tokens, held.documents, retain.top_k, trace is not None)
    write_json(directory / "diagnosis.json", diagnosis)
    return {
        key: diagnosis[key] for key in ("rule", "lambda", "ess_fraction", "max_weight", "none_found", "warnings")
    } | {"selected": len(diagnosis["selected"]), "tokens": tokens.tokens, "rows": tokens.rows}
