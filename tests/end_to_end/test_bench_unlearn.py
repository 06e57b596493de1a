"""The benchmark of a training step runs and says what it promises (its figures are not judged here)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from processes import run_distributed

TOOL = Path(__file__).parents[2] / "tools" / "bench_unlearn.py"


def small(world: Any, folder: str) -> str:
    """The report for tiny sizes; the measurements, processes of their own otherwise, run in this one."""
    spec = importlib.util.spec_from_file_location("bench_unlearn", TOOL)
    assert spec is not None and spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    sizes = ["--hidden", "32", "--layers", "1", "--rows", "2", "--context", "16", "--steps", "2"]

    def child(work: Path, label: str, *arguments: str) -> dict[str, Any]:
        return tool.run_child(tool.parse([*sizes, "--child", label, *arguments, "--work-dir", str(work)]))

    tool.child = child
    return json.dumps(tool.measure(tool.parse(sizes), Path(folder)))


@pytest.mark.slow
def test_the_step_benchmark_measures_what_it_says(tmp_path: Path) -> None:
    (text,) = run_distributed(small, 1, str(tmp_path))
    result = json.loads(text)
    ratios = {"step_time_ratio", "cpu_time_ratio", "peak_memory_ratio", "npo_peak_memory_ratio"}
    assert result.keys() == ratios | {"step_s", "memory_bytes"}
    assert result["step_s"].keys() == {"trace", "uniform"} and min(result["step_s"].values()) > 0
    assert result["memory_bytes"].keys() == {"trace", "uniform", "npo", "graddiff"}
    assert all(result[name] > 0 for name in ("step_time_ratio", "cpu_time_ratio"))
