"""``trace-ds collect``: one forward pass of the frozen model over both corpora → routing statistics (and more).

Every rank reads a contiguous range of rows; experts are sharded over expert-parallel groups by DeepSpeed AutoEP; the
integer counts are all-reduced over the whole world once, at the end.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.corpora.tokenizer import tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, check_expert_parallel, inspect_model, require_plain_logits
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import write_json

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.routing.collection import Wanted
    from trace_ds.run.log import StageLog

SHAPE_NAME = "shape.json"  # of a collection that has not ended: which job, on which cluster shape


@dataclass(frozen=True)
class CollectJob:
    """What is to be collected, checked: model, data artefact, and by side the inputs of the artefact to make."""

    info: ModelInfo
    data: artefact.Artefact
    inputs: dict[str, dict[str, str]]
    settings: dict[str, Any]

    def done(self, run: RunDirectory) -> list[str]:
        """The sides whose artefact is already there, whole, from the same inputs."""
        return [
            side
            for side in self.inputs
            if artefact.is_done(
                run.statistics / side,
                "statistics",
                artefact.identity_of("statistics", self.inputs[side], self.settings),
            )
        ]


def check_collect(config: Config, run: RunDirectory, world_size: int, *, verify: bool = True) -> CollectJob:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info = inspect_model(config.model.path)
    check_expert_parallel(info, config.distributed.ep, world_size)
    if config.statistics.nll:
        require_plain_logits(info, "statistics.nll")
    data = artefact.load(run.data, "data", "prepare CONFIG", verify=verify)
    tokenizer = tokenizer_fingerprint(config.model.tokenizer or config.model.path)
    artefact.require_same(data, "tokenizer", tokenizer, "tokenizer", "prepare CONFIG")
    inputs = {
        side: {"model": info.fingerprint, "tokenizer": tokenizer, "data": data.content, "side": side}
        for side in config.data.sides
    }
    settings = {
        "dtype": config.model.dtype,
        "trace": config.statistics.trace,
        "nll": config.statistics.nll,
        "hidden_layer": middle_layer(info) if config.statistics.hidden else None,
        "top_k": info.top_k,
    }
    return CollectJob(info, data, inputs, settings)


def wanted(config: Config, info: ModelInfo) -> Wanted:
    """What the configuration asks to be recorded."""
    from trace_ds.routing.collection import Wanted

    settings = config.statistics
    return Wanted(settings.trace, settings.nll, middle_layer(info) if settings.hidden else None)


def middle_layer(info: ModelInfo) -> int:
    """The decoder layer (0-based) whose output ``statistics.hidden`` averages, RMU's default layer as well."""
    return info.decoder_layers // 2


def collect(config: Config, run: RunDirectory, world: World) -> None:
    """Collect the statistics of both corpora (collectively, on every rank); skips a side that is already done."""
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.loading import Parts
    from trace_ds.run.log import stage_log

    job = world.agree_each(lambda verify: check_collect(config, run, world.size, verify=verify))
    done = world.broadcast(job.done(run) if world.is_main else [])
    todo = [side for side in job.inputs if side not in done]
    if not todo:
        return
    with stage_log(run, "collect", enabled=world.is_main) as log:
        log.line(f"world size {world.size}, expert-parallel size {config.distributed.ep}, {', '.join(todo)}")
        if job.info.family.autoep_preset is None:
            sharding = "its weights are sharded by ZeRO-3" if world.size > 1 else "one process holds it whole"
            log.line(f"the family {job.info.family.model_type} has no expert parallelism: {sharding}")
        asked = wanted(config, job.info)
        parts = Parts(head=asked.nll, last_output=asked.nll, hidden_layer=asked.hidden_layer)
        engine = inference_engine(config, job.info, world, ep=config.distributed.ep, parts=parts)
        if job.info.family.autoep_preset is None and config.data.documents_per_row != 1:
            from trace_ds.routing.collection import refused_packing

            vocabulary = int(job.info.config["vocab_size"])
            world.raise_together(refused_packing(engine, vocabulary, world.device))
        for side in todo:
            _collect_side(config, run, world, job, side, engine, log)


def _collect_side(
    config: Config, run: RunDirectory, world: World, job: CollectJob, side: str, engine: Any, log: StageLog
) -> None:
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.parallel.world import AgreedError
    from trace_ds.routing.collection import Collection, remove_states
    from trace_ds.run.files import commit_directory

    dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
    destination = run.statistics / side
    made = str(_working_directory(config, world, destination, job, side)) if world.is_main else ""
    directory = Path(world.broadcast(made))
    collection = Collection(
        engine,
        world,
        dataset,
        experts=job.info.experts,
        top_k=job.info.top_k,
        wanted=wanted(config, job.info),
        batch_rows=config.statistics.batch_rows,
        directory=directory,
    )
    try:
        statistics = collection.run(log, side, config.statistics.save_every, run.stop_files)
    except (UserError, AgreedError):
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    world.barrier()  # every part is written before the main process hashes them
    if world.is_main:
        remove_states(directory)
        (directory / SHAPE_NAME).unlink()
        statistics.save(directory / "statistics.safetensors")
        summary = {
            "layers": collection.layers,
            "experts": job.info.experts,
            "top_k": job.info.top_k,
            "tokens": statistics.tokens,
            "documents": statistics.documents,
            "rows": len(dataset),
        }
        artefact.describe(directory, "statistics", job.inputs[side], job.settings, summary)
        commit_directory(directory, destination)
        log.line(f"{side}: {statistics.tokens:,} tokens of {statistics.documents:,} documents counted")
    world.barrier()


def _working_directory(config: Config, world: World, destination: Path, job: CollectJob, side: str) -> Path:
    """``SIDE.partial``: emptied, unless a killed collection of the same thing in the same shape left it."""
    path = destination.with_name(f"{destination.name}.partial")
    shape = {
        "identity": artefact.identity_of("statistics", job.inputs[side], job.settings),
        "world": world.size,
        "ep": config.distributed.ep,
        "batch_rows": config.statistics.batch_rows,
    }
    try:
        same = json.loads((path / SHAPE_NAME).read_text(encoding="utf-8")) == shape
    except (OSError, ValueError):
        same = False
    if not same:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write_json(path / SHAPE_NAME, shape)
    return path
