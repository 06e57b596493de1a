"""``trace-ds convert CONFIG``: the newest complete checkpoint of a run → ``RUN/model/``, a Hugging Face model.

One process, no GPU. ``RUN/model/conversion.json`` is the proof: the SHA-256 of the checkpoint's manifest it was made
from and the hash of every file. A rerun from the same checkpoint with the same settings does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run.directory import FINETUNE, RunDirectory, unwritable
from trace_ds.run.files import sha256_file
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import provenance
from trace_ds.run.log import StageLog, byte_progress, stage_log
from trace_ds.terminal import size

if TYPE_CHECKING:
    from trace_ds.parallel.world import World

MAX_JOBS = 4
RETAIN_NAMES = {"nll": "NLL", "kl": "KL to the frozen model", "hidden_mse": "hidden-state MSE"}


@dataclass(frozen=True)
class ConvertJob:
    """A checkpoint of a run (the newest complete one), to become ``RUN/model/``.

    ``checkpoint``: None where the run keeps none (``unlearning.keep: 0``); ``problems``: what is wrong with newer
    checkpoints.
    """

    config: Config
    place: RunDirectory
    checkpoint: Path | None = None
    problems: Sequence[str] = ()

    def done(self) -> bool:
        return self.checkpoint is not None and is_converted(self.config, self.place, self.checkpoint)

    def run(self, world: World | None = None) -> None:
        """Convert; :class:`UserError` where the checkpoint is damaged or of another model."""
        if self.checkpoint is None:
            print("[convert] nothing to convert: unlearning.keep is 0")
            return
        with stage_log(self.place, "convert") as log:
            for problem in self.problems:
                log.line(f"warning: {problem}")
            write_model(self.config, self.place, self.checkpoint, card_facts(self.config, self.place), log)


def check(config: Config, run: RunDirectory, processes: int = 1) -> ConvertJob:
    """The job; :class:`UserError` where there is no such complete checkpoint."""
    if config.unlearning.keep == 0:
        return ConvertJob(config, run)
    return ConvertJob(config, run, *_choose(config, run))


def write_model(config: Config, run: RunDirectory, checkpoint: Path, card: dict[str, Any], log: StageLog) -> None:
    """A checkpoint of ``run`` as its model, in the type and with the files that the configuration asks for."""
    from trace_ds.conversion.convert import convert_checkpoint

    dtype = config.model.dtype
    try:
        report = convert_checkpoint(
            checkpoint,
            run.model,
            base_model=Path(config.model.path),
            dtype=dtype,
            card=card,
            overwrite=True,
            jobs=min(MAX_JOBS, os.cpu_count() or 1),
            progress=byte_progress(log),
        )
    except OSError as error:
        raise unwritable(run.model, error) from error
    for warning in report["warnings"]:
        log.line(f"warning: {warning}")
    summary = f"{report['parameters']:,} parameters, {size(report['bytes'])} in {dtype}"
    log.done(f"{checkpoint.name} → {run.model.name}/: {summary}")


def preflight(config: Config, run: RunDirectory, processes: int = 1, *, download: bool = False) -> None:
    """Nothing that a configuration says can be wrong for a conversion."""


def _choose(config: Config, run: RunDirectory) -> tuple[Path, list[str]]:
    """The checkpoint to convert, its sizes checked, and a line for each problem with the others."""
    from trace_ds.checkpoints.manifest import newest_complete, read_manifest, step_name
    from trace_ds.run.curve import has_ended

    step, problems = newest_complete(run.checkpoints)
    if step is None:
        detail = f" ({problems[0]})" if problems else ""
        raise UserError(
            f"there is no complete checkpoint{detail}", str(run.checkpoints), "make one with `trace-ds unlearn CONFIG`"
        )
    points = read_manifest(run.checkpoints / step_name(step)).trainer_state.get("curve", [])
    ended = bool(points) and points[-1]["step"] == step and has_ended(config.unlearning.evaluate, points[-1])
    if step < config.unlearning.steps and not ended:
        problems.append(f"the newest complete checkpoint is of step {step} of {config.unlearning.steps}")
    return run.checkpoints / step_name(step), problems


def is_converted(config: Config, run: RunDirectory, checkpoint: Path) -> bool:
    """Whether the model of ``run`` is whole and was made from exactly this checkpoint, as the configuration asks."""
    from trace_ds.tensors.model_files import read_model_directory

    try:
        report = read_object(run.model / "conversion.json", "the report", "")
        names = read_model_directory(run.model).files
        is_whole = {name: (run.model / name).stat().st_size for name in names} == {
            name: entry["bytes"] for name, entry in report["files"].items()
        }
        made_with = report["source"]["manifest_sha256"], report["dtype"]
    except (OSError, AttributeError, KeyError, TypeError, UserError):
        return False
    return is_whole and made_with == (sha256_file(checkpoint / "manifest.json"), config.model.dtype)


def card_facts(config: Config, run: RunDirectory) -> dict[str, Any]:
    """The facts of the model card, from the configuration."""
    from trace_ds.checkpoints.manifest import newest_complete, read_manifest, step_name
    from trace_ds.conversion.card import model_name

    settings = config.unlearning
    rule = "sources of documents" if config.calibration.source_weights else config.calibration.rule
    method = {
        "forget loss": settings.forget_loss,
        "retain loss": RETAIN_NAMES[settings.retain_term],
        "weight rule": f"{rule}, {config.calibration.experts} experts",
        "weights act by": settings.apply,
        "alpha, gamma": f"{settings.alpha:g}, {settings.gamma:g}",
        "steps": settings.steps,
        "rows a step (forget, retain)": f"{settings.forget_rows}, {settings.retain_rows}",
        "learning rate": f"{settings.optimizer.lr:g}",
        "seed": config.seed,
    }
    base, folder = Path(config.model.path), Path(config.model.path).parent
    if base.name == "model" and folder.parent.name == FINETUNE:  # RUN/finetune/NAME/model
        method["fine-tuned first"] = folder.name
        checkpoints = RunDirectory.at(folder).checkpoints
        step, _ = newest_complete(checkpoints)
        base = Path(read_manifest(checkpoints / step_name(step)).model["path"]) if step is not None else folder
    method |= provenance(base, "base model")
    return {"name": config.name, "base_model": model_name(base), "method": method}
