"""``trace-ds fetch CONFIG…``: download everything that a configuration names to the local caches, on a login node.

    trace-ds fetch CONFIG                         # models, data sets, and the data of lm-eval's tasks
    export HF_HUB_OFFLINE=1                       # from here on no stage needs a network
    trace-ds run CONFIG --run-dir runs/mine

Everything goes to the caches of its own library, below HF_HOME. Running it again brings what is missing, and what the
names without a commit (``ORG/NAME@COMMIT``) have become since.

Every other stage finds the models of its configuration here too (:func:`find_models`): names become directories in this
module and nowhere else. Data sets are read by their names (:mod:`trace_ds.corpora.sources`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from trace_ds.config.schema import Config
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.run.hub_names import HubName, hub_name
from trace_ds.terminal import size

ALL_MODELS = ("run", "fetch", "evaluate")  # the verbs that read evaluation.models too


def fetch(config: Config) -> None:
    """Ask for every permission, download data, then the models, the largest last, and show what is here.

    Raises:
        UserError: something does not exist, is not for this user, or cannot be reached.
    """
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm

    from trace_ds.corpora.sources import open_table
    from trace_ds.evaluation.harness import fetch_task
    from trace_ds.hub.models import download_model, download_weights, downloaded_bytes

    missing, weights = _missing(config)
    lines = []
    disable_progress_bars()  # of each file; ours is over all of them
    with tqdm(total=sum(missing.values()), desc="fetch", unit="B", unit_scale=True, disable=None) as bar:
        for key, entry in _hub_data(config, "fetch").items():
            commit = open_table(entry, key).commit or ""
            lines.append(f"{key}: {entry.dataset_id}  {commit[:12]}  {_data_cache()}")
            bar.update(missing[key])
        for key, task in _hub_tasks(config).items():
            fetch_task(task)
            lines.append(f"{key}: {task.task}  {_data_cache()}")
            bar.update(missing[key])
        names = hub_names(config, "fetch")
        for key, name in sorted(names.items(), key=lambda item: missing[item[0]]):
            download_weights(name, *weights[key], bar.update)
            folder = download_model(name, key, weights=_needs_weights(key, "fetch"))
            lines.append(f"{key}: {name}  {folder.name[:12]}  {size(downloaded_bytes(folder))}  {folder}")
    nothing = "The configuration names nothing on the hub: there is nothing to fetch."
    whole = "Everything is here: with HF_HUB_OFFLINE=1 no stage looks for a network."
    print("\n".join([*lines, whole] if lines else [nothing]))


def _missing(config: Config) -> tuple[dict[str, int], dict[str, tuple[str, dict[str, int]]]]:
    """Ask for every permission and print what is to be downloaded; nothing large comes.

    Returns:
        The missing bytes by the key that names them, and, by the key of a model, its commit and its missing files of
        weights with their bytes.

    Raises:
        UserError: something does not exist, or is not for this user.
    """
    from trace_ds.corpora.sources import missing_data_bytes
    from trace_ds.evaluation.harness import check_task, hub_data_of
    from trace_ds.hub.models import download_model, missing_weights

    missing: dict[str, int] = {}
    for key, entry in _hub_data(config, "fetch").items():
        missing[key] = missing_data_bytes(entry, key)
    for key, task in _hub_tasks(config).items():
        check_task(task)
        configs: dict[str, set[str | None]] = {}
        for _, data, of_data in hub_data_of(task):
            configs.setdefault(data, set()).add(of_data)
        missing[key] = 0
        for data, several in configs.items():  # one of MMLU's 57, which are alike, says enough
            one = CorpusEntry(dataset=data, config=min(several, key=str))
            missing[key] += missing_data_bytes(one, key, any_split=True) * len(several)
    weights: dict[str, tuple[str, dict[str, int]]] = {}
    for key, name in hub_names(config, "fetch").items():
        folder = download_model(name, key, weights=False)
        files = missing_weights(name, key, folder) if _needs_weights(key, "fetch") else {}
        weights[key], missing[key] = (folder.name, files), sum(files.values())
    for key, left in missing.items():
        print(f"[fetch] {key}: {size(left) + ' to download' if left else 'nothing to download'}", flush=True)
    print(f"[fetch] {size(sum(missing.values()))} in all", flush=True)
    return missing, weights


def cached_names(config: Config) -> Iterator[tuple[str, str, Path | None]]:
    """(key, name, its place in the local caches, or None) of the models and data sets that a configuration names,
    without a network."""
    from trace_ds.corpora.sources import files_here
    from trace_ds.hub.models import cached_model, is_whole

    for key, name in hub_names(config, "fetch").items():
        folder = cached_model(name)
        yield key, str(name), folder if folder and (is_whole(folder) or not _needs_weights(key, "fetch")) else None
    for key, data in _hub_data(config, "fetch").items():
        place = None
        with contextlib.suppress(UserError):
            files_here(data, key)
            place = _data_cache()
        yield key, data.dataset_id, place


def _data_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def hub_names(config: Config, verb: str) -> dict[str, HubName]:
    """The models on the hub that a verb needs, by the key that names them."""
    paths: dict[str, str | None] = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    if verb in ALL_MODELS:
        paths |= {f"evaluation.models.{name}": path for name, path in config.evaluation.models.items()}
    names = {key: hub_name(path) for key, path in paths.items() if path}
    return {key: name for key, name in names.items() if name is not None}


def _needs_weights(key: str, verb: str) -> bool:
    """Whether a verb reads the weights of a model, not only its configuration and tokenizer."""
    return key != "model.tokenizer" and verb != "prepare"


def _hub_data(config: Config, verb: str) -> dict[str, CorpusEntry | TaskConfig]:
    """The data sets on the hub that a verb reads, by the key that names them."""
    entries: dict[str, CorpusEntry | TaskConfig] = {}
    if verb in ("run", "fetch", "prepare"):
        for side in ("forget", "retain"):  # the alternative corpus is a file, or the forget corpus again
            entries |= {f"data.{side}[{number}]": entry for number, entry in enumerate(config.data.corpus(side))}
    if verb in ALL_MODELS:
        entries |= {f"evaluation.tasks.{task.name}": task for task in config.evaluation.tasks}
    return {key: entry for key, entry in entries.items() if entry.dataset}


def _hub_tasks(config: Config) -> dict[str, TaskConfig]:
    """The tasks of lm-eval whose questions come from the hub, by the key that names them."""
    tasks = [task for task in config.evaluation.tasks if task.type == "lm_eval"]
    return {f"evaluation.tasks.{task.name}": task for task in tasks}


def find_models(config: Config, verb: str, *, download: bool) -> dict[str, str]:
    """{name as written: directory} of the models that a verb needs and the hub's cache has.

    Args:
        download: bring what is missing; False: leave it out (the reader of the model then refuses the name).

    Raises:
        UserError: as :func:`trace_ds.hub.models.download_model`.
    """
    names = hub_names(config, verb)
    if not names:
        return {}
    from trace_ds.corpora.sources import missing_data_bytes
    from trace_ds.hub.models import cached_model, download_model

    if download:  # a gated data set is refused before a terabyte of weights comes
        for key, entry in _hub_data(config, verb).items():
            missing_data_bytes(entry, key)
    paths: dict[str, str] = {}
    for key, name in names.items():
        if download:
            folder: Path | None = download_model(name, key, weights=_needs_weights(key, verb))
        else:
            folder = cached_model(name)
        if folder is not None:
            paths[str(name)] = str(folder)
    return paths


def with_cached(config: Config) -> Config:
    """``config`` with directories for the models that the hub's cache has."""
    return with_model_paths(config, find_models(config, "run", download=False))


def with_model_paths(config: Config, paths: Mapping[str, str]) -> Config:
    """``config`` with directories in place of the names that ``paths`` has."""
    if not paths:
        return config
    changes = {key: paths[path] for key in ("path", "tokenizer") if (path := getattr(config.model, key)) in paths}
    models = {name: paths.get(path, path) for name, path in config.evaluation.models.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=changes),
            "evaluation": config.evaluation.model_copy(update={"models": models}),
        }
    )
