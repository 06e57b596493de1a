"""Save, load and resume under a given interpreter: ``PYTHON tests/pythons.py [DIRECTORY]``; 0: all is well.

Makes a tiny model, runs the whole pipeline for one step, runs it again for two (which resumes from what this
interpreter wrote), and compares the result with an undisturbed run; then asks ``inspect`` and ``convert --verify``.
How Python pickles differs between patch releases: run it under every interpreter the package promises.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import tiny

ROOT = Path(__file__).resolve().parent.parent


def trace_ds(folder: Path, *arguments: object) -> str:
    """What ``trace-ds ARGUMENTS`` prints, under this interpreter; it must end with 0."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-m", "trace_ds", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{platform.python_version()}: {' '.join(command)} ended with {result.returncode}:\n"
                         f"{result.stdout[-2000:]}{result.stderr[-2000:]}")  # fmt: skip
    return result.stdout


def shards(run: Path, step: int) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints" / f"step_{step:06d}").glob("*.pt"))}


def main(folder: Path) -> int:
    config = tiny.write_config(folder, tiny.make_model(folder / "model"), unlearning__save_every=1)
    through, resumed = ([config, "--run-dir", folder / name, "--set"] for name in ("through", "resumed"))
    for verb in ("prepare", "collect", "calibrate"):
        trace_ds(folder, verb, *through, "unlearning.steps=2")
    shutil.copytree(folder / "through", folder / "resumed")
    trace_ds(folder, "unlearn", *through, "unlearning.steps=2")
    trace_ds(folder, "unlearn", *resumed, "unlearning.steps=1")
    said = trace_ds(folder, "unlearn", *resumed, "unlearning.steps=2")
    assert "resumed after step 1" in said, said
    one, two = (shards(folder / name, 2) for name in ("through", "resumed"))
    assert one and one == two, "the resumed job's checkpoint differs from the undisturbed one's"
    trace_ds(folder, "inspect", folder / "resumed" / "checkpoints", "--verify")
    trace_ds(folder, "convert", folder / "resumed" / "checkpoints", folder / "converted", "--verify")
    print(f"Python {platform.python_version()}: saved, resumed after step 1 bit for bit, inspected, converted")
    return 0


if __name__ == "__main__":
    if len(sys.argv) > 1:
        sys.exit(main(Path(sys.argv[1]).resolve()))
    with tempfile.TemporaryDirectory() as made:
        sys.exit(main(Path(made)))
