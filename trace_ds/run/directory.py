"""The run directory: where every artefact of a run lives, what of it is ours, and the locks that keep jobs apart."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from trace_ds.errors import UserError
from trace_ds.run import ours
from trace_ds.run.files import remove_leftovers, write_text

LOCK_VARIABLE = "TRACE_DS_RUN_LOCK_FD"
LOCK_RETRY_S = 3.0
LOCK_NAME = ".lock"
INPUTS_LOCK_NAME = ".inputs.lock"  # of data and statistics: the jobs of variants share it
FINETUNE, VARIANTS = "finetune", "variants"
TRIALS, CALIBRATED = "trials", "calibrated"  # of a study's base model: trials/LOSS/METHOD/POINT, calibrated/NAME
SHARING = {VARIANTS: 0, CALIBRATED: 0, TRIALS: 2}  # folders of a run whose runs share its data, and how deep these lie
SIDES = ("forget", "retain", "alternative")
STAGE_LOGS = ("prepare", "finetune", "collect", "calibrate", "unlearn", "convert", "evaluate", "report")
STEP = re.compile(r"step_\d{6,}")
COMPARISONS = {  # of `trace-ds bench`
    "study.json": ours.is_described("recipe", "comparisons"),
    "bench.json": ours.is_described("recipe", "outcomes"),
}
# What may stand in a run directory, beside its folders, before a stage has left anything with a mark.
UNMARKED = (
    r"\.lock|\.inputs\.lock|corpora\.lock|stop|submitted|config\.yaml|fetched\.json|plan\.json|seed_\d+|scores|"
    r"trials|calibrated"
)


@dataclass(frozen=True)
class Place:
    """Something that stages make in a run directory; of a run, its path.

    Attributes:
        shared: a variant has that of its run.
        owner: of a directory that is replaced as a whole: the mark that it must carry.
        is_ours: of a file that is replaced: whether we wrote it.
        makes: of a folder to which things are added (all others): their names.
    """

    name: str
    shared: bool = False
    owner: ours.Owner | None = None
    is_ours: Callable[[Path], bool] | None = None
    makes: str = ""

    def __get__(self, run: RunDirectory, kind: type[RunDirectory]) -> Path:
        return ((self.shared and run.parent) or run.path) / self.name

    @property
    def is_folder(self) -> bool:
        return self.owner is None and self.is_ours is None


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run. A variant (``parent`` set) shares the parent's data and statistics.

    Attributes:
        config_text: the resolved configuration, for config.yaml; None: leave that file alone.
    """

    path: Path
    parent: Path | None = None
    config_text: str | None = field(default=None, repr=False, compare=False)

    config = Place("config.yaml", is_ours=ours.is_stored_config)
    fetched = Place("fetched.json", shared=True, is_ours=ours.is_described("models", "data", "tasks"))
    curve = Place("curve.json", is_ours=ours.is_curve)
    data = Place("data", shared=True, owner=ours.artefact("data"))
    calibration = Place("calibration", owner=ours.artefact("calibration"))
    export = Place("export", owner=ours.artefact("export"))
    model = Place("model", owner=ours.converted_model)
    report = Place("report", owner=ours.artefact("report"))
    statistics = Place("statistics", shared=True, makes="|".join(SIDES))
    checkpoints = Place("checkpoints", makes=rf"{STEP.pattern}|latest|universal|zero_to_fp32\.py")
    evaluation = Place("evaluation", makes=rf"{STEP.pattern}|[A-Za-z0-9][A-Za-z0-9._-]*\.json")
    logs = Place("logs", makes=r"[a-z]+\.jsonl")
    tb = Place("tb")
    variants = Place(VARIANTS)
    finetune = Place(FINETUNE, shared=True)

    def finetuned(self, name: str) -> RunDirectory:
        """Where `finetune` makes a model: a directory of its own, with the data and the stop file of the run."""
        return RunDirectory(self.finetune / name, self.parent or self.path)

    def finetuned_here(self) -> list[RunDirectory]:
        """Those that there are, of a run (a variant shares its run's)."""
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
        return [self.path / name for name in (*self._own(), "submitted", "stop", LOCK_NAME, INPUTS_LOCK_NAME)]

    def _own(self) -> dict[str, Place]:
        """The places that a run has, or a variant by itself."""
        return {name: place for name, place in PLACES.items() if self.parent is None or not place.shared}

    def variant(self, name: str, config_text: str | None = None) -> RunDirectory:
        return RunDirectory(self.variants / name, self.path, config_text)

    @classmethod
    def at(cls, path: Path, config_text: str | None = None) -> RunDirectory:
        """The run directory at ``path``; a variant's is ``RUN/variants/NAME`` where ``RUN`` is a run, and so on
        (:data:`SHARING`)."""
        for place in (path, Path(os.path.abspath(path)), Path(os.path.realpath(path))):
            for folder, depth in SHARING.items():
                above = place.parents[depth : depth + 2]
                if len(above) == 2 and above[0].name == folder and cls(above[1]).is_marked():
                    return cls(path, above[1], config_text)
        return cls(path, None, config_text)

    def create(self, config_text: str) -> None:
        """Make the directory (or say why not), clear what killed writers left, store the resolved configuration."""
        self.require_ours()
        self.clear_leftovers()
        replace(self, config_text=config_text).store_config()

    def owners(self) -> dict[Path, ours.Owner]:
        """What stages replace or delete as a whole, with the mark that it must carry."""
        found = {self.path / name: place.owner for name, place in self._own().items() if place.owner is not None}
        for side in SIDES if self.parent is None else ():
            found[self.statistics / side] = ours.artefact("statistics")
            found[self.statistics / f"{side}.partial"] = ours.partial_statistics
        steps = sorted(self.checkpoints.iterdir()) if self.checkpoints.is_dir() else []
        return found | {step: ours.checkpoint for step in steps if STEP.fullmatch(step.name)}

    def is_marked(self) -> bool:
        """Whether a stage of ours has left something here that only a stage of ours leaves."""
        if self.config.is_file() and self.config.stat().st_size and ours.is_stored_config(self.config):
            return True
        owners = self.owners() | {self.path / "corpora": ours.artefact("demo_corpora")}
        if any(path.is_dir() and owner(path) is not None and ours.names_below(path) for path, owner in owners.items()):
            return True
        return any(is_ours(self.path / name) for name, is_ours in COMPARISONS.items())

    def require_ours(self, results: Iterable[str] = ()) -> None:
        """Refuse a directory that is not a run's, and one in which a stage would replace what is not ours.

        Args:
            results: names of models, whose scores are about to be written.

        Raises:
            UserError: names the place. Nothing was written.
        """
        if not self.path.is_dir():
            return
        marked = self.is_marked()
        for path, owner in self.owners().items():
            if owner is ours.checkpoint and marked and not (path / ours.MANIFEST).is_file():
                continue  # damaged: a job names it and sets it aside
            ours.require_directory(path, owner)
        for place in PLACES.values():
            path = place.__get__(self, RunDirectory)
            if place.is_ours is not None:
                ours.require_file(path, place.is_ours)
            elif place.is_folder:
                ours.require_folders(path)
        ours.require_file(self.checkpoints / "latest", ours.is_pointer)
        for stage in STAGE_LOGS:
            ours.require_file(self.logs / f"{stage}.jsonl", ours.is_log)
        for name in results:
            ours.require_file(self.evaluation / f"{name}.json", ours.is_result)
        for made in self.finetuned_here():
            made.require_ours()
        for path in self.stop_files:
            if os.path.lexists(path) and not path.is_file():
                raise UserError("this is no file, and a file of that name stops a job", str(path), ours.FIX)
        names = sorted(path.name for path in self.path.iterdir())
        usual = re.compile("|".join([UNMARKED, *(name for name, place in PLACES.items() if place.is_folder)]))
        strangers = [n for n in names if not usual.fullmatch(n) and not ours.leftover(n, f"{MADE_IN['']}|corpora")]
        if strangers and not marked:
            raise UserError(
                f"this directory is not a run's: it holds {strangers[0]!r}, and nothing that trace_ds made",
                str(self.path),
                "choose a --run-dir that is new, empty, or an earlier run's",
            )

    def clear_leftovers(self) -> None:
        """Delete what killed writers left in folders of this run; a parent's belong to whoever holds its lock."""
        try:
            for folder, made in MADE_IN.items():
                if folder != "statistics" or self.parent is None:
                    remove_leftovers(self.path / folder, made)
            for place in self.finetuned_here():
                place.clear_leftovers()
        except OSError as error:
            raise unwritable(self.path, error) from None

    def store_config(self) -> None:
        """Write config.yaml. A stage does it when its input has proved right, so that a refused one changes nothing."""
        if self.config_text is None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.config.is_file() or self.config.read_text(encoding="utf-8") != self.config_text:
                ours.require_file(self.config, ours.is_stored_config)
                write_text(self.config, self.config_text)
        except OSError as error:
            raise unwritable(self.path, error) from None


