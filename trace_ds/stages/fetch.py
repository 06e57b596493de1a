"""``trace-ds fetch CONFIG…``: download everything that a configuration names to the local caches, on a login node.

    trace-ds fetch CONFIG --run-dir runs/mine     # models, data sets, and the data of lm-eval's tasks
    export HF_HUB_OFFLINE=1                       # from here on no stage needs a network
    trace-ds run CONFIG --run-dir runs/mine

Everything goes to the caches of its own library, below HF_HOME. ``RUN/fetched.json`` records the commits: a model or
data set whose name stands for another commit later is refused. Running it again brings what is missing, and takes what
moved.

Every other stage finds the models of its configuration here too (:func:`find_models`): names become directories in this
module and nowhere else. Data sets are read by their names (:mod:`trace_ds.corpora.sources`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.schema import Config
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory, locked, unwritable
from trace_ds.run.files import write_json
from trace_ds.run.foreign import read_object, typed
from trace_ds.run.hub_names import HubName, hub_name
from trace_ds.terminal import size

_KINDS = ("models", "data", "tasks")  # of RUN/fetched.json
ALL_MODELS = ("run", "fetch", "evaluate")  # the verbs that read evaluation.models too


@dataclass(frozen=True)
class Resource:
    """Something that a configuration names on the hub.

    Attributes:
        kind: one of :data:`_KINDS`.
        key: where the configuration names it.
        name: as it is named there.
        entry: of ``RUN/fetched.json``: ``commit``, of a model ``bytes`` too; of a task ``commits`` of its data sets.
        place: its local directory; None: it is not here.
    """

    kind: str
    key: str
    name: str
    entry: dict[str, Any]
    place: Path | None


def fetch(config: Config, run: RunDirectory, *, dry_run: bool = False) -> int:
    """Download everything, record it in the run directory and show it; returns the exit status.

    With ``dry_run`` nothing is asked of the hub or written: the table shows what is here.

    Raises:
        UserError: something does not exist, is not for this user, or cannot be reached; nothing is recorded then.
    """
    if dry_run:
        _show(list(cached_resources(config, run)))
        return 0
    with locked(run):
        run.clear_leftovers()
        record: dict[str, dict[str, Any]] = {kind: {} for kind in _KINDS}
        resources = _download(config, *_missing(config))
        for resource in resources:
            record[resource.kind].setdefault(resource.name, resource.entry)
        if record != read_record(run):
            try:
                write_json(run.fetched, record)
            except OSError as error:
                raise unwritable(run.path, error) from None
    _show(resources)
    return 0


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
    for key, task in _hub_tasks(config, "fetch").items():
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


def _download(
    config: Config, missing: dict[str, int], weights: dict[str, tuple[str, dict[str, int]]]
) -> list[Resource]:
    """Data first, then models, the largest last; one progress over all of it."""
    from trace_ds.corpora.sources import open_table
    from trace_ds.evaluation.harness import fetch_task
    from trace_ds.hub.models import download_model, download_weights, downloaded_bytes

    resources = []
    with _progress(sum(missing.values())) as advance:
        for key, entry in _hub_data(config, "fetch").items():
            commit = open_table(entry, key).commit
            resources.append(Resource("data", key, _data_name(entry), {"commit": commit}, _data_cache()))
            advance(missing[key])
        for key, task in _hub_tasks(config, "fetch").items():
            commits = fetch_task(task)
            resources.append(Resource("tasks", key, str(task.task), {"commits": commits}, _data_cache()))
            advance(missing[key])
        names = hub_names(config, "fetch")
        for key, name in sorted(names.items(), key=lambda item: missing[item[0]]):
            download_weights(name, *weights[key], advance)
            folder = download_model(name, key, weights=_needs_weights(key, "fetch"))
            commit_and_size = {"commit": folder.name, "bytes": downloaded_bytes(folder)}
            resources.append(Resource("models", key, str(name), commit_and_size, folder))
    return resources


@contextlib.contextmanager
def _progress(total_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar over everything on a terminal, elsewhere a line for each tenth."""
    from huggingface_hub.utils import disable_progress_bars
    from tqdm import tqdm

    disable_progress_bars()  # one of each file
    done_bytes = 0
    with tqdm(total=total_bytes, desc="fetch", unit="B", unit_scale=True, disable=None) as bar:

        def advance(more_bytes: int) -> None:
            nonlocal done_bytes
            tenths = 10 * done_bytes // max(total_bytes, 1)
            done_bytes += more_bytes
            bar.update(more_bytes)
            if bar.disable and 10 * done_bytes // max(total_bytes, 1) > tenths:
                print(f"[fetch] {done_bytes / total_bytes:.0%} of {size(total_bytes)}", flush=True)

        yield advance


def cached_resources(config: Config, run: RunDirectory | None) -> Iterator[Resource]:
    """The resources that a configuration names, as the local caches have them, without a network.

    Args:
        run: whose record has the commits that count; None: there is none.
    """
    from trace_ds.corpora.sources import files_here
    from trace_ds.hub.models import cached_model, downloaded_bytes, is_whole

    record = read_record(run)
    for key, name in hub_names(config, "fetch").items():
        folder = cached_model(name, record["models"].get(str(name), {}).get("commit"))
        if folder and _needs_weights(key, "fetch") and not is_whole(folder):
            folder = None
        entry = {"commit": folder.name, "bytes": downloaded_bytes(folder)} if folder else {}
        yield Resource("models", key, str(name), entry, folder)
    for key, data in _hub_data(config, "fetch").items():
        place = None
        with contextlib.suppress(UserError):
            files_here(data, key)
            place = _data_cache()
        yield Resource("data", key, _data_name(data), {}, place)
    for key, task in _hub_tasks(config, "fetch").items():
        entry = record["tasks"].get(str(task.task), {})
        commits = entry.get("commits", {}).values()
        is_here = bool(entry) and all(any(_data_cache().glob(f"*/*/*/{commit}")) for commit in commits)
        yield Resource("tasks", key, str(task.task), entry, _data_cache() if is_here else None)


