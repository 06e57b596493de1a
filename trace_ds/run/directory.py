"""The run directory: where every artefact of a run lives, what of it is ours, and the locks that keep jobs apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trace_ds.errors import UserError
from trace_ds.run.files import ARTEFACT, MARKER, MODEL, remove_leftovers, require_directory, write_json, write_text

LOCK_RETRY_S = 3.0
LOCK_NAME = ".lock"
INPUTS_LOCK_NAME = ".inputs.lock"  # of data and statistics: the jobs of variants share it
FINETUNE, VARIANTS = "finetune", "variants"
# What may stand in a directory before it is marked as a run's; SLURM's scripts keep logs there.
UNMARKED = ("stop", "logs", LOCK_NAME, INPUTS_LOCK_NAME)


@dataclass(frozen=True)
class Place:
    """Something that stages make in a run directory; of a run, its path.

    Attributes:
        shared: a variant has that of its run.
        marker: of a directory that is replaced as a whole: the file that shows it to be ours.
    """

    name: str
    shared: bool = False
    marker: str = ""

    def __get__(self, run: RunDirectory, kind: type[RunDirectory]) -> Path:
        return ((self.shared and run.parent) or run.path) / self.name


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. A variant (``parent`` set) shares the parent's data and statistics.

    Attributes:
        config_text: the resolved configuration, for config.yaml; None: leave that file alone.
    """

    path: Path
    parent: Path | None = None
    config_text: str | None = field(default=None, repr=False, compare=False)

    config = Place("config.yaml")
    curve = Place("curve.json")
    data = Place("data", shared=True, marker=ARTEFACT)
    calibration = Place("calibration", marker=ARTEFACT)
    model = Place("model", marker=MODEL)
    report = Place("report", marker=ARTEFACT)
    statistics = Place("statistics", shared=True)
    checkpoints = Place("checkpoints")
    evaluation = Place("evaluation")
    logs = Place("logs")
    tb = Place("tb")
    variants = Place(VARIANTS)
    finetune = Place(FINETUNE, shared=True)

    def finetuned(self, name: str) -> RunDirectory:
        """The directory in which `finetune` makes one model; it shares the data and the stop file of the run."""
        return RunDirectory(self.finetune / name, self.parent or self.path)

    def finetuned_here(self) -> list[RunDirectory]:
        """The directories of the fine-tuned models that exist; a variant shares its run's."""
        places = sorted(self.finetune.iterdir()) if self.parent is None and self.finetune.is_dir() else []
        return [self.finetuned(place.name) for place in places if place.is_dir()]

    @property
    def stop_files(self) -> tuple[Path, ...]:
        """Touch one to stop collect (at its next saved state) or a training job (with a complete checkpoint), exit
        status 75: RUN/stop, and for a variant and a model of `finetune` the run's too."""
        return tuple(folder / "stop" for folder in (self.path, self.parent) if folder is not None)

    @property
    def outputs(self) -> list[Path]:
        """Everything that stages write."""
        own = [name for name, place in PLACES.items() if self.parent is None or not place.shared]
        return [self.path / name for name in (*own, "submitted", *UNMARKED)]

    def variant(self, name: str, config_text: str | None = None) -> RunDirectory:
        return RunDirectory(self.variants / name, self.path, config_text)

    @classmethod
    def at(cls, path: Path, config_text: str | None = None) -> RunDirectory:
        """The run directory at ``path``; a variant's is ``RUN/variants/NAME`` where ``RUN`` is a run."""
        for place in (path, Path(os.path.abspath(path)), Path(os.path.realpath(path))):
            above = place.parents[:2]
            if len(above) == 2 and above[0].name == VARIANTS and cls(above[1]).is_marked():
                return cls(path, above[1], config_text)
        return cls(path, None, config_text)

    def is_marked(self) -> bool:
        """Whether this directory is a run's (or a study's) of ours."""
        return (self.path / MARKER).is_file()

    def mark(self) -> bool:
        """Make the directory where it is missing and mark it as a run's (which :meth:`require_ours` has allowed);
        whether it had no marker before."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            fresh = not self.is_marked()
            if fresh:
                write_json(self.path / MARKER, {"kind": "run", "version": 1})
        except OSError as error:
            raise unwritable(self.path, error) from None
        return fresh

    def require_ours(self) -> None:
        """Refuse a directory that is not a run's, and one in which a stage would replace what is not ours.

        Raises:
            UserError: names the place. Nothing was written.
        """
        if not self.path.is_dir():
            return
        strangers = sorted({path.name for path in self.path.iterdir()}.difference(UNMARKED))
        if strangers and not self.is_marked():
            raise UserError(
                f"this directory is not a run's: it holds {strangers[0]!r}, and no {MARKER}",
                str(self.path),
                "choose a --run-dir that is new, empty, or an earlier run's",
            )
        for name, place in PLACES.items():
            if place.marker:
                require_directory(self.path / name, place.marker)

    def clear_leftovers(self) -> None:
        """Delete what killed writers left in folders of this run; a parent's belong to whoever holds its lock."""
        if not self.is_marked():
            return
        try:
            for folder in ("", "statistics", "checkpoints", "evaluation", "logs"):
                if folder != "statistics" or self.parent is None:
                    remove_leftovers(self.path / folder)
            for place in self.finetuned_here():
                place.clear_leftovers()
        except OSError as error:
            raise unwritable(self.path, error) from None

    def store_config(self) -> None:
        """Write config.yaml. A stage does it when its input has proved right, so that a refused one changes nothing."""
        self.mark()
        if self.config_text is None:
            return
        try:
            if not self.config.is_file() or self.config.read_text(encoding="utf-8") != self.config_text:
                write_text(self.config, self.config_text)
        except OSError as error:
            raise unwritable(self.path, error) from None


