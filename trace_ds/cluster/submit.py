"""``trace-ds submit``: a whole run as SLURM jobs, checked before it is queued, with everything that was submitted kept.

    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8              # one job: slurm/unlearn_mixtral.sh
    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8 --chain      # one job per stage: slurm/chain.sh
    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8 --dry-run    # print the command lines, write nothing

Each submission gets a folder ``RUN/submitted/N`` with the resolved configuration, the scripts, the site file and
``jobs.json`` (command lines and job ids). The jobs take configuration and scripts from that folder, so a job that
requeues itself next week does what was submitted today; the package itself is the installed one of that moment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import trace_ds
from trace_ds.cluster import architecture
from trace_ds.cluster.job import DTYPE_BYTES
from trace_ds.cluster.plan import evaluation_gpus, model_config_of, plan
from trace_ds.cluster.spec import ClusterSpec
from trace_ds.config.load import dump_yaml
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run.directory import unwritable
from trace_ds.run.files import write_json
from trace_ds.stages.pipeline import Request, check_early
from trace_ds.tensors.model_files import read_model_directory

SCRIPTS = ("chain.sh", "collect_stats.sh", "common.sh", "single_stage.sh", "study.sh", "unlearn_mixtral.sh")
WHOLE_RUN, CHAIN = "unlearn_mixtral.sh", "chain.sh"


@dataclass(frozen=True)
class Cluster:
    """What is asked of SLURM.

    Attributes:
        nodes, gpus_per_node: the shape of finetune, collect and unlearn; one process per GPU.
        options: more options of sbatch, as on its command line; they win over the scripts' own.
        array: seeds of a job array, in sbatch's notation (``0-4``); None: no array.
        gpu_memory_gb: of one GPU, for the plan and for the number of GPUs that evaluate asks for.
    """

    nodes: int
    gpus_per_node: int
    options: str = ""
    array: str | None = None
    gpu_memory_gb: float = ClusterSpec.gpu_memory_gb

    @property
    def shape(self) -> list[str]:
        return [
            f"--nodes={self.nodes}",
            f"--ntasks-per-node={self.gpus_per_node}",
            f"--gpus-per-node={self.gpus_per_node}",
        ]


def submit_run(request: Request, cluster: Cluster, *, chain: bool, dry_run: bool) -> int:
    """Check the run, write ``RUN/submitted/N``, submit it and print job ids and what to do with them; returns 0.

    With ``dry_run`` the command lines are printed and nothing is written.

    Raises:
        UserError: the run's input is wrong; the expert-parallel size does not fit the cluster; jobs of this run are
            still queued; there is no ``sbatch``, or it refuses. Then nothing is left behind.
    """
    request = request.located("run", download=False)
    if chain and cluster.array:
        raise UserError("--array and --chain cannot be combined", "the command line", "submit a chain per seed")
    check_early("run", request, cluster.nodes * cluster.gpus_per_node, download=False)
    for warning in plan_warnings(request.config, cluster):
        print(f"WARNING trace-ds plan: {warning}")
    whole = "" if chain else " ".join(request.stages)
    run_dir = Path(os.path.abspath(request.run.path))
    folder = run_dir / "submitted" / str(1 + len(list(run_dir.glob("submitted/[0-9]*"))))
    with tempfile.TemporaryDirectory() as temporary:
        draft = Path(temporary) / "submission"
        render(request, draft)
        variables = _run_environment(draft, run_dir, cluster, request.config)
        lines = {
            stages: line.replace(str(draft), shlex.quote(str(folder)))
            for stages, line in command_lines(draft, run_dir, cluster, variables, whole).items()
        }
        if dry_run:
            for line in lines.values():
                print(line)
            print(f"# dry run: nothing submitted; the files would be in {folder}")
            return 0
        check_queue(run_dir)
        made = next(path for path in reversed([folder, *folder.parents]) if not path.exists())
        try:
            shutil.copytree(draft, folder)
            (run_dir / "logs").mkdir(exist_ok=True)
        except OSError as error:
            raise unwritable(run_dir, error) from None
    try:
        jobs = start(folder, run_dir, cluster, _run_environment(folder, run_dir, cluster, request.config), whole)
    except UserError:
        with contextlib.suppress(OSError):
            (run_dir / "logs").rmdir()
        shutil.rmtree(made)
        raise
    ids = list(jobs.values())
    commands = [re.sub(r"(?<=afterok:)JOB(\d+)", lambda match: ids[int(match[1]) - 1], line) for line in lines.values()]
    write_json(folder / "jobs.json", {"jobs": jobs, "commands": commands})
    for stages, job in jobs.items():
        print(f"{job}: {stages}")
    print(f"log files: {run_dir}/logs; what was submitted: {folder}")
    stop = shlex.quote(f"{run_dir}-seedN/stop" if cluster.array else f"{run_dir}/stop")
    print(f"watch: squeue -j {','.join(ids)}   stop, saving first: touch {stop}{' (task N)' if cluster.array else ''}")
    return 0


def plan_warnings(config: Config, cluster: Cluster) -> list[str]:
    """What the cost model warns of; for a family that it does not know, just that."""
    family = model_config_of(config.model.path)[0].get("model_type")
    if family not in architecture.FAMILIES:
        return [f"the cost model does not know the family {family!r}: whether the run fits was not checked"]
    spec = ClusterSpec(cluster.nodes, cluster.gpus_per_node, gpu_memory_gb=cluster.gpu_memory_gb)
    return plan(config, spec).warnings


def render(request: Request, folder: Path) -> None:
    """Everything the jobs need, in ``folder``: resolved configuration, scripts, site file."""
    scripts = scripts_folder()
    (folder / "slurm").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(request.written), encoding="utf-8")
    for name in SCRIPTS:
        shutil.copy(scripts / name, folder / "slurm" / name)
    named = os.environ.get("TRACE_DS_SITE")
    site = Path(named) if named else scripts / "site.env"
    if site.exists():
        (folder / "slurm" / "site.env").write_text(site.read_text(encoding="utf-8"), encoding="utf-8")
    elif named:
        raise UserError("no such file", f"TRACE_DS_SITE={named}", "copy slurm/site.env.example there and fill it in")


def scripts_folder() -> Path:
    """``slurm/`` of the installed wheel, or of the repository this package is imported from."""
    package = Path(trace_ds.__file__).resolve().parent
    return next(folder for folder in (package / "slurm", package.parent / "slurm") if folder.is_dir())


def command_lines(
    folder: Path, run_dir: Path, cluster: Cluster, variables: dict[str, str], whole: str
) -> dict[str, str]:
    """{stages: the command line that submits them}; jobs that do not exist yet are JOB1, JOB2, …

    ``whole``: the stages of the one job that does all; empty: a chain of jobs.
    """
    if whole:
        return {whole: shlex.join(_sbatch(folder, run_dir, cluster))}
    found = run_command(_chain(folder, run_dir), variables | {"TRACE_DS_DRY_RUN": "1"}, folder.parent)
    return dict(line.split(": ", 1) for line in found.splitlines())


def start(folder: Path, run_dir: Path, cluster: Cluster, variables: dict[str, str], whole: str) -> dict[str, str]:
    """Submit what :func:`render` wrote; {stages: job id}."""
    if not whole:
        found = run_command(_chain(folder, run_dir), variables, Path.cwd())
        return dict(line.split(": ", 1) for line in found.splitlines())
    # sbatch reads SBATCH_* from its environment: the site file's, which only a shell can read
    with_site = ["bash", "-c", '[[ ! -e $0 ]] || source "$0"; exec "$@"', str(folder / "slurm" / "site.env")]
    found = run_command([*with_site, *_sbatch(folder, run_dir, cluster)], variables, Path.cwd())
    return {whole: found.strip().split(";")[0]}


def check_queue(run_dir: Path) -> None:
    """Refuse while jobs of an earlier submission are still queued or running: they would only wait for the lock."""
    if shutil.which("sbatch") is None:
        fix = "run this on a login node of the cluster (--dry-run and trace-ds run work without SLURM)"
        raise UserError("there is no sbatch on this machine", "PATH", fix)
    earlier = [json.loads(path.read_text(encoding="utf-8")) for path in run_dir.glob("submitted/*/jobs.json")]
    ids = {job for record in earlier for job in record["jobs"].values()}
    # %F: an array's own id for each of its tasks, which is what sbatch printed
    queued = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True, check=False)
    if active := sorted(ids & set(queued.stdout.split()), key=int):
        what = f"jobs of this run are still queued or running: {' '.join(active)}"
        raise UserError(what, str(run_dir), f"wait for them, or scancel {' '.join(active)}")


def _sbatch(folder: Path, run_dir: Path, cluster: Cluster) -> list[str]:
    array = [f"--array={cluster.array}"] if cluster.array else []
    script = [str(folder / "slurm" / WHOLE_RUN), str(folder / "config.yaml"), "--run-dir", str(run_dir)]
    return ["sbatch", "--parsable", "--export=ALL", *cluster.shape, *array, *shlex.split(cluster.options), *script]


def _chain(folder: Path, run_dir: Path) -> list[str]:
    return ["bash", str(folder / "slurm" / CHAIN), str(folder / "config.yaml"), "--run-dir", str(run_dir)]


def _run_environment(folder: Path, run_dir: Path, cluster: Cluster, config: Config) -> dict[str, str]:
    """What the scripts of a run read."""
    weights_bytes = read_model_directory(config.model.path).parameters * DTYPE_BYTES[config.model.dtype]
    needed = max(evaluation_gpus(config, weights_bytes, cluster.gpu_memory_gb), config.evaluation.nproc)
    gpus = min(needed, cluster.gpus_per_node)
    found = {"TRACE_DS_EVALUATE_SBATCH": f"--gpus-per-node={gpus}"} | environment(folder, run_dir, cluster)
    return found | {"TRACE_DS_FINETUNE": "1" if config.finetune is not None else ""}


def environment(folder: Path, run_dir: Path, cluster: Cluster) -> dict[str, str]:
    """What every script reads; the site file's own exports win where both say something."""
    ours = {
        "TRACE_DS_HOME": str(folder),
        "TRACE_DS_GPU_SBATCH": " ".join(cluster.shape),
        "TRACE_DS_ALL_SBATCH": cluster.options,
    }
    defaults = {"SBATCH_OUTPUT": str(run_dir / "logs" / "%x-%j.log")}
    if sys.prefix != sys.base_prefix:
        defaults["TRACE_DS_VENV"] = sys.prefix  # the jobs use the environment that submits them
    kept = {name: value for name, value in os.environ.items() if name not in ("TRACE_DS_SITE", "RUN_DIR")}
    return defaults | kept | ours


def run_command(command: list[str], environment: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: error: ") for line in done.stderr.strip().splitlines())
        raise UserError(f"the submission failed: {said}", "sbatch", "correct --sbatch, --nodes or slurm/site.env")
    return done.stdout
