"""The run directory: where every artefact of a run lives, and the lock that keeps two jobs from sharing it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from trace_ds.errors import UserError
from trace_ds.run.files import remove_leftovers, write_text

LOCK_VARIABLE = "TRACE_DS_RUN_LOCK_FD"
LOCK_RETRY_S = 3.0
LOCK_NAME = ".lock"


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. A variant (``parent`` set) shares the parent's data and statistics.

    Attributes:
        config_text: the resolved configuration, for config.yaml; None: leave that file alone.
    """

    path: Path
    parent: Path | None = None
    config_text: str | None = field(default=None, repr=False, compare=False)

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def data(self) -> Path:
        return (self.parent or self.path) / "data"

    @property
    def statistics(self) -> Path:
        return (self.parent or self.path) / "statistics"

    @property
    def calibration(self) -> Path:
        return self.path / "calibration"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def logs(self) -> Path:
        return self.path / "logs"

    @property
    def tb(self) -> Path:
        return self.path / "tb"

    @property
    def variants(self) -> Path:
        return self.path / "variants"

    @property
    def stop_files(self) -> tuple[Path, ...]:
        """Touch one to stop collect (at its next saved state) or unlearn (with a complete checkpoint), exit status 75:
        RUN/stop, and for a variant its parent's too."""
        return tuple(folder / "stop" for folder in (self.path, self.parent) if folder is not None)

    def variant(self, name: str, config_text: str | None = None) -> RunDirectory:
        return RunDirectory(self.variants / name, self.path, config_text)

    @classmethod
    def at(cls, path: Path, config_text: str | None = None) -> RunDirectory:
        """The run directory at ``path``, recognising a variant by its place (``RUN/variants/NAME``)."""
        resolved = Path(os.path.abspath(path))
        return cls(path, path.parent.parent if resolved.parent.name == "variants" else None, config_text)

    def create(self, config_text: str) -> None:
        """Make the directory (or say why not), clear what killed writers left, store the resolved configuration."""
        self.clear_leftovers()
        replace(self, config_text=config_text).store_config()

    def clear_leftovers(self) -> None:
        """Delete what killed writers left in folders of this run; a parent's belong to whoever holds its lock."""
        own = (self.path, self.checkpoints, self.evaluation, *([self.statistics] if self.parent is None else []))
        try:
            for folder in own:
                remove_leftovers(folder)
        except OSError as error:
            raise unwritable(self.path, error) from None

    def store_config(self) -> None:
        """Write config.yaml. A stage does it when its input has proved right, so that a refused one changes nothing."""
        if self.config_text is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file() or self.config.read_text(encoding="utf-8") != self.config_text:
                write_text(self.config, self.config_text)
        except OSError as error:
            raise unwritable(self.path, error) from None


def unwritable(path: Path, error: OSError) -> UserError:
    """The error of a run directory that is read-only, full, or not a directory."""
    return UserError(
        f"cannot write here ({error.strerror or error})", str(path), "free space, or choose another --run-dir"
    )


@contextlib.contextmanager
def locked(run: RunDirectory) -> Iterator[int]:
    """Hold the run's lock (``flock`` on ``RUN/.lock``) and yield its file descriptor.

    A child process that inherits the descriptor (:data:`LOCK_VARIABLE` names it) shares the lock, so it stays held
    until the last process of the job has gone, and vanishes by itself when all are killed.

    Raises:
        UserError: another process uses the run directory, or it cannot be written.
    """
    inherited = os.environ.get(LOCK_VARIABLE)
    if inherited is not None:
        number, _, path = inherited.partition(":")
        if path == os.path.abspath(run.path):
            yield int(number)
            return
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    descriptor, fresh = _lock(run.path)
    try:
        yield descriptor
    except UserError:
        if fresh:  # the input was wrong: leave what was there before, which may be nothing at all
            (run.path / LOCK_NAME).unlink()
            with contextlib.suppress(OSError):  # not empty: something was finished before
                for folder in made:
                    folder.rmdir()
        raise
    finally:
        os.close(descriptor)


def _lock(folder: Path) -> tuple[int, bool]:
    """(descriptor of the locked file, whether the file is new); makes the folder."""
    path = folder / LOCK_NAME
    deadline = time.monotonic() + LOCK_RETRY_S  # the children of a killed job need a moment to go
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(folder, error) from None
        if _flock(descriptor, path) and _is_at(descriptor, path):
            os.set_inheritable(descriptor, True)
            return descriptor, fresh
        os.close(descriptor)  # held by another, or removed by one whose input was refused
        if time.monotonic() > deadline:
            raise UserError(
                "another process is using this run directory",
                str(folder),
                "wait for it to end (or stop it), or choose another --run-dir",
            )
        time.sleep(0.1)


def _flock(descriptor: int, path: Path) -> bool:
    """Take the lock if nobody has it; whether that went well."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        os.close(descriptor)
        raise UserError(
            f"files cannot be locked here ({error.strerror})",
            str(path),
            "mount the file system with locks (Lustre: -o flock), or choose another --run-dir",
        ) from None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def lock_environment(run: RunDirectory, descriptor: int) -> dict[str, str]:
    """The environment variable that hands a held lock to a child started with ``pass_fds=[descriptor]``."""
    return {LOCK_VARIABLE: f"{descriptor}:{os.path.abspath(run.path)}"}
