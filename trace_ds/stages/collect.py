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

from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, require_plain_logits
from trace_ds.routing.token_files import Recording
from trace_ds.run import artefact, ours
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import remove_directory, write_json
from trace_ds.run.hub_names import provenance
from trace_ds.stages.inputs import Inputs, check_vocabulary, checked_model, look_at
from trace_ds.stages.recorded import keys_needing_trace

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog

STATISTICS_NAME = "statistics.safetensors"
SHAPE_NAME = "shape.json"  # of a collection that has not ended: which job, on which cluster shape

SAMPLE_TOKENS = 200_000  # counted tokens of a corpus whose top-k experts are always recorded


@dataclass(frozen=True)
class CollectJob:
    """What is to be collected, checked: model, data artefact, and by side the new artefact's inputs and settings.

    ``place``: the run directory.
    """

    config: Config
    place: RunDirectory
    info: ModelInfo
    data: artefact.Artefact
    inputs: dict[str, dict[str, str]]
    settings: dict[str, dict[str, Any]]

    def identity(self, side: str) -> str:
        """Of the artefact to make."""
        return artefact.identity_of("statistics", self.inputs[side], self.settings[side])

    def existing(self, side: str, *, verify: bool = True) -> artefact.Artefact | None:
        """The artefact that is already there, whole, from the same inputs, with all that is needed (or more)."""
        try:
            statistics = artefact.load(self.place.statistics / side, "statistics", verify=verify)
        except UserError:
            return None
        recorded = all(covers(statistics.settings.get(key), value) for key, value in self.settings[side].items())
        return statistics if recorded and statistics.inputs == self.inputs[side] else None

    def done(self) -> bool:
        return all(self.existing(side) is not None for side in self.inputs)

    def run(self, world: World | None) -> None:
        """Collect the statistics of both corpora (collectively, on every rank); skips a side that is already done."""
        assert world is not None
        collect(self, world)


def covers(recorded: Any, needed: Any) -> bool:
    """Whether a setting of an artefact is the needed one, where False and None need nothing."""
    return needed is None or needed is False or recorded == needed


def preflight(config: Config, run: RunDirectory, processes: int, *, download: bool) -> None:
    checked_model(config, processes)
    check_vocabulary(config)


def look(config: Config, run: RunDirectory) -> None:
    look_at(config, run, "data")


def check(config: Config, run: RunDirectory, world_size: int) -> CollectJob:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info = checked_model(config, world_size)
    if config.statistics.nll:
        require_plain_logits(info, "statistics.nll")
    found = Inputs.read(config, run, info.fingerprint)
    inputs = {side: found.fingerprints | {"side": side} for side in config.data.sides}
    always = {"dtype": config.model.dtype, "top_k": info.top_k}
    settings = {side: always | asdict(recording(config, side)) for side in inputs}
    return CollectJob(config, run, info, found.data, inputs, settings)


def recording(config: Config, side: str) -> Recording:
    """What the configuration asks to be recorded of one side."""
    settings = config.statistics
    return Recording(
        trace=bool(keys_needing_trace(config, side)) if settings.trace is None else settings.trace,
        nll=settings.nll,
        rows=side == "retain",
        sample_tokens=SAMPLE_TOKENS if side in ("forget", "retain") else 0,
    )


def about_trace(config: Config, side: str, trace_bytes: int) -> str:
    """Whether the routing trace of a side is recorded, what it takes, and which keys decided that, for the log."""
    keys = ["statistics.trace: true"] if config.statistics.trace else keys_needing_trace(config, side)
    if keys and config.statistics.trace is not False:
        return f"{side}: the routing trace of every token, {trace_bytes:,} bytes, is recorded for {', '.join(keys)}"
    return (
        f"{side}: no routing trace: {'statistics.trace is false' if keys else 'no key of the configuration needs it'}"
    )


def middle_layer(info: ModelInfo) -> int:
    """RMU's default decoder layer (0-based)."""
    return info.decoder_layers // 2


def collect(job: CollectJob, world: World) -> None:
    from trace_ds.run.log import already_done, stage_log

    config, run = job.config, job.place
    todo = [side for side in job.inputs if not _is_done(world, job, side)]
    if not todo:
        if world.is_main:
            already_done("collect", run)
        return
    with stage_log(run, "collect", enabled=world.is_main) as log:
        log.detail(f"world size {world.size}, expert-parallel size {config.distributed.ep}, {', '.join(todo)}")
        engine = _engine(config, world, job, log)
        for side in todo:
            _collect_side(config, run, world, job, side, engine, log)
        if world.is_main:
            found = {side: artefact.load(run.statistics / side, "statistics", verify=False).summary for side in todo}
            counted = " and ".join(f"{side} {each['tokens']:,}" for side, each in found.items())
            of = found[todo[0]]
            log.done(
                f"{counted} tokens counted: {of['top_k']} of {of['experts']} experts in {len(of['layers'])} layers"
            )


