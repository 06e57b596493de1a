"""The real command line without its four seconds of imports: a server has imported everything and forks for each call.

Each call is a process of its own with its own working directory, environment, files for standard output and error, a
bound on memory (beyond what the server has mapped) and on time. ``python tests/forked.py`` is the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from command import environment, tree

MEMORY_BYTES = 1 << 30
TIME_S = 20


@dataclass(frozen=True)
class Result:
    """How a call ended; ``returncode`` is that of a process (negative: by that signal)."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


class Server:
    """Runs ``trace-ds`` in forks of one process that has imported it."""

    def __init__(self, variables: dict[str, str] | None = None) -> None:
        command = [sys.executable, __file__]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        variables = variables or environment() | {"HF_HUB_OFFLINE": "1"}  # read when their libraries are imported
        self._process = subprocess.Popen(command, env=variables, **pipes)

    def run(
        self,
        arguments: Sequence[str | Path],
        cwd: Path,
        variables: dict[str, str] | None = None,
        time_s: int = TIME_S,
        memory_bytes: int = MEMORY_BYTES,
    ) -> Result:
        """One call of ``trace-ds ARGUMENTS`` in ``cwd``; each of the processes that it starts has the same bounds."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            request = {"arguments": [os.fsencode(str(item)).hex() for item in arguments], "cwd": str(cwd)}
            request |= {"variables": variables or {}, "out": folder, "time_s": time_s, "memory": memory_bytes}
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
            streams = [(Path(folder) / name).read_text(errors="replace") for name in ("stdout", "stderr")]
        return Result(answer["returncode"], *streams, answer["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


@contextlib.contextmanager
def serving(variables: dict[str, str] | None = None) -> Iterator[Server]:
    server = Server(variables)
    try:
        yield server
    finally:
        server.close()


def refuse(
    server: Server,
    folder: Path,
    *arguments: str | Path,
    variables: dict[str, str] | None = None,
    time_s: int = TIME_S,
) -> str:
    """Insist on exit status 2, one line on standard error and nothing written in ``folder``; return the line."""
    before = tree(folder)
    result = server.run(arguments, folder, variables, time_s)
    assert result.returncode == 2, result
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("trace-ds: error: "), result.stderr
    after = tree(folder)
    assert after == before, sorted(set(after) ^ set(before))
    return lines[0]


def _serve() -> None:
    import pyarrow.parquet
    import transformers

    _ = pyarrow.parquet, transformers.AutoTokenizer, transformers.AutoConfig, transformers.AutoModelForCausalLM
    for line in sys.stdin:
        request, began_s = json.loads(line), time.monotonic()
        child = os.fork()
        if child == 0:
            _run(request)
        status = os.waitpid(child, 0)[1]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # what it started and left
        answer = {"returncode": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - began_s}
        print(json.dumps(answer), flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    """In the child: be a process that was started as ``trace-ds ARGUMENTS``."""
    import trace_ds.cli

    status: Any = 1
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.update(request["variables"])
        encoding = request["variables"].get("PYTHONIOENCODING", "utf-8")
        for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
            path = "/dev/null" if name == "stdin" else f"{request['out']}/{name}"
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
        errors = ("strict", "backslashreplace")
        sys.stdout, sys.stderr = (open(n, "w", encoding=encoding, errors=errors[n - 1], closefd=False) for n in (1, 2))  # noqa: SIM115
        sys.argv = ["trace-ds", *(os.fsdecode(bytes.fromhex(item)) for item in request["arguments"])]
        mapped_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped_bytes + request["memory"], resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.alarm(request["time_s"])
        trace_ds.cli.main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve()
