"""Atomic files, content hashes, and which directories are ours.

The only place that knows how to write so that a crash leaves no half file. A stage replaces and deletes what carries a
marker of ours, and nothing else: a run directory is marked by :data:`MARKER`, what a stage makes in it by the
description that the stage writes last. What killed writers left is known by its name, in a marked run directory only.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from trace_ds.errors import UserError
from trace_ds.run.foreign import open_regular

if TYPE_CHECKING:
    import numpy as np

MARKER = ".trace_ds.json"  # of a run directory
ARTEFACT = "artefact.json"
MANIFEST = "manifest.json"  # of a checkpoint
MODEL = "conversion.json"  # of a converted model
DEMO_MODEL = "training.json"
PARTIAL = "shape.json"  # of statistics that are being collected
_FIX = "move it away, or choose another --run-dir"
# NAME.tmp-PID, .NAME.tmp-PID; NAME.tmp-old-PID on its way out, NAME.tmp-replaced-PID until the new NAME is there;
# NAME.tmp-HOST-PID-8hex of a conversion (twice the ending where a checkpoint is converted to be scored).
LEFTOVER = re.compile(
    r"\.?(?P<name>.+?)(?:\.tmp-(?:(?:old-|replaced-)?[1-9]\d{0,9}|[\w.-]+-[1-9]\d{0,9}-[0-9a-f]{8}|spool)){1,2}"
)
_HASH_BLOCK_BYTES = 1 << 22
CLOCK_TICK_S = 0.02  # file times are as coarse as the kernel's timer, 1 to 10 ms
_T = TypeVar("_T")


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spare white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def once_a_process(read: Callable[[Path], _T]) -> Callable[[Path], _T]:
    """Remember what ``read`` makes of a file as long as it is the same file, by device, inode, size and times.

    Callers share the value and must not change it. What raises is not remembered.
    """
    results: dict[tuple[str | int, ...], _T] = {}

    @functools.wraps(read)
    def remembered(path: Path) -> _T:
        try:
            status = path.stat()
        except OSError:
            return read(path)
        key = (str(path), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if key not in results:
            # A later change within the clock tick of this one would leave the same times: wait until it is over.
            if 0 <= time.time() - status.st_ctime < CLOCK_TICK_S:
                time.sleep(CLOCK_TICK_S)
            results[key] = read(path)
        return results[key]

    return remembered


@once_a_process
def sha256_file(path: Path) -> str:
    """SHA-256 of a regular file, read in blocks (constant memory)."""
    digest = hashlib.sha256()
    with open_regular(path) as handle:
        while block := handle.read(_HASH_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def require_files(directory: Path, files: Mapping[str, Mapping[str, Any]], fix: str, *, hashes: bool) -> None:
    """Compare files with their descriptions ``{bytes, sha256}``: sizes always, SHA-256 when ``hashes``.

    Raises:
        UserError: names the first file that is missing, cannot be read, or differs.
    """
    for name, entry in files.items():
        try:
            problem = _difference(directory / name, entry, hashes)
        except OSError as error:  # a stale handle, a bad sector, a file of another user
            problem = f"the file cannot be read ({error.strerror})"
        if problem:
            raise UserError(problem, str(directory / name), fix)


def _difference(path: Path, entry: Mapping[str, Any], hashes: bool) -> str:
    if not path.is_file():
        return "the file is missing"
    size = path.stat().st_size
    if size != entry["bytes"]:
        return f"the file has {size} bytes instead of {entry['bytes']} (truncated?)"
    if hashes and sha256_file(path) != entry["sha256"]:
        return "the file was altered after it was written (SHA-256 differs)"
    return ""


def fsync_directory(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically: a sibling temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Indented, key-sorted JSON, written atomically."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")


def reserve(path: Path) -> None:
    """Give every byte of a file its place on the disk, before it is written through a memory map.

    Writing to a hole of a file that a full disk cannot fill ends a process with SIGBUS; this is an OSError.
    """
    with path.open("r+b") as handle:
        try:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise OSError(error.errno, error.strerror, str(path)) from None


def new_array(path: Path, dtype: np.dtype | type, shape: Sequence[int]) -> np.ndarray:
    """A new .npy file of zeros as a writable memory map (a plain array, when it has no element)."""
    import numpy as np

    if 0 in shape:
        np.save(path, np.zeros(shape, dtype))
        return np.zeros(shape, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=tuple(shape))
    reserve(path)
    return array


def open_mapped(path: Path) -> np.ndarray:
    """An .npy file as a read-only memory map; the kernel takes its pages back when memory is needed.

    Raises:
        ValueError: it is none, or holds pickled objects. OSError, EOFError: it cannot be read.
    """
    import numpy as np

    return np.load(path, mmap_mode="r", allow_pickle=False)


@contextlib.contextmanager
def safetensors_errors(path: Path) -> Iterator[None]:
    """Raise the OSError behind an error of safetensors that could not write (a full disk)."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


