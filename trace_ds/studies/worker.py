"""The jobs of a study, each in whatever process is free.

A job is done when its result is there, so a killed study goes on where it was.

    STUDY/seed_N/corpora, models/, data/, statistics/        as in a demo
    STUDY/seed_N/calibrated/HASH/calibration/                one for every calibration that a method asks for
    STUDY/seed_N/scores/{original,gold}.json
    STUDY/seed_N/trials/LOSS/METHOD/POINT.json
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.load import dump_yaml, load_config
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.parallel.environment import accelerator_count, accelerator_names
from trace_ds.parallel.launch import die_with_parent, parent_of_this
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import canonical_json, sha256_file, sha256_text, write_json
from trace_ds.run.foreign import read_object
from trace_ds.stages.by_name import with_cached
from trace_ds.studies import run_list

if TYPE_CHECKING:
    from trace_ds.evaluation.items import Task
    from trace_ds.parallel.world import World

PATH_KEYS = ("path", "tokenizer", "examples", "holdout")  # of a configuration; a null one stays null
FORMAT = 1  # raise it when what a run computes changes: old results are then computed anew
REFERENCES = ("original", "gold")


@dataclass(frozen=True)
class StudyJob:
    """``result`` is the file that says it is done; the reference models' jobs are done before the trials'."""

    result: Path
    make: Callable[[], dict[str, Any]]
    identity: str
    is_reference: bool = False

    def is_done(self) -> bool:
        try:
            return bool(read_object(self.result, "the result", "")["identity"] == self.identity)
        except (UserError, KeyError):
            return False

    def do(self) -> None:
        self.result.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result, {"identity": self.identity, **self.make()})


class Study:
    """The jobs of a study, in the order in which they should be done."""

    def __init__(self, recipe: str | Sequence[str], directory: Path, overrides: Sequence[str]) -> None:
        self._recipe, self._directory, self._overrides = recipe, directory, list(overrides)
        self.asked = recipe if isinstance(recipe, str) else tuple(recipe), directory, tuple(overrides)
        self.config = self.seed_config(None)
        self.bench = run_list.require_bench(self.config, self.config.name)

    def seed_directory(self, seed: int) -> Path:
        return self._directory / f"seed_{seed}"

    def seed_config(self, seed: int | None) -> Config:
        """The configuration of one base model (``${run_dir}`` is its directory)."""
        seeding = [] if seed is None else [f"seed={seed}"]
        config, _ = load_config(self._recipe, [*self._overrides, *seeding], self.seed_directory(seed or 0))
        # a study of the demo's regimes makes its models in directories that are not there yet
        return with_cached(config) if config.bench is None or config.bench.regime is None else config

    def results(self) -> dict[run_list.Trial, Path]:
        """Where the result of each trial is, or will be."""
        return {t: self.seed_directory(t.seed) / "trials" / t.name for t in run_list.trials_of(self.bench)}

    def reference(self, seed: int, name: str) -> Path:
        return self.seed_directory(seed) / "scores" / f"{name}.json"

    def reference_names(self) -> list[str]:
        return [name for name in REFERENCES if name == "original" or name in self.config.evaluation.models]

    def jobs(self, world: World | None) -> list[StudyJob]:
        """All jobs; without a world they can be counted and checked, not done."""
        references: list[StudyJob] = []
        trials: list[StudyJob] = []
        digest = functools.cache(content_of)  # seeds may share files
        for seed in self.bench.seeds:
            config = self.seed_config(seed)
            work = _Work(config, self.bench.regime, self.seed_directory(seed), world, digest)
            references += [
                StudyJob(self.reference(seed, name), partial(work.reference, name), work.identity, True)
                for name in self.reference_names()
            ]
            for trial in run_list.trials_of(self.bench):
                if trial.seed == seed:
                    changed = run_list.trial_config(config, trial)
                    asked = {"calibration": changed.calibration, "unlearning": changed.unlearning}
                    identity = sha256_text(
                        canonical_json(
                            {
                                "work": work.identity,
                                "scored": [self.bench.score_every, self.bench.score_at_end],
                                **{name: section.model_dump(mode="json") for name, section in asked.items()},
                            }
                        )
                    )
                    result = self.seed_directory(seed) / "trials" / trial.name
                    trials.append(StudyJob(result, partial(work.trial, trial, changed), identity))
        return [*references, *trials]


@functools.cache
def made_with() -> dict[str, str]:
    """What results must have in common to be compared: the kind of device, and the version of torch."""
    return {"device": "gpu" if accelerator_count() else "cpu", "torch": importlib.metadata.version("torch")}


def content_of(path: str) -> str:
    """SHA-256 over a model directory with its tokenizer, or over a file; the path itself when nothing is there.

    (What misses it says so better than an identity could.)
    """
    place = Path(path)
    if place.is_file():
        return sha256_file(place)
    if not place.is_dir():
        return path
    from trace_ds.corpora.tokenizer import TOKENIZER_FILES
    from trace_ds.tensors.model_files import model_fingerprint

    tokenizer = [sha256_file(place / name) for name in TOKENIZER_FILES if (place / name).is_file()]
    weights = model_fingerprint(place) if (place / "config.json").is_file() else None
    return sha256_text(canonical_json([weights, tokenizer]))


def _with_paths(value: Any, named: Callable[[str], str], is_path: bool = False) -> Any:
    """A dumped configuration in which every path is replaced by ``named`` of it."""
    if isinstance(value, dict):
        return {
            key: {name: named(path) for name, path in inner.items()}
            if key == "models"
            else _with_paths(inner, named, key in PATH_KEYS)
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [_with_paths(inner, named) for inner in value]
    return named(value) if is_path and value else value


class _Work:
    """What is done for the base model of one seed."""

    def __init__(
        self, config: Config, regime: Any, directory: Path, world: World | None, digest: Callable[[str], str]
    ) -> None:
        from trace_ds.demo.run import input_versions

        self._config, self._regime, self._directory, self._world = config, regime, directory, world
        self._tasks: list[Task] | None = None
        asked = config.model_dump(mode="json", include={"seed", "model", "data", "statistics", "evaluation"})

        def named(path: str) -> str:
            inside = Path(path).absolute().is_relative_to(directory.absolute())
            made_here = regime is not None and inside  # a function of the seed and the regime, and not made yet
            return str(Path(path).absolute().relative_to(directory.absolute())) if made_here else digest(path)

        self.identity = sha256_text(
            canonical_json(
                {
                    "format": FORMAT,
                    "made_with": made_with(),
                    "regime": regime and [regime, input_versions()],  # what the demo makes the corpora of
                    **_with_paths(asked, named),
                }
            )
        )

    def reference(self, name: str) -> dict[str, Any]:
        """Make a reference model (when it is the demo's) and score it; the original also gets its statistics."""
        from trace_ds.studies import trial

        if self._regime is not None:
            from trace_ds.demo.run import prepare_inputs

            with _holding(self._directory / "corpora.lock"):
                prepare_inputs(self._directory, self._config.seed, self._regime, ())
            prepare_inputs(self._directory, self._config.seed, self._regime, (name,))
        if name == "original":
            self._statistics()
        path = self._config.model.path if name == "original" else self._config.evaluation.models[name]
        return trial.score_directory(self._config, self.tasks(), Path(path))

    def _statistics(self) -> None:
        from trace_ds.stages.collect import collect
        from trace_ds.stages.prepare import prepare

        assert self._world is not None
        run = RunDirectory(self._directory)
        run.create(dump_yaml(self._config))
        prepare(self._config, run)
        collect(self._config, run, self._world)

    def trial(self, asked: run_list.Trial, config: Config) -> dict[str, Any]:
        from trace_ds.stages.calibrate import calibrate
        from trace_ds.stages.unlearn import check_unlearn
        from trace_ds.studies import trial

        assert self._world is not None
        settings: list[Any] = [config.calibration.model_dump(mode="json")]
        if config.calibration.detection.layers == "trained":  # what they are hangs on the losses
            unlearning = config.unlearning
            settings.append([unlearning.forget_loss, unlearning.retain_term, unlearning.rmu.layer])
        name = sha256_text(canonical_json(settings if settings[1:] else settings[0]))[:12]
        run = RunDirectory(self._directory / "calibrated" / name, self._directory)
        with _holding(self._directory / "calibrated" / f"{name}.lock"):
            run.create(dump_yaml(config))
            calibrate(config, run)
        job = check_unlearn(config, run, 1, verify=False)
        bench = run_list.require_bench(self._config, "bench")
        done = trial.run(config, job, self._world, self.tasks(), bench)
        point = [list(pair) for pair in asked.point]
        return {
            "loss": asked.loss,
            "method": asked.method,
            "point": point,
            "seed": asked.seed,
            "job": job.identity,
        } | done

    def tasks(self) -> list[Task]:
        if self._tasks is None:
            from trace_ds.evaluation.items import read_tasks

            self._tasks = read_tasks(self._config.evaluation.tasks)
        return self._tasks


@contextlib.contextmanager
def _holding(path: Path) -> Iterator[None]:
    """Hold the lock file: others who want the same made wait, and find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def begin(numbers: SimpleQueue[int], logs: Path) -> None:
    """In a new process of the pool: nobody's rank, with one of the GPUs, a log of its own, and its parent's end."""
    die_with_parent(parent_of_this())
    number = numbers.get()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= device_of(number, os.environ)
    with (logs / f"worker_{number}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def device_of(number: int, inherited: Mapping[str, str], devices: Path = Path("/dev")) -> dict[str, str]:
    """One thread, and one of the GPUs that may be used, for a worker."""
    accelerators = accelerator_names(inherited, devices)
    chosen = {"CUDA_VISIBLE_DEVICES": accelerators[number % len(accelerators)]} if accelerators else {}
    return {"OMP_NUM_THREADS": "1", **chosen}


def do(recipe: str | tuple[str, ...], directory: Path, overrides: tuple[str, ...], result: Path) -> None:
    """Do the job of a study whose result is not there."""
    began_s = time.monotonic()
    _jobs_here(recipe, directory, overrides)[result].do()
    print(f"{result}: {time.monotonic() - began_s:.1f} s", flush=True)


@functools.cache
def _jobs_here(recipe: str | tuple[str, ...], directory: Path, overrides: tuple[str, ...]) -> dict[Path, StudyJob]:
    """All jobs by their results, in the process group of this process alone."""
    from trace_ds.parallel.world import join

    study = Study(recipe, directory, overrides)
    world = join(study.config.distributed.threads, study.config.distributed.timeout_minutes)
    return {job.result: job for job in study.jobs(world)}
