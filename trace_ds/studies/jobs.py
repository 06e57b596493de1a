"""The jobs of a study: ordinary stages in ordinary run directories, each in whatever process is free.

    STUDY/seed_N/                              the base model's run: data/, statistics/, evaluation/{original,gold}.json
    STUDY/seed_N/corpora, models/              its inputs, as in a demo (``bench.regime``)
    STUDY/seed_N/calibrated/HASH/calibration/  one for every calibration that a method asks for
    STUDY/seed_N/trials/LOSS/METHOD/POINT/     a job of ``unlearn``, which leaves curve.json

They come in phases: ``bases``, ``calibrations``, ``screening`` (where it is asked for), ``runs``. A job is done when
its stages say so; a killed study goes on where it was.
"""

from __future__ import annotations

import functools
import gc
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

from trace_ds.config.load import dump_yaml, load_config, with_changes
from trace_ds.config.schema import Config
from trace_ds.errors import JobFailed, StopRequested, UserError
from trace_ds.models.host_memory import keep_freed_memory
from trace_ds.parallel.environment import accelerator_names
from trace_ds.parallel.launch import die_with_parent, parent_of_this
from trace_ds.run.directory import CALIBRATED, TRIALS, RunDirectory
from trace_ds.run.files import canonical_json, sha256_text
from trace_ds.run.foreign import read_object
from trace_ds.stages.pipeline import Request, is_done, run_verb
from trace_ds.studies import run_list
from trace_ds.studies.analysis import Curve, chosen_points, curve_of, metric_of

GOLD = "gold"
Asked = tuple[tuple[str, ...], Path, tuple[str, ...]]  # of a study: recipe, directory, overrides
# Of the configuration of a base model's run: what has scores there is the original and the gold model.
BASE = {
    "variants": {},
    "evaluation.references_only": True,
    "evaluation.drift": False,
    "evaluation.relearning": None,
    "evaluation.expert_forcing": False,
}


@dataclass(frozen=True)
class Job:
    """Stages to run, one after the other; ``begin`` makes what they need of the study first, unless ``has_begun``.

    The run of its ``request`` does not store the configuration (to write many out takes seconds): :meth:`begun` does.
    """

    request: Request
    verbs: tuple[str, ...]
    begin: Callable[[], None] = lambda: None
    has_begun: Callable[[], bool] = lambda: True

    def is_done(self) -> bool:
        from trace_ds.corpora.sources import only_looking

        ep = self.request.config.distributed.ep  # a number of processes that it divides
        try:
            with only_looking():
                located = self.request.located("evaluate", download=False)
                return self.has_begun() and all(is_done(verb, located, ep, verify=False) for verb in self.verbs)
        except UserError:
            return False

    def begun(self) -> Request:
        """What to run, when all that it needs of the study is there."""
        self.begin()
        return replace(self.request, run=replace(self.request.run, config_text=dump_yaml(self.request.written)))

    def do(self) -> None:
        """Raises: UserError, JobFailed, StopRequested."""
        request = self.begun()
        for verb in self.verbs:
            status = run_verb(verb, request)
            if status == StopRequested.exit_status:
                raise StopRequested(f"{self.request.run.path}: stopped on request; run the same command again to go on")
            if status:
                raise JobFailed(
                    f"{verb} in {self.request.run.path} ended with exit status {status}: see the study's logs"
                )


