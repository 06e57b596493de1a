"""What a configuration names on the hub. Models become directories of this machine, here and nowhere else; data sets
are read by their names (:mod:`trace_ds.corpora.sources`).

``RUN/fetched.json`` (``trace-ds fetch``) says which commits they were: a name that has moved since is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trace_ds.config.schema import Config
from trace_ds.config.sections.base import AUTO
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.models.families import largest_expert_parallel_size
from trace_ds.parallel.environment import accelerator_count, launched, local_rank_and_size, rank_and_size
from trace_ds.run.directory import RunDirectory
from trace_ds.run.foreign import read_object, typed
from trace_ds.run.hub_names import HubName, hub_name
from trace_ds.tensors.model_files import CONFIG_NAME, read_model_config

KINDS = ("models", "data", "tasks")  # of RUN/fetched.json
ALL_MODELS = ("run", "fetch", "evaluate")  # the verbs that read evaluation.models too


def hub_names(config: Config, verb: str) -> dict[str, HubName]:
    """The names on the hub that a verb needs, by the key that has them."""
    found: dict[str, str | None] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    if verb in ALL_MODELS:
        found |= {f"evaluation.models.{name}": path for name, path in config.evaluation.models.items()}
    names = {key: hub_name(text) for key, text in found.items() if text}
    return {key: name for key, name in names.items() if name is not None}


def with_weights(key: str, verb: str) -> bool:
    """Whether a verb reads the weights of what a key names, not only its configuration and tokenizer."""
    return key != "model.tokenizer" and verb != "prepare"


def find_models(config: Config, run: RunDirectory | None, verb: str, *, download: bool) -> dict[str, str]:
    """{name as written: directory} of the models that a verb needs and the hub's cache has.

    Args:
        run: whose record of what was fetched counts; None: no matter which commit it is.
        download: bring what is missing; False: leave it out (what reads it says that it is not there).

    Raises:
        UserError: as :func:`trace_ds.hub.models.bring`, or a name has moved since ``trace-ds fetch``.
    """
    names = hub_names(config, verb)
    if not names:
        return {}
    from trace_ds.hub.models import bring, cached

    recorded = {} if run is None else {name: entry["commit"] for name, entry in fetched(run)["models"].items()}
    places: dict[str, str] = {}
    for key, name in names.items():
        expected = recorded.get(str(name))
        if download:
            folder: Path | None = bring(name, key, weights=with_weights(key, verb), expected=expected)
        else:
            folder = cached(name, expected)
        if folder is not None:
            places[str(name)] = str(folder)
    return places


def with_cached(config: Config) -> Config:
    """``config`` with directories for the models that the hub's cache has, whatever was fetched."""
    return with_places(config, find_models(config, None, "run", download=False))


def with_places(config: Config, places: Mapping[str, str]) -> Config:
    """``config`` with the directories of ``places`` for the names that they are the directories of."""
    if not places:
        return config

    def place(text: Any) -> Any:
        return places.get(text, text)

    model = {"path": place(config.model.path), "tokenizer": place(config.model.tokenizer)}
    models = {name: place(path) for name, path in config.evaluation.models.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "evaluation": config.evaluation.model_copy(update={"models": models}),
        }
    )


def hub_data(config: Config, verb: str) -> dict[str, CorpusEntry | TaskConfig]:
    """The data sets on the hub that a verb reads, by the key that names them."""
    from trace_ds.corpora.sources import on_hub

    found: dict[str, CorpusEntry | TaskConfig] = {}
    if verb in ("run", "fetch", "prepare"):
        for side in config.data.sides:
            found |= {f"data.{side}[{number}]": entry for number, entry in enumerate(config.data.corpus(side))}
    if verb in ALL_MODELS:
        found |= {f"evaluation.tasks.{task.name}": task for task in config.evaluation.tasks}
    return {key: entry for key, entry in found.items() if on_hub(entry)}


def hub_tasks(config: Config, verb: str) -> dict[str, str]:
    """The tasks of lm-eval whose questions come from the hub, by the key that names them."""
    tasks = [task for task in config.evaluation.tasks if task.type == "lm_eval" and not task.path]
    return {f"evaluation.tasks.{task.name}": str(task.task) for task in tasks if verb in ALL_MODELS}


def data_name(entry: CorpusEntry | TaskConfig) -> str:
    """What ``RUN/fetched.json`` calls a data set: its configurations and splits are of one commit."""
    return str(HubName(entry.dataset_id, entry.revision))


def require_data_unmoved(config: Config, run: RunDirectory, verb: str) -> None:
    """Refuse a data set (also of a task of lm-eval) that is another commit now than it was when it was fetched."""
    recorded = fetched(run)
    held = [
        (key, entry, recorded["data"][name]["commit"])
        for key, entry in hub_data(config, verb).items()
        if (name := data_name(entry)) in recorded["data"]
    ]
    for key, task in hub_tasks(config, verb).items():
        commits = recorded["tasks"].get(task, {}).get("commits", {})
        held += [(key, CorpusEntry(dataset=name), commit) for name, commit in commits.items()]
    for key, entry, expected in held:
        from trace_ds.corpora.sources import commit_of
        from trace_ds.hub.models import require_same_commit

        if (commit := commit_of(entry)) is not None:
            require_same_commit(data_name(entry), key, commit, expected)


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
    """The same for the job that this process is a rank of, or that it would start here; a model that is not here leaves
    them open."""
    sizes = (config.distributed.ep, config.evaluation.ep)
    if AUTO not in sizes or not (Path(config.model.path) / CONFIG_NAME).is_file():
        return config
    model = read_model_config(config.model.path)
    if launched():
        return with_expert_parallel_sizes(config, model, rank_and_size()[1], local_rank_and_size()[1])
    ranks = config.distributed.nproc or accelerator_count() or 1
    return with_expert_parallel_sizes(config, model, ranks, ranks, config.evaluation.nproc)


def fetched(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What ``trace-ds fetch`` recorded, by kind (:data:`KINDS`) and name; empty before it ran."""
    if not run.fetched.is_file():
        return {kind: {} for kind in KINDS}
    fix = "delete it, and run `trace-ds fetch CONFIG` again"
    found = read_object(run.fetched, "the record of what was fetched", fix)
    try:
        for entries in typed(found, dict.fromkeys(KINDS, dict)).values():
            for name in entries:
                typed(entries, {name: dict})
                typed(entries[name], {"commits": dict} if "commits" in entries[name] else {"commit": str})
    except ValueError as error:
        raise UserError(f"the record of what was fetched is damaged ({error})", str(run.fetched), fix) from None
    return found
