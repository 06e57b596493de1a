"""Open what an entry of the configuration names: files by a path, or a data set by name, read by ``datasets``.

Data sets of the hub are downloaded to the standard Hugging Face cache and read from there, offline with HF_HUB_OFFLINE;
their scripts are never run. This is the only module that uses private functions of `datasets` and `huggingface_hub`.
"""

from __future__ import annotations

import contextlib
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
from trace_ds.corpora.records import (
    FILE_KINDS,
    PARQUET_ROWS,
    Choose,
    can_read,
    columns_to_read,
    file_kind,
    first_line,
)
from trace_ds.errors import UserError, listed, nearest
from trace_ds.run.hub_names import revisions

_COMMIT = re.compile(r"[0-9a-f]{40}")
BUILDERS = ("Json", "Csv", "Parquet", "Arrow", "Text")  # of datasets: the others decode media, or unpickle
DEFAULT_SPLIT = "train"
README = "README.md"
TIMEOUT_S = 20  # for the hub to say what a revision is

Named = CorpusEntry | TaskConfig  # an entry of the configuration with `path` or `dataset`


@dataclass(frozen=True)
class _Table:
    """An open split of a data set.

    Attributes:
        name: what reports call it.
        files: on this machine, that hold it.
        commit: of the hub.
        config: the configuration taken; None where there is none to choose.
    """

    data: Any  # a datasets.Dataset
    where: str
    name: str
    split: str
    files: list[Path]
    commit: str
    config: str | None

    def rows(self, choose: Choose | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, row), a few in memory at a time; ``choose`` as in :func:`.records.read_rows`."""
        number = 0
        with _reading(self.where):
            for table in self.data.with_format("arrow").iter(batch_size=PARQUET_ROWS):
                if choose is not None:
                    table = table.select(columns_to_read(table.schema, choose, self.where))
                for row in table.to_pylist():
                    number += 1
                    yield number, row


def files_of(named: Named, key: str) -> list[Path]:
    """The files that a path names, in the order of their names; :class:`UserError` when there are none to read."""
    path = Path(named.path)
    if named.split is not None:
        raise UserError("files have no splits", named.path, "take split out, or name a data set")
    if path.is_dir():
        files = sorted(item for item in path.iterdir() if item.is_file() and not item.name.startswith("."))
        files = [item for item in files if can_read(item) and item.name != README]
        missing = f"the folder holds no file that can be read ({', '.join(FILE_KINDS)})"
    elif path.is_file():
        files, missing = [path], ""
    elif glob.has_magic(named.path):
        files = [Path(item) for item in sorted(glob.glob(named.path, recursive=True))]  # noqa: PTH207 (any path)
        files, missing = [item for item in files if item.is_file()], "no file matches the pattern"
    else:
        files, missing = [], "the corpus file does not exist"
    if not files:
        raise UserError(missing, named.path, f"{_nearby(path)}correct {key} in the configuration")
    for item in files:
        if not can_read(item):
            kind = file_kind(item) or item.suffix
            raise UserError(f"cannot read files of the kind {kind!r}", str(item), f"use one of {', '.join(FILE_KINDS)}")
    return files


def _nearby(path: Path) -> str:
    """The beginning of a fix: what is in this folder, or in the one that a file was looked for in."""
    folder = next((each for each in (path, *path.absolute().parents) if each.is_dir()), Path("/"))
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(item.name for item in folder.iterdir() if not item.name.startswith("."))
    return nearest(path.name, names, f"{folder} has")


def files_here(named: Named, key: str) -> list[Path]:
    """The files on this machine that hold what an entry names; :class:`UserError` when it cannot be read offline."""
    return open_table(named, key, offline=True).files if named.dataset else files_of(named, key)


def in_cache(name: str, config: str | None) -> bool:
    """Whether the cache has a data set of the hub, in one of its configurations (None: any)."""
    folders = [item.parts[-4] for item in _in_cache(name)]  # with a suffix where the task chooses files
    return any(config is None or folder == config or folder.startswith(f"{config}-") for folder in folders)


_cache_only: ContextVar[bool] = ContextVar("cache_only", default=False)


@contextlib.contextmanager
def cache_only() -> Iterator[None]:
    """Send no request to the hub inside the block: data sets come from the cache as they are."""
    token = _cache_only.set(True)
    try:
        yield
    finally:
        _cache_only.reset(token)


def missing_data_bytes(named: Named, key: str, *, any_split: bool = False) -> int:
    """Bytes of a data set that are still to be downloaded: sizes of its files on the hub; reads only its README.md.

    ``any_split``: do not require ``split``, since the caller selects it.

    Raises:
        UserError: as :func:`open_table`, and where this user has no access to the files.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    commit, cached = _locate(named, key, offline=False)
    if cached is not None:
        return 0
    name = named.dataset_id
    with _downloading(named):
        lists = _builder(named, str(commit), key).config.data_files or {}
        if not any_split:
            _split(named, list(lists), key)
        paths = sorted({str(file).partition(f"@{commit}/")[2] for files in lists.values() for file in files} - {""})
        for path in paths[:1]:  # the card is public, the files of a gated data set are not
            get_hf_file_metadata(hf_hub_url(name, path, repo_type="dataset", revision=commit))
        infos = HfApi().get_paths_info(name, paths, repo_type="dataset", revision=commit) if paths else []
    return sum(getattr(info, "size", 0) for info in infos)


