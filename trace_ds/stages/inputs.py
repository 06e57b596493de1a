"""What the stages after ``prepare`` are made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trace_ds.config.schema import Config
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.tokenizer import check_tokenizer, load_tokenizer, tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.models.families import ModelInfo, check_expert_parallel, inspect_model
from trace_ds.run import artefact
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.tensors.model_files import read_model_config, read_model_directory

if TYPE_CHECKING:
    from trace_ds.evaluation.items import Task

T = TypeVar("T")


@dataclass(frozen=True)
class Inputs:
    """The prepared data of a run, whole and made with the configuration's tokenizer, and what its artefacts must be of.

    Attributes:
        model, tokenizer: their fingerprints.
    """

    run: RunDirectory
    data: Artefact
    model: str
    tokenizer: str

    @classmethod
    def read(cls, config: Config, run: RunDirectory, model: str, *, verify: bool = True) -> Inputs:
        data = artefact.load(run.data, "data", verify=verify)
        tokenizer = tokenizer_fingerprint(config.model.tokenizer_path)
        data.require_same(tokenizer=tokenizer)
        return cls(run, data, model, tokenizer)

    @property
    def fingerprints(self) -> dict[str, str]:
        return {"model": self.model, "tokenizer": self.tokenizer, "data": self.data.content}

    def statistics(self, side: str, *, verify: bool = True) -> Artefact:
        return self._made(self.run.statistics / side, "statistics", verify)

    def calibration(self, *, verify: bool = True) -> Artefact:
        """UserError names the first stage to run again: where there is no calibration of these, it may be that the
        statistics, which one would be made from, are not of these either."""
        try:
            return self._made(self.run.calibration, "calibration", verify)
        except UserError:
            for side in ("forget", "retain"):
                self.statistics(side, verify=False)
            raise

    def _made(self, path: Path, kind: str, verify: bool) -> Artefact:
        """An artefact that was made from these."""
        found = artefact.load(path, kind, verify=verify)
        found.require_same(**self.fingerprints)
        return found


def checked_model(config: Config, world_size: int) -> ModelInfo:
    """The model of the configuration, of a shape that so many processes can run."""
    info = inspect_model(config.model.path)
    check_expert_parallel(info, config.distributed.ep, world_size, options=config.distributed.autoep)
    return info


def check_vocabulary(config: Config) -> None:
    """The tokenizer can be loaded, and the model has a row of embeddings for each of its tokens."""
    check_tokenizer(config.model.tokenizer_path, read_model_config(config.model.path).get("vocab_size"))


def checked_tasks(asked: list[TaskConfig], config: Config) -> list[Task]:
    """Evaluation tasks with their items, whose chat template the tokenizer has."""
    from trace_ds.evaluation.items import read_tasks

    tasks = read_tasks(asked)
    if any(task.apply_chat_template for task in asked):
        from trace_ds.evaluation.harness import check_template

        tokenizer = load_tokenizer(config.model.tokenizer_path)
        for task in asked:
            check_template(task, tokenizer)
    return tasks


def look_at(config: Config, run: RunDirectory, *kinds: str) -> None:
    """Whether this rank can see the model and artefacts of a run; UserError where one is not there.

    The main process alone has hashed them: a thousand ranks would read hundreds of gigabytes for a large model.
    """
    read_model_directory(config.model.path)
    for kind in kinds:
        artefact.load(getattr(run, kind), kind, verify=False)
