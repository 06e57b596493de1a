"""Weights-only snapshots of a job: the model as it is being trained, written by its ranks as a Hugging Face directory.

``RUN/snapshots/step_N/`` is what ``trace-ds convert`` would make of a checkpoint of that step, in the type that the job
trains in: no optimizer state is written, and no process holds more than its share. It is the way of loading
(:mod:`trace_ds.models.loading`) backwards:

1. the main process makes the files at their full length, headers first, in step_N.tmp-PID/
2. each rank writes the elements that it holds; what several hold, and what is the base model's, they share out
3. each rank hashes a share of the tensors, as they are on the disk
4. the main process writes conversion.json with the hashes, and renames the directory
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trace_ds.checkpoints.manifest import STEP, Manifest, step_name
from trace_ds.conversion.card import card_of_conversion
from trace_ds.conversion.convert import FORMAT, Plan, lay_out, make_plan
from trace_ds.models.weight_files import BLOCK_NUMEL, WeightFiles, full_shape, held, persistent_buffers
from trace_ds.parallel.world import World, quiet_deepspeed
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import commit_directory, remove_directory, removed_on_error, write_json, write_text
from trace_ds.run.foreign import read_object
from trace_ds.run.ours import converted_model
from trace_ds.stages.convert import card_facts
from trace_ds.tensors.opening import REPORT, open_huggingface, open_source
from trace_ds.tensors.stream import read_back

if TYPE_CHECKING:
    from trace_ds.config.schema import Config


@dataclass(frozen=True)
class Snapshots:
    """Writes them (collective); ``start``: the job's manifest, ``plan``: the base model in the type that is written."""

    config: Config
    run: RunDirectory
    world: World
    start: Manifest
    plan: Plan

    @classmethod
    def asked(
        cls, config: Config, run: RunDirectory, world: World, start: Manifest, say: Callable[[str], None]
    ) -> Snapshots | None:
        """Those that the settings ask for; snapshots of another job are deleted, which is said."""
        if config.unlearning.snapshot_every is None:
            return None

        def plan(verify: bool) -> Plan:
            if verify and run.snapshots.is_dir():
                for path in [path for path in run.snapshots.iterdir() if STEP.fullmatch(path.name)]:
                    source = read_object(path / REPORT, "the report", "remove this folder").get("source")
                    if not isinstance(source, dict) or source.get("job") != start.job:
                        remove_directory(path, converted_model)
                        say(f"WARNING {path} was of another job and was deleted")
            return make_plan(open_source(Path(config.model.path)), config.model.dtype, None)

        return cls(config, run, world, start, world.agree_each(plan))

    def due(self, done: int) -> bool:
        return done % (self.config.unlearning.snapshot_every or 1) == 0

    def write(self, engine: Any, step: int) -> None:
        """The model in the engine, after ``step`` steps.

        Raises:
            OSError: this rank could not write (AgreedError: another one could not); nothing is left then.
        """
        world, destination = self.world, self.run.snapshots / step_name(step)
        temporary = Path(world.broadcast(str(destination.with_name(f"{destination.name}.tmp-{os.getpid()}"))))
        with removed_on_error(temporary) if world.is_main else contextlib.nullcontext():
            world.agree(lambda: self._make(temporary))
            masters = self._masters(engine)
            world.agree_all(lambda: self._fill(engine, masters, temporary))
            hashed = world.gather(world.agree_all(lambda: self._hashed(temporary)))
            world.agree(lambda: self._publish(temporary, destination, step, dict(chain(*map(dict.items, hashed)))))

    def _make(self, directory: Path) -> None:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        lay_out(self.plan, directory, self.config.conversion.max_shard_size)

    def _masters(self, engine: Any) -> dict[str, torch.Tensor]:
        """The optimizer's own of what is written in fp32 and not held so (gpt_oss's norms; collective)."""
        get = quiet_deepspeed().utils.safe_get_full_fp32_param
        wanted = [
            (name, parameter)
            for name, parameter in engine.module.named_parameters()
            if self.plan.layout.keeps_fp32(name) and parameter.dtype != torch.float32 and parameter.requires_grad
        ]
        return {name: get(parameter) for name, parameter in wanted}

    def _fill(self, engine: Any, masters: dict[str, torch.Tensor], directory: Path) -> None:
        """Write this rank's elements."""
        rank, size, ep = self.world.rank, self.world.size, self.start.ep
        files = WeightFiles.open(directory, self.plan.layout)
        for name, parameter in chain(engine.module.named_parameters(), persistent_buffers(engine.module)):
            source, found = files.source(name), masters.get(name, parameter)
            values, first, last = held(found)
            is_share = source.numel != math.prod(full_shape(found))  # the experts of this rank
            shift = source.numel // ep * (rank % ep) if is_share else 0
            part, parts = (rank // ep, size // ep) if is_share else (rank, size)
            if hasattr(found, "ds_tensor"):
                part, parts = 0, 1
            begin, end = ((last - first) * each // parts for each in (part, part + 1))
            files.write(source, shift + first + begin, values[begin:end])
        if self.start.layers is not None:
            base = WeightFiles.open(self.plan.base_model, self.plan.layout)
            for name in sorted(self.plan.layout.above(self.start.layers)):
                source = base.source(name)
                begin, end = (source.numel * each // size for each in (rank, rank + 1))
                for start in range(begin, end, BLOCK_NUMEL):
                    block = torch.empty(min(BLOCK_NUMEL, end - start), dtype=source.dtype)
                    base.read(source, start, block)
                    files.write(files.source(name), start, block)
            base.close()
        files.close()

    def _hashed(self, directory: Path) -> dict[str, dict[str, Any]]:
        """Facts of this rank's share of the tensors, by name, for the report."""
        found = open_huggingface(directory).tensors
        mine = [found[name] for name in sorted(found)[self.world.rank :: self.world.size]]
        return {source.name: facts for source, facts in zip(mine, read_back(mine, 1), strict=True)}

    def _publish(self, work: Path, destination: Path, step: int, tensors: dict[str, dict[str, Any]]) -> None:
        start, held_layers = self.start, self.start.layers
        source = {"kind": "job", "name": destination.name, "step": step, "job": start.job, "family": start.family}
        source |= {"world": start.world, "ep": start.ep, "zero_stage": start.zero_stage, "manifest_sha256": None}
        notes = (
            [] if held_layers is None else [f"the job held {held_layers} decoder layers: the rest is the base model's"]
        )
        report = {
            "format": FORMAT,
            "source": source,
            "target": "hf",
            "max_shard_size": self.config.conversion.max_shard_size,
            "tensors": dict(sorted(tensors.items())),
            "dtype": self.plan.dtype,
            "parameters": sum(piece.numel for piece in self.plan.fused.values()),
            "notes": notes,
            "warnings": [],
        }
        write_json(work / REPORT, report)
        card = card_of_conversion(destination.name, self.plan.base_model, report, card_facts(self.config, self.run))
        write_text(work / "README.md", card)
        commit_directory(work, destination, converted_model)
