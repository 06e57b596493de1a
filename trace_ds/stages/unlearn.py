"""``trace-ds unlearn``: model + datasets + calibration → sharded checkpoints (DeepSpeed ZeRO and AutoEP)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from trace_ds.checkpoints.manifest import Manifest
from trace_ds.config.schema import Config
from trace_ds.errors import JobFailed, UserError
from trace_ds.evaluation.metrics import ROLE_OF, TASK_METRICS, require_level
from trace_ds.evaluation.subjects import has_identity, task_fingerprints
from trace_ds.models.families import ModelInfo, require_plain_logits
from trace_ds.parallel.environment import accelerator_count
from trace_ds.routing.token_files import require_parts
from trace_ds.run import artefact
from trace_ds.run.curve import has_ended
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import write_json
from trace_ds.stages.inputs import Inputs, check_vocabulary, checked_model, checked_tasks, job_identity
from trace_ds.stages.training import Training, ds_config_of, identifying_settings, model_settings
from trace_ds.unlearning.needs import layers_held

if TYPE_CHECKING:
    from trace_ds.evaluation.items import Task
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog
    from trace_ds.unlearning.batches import Batches
    from trace_ds.unlearning.evaluator import Evaluator
    from trace_ds.unlearning.grip import Projection


CURVE_VERSION = 5  # increment it when the numerical result of a step changes: curves are then computed anew


@dataclass(frozen=True)
class UnlearnJob:
    """The checked job.

    Attributes:
        run_dir: its run directory.
        statistics: statistics by corpus, where the frozen model's losses, gates or routing are needed.
        tasks: those that are scored while the model is trained, with their items.
        experts: trained experts by decoder layer; None: all.
        anchored: SEUF's MoE layer and its experts.
        layers: number of leading decoder layers that are loaded; None: the whole model (:func:`layers_held`).
        curve: identity of its curve; empty where it has none.
    """

    config: Config
    run_dir: RunDirectory
    info: ModelInfo
    data: artefact.Artefact
    calibration: artefact.Artefact
    statistics: dict[str, artefact.Artefact]
    tasks: list[Task]
    experts: dict[int, tuple[int, ...]] | None
    anchored: tuple[int, tuple[int, ...]] | None
    layers: int | None
    identity: str
    curve: str

    @property
    def training(self) -> Training:
        config, settings = self.config, self.config.unlearning
        # with `keep: 0` a job resumes only from checkpoints of the same curve
        identity = self.curve if settings.keep == 0 else self.identity
        calibration = self.calibration.content
        return Training("unlearning", settings, self.run_dir, config, self.info, identity, calibration)

    def done(self) -> bool:
        """Whether a complete checkpoint of this very job is at its last step, or at one that met
        ``evaluate.until``. With ``keep: 0``, whether its curve is there (what a killed job left is deleted)."""
        settings = self.config.unlearning
        if settings.keep == 0:
            is_there = has_identity(self.run_dir.curve, self.curve)
            if is_there:
                discard_checkpoints(self.run_dir, self.curve)  # which a kill may have cut off
            return is_there

        def is_enough(manifest: Manifest) -> bool:
            points = [point for point in manifest.trainer_state.get("curve", []) if point["step"] == manifest.step]
            return manifest.step >= settings.steps or any(has_ended(settings.evaluate, point) for point in points)

        return self.training.is_done(is_enough)

    def run(self, world: World | None) -> None:
        """Train to the last step (collectively, on every rank); returns at once when that is done.

        Raises:
            StopRequested: stopped on request; a complete checkpoint was saved.
        """
        from trace_ds.run.log import already_done
        from trace_ds.unlearning.objective import make_objective
        from trace_ds.unlearning.trainer import train

        assert world is not None
        if world.run_on_main_and_broadcast(self.done):
            if world.is_main:
                already_done("unlearn", self.run_dir)
            return
        settings = self.config.unlearning
        with self.training.log_and_checkpoint(world, "unlearn") as (log, chosen):
            batches = world.run_on_main_first(lambda: make_unlearn_batches(self))
            engine, router_projection = make_engine(self, world, batches)
            start = self.training.restore(world, engine, chosen, log)
            if router_projection is not None:
                router_projection.begin(engine)
            objective, trainer_state = make_objective(
                settings,
                self.info,
                world,
                batches,
                start.trainer_state,
                self.anchored,
                router_projection,
                **model_settings(self.config),
                seed=self.config.seed,
                log=log.line,
            )
            self.log_settings(world, log)
            evaluator = None
            if settings.evaluate.every is not None:
                evaluator = world.run_on_main_first(lambda: make_evaluator(self, engine, world, log))
            start, failed_after = replace(start, trainer_state=trainer_state), None
            try:
                train(engine, world, batches, objective, settings, settings.steps, self.run_dir, start, log, evaluator)
            except JobFailed as error:
                if settings.keep or not error.step:
                    raise
                # with `keep: 0` the job measures the curve alone: where it diverges is a result
                failed_after = error.step
                log.line(f"the curve ends here: {error}")
            if self.curve:
                made_with = {"device": "gpu" if accelerator_count() else "cpu", "torch": version("torch")}
                curve: dict[str, Any] = {"identity": self.curve, "job": self.identity, "made_with": made_with}
                curve |= {"curve": trainer_state["curve"], "failed_after": failed_after}
                world.run_on_main_and_broadcast(lambda: write_json(self.run_dir.curve, curve))
            if settings.keep == 0:
                world.run_on_main_and_broadcast(lambda: discard_checkpoints(self.run_dir, self.curve))
            engine.destroy()  # a process may run many jobs

    def log_settings(self, world: World, log: StageLog) -> None:
        """Log the settings of the job, and how much of the model it holds, where its losses need only a part."""
        settings, layers = self.config.unlearning, self.info.decoder_layers
        log.detail(
            f"{settings.forget_loss}, weights by {settings.apply}, alpha {settings.alpha:g}, ZeRO stage "
            f"{settings.zero_stage}, world size {world.size}, expert-parallel size {self.config.distributed.ep}"
        )
        if self.layers is not None:
            log.detail(
                f"the losses end at layer {settings.last_layer(layers)}: {self.layers} of {layers} decoder layers are "
                "loaded, without norm and LM head"
            )


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    check_unlearning_settings(config, checked_model(config, processes))
    check_vocabulary(config)


def check_unlearning_settings(config: Config, info: ModelInfo) -> dict[str, Any] | None:
    """Check the settings against the model alone; returns the user's DeepSpeed keys, if there are any."""
    settings = config.unlearning
    if settings.forget_loss != "rmu":
        require_plain_logits(info, "unlearning.forget_loss")
    layer = settings.rmu.layer
    if layer is not None and layer >= info.decoder_layers:
        raise UserError(
            f"layer {layer} does not exist: the model has {info.decoder_layers} decoder layers, from 0",
            "unlearning.rmu.layer",
            "lower it",
        )
    tasks = [task for task in config.evaluation.tasks if task.name in settings.evaluate.tasks]
    scores = [f"{t.name} {m}" for t in tasks for m in TASK_METRICS[t.type] if ROLE_OF.get(m, t.role) == t.role]
    for kind in ("until", "guards"):
        for bound in settings.evaluate.bounds(kind):
            if " " in bound.score and bound.score not in scores:
                problem = f"{bound.score!r} is not 'TASK METRIC' of a task that is scored while the job trains"
                raise UserError(problem, f"unlearning.evaluate.{kind}", f"use one of: {', '.join(scores)}")
            require_level(bound.score, bound.value, f"unlearning.evaluate.{kind}")
    return ds_config_of(settings)