class Study:
    """The jobs of a study, in the order in which they should be done."""

    def __init__(self, recipe: Sequence[str], directory: Path, overrides: Sequence[str]) -> None:
        self.asked = tuple(recipe), directory, tuple(overrides)
        self.directory = directory
        self.config = self._seed_config(None)
        self.bench = run_list.require_bench(self.config, self.config.name)

    @property
    def phases(self) -> list[str]:
        return ["bases", "calibrations", *(["screening"] if self.bench.screening else []), "runs"]

    @property
    def seeds(self) -> list[int]:
        """Of all base models."""
        return [*(self.bench.screening or []), *self.bench.seeds]

    @property
    def is_warm(self) -> bool:
        """Whether every job is one process, so that a worker can do many without starting one."""
        return self.config.distributed.nproc == self.config.evaluation.nproc == 1

    def seed_directory(self, seed: int) -> Path:
        return self.directory / f"seed_{seed}"

    def _seed_config(self, seed: int | None) -> Config:
        """The configuration of one base model (``${run_dir}`` is its directory)."""
        recipe, _, overrides = self.asked
        seeding = [] if seed is None else [f"seed={seed}"]
        config, _ = load_config(recipe, [*overrides, *seeding], self.seed_directory(seed or 0))
        ranks = {"distributed.nproc": config.distributed.nproc or 1}
        return with_changes(config, ranks, "bench")

    @functools.cached_property
    def bases(self) -> dict[int, Request]:
        """The runs of the base models, by seed."""
        found = {}
        for seed in self.seeds:
            config = self._seed_config(seed)
            models = {name: path for name, path in config.evaluation.models.items() if name == GOLD}
            config = with_changes(config, BASE | {"evaluation.models": models}, "bench")
            found[seed] = Request(config, RunDirectory(self.seed_directory(seed)))
        return found

    def jobs(self, phase: str) -> list[Job]:
        """Raises: UserError: the runs are chosen by a screening that has not ended."""
        if phase == "bases":
            verbs = ("prepare", "collect", "evaluate")
            return [
                Job(base, verbs, partial(self._make_inputs, seed), partial(self._has_inputs, seed))
                for seed, base in self.bases.items()
            ]
        if phase == "calibrations":  # of the confirmation too: whatever is chosen is a point of the grid
            wanted = run_list.grid_trials(self.bench, self.seeds)
            requests = {found.run.path: found for found in map(self._calibration, wanted)}
            return [Job(request, ("calibrate",)) for request in requests.values()]
        return [
            Job(self._trial(trial), ("unlearn",), partial(self._link, trial), partial(self._is_linked, trial))
            for trial in self.trials(phase)
        ]

    def trials(self, phase: str) -> list[run_list.Trial]:
        """Those of a phase; :class:`UserError` as :meth:`jobs`."""
        if self.bench.screening is None or phase == "screening":
            return run_list.grid_trials(self.bench, self.bench.screening or self.bench.seeds)
        points = chosen_points(self.config, self.curves("screening", self.target()))
        return run_list.trials_at(self.bench, points)

    def trial_directory(self, trial: run_list.Trial) -> Path:
        return self.seed_directory(trial.seed) / TRIALS / trial.name

    def _trial(self, trial: run_list.Trial) -> Request:
        base = self.bases[trial.seed]
        config = run_list.trial_config(base.written, trial)
        return Request(config, RunDirectory(self.trial_directory(trial), base.run.path))

    def _calibration(self, trial: run_list.Trial) -> Request:
        """The run that makes a trial's calibration, which others may share."""
        base, request = self.bases[trial.seed], self._trial(trial)
        settings: list[Any] = [request.written.calibration.model_dump(mode="json")]
        if request.written.calibration.detection.layers == "trained":  # what they are hangs on the losses
            unlearning = request.written.unlearning
            settings.append([unlearning.forget_loss, unlearning.retain_term, unlearning.rmu.layer])
        name = sha256_text(canonical_json(settings))[:12]
        return Request(request.written, RunDirectory(base.run.path / CALIBRATED / name, base.run.path))

    def _calibration_link(self, trial: run_list.Trial) -> tuple[Path, str]:
        """Where a trial's calibration is looked for, and where it lies, from there: a study can be moved."""
        link = self._trial(trial).run.calibration
        return link, os.path.relpath(self._calibration(trial).run.calibration, link.parent)

    def _is_linked(self, trial: run_list.Trial) -> bool:
        link, target = self._calibration_link(trial)
        return link.is_symlink() and str(link.readlink()) == target

    def _link(self, trial: run_list.Trial) -> None:
        link, target = self._calibration_link(trial)
        if not self._is_linked(trial):
            link.unlink(missing_ok=True)
            self._trial(trial).run.mark()
            link.symlink_to(target)

    def _make_inputs(self, seed: int) -> None:
        if self.bench.regime is not None:
            from trace_ds.demo.run import prepare_inputs, remove_input_leftovers

            directory = self.seed_directory(seed)
            RunDirectory(directory).mark()
            remove_input_leftovers(directory)
            prepare_inputs(directory, seed, self.bench.regime)

    def _has_inputs(self, seed: int) -> bool:
        from trace_ds.demo.run import has_corpora

        return self.bench.regime is None or has_corpora(self.seed_directory(seed), seed, self.bench.regime)

    # ------------------------------------------------------------------ results

    def references(self, seed: int) -> dict[str, dict[str, Any]]:
        """Scores of the original and, where there is one, the gold model (as :func:`metric_of` reads them)."""
        folder, models = self.bases[seed].run.evaluation, self.bases[seed].written.evaluation.models
        return {name: scores_of(read_result(folder / f"{name}.json")) for name in ("original", *models)}

    def target(self) -> float:
        """The mean of the gold models of all seeds, without gold models chance, plus the margin.

        The mean (our decision): no gold model ever saw what is to be forgotten, so they differ by the luck of a few
        hundred questions only, and a seed whose gold model was unlucky would ask for less than chance.
        :func:`run_list.check` has seen that the metric has a chance level where there is no gold model.
        """
        from trace_ds.evaluation.metrics import METRICS

        golds = [models[GOLD] for models in map(self.references, self.seeds) if GOLD in models]
        if golds:
            return math.fsum(metric_of(gold, self.bench.forget) for gold in golds) / len(golds) + self.bench.margin
        chance = METRICS[self.bench.forget.split()[1]].chance
        assert chance is not None
        return chance + self.bench.margin

    def results(self, phase: str) -> Iterator[tuple[run_list.Trial, dict[str, Any]]]:
        """The curve.json of each trial of a phase, its points as :func:`metric_of` reads them."""
        for trial in self.trials(phase):
            found = read_result(self.trial_directory(trial) / "curve.json")
            yield trial, found | {"curve": [{"step": point["step"], **scores_of(point)} for point in found["curve"]]}

    def curves(self, phase: str, target: float) -> list[Curve]:
        forget, utility = self.bench.forget, self.bench.utility
        return [curve_of(trial, result, forget, utility, target) for trial, result in self.results(phase)]


