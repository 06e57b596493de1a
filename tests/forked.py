"""The real command line without its seconds of imports: a server has imported everything and forks for each call.

Each call is a process of its own with its own working directory, environment, session, files for standard output and
error, and bounds on memory (beyond what the server has mapped) and on time. The local ranks that a command starts are
forked from it in turn. The server itself is forked from that of :mod:`distributed`; one that shall import its libraries
under other variables is ``python tests/forked.py``.

A program that starts commands itself, as ``srun`` does, is given :func:`warm_command`: what it starts is the small
process of tests/warm.py, which gives its words, environment, folder and files to a fork; neither outlives the other.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

from command import environment, tree
from processes import CONTEXT, PRELOADED

MEMORY_BYTES = 1 << 30
TIME_S = 20
JOB: dict[str, Any] = {"time_s": 600, "memory_bytes": None}  # bounds of a command that trains
GRACE_S = 30.0  # for what a command started, to end after it
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Result:
    """How a call ended; ``returncode`` is that of a process (negative: by that signal)."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Server:
    """Runs ``trace-ds`` in forks of one process that has imported it, one call at a time."""

    def __init__(self, variables: dict[str, str] | None = None) -> None:
        requested, self._asking = Pipe(duplex=False)
        self._answers, answer = Pipe(duplex=False)
        if variables is None:
            process = CONTEXT.Process(target=_serve, args=(requested, answer))
            process.start()
            self._wait: Callable[[int], object] = process.join
        else:
            ends = (requested.fileno(), answer.fileno())
            command = [sys.executable, __file__, *map(str, ends)]
            self._wait = subprocess.Popen(command, env=variables, pass_fds=ends).wait
        requested.close(), answer.close()

    def run(self, arguments: Sequence[str | Path], cwd: Path, *options: Any, **more: Any) -> Result:
        """One call of ``trace-ds ARGUMENTS`` in ``cwd``, as :meth:`start` has it."""
        self.start(arguments, cwd, *options, **more)
        return self.wait()

    def start(
        self,
        arguments: Sequence[str | Path],
        cwd: Path,
        variables: Mapping[str, str | None] | None = None,
        *,
        time_s: int = TIME_S,
        memory_bytes: int | None = MEMORY_BYTES,
        kill: tuple[str, int] | None = None,
    ) -> int:
        """Start ``trace-ds ARGUMENTS`` in ``cwd``; returns its process id, which is also that of its group.

        A variable that is None is taken out of the environment. With ``kill=(place, number)`` the command is killed
        (SIGKILL) when it, or a rank of it, touches a path with ``place`` in it for the ``number``-th time.
        """
        self._folder = tempfile.TemporaryDirectory()
        request: dict[str, Any] = {"arguments": list(map(str, arguments)), "cwd": str(cwd)}
        request |= {"variables": variables or {}, "out": self._folder.name, "time_s": time_s}
        self._asking.send(request | {"memory_bytes": memory_bytes, "kill": kill})
        return int(self._answers.recv())

    def wait(self) -> Result:
        """The end of what was started; nothing that it started may be left."""
        answer = self._answers.recv()
        with self._folder as folder:
            streams = [(Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        result = Result(answer["returncode"], *streams, answer["seconds"])
        assert not answer["outlived"], result
        return result

    def close(self) -> None:
        self._asking.close()
        self._wait(60)


@contextlib.contextmanager
def serving(variables: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(variables)
    try:
        yield server
    finally:
        server.close()


@contextlib.contextmanager
def warm_command(folder: Path) -> Iterator[str]:
    """What stands for ``trace-ds`` in the programs that start it, while the block runs; its socket is in ``folder``."""
    place = folder / "socket"
    process = CONTEXT.Process(target=_listen, args=(str(place),))
    process.start()
    while not place.exists():
        assert process.is_alive()
        time.sleep(0.05)
    yield f"{sys.executable} -SE {Path(__file__).with_name('warm.py')} {place}"
    process.terminate()
    process.join()
    place.unlink()


def refuse(
    server: Server,
    folder: Path,
    *arguments: str | Path,
    variables: dict[str, str] | None = None,
    time_s: int = TIME_S,
) -> str:
    """Insist on exit status 2, one line on standard error and nothing written in ``folder``; return the line."""
    before = tree(folder)
    result = server.run(arguments, folder, variables, time_s=time_s)
    assert result.returncode == 2, result
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("trace-ds: error: "), result.stderr
    after = tree(folder)
    assert after == before, sorted(set(after) ^ set(before))
    return lines[0]


def _import_all() -> None:
    import pyarrow.parquet
    import transformers

    for name in PRELOADED:
        with contextlib.suppress(ImportError):  # something optional
            importlib.import_module(name)
    _ = pyarrow.parquet, transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoModelForCausalLM
    importlib.import_module("warmed")


def _serve(requested: Connection, answer: Connection) -> None:
    _import_all()
    own = environment()
    os.environ.clear()
    os.environ.update(own)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a command leaves behind becomes a child of this process
    with contextlib.suppress(EOFError):
        while True:
            request, began_s = requested.recv(), time.monotonic()
            child = os.fork()
            if child == 0:
                _run(request)
            answer.send(child)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            ended = {"returncode": status, "seconds": time.monotonic() - began_s}
            answer.send(ended | {"outlived": _outlived(child)})


def _listen(place: str) -> None:
    """Serve tests/warm.py on a Unix socket."""
    _import_all()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
        server.bind(place)
        server.listen(64)
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the keepers
        while True:
            connection = server.accept()[0]
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _keep(connection)
            connection.close()


def _keep(connection: socket.socket) -> NoReturn:
    """Run what a connection asks for and tell its status; kill it when the other side is gone."""
    requested, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    arguments, folder, variables = json.loads(requested)

    def begin() -> None:
        os.setsid()
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(variables)
        for number, file in enumerate(files):
            os.dup2(file, number)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115

    child = os.fork()
    if child == 0:
        connection.close()
        _be(arguments, begin)
    ended, status = 0, 0
    while not ended and not select.select([connection], [], [], 0.02)[0]:
        ended, status = os.waitpid(child, os.WNOHANG)
    if ended:
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    else:
        os.kill(child, signal.SIGKILL)
    os._exit(0)


def _outlived(group: int) -> bool:
    """Whether processes of this group are still there after :data:`GRACE_S`; they are killed then."""
    deadline = time.monotonic() + GRACE_S
    with contextlib.suppress(ChildProcessError):  # none is left
        while time.monotonic() < deadline:
            if os.waitpid(-group, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        os.killpg(group, signal.SIGKILL)
        return True
    return False


def _run(request: dict[str, Any]) -> NoReturn:
    """In the child: be a process that was started as ``trace-ds ARGUMENTS``."""
    from trace_ds.parallel import launch

    def begin() -> None:
        os.setsid()
        os.chdir(request["cwd"])
        kept = {**os.environ, **request["variables"]}
        os.environ.clear()
        os.environ.update({name: value for name, value in kept.items() if value is not None})
        encoding = request["variables"].get("PYTHONIOENCODING", "utf-8")
        for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            path = "/dev/null" if name == "stdin" else f"{request['out']}/{name}"
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        errors = ("strict", "backslashreplace")
        sys.stdout, sys.stderr = (open(n, "w", encoding=encoding, errors=errors[n - 1], closefd=False) for n in (1, 2))  # noqa: SIM115
        if request["memory_bytes"] is not None:
            mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + request["memory_bytes"], resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(request["time_s"])
        launch.subprocess = SimpleNamespace(Popen=Rank)  # type: ignore[attr-defined]
        if request["kill"] is not None:
            sys.addaudithook(_killer(*request["kill"]))

    _be(request["arguments"], begin)


def _be(arguments: Sequence[str], begin: Callable[[], None]) -> NoReturn:
    """After ``begin``, be ``trace-ds ARGUMENTS`` to the end."""
    import trace_ds.cli

    status: Any = 1
    try:
        begin()
        sys.argv = ["trace-ds", *arguments]
        trace_ds.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


class Rank:
    """A rank as ``subprocess.Popen`` would have started it, forked from the command that starts it."""

    def __init__(
        self,
        command: Sequence[str],
        env: dict[str, str],
        pass_fds: Sequence[int],
        preexec_fn: Callable[[], None],
    ) -> None:
        assert command[:3] == [sys.executable, "-m", "trace_ds"]
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            os.environ.clear()
            os.environ.update(env)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            _be(command[3:], preexec_fn)

    def poll(self) -> int | None:
        return self._end(os.WNOHANG)

    def wait(self) -> int | None:
        return self._end(0)

    def _end(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self._pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self._pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _killer(place: str, number: int) -> Callable[[str, tuple[Any, ...]], None]:
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and any(place in str(one) for one in arguments[:2]):
            seen += 1
            if seen == number:
                os.kill(os.getpgid(0), signal.SIGKILL)  # the command itself, whose process group it is
                signal.pause()  # in one of its ranks: they die with it

    return hook


if __name__ == "__main__":
    _serve(*(Connection(int(end)) for end in sys.argv[1:]))
