"""The wheel, installed away from the source tree, holds everything the commands need.

A full install of the dependencies takes minutes, so the new environment sees those of this one through a path file; the
source tree is not on it (a path file's own path files are not read, so this one's editable install does not count).
"""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=kept, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", folder)
    run(sys.executable, "-m", "pip", "wheel", *options, ROOT, cwd=folder)
    (built,) = folder.glob("trace_ds-*.whl")
    return built


MARK = "=== a command ==="
# Each start of Python costs seconds; that the program starts is shown by one of them.
IN_ONE_PROCESS = f"""
from trace_ds.cli import app
for words in (
    "plan wmdp_cyber olmoe_1b_7b",
    "run demo --dry-run",
    "prepare config.yaml",
    "report config.yaml",
    "submit config.yaml --gpus-per-node 1 --chain --dry-run",
):
    print("{MARK}", flush=True)
    assert app(words.split(), standalone_mode=False) in (0, None), words
"""


def normal(distribution: str) -> str:
    """A distribution's name as the package index compares it."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def test_every_import_is_of_a_declared_dependency() -> None:
    """Not of one that another dependency happens to bring: an environment made from pyproject.toml alone is enough."""
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [
        *project["dependencies"],
        *(r for e in ("demo", "lm-eval") for r in project["optional-dependencies"][e]),
    ]
    declared = {normal(re.split(r"[ <>=!~;\[]", requirement)[0]) for requirement in requirements}
    owners = importlib.metadata.packages_distributions()
    strangers = {}
    for path in (ROOT / "trace_ds").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for top in {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"trace_ds"}:
                if declared.isdisjoint(map(normal, owners.get(top, [top]))):
                    strangers[top] = path.relative_to(ROOT)
    assert strangers == {}


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path) -> None:
    tracked = subprocess.check_output(["git", "ls-files", "trace_ds", "slurm"], cwd=ROOT, text=True).split()
    expected = {name if name.startswith("trace_ds/") else f"trace_ds/{name}" for name in tracked}
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert inside == expected
    assert any(name.endswith(".j2") for name in inside) and "trace_ds/slurm/common.sh" in inside


def test_commands_of_the_installed_wheel(wheel: Path, tiny_model: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", "--without-pip", "new", cwd=tmp_path)
    python = tmp_path / "new" / "bin" / "python"
    (site,) = (tmp_path / "new" / "lib").glob("python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=tmp_path)
    where = run(python, "-c", "import trace_ds; print(trace_ds.__file__)", cwd=tmp_path)
    assert where.startswith(str(tmp_path / "new"))
    trace_ds = python.with_name("trace-ds")
    assert "olmoe_1b_7b" in run(trace_ds, "recipes", cwd=tmp_path)
    tiny.write_config(tmp_path, tiny_model)
    plan, would, *_, submitted = run(python, "-c", IN_ONE_PROCESS, cwd=tmp_path).split(MARK)[1:]
    assert "6.919 B parameters" in plan
    assert "would run: prepare, collect" in would
    assert (tmp_path / "runs" / "tiny" / "report" / "index.html").is_file()
    assert submitted.count("sbatch --parsable") == 6
