"""``trace-ds submit RECIPE --study``: the jobs of a study as SLURM job arrays, one array a phase.

    trace-ds submit bench_full --study --nodes 2 --gpus-per-node 8 --run-dir /shared/studies/full

bases → calibrations (→ screening) → runs → analysis: each array starts when the one before is done, the analysis also
when a run failed; it says then what is missing. A task is an ordinary job of :mod:`trace_ds.studies.jobs`, with the
signals, requeueing and statuses of all scripts in ``slurm/``. The same command submits what is not done.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trace_ds.cluster.plan import plan as plan_run
from trace_ds.cluster.spec import ClusterSpec
from trace_ds.cluster.submit import Cluster, check_queue, environment, render, run_command
from trace_ds.config.load import load_config
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory, unwritable
from trace_ds.run.files import write_json
from trace_ds.stages.pipeline import Request
from trace_ds.studies import run_list
from trace_ds.studies.jobs import Study
from trace_ds.studies.study import check_ranks, checked, keep_plan, show, tell_plan, write_result
from trace_ds.terminal import duration

SCRIPT = "study.sh"
ANALYSIS = "analysis"
TASKS = 1000  # of one array: what SLURM allows unless its MaxArraySize says more
ONE_PROCESS = ("--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=0")
# Runs sbatch with what the site file exports and, in the place of {}, the options that it has under the name $1.
WITH_SITE = (
    '[[ ! -e $0 ]] || source "$0"; read -ra site <<<"${!1:-}"; words=(); '
    'for word in "${@:2}"; do [[ $word != {} ]] && words+=("$word") || words+=("${site[@]}"); done; exec "${words[@]}"'
)


@dataclass(frozen=True)
class Array:
    """Tasks of a phase; ``first`` is added to a task's number in SLURM."""

    phase: str
    tasks: list[int]
    first: int

    @property
    def is_one_process(self) -> bool:
        return self.phase in ("calibrations", ANALYSIS)

    @property
    def site(self) -> str:
        """The name of the site's options."""
        return "TRACE_DS_CPU_SBATCH" if self.is_one_process else "TRACE_DS_UNLEARN_SBATCH"

    def command(self, folder: Path, study: Path, cluster: Cluster, before: Sequence[str]) -> list[str]:
        """sbatch with {} where the site's options go, and the user's after them."""
        # the analysis looks at runs that failed too
        kind = "afterany" if self.phase == ANALYSIS else "afterok"
        waits = [f"--dependency={kind}:{':'.join(before)}", "--kill-on-invalid-dep=yes"] if before else []
        ours = ["--parsable", "--export=ALL", f"--job-name={self.phase}-{study.name}", *waits]
        ours += [f"--array={','.join(str(number - self.first) for number in self.tasks)}"]
        script = [str(folder / "slurm" / SCRIPT), str(folder / "config.yaml"), "--run-dir", str(study)]
        shape = ([*ONE_PROCESS], []) if self.is_one_process else ([], cluster.shape)  # which wins over the site's
        return ["sbatch", *ours, *shape[0], "{}", *shape[1], *shlex.split(cluster.options), *script]


def arrays(study: Study) -> Iterator[Array]:
    """What is left to do; the runs that a screening is still to choose are as many as they can be."""
    some = False
    for phase in study.phases:
        try:
            jobs = study.jobs(phase)
            todo = [number for number, job in enumerate(jobs) if some or not job.is_done()]
        except UserError:  # of a screening that has no results yet
            kinds = {loss: len(run_list.told_kinds(study.bench, loss)) for loss in study.bench.losses}
            todo = list(range(sum(kinds.values()) * len(study.bench.methods) * len(study.bench.seeds)))
        some = some or bool(todo)
        for first in range(0, max(todo, default=-1) + 1, TASKS):
            if tasks := [number for number in todo if first <= number < first + TASKS]:
                yield Array(phase, tasks, first)
    yield Array(ANALYSIS, [0], 0)