def _data_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _show(resources: list[Resource]) -> None:
    if not resources:
        print("The configuration names nothing on the hub: there is nothing to fetch.")
        return
    for item in resources:
        commits = [item.entry["commit"]] if "commit" in item.entry else [*item.entry.get("commits", {}).values()]
        its_size = size(item.entry["bytes"]) if "bytes" in item.entry else ""
        commit = ", ".join(commit[:12] for commit in commits)
        print(f"{item.key}: {'  '.join(filter(None, (item.name, commit, its_size, str(item.place or 'not here'))))}")
    if all(item.place for item in resources):
        print("Everything is here: with HF_HUB_OFFLINE=1 no stage looks for a network.")


def read_record(run: RunDirectory | None) -> dict[str, dict[str, Any]]:
    """``RUN/fetched.json``, by kind (:data:`_KINDS`) and name; empty before ``trace-ds fetch`` ran."""
    if run is None or not run.fetched.is_file():
        return {kind: {} for kind in _KINDS}
    fix = "delete it, and run `trace-ds fetch CONFIG` again"
    record = read_object(run.fetched, "the record of what was fetched", fix)
    try:
        for entries in typed(record, dict.fromkeys(_KINDS, dict)).values():
            for name in entries:
                typed(entries, {name: dict})
                typed(entries[name], {"commits": dict} if "commits" in entries[name] else {"commit": str})
    except ValueError as error:
        raise UserError(f"the record of what was fetched is damaged ({error})", str(run.fetched), fix) from None
    return record


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
    from trace_ds.corpora.sources import on_hub

    entries: dict[str, CorpusEntry | TaskConfig] = {}
    if verb in ("run", "fetch", "prepare"):
        for side in config.data.sides:
            entries |= {f"data.{side}[{number}]": entry for number, entry in enumerate(config.data.corpus(side))}
    if verb in ALL_MODELS:
        entries |= {f"evaluation.tasks.{task.name}": task for task in config.evaluation.tasks}
    return {key: entry for key, entry in entries.items() if on_hub(entry)}


def _hub_tasks(config: Config, verb: str) -> dict[str, TaskConfig]:
    """The tasks of lm-eval whose questions come from the hub, by the key that names them."""
    tasks = [task for task in config.evaluation.tasks if task.type == "lm_eval" and not task.path]
    return {f"evaluation.tasks.{task.name}": task for task in tasks if verb in ALL_MODELS}


def _data_name(entry: CorpusEntry | TaskConfig) -> str:
    """The name of a data set in ``RUN/fetched.json``: its configurations and splits are of one commit."""
    return str(HubName(entry.dataset_id, entry.revision))


def find_models(config: Config, run: RunDirectory | None, verb: str, *, download: bool) -> dict[str, str]:
    """{name as written: directory} of the models that a verb needs and the hub's cache has.

    Args:
        run: whose record of what was fetched counts; None: no matter which commit it is.
        download: bring what is missing; False: leave it out (the reader of the model then refuses the name).

    Raises:
        UserError: as :func:`trace_ds.hub.models.download_model`, or a name has moved since ``trace-ds fetch``.
    """
    names = hub_names(config, verb)
    if not names:
        return {}
    from trace_ds.corpora.sources import missing_data_bytes
    from trace_ds.hub.models import cached_model, download_model

    if download:  # a gated data set is refused before a terabyte of weights comes
        for key, entry in _hub_data(config, verb).items():
            missing_data_bytes(entry, key)
    record = read_record(run)["models"]
    places: dict[str, str] = {}
    for key, name in names.items():
        expected = record.get(str(name), {}).get("commit")
        if download:
            folder: Path | None = download_model(name, key, weights=_needs_weights(key, verb), expected=expected)
        else:
            folder = cached_model(name, expected)
        if folder is not None:
            places[str(name)] = str(folder)
    return places


def with_cached(config: Config) -> Config:
    """``config`` with directories for the models that the hub's cache has, whatever was fetched."""
    return with_places(config, find_models(config, None, "run", download=False))


def with_places(config: Config, places: Mapping[str, str]) -> Config:
    """``config`` with directories in place of the names that ``places`` has."""
    if not places:
        return config
    changes = {key: places[path] for key in ("path", "tokenizer") if (path := getattr(config.model, key)) in places}
    models = {name: places.get(path, path) for name, path in config.evaluation.models.items()}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=changes),
            "evaluation": config.evaluation.model_copy(update={"models": models}),
        }
    )


def require_data_unmoved(config: Config, run: RunDirectory, verb: str) -> None:
    """Refuse a data set (also of a task of lm-eval) that is another commit now than it was when it was fetched."""
    record = read_record(run)
    if not record["data"] and not record["tasks"]:
        return
    from trace_ds.corpora.sources import commit_of
    from trace_ds.hub.models import require_same_commit

    expected: list[tuple[str, CorpusEntry | TaskConfig, str]] = []
    for key, entry in _hub_data(config, verb).items():
        if _data_name(entry) in record["data"]:
            expected.append((key, entry, record["data"][_data_name(entry)]["commit"]))
    for key, task in _hub_tasks(config, verb).items():
        commits = record["tasks"].get(str(task.task), {}).get("commits", {})
        expected += [(key, CorpusEntry(dataset=name), commit) for name, commit in commits.items()]
    for key, entry, fetched_commit in expected:
        if (commit := commit_of(entry)) is not None:
            require_same_commit(_data_name(entry), key, commit, fetched_commit)
