"""What an entry of the configuration names: files by a path, or a data set by name, read by ``datasets``.

A data set is an id on the Hugging Face hub, a directory in the hub's layout, or (a path) what ``save_to_disk`` left.
From the hub it comes into the libraries' own cache and is read from there, offline with HF_HUB_OFFLINE; no code of it
runs. What is private in these libraries is used in this file alone.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import glob
import re
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.records import KINDS, PARQUET_ROWS, can_read, kind_of, require_text
from trace_ds.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")
SHARD = re.compile(r"[-_.]\d+(?:[-_.]of[-_.]\d+)?$")
BUILDERS = ("Json", "Csv", "Parquet", "Arrow", "Text")  # of datasets: the others decode media, or unpickle
DEFAULT_SPLIT = "train"
README = "README.md"
TIMEOUT_S = 20  # for the hub to say what a revision is

Named = CorpusEntry | TaskConfig  # what names data


@dataclass(frozen=True)
class Table:
    """An open split of a data set.

    Attributes:
        name: what reports call it.
        files: on this machine, that hold it.
        commit: of the hub; None for a local one.
        config: the configuration taken; None where there is none to choose.
    """

    data: Any  # datasets.Dataset or IterableDataset
    where: str
    name: str
    split: str
    files: list[Path]
    commit: str | None = None
    config: str | None = None

    def rows(self, columns: list[str] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, row), a few in memory at a time; ``columns`` as in :func:`.records.rows_of`."""
        number = 0
        with _reading(self.where):
            for table in self.data.with_format("arrow").iter(batch_size=PARQUET_ROWS):
                if columns is not None:
                    if number == 0:
                        require_text(table.schema, columns, self.where)
                    also = ["source"] if "source" in table.schema.names and "source" not in columns else []
                    table = table.select([*columns, *also])
                for row in table.to_pylist():
                    number += 1
                    yield number, row


def is_table(named: Named) -> bool:
    """Whether a data set is named, and not files."""
    return bool(named.dataset) or (bool(named.path) and _is_saved(Path(named.path)))


def files_of(named: Named, key: str) -> list[Path]:
    """The files that a path names, in the order of their names; :class:`UserError` when there are none to read."""
    path, fix = Path(named.path), f"correct {key} in the configuration"
    if named.split is not None:
        raise UserError("files have no splits", named.path, "take split out, or name a data set")
    kinds = f"use {', '.join(KINDS[:-1])} or {KINDS[-1]}"
    if path.is_dir():
        found = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
        found = [item for item in found if can_read(item)]
        if not found:
            raise UserError(f"the folder holds no file that can be read ({', '.join(KINDS)})", named.path, fix)
        return found
    if path.is_file():
        found = [path]
    elif glob.has_magic(named.path):
        found = [Path(item) for item in sorted(glob.glob(named.path, recursive=True))]  # noqa: PTH207 (any path)
        found = [item for item in found if item.is_file()]
        if not found:
            raise UserError("no file matches the pattern", named.path, fix)
    else:
        raise UserError("the corpus file does not exist", named.path, fix)
    for item in found:
        if not can_read(item):
            raise UserError(f"cannot read files of the kind {kind_of(item) or item.suffix!r}", str(item), kinds)
    return found


def shared_stem(stem: str) -> str:
    """The name that the shards of one file have in common: train for train-00001-of-00004."""
    return SHARD.sub("", stem) or stem


def open_table(named: Named, key: str, *, offline: bool = False) -> Table:
    """The data set's split, downloaded first where it is on the hub and not in the cache (unless ``offline``).

    Raises:
        UserError: it does not exist, may not be read, or cannot be reached; it has no such configuration or split.
    """
    if not named.dataset:
        return _open_saved(named, key)
    return _open_directory(named, key) if Path(named.dataset_id).is_dir() else _open_hub(named, key, offline)


def files_here(named: Named, key: str) -> list[Path]:
    """The files on this machine that hold what an entry names; :class:`UserError` when it cannot be read offline."""
    return open_table(named, key, offline=True).files if is_table(named) else files_of(named, key)


def on_hub(named: Named) -> bool:
    """Whether an entry names a data set on the hub."""
    return bool(named.dataset) and not Path(named.dataset_id).is_dir()


def commit_of(named: Named) -> str | None:
    """The commit that a data set on the hub is: as the hub says, or without a network as when it was fetched, by us or
    (the newest that is there) by others; None: as far as is known here, it is none."""
    name = named.dataset_id
    commit = None if _is_offline() else _asked(name, named.revision)[0]
    commit = commit or _known(name, named.revision)
    return commit or next((item.parts[-2] for item in reversed(_in_cache(name))), None)


def in_cache(name: str, config: str | None) -> bool:
    """Whether the cache has a data set of the hub, in one of its configurations (None: any)."""
    folders = [item.parts[-4] for item in _in_cache(name)]  # with a suffix where the task chooses files
    return any(config is None or folder == config or folder.startswith(f"{config}-") for folder in folders)