PLACES = {place.name: place for place in vars(RunDirectory).values() if isinstance(place, Place)}
# What stages make and killed writers leave halves of, by the folder they make it in ("" is the run directory).
MADE_IN = {name: place.makes for name, place in PLACES.items() if place.makes}
_WHOLE = [name for name, place in PLACES.items() if not place.is_folder]
MADE_IN[""] = "|".join(map(re.escape, [*_WHOLE, *COMPARISONS, "plan.json", "frontier.csv"]))


def run_path(text: str) -> Path:
    """The run directory that a user names; what no command line, log or file could name again is refused."""
    shown = text.encode("utf-8", "backslashreplace").decode()
    if not text.strip():
        raise UserError("the run directory has no name", "--run-dir", "name one (`--run-dir .` is this directory)")
    if text.startswith("-"):
        raise UserError(f"{shown!r} looks like an option", "--run-dir", f"write ./{shown} if that is its name")
    try:
        os.path.abspath(text).encode()
    except UnicodeEncodeError:
        raise UserError(
            f"the path is not UTF-8: {shown}", "--run-dir", "choose a directory with another name"
        ) from None
    if any(character in text for character in "\0\n\r"):
        raise UserError(f"the path {text!r} has a line break in it", "--run-dir", "choose another name")
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

    A child process that inherits the descriptors (:data:`LOCK_VARIABLE` names them) shares the locks, so they stay held
    until the last process of the job has gone, and vanish by themselves when all are killed.

    Raises:
        UserError: another process uses the run directory, or it cannot be written.
    """
    numbers, _, path = os.environ.get(LOCK_VARIABLE, "").partition(":")
    inherited = [int(number) for number in numbers.split(",") if number]
    if inherited and path == os.path.realpath(run.path):
        yield inherited
        return
    wanted = [(run.path / LOCK_NAME, fcntl.LOCK_EX)]
    if run.parent is not None:
        if not inherited or path != os.path.realpath(run.parent):  # else the run that started this job has it alone
            wanted.insert(0, (run.parent / INPUTS_LOCK_NAME, fcntl.LOCK_SH))
    elif replaces_inputs:
        wanted.append((run.path / INPUTS_LOCK_NAME, fcntl.LOCK_EX))
    made = [folder for folder in (run.path, *run.path.parents) if not folder.exists()]
    held: list[tuple[Path, int, bool]] = []
    try:
        for lock, operation in wanted:
            held.append((lock, *_lock(lock, operation)))
        yield [descriptor for _, descriptor, _ in held]
    except UserError:  # the input was wrong: leave what was there before, which may be nothing at all
        for lock, descriptor, fresh in held:
            if fresh and _flock(descriptor, lock, fcntl.LOCK_EX):  # nobody shares it
                lock.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty: something was finished before
            for folder in made:
                folder.rmdir()
        raise
    finally:
        for _, descriptor, _ in held:
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
    except FileNotFoundError:
        return False


def lock_environment(run: RunDirectory, descriptors: Iterable[int]) -> dict[str, str]:
    """The environment variable that hands held locks to a child started with ``pass_fds=descriptors``."""
    return {LOCK_VARIABLE: f"{','.join(map(str, descriptors))}:{os.path.realpath(run.path)}"}