def require_directory(path: Path, *markers: str) -> None:
    """Refuse a directory that may not be replaced: one that holds something, and none of these marker files."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError("a directory of trace_ds's would take the place of this", str(path), _FIX)
    if any(path.iterdir()) and not any((path / marker).is_file() for marker in markers):
        raise UserError(f"trace_ds did not make this (it has no {markers[0]}) and would replace it", str(path), _FIX)


def require_apart(outputs: Iterable[Path], inputs: Mapping[str, Path]) -> None:
    """Refuse to write to, into or around what is read: a model, a tokenizer, a corpus, a task.

    Args:
        outputs: what will be written.
        inputs: what the configuration names, by its key.
    """
    written = {place for path in outputs for place in _places(path)}
    for key, path in inputs.items():
        for place in _places(path):
            for output in written:
                if place == output or output in place.parents or place in output.parents:
                    raise UserError(
                        f"this command writes to {output}, and {key} is {path}",
                        key,
                        "choose a --run-dir (or destination) whose files are apart from what is read",
                    )


def _places(path: Path) -> set[Path]:
    """Where a path leads, as written and with its links resolved."""
    return {Path(os.path.abspath(path)), Path(os.path.realpath(path))}


@contextlib.contextmanager
def replacing_directory(path: Path, marker: str = ARTEFACT) -> Iterator[Path]:
    """Yield a temporary sibling directory that becomes ``path`` when the block ends without an error.

    A reader sees the old directory or the new one, never a mixture; an error or a kill leaves at most a
    ``path.tmp-PID`` (or ``path.tmp-replaced-PID``) sibling, which :func:`remove_leftovers` deletes at the next start.

    Raises:
        UserError: what is at ``path`` has no ``marker`` of ours; nothing is written then.
    """
    require_directory(path, marker)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with removed_on_error(temporary):
        yield temporary
        commit_directory(temporary, path, marker)


@contextlib.contextmanager
def removed_on_error(directory: Path) -> Iterator[None]:
    """Delete ``directory`` where the block ends with an error, an interrupt too."""
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def commit_directory(temporary: Path, path: Path, marker: str = ARTEFACT) -> None:
    """Fsync everything below ``temporary`` and rename it to ``path``, replacing what was there if that is ours."""
    fsync_tree(temporary)
    require_directory(path, marker)
    old = path.with_name(f"{path.name}.tmp-replaced-{os.getpid()}")
    if os.path.lexists(path):
        os.replace(path, old)
    os.replace(temporary, path)
    fsync_directory(path.parent)
    _remove(old)


def remove_directory(path: Path, *markers: str) -> None:
    """Delete a directory that has one of these markers of ours, or what is not there."""
    require_directory(path, *markers)
    _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:  # of a link to a directory the link
        path.unlink(missing_ok=True)


def fsync_tree(path: Path) -> None:
    """Bring all files below ``path`` and their directory entries to the disk."""
    for directory, _, names in os.walk(path):
        for name in names:
            with (Path(directory) / name).open("rb") as handle:
                os.fsync(handle.fileno())
        fsync_directory(Path(directory))


def remove_leftovers(directory: Path) -> None:
    """Delete what killed writers left in ``directory``, which is ours.

    When ``X.tmp-replaced-PID`` is there and ``X`` is gone, the kill fell between the two renames of
    :func:`commit_directory`: the old one comes back.
    """
    if not directory.is_dir():
        return
    for path in sorted(directory.iterdir()):
        match = LEFTOVER.fullmatch(path.name)
        if match is None:
            continue
        original = path.with_name(match["name"])
        if ".tmp-replaced-" in path.name and not os.path.lexists(original):
            os.replace(path, original)
        else:
            _remove(path)