def read_result(path: Path) -> dict[str, Any]:
    return read_object(path, "a result of the study", "run the same command again: it makes what is missing")


def scores_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """``{"scores": {"TASK METRIC": value}, "by_source": …}`` of an evaluation or a point of a curve."""
    scores = {f"{score['task']} {score['metric']}": score["value"] for score in result["scores"]}
    return {"scores": scores, "by_source": result["by_source"]}


def begin(numbers: SimpleQueue[int], ranks: int, logs: Path) -> None:
    """In a new process of the pool: nobody's rank, with its share of the GPUs, its own log, and its parent's end."""
    die_with_parent(parent_of_this())
    number = numbers.get()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ |= devices_of(number, ranks, os.environ)
    keep_freed_memory()
    with (logs / f"worker_{number}.log").open("wb") as log:
        for stream in (1, 2):
            os.dup2(log.fileno(), stream)


def devices_of(number: int, ranks: int, inherited: Mapping[str, str], devices: Path = Path("/dev")) -> dict[str, str]:
    """One thread a process, and as many of the GPUs that may be used as a job has ranks, for a worker."""
    names = accelerator_names(inherited, devices)
    chosen = [names[(number * ranks + rank) % len(names)] for rank in range(ranks)] if names else []
    return {"OMP_NUM_THREADS": "1", **({"CUDA_VISIBLE_DEVICES": ",".join(chosen)} if chosen else {})}


def do(asked: Asked, phase: str, number: int) -> None:
    """In a worker, do a job of a study."""
    _jobs_here(asked, phase)[number].do()
    gc.collect()


@functools.cache
def _jobs_here(asked: Asked, phase: str) -> list[Job]:
    study = Study(*asked)
    if study.is_warm:  # from now on this process is the one rank of every job
        from trace_ds.parallel.world import join

        join(study.config.distributed.threads, study.config.distributed.timeout_minutes)
    return study.jobs(phase)
