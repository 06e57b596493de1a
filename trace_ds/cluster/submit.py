"""``trace-ds submit``: a whole run as SLURM jobs, checked before it is queued, with everything that was submitted kept.

    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8              # one job: slurm/unlearn_mixtral.sh
    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8 --chain      # one job per stage: slurm/chain.sh
    trace-ds submit CONFIG --nodes 4 --gpus-per-node 8 --dry-run    # print the command lines, write nothing

Each submission gets a folder ``RUN/submitted/N`` with the resolved configuration, the scripts, the site file and
``jobs.json`` (command lines and job ids). The jobs take configuration, scripts and site settings from that folder, so a
job that requeues itself next week does what was submitted today; the package itself is the one installed then.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import trace_ds
from trace_ds.cluster import architecture
from trace_ds.cluster.job import ClusterSpec
from trace_ds.cluster.plan import model_config_of, plan
from trace_ds.config.load import dump_yaml
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run.directory import unwritable
from trace_ds.run.files import MARKER, write_json
from trace_ds.run.foreign import read_bytes, read_object
from trace_ds.stages.inputs import with_expert_parallel_sizes
from trace_ds.stages.pipeline import Request, check_early

SITE_VARIABLE = "TRACE_DS_SITE_ENV"
SITE_PLACES = ("slurm/site.env", "~/.config/trace_ds/site.env")  # slurm/common.sh looks there too
MAX_SITE_BYTES = 1 << 20
SCRIPTS = ("chain.sh", "collect_stats.sh", "common.sh", "single_stage.sh", "unlearn_mixtral.sh")


@dataclass(frozen=True)
class Cluster:
    """The allocation to request from SLURM.

    Attributes:
        nodes, gpus_per_node: the shape of finetune, collect, unlearn and evaluate; one process per GPU.
        options: more options of sbatch, as on its command line; they win over the scripts' own.
        array: seeds of a job array, in sbatch's notation (``0-4``); None: no array.
        gpu_memory_gb: of one GPU, for the plan.
    """

    nodes: int
    gpus_per_node: int
    options: str = ""
    array: str | None = None
    gpu_memory_gb: float = ClusterSpec.gpu_memory_gb

    @property
    def shape(self) -> list[str]:
        array = [f"--array={self.array}"] if self.array else []
        per_node = self.gpus_per_node
        return [f"--nodes={self.nodes}", f"--ntasks-per-node={per_node}", f"--gpus-per-node={per_node}", *array]

    @property
    def words(self) -> list[str]:
        """``options`` as a shell splits them."""
        try:
            return shlex.split(self.options)
        except ValueError:
            raise UserError(f"a quote is not closed: {self.options}", "--sbatch", "close it") from None


def submit_run(request: Request, cluster: Cluster, *, chain: bool, dry_run: bool) -> int:
    """Check the run, write ``RUN/submitted/N``, submit it and print job ids and what to do with them; returns 0.

    With ``dry_run`` the command lines are printed and nothing is written.

    Raises:
        UserError: the run's input is wrong; the expert-parallel size does not fit the cluster; jobs of this run are
            still queued; there is no ``sbatch``, or it refuses. Then nothing is left behind.
    """
    if chain and cluster.array:
        raise UserError("--array and --chain cannot be combined", "the command line", "submit a chain per seed")
    site = site_file()
    request = request.located("run", download=False)
    model, _ = model_config_of(request.config.model.path)
    ranks = cluster.nodes * cluster.gpus_per_node
    written = with_expert_parallel_sizes(request.written, model, ranks, cluster.gpus_per_node)
    request = replace(request, written=written)
    check_early("run", request, ranks, download=False)
    print(f"site settings: {site or 'none'}")
    for warning in plan_warnings(request.chosen_config, cluster):
        print(f"WARNING trace-ds plan: {warning}")
    run_dir = Path(os.path.abspath(request.run.path))
    folder = run_dir / "submitted" / str(1 + len(list(run_dir.glob("submitted/[0-9]*"))))
    one_job = "" if chain else " ".join(request.stage_names("run"))
    variables = {"TRACE_DS_ONE_JOB": one_job, "TRACE_DS_FINETUNE": "1" if request.config.finetune is not None else ""}
    variables |= {"TRACE_DS_VARIANTS": " ".join(request.chosen)} if request.chosen else {}
    if dry_run:
        with tempfile.TemporaryDirectory() as temporary:
            draft = Path(temporary) / "submission"
            render_scripts(request, draft)
            for line in run_chain(draft, run_dir, cluster, variables | {"TRACE_DS_DRY_RUN": "1"}).values():
                print(line.replace(str(draft), shlex.quote(str(folder))))
        print(f"# dry run: nothing submitted; the files would be in {folder}")
        return 0
    check_queue(run_dir)
    new = next(path for path in reversed([folder, *folder.parents]) if not path.exists())
    commands = folder / "commands.txt"
    fresh = request.run.mark()
    try:
        render_scripts(request, folder)
        (run_dir / "logs").mkdir(exist_ok=True)
        jobs = run_chain(folder, run_dir, cluster, variables | {"TRACE_DS_COMMANDS": str(commands)})
    except (UserError, OSError) as error:
        with contextlib.suppress(OSError):
            (run_dir / "logs").rmdir()
        shutil.rmtree(new, ignore_errors=True)
        if fresh:
            (run_dir / MARKER).unlink(missing_ok=True)
        raise (unwritable(run_dir, error) if isinstance(error, OSError) else error) from None
    write_json(folder / "jobs.json", {"jobs": jobs, "commands": commands.read_text().splitlines()})
    commands.unlink()
    ids = ",".join(jobs.values())
    for stages, job in jobs.items():
        print(f"{job}: {stages}")
    print(f"log files: {run_dir}/logs; what was submitted: {folder}")
    stop = shlex.quote(f"{run_dir}-seedN/stop" if cluster.array else f"{run_dir}/stop")
    print(f"watch: squeue -j {ids}   stop, saving first: touch {stop}{' (task N)' if cluster.array else ''}")
    return 0


def plan_warnings(config: Config, cluster: Cluster) -> list[str]:
    """What the cost model warns of; for a family that it does not know, just that."""
    family = model_config_of(config.model.path)[0].get("model_type")
    if family not in architecture.FAMILIES:
        return [f"the cost model does not know the family {family!r}: whether the run fits was not checked"]
    spec = ClusterSpec(cluster.nodes, cluster.gpus_per_node, gpu_memory_gb=cluster.gpu_memory_gb)
    return plan(config, spec).warnings


def render_scripts(request: Request, folder: Path) -> None:
    """Write all that the jobs need into ``folder``: resolved configuration, scripts, site file."""
    scripts = scripts_folder()
    (folder / "slurm").mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_yaml(request.written), encoding="utf-8")
    for name in SCRIPTS:
        shutil.copy(scripts / name, folder / "slurm" / name)
    site = site_file()
    (folder / "slurm" / "site.env").write_bytes(b"" if site is None else read_bytes(site, MAX_SITE_BYTES))


def site_file() -> Path | None:
    """The site's settings: the file that TRACE_DS_SITE_ENV names (empty: none), else the first of ``SITE_PLACES`` that
    is there.

    Raises:
        UserError: it is not there, or not a file that can be read.
    """
    named = os.environ.get(SITE_VARIABLE)
    places = SITE_PLACES if named is None else (named,)
    path = next((path for path in map(Path, map(os.path.expanduser, filter(None, places))) if path.exists()), None)
    where = str(path) if named is None else f"{SITE_VARIABLE}={named}"
    if path is None and named:
        raise UserError("no such file", where, "copy slurm/site.env.example there and fill it in")
    if path is not None and not (path.is_file() and os.access(path, os.R_OK)):
        raise UserError("the site file is not a file that can be read", where, "correct the path, or make it one")
    if path is not None and path.stat().st_size > MAX_SITE_BYTES:
        raise UserError("the site file is above 1 MiB", where, "correct the path")
    return path and path.absolute()


def scripts_folder() -> Path:
    """``slurm/`` of the installed wheel, or of the repository this package is imported from."""
    package = Path(trace_ds.__file__).resolve().parent
    return next(folder for folder in (package / "slurm", package.parent / "slurm") if folder.is_dir())


def run_chain(folder: Path, run_dir: Path, cluster: Cluster, variables: dict[str, str]) -> dict[str, str]:
    """Run ``slurm/chain.sh`` of what :func:`render_scripts` wrote: {stages: job id, or the command line of a dry run}.

    The site file's own exports win over what it gets from here.
    """
    ours = {
        "TRACE_DS_HOME": str(folder),
        SITE_VARIABLE: str(folder / "slurm" / "site.env"),
        "TRACE_DS_GPU_SBATCH": shlex.join(cluster.shape),
        "TRACE_DS_ALL_SBATCH": shlex.join(cluster.words),
    }
    defaults = {"SBATCH_OUTPUT": str(run_dir / "logs" / "%x-%j.log")}
    if sys.prefix != sys.base_prefix:
        defaults["TRACE_DS_VENV"] = sys.prefix  # the jobs use the environment that submits them
    kept = {name: value for name, value in os.environ.items() if name not in ("RUN_DIR", "TRACE_DS_CHAIN")}
    command = ["bash", str(folder / "slurm" / "chain.sh"), str(folder / "config.yaml"), "--run-dir", str(run_dir)]
    environment = defaults | kept | ours | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [re.sub(r"^(sbatch: error|trace_ds): ", "", line) for line in done.stderr.strip().splitlines()]
        reason = " ".join(line for line in lines if not line.startswith("site settings: "))
        raise UserError(f"the submission failed: {reason}", "sbatch", "correct --sbatch, --nodes or the site file")
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


def check_queue(run_dir: Path) -> None:
    """Refuse while jobs of an earlier submission are still queued or running: they would only wait for the lock."""
    if shutil.which("sbatch") is None:
        fix = "run this on a login node of the cluster (--dry-run and trace-ds run work without SLURM)"
        raise UserError("there is no sbatch on this machine", "PATH", fix)
    ids = {job for path in run_dir.glob("submitted/*/jobs.json") for job in submitted_jobs(path)}
    # %F: an array's own id for each of its tasks, which is what sbatch printed
    queued = subprocess.run(["squeue", "--noheader", "--format=%F"], capture_output=True, text=True, check=False)
    if active := sorted(ids & set(queued.stdout.split()), key=int):
        problem = f"jobs of this run are still queued or running: {' '.join(active)}"
        raise UserError(problem, str(run_dir), f"wait for them, or scancel {' '.join(active)}")


def submitted_jobs(record: Path) -> list[str]:
    """The job ids in a ``jobs.json``."""
    fix = "see that none of its jobs is queued (squeue --me), and delete the file"
    jobs = read_object(record, "the record of a submission", fix).get("jobs")
    if not isinstance(jobs, dict) or not all(isinstance(job, str) and job.isdigit() for job in jobs.values()):
        raise UserError("the record of a submission is damaged", str(record), fix)
    return list(jobs.values())
