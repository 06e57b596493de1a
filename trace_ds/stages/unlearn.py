"""``trace-ds unlearn``: model + datasets + calibration → sharded checkpoints (DeepSpeed ZeRO and AutoEP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from trace_ds.checkpoints.manifest import Manifest
from trace_ds.config.schema import Config
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.errors import JobFailed, UserError
from trace_ds.evaluation.metrics import ROLE_OF, TASK_METRICS
from trace_ds.evaluation.subjects import has_identity, task_fingerprints
from trace_ds.models.families import ModelInfo, require_plain_logits
from trace_ds.parallel.environment import accelerator_count
from trace_ds.routing.token_files import require_parts
from trace_ds.run import artefact
from trace_ds.run.curve import has_ended
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import canonical_json, sha256_text, write_json
from trace_ds.stages.inputs import Inputs, check_vocabulary, checked_model, checked_tasks, look_at
from trace_ds.stages.training import OPERATIONAL, Training, ds_config_of, held_as
from trace_ds.unlearning.needs import layers_held

if TYPE_CHECKING:
    from trace_ds.evaluation.items import Task
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog
    from trace_ds.unlearning.batches import Batches
    from trace_ds.unlearning.evaluator import Evaluator, FixedRows
    from trace_ds.unlearning.grip import Projection
    from trace_ds.unlearning.objective import Unlearning


CURVE_FORMAT = 3  # raise it when what a step computes changes: the curves of studies are then made anew


@dataclass(frozen=True)
class UnlearnJob:
    """The job, checked: its configuration, run directory (``place``), inputs and identity."""

    config: Config
    place: RunDirectory
    info: ModelInfo
    data: artefact.Artefact
    calibration: artefact.Artefact
    routing: dict[str, artefact.Artefact]  # statistics by side, where the routing of fixed rows is compared
    statistics: dict[str, artefact.Artefact]  # by side, where the frozen model's losses or gates are needed
    experts: dict[int, tuple[int, ...]] | None  # trained experts by decoder layer; None: all
    anchored: tuple[int, tuple[int, ...]] | None  # SEUF's MoE layer and its experts
    layers: int | None  # decoder layers that it holds, see needs.py
    identity: str
    curve: str  # identity of its curve; empty where it has none

    def training(self) -> Training:
        """As its checkpoints know it."""
        config, settings = self.config, self.config.unlearning
        # where the curve is all that is left, it goes on only from checkpoints of that very curve
        identity = self.curve if settings.keep == 0 else self.identity
        calibration = self.calibration.content
        return Training("unlearning", settings, self.place, config, self.info, identity, calibration, self.layers)

    def done(self) -> bool:
        """Whether the last step of this very job is there, complete, or one that met the bounds that end it; or its
        curve, where that is all that it leaves."""
        settings = self.config.unlearning
        if settings.keep == 0:
            if not has_identity(self.place.curve, self.curve):
                return False
            discard_checkpoints(self.place, self.curve)  # which a kill may have cut off
            return True

        def is_enough(manifest: Manifest) -> bool:
            points = [point for point in manifest.trainer_state.get("curve", []) if point["step"] == manifest.step]
            ended = any(has_ended(settings.evaluate, point) for point in points)
            return ended or manifest.step >= settings.steps

        return self.training().settled(is_enough)

    def run(self, world: World | None) -> None:
        """Train to the last step (collectively, on every rank); returns at once when that is done.

        Raises:
            StopRequested: stopped on request; a complete checkpoint was saved.
        """
        assert world is not None
        unlearn(self, world)


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    check_settings(config, checked_model(config, processes))
    check_vocabulary(config)


def look(config: Config, run: RunDirectory) -> None:
    look_at(config, run, "data", "calibration")


def check_settings(config: Config, info: ModelInfo) -> dict[str, Any] | None:
    """What can be wrong with the settings and this model alone; returns the user's DeepSpeed keys, if there are any."""
    settings = config.unlearning
    if settings.forget_loss != "rmu":
        require_plain_logits(info, "unlearning.forget_loss")
    layer = settings.rmu.layer
    if layer is not None and layer >= info.decoder_layers:
        raise UserError(
            f"layer {layer} of a model with {info.decoder_layers} decoder layers", "unlearning.rmu.layer", "lower it"
        )
    known = [
        f"{task.name} {metric}"
        for task in config.evaluation.tasks
        for metric in TASK_METRICS[task.type]
        if task.name in settings.evaluate.tasks and ROLE_OF.get(metric, task.role) == task.role
    ]
    for kind in ("until", "guards"):
        for bound in settings.evaluate.bounds(kind):
            if " " in bound.score and bound.score not in known:
                what = f"{bound.score!r} is not 'TASK METRIC' of a task that is scored while the job trains"
                raise UserError(what, f"unlearning.evaluate.{kind}", f"use one of: {', '.join(known)}")
    return ds_config_of(settings)


