"""docs/cluster.md followed to the letter: every `$` line typed on a real two-node cluster, its output compared.

The site file sets the partition of the chain, and the models are scored on both nodes as on one process.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import find_daemon, slurm_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
PAGE = (REPOSITORY / "docs" / "cluster.md").read_text(encoding="utf-8")
# An environment and a site file of one's own: `make test` has made the one, the other is this machine's business.
SETTING_UP = ("python3 -m venv", "source ", "pip install .", "cp slurm/site.env.example")
MANY_RUNS = (
    "trace-ds submit CONFIG",
    "trace-ds submit study.yaml",
    "sbatch --array=1-3",
)  # tests/cluster/test_slurm.py submits arrays
STATUS = {"TRACE_DS_STAGES=doctor": 1, "trace-ds submit try/config.yaml --nodes 3": 2}  # any other: 0


def commands() -> list[tuple[str, list[str]]]:
    """Each command of the page (continued lines joined) with the lines of output shown below it."""
    results: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("$ "):
                results.append((line[2:].partition("  #")[0].strip(), []))
            elif results:
                results[-1][1].append(line)
    return results


def comparable(text: str) -> str:
    """Without numbers, hashes, dates and the width of columns."""
    text = re.sub(r"\b[0-9a-f]{40}\b", "#", text)
    return re.sub(r"\s+", " ", re.sub(r"\d+([.,]\d+)*", "#", text)).strip()


@pytest.mark.slow
@pytest.mark.skipif(find_daemon("slurmctld") is None, reason="SLURM is not installed (apt-get install slurm-wlm munge)")
def test_the_page_can_be_followed(tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "slurm", tmp_path / "slurm", ignore=shutil.ignore_patterns("site.env"))
    (tmp_path / "tests").mkdir()
    shutil.copy(REPOSITORY / "tests" / "tiny.py", tmp_path / "tests")
    (tmp_path / "slurm" / "site.env").write_text("export SBATCH_PARTITION=short SBATCH_TIMELIMIT=10\n")
    steps = [step for step in commands() if not step[0].startswith((*SETTING_UP, *MANY_RUNS))]
    assert len(steps) >= 8
    ids: dict[str, str] = {}  # job ids of the page -> those of this cluster
    with slurm_cluster() as cluster:
        environment = cluster.environment({"PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""})
        environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
        for command, shown in steps:
            for theirs, ours in ids.items():
                command = command.replace(theirs, ours)
            done = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            printed = done.stdout + done.stderr
            expected = next((status for start, status in STATUS.items() if command.startswith(start)), 0)
            assert done.returncode == expected, (command, printed)
            for pattern in (r"^(\d+): ([a-z ]+)$", r"^Submitted (?:batch )?job (\d+)()$"):
                real = {name: number for number, name in re.findall(pattern, printed, re.MULTILINE)}
                for number, name in re.findall(pattern, "\n".join(shown), re.MULTILINE):
                    ids[number] = real[name]
            text = comparable(printed)
            for line in filter(str.strip, shown):
                for piece in re.split("…|│", comparable(line)):  # … left out, │ the cells of a table
                    assert piece.strip() in text, (command, line, printed)
            if "--chain" in command:
                assert cluster.run("squeue", "-h", "--format=%P|%l").split() == ["short|10:00"] * 6
                cluster.wait_until("the chain is over", lambda: not cluster.run("squeue", "-h").strip(), 400)
    run, alone = tmp_path / "runs" / "try", tmp_path / "runs" / "alone"
    assert (run / "report" / "index.html").is_file()
    shutil.copytree(run, alone, ignore=shutil.ignore_patterns("evaluation", "submitted"))
    command = [sys.executable, "-m", "trace_ds", "evaluate", "try/config.yaml", "--run-dir", str(alone)]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    for name in ("original.json", "unlearned.json"):
        shared, whole = (json.loads((folder / "evaluation" / name).read_text())["scores"] for folder in (run, alone))
        assert len(shared) == len(whole) > 0
        for score, reference in zip(shared, whole, strict=True):
            assert score == reference | {"value": pytest.approx(reference["value"], abs=1e-5)}
