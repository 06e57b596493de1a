"""Open what an entry of the configuration names: files by a path, or a data set by name, read by ``datasets``.

A data set is an id on the Hugging Face hub, or a directory in the hub's layout. From the hub it comes into the
libraries' own cache and is read from there, offline with HF_HUB_OFFLINE; no code of it runs. What is private in these
libraries is used in this file alone.
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
    nearest,
)
from trace_ds.errors import UserError

_COMMIT = re.compile(r"[0-9a-f]{40}")
BUILDERS = ("Json", "Csv", "Parquet", "Arrow", "Text")  # of datasets: the others decode media, or unpickle
DEFAULT_SPLIT = "train"
README = "README.md"
TIMEOUT_S = 20  # for the hub to say what a revision is

Named = CorpusEntry | TaskConfig  # what names data


@dataclass(frozen=True)
class _Table:
    """An open split of a data set.

    Attributes:
        name: what reports call it.
        files: on this machine, that hold it.
        commit: of the hub; None for a local one.
        config: the configuration taken; None where there is none to choose.
    """

    data: list[Any]  # of datasets.Dataset or IterableDataset, which follow each other
    where: str
    name: str
    split: str
    files: list[Path]
    commit: str | None = None
    config: str | None = None

    def rows(self, choose: Choose | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(number from 1, row), a few in memory at a time; ``choose`` as in :func:`.records.read_rows`."""
        number = 0
        with _reading(self.where):
            for table in _tables(self.data):
                if choose is not None:
                    table = table.select(columns_to_read(table.schema, choose, self.where))
                for row in table.to_pylist():
                    number += 1
                    yield number, row


def files_of(named: Named, key: str) -> list[Path]:
    """The files that a path names, in the order of their names; :class:`UserError` when there are none to read."""
    path, fix = Path(named.path), f"correct {key} in the configuration"
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
        raise UserError(missing, named.path, fix)
    for item in files:
        if not can_read(item):
            kind = file_kind(item) or item.suffix
            raise UserError(f"cannot read files of the kind {kind!r}", str(item), f"use one of {', '.join(FILE_KINDS)}")
    return files


def open_table(named: Named, key: str, *, offline: bool = False) -> _Table:
    """The data set's split, downloaded first where it is on the hub and not in the cache (unless ``offline``).

    Raises:
        UserError: it does not exist, may not be read, or cannot be reached; it has no such configuration or split.
    """
    return _open_hub(named, key, offline) if on_hub(named) else _open_directory(named, key)


def files_here(named: Named, key: str) -> list[Path]:
    """The files on this machine that hold what an entry names; :class:`UserError` when it cannot be read offline."""
    return open_table(named, key, offline=True).files if named.dataset else files_of(named, key)


def on_hub(named: Named) -> bool:
    """Whether an entry names a data set on the hub."""
    return bool(named.dataset) and not Path(named.dataset_id).is_dir()


def commit_of(named: Named) -> str | None:
    """The commit of a data set on the hub: the hub's answer; without a network, the commit fetched by us, else the
    newest in the cache. None: nothing here knows one."""
    name = named.dataset_id
    commit = None if _is_offline() else _commit_on_hub(name, named.revision)[0]
    commit = commit or _commit_when_fetched(name, named.revision)
    return commit or next((item.parts[-2] for item in reversed(_in_cache(name))), None)


def in_cache(name: str, config: str | None) -> bool:
    """Whether the cache has a data set of the hub, in one of its configurations (None: any)."""
    folders = [item.parts[-4] for item in _in_cache(name)]  # with a suffix where the task chooses files
    return any(config is None or folder == config or folder.startswith(f"{config}-") for folder in folders)


_looking: ContextVar[bool] = ContextVar("looking", default=False)


@contextlib.contextmanager
def cache_only() -> Iterator[None]:
    """Send no request to the hub inside the block: data sets come from the cache as they are."""
    token = _looking.set(True)
    try:
        yield
    finally:
        _looking.reset(token)


def _open_directory(named: Named, key: str) -> _Table:
    place = Path(named.dataset_id)
    if any((place / name).is_file() for name in ("state.json", "dataset_dict.json")):
        fix = "write its splits with to_parquet, and name the files"
        raise UserError("this is what save_to_disk left, which is not read", str(place), fix)
    with _reading(str(place)):
        builder = _builder(named, str(place.absolute()), None, key)
        patterns = builder.config.data_files
        split = _split(named, list(patterns), key)
        files = [Path(str(item).rpartition("::")[2]) for name in split_names(split) for item in patterns[name]]
        for file in files:
            if not file.is_file():
                raise UserError("its page names a file that is not here", str(file), "download the data set whole")
        data = _slices(builder, split)
        return _Table(data, str(place), _name(place.name, named, split), split, files, config=named.config)


def missing_data_bytes(named: Named, key: str, *, any_split: bool = False) -> int:
    """How much the cache lacks of a data set on the hub, in bytes of its files there; only its page is downloaded.

    ``any_split``: whoever reads it names the split.

    Raises:
        UserError: as :func:`open_table`, where this user may not read the files too.
    """
    from huggingface_hub import HfApi, get_hf_file_metadata, hf_hub_url

    commit, cached = _locate(named, key, offline=False)
    if cached is not None:
        return 0
    name = named.dataset_id
    with _downloading(named):
        lists = _hub_builder(named, str(commit), key).config.data_files or {}
        if not any_split:
            _split(named, list(lists), key)
        paths = sorted({str(file).partition(f"@{commit}/")[2] for files in lists.values() for file in files} - {""})
        for path in paths[:1]:  # a page is public, the files of a gated data set are not
            get_hf_file_metadata(hf_hub_url(name, path, repo_type="dataset", revision=commit))
        infos = HfApi().get_paths_info(name, paths, repo_type="dataset", revision=commit) if paths else []
    return sum(getattr(info, "size", 0) for info in infos)