def check(config: Config, run: RunDirectory, world_size: int) -> UnlearnJob:
    """Check everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info, settings = checked_model(config, world_size), config.unlearning
    inputs = Inputs.read(config, run, info.fingerprint)
    data, calibration = inputs.data, inputs.calibration()
    ds_config = check_unlearning_settings(config, info)
    tasks = checked_tasks([task for task in config.evaluation.tasks if task.name in settings.evaluate.tasks], config)
    sides = {"forget"} if settings.forget_loss in ("npo", "dpo") or settings.seuf is not None else set()
    sides |= {"alternative"} if settings.forget_loss == "dpo" else set()
    sides |= {"forget", "retain"} if settings.evaluate.every and settings.evaluate.rows else set()
    statistics = {side: inputs.statistics(side) for side in sorted(sides)}
    if settings.evaluate.compares_routing:
        for side in ("forget", "retain"):
            require_parts(statistics[side], "sample", "unlearning.evaluate")
    experts, anchored = _choose_trained(config, info, calibration, statistics.get("forget"))
    layers = layers_held(settings, info.decoder_layers)
    identity = job_identity(
        model=info.fingerprint,
        layers=layers,
        data=data.content,
        calibration=calibration.content,
        settings=identifying_settings(settings, settings.steps, "evaluate"),
        ds_config=ds_config,
        dtype=config.model.dtype,
        seed=config.seed,
    )
    curve = ""
    if settings.evaluate.every:
        curve = job_identity(
            format=CURVE_VERSION,
            job=identity,
            steps=settings.steps,
            evaluate=settings.evaluate.model_dump(mode="json"),
            tasks=task_fingerprints(tasks, config.evaluation.max_new_tokens),
            batch_rows=config.evaluation.batch_rows,
        )
    return UnlearnJob(
        config, run, info, data, calibration, statistics, tasks, experts, anchored, layers, identity, curve
    )


def _choose_trained(
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
    trainable.choose_parameters(trainable.parameter_kinds(model), settings.trainable, last)
    layers = moe_decoder_layers(model)
    if settings.seuf is not None:
        assert statistics is not None
        affinity_LE = RoutingStatistics.load(statistics.file("statistics.safetensors")).row_gate_LE
        assert affinity_LE is not None
        number, chosen = seuf.choose_seuf_experts(affinity_LE, layers, last, settings.seuf)
        return {layers[number]: chosen}, (number, chosen)
    if trainable.SELECTED not in settings.trainable:
        return None, None
    selected_LE = load_file(calibration.file("calibration.safetensors"))["selected_LE"]
    selected = {layer: tuple(int(e) for e in row.nonzero()[0]) for layer, row in zip(layers, selected_LE, strict=True)}
    experts = {layer: chosen for layer, chosen in selected.items() if chosen and (last is None or layer <= last)}
    if not experts:
        problem = "the calibration selected no expert"
        problem += "" if last is None else f" up to layer {last}, where the losses end"
        raise UserError(problem, "unlearning.trainable", "change calibration.detection")
    return experts, None


def discard_checkpoints(run: RunDirectory, curve: str) -> None:
    """Delete the checkpoints of this very curve; those of another job stay."""
    from trace_ds.checkpoints.commit import discard_all
    from trace_ds.checkpoints.manifest import newest_complete, read_manifest, step_name

    if not run.checkpoints.is_dir():
        return
    step, _ = newest_complete(run.checkpoints)
    if step is None or read_manifest(run.checkpoints / step_name(step)).job == curve:
        run.clear_leftovers()
        discard_all(run.checkpoints)


def make_engine(job: UnlearnJob, world: World, batches: Batches) -> tuple[Any, Projection | None]:
    """The training engine with the base model's weights, and GRIP's projection of its routers, where configured."""
    from trace_ds.models.routers import meta_model
    from trace_ds.unlearning.grip import Projection
    from trace_ds.unlearning.trainable import trained_by
    from trace_ds.unlearning.trainer import training_engine

    config, settings = job.config, job.config.unlearning
    last = settings.last_layer(job.info.decoder_layers)
    trained = trained_by(meta_model(job.info.path), settings, job.experts, last)
    accumulation = batches.micro_batches_per_step(world.size)
    shape = {**model_settings(config), "layers": job.layers}
    engine = training_engine(settings, job.info, world, accumulation, trained, **shape)
    if settings.grip is None:
        return engine, None
    # before anything is restored: it needs the frozen routers
    return engine, Projection(engine, batches, world, settings.grip, config.seed)


def make_unlearn_batches(job: UnlearnJob) -> Batches:
    """The job's data with the retain weights of the calibration, memory-mapped from shared storage."""
    import numpy as np

    from trace_ds.corpora.dataset import FlatArray, TokenDataset
    from trace_ds.routing.token_files import open_parts
    from trace_ds.run.files import open_mapped
    from trace_ds.unlearning.batches import Batches

    settings, token_weights = job.config.unlearning, None
    if settings.apply == "loss":
        token_weights = FlatArray([open_mapped(job.calibration.file("weights.npy"))])
    row_weights_R = np.load(job.calibration.file("row_weights.npy"), mmap_mode="r", allow_pickle=False)
    # losses of the frozen model
    nll_sides = {"npo": ("forget",), "dpo": ("forget", "alternative")}.get(settings.forget_loss, ())
    nll = {side: FlatArray(open_parts(job.statistics[side], "nll")) for side in nll_sides}
    datasets = {
        side: TokenDataset.open(job.data.file(f"{side}.arrow")) for side in dict.fromkeys(("forget", "retain", *nll))
    }
    return Batches(
        settings,
        job.config.seed,
        datasets["forget"],
        datasets["retain"],
        token_weights,
        row_weights_R,
        nll.get("forget"),
        datasets.get("alternative"),
        nll.get("alternative"),
    )