def _locate(named: Named, key: str, offline: bool) -> tuple[str | None, Any]:
    """(commit of a data set on the hub, its builder in the cache, or None: it must be downloaded)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = named.dataset_id
    if Path(name).is_dir():  # the library would read it
        problem = "this is a directory, and dataset is the id of a data set on the hub"
        raise UserError(problem, name, f"{_nearby(Path(name))}name the files with path in {key}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError("this is no id of a data set on the hub", name, f"write ORG/NAME in {key}") from None
    pinned = named.revision if named.revision and _COMMIT.fullmatch(named.revision) else None
    if pinned and (cached := _cached(named, pinned)) is not None:
        return pinned, cached
    offline = offline or _is_offline()
    commit, trouble = (None, "") if offline else _commit_on_hub(name, named.revision)
    commit = commit or pinned or _commit_when_fetched(name, named.revision)
    cached = _cached(named, commit)
    if cached is None and (commit is None or trouble or offline):
        raise _absent(named, trouble)
    return commit, cached


def open_table(named: Named, key: str, *, offline: bool = False) -> _Table:
    """The data set's split, downloaded first where it is on the hub and not in the cache (unless ``offline``).

    Raises:
        UserError: it does not exist, may not be read, or cannot be reached; it has no such configuration or split.
    """
    name = named.dataset_id
    commit, builder = _locate(named, key, offline)
    if builder is None:
        with _downloading(named):
            builder = _builder(named, str(commit), key)
            _split(named, list(builder.config.data_files or ()), key)
            builder.download_and_prepare()
    with _reading(name):
        split = _split(named, list(builder.info.splits or ()), key)
        data = builder.as_dataset(split=split)
        config = None if builder.config.name == "default" else builder.config.name
        files = [Path(item["filename"]) for item in data.cache_files]
        shown = [name.rpartition("/")[2], named.config, split if split != DEFAULT_SPLIT else None]
        return _Table(data, name, "/".join(filter(None, shown)), split, files, builder.hash, config)


@functools.lru_cache(maxsize=256)
def _commit_on_hub(name: str, revision: str | None) -> tuple[str | None, str]:
    """(commit, "") or (None, why the hub does not say); asked once per process, so that a run sees one commit."""
    from huggingface_hub import HfApi, errors

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=TIMEOUT_S).sha, ""
    except errors.RevisionNotFoundError:
        fix = f"{nearest(revision, revisions(name, 'dataset'))}name one of these, or a commit of {_page(name)}/commits"
        raise UserError(f"the data set has no revision {revision!r}", name, fix) from None
    except errors.RepositoryNotFoundError:
        fix = f"correct the name; for a private one `hf auth login` with an account that may read {_page(name)}"
        raise UserError("the hub has no such data set, or it is private", name, fix) from None
    except Exception as error:  # no network (httpx has many words for it), or an invalid response
        return None, f"the hub cannot be reached ({type(error).__name__})"


def _commit_when_fetched(name: str, revision: str | None) -> str | None:
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

    parts = {"configuration": named.config, "revision": named.revision}
    choice = "".join(f" ({key} {value})" for key, value in parts.items() if value)
    trouble = trouble or (
        "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "downloads are disabled for this command"
    )
    here = sorted({item.parts[-4] for item in _in_cache(named.dataset_id)})
    problem = f"the data set{choice} is not in the cache{f' (it has {listed(here)})' if here else ''}, and {trouble}"
    return UserError(problem, named.dataset_id, "run `trace-ds fetch CONFIG` where there is a network")


def _is_offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(_cache_only.get() or constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)


def _default_config(name: str, commit: str) -> str:
    """The configuration that a data set's name alone means, by the card of this commit in the cache."""
    from huggingface_hub import metadata_load, try_to_load_from_cache

    page = try_to_load_from_cache(name, README, revision=commit, repo_type="dataset")
    listed = (metadata_load(page) or {}).get("configs") if isinstance(page, str) else None
    configs = [item for item in listed or () if isinstance(item, dict)]
    chosen = configs if len(configs) == 1 else [item for item in configs if item.get("default")]
    return str(chosen[0].get("config_name", "default")) if chosen else "default"