def check(config: Config, run: RunDirectory, world_size: int, *, verify: bool = True) -> UnlearnJob:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info = checked_model(config, world_size)
    found = Inputs.read(config, run, info.fingerprint, verify=verify)
    data, calibration = found.data, found.calibration(verify=verify)
    ds_config = check_settings(config, info)
    settings = config.unlearning
    tasks = curve_tasks(config)
    compared = ("forget", "retain") if settings.evaluate.every and settings.evaluate.rows else ()
    routing = {side: found.statistics(side, verify=verify) for side in compared}
    if settings.evaluate.compares_routing:
        for side in routing:
            require_parts(routing[side], "sample", "unlearning.evaluate")
    paired = ("alternative",) if settings.forget_loss == "dpo" else ()
    asks = settings.forget_loss in ("npo", "dpo") or settings.seuf is not None
    statistics = {side: found.statistics(side, verify=verify) for side in (("forget", *paired) if asks else ())}
    experts, anchored = choose_trained(config, info, calibration, statistics.get("forget"))
    identity = sha256_text(
        canonical_json(
            {
                "model": info.fingerprint,
                "data": data.content,
                "calibration": calibration.content,
                "settings": settings.model_dump(mode="json", exclude={*OPERATIONAL, "evaluate"}),
                "ds_config": ds_config,
                "dtype": config.model.dtype,
                "seed": config.seed,
            }
        )
    )
    held = layers_held(settings, info.decoder_layers)
    curve = _curve_identity(config, identity, tasks) if settings.evaluate.every else ""
    return UnlearnJob(
        config, run, info, data, calibration, routing, statistics, experts, anchored, held, identity, curve
    )


def _curve_identity(config: Config, job: str, tasks: list[Task]) -> str:
    settings = config.unlearning
    return sha256_text(
        canonical_json(
            {
                "format": CURVE_FORMAT,
                "job": job,
                "steps": settings.steps,
                "evaluate": settings.evaluate.model_dump(mode="json"),
                "tasks": task_fingerprints(tasks, config.evaluation.max_new_tokens),
                "batch_rows": config.evaluation.batch_rows,
            }
        )
    )


def choose_trained(
    config: Config, info: ModelInfo, calibration: artefact.Artefact, statistics: artefact.Artefact | None
) -> tuple[dict[int, tuple[int, ...]] | None, tuple[int, tuple[int, ...]] | None]:
    """(experts trained, by decoder layer, None for all; SEUF's MoE layer and its experts, or None).

    Raises:
        UserError: a pattern of names matches nothing, no expert is selected, or SEUF's layer is not there.
    """
    settings = config.unlearning
    if settings.trainable == ["all"] and settings.seuf is None:
        return None, None
    from safetensors.numpy import load_file

    from trace_ds.models.routers import meta_model, moe_decoder_layers
    from trace_ds.routing.statistics import RoutingStatistics
    from trace_ds.unlearning import seuf, trainable

    model, last = meta_model(info.path), settings.last_layer(info.decoder_layers)
    trainable.choose(trainable.parameter_kinds(model), settings.trainable, last)
    layers = moe_decoder_layers(model)
    if settings.seuf is not None:
        assert statistics is not None
        affinity_LE = RoutingStatistics.load(statistics.file("statistics.safetensors")).row_gate_LE
        number, chosen = seuf.choose_experts(affinity_LE, layers, last, settings.seuf)
        return {layers[number]: chosen}, (number, chosen)
    if trainable.SELECTED not in settings.trainable:
        return None, None
    selected_LE = load_file(calibration.file("calibration.safetensors"))["selected_LE"]
    selected = {layer: tuple(int(e) for e in row.nonzero()[0]) for layer, row in zip(layers, selected_LE, strict=True)}
    experts = {layer: chosen for layer, chosen in selected.items() if chosen and (last is None or layer <= last)}
    if not experts:
        raise UserError(
            "the calibration selected no expert"
            + ("" if last is None else f" up to layer {last}, where the losses end"),
            "unlearning.trainable",
            "change calibration.detection",
        )
    return experts, None


