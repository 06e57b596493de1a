"""Try the package under every other Python of this machine that it promises, each in an environment made from nothing.

    python tools/try_pythons.py            # every interpreter found: on PATH, in /usr/bin, of pyenv
    python tools/try_pythons.py 3.10 3.13  # these only

In each: install the package with its dependencies as a user would (newest versions that fit), run a tiny model through
all stages, go on from its checkpoint with more steps, and check every byte that was written. Says which versions were
tried and which promised ones were not to be had; exit status 1 when one failed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = ("3.10", "3.11", "3.12", "3.13")  # requires-python of pyproject.toml
RUN = ("run", "config.yaml", "--run-dir", "runs/tiny")
VERSIONS = """
import importlib.metadata as found
print(", ".join(f"{name} {found.version(name)}" for name in ("torch", "transformers", "deepspeed", "numpy")))
"""


def interpreters() -> dict[str, Path]:
    """The oldest interpreter of each promised minor version, except the running one, by full version, in order."""
    pyenv = Path(os.environ.get("PYENV_ROOT", "~/.pyenv")).expanduser() / "versions"
    folders = [*map(Path, os.get_exec_path()), Path("/usr/bin"), *pyenv.glob("*/bin")]
    found: dict[tuple[int, ...], Path] = {}
    for path in (folder / f"python{minor}" for folder in folders for minor in MINORS):
        if not path.is_file():
            continue
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        version = re.fullmatch(r"Python (\d+)\.(\d+)\.(\d+)", done.stdout.strip())
        if version:  # a shim of a version manager may have none behind it
            found.setdefault(tuple(map(int, version.groups())), path)
    found.pop(sys.version_info[:3], None)  # the tests run under it
    oldest = {version[:2]: version for version in sorted(found, reverse=True)}
    return {".".join(map(str, version)): found[version] for version in sorted(oldest.values())}


def call(folder: Path, *command: str | Path) -> str:
    """Run a command in ``folder``; its output. Exits with it when the command fails."""
    kept = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    }
    done = subprocess.run(command, cwd=folder, env=kept, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit status {done.returncode}\n{done.stdout[-6000:]}")
    return done.stdout


def try_one(python: Path, folder: Path) -> str:
    """Install and run under one interpreter; the versions that were installed."""
    call(folder, sys.executable, "-m", "uv", "venv", "--quiet", "--python", python, "env")
    own = folder / "env" / "bin" / "python"
    call(folder, sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", own, ROOT)
    call(folder, own, ROOT / "tests" / "tiny.py", folder)
    call(folder, own, "-m", "trace_ds", *RUN)
    more = call(folder, own, "-m", "trace_ds", *RUN, "--set", "unlearning.steps=6")
    if "resumed after step 4" not in more or not (folder / "runs/tiny/checkpoints/step_000006").is_dir():
        raise SystemExit(f"the job did not go on from step 4:\n{more[-6000:]}")
    call(folder, own, "-m", "trace_ds", "inspect", "runs/tiny", "--verify")
    return call(folder, own, "-c", VERSIONS).strip()


def main() -> int:
    asked = sys.argv[1:] or list(MINORS)
    found = {
        version: path for version, path in interpreters().items() if version.startswith(tuple(f"{m}." for m in asked))
    }
    running = ".".join(map(str, sys.version_info[:3]))
    failed = 0
    for version, path in found.items():
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                told = try_one(path, Path(folder))
            except SystemExit as error:
                failed, told = 1, f"FAILED: {error}"
        print(f"Python {version}: {told} ({time.monotonic() - began:.0f} s)", flush=True)
    tried = [running, *found]
    absent = [minor for minor in asked if not any(version.startswith(f"{minor}.") for version in tried)]
    beside, missing = ", ".join(found) or "none", ", ".join(absent) or "none"
    print(f"Python {running} runs the tests; tried beside it: {beside}; promised and not here: {missing}")
    return failed


if __name__ == "__main__":
    sys.exit(main())