def make_evaluator(job: UnlearnJob, engine: Any, world: World, log: StageLog) -> Evaluator:
    """The evaluator that scores the model in the engine while it is trained: fixed rows of each corpus, and tasks."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.routing.token_files import SampledRouting
    from trace_ds.unlearning.evaluator import Evaluator, FixedRows, score_rows

    settings, rows = job.config.unlearning.evaluate, None
    if settings.rows:
        sides = {}
        for side in ("forget", "retain"):
            dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
            sides[side] = fixed = FixedRows.of(dataset, settings.rows, SampledRouting.of(job.statistics[side]))
            if settings.compares_routing and fixed.sampled(fixed.rows, 0) is None:
                problem = f"none of the {settings.rows} {side} rows has a token in the sample of the routing"
                raise UserError(problem, "unlearning.evaluate.rows", "raise it")
        rows = partial(score_rows, sides=sides, world=world, batch_rows=job.config.statistics.batch_rows)
    return Evaluator(settings, log, rows, _task_scorer(job, engine, world) if job.tasks else None)


def _task_scorer(job: UnlearnJob, engine: Any, world: World) -> Callable[[], dict[str, Any] | None]:
    """A function that scores the run's own tasks on the model in the engine (see :class:`Evaluator`)."""
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.language_model import Diverged, LanguageModel, ModelSettings, Sharding
    from trace_ds.evaluation.tasks import score_tasks

    config = job.config
    settings = ModelSettings(config.model.dtype, config.data.add_bos, config.data.add_eos, config.evaluation.batch_rows)
    sharding = Sharding(config.distributed.ep, 3 if config.unlearning.zero_stage == 3 else 0)
    tokenizer = load_tokenizer(config.model.tokenizer_path)
    model = LanguageModel.of_engine(engine, tokenizer, settings, world, sharding)

    def score() -> dict[str, Any] | None:
        try:
            result = score_tasks(model, job.tasks, config.evaluation.max_new_tokens, config.data.context_length)
        except Diverged:
            return None
        return {"scores": result["scores"], "by_source": result["by_source"]}

    return score
