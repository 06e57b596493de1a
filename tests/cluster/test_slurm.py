"""The scripts in slurm/, submitted to a real two-node SLURM cluster that runs on this machine.

Shell logic (signals, requeueing, caps, statuses, dependencies) is tested with a stand-in for the command `trace-ds`
whose behaviour a test chooses per verb by files; the slow test at the end runs the real pipeline.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import JOB, Result, Server, warm_command
from safetensors.numpy import load_file
from slurm_cluster import SlurmCluster, find_daemon, slurm_cluster
from tiny import make_model, write_config

pytestmark = pytest.mark.skipif(
    find_daemon("slurmctld") is None,
    reason="SLURM is not installed (Debian: apt-get install slurm-wlm munge)",
)

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1")
STAGES = ["prepare", "collect", "calibrate", "unlearn", "convert", "evaluate", "report"]
ON_ALL_RANKS = ("collect", "unlearn", "evaluate")

# One line per process in RUN_DIR/calls. Per verb: FAKE/VERB.waits makes it run until the stop file appears and then
# exit 75, in the first run of the job only, rank 0 first and the others a second later each, as after an orderly stop;
# FAKE/VERB.hangs makes every rank but 0 wait for ever, as one whose collective lost a peer; FAKE/VERB.deaf makes it run
# until FAKE/VERB.release appears; FAKE/VERB.status is the exit status.
FAKE_COMMAND = """#!/usr/bin/env bash
set -euo pipefail
[[ -z ${RANK:-} ]]
# a dry run lists the stages and the variants
if [[ $1 == run ]]; then
  cat "$FAKE/dry_run" 2>/dev/null || :
  sed 's/.*/# variant &: {}/' "$FAKE/variants" 2>/dev/null || :
  exit 0
fi
verb=$1 run_dir=$4 rank=${SLURM_STEP_NUM_TASKS:+$SLURM_PROCID}
mkdir -p "$run_dir"
printf '%s|%s|%s|%s|%s|%s\\n' "$verb" "${rank:-bare}" "${SLURM_STEP_NUM_TASKS:-}" "${MASTER_ADDR:-}:${MASTER_PORT:-}" \
  "${SLURM_RESTART_COUNT:-0}" "$*" >>"$run_dir/calls"
[[ $verb != unlearn || ! -e $run_dir/stop ]] || exit 75
if [[ -e $FAKE/$verb.waits && -z ${SLURM_RESTART_COUNT:-} ]]; then
  until [[ -e $run_dir/stop ]]; do sleep 0.1; done
  sleep "${rank:-0}"
  exit 75
fi
if [[ -e $FAKE/$verb.deaf && -z ${SLURM_RESTART_COUNT:-} ]]; then
  until [[ -e $FAKE/$verb.release ]]; do sleep 0.1; done
fi
[[ ! -e $FAKE/$verb.hangs || ${rank:-0} == 0 ]] || sleep 600
[[ ! -e $FAKE/$verb.status ]] || exit "$(cat "$FAKE/$verb.status")"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster(cpus_per_node=80, gpus_per_node=10) as booted:  # a job of the scripts' own size, and others
        yield booted