def _in_cache(name: str) -> list[Path]:
    """What the cache of ``datasets`` says it has of a data set, the newest last: …/CONFIG/VERSION/COMMIT/FILE."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    space, _, short = name.rpartition("/")
    folder = f"{space}___{camelcase_to_snakecase(short)}" if space else camelcase_to_snakecase(short)
    files = (Path(datasets.config.HF_DATASETS_CACHE) / folder).glob("*/*/*/dataset_info.json")
    return sorted(files, key=lambda item: (item.stat().st_mtime, str(item)))


def _cached(named: Named, commit: str | None) -> Any:
    """The builder of what lies in the cache of ``datasets``, or None.

    Args:
        commit: None: the newest that is there, unless a revision was asked for.
    """
    from datasets.packaged_modules.cache.cache import Cache

    name = named.dataset_id
    if commit is None and named.revision is not None:
        return None
    for item in reversed(_in_cache(name)):
        config, version, digest = item.parts[-4:-1]
        if commit in (None, digest) and config == (named.config or _default_config(name, digest)):
            with _reading(name):
                short = name.rpartition("/")[2]
                return Cache(dataset_name=short, repo_id=name, config_name=config, version=version, hash=digest)
    return None


@contextlib.contextmanager
def _downloading(named: Named) -> Iterator[None]:
    """What the hub refuses becomes a :class:`UserError`."""
    import datasets
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
        disable_progress_bars()
    with _reading(named.dataset_id):
        try:
            yield
        except GatedRepoError:
            raise _gated(named.dataset_id) from None
        except (ConnectionError, LocalEntryNotFoundError) as error:
            raise _absent(named, f"the hub cannot be reached ({type(error).__name__})") from None


def _builder(named: Named, commit: str, key: str) -> Any:
    """The library's reader of one configuration; only kinds that hold text and run no code. The page of the data set
    comes into the cache."""
    from datasets import get_dataset_config_names, load_dataset_builder
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):  # not every data set has a card
        hf_hub_download(named.dataset_id, README, repo_type="dataset", revision=named.revision)
    try:
        builder = load_dataset_builder(named.dataset_id, name=named.config, revision=commit)
    except ValueError:
        names = get_dataset_config_names(named.dataset_id, revision=commit)
        if named.config in names or (named.config is None and len(names) < 2):
            raise
        problem = (
            f"the data set has no configuration {named.config!r}" if named.config else "the configuration is missing"
        )
        raise UserError(problem, named.dataset_id, f"{nearest(named.config, names)}set config in {key}") from None
    packaged = "datasets.packaged_modules."
    kinds = [kind.__name__ for kind in type(builder).__mro__ if kind.__module__.startswith(packaged)]
    if not set(kinds) & set(BUILDERS):
        fix = f"convert it to one of {', '.join(BUILDERS)}"
        raise UserError(f"cannot read data sets of the kind {kinds[-1] if kinds else '?'}", named.dataset_id, fix)
    return builder


def _split(named: Named, names: list[Any], key: str) -> str:
    """The split that is asked for (``train``, ``train[:50%]``, ``train+test``), or the only one there is."""
    from datasets import ReadInstruction

    names = [str(name) for name in names]
    if named.split is None and len(names) == 1:
        return names[0]
    if named.split is None:
        problem = "the data set has several splits, and none is named"
        raise UserError(problem, named.dataset_id, f"{nearest(None, names)}set split in {key}")
    for split in (part.strip().partition("[")[0] for part in named.split.split("+")):
        if split not in names:
            problem = f"the data set has no split {split!r}"
            raise UserError(problem, named.dataset_id, f"{nearest(split, names)}set split in {key}")
    try:
        ReadInstruction.from_spec(named.split)
    except (ValueError, AssertionError) as error:
        fix = f"set split in {key} as in train[:50%], train[100:200]+test"
        raise UserError(f"{named.split!r} is no part of a split ({first_line(error)})", named.dataset_id, fix) from None
    return named.split


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Whatever a damaged or hostile data set makes the libraries raise becomes a :class:`UserError`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise  # a full disk, and not a file of the data set
        reason = first_line(error)
        if "gated" in reason:  # seen only at the data: everybody may read the card
            raise _gated(where) from error
        raise UserError(f"the data set cannot be read ({reason})", where, "check its files and its page") from error