PLACES = {place.name: place for place in vars(RunDirectory).values() if isinstance(place, Place)}


def run_path(text: str) -> Path:
    """The run directory that a user names; what no command line, log or file could name again is refused."""
    if not text.strip() or text.startswith("-") or not text.isprintable():
        raise UserError(f"{text!r} names no run directory", "--run-dir", "name one (`--run-dir .` is this directory)")
    return Path(text)


def unwritable(path: Path, error: OSError) -> UserError:
    """The error of a run directory that is read-only, full, or not a directory."""
    return UserError(
        f"cannot write here ({error.strerror or error})",
        str(path),
        "free space or change permissions there, or choose another --run-dir",
    )


@contextlib.contextmanager
def locked(run: RunDirectory, *, replaces_inputs: bool = False) -> Iterator[list[int]]:
    """Hold the run's locks and yield their file descriptors.

    ``RUN/.lock`` is held by one job in the directory. ``RUN/.inputs.lock`` guards data and statistics: the jobs of
    variants, which read their run's, share it, and a job that may replace them (``replaces_inputs``: of the run itself)
    has it alone, so that neither a run nor its variants' calibrations change under a variant that trains.

    A child process that inherits the descriptors shares the locks, so they stay held until the last process of the job
    has gone, and vanish by themselves when all are killed.

    Raises:
        UserError: another process uses the run directory, or it cannot be written.
    """
    locks = [(run.path / LOCK_NAME, fcntl.LOCK_EX)]
    if run.parent is not None:
        locks.insert(0, (run.parent / INPUTS_LOCK_NAME, fcntl.LOCK_SH))
    elif replaces_inputs:
        locks.append((run.path / INPUTS_LOCK_NAME, fcntl.LOCK_EX))
    new_folders = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    run.require_ours()
    acquired: list[tuple[Path, int, bool]] = []
    marked = False
    try:
        for lock, operation in locks:
            acquired.append((lock, *_lock(lock, operation)))
        marked = run.mark()
        yield [descriptor for _, descriptor, _ in acquired]
    except UserError:  # the input was wrong: leave what was there before, which may be nothing at all
        if marked and {path.name for path in run.path.iterdir()} <= {MARKER, *UNMARKED}:
            (run.path / MARKER).unlink()
        for lock, descriptor, fresh in acquired:
            if fresh and _flock(descriptor, lock, fcntl.LOCK_EX):  # nobody shares it
                lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something was finished before
            for folder in new_folders:
                folder.rmdir()
        raise
    finally:
        for _, descriptor, _ in acquired:
            os.close(descriptor)


def _lock(path: Path, operation: int) -> tuple[int, bool]:
    """(descriptor of the locked file, whether the file is new); makes the folder."""
    folder = path.parent
    deadline = time.monotonic() + LOCK_RETRY_S  # the children of a killed job need a moment to go
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            fresh = not path.exists()
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(folder, error) from None
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            if _flock(descriptor, path, operation) and _is_at(descriptor, path):
                stack.pop_all()
                os.set_inheritable(descriptor, True)
                return descriptor, fresh
        # held by another, or removed by one whose input was refused
        if time.monotonic() > deadline:
            raise UserError(
                "another process is using this run directory",
                str(folder),
                "wait for it to end (or stop it), or choose another --run-dir",
            )
        time.sleep(0.1)


def _flock(descriptor: int, path: Path, operation: int) -> bool:
    """Take the lock if nobody has it; whether that went well."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise UserError(
            f"files cannot be locked here ({error.strerror})",
            str(path),
            "mount the file system with locks (Lustre: -o flock), or choose another --run-dir",
        ) from None
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:  # no such file
        return False