def _locate(named: Named, key: str, offline: bool) -> tuple[str | None, Any]:
    """(commit of a data set on the hub, its builder in the cache or None: it can be downloaded)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    name = named.dataset_id
    try:
        validate_repo_id(name)
    except HFValidationError:
        problem = "there is no such directory, and it is no id of the hub"
        raise UserError(problem, name, f"correct dataset in {key}") from None
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


def _open_hub(named: Named, key: str, offline: bool) -> _Table:
    name = named.dataset_id
    commit, cached = _locate(named, key, offline)
    cached = cached or _download(named, str(commit), key)
    with _reading(name):
        split = _split(named, list(cached.info.splits or ()), key)
        data = cached.as_dataset(split=split)
        config = None if cached.config.name == "default" else cached.config.name
        files = [Path(item["filename"]) for item in data.cache_files]
        return _Table([data], name, _name(name.rpartition("/")[2], named, split), split, files, cached.hash, config)


@functools.lru_cache(maxsize=256)
def _commit_on_hub(name: str, revision: str | None) -> tuple[str | None, str]:
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
    trouble = trouble or ("HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub was not asked")
    problem = f"the data set{choice} is not in the cache, and {trouble}"
    return UserError(problem, named.dataset_id, "run `trace-ds fetch CONFIG` where there is a network")


def _is_offline() -> bool:
    import datasets
    from huggingface_hub import constants

    return bool(_looking.get() or constants.HF_HUB_OFFLINE or datasets.config.HF_HUB_OFFLINE)


def _default_config(name: str, commit: str) -> str:
    """The configuration that a data set's name alone means, by the page that was fetched with this commit."""
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


def _download(named: Named, commit: str, key: str) -> Any:
    with _downloading(named):
        builder = _hub_builder(named, commit, key)
        _split(named, list(builder.config.data_files or ()), key)
        builder.download_and_prepare()
    return builder


def _hub_builder(named: Named, commit: str, key: str) -> Any:
    """The library's reader of a data set on the hub, whose page comes into the cache."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    with contextlib.suppress(EntryNotFoundError):  # not every data set has a page
        hf_hub_download(named.dataset_id, README, repo_type="dataset", revision=named.revision)
    return _builder(named, named.dataset_id, commit, key)


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


def _builder(named: Named, place: str, commit: str | None, key: str) -> Any:
    """The library's reader of one configuration; only kinds that hold text and run no code."""
    from datasets import get_dataset_config_names, load_dataset_builder

    try:
        builder = load_dataset_builder(place, name=named.config, revision=commit)
    except ValueError:
        names = get_dataset_config_names(place, revision=commit)
        if named.config in names or (named.config is None and len(names) < 2):
            raise
        problem = (
            f"the data set has no configuration {named.config!r}" if named.config else "the configuration is missing"
        )
        raise UserError(problem, named.dataset_id, f"{nearest(named.config, names)}set config in {key}") from None
    packaged = "datasets.packaged_modules."
    kinds = [kind.__name__ for kind in type(builder).__mro__ if kind.__module__.startswith(packaged)]
    if not set(kinds) & set(BUILDERS):
        fix = "convert it to Parquet or JSON Lines"
        raise UserError(f"cannot read data sets of the kind {kinds[-1] if kinds else '?'}", named.dataset_id, fix)
    return builder


def _split(named: Named, names: list[Any], key: str) -> str:
    """The split that is asked for (``train``, ``train[:50%]``, ``train+test``), or the only one there is."""
    names = [str(name) for name in names]
    if named.split is None and len(names) == 1:
        return names[0]
    if named.split is None:
        problem = "the data set has several splits, and none is named"
        raise UserError(problem, named.dataset_id, f"{nearest(None, names)}set split in {key}")
    for split in split_names(named.split):
        if split not in names:
            problem = f"the data set has no split {split!r}"
            raise UserError(problem, named.dataset_id, f"{nearest(split, names)}set split in {key}")
    return named.split


def split_names(split: str) -> list[str]:
    """The splits that ``datasets``' own notation names: train and test of ``train[:50%]+test``."""
    return [part.strip().partition("[")[0] for part in split.split("+")]


def _slices(builder: Any, split: str) -> list[Any]:
    """The parts of a directory's data set, as streams; a part by numbers or by per cent needs the length of its split,
    which is then read once more."""
    from datasets import ReadInstruction

    streams = {name: builder.as_streaming_dataset(split=name) for name in split_names(split)}
    if split in streams:
        return list(streams.values())
    lengths = {name: sum(table.num_rows for table in _tables([stream])) for name, stream in streams.items()}
    parts = ReadInstruction.from_spec(split).to_absolute(lengths)
    spans = [
        (part.splitname, part.from_ or 0, lengths[part.splitname] if part.to is None else part.to) for part in parts
    ]
    return [streams[name].skip(start).take(stop - start) for name, start, stop in spans]


def _tables(parts: list[Any]) -> Iterator[Any]:
    """The rows as Arrow tables, a few in each."""
    for part in parts:
        yield from part.with_format("arrow").iter(batch_size=PARQUET_ROWS)


def _name(name: str, named: Named, split: str) -> str:
    return "/".join([name, *([named.config] if named.config else []), *([split] if split != DEFAULT_SPLIT else [])])


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
        if "gated" in reason:  # seen only at the data: the page may be read by everybody
            raise _gated(where) from error
        raise UserError(f"the data set cannot be read ({reason})", where, "check its files and its page") from error
