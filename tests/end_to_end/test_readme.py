"""Every command of the README is run by a test: the cheap ones here, the others where they are named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import tiny
from command import environment, run
from forked import JOB, Server

ROOT = Path(__file__).parents[2]
COMMANDS = [
    line.strip()
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
# command -> the test that runs it for real
ELSEWHERE = {
    "make demo": "tests/end_to_end/test_demo.py",  # `make demo` installs and runs `trace-ds demo`
    "make test": "this very run",
    "deepspeed --num_accelerators 2 --module trace_ds collect": "tests/end_to_end/test_launchers.py",
    "torchrun --nproc-per-node 2 -m trace_ds unlearn": "tests/end_to_end/test_launchers.py",
    "accelerate launch -m trace_ds unlearn": "tests/end_to_end/test_launchers.py",
    "mpiexec -n 2 python -m trace_ds collect": "tests/end_to_end/test_launchers.py",
    "sbatch --nodes=2 slurm/unlearn_mixtral.sh": "tests/cluster/test_slurm.py",
    "sbatch slurm/collect_stats.sh": "tests/cluster/test_slurm.py",
    "slurm/chain.sh": "tests/cluster/test_slurm.py",
}
HERE = [command for command in COMMANDS if not command.startswith(tuple(ELSEWHERE))]


@pytest.fixture(scope="module")
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("readme")
    tiny.write_config(directory, tiny_model)
    return directory


def test_the_readme_names_commands() -> None:
    assert {"make demo", "make test"} <= set(COMMANDS)
    assert len(HERE) >= 8 and all(command.startswith("trace-ds ") for command in HERE)
    for command in ELSEWHERE:
        assert any(item.startswith(command) for item in COMMANDS), command


@pytest.mark.slow
def test_commands_of_the_readme(folder: Path, server: Server) -> None:
    """In the README's order, in one folder, as a user would type them."""
    for command in HERE:
        result = server.run(command.split()[1:], folder, **JOB)
        allowed = (0, 1) if command == "trace-ds doctor" else (0,)  # 1: this machine lacks something, said with its fix
        assert result.returncode in allowed, (command, result.stdout[-2000:], result.stderr[-2000:])
        assert result.stdout.strip(), command


def test_make_targets() -> None:
    """What `make demo` and `make test` would do in a fresh clone."""
    for target, last in (("demo", "bin/trace-ds demo"), ("test", "bin/python -m pytest"), ("test-all", "-m slow")):
        result = run(["make", "--no-print-directory", "--dry-run", "--always-make", target], cwd=ROOT)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        assert any("prerequisites.sh" in line for line in lines) and any("-m venv" in line for line in lines)
        assert any("pip_install.sh" in line for line in lines) and last in lines[-1]


def test_missing_prerequisites_are_named(tmp_path: Path) -> None:
    script = ROOT / "tools" / "prerequisites.sh"
    result = run(["sh", script, "no-such-python"])
    assert result.returncode == 2 and "apt-get install python3 python3-venv" in result.stderr
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.8.1 && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = run(["sh", script, old])
    assert result.returncode == 2 and "needs Python 3.10 to 3.13; this is Python 3.8.1" in result.stderr
    no_venv = tmp_path / "python3-no-venv"
    no_venv.write_text(
        '#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; *print*) echo 3.11;; *) exit 0;; esac\n', encoding="utf-8"
    )
    no_venv.chmod(0o755)
    result = run(["sh", script, no_venv])
    assert result.returncode == 2 and "apt-get install python3.11-venv" in result.stderr
    assert subprocess.run(["sh", script], env=environment(), check=False).returncode == 0
