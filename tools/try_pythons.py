"""Try the package under every other Python of this machine that it promises, each in an environment made from nothing;
under the oldest of them (or this one, where there is no other) with the oldest transformers that it promises.

    python tools/try_pythons.py            # every interpreter found: on PATH, in /usr/bin, of pyenv
    python tools/try_pythons.py 3.10 3.13  # these only

In each: install the package with its dependencies as a user would (newest versions that fit), run a tiny model through
all stages on two processes with expert parallelism, stop and resume its job (bit for bit the undisturbed one), verify
its checkpoints and convert them. With the oldest
transformers also the tests that compare us with it, family by family (the tests run on the newest). Says which versions
were tried and which promised ones were not to be had; exit status 1 when one failed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = ("3.10", "3.11", "3.12", "3.13")  # requires-python of pyproject.toml
TESTS = ("test_autoep.py", "test_families.py", "test_loading.py", "test_attention.py")  # of what transformers changes
VERSIONS = """
import importlib.metadata as found
print(", ".join(f"{name} {found.version(name)}" for name in ("torch", "transformers", "deepspeed", "numpy")))
"""


def interpreters() -> dict[str, Path]:
    """The oldest interpreter of each promised minor version but the running one, by full version, in order."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    folders = [*map(Path, os.get_exec_path()), Path("/usr/bin"), *pyenv.glob("*/bin")]
    result: dict[tuple[int, ...], Path] = {}
    for path in (folder / f"python{minor}" for folder in folders for minor in MINORS):
        if not path.is_file():
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.fullmatch(r"Python (\d+)\.(\d+)\.(\d+)", done.stdout.strip())
        if version:  # a shim of a version manager may have none behind it
            result.setdefault(tuple(map(int, version.groups())), path)
    oldest = {version[:2]: version for version in sorted(result, reverse=True)}
    oldest.pop(sys.version_info[:2], None)  # the tests run under it
    return {".".join(map(str, version)): result[version] for version in sorted(oldest.values())}


def call(folder: Path, *command: str | Path) -> str:
    """Run a command in ``folder``; its output. Exits with it when the command fails."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    kept["TRACE_DS_VERBOSE"] = "1"  # what a command says is looked at
    done = subprocess.run(command, cwd=folder, env=kept, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


def oldest_transformers() -> str:
    """The requirement that only the oldest version of transformers meets that pyproject.toml allows."""
    result = re.search(r'"transformers>=([\d.]+)', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert result is not None
    return f"transformers=={result[1]}"


def try_one(python: Path, folder: Path, *pinned: str) -> str:
    """Install and run under one interpreter; the versions that were installed.

    ``pinned``: requirements beside the package's own; with any, the tests that compare us with transformers run too.
    """
    call(folder, sys.executable, "-m", "uv", "venv", "--quiet", "--python", python, "env")
    own = folder / "env" / "bin" / "python"
    runner = ("pytest", "pytest-timeout", "hypothesis") if pinned else ()
    call(folder, sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", own, ROOT, *pinned, *runner)
    if pinned:
        call(
            folder,
            own,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            *(ROOT / "tests" / "distributed" / name for name in TESTS),
        )
    call(folder, own, ROOT / "tests" / "tiny.py", folder)

    def trace_ds(verb: str, run: str, steps: int) -> str:
        changes = ["--set=unlearning.save_every=1", f"--set=unlearning.steps={steps}"]
        changes += ["--set=distributed.nproc=2", "--set=distributed.ep=2"]
        return call(folder, own, "-m", "trace_ds", verb, "config.yaml", "--run-dir", run, *changes)

    trace_ds("run", "through", 2)
    made_by_unlearn = shutil.ignore_patterns("checkpoints", "model", "evaluation", "report", ".*lock")
    shutil.copytree(folder / "through", folder / "resumed", ignore=made_by_unlearn)
    trace_ds("unlearn", "resumed", 1)
    said = trace_ds("unlearn", "resumed", 2)
    shards = [
        {path.name: path.read_bytes() for path in (folder / run / "checkpoints/step_000002").glob("*.pt")}
        for run in ("through", "resumed")
    ]
    if "resumed after step 1" not in said or not shards[0] or shards[0] != shards[1]:
        raise SystemExit(f"the resumed job is not the undisturbed one, bit for bit:\n{said[-6000:]}")
    call(folder, own, "-m", "trace_ds", "inspect", "resumed/checkpoints", "--verify")
    call(folder, own, "-m", "trace_ds", "convert", "resumed/checkpoints", "converted", "--verify")
    return call(folder, own, "-c", VERSIONS).strip()


def main() -> int:
    requested = sys.argv[1:] or list(MINORS)
    result = {
        version: path
        for version, path in interpreters().items()
        if version.startswith(tuple(f"{m}." for m in requested))
    }
    running = ".".join(map(str, sys.version_info[:3]))
    trials = result or {running: Path(sys.executable)}
    failed = 0
    for number, (version, path) in enumerate(trials.items()):
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                summary = try_one(path, Path(folder), *([oldest_transformers()] if number == 0 else []))
            except SystemExit as error:
                failed, summary = 1, f"FAILED: {error}"
        print(f"Python {version}: {summary} ({time.monotonic() - began:.0f} s)", flush=True)
    tried = [running, *result]
    absent = [minor for minor in requested if not any(version.startswith(f"{minor}.") for version in tried)]
    beside, missing = ", ".join(result) or "none", ", ".join(absent) or "none"
    print(f"Python {running} runs the tests; tried beside it: {beside}; promised and not here: {missing}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
