"""Shared by ``unlearn`` and ``finetune``: a training job's checkpoints, log and point of resumption."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trace_ds import __version__
from trace_ds.checkpoints.manifest import Manifest, newest_complete, read_manifest, step_name
from trace_ds.config.schema import Config
from trace_ds.config.sections.training import TrainingConfig
from trace_ds.models.families import ModelInfo
from trace_ds.run.directory import RunDirectory
from trace_ds.run.hub_names import provenance

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog

# Settings that change when and how a job works, but not what it computes.
OPERATIONAL = {
    "steps",
    "save_every",
    "keep",
    "resume",
    "micro_batch_rows",
    "zero_stage",
    "recompute",
    "ds_config",
}


def identifying_settings(settings: TrainingConfig, steps: int, *others: str) -> dict[str, Any]:
    """The settings that decide what a job computes, without the ``others``: its length only where the learning rate
    depends on it."""
    values = settings.model_dump(mode="json", exclude={*OPERATIONAL, *others})
    return values if settings.optimizer.schedule == "constant" else values | {"steps": steps}


def model_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments shared by the trained and the frozen model's engine: dtype, expert-parallel size."""
    return {"dtype": config.model.dtype, "ep": config.distributed.ep}


def ds_config_of(settings: TrainingConfig) -> dict[str, Any] | None:
    """The user's DeepSpeed keys, checked, if there are any."""
    from trace_ds.models.engine_config import user_ds_config

    return user_ds_config(settings.ds_config) if settings.ds_config is not None else None


@dataclass(frozen=True)
class Training:
    """The part of a training job that decides which checkpoints it may go on from.

    Attributes:
        section: of the configuration, whose ``settings`` are the job's.
        run: where its checkpoints and logs are.
        identity: of the job; only the same one goes on from a checkpoint.
        calibration: content fingerprint of what it was calibrated with; empty: nothing was.
    """

    section: str
    settings: TrainingConfig
    run: RunDirectory
    config: Config
    info: ModelInfo
    identity: str
    calibration: str = ""

    def is_done(self, is_enough: Callable[[Manifest], bool]) -> bool:
        """Whether the newest complete checkpoint is this job's and enough; if so, ``latest`` and the pruning, which a
        kill may have cut off, are made good."""
        from trace_ds.checkpoints.commit import settle

        step, _ = newest_complete(self.run.checkpoints)
        if step is None or self.settings.resume == "never":
            return False
        manifest = read_manifest(self.run.checkpoints / step_name(step))
        if manifest.job != self.identity or not is_enough(manifest):
            return False
        settle(self.run.checkpoints, step, max(self.settings.keep, 2))
        return True

    @contextmanager
    def log_and_checkpoint(self, world: World, stage: str) -> Iterator[tuple[StageLog, Manifest | None]]:
        """The job's log, and the checkpoint that it goes on from, if there is one (collective)."""
        from trace_ds.checkpoints import commit, elastic
        from trace_ds.parallel.device import deterministic
        from trace_ds.run.log import stage_log

        settings, checkpoints = self.settings, self.run.checkpoints
        chosen, problems = commit.choose(world, checkpoints, self.identity, settings.resume, self.section)
        if chosen is not None:
            world.run_on_main_and_broadcast(
                lambda: elastic.check_stage(chosen, settings.zero_stage, checkpoints, self.section)
            )
        with (
            stage_log(self.run, stage, enabled=world.is_main) as log,
            deterministic(self.config.distributed.deterministic),
        ):
            for problem in problems:
                log.line(f"WARNING {problem}")
            yield log, chosen
            log.hyperparameters(
                {
                    "seed": self.config.seed,
                    "model": self.config.model.path,
                    "rule": self.config.calibration.rule,
                    **settings.model_dump(mode="json", exclude=OPERATIONAL - {"steps"}),
                }
            )
            newest = newest_complete(checkpoints)[0]  # None: the job keeps its curve alone
            left = self.run.curve if newest is None else checkpoints / step_name(newest)
            losses = [
                f"{key.removeprefix('loss_')} loss {value:.3g}" for key, value in log.last.items() if "loss_" in key
            ]
            log.done(", ".join([str(left.relative_to(self.run.path)), *losses]))

    def restore(self, world: World, engine: Any, chosen: Manifest | None, log: StageLog) -> Manifest:
        """Load the checkpoint ``chosen``, whatever shape wrote it (None: begin at step 0); its manifest. Collective."""
        step, trainer_state = 0, {"step": 0, "seed": self.config.seed}
        if chosen is not None:
            self._load(world, engine, chosen, log)
            step, trainer_state = chosen.step, chosen.trainer_state
        log.drop_scalars_after(step)
        return self._manifest(world, step, trainer_state)

    def _load(self, world: World, engine: Any, chosen: Manifest, log: StageLog) -> None:
        from trace_ds.checkpoints import commit, elastic

        ep, checkpoints = self.config.distributed.ep, self.run.checkpoints

        def load_one(manifest: Manifest) -> None:
            if (manifest.world, manifest.ep, manifest.zero_stage) == (world.size, ep, self.settings.zero_stage):
                commit.load_state(engine, checkpoints, step_name(manifest.step), manifest.step)
                return
            log.line(
                f"the checkpoint of step {manifest.step} was written by world size {manifest.world}, "
                f"expert-parallel size {manifest.ep}: converting it"
            )
            elastic.load_reshaped(engine, world, checkpoints, manifest, autoep=ep > 1, base_model=self.info.path)

        commit.load_on_all_ranks(world, checkpoints, chosen, load_one, self.section)
        shape = f"world size {world.size}, expert-parallel size {ep}"
        same = (chosen.world, chosen.ep) == (world.size, ep)
        log.line(f"resumed after step {chosen.step}" + ("" if same else f" on {shape}"))
        if world.device.type == "cuda" and not self.config.distributed.deterministic:
            log.line(
                "from here on it equals the undisturbed job up to rounding; bit for bit only with "
                "distributed.deterministic: true"
            )

    def _manifest(self, world: World, step: int, trainer_state: dict[str, Any]) -> Manifest:
        import deepspeed
        import torch
        import transformers

        return Manifest(
            step=step,
            world=world.size,
            ep=self.config.distributed.ep,
            zero_stage=self.settings.zero_stage,
            family=self.info.family.model_type,
            job=self.identity,
            model={
                "path": str(self.config.model.path),
                "fingerprint": self.info.fingerprint,
                **provenance(self.info.path),
            },
            calibration=self.calibration,
            dtype=self.config.model.dtype,
            trainer_state=trainer_state,
            versions={
                "trace_ds": __version__,
                "deepspeed": deepspeed.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        )
