"""A real SLURM cluster of two nodes on this one machine, for tests and for trying the commands of docs/cluster.md.

    python tests/slurm_cluster.py            # a shell in which sbatch, srun, squeue … belong to the cluster
    python tests/slurm_cluster.py COMMAND…   # a command instead

    with slurm_cluster() as cluster:
        job = cluster.submit(script, "argument", options=["--nodes=2"], env={"NAME": "value"}, cwd=folder)
        assert cluster.wait(job) == "COMPLETED", cluster.output(job)

The controller, two node daemons (`slurmd -N n1`, `slurmd -N n2`) and a munge daemon of our own run as ordinary child
processes in a temporary directory, on ports chosen free, and are gone when the block ends, however it ends. Nothing of
the machine's own SLURM configuration is read. CPUs and GPUs of the nodes are declared, not detected: a "GPU" here is a
scheduling token (its device file is /dev/null), so that scripts which ask for GPUs can be scheduled as they are.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ACTIVE_STATES = frozenset(
    ["PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "RESIZING", "STAGE_OUT", "SIGNALING"]
)


def find_daemon(name: str) -> str | None:
    """Absolute path of a daemon; Debian keeps them in /usr/sbin, which is not on every user's PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin:/usr/local/sbin")


def free_ports(count: int) -> list[int]:
    """`count` distinct TCP ports free at this moment."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def slurm_cluster(cpus_per_node: int = 64, gpus_per_node: int = 8, cred_expire_s: int = 5) -> Iterator[SlurmCluster]:
    """A booted cluster for the length of a `with` block; see :class:`SlurmCluster`."""
    cluster = SlurmCluster(cpus_per_node, gpus_per_node, cred_expire_s)
    try:
        cluster.boot()
        yield cluster
    finally:
        cluster.shut_down()


class SlurmCluster:
    """Use it through :func:`slurm_cluster`, which shuts it down.

    cpus_per_node, gpus_per_node: what each node declares, whatever the machine has.
    cred_expire_s: SLURM delays a requeued job by this long (production default: 120 s).
    """

    def __init__(self, cpus_per_node: int, gpus_per_node: int, cred_expire_s: int) -> None:
        self.cpus_per_node = cpus_per_node
        self.gpus_per_node = gpus_per_node
        self.cred_expire_s = cred_expire_s
        self._stack = contextlib.ExitStack()
        self._folders: dict[int, Path] = {}  # job id -> directory it was submitted from

    # ------------------------------------------------------------------ life cycle

    def boot(self) -> None:
        """Starts everything and waits until both nodes take jobs; raises TimeoutError with the daemons' logs."""
        # Directly under /tmp: the path of a Unix socket may have no more than 107 characters.
        self.base = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self._stack.callback(shutil.rmtree, self.base, ignore_errors=True)
        self._stack.callback(self._end_leftovers)
        self.base.chmod(0o755)  # munged insists that others can reach its socket
        for name in ("munge", "state", "log", "spool"):
            (self.base / name).mkdir(mode=0o755)
        socket_path = self._start_munged()
        self._write_configuration(socket_path)
        self._start("slurmctld", "-D", "-c", "-f", str(self.conf))
        self._wait_until("the controller answers", lambda: self._call("scontrol", "ping").returncode == 0)
        for node in ("n1", "n2"):
            self.start_node(node)
        self._stack.callback(self._cancel_all)  # the last callback runs first: the daemons are still there
        self._wait_until("both nodes are idle", self._nodes_idle)

    def shut_down(self) -> None:
        """Cancels all jobs, stops what was started, last started first, and removes the files."""
        self._stack.close()

    def _start_munged(self) -> Path:
        folder = self.base / "munge"
        key = folder / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        socket_path = folder / "socket"
        options = {
            "socket": socket_path,
            "key-file": key,
            "pid-file": folder / "pid",
            "seed-file": folder / "seed",
            "log-file": folder / "log",
        }
        self._start("munged", "--foreground", *(f"--{name}={value}" for name, value in options.items()))
        self._wait_until("munged listens", socket_path.exists)
        return socket_path

    def _write_configuration(self, socket_path: Path) -> None:
        ctld_port, port_1, port_2 = free_ports(3)
        host = socket.gethostname().split(".")[0]
        user = subprocess.run(["id", "-un"], check=True, capture_output=True, text=True).stdout.strip()
        node = f"NodeHostname={host} NodeAddr=127.0.0.1 CPUs={self.cpus_per_node} RealMemory=64000"
        if self.gpus_per_node:
            node += f" Gres=gpu:{self.gpus_per_node}"
        # A script derives ports from the job id: two test runs on one machine must not both start at job 1.
        first_job = random.SystemRandom().randrange(1, 19_000)
        self.conf = self.base / "slurm.conf"
        self.conf.write_text(
            f"""
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ctld_port}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={socket_path},cred_expire={self.cred_expire_s}
StateSaveLocation={self.base}/state
SlurmdSpoolDir={self.base}/spool/%n
SlurmctldPidFile={self.base}/slurmctld.pid
SlurmdPidFile={self.base}/slurmd-%n.pid
SlurmctldLogFile={self.base}/log/slurmctld
SlurmdLogFile={self.base}/log/slurmd-%n
PlugStackConfig={self.base}/plugstack.conf
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
JobRequeue=1
KillWait=2
KillOnBadExit=1
SlurmdTimeout=10
FirstJobId={first_job}
ReturnToService=2
NodeName=n1 Port={port_1} {node}
NodeName=n2 Port={port_2} {node}
PartitionName=debug Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
PartitionName=short Nodes=n1,n2 MaxTime=10 State=UP
"""
        )
        (self.base / "plugstack.conf").touch()
        # SLURM ignores a GPU without a device file and takes its number from the file's name.
        gres = "AutoDetect=off\n"
        for number in range(self.gpus_per_node):
            (self.base / f"gpu{number}").touch()
            gres += f"NodeName=n[1-2] Name=gpu File={self.base}/gpu{number}\n"
        (self.base / "gres.conf").write_text(gres)
        (self.base / "cgroup.conf").write_text("CgroupPlugin=disabled\n")  # containers offer no cgroup to own

    def start_node(self, node: str) -> None:
        """Start a node's daemon: at boot, or again after :meth:`kill_node`."""
        self._start("slurmd", "-D", "-c", "-N", node, "-f", str(self.conf))

    def kill_node(self, node: str) -> None:
        """SIGKILL to everything that runs on a node, its daemon included: what a power failure leaves of it."""
        for number in self._processes_on(node):
            with contextlib.suppress(OSError):  # gone meanwhile
                os.kill(number, signal.SIGKILL)

    def runs_on(self, node: str, word: bytes) -> bool:
        """Whether a process with this word on its command line runs on a node."""
        return any(word in command for command in self._processes_on(node).values())

    def _processes_on(self, node: str) -> dict[int, list[bytes]]:
        """{process id: command line} of a node's daemon and of all that its jobs run there."""
        ours, result = f"SLURM_CONF={self.base}/slurm.conf".encode(), {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                environment = (process / "environ").read_bytes().split(b"\0")
                command = (process / "cmdline").read_bytes().split(b"\0")
                is_daemon = b"-N" in command and node.encode() in command
                if ours in environment and (is_daemon or f"SLURMD_NODENAME={node}".encode() in environment):
                    result[int(process.name)] = command
        return result

    def _start(self, name: str, *arguments: str) -> None:
        program = find_daemon(name)
        if program is None:
            raise FileNotFoundError(f"{name} is not installed")
        label = "-".join([name, *(a for a in arguments if re.fullmatch(r"n\d", a))])
        log = self._stack.enter_context((self.base / "log" / f"{label}.stderr").open("ab"))
        # So that a killed test run leaves no daemons behind.
        dies_with_us = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
        process = subprocess.Popen(
            [*dies_with_us, program, *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.environment(),
        )  # fmt: skip
        self._stack.callback(stop_process, process)

    def _cancel_all(self) -> None:
        """No job's processes may outlive the cluster: cancel, and wait until every job is really over."""
        self._call("scancel", "--state=PENDING")
        self._call("scancel", "--state=RUNNING")
        with contextlib.suppress(TimeoutError):
            self._wait_until("all jobs are over", lambda: not self._call("squeue", "-h").stdout.strip(), 20)

    def _end_leftovers(self) -> None:
        """Kills what still has this cluster in its environment: linuxproc loses sight of a dead script's children."""
        mark = f"SLURM_CONF={self.base}/slurm.conf".encode()
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                if process.name != str(os.getpid()) and mark in (process / "environ").read_bytes().split(b"\0"):
                    os.kill(int(process.name), signal.SIGKILL)

    def _nodes_idle(self) -> bool:
        return self._call("sinfo", "-h", "-N", "-p", "debug", "-o", "%t").stdout.split() == ["idle", "idle"]

    def _wait_until(self, label: str, condition: Callable[[], bool], limit_s: float = 60) -> None:
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimeoutError(f"SLURM: not within {limit_s:.0f} s: {label}\n{self.logs()}")
            time.sleep(0.25)  # most conditions start a client of SLURM's

    # ------------------------------------------------------------------ use

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """This process's environment with this cluster selected and any SLURM job around us forgotten."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SRUN"))}
        return {**kept, "SLURM_CONF": str(self.base / "slurm.conf"), **(extra or {})}

    def _call(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, env=self.environment(), timeout=60, check=False)

    def run(self, *command: str) -> str:
        """Standard output of a SLURM client command; raises with its standard error if it fails."""
        result = self._call(*command)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit status {result.returncode}: {result.stderr.strip()}")
        return result.stdout

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> int:
        """`sbatch OPTIONS script ARGUMENTS` from `cwd` with `env` on top of ours: the job id."""
        folder = Path(cwd or Path.cwd())
        result = subprocess.run(
            ["sbatch", "--parsable", *options, str(script), *arguments],
            capture_output=True, text=True, cwd=folder, env=self.environment(env), timeout=60, check=False,
        )  # fmt: skip
        if result.returncode:
            raise RuntimeError(f"sbatch: exit status {result.returncode}: {result.stderr.strip()}")
        return int(result.stdout.strip().split(";")[0])

    def info(self, job: int) -> dict[str, str]:
        """The fields of `scontrol show job`, e.g. JobState, Restarts, ExitCode, Dependency, NodeList, StdOut."""
        text = self.run("scontrol", "--oneliner", "show", "job", str(job))
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: int) -> str:
        return self.info(job)["JobState"]

    def exit_code(self, job: int) -> int:
        """Exit status of the batch script (a signal counts as 128 + its number, as in a shell)."""
        status, number = map(int, self.info(job)["ExitCode"].split(":"))
        return status or (128 + number if number else 0)

    def wait(self, job: int, limit_s: float = 120) -> str:
        """Waits until the job is over (a requeued job is not) and returns its state, e.g. COMPLETED."""
        self.wait_until(f"job {job} is over", lambda: self.state(job) not in ACTIVE_STATES, limit_s, job)
        return self.state(job)

    def wait_until(
        self, label: str, condition: Callable[[], bool], limit_s: float = 60, job: int | None = None
    ) -> None:
        """Polls `condition`; on time-out raises TimeoutError with the job's output and the cluster's logs."""
        try:
            self._wait_until(label, condition, limit_s)
        except TimeoutError as error:
            if job is None:
                raise
            raise TimeoutError(f"{error}\n--- job {job}: {self.info(job)}\n{self.output(job)}") from None

    def output(self, job: int) -> str:
        """What the job has written so far (standard output; standard error too unless it was sent elsewhere)."""
        path = Path(self.info(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """Tails of all daemon logs, for a failure's message."""
        parts = []
        for path in sorted((self.base / "log").iterdir()):
            if path.suffix == ".stderr" and path.with_suffix("").exists():
                continue  # the same lines again
            lines = path.read_text(errors="replace").splitlines()[-15:]
            parts.append(f"--- {path.name}\n" + "\n".join(lines))
        return "\n".join(parts)


def stop_process(process: subprocess.Popen[bytes], limit_s: float = 10) -> None:
    """SIGTERM, and SIGKILL for one that does not go."""
    process.terminate()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(command: Sequence[str]) -> int:
    """Run a command (default: a shell) with a cluster around it; the command's exit status."""
    with slurm_cluster() as cluster:
        shell = [os.environ.get("SHELL", "bash")]
        return subprocess.run(list(command) or shell, env=cluster.environment(), check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
