"""``trace-ds calibrate``: routing statistics → forget-critical experts and weights of the retain text.

Reads ``data/`` and ``statistics/{forget,retain}/``, writes ``calibration/`` (:class:`CalibrateJob` has its files). One
process, no GPU. ``unlearning.apply: sampling`` weights rows, by their selections; ``loss`` weights tokens, by the
routing trace, which is read chunk by chunk: memory is bounded whatever the corpus.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trace_ds.calibration.detect import Detection, detect
from trace_ds.calibration.diagnose import DocumentSources, diagnose, fewer_experts
from trace_ds.calibration.rules import (
    RuleResult,
    WeightRequest,
    choose_experts,
    source_log_weights,
    weigh_rows,
    weigh_tokens,
)
from trace_ds.calibration.tokens import RowSelections, Trace, count_selections, open_trace, read_token_map
from trace_ds.config.schema import Config
from trace_ds.corpora.dataset import TokenMap, open_stream
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.routing.token_files import open_parts, require_parts
from trace_ds.run import artefact as artefacts
from trace_ds.run.artefact import Artefact
from trace_ds.run.files import new_array, replacing_directory, safetensors_errors, write_json
from trace_ds.run.foreign import read_object, reading
from trace_ds.run.log import StageLog, stage_log
from trace_ds.stages.inputs import Inputs
from trace_ds.tensors.model_files import model_fingerprint, read_model_config

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.directory import RunDirectory

UNIFORM_ESS = 0.999
NONE_FOUND_FIX = (
    "lower calibration.detection.min_ratio or min_load, or set calibration.if_none_found: "
    "uniform (go on with uniform weights) or continue (with the rule, over all experts if calibration.experts is all)"
)


@dataclass(frozen=True)
class CalibrateJob:
    """The calibration artefact of a run, to be made from data and statistics that are whole and made for one another.

    Files: ``calibration.safetensors`` (theta_LE, frequency_forget_LE, frequency_retain_LE, log_ratio_LE,
    log_ratio_error_LE, ratio_low_LE, ratio_high_LE, target_LE, achieved_LE, log_mean float64; selected_LE, scope_LE
    uint8), ``weights.npy`` float32 [retain tokens], ``row_weights.npy`` float64 [rows], ``diagnosis.json``. achieved_LE
    are the frequencies under the weights (NaN: not known).

    Attributes:
        config: that :func:`with_trained_layers`.
        forget, retain: their statistics.
    """

    config: Config
    place: RunDirectory
    data: Artefact
    forget: Artefact
    retain: Artefact

    @property
    def inputs(self) -> dict[str, str]:
        made_of = {name: self.retain.inputs[name] for name in ("model", "tokenizer")}
        return {"data": self.data.content, "forget": self.forget.content, "retain": self.retain.content, **made_of}

    @property
    def settings(self) -> dict[str, Any]:
        settings = self.config.calibration.model_dump(mode="json")
        return {**settings, "apply": self.config.unlearning.apply, "seed": self.config.seed}

    @property
    def identity(self) -> str:
        return artefacts.identity_of("calibration", self.inputs, self.settings)

    def done(self) -> bool:
        return artefacts.is_done(self.place.calibration, "calibration", self.identity)

    def run(self, world: World | None = None) -> None:
        """Detect and weigh.

        Raises:
            UserError: damaged inputs; no forget-critical expert while ``calibration.if_none_found`` is ``stop``; a
                solver that ended short of its targets.
        """
        forget, retain = load_statistics(self.forget), load_statistics(self.retain)
        settings = self.config.calibration
        try:
            detection = detect(forget, retain, settings.detection)
        except ValueError as error:
            fix = "let MoE layers take part that the model has (0-based numbers)"
            raise UserError(str(error), "calibration.detection", fix) from None
        if not detection.selected_LE.any() and settings.if_none_found == "stop":
            raise UserError(none_found(detection), "calibration.detection", NONE_FOUND_FIX)
        with stage_log(self.place, "calibrate") as log:
            _make(self, forget, retain, detection, log)
            log.done(calibration_summary(artefacts.load_artefact(self.place.calibration, "calibration", verify=False)))


def preflight(config: Config, run: RunDirectory, processes: int = 1, *, download: bool = False) -> None:
    """Nothing: the configuration has been validated, and all else is in the statistics."""


def check(config: Config, run: RunDirectory, processes: int = 1) -> CalibrateJob:
    """The job; :class:`UserError` where inputs are missing, damaged or not made for one another."""
    inputs = Inputs.read(config, run, model_fingerprint(Path(config.model.path)))
    forget, retain = inputs.statistics("forget"), inputs.statistics("retain")
    for key in ("top_k", "experts", "layers"):
        values = forget.summary.get(key), retain.summary.get(key)
        if values[0] is None or values[0] != values[1]:
            problem = f"the forget statistics have {key} {values[0]}, the retain statistics {values[1]}"
            raise UserError(problem, str(run.statistics), forget.fix)
    return CalibrateJob(with_trained_layers(config, retain.summary["layers"]), run, inputs.data, forget, retain)


def with_trained_layers(config: Config, layers: Sequence[int]) -> Config:
    """The configuration with the numbers of the MoE layers (which lie in the decoder layers ``layers``) that take part
    in place of ``trained``: experts above the last layer that gets a gradient would be matched for nothing."""
    detection = config.calibration.detection
    if detection.layers != "trained":
        return config
    count = int(read_model_config(config.model.path).get("num_hidden_layers", max(layers) + 1))
    last = config.unlearning.last_layer(count)
    trained = None if last is None or last >= max(layers) else [n for n, layer in enumerate(layers) if layer <= last]
    changed = detection.model_copy(update={"layers": trained})
    return config.model_copy(update={"calibration": config.calibration.model_copy(update={"detection": changed})})


def _make(
    job: CalibrateJob, forget: RoutingStatistics, retain: RoutingStatistics, detection: Detection, log: StageLog
) -> None:
    """Weights by the rule, diagnosis, artefact. Large arrays live in a spool directory that is deleted at the end."""
    import torch

    config, run, settings = job.config, job.place, job.config.calibration
    by_rows = config.unlearning.apply == "sampling"
    documents = _read_documents(job.data.file("retain_documents.arrow"))
    tokens = read_token_map(job.data.file("retain.arrow"), len(documents.source_D))
    selections = load_selections(job.retain, retain, tokens)
    request = WeightRequest(
        settings,
        tokens,
        choose_experts(settings, detection, config.seed),
        forget.frequency_LE,
        retain.frequency_LE,
        np.sqrt(retain.variance_LE()),
        config.seed,
        source_weights(config, documents),
        torch.get_num_threads(),
        log.detail,
    )
    log.detail(
        f"{int(detection.selected_LE.sum())} forget-critical experts; rule {settings.rule} over "
        f"{retain.tokens:,} retain tokens"
    )
    run.calibration.parent.mkdir(parents=True, exist_ok=True)
    spool = run.calibration.with_name(f"{run.calibration.name}.tmp-spool")
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir()
    try:
        if by_rows:
            calibrated = weigh_rows(request, selections)
        else:
            trace = None if request.ignores_routing else load_trace(config, job.retain, retain, tokens)
            calibrated = weigh_tokens(request, trace, spool)
        refuse_useless(config, calibrated, run)
        with replacing_directory(run.calibration) as directory:
            diagnosis = diagnose(settings, detection, calibrated, tokens, documents, by_rows)
            write(directory, detection, calibrated, tokens, diagnosis)
            keys = ("rule", "lambda", "ess_fraction", "max_weight", "none_found", "warnings")
            numbers = {"tokens": tokens.tokens, "rows": tokens.rows, "layers": job.retain.summary["layers"]}
            numbers["selected"] = len(diagnosis["selected"])
            about = {key: diagnosis[key] for key in keys} | numbers
            artefacts.describe(directory, "calibration", job.inputs, job.settings, about)
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def refuse_useless(config: Config, calibrated: RuleResult, run: RunDirectory) -> None:
    """Refuse weights that change nothing, unless the floor or the configuration asks for such, and those of a solver
    that did not converge.

    Raises:
        UserError: the weights are uniform, or so nearly that nothing would be calibrated; or the solver did not
            converge.
    """
    settings = config.calibration
    raking = calibrated.raking
    if raking is not None and not raking.converged:
        raise UserError(
            f"the solver ended short of its targets after {raking.passes} passes over all tokens (lambda "
            f"{raking.lambda_:.3f}): frequencies miss them by up to {raking.residual:.1e}",
            str(run.calibration),
            f"{fewer_experts(settings)}set another calibration.ess_floor, or calibration.rule: uniform",
        )
    if calibrated.scope_LE.any() and calibrated.ess > UNIFORM_ESS and settings.ess_floor <= UNIFORM_ESS:
        raise UserError(
            f"the rule {settings.rule} gave uniform weights (effective sample size {calibrated.ess:.6f}, lambda "
            f"{calibrated.lambda_:.3g})",
            str(run.calibration),
            "set calibration.rule: uniform if that is what you want; otherwise give retain text that is routed "
            "differently in different documents" + (", or another calibration.experts" if raking is not None else ""),
        )


def none_found(detection: Detection) -> str:
    """One line on the expert that came closest to being forget-critical, and by how much it missed."""
    ratio_LE = np.where(detection.eligible_LE, detection.log_ratio_LE, -np.inf)
    layer, expert = (int(x) for x in np.unravel_index(int(np.argmax(ratio_LE)), ratio_LE.shape))
    text = (
        "no forget-critical expert was found; the largest forget/retain frequency ratio is "
        f"{np.exp(detection.log_ratio_LE[layer, expert]):.2f} (layer {layer}, expert {expert}, p-value "
        f"{detection.p_value_LE[layer, expert]:.2g})"
    )
    return "; ".join([text, *detection.warnings])


def calibration_summary(calibration: Artefact) -> str:
    """One line on a calibration: its experts, its effect, its warnings."""
    d = read_object(calibration.file("diagnosis.json"), "the diagnosis", calibration.fix)
    experts = "NO forget-critical expert found" if d["none_found"] else f"{len(d['selected'])} forget-critical experts"
    closed, effect = d["gap_closed"], f"{d['rule']} weights"
    if d["constraints"]:
        change = f"closes {closed:.0%} of the gap" if closed >= 0 else f"WIDENS the gap by {-closed:.0%}"
        effect = f"{d['rule']} {change}"
    warnings = len(d["warnings"])
    many = f", {warnings} warning{'s' * (warnings > 1)} in diagnosis.json" if warnings else ""
    return f"{experts}, {effect}{many}"


def load_statistics(side: Artefact) -> RoutingStatistics:
    """The numbers of a statistics artefact, checked against its summary and for having any tokens."""
    path = side.file("statistics.safetensors")
    with reading(path, "the file", side.fix):
        statistics = RoutingStatistics.load(path)
    shape = (len(side.summary["layers"]), side.summary["experts"])
    if statistics.counts_LE.shape != shape or statistics.top_k != side.summary["top_k"]:
        raise UserError("the statistics do not fit their own summary", str(path), side.fix)
    if statistics.tokens < 1:
        raise UserError("the corpus has no counted tokens", str(path), "give it documents of two tokens or more")
    return statistics


def load_trace(config: Config, side: Artefact, statistics: RoutingStatistics, tokens: TokenMap) -> Trace:
    """The retain trace, proven to be of these tokens: its counts equal the statistics."""
    paths = [side.file(name) for name in sorted(side.files) if name.startswith("trace-")]
    if not paths:
        problem = f"the rule {config.calibration.rule} needs the routing trace, which was not recorded"
        raise UserError(problem, str(side.path), "set statistics.trace: true and run `trace-ds collect CONFIG` again")
    layers, experts = statistics.counts_LE.shape
    trace = open_trace(paths, layers, statistics.top_k, tokens.tokens, side.fix)
    with reading(side.path or Path(), "the routing trace", side.fix):
        counts_LE = count_selections(trace, tokens, experts)
    if not np.array_equal(counts_LE, statistics.counts_LE):
        raise UserError("the routing trace does not add up to the statistics beside it", str(side.path), side.fix)
    return trace


def load_selections(side: Artefact, retain: RoutingStatistics, tokens: TokenMap) -> RowSelections:
    """The selections of the rows and of a sample of tokens, proven to be of these tokens."""
    parts = tuple(require_parts(side, "row_counts", "calibrate"))
    sampled = [require_parts(side, "sample", "calibrate"), open_parts(side, "sample_positions")]
    selections = RowSelections(parts, retain.top_k, *(np.concatenate(arrays) for arrays in sampled))
    shape = len(retain.counts_LE), retain.top_k
    fits = selections.rows == tokens.rows and selections.selected_NLK.shape[1:] == shape
    if not fits or not np.array_equal(selections.sums(np.ones(selections.rows)), retain.counts_LE):
        problem = "the selections of the rows do not add up to the statistics beside them"
        raise UserError(problem, str(side.path), side.fix)
    return selections


def source_weights(config: Config, documents: DocumentSources) -> np.ndarray | None:
    """The log-weights of the retain documents by their sources, where the configuration names some."""
    if not config.calibration.source_weights:
        return None
    try:
        return source_log_weights(config.calibration.source_weights, documents.names, documents.source_D)
    except ValueError as error:
        fix = "name sources as the reports do: a line's own 'source', or the corpus file's"
        raise UserError(str(error), "calibration.source_weights", fix) from None


def _read_documents(path: Path) -> DocumentSources:
    """Sources and first characters of the retain documents; the text stays in the memory-mapped file."""
    table = open_stream(path).read_all()
    coded = table.column("source").combine_chunks().dictionary_encode()
    return DocumentSources(
        coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64), table.column("text_start")
    )


def write(
    directory: Path, detection: Detection, calibrated: RuleResult, tokens: TokenMap, diagnosis: dict[str, Any]
) -> None:
    """Write the artefact's files."""
    from safetensors.numpy import save_file

    weights = new_array(directory / "weights.npy", np.float32, (tokens.tokens,))
    for start, stop in tokens.spans():
        weights[start:stop] = np.where(tokens.counted(start, stop), calibrated.weight_T[start:stop], 0.0)
    rows = new_array(directory / "row_weights.npy", np.float64, calibrated.row_weight_R.shape)
    rows[:] = calibrated.row_weight_R
    del weights, rows
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
        "achieved_LE": calibrated.achieved_LE,
        "log_mean": np.array([calibrated.log_mean]),
    }
    path = directory / "calibration.safetensors"
    with safetensors_errors(path):
        save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    write_json(directory / "diagnosis.json", diagnosis)