def unlearn(job: UnlearnJob, world: World) -> None:
    from trace_ds.run.log import already_done
    from trace_ds.unlearning.trainer import train

    config, run = job.config, job.place
    if world.run_on_main_and_broadcast(job.done):
        if world.is_main:
            already_done("unlearn", run)
        return
    training = job.training()
    with training.begun(world, "unlearn") as (log, chosen):
        settings = config.unlearning
        if chosen is not None:  # the checkpoint of a job that held the whole model goes on so
            job = replace(job, layers=chosen.layers)
            training = job.training()
        log_held(settings, job, log.detail)
        batches = world.run_on_main_first(lambda: make_batches(config, job))
        engine, routers = make_engine(config, job, world, batches, log)
        start = training.restored(world, engine, chosen, log)
        objective, trainer_state = make_objective(
            config, job, world, engine, batches, start.trainer_state, routers, log.line
        )
        log.detail(
            f"{settings.forget_loss}, weights by {settings.apply}, alpha {settings.alpha:g}, "
            f"ZeRO stage {settings.zero_stage}, world size {world.size}, expert-parallel size {config.distributed.ep}"
        )
        [evaluator] = world.run_on_main_first(lambda: [make_evaluator(config, job, engine, world, log)])
        start, diverged = replace(start, trainer_state=trainer_state), None
        try:
            train(engine, world, batches, objective, settings, settings.steps, run, start, log, evaluator)
        except JobFailed as error:
            if settings.keep or not error.step:
                raise
            diverged = error.step
            log.line(str(error).replace("the last checkpoint stands", "the curve ends here"))
        if job.curve:
            world.run_on_main_and_broadcast(lambda: write_curve(job, run, trainer_state["curve"], diverged))
        if settings.keep == 0:
            world.run_on_main_and_broadcast(lambda: discard_checkpoints(run, job.curve))
        engine.destroy()  # a process may run many jobs


def write_curve(job: UnlearnJob, run: RunDirectory, points: list[dict[str, Any]], diverged: int | None) -> None:
    """Write RUN/curve.json.

    Args:
        diverged: the step after which the model was of no use (a loss is not finite, a score past a guard), or None.
    """
    made_with = {"device": "gpu" if accelerator_count() else "cpu", "torch": version("torch")}
    curve = {"identity": job.curve, "job": job.identity, "made_with": made_with, "curve": points, "diverged": diverged}
    write_json(run.curve, curve)


def discard_checkpoints(run: RunDirectory, curve: str) -> None:
    """Those of this very curve; others in the directory are somebody's."""
    from trace_ds.checkpoints.commit import discard_all
    from trace_ds.checkpoints.manifest import newest_complete, read_manifest, step_name

    if not run.checkpoints.is_dir():
        return
    step, _ = newest_complete(run.checkpoints)
    if step is None or read_manifest(run.checkpoints / step_name(step)).job == curve:
        run.clear_leftovers()
        discard_all(run.checkpoints)


def log_held(settings: UnlearningConfig, job: UnlearnJob, say: Callable[[str], None]) -> None:
    """Say how much of the model the job holds, where its losses need only a part."""
    layers = job.info.decoder_layers
    last = settings.last_layer(layers)
    if job.layers is not None:
        say(
            f"the losses end at layer {last}: {job.layers} of {layers} decoder layers are held and saved, without norm "
            "and LM head; convert takes the rest from the base model"
        )
    elif last is not None:
        why = "unlearning.evaluate looks at it" if settings.evaluate.every else "so does the checkpoint to go on from"
        say(f"the losses end at layer {last}, but the job holds the whole model: {why}")


def make_engine(
    config: Config, job: UnlearnJob, world: World, batches: Batches, log: StageLog | None = None
) -> tuple[Any, Projection | None]:
    """The training engine with the base model's weights, and GRIP's projection of its routers, where configured."""
    from trace_ds.models.routers import meta_model
    from trace_ds.unlearning.grip import Projection
    from trace_ds.unlearning.trainable import trained_by
    from trace_ds.unlearning.trainer import training_engine

    settings = config.unlearning
    last = settings.last_layer(job.info.decoder_layers)
    trained = trained_by(meta_model(job.info.path), settings, job.experts, last)
    accumulation = batches.micro_batches_per_step(world.size)
    engine = training_engine(settings, job.info, world, accumulation, trained, **held_as(config), layers=job.layers)
    if settings.grip is None:
        return engine, None
    # before anything is restored: it looks at the frozen routers
    say = log.detail if log is not None else lambda line: None
    return engine, Projection(engine, batches, world, settings.grip, config.seed, say)


