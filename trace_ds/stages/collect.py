"""``trace-ds collect``: one forward pass of the frozen model over both corpora → routing statistics (and more).

Every rank reads a contiguous range of rows; experts are sharded over expert-parallel groups by DeepSpeed AutoEP; the
integer counts are all-reduced over the whole world once, at the end.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, require_plain_logits
from trace_ds.routing.token_files import Recording
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import ARTEFACT, PARTIAL, remove_directory, write_json
from trace_ds.run.hub_names import provenance
from trace_ds.stages.inputs import Inputs, check_vocabulary, checked_model

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog

STATISTICS_NAME = "statistics.safetensors"
SHAPE_NAME = "shape.json"  # of a collection that has not ended: which job, on which cluster shape
SAMPLE_TOKENS = 200_000  # counted tokens of a corpus whose top-k experts are always recorded


@dataclass(frozen=True)
class CollectJob:
    """A checked collection: model, data artefact, and by side the new artefact's inputs and settings.

    ``place``: the run directory.
    """

    config: Config
    place: RunDirectory
    info: ModelInfo
    data: artefact.Artefact
    inputs: dict[str, dict[str, str]]
    settings: dict[str, dict[str, Any]]

    def identity(self, side: str) -> str:
        """Identity of the statistics to collect for one side."""
        return artefact.identity_of("statistics", self.inputs[side], self.settings[side])

    def existing(self, side: str, *, verify: bool = True) -> artefact.Artefact | None:
        """The artefact that is already there, whole, from the same inputs, with all that is needed (or more)."""
        try:
            statistics = artefact.load_artefact(self.place.statistics / side, "statistics", verify=verify)
        except UserError:
            return None
        recorded = all(covers(statistics.settings.get(key), value) for key, value in self.settings[side].items())
        return statistics if recorded and statistics.inputs == self.inputs[side] else None

    def missing(self) -> list[str]:
        return [side for side in self.inputs if self.existing(side) is None]

    def done(self) -> bool:
        return not self.missing()

    def run(self, world: World | None) -> None:
        """Collect the statistics of both corpora (collectively, on every rank); skips a side that is already done."""
        from trace_ds.run.log import already_done, stage_log

        assert world is not None
        run = self.place
        missing = world.run_on_main_and_broadcast(self.missing)
        if not missing:
            if world.is_main:
                already_done("collect", run)
            return
        with stage_log(run, "collect", enabled=world.is_main) as log:
            log.detail(
                f"world size {world.size}, expert-parallel size {self.config.distributed.ep}, {', '.join(missing)}"
            )
            engine = _engine(self, world, log)
            for side in missing:
                _collect_side(self, world, side, engine, log)
            if world.is_main:
                by_side = {
                    side: artefact.load_artefact(run.statistics / side, "statistics", verify=False) for side in missing
                }
                counted = " and ".join(f"{side} {each.summary['tokens']:,}" for side, each in by_side.items())
                model = by_side[missing[0]].summary
                log.done(
                    f"{counted} tokens counted: {model['top_k']} of {model['experts']} experts in "
                    f"{len(model['layers'])} layers"
                )


def covers(recorded: Any, needed: Any) -> bool:
    """Whether a setting of an artefact is the needed one, where False and None need nothing."""
    return needed is None or needed is False or recorded == needed


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    checked_model(config, processes)
    check_vocabulary(config)


def check(config: Config, run: RunDirectory, world_size: int) -> CollectJob:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info = checked_model(config, world_size)
    if config.statistics.nll:
        require_plain_logits(info, "statistics.nll")
    read = Inputs.read(config, run, info.fingerprint)
    inputs = {side: read.fingerprints | {"side": side} for side in config.data.sides}
    always = {"dtype": config.model.dtype, "top_k": info.top_k}
    settings = {side: always | asdict(recording(config, side)) for side in inputs}
    return CollectJob(config, run, info, read.data, inputs, settings)


def needs_trace(config: Config, side: str) -> bool:
    """Whether the configuration, or a variant, needs the experts of every token of ``side``.

    The trace of 200,000 rows of 1,024 tokens takes 79 GB on Qwen3-30B-A3B, the selections of its rows 2.4 GB
    (docs/method.md, section 8).
    """
    configs = (config, *variants_of(config).values())
    return side == "retain" and any(
        each.unlearning.apply == "loss" and each.calibration.rule != "uniform" for each in configs
    )


def recording(config: Config, side: str) -> Recording:
    """What to record of one side, as the configuration and its variants need."""
    settings = config.statistics
    return Recording(
        trace=needs_trace(config, side) if settings.trace is None else settings.trace,
        nll=settings.nll,
        rows=side == "retain",
        sample_tokens=SAMPLE_TOKENS if side in ("forget", "retain") else 0,
    )


def _engine(job: CollectJob, world: World, log: StageLog) -> Any:
    """The frozen model, ready to be run over packed rows (collective)."""
    from trace_ds.models.attention import find_attention_problem
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.loading import ModelParts

    if job.info.family.autoep_preset is None:
        sharding = "its weights are sharded by ZeRO-3" if world.size > 1 else "one process holds it whole"
        log.detail(f"the family {job.info.family.model_type} has no expert parallelism: {sharding}")
    config, ep = job.config, job.config.distributed.ep
    nll = config.statistics.nll
    engine = inference_engine(
        job.info,
        world,
        dtype=config.model.dtype,
        ep=ep,
        parts=ModelParts(head=nll, last_output=nll),
    )
    if why := find_attention_problem(engine.module):
        log.detail(f"attention is transformers' own: {why}")
        if config.data.packing != "single":
            from trace_ds.routing.collection import refused_packing

            vocabulary = int(job.info.config["vocab_size"])
            world.raise_on_all_ranks(refused_packing(engine, vocabulary, world.device))
    return engine


def _file_entries(world: World, directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, on every rank (collective); rank r of W reads every W-th from the r-th on.

    Shared out, because a collective does not wait for ever for one rank that hashes everything.
    """
    mine: dict[str, dict[str, Any]] = {}
    world.run_on_all_ranks(
        lambda: mine.update({name: artefact.file_entry(directory / name) for name in names[world.rank :: world.size]})
    )
    return {name: entry for entries in world.gather(mine) for name, entry in entries.items()}