def submit_study(
    recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str], cluster: Cluster, *, dry_run: bool
) -> int:
    """Check the study, write its plan and ``STUDY/submitted/N``, submit the arrays and print their ids; returns 0.

    Raises:
        UserError: the study cannot be run so; jobs of it are still queued; SLURM refuses. Then nothing is left behind.
    """
    study = checked(recipe, run_dir, overrides)
    check_ranks(study, cluster.nodes * cluster.gpus_per_node, local=False)
    tell_plan(study)
    tell_cost(study, cluster)
    directory = Path(os.path.abspath(study.directory))
    folder = directory / "submitted" / str(1 + len(list(directory.glob("submitted/[0-9]*"))))
    # as it was written: each base model has a directory of its own
    config, _ = load_config(recipe, overrides, "${run_dir}")
    todo = list(arrays(study))
    if dry_run:
        for array in todo:
            print(shlex.join(array.command(folder, directory, cluster, [])).replace("'{}'", f"${array.site}"))
        print(f"# dry run: nothing submitted; the files would be in {folder}")
        return 0
    check_queue(directory)
    made = next(path for path in reversed([folder, *folder.parents]) if not path.exists())
    jobs: dict[str, str] = {}
    try:
        with tempfile.TemporaryDirectory() as temporary:
            render(Request(config, RunDirectory(directory)), Path(temporary) / "submission")
            shutil.copytree(Path(temporary) / "submission", folder)
        (directory / "logs").mkdir(exist_ok=True)
        (directory / "stop").unlink(missing_ok=True)
        before: dict[str, list[str]] = {}  # ids by phase
        for array in todo:
            waits = [ids for phase, ids in before.items() if phase != array.phase][-1:]
            command = array.command(folder, directory, cluster, waits[0] if waits else [])
            command = ["bash", "-c", WITH_SITE, str(folder / "slurm" / "site.env"), array.site, *command]
            variables = environment(folder, directory, cluster)
            variables |= {"TRACE_DS_PHASE": array.phase, "TRACE_DS_FIRST": str(array.first)}
            job = run_command(command, variables, Path.cwd()).strip().split(";")[0]
            before.setdefault(array.phase, []).append(job)
            jobs[f"{array.phase} ({len(array.tasks)} from {array.tasks[0]})"] = job
    except (UserError, OSError) as error:
        if jobs:
            run_command(["scancel", *jobs.values()], dict(os.environ), Path.cwd())
        shutil.rmtree(made, ignore_errors=True)
        if isinstance(error, OSError):
            raise unwritable(directory, error) from None
        raise
    keep_plan(study)
    write_json(folder / "jobs.json", {"jobs": jobs})
    for name, job in jobs.items():
        print(f"{job}: {name}")
    print(f"log files: {directory}/logs; what was submitted: {folder}")
    print(
        f"watch: squeue -j {','.join(jobs.values())}   start no further job: touch {shlex.quote(f'{directory}/stop')}"
    )
    return 0


def tell_cost(study: Study, cluster: Cluster) -> None:
    """Print what the cost model says of the runs, where it knows the model."""
    spec = ClusterSpec(cluster.nodes, cluster.gpus_per_node, gpu_memory_gb=cluster.gpu_memory_gb)
    trial = run_list.grid_trials(study.bench, study.seeds[:1])[0]
    if study.bench.regime is not None:
        return  # the demo's models: seconds
    try:
        planned = plan_run(run_list.trial_config(study.bases[trial.seed].config, trial), spec)
    except UserError as error:
        print(f"WARNING trace-ds plan: {error.what}")
        return
    for warning in planned.warnings:
        print(f"WARNING trace-ds plan: {warning}")
    if planned.unlearn.at_least_s is not None:
        about = duration(planned.unlearn.at_least_s)
        print(f"[bench] a run: about {about} on {spec.world} GPUs, without the scoring of its tasks")


def begin_task(recipe: Sequence[str], run_dir: Path | None, overrides: Sequence[str], phase: str, number: int) -> int:
    """What a task of an array does first: make ready, and say (to slurm/study.sh) which stages to run where.

    The analysis is done here. Nothing is printed for a job that is done, or that a screening has not asked for.
    """
    assert run_dir is not None
    study = Study(recipe, run_dir, overrides)
    if phase == ANALYSIS:
        show(study, write_result(study))
        return 0
    jobs = study.jobs(phase)
    if number >= len(jobs) or jobs[number].is_done():
        return 0
    run = jobs[number].begun().run
    run.create(str(run.config_text))
    print(f"# stages: {' '.join(jobs[number].verbs)}\n# config: {run.config}\n# run directory: {run.path}")
    return 0