def make_objective(
    config: Config,
    job: UnlearnJob,
    world: World,
    engine: Any,
    batches: Batches,
    trainer_state: dict[str, Any],
    routers: Projection | None,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Unlearning, dict[str, Any]]:
    """The objective, where a checkpoint's ``trainer_state`` left it, and that state with the job's constants."""
    from trace_ds.unlearning.objective import Multiplier, Unlearning, make_forget_retain

    settings = config.unlearning
    shape = {**held_as(config), "seed": config.seed}
    forget_retain, trainer_state = make_forget_retain(
        settings, job.info, world, batches, trainer_state, job.anchored, **shape, log=log
    )
    if routers is not None:
        routers.begin(engine)
    return Unlearning(settings, forget_retain, Multiplier.of(settings, trainer_state), routers), trainer_state


def make_batches(config: Config, job: UnlearnJob) -> Batches:
    """The job's data with the retain weights of the calibration, memory-mapped from shared storage."""
    import numpy as np

    from trace_ds.corpora.dataset import FlatArray, TokenDataset
    from trace_ds.routing.token_files import open_parts
    from trace_ds.run.files import open_mapped
    from trace_ds.unlearning.batches import Batches

    token_weights = None
    if config.unlearning.apply == "loss":
        token_weights = FlatArray([open_mapped(job.calibration.file("weights.npy"))])
    row_weights_R = np.load(job.calibration.file("row_weights.npy"), mmap_mode="r", allow_pickle=False)
    reference = config.unlearning.forget_loss in ("npo", "dpo")
    nll = {side: FlatArray(open_parts(found, "nll")) for side, found in job.statistics.items() if reference}
    sides = ("forget", "retain", *(["alternative"] if "alternative" in nll else []))
    datasets = {side: TokenDataset.open(job.data.file(f"{side}.arrow")) for side in sides}
    return Batches(
        config.unlearning,
        config.seed,
        datasets["forget"],
        datasets["retain"],
        token_weights,
        row_weights_R,
        nll.get("forget"),
        datasets.get("alternative"),
        nll.get("alternative"),
    )


def curve_tasks(config: Config) -> list[Task]:
    """The tasks that are scored while the model is trained, with their items."""
    asked = [task for task in config.evaluation.tasks if task.name in config.unlearning.evaluate.tasks]
    return checked_tasks(asked, config)


def make_evaluator(config: Config, job: UnlearnJob, engine: Any, world: World, log: StageLog) -> Evaluator | None:
    """What scores the model in the engine while it is trained; None when ``unlearning.evaluate.every`` is not set."""
    from trace_ds.unlearning.evaluator import Evaluator, score_rows

    settings, rows = config.unlearning.evaluate, None
    if settings.every is None:
        return None
    if settings.rows:
        sides, batch_rows = fixed_rows(config, job), config.statistics.batch_rows
        rows = lambda engine: score_rows(engine, sides, world, batch_rows)  # noqa: E731
    return Evaluator(settings, log, rows, make_scorer(config, engine, world))


def fixed_rows(config: Config, job: UnlearnJob) -> dict[str, FixedRows]:
    """The rows of each corpus that are scored while the model is trained."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.routing.token_files import SampledRouting
    from trace_ds.unlearning.evaluator import FixedRows

    settings, sides = config.unlearning.evaluate, {}
    for side, statistics in job.routing.items():
        dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
        sides[side] = fixed = FixedRows.of(dataset, settings.rows, SampledRouting.of(statistics))
        if settings.compares_routing and fixed.sampled(fixed.rows, 0) is None:
            what = f"none of the {settings.rows} {side} rows has a token in the sample of the routing"
            raise UserError(what, "unlearning.evaluate.rows", "raise it")
    return sides


def make_scorer(config: Config, engine: Any, world: World) -> Callable[[], dict[str, Any] | None] | None:
    """What scores the run's own tasks on the model in the engine (see :class:`Evaluator`); None without tasks."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.language_model import Diverged, LanguageModel, ModelSettings, Sharding
    from trace_ds.evaluation.tasks import run_task

    tasks = curve_tasks(config)
    if not tasks:
        return None
    settings = ModelSettings(config.model.dtype, config.data.add_bos, config.data.add_eos, config.evaluation.batch_rows)
    sharding = Sharding(config.distributed.ep, 3 if config.unlearning.zero_stage == 3 else 0)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    model = LanguageModel.of_engine(engine, tokenizer, settings, world, sharding)
    new, length = config.evaluation.max_new_tokens, config.data.context_length

    def score() -> dict[str, Any] | None:
        try:
            results = {
                task.config.name: run_task(model, task, max_new_tokens=new, context_length=length) for task in tasks
            }
        except Diverged:
            return None
        return {
            "scores": [record for result in results.values() for record in result.scores],
            "by_source": {name: result.by_source for name, result in results.items()},
        }

    return score
