"""Models by their name on the hub, in the cache of ``huggingface_hub`` (HF_HOME) and brought there by it.

    download_model(HubName("allenai/OLMoE-1B-7B-0924"), "model.path")    # the folder, after downloading what it lacks
    cached_model(HubName("allenai/OLMoE-1B-7B-0924"))                    # the folder, or None; no network

Configuration, tokenizer and the safetensors files of the index are all that is ever downloaded: no pickle, no code. A
name without a revision is what ``main`` is when the hub can be reached, else what it was when the cache last asked.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from trace_ds.errors import UserError, listed, nearest
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import HubName, revisions

CONFIG = "config.json"
SMALL = ["*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja"]  # configuration, index, tokenizer
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ASK_TIMEOUT_S = 20
DOWNLOADS = 8  # files at a time


def cached_model(name: HubName) -> Path | None:
    """The folder of the model ``name`` in the cache, without a request to the hub; None when it has none.

    Files may be missing in it: whoever reads them says which.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return _snapshot(name.id, name.revision, [CONFIG], local_files_only=True)
    except LocalEntryNotFoundError:
        return None


def download_model(name: HubName, key: str, *, weights: bool = True) -> Path:
    """Download what the cache lacks of the model ``name`` and return its folder there.

    Args:
        key: where the configuration names it.
        weights: False: configuration and tokenizer are enough.

    Raises:
        UserError: the hub has no such model or revision, or not for this user; it cannot be reached and the cache
            lacks files; there are no safetensors.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError  # HTTPError: that of httpx

    commit, trouble = None, ""
    try:
        if not constants.HF_HUB_OFFLINE:
            commit, trouble = _commit_on_hub(name)
        # The client asks a hub that does not answer, or not as one, for minutes: then only its cache is looked at.
        local = commit is None
        folder = _snapshot(name.id, name.revision, SMALL, local_files_only=local)
        if not weights:
            return folder
        patterns = [*SMALL, *_weight_files(folder)]
        folder = _snapshot(name.id, folder.name, patterns, local_files_only=local)
    except (HTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        raise _refusal(error, name, key, trouble) from None
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # an answer that is none
        raise _refusal(error, name, key, f"the answer is none ({type(error).__name__})") from None
    if is_whole(folder):
        return folder
    if (folder / INDEX).is_file() or commit is None:
        raise _refusal(LocalEntryNotFoundError("files are missing"), name, key, trouble)
    raise _no_weights(name, key, folder.name)


def missing_weights(name: HubName, key: str, folder: Path) -> dict[str, int]:
    """The files with weights that the folder of ``name`` in the cache lacks, and their bytes.

    Raises:
        UserError: the hub does not say, or has no safetensors.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    files = [file for file in _weight_files(folder) if not (folder / file).is_file()]
    if not files:
        return {}
    try:
        infos = HfApi().get_paths_info(name.id, files, revision=folder.name)
    except (HTTPError, ConnectionError) as error:
        raise _refusal(error, name, key, "") from None
    sizes = {info.path: getattr(info, "size", 0) for info in infos}
    if not sizes:
        raise _no_weights(name, key, folder.name)
    return sizes


def download_weights(name: HubName, commit: str, files: dict[str, int], advance: Callable[[int], None]) -> None:
    """Download files of a model, several at a time; ``advance`` gets the bytes of each that has come.

    What fails is left to :func:`download_model`, which says why.
    """
    from huggingface_hub import hf_hub_download

    pool = ThreadPoolExecutor(DOWNLOADS)
    coming = {pool.submit(hf_hub_download, name.id, file, revision=commit): size for file, size in files.items()}
    try:
        with contextlib.suppress(Exception):
            for future in as_completed(coming):
                future.result()
                advance(coming[future])
    finally:
        pool.shutdown(cancel_futures=True)


def is_whole(folder: Path) -> bool:
    """Whether every file with weights is there."""
    return all((folder / shard).is_file() for shard in _weight_files(folder))


def downloaded_bytes(folder: Path) -> int:
    """Bytes of the files of a folder in the cache."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _commit_on_hub(name: HubName) -> tuple[str | None, str]:
    """(commit that ``name`` is now, "") or (None, why the hub does not say). Nothing changes in the cache."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    try:
        commit = HfApi().model_info(name.id, revision=name.revision, timeout=ASK_TIMEOUT_S).sha
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise
    except Exception as error:  # no network (httpx has many words for it), or an answer that is none
        return None, type(error).__name__
    return (commit, "") if isinstance(commit, str) and commit else (None, "its answer names no commit")


def _snapshot(repository: str, revision: str | None, patterns: list[str], *, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    options: dict[str, Any] = {"allow_patterns": patterns, "ignore_patterns": ["*/*"]}  # other formats lie in folders
    return Path(snapshot_download(repository, revision=revision, local_files_only=local_files_only, **options))


def _weight_files(folder: Path) -> list[str]:
    """The safetensors files that the index names, or the single one."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    placed = read_object(folder / INDEX, "the index of the weight shards", "choose another model").get("weight_map")
    names = sorted({str(name) for name in placed.values()}) if isinstance(placed, dict) else []
    if not names or not all(name.endswith(".safetensors") and "/" not in name for name in names):
        problem = "the index names no safetensors files of this folder"
        raise UserError(problem, str(folder / INDEX), "choose another model")
    return names


def _no_weights(name: HubName, key: str, commit: str) -> UserError:
    from huggingface_hub import HfApi

    files: list[str] = []
    with contextlib.suppress(Exception):  # only for the message
        files = HfApi().list_repo_files(name.id, revision=commit)
    fix = f"it has {listed(files)}: name a revision or a model with safetensors, or a directory of converted weights"
    return UserError(f"{name} has no safetensors weights (pickles are never read)", key, fix)


def _refusal(error: Exception, name: HubName, key: str, trouble: str) -> UserError:
    """What went wrong between the hub and us, as an error of the user's.

    Args:
        trouble: why the hub did not say what commit the name is.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"{constants.ENDPOINT}/{name.id}"
    log_in = "log in (`hf auth login`, or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        fix = f"ask for access at {page}, {log_in}, and run this again"
        return UserError(f"{name.id} is gated: its owners decide who may download it", key, fix)
    if isinstance(error, RepositoryNotFoundError):
        problem = f"there is no directory {name}, and the hub has no model {name.id} (or it is private)"
        return UserError(problem, key, f"correct the name; for a private model {log_in}")
    if isinstance(error, RevisionNotFoundError):
        fix = f"{nearest(name.revision, revisions(name.id, 'model'))}name one of these, or a commit of {page}/commits"
        return UserError(f"{name.id} has no revision {name.revision or 'main'}", key, fix)
    cause = error.__cause__ or error
    status = getattr(getattr(cause, "response", None), "status_code", "")
    why = f"{constants.ENDPOINT} does not give it ({trouble or f'{type(cause).__name__} {status}'.strip()})"
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else why
    fix = "where there is a network, `trace-ds fetch CONFIG` brings it into HF_HOME; or name a directory"
    return UserError(f"{name} is not whole in the hub's cache, and {why}", key, fix)