def _collect_side(job: CollectJob, world: World, side: str, engine: Any, log: StageLog) -> None:
    """One side: the pass into ``SIDE.partial``, its description, then its name (collective).

    The description is written while the saved states are still there, so that a kill at any moment leaves either
    something to continue from or something that only needs its name.
    """
    from trace_ds.routing.collection import remove_states
    from trace_ds.run.files import commit_directory

    destination = job.place.statistics / side
    directory = destination.with_name(f"{side}.partial")
    if not world.run_on_main_and_broadcast(lambda: _prepare_directory(directory, _shape(job, world, side))):
        _pass(job, world, side, engine, directory, log)

    def commit() -> None:
        remove_states(directory)
        (directory / SHAPE_NAME).unlink(missing_ok=True)
        commit_directory(directory, destination)
        summary = artefact.load_artefact(destination, "statistics", verify=False).summary
        log.detail(f"{side}: {summary['tokens']:,} tokens of {summary['documents']:,} documents counted")

    world.run_on_main_and_broadcast(commit)


def _pass(job: CollectJob, world: World, side: str, engine: Any, directory: Path, log: StageLog) -> None:
    """The forward passes, and the description of what they left in ``directory`` (collective)."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.routing.collection import Collection
    from trace_ds.routing.token_files import bytes_per_token, part_name

    settings, records = job.config.statistics, recording(job.config, side)
    dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
    collection = Collection(
        engine,
        world,
        dataset,
        experts=job.info.experts,
        top_k=job.info.top_k,
        recording=records,
        batch_rows=settings.batch_rows,
        directory=directory,
    )
    if records.trace:
        trace_bytes, _ = bytes_per_token(len(collection.layers), job.info.experts, job.info.top_k, 1)
        total = round(dataset.tokens * trace_bytes)
        log.detail(f"{side}: the routing trace of every token, {total:,} bytes, is recorded")
    try:
        statistics = collection.run(log, side, settings.save_every, job.place.stop_files)
    except UserError:  # the input is wrong, nothing of it can be used; after a full disk the pass can continue
        if world.is_main:
            shutil.rmtree(directory, ignore_errors=True)
        raise
    world.run_on_main_and_broadcast(lambda: statistics.save(directory / STATISTICS_NAME))
    parts = [part_name(name, rank, world.size) for name in collection.parts for rank in range(world.size)]
    files = _file_entries(world, directory, [*parts, STATISTICS_NAME])  # every rank's own parts by itself
    summary = {
        "layers": collection.layers,
        "experts": job.info.experts,
        "top_k": job.info.top_k,
        "tokens": statistics.tokens,
        "documents": statistics.documents,
        "rows": len(dataset),
        **provenance(job.info.path, "model"),
    }
    world.run_on_main_and_broadcast(
        lambda: artefact.describe(directory, "statistics", job.inputs[side], job.settings[side], summary, files=files)
    )


def _shape(job: CollectJob, world: World, side: str) -> dict[str, Any]:
    """What must be the same for a pass to continue another: beside the job, all that decides how sums are rounded."""
    from trace_ds.models.engine import expert_kernel
    from trace_ds.routing.counter import SUMS

    config = job.config
    return {
        "identity": job.identity(side),
        "sums": [name for name, _ in SUMS],  # a state of an older version lacks some
        "world": world.size,
        "ep": config.distributed.ep,
        "batch_rows": config.statistics.batch_rows,
        "device": world.device.type,
        "expert_kernel": expert_kernel(job.info, world.device),
    }


def _prepare_directory(path: Path, shape: dict[str, Any]) -> bool:
    """Whether a killed collection left everything in ``path`` but its final name.

    If not, ``path`` is emptied, unless a killed collection of the same thing in the same shape left it.
    """
    if artefact.find_current(path, "statistics", shape["identity"], verify=False) is not None:
        return True
    try:
        same = json.loads((path / SHAPE_NAME).read_text(encoding="utf-8")) == shape
    except (OSError, ValueError):
        same = False
    if not same:
        remove_directory(path, PARTIAL, ARTEFACT)
        path.mkdir(parents=True)
        write_json(path / SHAPE_NAME, shape)
    return False