class Workplace:
    """A folder to submit from, with the stand-in command first on PATH."""

    def __init__(self, cluster: SlurmCluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.run_dir = folder / "run"
        self.fake = folder / "fake"
        (folder / "bin").mkdir()
        self.fake.mkdir()
        command = folder / "bin" / "trace-ds"
        command.write_text(FAKE_COMMAND)
        command.chmod(0o755)
        (folder / "site.env").touch()
        self.env = {
            "PATH": f"{command.parent}:{os.environ['PATH']}",
            "FAKE": str(self.fake),
            "TRACE_DS_HOME": str(REPOSITORY),
            "TRACE_DS_SITE_ENV": str(folder / "site.env"),  # not the developer's own
            "RUN_DIR": str(self.run_dir),
        }

    def submit(self, *arguments: str, script: str = "unlearn_mixtral.sh", options: tuple[str, ...] = SMALL) -> int:
        path = REPOSITORY / "slurm" / script
        return self.cluster.submit(path, *arguments, options=options, env=self.env, cwd=self.folder)

    def shadow(self, name: str, body: str) -> None:
        """A program of ours before the real one (``$real``) on the jobs' PATH."""
        path = self.folder / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\nreal={shutil.which(name)}\n{body}\n")
        path.chmod(0o755)

    def calls(self) -> list[list[str]]:
        """One [verb, rank, ranks, master, restart, arguments] per process that ran."""
        path = self.run_dir / "calls"
        return [line.split("|") for line in path.read_text().splitlines()] if path.exists() else []

    def verbs(self, restart: int | None = None) -> list[str]:
        """Verbs in the order they ran, one entry per stage (of one restart of the job)."""
        return list(dict.fromkeys(c[0] for c in self.calls() if restart is None or c[4] == str(restart)))

    def signal_when_running(self, job: int, verb: str) -> None:
        self.cluster.wait_until(f"{verb} runs", lambda: verb in self.verbs(), 120, job)
        self.cluster.run("scancel", "--batch", "--signal=USR1", str(job))


@pytest.fixture
def place(cluster: SlurmCluster, tmp_path: Path) -> Workplace:
    return Workplace(cluster, tmp_path)


@pytest.fixture(scope="module", autouse=True)
def near_its_limit(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, int]:
    """A job whose limit of five minutes is the 300 s of `--signal=B:USR1@300`. SLURM looks at limits twice a minute:
    other tests run meanwhile."""
    place = Workplace(cluster, tmp_path_factory.mktemp("limit"))
    (place.fake / "unlearn.waits").touch()
    return place, place.submit("books", options=(*SMALL, "--time=5"))


def test_whole_pipeline_as_submitted_without_options(place: Workplace) -> None:
    """The #SBATCH lines as they are: 2 nodes x 8 tasks; every verb once, in order, distributed ones on every rank."""
    place.env |= {"SLURM_STEP_NUM_TASKS": "3", "RANK": "1", "WORLD_SIZE": "3"}  # as if submitted from inside a step
    job = place.submit("books", "--set", "a.b=x y", "--ep", "8", "--nproc=1", options=())
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.verbs() == STAGES
    for verb in STAGES:
        calls = [c for c in place.calls() if c[0] == verb]
        if verb in ON_ALL_RANKS:
            assert sorted(int(c[1]) for c in calls) == list(range(16))
            assert {c[2] for c in calls} == {"16"}
            assert {c[3] for c in calls} == {f"127.0.0.1:{10000 + job}"}
        else:
            assert [c[1:4] for c in calls] == [["bare", "", ":"]]
        same = "--set a.b=x y --set distributed.ep=8 --set distributed.nproc=1"
        assert {c[5] for c in calls} == {f"{verb} books --run-dir {place.run_dir} {same}"}
    log = place.folder / f"trace-ds-unlearn-{job}.log"
    assert log.readlink() == place.run_dir / "logs" / log.name and "unlearn: exit status 0" in log.read_text()


def test_stops_and_failures_end_a_job_as_they_should(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Jobs side by side. By name: the file of the stand-in, its content, the environment, the job's exit status."""
    cases: dict[str, tuple[str, str, dict[str, str], int]] = {
        "restarts are capped": ("unlearn.waits", "", {"MAX_RESTARTS": "0"}, 75),
        "a stop of a person is final": ("unlearn.waits", "", {}, 75),
        "a stage that does not stop is finished first": ("calibrate.deaf", "", {}, 0),
        "wrong input": ("convert.status", "2", {}, 2),
        "a failure": ("unlearn.status", "7", {"TRACE_DS_NODE_WAIT_S": "1"}, 7),
    }
    places, jobs = {}, {}
    for number, (name, (file, content, variables, _)) in enumerate(cases.items()):
        (tmp_path / str(number)).mkdir()
        place = places[name] = Workplace(cluster, tmp_path / str(number))
        (place.fake / file).write_text(content)
        place.env |= variables
        if content:
            place.run_dir.mkdir()
            (place.run_dir / "stop").touch()  # stale, from an earlier job: must not matter
        if name == "a failure":  # and a controller so busy that no task starts: a node is not lost by that
            place.shadow("srun", 'if [[ ${*: -1} == true ]]; then exit 1; fi\nexec "$real" "$@"')
        jobs[name] = place.submit("books")
    capped, person, finished, _, failure = jobs
    places[capped].signal_when_running(jobs[capped], "unlearn")
    places[finished].signal_when_running(jobs[finished], "calibrate")
    cluster.wait_until("unlearn runs", lambda: "unlearn" in places[person].verbs(), 60, jobs[person])
    (places[person].run_dir / "stop").touch()
    cluster.wait_until("the trap fired at once", (places[finished].run_dir / "stop").exists, 60, jobs[finished])
    (places[finished].fake / "calibrate.release").touch()
    for name, (file, _, _, status) in cases.items():
        assert cluster.wait(jobs[name]) == ("COMPLETED" if name == finished else "FAILED"), (name, places[name].calls())
        assert cluster.exit_code(jobs[name]) == status, name
        assert cluster.info(jobs[name])["Restarts"] == str(int(name == finished))
        assert places[name].verbs(0) == STAGES[: STAGES.index(file.split(".")[0]) + 1]
        if name != person:  # the ranks remove that
            assert not (places[name].run_dir / "stop").exists()  # or the next submission would stop at once
    assert places[finished].verbs(1) == STAGES
    assert "MAX_RESTARTS=0 reached" in cluster.output(jobs[capped])
    assert "but the controller misses none" in cluster.output(jobs[failure])


def test_a_rank_that_dies_takes_those_that_hang_with_it(place: Workplace) -> None:
    (place.fake / "unlearn.hangs").touch()
    (place.fake / "unlearn.status").write_text("7")
    place.env["TRACE_DS_WAIT_S"] = "2"
    job = place.submit("books", options=("--nodes=2", *SMALL))
    assert place.cluster.wait(job) == "FAILED", place.cluster.output(job)
    assert place.cluster.exit_code(job) not in (0, 2, 75)
    assert sorted(c[1] for c in place.calls() if c[0] == "unlearn") == ["0", "1"]
    assert place.verbs() == STAGES[:4]


def test_collect_stats_from_the_repository_without_any_environment(place: Workplace) -> None:
    """The repository is the submit folder, the site file is its slurm/site.env, and sbatch passes nothing on."""
    shutil.copytree(REPOSITORY / "slurm", place.folder / "slurm")
    exports = [f"export {name}='{place.env[name]}'\n" for name in ("PATH", "FAKE", "RUN_DIR")]
    (place.folder / "slurm" / "site.env").write_text("".join(exports))
    other = place.folder / "other"  # the option wins over RUN_DIR
    options = (*SMALL, "--nodes=2", "--export=NONE")
    place.env = {}
    job = place.submit("books", "--run-dir", str(other), script="collect_stats.sh", options=options)
    place.run_dir = other
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.verbs() == STAGES[:3]
    collect = [c for c in place.calls() if c[0] == "collect"]
    assert sorted(c[1] for c in collect) == ["0", "1"]
    assert {c[3] for c in collect} == {f"127.0.0.1:{10000 + job}"}
    assert {c[5] for c in collect} == {f"collect books --run-dir {other}"}


def test_run_directory_is_named_after_the_config_and_the_site_file_is_read(place: Workplace) -> None:
    """Also the container: the command is run through it, here a stand-in that notes its arguments."""
    (place.folder / "file.yaml").write_text('seed: 1\nname: "books-1"  # a comment\nmodel:\n  name: no\n')
    container = place.folder / "bin" / "apptainer"
    container.write_text(
        '#!/bin/sh\necho "$@" >>"$FAKE/container"\nuntil [ "$1" = image.sif ]; do shift; done\nshift\nexec "$@"\n'
    )
    container.chmod(0o755)
    (place.folder / "site.env").write_text("export TRACE_DS_CONTAINER=image.sif TRACE_DS_STAGES=convert\n")
    del place.env["RUN_DIR"]
    job = place.submit("file.yaml", script="single_stage.sh", options=())
    place.run_dir = place.folder / "runs" / "books-1"
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.verbs() == ["convert"]
    called = (place.fake / "container").read_text()
    assert called.startswith("exec --nv --bind ")
    assert called.endswith(f"--bind {place.run_dir} image.sif trace-ds convert file.yaml --run-dir {place.run_dir}\n")


def test_mistakes_are_one_line_and_status_2(place: Workplace) -> None:
    mistakes = {}
    for arguments, changes, message in (
        ((), {}, "the first argument must be the config"),
        (("books",), {"TRACE_DS_HOME": "/nowhere"}, "/nowhere is not the repository"),
        (("books",), {"TRACE_DS_COMMAND": "no-such-command"}, "no command no-such-command"),
        (("books",), {"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many is not a number"),
        (("books",), {"TRACE_DS_MODULES": "cuda", "BASH_FUNC_module%%": "() { return 1; }"}, "module load cuda failed"),
    ):
        before = dict(place.env)
        place.env |= changes
        mistakes[place.submit(*arguments)] = message
        place.env = before
    for job, message in mistakes.items():
        assert place.cluster.wait(job) == "FAILED"
        assert place.cluster.exit_code(job) == 2
        *site, line = place.cluster.output(job).splitlines()
        assert message in line and all(each.startswith("site settings: ") for each in site) and len(site) < 2
    assert not place.run_dir.exists()


def test_fine_tuning_comes_first_and_variants_run_stage_by_stage(place: Workplace) -> None:
    """Fine-tuning on every rank, once for all variants, stopped and requeued as unlearn is."""
    (place.fake / "variants").write_text("uniform\npermuted\n")
    (place.fake / "dry_run").write_text("# run directory: x; would run: prepare, finetune, collect, report\n")
    (place.fake / "finetune.waits").touch()
    job = place.submit("books", "--variants", "all")
    place.signal_when_running(job, "finetune")
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.verbs(0) == ["prepare", "finetune"]
    again = [c for c in place.calls() if c[4] == "1"]
    assert sorted(c[1] for c in again if c[0] == "finetune") == ["0", "1"]
    stages, varied = ["prepare", "finetune", *STAGES[1:]], STAGES[2:6]
    ran = list(dict.fromkeys((c[0], c[5].partition("--variant ")[2]) for c in again))
    assert ran == [(s, name) for s in stages for name in ["", *(("uniform", "permuted") if s in varied else ())]]


def test_array_over_seeds_and_array_over_recipes(place: Workplace) -> None:
    """Each task has a run directory of its own; a line that is not there is a mistake of that task alone."""
    place.env["TRACE_DS_STAGES"] = "prepare"
    seeds = place.submit("books", "--set", "a=b", script="single_stage.sh", options=("--array=0,3",))
    (place.folder / "list.txt").write_text("demo --set seed=5\n\nother.yaml\n")
    del place.env["RUN_DIR"]
    recipes = place.submit("list.txt", "--ep", "2", script="single_stage.sh", options=("--array=1-3",))
    place.cluster.wait_until("the arrays are over", lambda: not place.cluster.run("squeue", "-h").strip())
    for task in (0, 3):
        own = Path(f"{place.run_dir}-seed{task}")
        (line,) = (own / "calls").read_text().splitlines()
        assert line.endswith(f"|prepare books --run-dir {own} --set a=b --set seed={task}")
    (line,) = (place.folder / "runs/demo-1/calls").read_text().splitlines()
    assert line.endswith("/runs/demo-1 --set seed=5 --set distributed.ep=2")
    assert (place.folder / "runs/other-3/calls").exists()
    assert sorted(path.name for path in (place.folder / "runs").iterdir()) == ["demo-1", "other-3"]
    states = place.cluster.run("scontrol", "--oneliner", "show", "job", str(recipes))
    assert states.count("JobState=COMPLETED") == 2 and "ExitCode=2:0" in states
    logs = [path.read_text() for path in place.folder.glob("trace-ds-stage-*.log")]
    assert len(logs) == 5 and sum("list.txt has no line 2" in log for log in logs) == 1
    assert place.cluster.state(seeds) == "COMPLETED"


def test_pyxis_runs_every_stage_in_the_image(place: Workplace) -> None:
    """The plugin itself is not here: a stand-in for srun takes its options off and notes them."""
    place.shadow(
        "srun",
        'kept=()\nfor word; do\ncase $word in --container-*) echo "$word" >>"$FAKE/container" ;;\n'
        '*) kept+=("$word") ;; esac\ndone\nexec "$real" "${kept[@]}"',
    )
    place.env |= {"TRACE_DS_CONTAINER": "pyxis:/images/t.sqsh", "TRACE_DS_MOUNTS": "/models"}
    job = place.submit("books")
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.verbs() == STAGES
    assert [c[2] for c in place.calls() if c[0] in ("prepare", "report")] == ["1", "1"]  # in a step of their own
    mounts = ",".join(f"{path}:{path}" for path in ("/models", REPOSITORY, place.folder, place.run_dir))
    said = (place.fake / "container").read_text().splitlines()
    one = ["--container-image=/images/t.sqsh", f"--container-mounts={mounts}", f"--container-workdir={place.folder}"]
    assert said == one * (1 + len(STAGES))  # the dry run that tells of fine-tuning first


# Stands for the package under `torchrun -m trace_ds` and `deepspeed --module trace_ds`.
FAKE_MODULE = """
import os, pathlib, sys, time
run_dir = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "SLURM_NODEID")
verb = next(word for word in sys.argv[1:] if not word.startswith("-"))
with (run_dir / "ranks").open("a") as file:
    file.write(" ".join([verb, *(os.environ[name] for name in ours)]) + "\\n")
while not (run_dir / "stop").exists():
    time.sleep(0.1)
time.sleep(1)
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_other_launchers_start_the_ranks(place: Workplace, launcher: str) -> None:
    """The real launcher, one per node, under srun; also its way to say that the ranks stopped on request. (A requeue is
    the same whoever starts the ranks: MAX_RESTARTS.)"""
    package = place.folder / "module" / "trace_ds"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(FAKE_MODULE)
    beside = f"{Path(sys.executable).parent}:{place.env['PATH']}"
    place.env |= {"TRACE_DS_LAUNCHER": launcher, "PYTHONPATH": str(package.parent), "PATH": beside}
    place.env |= {"TRACE_DS_STAGES": "prepare unlearn", "OMP_NUM_THREADS": "1", "MAX_RESTARTS": "0"}
    command = place.folder / "bin" / "trace-ds"
    place.env["TRACE_DS_COMMAND"] = str(command)
    job = place.submit("books", options=("--ntasks-per-node=2", "--gpus-per-node=2", "--cpus-per-task=1"))
    ranks = place.run_dir / "ranks"
    place.cluster.wait_until("all ranks run", lambda: ranks.exists() and ranks.read_text().count("\n") == 4, 180, job)
    place.cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    assert place.cluster.wait(job, 180) == "FAILED", place.cluster.output(job)
    assert place.cluster.exit_code(job) == 75 and place.cluster.info(job)["Restarts"] == "0"
    expected = [f"unlearn {rank} 4 {rank % 2} {10000 + job % 20000} {rank // 2}" for rank in range(4)]
    assert sorted(ranks.read_text().splitlines()) == expected
    assert not (place.run_dir / ".hostfile").exists()


def test_a_stop_under_torchrun_is_told_from_a_failure(place: Workplace) -> None:
    """A stand-in for torchrun, which calls both 1; the ranks have removed the stop file that they obeyed."""
    log = place.run_dir / "logs" / "unlearn.jsonl"
    place.shadow("torchrun", f'mkdir -p {log.parent}\necho "stopped on request after step 3 of 9" >>{log}\nexit 1')
    place.env |= {"TRACE_DS_LAUNCHER": "torchrun", "TRACE_DS_STAGES": "unlearn"}
    job = place.submit("books")
    assert place.cluster.wait(job) == "FAILED", place.cluster.output(job)
    assert place.cluster.exit_code(job) == 75, place.cluster.output(job)


def test_near_the_time_limit_it_saves_and_is_requeued(near_its_limit: tuple[Workplace, int]) -> None:
    """SLURM's USR1 -> stop file -> 75 on all ranks -> the same job again, which goes on and finishes."""
    place, job = near_its_limit
    assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.cluster.info(job)["Restarts"] == "1"
    assert place.verbs(restart=0) == STAGES[:4]
    assert place.verbs(restart=1) == STAGES
    assert "USR1: asked the running stage to save and stop" in place.cluster.output(job)
    assert "unlearn: exit status 75" in place.cluster.output(job)
    assert not (place.run_dir / "stop").exists()


def chain(place: Workplace) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(REPOSITORY / "slurm" / "chain.sh"), "books", "--set", "a=b c"],
        env=place.cluster.environment(place.env), cwd=place.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip


def job_ids(printed: str) -> dict[str, int]:
    """{stages: job id} of chain.sh's output."""
    return {line.split(": ")[0]: int(line.split(": ")[1]) for line in printed.splitlines()}


CHAIN_SITE = """
export TRACE_DS_COLLECT_SBATCH="--ntasks-per-node=2 --gpus-per-node=2 --cpus-per-task=1"
export TRACE_DS_UNLEARN_SBATCH="--ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"
export TRACE_DS_EVALUATE_SBATCH="--ntasks-per-node=1 --gpus-per-node=1 --cpus-per-task=1"
"""


@pytest.mark.slow
def test_chain_runs_the_stages_as_dependent_jobs_through_a_requeue(place: Workplace) -> None:
    (place.folder / "site.env").write_text(CHAIN_SITE)
    (place.fake / "unlearn.waits").touch()
    result = chain(place)
    assert result.returncode == 0, result.stderr
    jobs = job_ids(result.stdout)
    assert list(jobs) == [*STAGES[:5], "evaluate report"]
    ordered = list(jobs.values())
    for before, after in itertools.pairwise(ordered[3:]):  # those before may be over already
        assert place.cluster.info(after)["Dependency"].startswith(f"afterok:{before}(")
    place.signal_when_running(jobs["unlearn"], "unlearn")
    queued = place.cluster.run("squeue", "--noheader", "--format=%.8j").split()  # as wide as it is by default
    assert {"unlearn-", "convert-", "evaluate"} <= set(queued)
    for job in ordered:
        assert place.cluster.wait(job) == "COMPLETED", place.cluster.output(job)
    assert place.cluster.info(jobs["unlearn"])["Restarts"] == "1"
    assert place.verbs() == STAGES
    ranks = {verb: {c[2] for c in place.calls() if c[0] == verb} for verb in STAGES}
    assert {verb for verb in STAGES if ranks[verb] == {"2"}} == set(ON_ALL_RANKS)
    assert all(ranks[verb] == {""} for verb in STAGES if verb not in ON_ALL_RANKS)
    assert {c[5] for c in place.calls() if c[0] == "report"} == {f"report books --run-dir {place.run_dir} --set a=b c"}


def trace_ds(
    server: Server, cluster: SlurmCluster, folder: Path, *arguments: object, env: dict[str, str] | None = None
) -> Result:
    """The command on the login node of the cluster."""
    return server.run(
        [str(item) for item in arguments], folder, cluster.environment(env or REAL), time_s=120, memory_bytes=None
    )


def submittable(place: Workplace) -> Path:
    """A configuration that `trace-ds submit` can check, whose jobs the stand-in plays."""
    place.env |= {"TRACE_DS_COMMAND": str(place.folder / "bin" / "trace-ds"), "PYTHONPATH": str(REPOSITORY)}
    del place.env["RUN_DIR"]
    return write_config(place.folder, make_model(place.folder / "model"))


def test_a_submitted_chain_is_recorded_and_a_stop_between_its_jobs_holds(place: Workplace, server: Server) -> None:
    """`trace-ds submit --chain`, its jobs played by the stand-in: a stop file touched while a stage runs that does not
    look at it ends the chain before the next one; a stale one from before the submission does not."""
    config = submittable(place)
    run_dir = place.run_dir = place.folder / "runs" / "tiny"
    run_dir.mkdir(parents=True)
    (run_dir / "stop").touch()
    (place.fake / "calibrate.deaf").touch()
    (place.folder / "site.env").write_text("export SBATCH_PARTITION=short\n")
    options = ("submit", config, "--gpus-per-node", 1, "--sbatch", "--cpus-per-task=1 --time=9 --comment='a b'")
    result = trace_ds(server, place.cluster, place.folder, *options, "--chain", env=place.env)
    assert result.returncode == 0, result.stderr
    assert f"site settings: {place.folder}/site.env\n" in result.stdout
    record = json.loads((run_dir / "submitted" / "1" / "jobs.json").read_text())
    stages = [*STAGES[:5], "evaluate report"]
    ids = [record["jobs"][stage] for stage in stages]
    jobs = place.cluster.run("squeue", "-h", f"--jobs={','.join(ids[2:])}", "--format=%P|%l|%k").splitlines()
    assert jobs == ["short|9:00|a b"] * 4
    assert result.stdout.splitlines()[-8:-2] == [f"{job}: {stage}" for job, stage in zip(ids, stages, strict=True)]
    waits = [f"--dependency=afterok:{before} " for before in ids[:-1]]
    assert all(wait in command for wait, command in zip(waits, record["commands"][1:], strict=True))
    place.cluster.wait_until("calibrate runs", lambda: "calibrate" in place.verbs(), 120, int(ids[2]))
    (run_dir / "stop").touch()
    (place.fake / "calibrate.release").touch()
    states = [place.cluster.wait(int(job)) for job in ids]
    assert states == ["COMPLETED"] * 3 + ["FAILED"] + ["CANCELLED"] * 2
    assert place.cluster.exit_code(int(ids[3])) == 75
    assert place.verbs() == STAGES[:3] and not (run_dir / "stop").exists()
    assert "stopped on request before unlearn" in place.cluster.output(int(ids[3]))


def test_a_submitted_array_runs_its_seeds_and_is_not_submitted_twice(place: Workplace, server: Server) -> None:
    config = submittable(place)
    run_dir = place.folder / "runs" / "tiny"
    (place.fake / "prepare.deaf").touch()
    sbatch = "--cpus-per-task=1 --comment='a b'"
    options = ("submit", config, "--gpus-per-node", 1, "--sbatch", sbatch, "--array", "0,3")
    result = trace_ds(server, place.cluster, place.folder, *options, env=place.env)
    assert result.returncode == 0, result.stderr
    assert f"touch {run_dir}-seedN/stop (task N)" in result.stdout
    ((stages, job),) = json.loads((run_dir / "submitted" / "1" / "jobs.json").read_text())["jobs"].items()
    assert set(place.cluster.run("squeue", "-h", f"--jobs={job}", "--format=%k").splitlines()) == {"a b"}
    calls = [Path(f"{run_dir}-seed{seed}") / "calls" for seed in (0, 3)]
    place.cluster.wait_until("both seeds run", lambda: all(path.exists() for path in calls), 120, int(job))
    # the last task alone has the array's id as its own: without it the array must still be known
    place.cluster.run("scancel", f"{job}_3")
    place.cluster.wait_until("one is left", lambda: place.cluster.run("squeue", "-h", "-o%K").split() == ["0"], 60)
    again = trace_ds(server, place.cluster, place.folder, *options, env=place.env)
    assert again.returncode == 2 and f"still queued or running: {job}" in again.stderr
    (place.fake / "prepare.release").touch()
    place.cluster.wait_until("the array is over", lambda: not place.cluster.run("squeue", "-h").strip(), 120)
    ran = [path.read_text().splitlines() for path in calls]
    assert [[line.split("|")[0] for line in lines] for lines in ran] == [stages.split(), ["prepare"]]
    assert all(f"--set seed={seed}" in line for seed, lines in zip((0, 3), ran, strict=True) for line in lines)


def test_a_submission_that_slurm_refuses_leaves_nothing(cluster: SlurmCluster, tmp_path: Path, server: Server) -> None:
    config = write_config(tmp_path, make_model(tmp_path / "model"))
    before = sorted(tmp_path.rglob("*"))
    refused = {
        "--partition=none": "invalid partition specified: none",
        "--partition=short --time=1-00:00:00": "the time limit 1-00:00:00 is beyond that of partition short",
    }
    for (sbatch, message), form in itertools.product(refused.items(), ([], ["--chain"])):
        options = ["--gpus-per-node", 1, "--sbatch", sbatch, *form]
        result = trace_ds(server, cluster, tmp_path, "submit", config, *options)
        assert result.returncode == 2
        assert message in result.stderr and len(result.stderr.splitlines()) == 1
        assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def warm(cluster: SlurmCluster) -> Iterator[str]:
    with warm_command(cluster.base) as command:
        yield command


REAL = {
    "TRACE_DS_HOME": str(REPOSITORY),
    "TRACE_DS_SITE_ENV": "",
    "TRACE_DS_COMMAND": f"{sys.executable} -m trace_ds",
    "PYTHONPATH": str(REPOSITORY),
    "CUDA_VISIBLE_DEVICES": "",
    "MY_TOKEN": "canary-5f2e9c",
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_real_pipeline_over_two_nodes_with_stop_and_lost_node(
    cluster: SlurmCluster, warm: str, tmp_path: Path, server: Server
) -> None:
    """`trace-ds submit` of ZeRO-3 and expert-parallel size 4 over two nodes of two ranks on CPU, up to the calibration
    and then the training: stopped in the middle, requeued, a node lost, requeued by SLURM, done. Counts are those
    of one process, weights those of an undisturbed job, to the last bit. What srun starts are forks of a warm process;
    tests/cluster/test_cluster_page.py starts it as it is, and what comes after training too."""
    import jobs
    from processes import run_distributed

    from trace_ds.checkpoints.manifest import read_manifest

    steps, name = 40, "step_000040"
    changes = {"unlearning__forget_loss": "graddiff", "unlearning__steps": steps, "unlearning__save_every": 1000}
    config = write_config(tmp_path, make_model(tmp_path / "model"), distributed__ep=4, **changes)
    run_dir = tmp_path / "runs" / "tiny"

    def submit(number: int, stages: str) -> tuple[int, list[object]]:
        """(the job, a command that submits it again)"""
        command = ["submit", config, "--nodes", 2, "--gpus-per-node", 2, "--sbatch", "--cpus-per-task=1"]
        target = {"TRACE_DS_COMMAND": warm, "TRACE_DS_STAGES": stages, "TRACE_DS_VERBOSE": "1"}
        result = trace_ds(server, cluster, tmp_path, *command, env=REAL | target)
        assert result.returncode == 0, result.stderr
        record = json.loads((run_dir / "submitted" / str(number) / "jobs.json").read_text())
        ((recorded, job),) = record["jobs"].items()
        assert recorded.split() == STAGES and f"{job}: {recorded}" in result.stdout
        return int(job), command

    job, command = submit(1, "prepare collect calibrate")
    again = trace_ds(server, cluster, tmp_path, *command)
    assert again.returncode == 2 and f"still queued or running: {job}" in again.stderr
    assert cluster.wait(job, 600) == "COMPLETED", cluster.output(job)
    assert "world size 4, expert-parallel size 4" in cluster.output(job)
    job, _ = submit(2, "unlearn report")
    log = run_dir / "logs" / "unlearn.jsonl"
    cluster.wait_until("some steps", lambda: log.exists() and '"step": 5,' in log.read_text(), 600, job)
    cluster.run("scancel", "--batch", "--signal=USR1", str(job))
    second = "unlearn: exit status 75"
    cluster.wait_until("it goes on", lambda: " unlearn\n" in cluster.output(job).partition(second)[2], 600, job)
    stopped = re.search(rf"stopped on request after step (\d+) of {steps}", cluster.output(job))
    assert stopped and 5 <= int(stopped[1]) < steps, cluster.output(job)
    cluster.wait_until("ranks run on n2", lambda: cluster.runs_on("n2", b"unlearn"), 60, job)
    cluster.kill_node("n2")
    cluster.wait_until("the job is requeued", lambda: cluster.info(job)["Restarts"] == "2", 120, job)
    cluster.start_node("n2")
    assert cluster.wait(job, 800) == "COMPLETED", cluster.output(job)
    assert f"resumed after step {stopped[1]}" in cluster.output(job)
    assert "world size 4, expert-parallel size 4" in cluster.output(job)
    # the environment goes with the job, but nowhere into what the run leaves: people share that
    written = [path for path in run_dir.rglob("*") if path.is_file()]
    assert {"logs", "submitted", "report"} <= {path.relative_to(run_dir).parts[0] for path in written}
    assert [path for path in written if b"canary-5f2e9c" in path.read_bytes()] == []

    alone, undisturbed = tmp_path / "alone", tmp_path / "undisturbed"
    for part, other in (("data", alone), *((part, undisturbed) for part in ("data", "statistics", "calibration"))):
        shutil.copytree(run_dir / part, other / part)
    run_distributed(jobs.collect_job, 1, str(config), str(alone), ["distributed.ep=1"])
    for side in ("forget", "retain"):
        files = [folder / "statistics" / side / "statistics.safetensors" for folder in (run_dir, alone)]
        counts = [load_file(path)["counts_LE"] for path in files]
        assert counts[0].sum() > 0 and (counts[0] == counts[1]).all()
    run_distributed(jobs.unlearn_job, 4, str(config), str(undisturbed), [])
    expected, actual = (read_manifest(run / "checkpoints" / name).files for run in (undisturbed, run_dir))
    assert actual == expected  # hashes of the files that hold weights and optimizer states


STUDY = {
    "seeds": [0, 1],
    "methods": {"uniform": {"calibration.rule": "uniform"}, "sampling": {}},
    "grid": {"unlearning.alpha": [1.0, 4.0]},
    "forget": "questions_forget accuracy",
    "utility": ["questions_utility accuracy"],
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_study_is_a_job_a_seed_and_a_cancelled_one_costs_its_seed_only(
    cluster: SlurmCluster, warm: str, tmp_path: Path, server: Server
) -> None:
    """`trace-ds submit --study`, every run two ranks on two nodes with expert-parallel size 2; one seed's job is
    cancelled, and the same command finishes it. What the study shows is, to the byte, what `trace-ds bench` shows on
    one machine."""
    evaluate = {"every": 3, "rows": 0, "tasks": ["questions_forget", "questions_utility"]}
    shape = {"distributed": {"nproc": 2, "ep": 2}, "unlearning__steps": 6, "unlearning__evaluate": evaluate}
    config = write_config(tmp_path, make_model(tmp_path / "model"), bench=STUDY, **shape)
    study, env = tmp_path / "study", REAL | {"TRACE_DS_COMMAND": warm}

    def submit(number: int) -> list[int]:
        options = ["--nodes", 2, "--gpus-per-node", 1, "--run-dir", study]
        result = trace_ds(server, cluster, tmp_path, "submit", config, "--study", *options, env=env)
        assert result.returncode == 0, result.stderr
        files = [study / f"seed_{seed}/submitted/{number}/jobs.json" for seed in (0, 1)]
        return [int(next(iter(json.loads(file.read_text())["jobs"].values()))) for file in files]

    cancelled, other = submit(1)
    cluster.run("scancel", str(cancelled))
    assert cluster.wait(other, 900) == "COMPLETED", cluster.output(other)
    missing = server.run(["bench", str(config), "--run-dir", str(study), "--analyse"], tmp_path, **JOB)
    assert missing.returncode == 2 and "seed_0" in missing.stderr and not (study / "study.json").exists()
    for job in submit(2):
        assert cluster.wait(job, 900) == "COMPLETED", cluster.output(job)
    for place, words in ((study, ["--analyse"]), (tmp_path / "alone", [])):
        done = server.run(["bench", str(config), "--run-dir", str(place), *words], tmp_path, **JOB)
        assert done.returncode == 0, done.stderr
    assert not list(study.glob("**/step_*"))
    for name in ("study.json", "frontier.csv"):
        assert (study / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
