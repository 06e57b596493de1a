"""The inputs of stages, checked: models, tokenizers, tasks and the artefacts of earlier stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.config.sections.base import AUTO
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, check_expert_parallel, inspect_model, largest_expert_parallel_size
from trace_ds.parallel.environment import accelerator_count, launched, local_rank_and_size, rank_and_size
from trace_ds.run import artefact
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import canonical_json, sha256_text
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config

if TYPE_CHECKING:
    from trace_ds.evaluation.items import Task


@dataclass(frozen=True)
class Inputs:
    """The prepared data of a run, checked, and the fingerprints that its other artefacts must have been made from.
    Attributes:
        model, tokenizer: their fingerprints.
    """

    run: RunDirectory
    data: Artefact
    model: str
    tokenizer: str

    @classmethod
    def read(cls, config: Config, run: RunDirectory, model: str) -> Inputs:
        data = artefact.load_artefact(run.data, "data")
        tokenizer = tokenizer_fingerprint(config.model.tokenizer_path)
        data.require_same(tokenizer=tokenizer)
        return cls(run, data, model, tokenizer)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"model": self.model, "tokenizer": self.tokenizer, "data": self.data.content}

    def statistics(self, side: str) -> Artefact:
        return self._load(self.run.statistics / side, "statistics")

    def calibration(self) -> Artefact:
        """UserError names the first stage to run again: without a calibration of these inputs, the statistics, which
        one would be made from, may be of others too."""
        try:
            return self._load(self.run.calibration, "calibration")
        except UserError:
            for side in ("forget", "retain"):
                self.statistics(side)
            raise

    def _load(self, path: Path, kind: str) -> Artefact:
        """An artefact, checked to be made from these inputs."""
        loaded = artefact.load_artefact(path, kind)
        loaded.require_same(**self.fingerprints)
        return loaded


def checked_model(config: Config, world_size: int) -> ModelInfo:
    """The model of the configuration, of a shape that so many processes can run."""
    info = inspect_model(config.model.path)
    check_expert_parallel(info, config.distributed.ep, world_size)
    return info


def check_vocabulary(config: Config) -> None:
    """The tokenizer can be loaded, and the model has a row of embeddings for each of its tokens."""
    check_tokenizer(config.model.tokenizer_path, read_model_config(config.model.path).get("vocab_size"))


def checked_tasks(configs: list[TaskConfig], config: Config) -> list[Task]:
    """Evaluation tasks with their items, whose chat template the tokenizer has."""
    from trace_ds.evaluation.items import read_tasks

    tasks = read_tasks(configs)
    if any(task.apply_chat_template for task in configs):
        from trace_ds.evaluation.harness import check_template

        tokenizer = load_tokenizer(config.model.tokenizer_path)
        for task in configs:
            check_template(task, tokenizer)
    return tasks


def job_identity(**parts: Any) -> str:
    """SHA-256 of everything that determines what a job computes."""
    return sha256_text(canonical_json(parts))


def with_expert_parallel_sizes(
    config: Config, model: Mapping[str, Any], ranks: int, ranks_per_node: int, scoring_ranks: int | None = None
) -> Config:
    """``config`` with numbers where its expert-parallel sizes are ``auto``.

    Args:
        model: the ``config.json`` of its model.
        ranks, scoring_ranks: processes of the distributed stages, and of ``evaluate`` where these are others.
    """
    updates = {}
    scoring = (scoring_ranks or ranks, scoring_ranks or ranks_per_node)
    for name, counts in (("distributed", (ranks, ranks_per_node)), ("evaluation", scoring)):
        section = getattr(config, name)
        if section.ep == AUTO:
            size = largest_expert_parallel_size(model, *counts)
            updates[name] = section.model_copy(update={"ep": size})
    return config.model_copy(update=updates) if updates else config


def with_sizes_here(config: Config) -> Config:
    """:func:`with_expert_parallel_sizes` for the job that this process is a rank of or would start; ``auto`` stays
    without a local model."""
    sizes = (config.distributed.ep, config.evaluation.ep)
    if AUTO not in sizes or not (Path(config.model.path) / CONFIG_NAME).is_file():
        return config
    model = read_model_config(config.model.path)
    if launched():
        return with_expert_parallel_sizes(config, model, rank_and_size()[1], local_rank_and_size()[1])
    ranks = config.distributed.nproc or accelerator_count() or 1
    return with_expert_parallel_sizes(config, model, ranks, ranks, config.evaluation.nproc)
