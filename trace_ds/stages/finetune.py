"""``trace-ds finetune``: base model + token datasets → the model that knows (target) and references that never saw.

One training job a model (DeepSpeed ZeRO and AutoEP, the loop of ``unlearn``), then its conversion:

    RUN/finetune/NAME/checkpoints/step_N   as those of unlearn, resumed and stopped likewise
    RUN/finetune/NAME/model                the Hugging Face directory that the later stages read

The stages after it see the target as the run's model, and the others among the models that are scored.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.checkpoints.manifest import newest_complete, step_name
from trace_ds.config.schema import Config
from trace_ds.config.sections.training import TARGET, FinetuneSettings
from trace_ds.conversion.card import model_name
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, require_plain_logits
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import already_done, stage_log
from trace_ds.stages.convert import is_converted, write_model
from trace_ds.stages.inputs import Inputs, check_vocabulary, checked_model, job_identity
from trace_ds.stages.training import Training, ds_config_of, identifying_settings, model_settings

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.unlearning.batches import CorpusBatches


@dataclass(frozen=True)
class FinetuneJobs:
    """All models that the configuration has made, one after the other."""

    config: Config
    place: RunDirectory
    models: list[FinetuneJob]

    def done(self) -> bool:
        return all(job.is_done() for job in self.models)

    def run(self, world: World | None) -> None:
        """Make every model (collectively, on every rank); those that are there already are left as they are.

        Raises:
            StopRequested: stopped on request; a complete checkpoint was saved.
        """
        assert world is not None
        for job in self.models:
            if not world.run_on_main_and_broadcast(job.is_trained):
                job.train(world)
            elif world.is_main:
                already_done("finetune", job.place)
            world.run_on_main_and_broadcast(job.convert)


@dataclass(frozen=True)
class FinetuneJob:
    """One model to make, checked.

    Attributes:
        place: its own run directory, ``RUN/finetune/NAME``.
        sides: the corpora it is trained on.
    """

    config: Config
    place: RunDirectory
    name: str
    sides: tuple[str, ...]
    info: ModelInfo
    data: artefact.Artefact
    steps: int
    identity: str

    @property
    def training(self) -> Training:
        return Training("finetune", settings_of(self.config), self.place, self.config, self.info, self.identity)

    @property
    def checkpoint(self) -> Path:
        """Directory of the newest complete checkpoint."""
        return self.place.checkpoints / step_name(newest_complete(self.place.checkpoints)[0] or 0)

    def is_trained(self) -> bool:
        return self.training.is_done(lambda manifest: manifest.step >= self.steps)

    def is_converted(self) -> bool:
        return is_converted(self.config, self.place, self.checkpoint)

    def is_done(self) -> bool:
        return self.is_trained() and self.is_converted()

    def train(self, world: World) -> None:
        """Train to the last step (collective)."""
        from trace_ds.unlearning.objective import NextToken
        from trace_ds.unlearning.trainer import train, training_engine

        settings, training = settings_of(self.config), self.training
        with training.log_and_checkpoint(world, "finetune") as (log, chosen):
            batches = world.run_on_main_first(lambda: make_finetune_batches(self.config, self.sides, self.data))
            accumulation = batches.micro_batches_per_step(world.size)
            engine = training_engine(settings, self.info, world, accumulation, **model_settings(self.config))
            start = training.restore(world, engine, chosen, log)
            log.detail(
                f"{self.name}: {self.steps} steps of {settings.batch_rows} rows of {' and '.join(self.sides)}, ZeRO "
                f"stage {settings.zero_stage}, world size {world.size}, "
                f"expert-parallel size {self.config.distributed.ep}"
            )
            train(engine, world, batches, NextToken(), settings, self.steps, self.place, start, log)
            engine.destroy()
            del engine
            gc.collect()  # the next model takes its place

    def convert(self) -> None:
        """Convert its newest checkpoint, if that is not done."""
        if self.is_converted():
            return
        config, settings = self.config, settings_of(self.config)
        method = {
            "fine-tuned on": " and ".join(self.sides),
            "loss": "mean next-token NLL",
            "steps": self.steps,
            "rows a step": settings.batch_rows,
            "learning rate": f"{settings.optimizer.lr:g}",
            "seed": config.seed,
        }
        card = {
            "name": f"{config.name}-{self.name}",
            "base_model": model_name(Path(config.model.path)),
            "method": method,
        }
        with stage_log(self.place, "finetune") as log:
            write_model(self.config, self.place, self.checkpoint, card, log)


def settings_of(config: Config) -> FinetuneSettings:
    """The job's settings; :class:`UserError` where the configuration has no such section."""
    if config.finetune is None:
        raise UserError("the configuration asks for no fine-tuning", "finetune", "add finetune.models and epochs")
    return FinetuneSettings.of(config.finetune, config.unlearning)


def after_finetune(config: Config, run: RunDirectory) -> Config:
    """The configuration as the later stages see it; the same one where nothing is fine-tuned."""
    if config.finetune is None:
        return config
    paths = {name: str(run.finetuned(name).model) for name in config.finetune.models}
    model = {"path": paths.pop(TARGET), "tokenizer": config.model.tokenizer_path}
    evaluation: dict[str, Any] = {"models": config.evaluation.models | paths}
    changes = {
        "model": config.model.model_copy(update=model),
        "evaluation": config.evaluation.model_copy(update=evaluation),
        "finetune": None,
    }
    return config.model_copy(update=changes)


def require_models(config: Config, run: RunDirectory) -> None:
    """Refuse to go on without the models that the configuration has made."""
    for name in config.finetune.models if config.finetune is not None else ():
        place = run.finetuned(name).model
        if not place.is_dir():
            raise UserError(f"there is no model {name} here", str(place), "make it with `trace-ds finetune CONFIG`")


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    settings_of(config)
    _check_settings(config, checked_model(config, processes))
    check_vocabulary(config)


def _check_settings(config: Config, info: ModelInfo) -> dict[str, Any] | None:
    """What can be wrong with the settings and this model alone; returns the user's DeepSpeed keys, if there are any."""
    require_plain_logits(info, "finetune")
    return ds_config_of(settings_of(config))


def check(config: Config, run: RunDirectory, world_size: int) -> FinetuneJobs:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    settings = settings_of(config)
    info = checked_model(config, world_size)
    data = Inputs.read(config, run, info.fingerprint).data
    shared = {
        "model": info.fingerprint,
        "ds_config": _check_settings(config, info),
        "dtype": config.model.dtype,
        "seed": config.seed,
    }
    jobs = []
    for name, sides in settings.models.items():
        if unprepared := [side for side in sides if f"{side}.arrow" not in data.files]:
            problem = f"the prepared data has no corpus {unprepared[0]!r}"
            raise UserError(problem, str(run.data), data.fix)
        seen = [data.files[f"{side}.arrow"]["sha256"] for side in sides]  # not the corpora that it does not see
        steps = make_finetune_batches(config, sides, data).steps
        own = identifying_settings(settings, steps, "models", "epochs")
        identity = job_identity(kind="finetune", data=seen, settings=own, **shared)
        jobs.append(FinetuneJob(config, run.finetuned(name), name, tuple(sides), info, data, steps, identity))
    return FinetuneJobs(config, run, jobs)


def make_finetune_batches(config: Config, sides: list[str] | tuple[str, ...], data: artefact.Artefact) -> CorpusBatches:
    """The rows of a fine-tuning job over the corpora ``sides``."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.unlearning.batches import CorpusBatches

    corpora = [TokenDataset.open(data.file(f"{side}.arrow")) for side in sides]
    return CorpusBatches(settings_of(config), config.seed, corpora)
