"""``trace-ds fetch CONFIG…``: bring everything that a configuration names to the local caches, once, on a login node.

    trace-ds fetch CONFIG --run-dir runs/mine     # models, data sets, and the data of lm-eval's tasks
    export HF_HUB_OFFLINE=1                       # from here on no stage needs a network
    trace-ds run CONFIG --run-dir runs/mine

Everything goes to the caches of its own library, below HF_HOME. ``RUN/fetched.json`` records what was brought, with its
commits: a model or data set (also of a task) whose name stands for another commit later is refused; without a network
a run goes on with the model that was fetched for it. Running it again brings what is missing, and takes what moved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory, locked, unwritable
from trace_ds.run.files import write_json
from trace_ds.stages.by_name import KINDS, data_name, fetched, hub_data, hub_names, hub_tasks, with_weights
from trace_ds.stages.pipeline import Request


@dataclass(frozen=True)
class Found:
    """Something that a configuration names elsewhere, and what of it is here.

    Attributes:
        kind: one of :data:`~trace_ds.stages.by_name.KINDS`.
        key: where the configuration names it.
        name: as it is named there.
        entry: of ``RUN/fetched.json``: ``commit``, of a model ``bytes`` too; of a task ``commits`` of its data sets.
        where: the folder; None: it is not here.
    """

    kind: str
    key: str
    name: str
    entry: dict[str, Any]
    where: Path | None


def fetch(request: Request, *, dry_run: bool = False) -> int:
    """Bring everything, record it in the run directory and show it; returns the exit status.

    With ``dry_run`` nothing is asked of the hub or written: the table says what is here.

    Raises:
        UserError: something does not exist, is not for this user, or cannot be reached; nothing is recorded then.
    """
    if dry_run:
        _show(list(look(request.written, request.run)))
        return 0
    request.check_places()
    with locked(request.run):
        request.run.clear_leftovers()
        record: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}
        found = list(_bring(request.written))
        for item in found:
            record[item.kind].setdefault(item.name, item.entry)
        if record != fetched(request.run):
            try:
                write_json(request.run.fetched, record)
            except OSError as error:
                raise unwritable(request.run.path, error) from None
    _show(found)
    return 0


def _bring(config: Config) -> Iterator[Found]:
    from trace_ds.corpora.sources import open_table
    from trace_ds.evaluation.harness import fetch_task
    from trace_ds.hub.models import bring, downloaded_bytes

    for key, name in hub_names(config, "fetch").items():
        print(f"[fetch] {key}: {name}", flush=True)
        folder = bring(name, key, weights=with_weights(key, "fetch"))
        yield Found("models", key, str(name), {"commit": folder.name, "bytes": downloaded_bytes(folder)}, folder)
    for key, entry in hub_data(config, "fetch").items():
        print(f"[fetch] {key}: {data_name(entry)}", flush=True)
        yield Found("data", key, data_name(entry), {"commit": open_table(entry, key).commit}, _data_cache())
    configs = {f"evaluation.tasks.{task.name}": task for task in config.evaluation.tasks}
    for key, task in hub_tasks(config, "fetch").items():
        print(f"[fetch] {key}: the data of lm-eval's {task}", flush=True)
        yield Found("tasks", key, task, {"commits": fetch_task(configs[key])}, _data_cache())


def look(config: Config, run: RunDirectory | None) -> Iterator[Found]:
    """The same from what is here, without a network.

    Args:
        run: whose record says which commits count and what the data of tasks are; None: there is none.
    """
    from trace_ds.corpora.sources import files_here
    from trace_ds.hub.models import cached, downloaded_bytes, is_whole

    recorded = fetched(run) if run is not None else {kind: {} for kind in KINDS}
    for key, name in hub_names(config, "fetch").items():
        folder = cached(name, recorded["models"].get(str(name), {}).get("commit"))
        if folder and with_weights(key, "fetch") and not is_whole(folder):
            folder = None
        entry = {"commit": folder.name, "bytes": downloaded_bytes(folder)} if folder else {}
        yield Found("models", key, str(name), entry, folder)
    for key, data in hub_data(config, "fetch").items():
        where = None
        with contextlib.suppress(UserError):
            files_here(data, key)
            where = _data_cache()
        yield Found("data", key, data_name(data), {}, where)
    for key, task in hub_tasks(config, "fetch").items():
        entry = recorded["tasks"].get(task, {})
        commits = entry.get("commits", {}).values()
        is_here = bool(entry) and all(any(_data_cache().glob(f"*/*/*/{commit}")) for commit in commits)
        yield Found("tasks", key, task, entry, _data_cache() if is_here else None)


def _data_cache() -> Path:
    from datasets import config

    return Path(config.HF_DATASETS_CACHE)


def _show(found: list[Found]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from trace_ds.terminal import wide_console

    console = wide_console()
    if not found:
        console.print("The configuration names nothing that is elsewhere: there is nothing to fetch.")
        return
    table = Table(show_edge=False)
    for column in ("what", "name", "commit", "size", "where"):
        table.add_column(column, overflow="fold", justify="right" if column == "size" else "left")
    for item in found:
        commits = [item.entry["commit"]] if "commit" in item.entry else [*item.entry.get("commits", {}).values()]
        size = f"{item.entry['bytes'] / 1e9:.2f} GB" if "bytes" in item.entry else ""
        shown = (item.key, item.name, ", ".join(commit[:12] for commit in commits), size, str(item.where or "not here"))
        table.add_row(*(escape(text) for text in shown))
    console.print(table)
    if all(item.where for item in found):
        console.print("Everything is here: with HF_HUB_OFFLINE=1 no stage looks for a network.", highlight=False)