def _engine(config: Config, world: World, job: CollectJob, log: StageLog) -> Any:
    """The frozen model, ready to be run over packed rows (collective)."""
    from trace_ds.models.attention import find_attention_problem
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.loading import ModelParts

    if job.info.family.autoep_preset is None:
        sharding = "its weights are sharded by ZeRO-3" if world.size > 1 else "one process holds it whole"
        log.detail(f"the family {job.info.family.model_type} has no expert parallelism: {sharding}")
    ep = config.distributed.ep
    asked = recording(config, "retain")
    parts = ModelParts(head=asked.nll, last_output=asked.nll)
    engine = inference_engine(
        job.info,
        world,
        dtype=config.model.dtype,
        ep=ep,
        options=config.distributed.autoep,
        parts=parts,
    )
    if why := find_attention_problem(engine.module):
        log.detail(f"attention is transformers' own: {why}")
        if config.data.packing != "single":
            from trace_ds.routing.collection import refused_packing

            vocabulary = int(job.info.config["vocab_size"])
            world.raise_on_all_ranks(refused_packing(engine, vocabulary, world.device))
    return engine


def _is_done(world: World, job: CollectJob, side: str) -> bool:
    """What :meth:`CollectJob.done` says of one side, the hashing shared among the ranks (collective)."""

    def described() -> dict[str, dict[str, Any]] | None:
        statistics = job.existing(side, verify=False)
        return None if statistics is None else statistics.files

    expected = world.run_on_main_and_broadcast(described)
    return expected is not None and _file_entries(world, job.place.statistics / side, sorted(expected)) == expected


def _file_entries(world: World, directory: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of each file, on every rank (collective); rank r of W reads every W-th from the r-th on.

    Shared out, because a collective does not wait for ever for one rank that hashes everything.
    """
    mine: dict[str, dict[str, Any]] = {}
    world.run_on_all_ranks(
        lambda: mine.update({name: artefact.file_entry(directory / name) for name in names[world.rank :: world.size]})
    )
    return {name: entry for found in world.gather(mine) for name, entry in found.items()}


def _collect_side(
    config: Config, run: RunDirectory, world: World, job: CollectJob, side: str, engine: Any, log: StageLog
) -> None:
    """One side: the pass into ``SIDE.partial``, its description, then its name (collective).

    The description is written while the saved states are still there, so that a kill at any moment leaves either
    something to continue from or something that only needs its name.
    """
    from trace_ds.routing.collection import remove_states
    from trace_ds.run.files import commit_directory

    destination = run.statistics / side
    directory = destination.with_name(f"{side}.partial")
    if not world.run_on_main_and_broadcast(lambda: _prepare_directory(directory, _shape(config, world, job, side))):
        _pass(config, world, job, side, engine, directory, run.stop_files, log)

    def commit() -> None:
        remove_states(directory)
        (directory / SHAPE_NAME).unlink(missing_ok=True)
        commit_directory(directory, destination)
        found = artefact.load(destination, "statistics", verify=False).summary
        log.detail(f"{side}: {found['tokens']:,} tokens of {found['documents']:,} documents counted")

    world.run_on_main_and_broadcast(commit)


def _pass(
    config: Config,
    world: World,
    job: CollectJob,
    side: str,
    engine: Any,
    directory: Path,
    stop_files: Sequence[Path],
    log: StageLog,
) -> None:
    """The forward passes, and the description of what they left in ``directory`` (collective)."""
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.routing.collection import Collection
    from trace_ds.routing.token_files import bytes_per_token, part_name

    dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
    collection = Collection(
        engine,
        world,
        dataset,
        experts=job.info.experts,
        top_k=job.info.top_k,
        recording=recording(config, side),
        batch_rows=config.statistics.batch_rows,
        directory=directory,
    )
    trace_bytes, _ = bytes_per_token(len(collection.layers), job.info.experts, job.info.top_k, 1)
    log.detail(about_trace(config, side, round(dataset.tokens * trace_bytes)))
    try:
        statistics = collection.run(log, side, config.statistics.save_every, stop_files)
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


def _shape(config: Config, world: World, job: CollectJob, side: str) -> dict[str, Any]:
    """What must be the same for a pass to continue another: beside the job, all that decides how sums are rounded."""
    from trace_ds.models.engine import expert_kernel
    from trace_ds.routing.counter import SUMS

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
    if artefact.find(path, "statistics", shape["identity"], verify=False) is not None:
        return True
    try:
        same = json.loads((path / SHAPE_NAME).read_text(encoding="utf-8")) == shape
    except (OSError, ValueError):
        same = False
    if not same:
        remove_directory(path, ours.PARTIAL, ours.ARTEFACT)
        path.mkdir(parents=True)
        write_json(path / SHAPE_NAME, shape)
    return False