# --------------------------------------------------------------------------------------------- on this machine


def _is_saved(path: Path) -> bool:
    return any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _open_saved(named: Named, key: str) -> Table:
    from datasets import Dataset, load_from_disk

    with _reading(named.path):
        found = load_from_disk(named.path)
        split = named.split or DEFAULT_SPLIT
        if isinstance(found, Dataset):
            if named.split is not None:
                raise UserError("this data set was saved without splits", named.path, f"take split out of {key}")
        else:
            split = _split(named, list(found), named.path, key)
            found = found[split]
        return Table(found, named.path, Path(named.path).name, split, _arrow_files(found))


def _arrow_files(data: Any) -> list[Path]:
    return [Path(item["filename"]) for item in data.cache_files]


def _open_directory(named: Named, key: str) -> Table:
    if _is_saved(Path(named.dataset_id)):
        raise UserError(
            "this is what save_to_disk left", named.dataset_id, f"name it in {key} as path:, not as dataset:"
        )
    with _reading(named.dataset_id):
        builder = _builder(named, str(Path(named.dataset_id).absolute()), None, key)
        found = builder.config.data_files
        split = _split(named, list(found), named.dataset_id, key)
        data = builder.as_streaming_dataset(split=split)
        files = [Path(str(item).rpartition("::")[2]) for item in found[split]]
        for file in files:
            if not file.is_file():
                raise UserError("its page names a file that is not here", str(file), "download the data set whole")
        name = _name(Path(named.dataset_id).name, named, split)
        return Table(data, named.dataset_id, name, split, files, config=named.config)


# --------------------------------------------------------------------------------------------- on the hub


def _open_hub(named: Named, key: str, offline: bool) -> Table:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = named.dataset_id
    try:
        validate_repo_id(name)
    except HFValidationError:
        what = "there is no such directory, and it is no id of the hub"
        raise UserError(what, name, f"correct dataset in {key}") from None
    offline = offline or _is_offline()
    pinned = named.revision if named.revision and COMMIT.fullmatch(named.revision) else None
    cached = _cached(named, pinned) if pinned else None
    if cached is None:
        commit, trouble = _asked(name, named.revision) if not offline else (None, "")
        commit = commit or pinned or _known(name, named.revision)
        cached = _cached(named, commit)
        if cached is None and (commit is None or trouble or offline):
            raise _absent(named, trouble)
        cached = cached or _download(named, str(commit), key)
    with _reading(name):
        split = _split(named, list(cached.info.splits or ()), name, key)
        data = cached.as_dataset(split=split)
        config = None if cached.config.name == "default" else cached.config.name
        short = _name(name.rpartition("/")[2], named, split)
        return Table(data, name, short, split, _arrow_files(data), cached.hash, config)


@functools.lru_cache(maxsize=256)
def _asked(name: str, revision: str | None) -> tuple[str | None, str]:
    """(commit, "") or (None, why the hub does not say); asked once a process: it may not move between two looks."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S).sha, ""
    except errors.RevisionNotFoundError:
        raise UserError(f"the data set has no revision {revision!r}", name, f"see {_page(name)}/commits") from None
    except errors.RepositoryNotFoundError:
        fix = f"correct the name; for a private one `hf auth login` with an account that may read {_page(name)}"
        raise UserError("the hub has no such data set, or it is private", name, fix) from None
    except Exception as error:  # no network (httpx has many words for it), or an answer that is none
        return None, f"the hub cannot be reached ({type(error).__name__})"


def _known(name: str, revision: str | None) -> str | None:
    """The commit that a revision was when it was fetched, if it was."""
    from huggingface_hub import hf_hub_download

    try:
        readme = hf_hub_download(name, README, repo_type="dataset", revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return None
    return Path(readme).parent.name


def _page(name: str) -> str:
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/datasets/{name}"


def _gated(name: str) -> UserError:
    fix = f"accept its terms on {_page(name)}, then `hf auth login` with that account"
    return UserError("the data set is gated: its terms must be accepted first", name, fix)


def _absent(named: Named, trouble: str) -> UserError:
    from huggingface_hub import constants

    asked = {"configuration": named.config, "revision": named.revision}
    told = "".join(f" ({key} {value})" for key, value in asked.items() if value)
    trouble = trouble or ("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not asked")
    what = f"the data set{told} is not in the cache, and {trouble}"
    return UserError(what, named.dataset_id, "run `trace-ds fetch CONFIG` where there is a network")


_looking: ContextVar[bool] = ContextVar("looking", default=False)


@contextlib.contextmanager
def only_looking() -> Iterator[None]:
    """Inside, nothing is asked of the hub: data sets are what the cache has of them."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def _is_offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(_looking.get() or constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)


def _one_meant(name: str, commit: str) -> str:
    """The configuration that a data set's name alone means, by the page that was fetched with this commit."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    page = try_to_load_from_cache(name, README, revision=commit, repo_type="dataset")
    listed = (metadata_load(page) or {}).get("configs") if isinstance(page, str) else None
    names = [str(item.get("config_name", "default")) for item in listed or () if isinstance(item, dict)]
    chosen = [str(item["config_name"]) for item in listed or () if isinstance(item, dict) and item.get("default")]
    return names[0] if len(names) == 1 else (chosen or ["default"])[0]


def _in_cache(name: str) -> list[Path]:
    """What the cache of ``datasets`` says it has of a data set, the newest last: …/CONFIG/VERSION/COMMIT/FILE."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    space, _, short = name.rpartition("/")
    folder = f"{space}___{camelcase_to_snakecase(short)}" if space else camelcase_to_snakecase(short)
    found = (Path(datasets.config.HF_DATASETS_CACHE) / folder).glob("*/*/*/dataset_info.json")
    return sorted(found, key=lambda item: (item.stat().st_mtime, str(item)))


def _cached(named: Named, commit: str | None) -> Any:
    """The builder of what lies in the cache of ``datasets``, or None.

    Args:
        commit: None: the newest that is there, unless a revision was asked for.
    """
    from datasets.packaged_modules.cache.cache import Cache

    if commit is None and named.revision is not None:
        return None
    found = _in_cache(named.dataset_id)
    found = [item for item in found if named.config in (None, item.parts[-4]) and commit in (None, item.parts[-2])]
    if named.config is None:
        found = [item for item in found if item.parts[-4] == _one_meant(named.dataset_id, item.parts[-2])]
    if not found:
        return None
    config, version, digest = found[-1].parts[-4:-1]
    with _reading(named.dataset_id):
        name = named.dataset_id.rpartition("/")[2]
        return Cache(dataset_name=name, repo_id=named.dataset_id, config_name=config, version=version, hash=digest)


def _download(named: Named, commit: str, key: str) -> Any:
    import datasets
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    with _reading(named.dataset_id):
        try:
            with contextlib.suppress(EntryNotFoundError):  # not every data set has a page
                hf_hub_download(named.dataset_id, README, repo_type="dataset", revision=named.revision)
            builder = _builder(named, named.dataset_id, commit, key)
            _split(named, list(builder.config.data_files or ()), named.dataset_id, key)
            builder.download_and_prepare()
        except GatedRepoError:
            raise _gated(named.dataset_id) from None
        except (ConnectionError, LocalEntryNotFoundError) as error:
            raise _absent(named, f"the hub cannot be reached ({type(error).__name__})") from None
    return builder


# --------------------------------------------------------------------------------------------- both


def _builder(named: Named, place: str, commit: str | None, key: str) -> Any:
    """The library's reader of one configuration; only kinds that hold text and run no code."""
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        builder = load_dataset_builder(place, name=named.config, revision=commit)
    except ValueError:
        names = get_dataset_config_names(place, revision=commit)
        if named.config in names or (named.config is None and len(names) < 2):
            raise
        what = f"the data set has no configuration {named.config!r}" if named.config else "the configuration is missing"
        raise UserError(what, named.dataset_id, f"{_nearest(named.config, names)}set config in {key}") from None
    kinds = [
        kind.__name__ for kind in type(builder).__mro__ if kind.__module__.startswith("datasets.packaged_modules.")
    ]
    if not set(kinds) & set(BUILDERS):
        fix = "convert it to Parquet or JSON Lines"
        raise UserError(f"cannot read data sets of the kind {kinds[-1] if kinds else '?'}", named.dataset_id, fix)
    return builder


def _split(named: Named, names: list[Any], where: str, key: str) -> str:
    """The split that is asked for, or train, or the only one there is."""
    names = [str(name) for name in names]
    if named.split is None and len(names) == 1:
        return names[0]
    split = named.split or DEFAULT_SPLIT
    if split not in names:
        raise UserError(f"the data set has no split {split!r}", where, f"{_nearest(split, names)}set split in {key}")
    return split


def _name(name: str, named: Named, split: str) -> str:
    return "/".join([name, *([named.config] if named.config else []), *([split] if split != DEFAULT_SPLIT else [])])


def _nearest(wrong: str | None, names: list[str]) -> str:
    close = difflib.get_close_matches(wrong or "", names, 1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"it has {', '.join(names) or 'none'}: "


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever a damaged or hostile data set makes the libraries raise becomes a :class:`UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk, and not a file of the data set
            raise
        raise _unreadable(where, error) from error
    except Exception as error:
        raise _unreadable(where, error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    lines = str(error).strip().splitlines()
    reason = lines[0][:200] if lines else type(error).__name__
    if "gated" in reason:  # found only at the data: the page may be read by everybody
        return _gated(where)
    return UserError(f"the data set cannot be read ({reason})", where, "check its files and its page")
