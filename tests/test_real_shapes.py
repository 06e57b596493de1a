"""Whole runs with as many experts, layers and selections per token as the models that the method is for.

Everything else of these models is tiny, so that a run is seconds of work: what grows with the number of experts (hooks,
counts, constraints, tensors, pages) is met at its real size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import JOB, Server

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe_1b_7b": ("olmoe", {"layers": 16, "experts": 64}),
    "deepseek_v3": (
        "deepseek_v3",
        {"layers": 61, "experts": 256, "moe_intermediate_size": 8, "first_k_dense_replace": 3, "n_group": 8}
        | {"topk_group": 4},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_a_whole_run_meets_the_floor(shape: str, tmp_path: Path, server: Server) -> None:
    family, size = SHAPES[shape]
    model = tiny.make_model(tmp_path / "model", family, top_k=8, **size)
    config = tiny.write_config(tmp_path, model, statistics__batch_rows=32, unlearning__steps=2)
    if shape == "deepseek_v3":  # raking factorises a matrix with a row for every token
        retain = tmp_path / "corpora" / "retain.jsonl"
        retain.write_text("".join(retain.read_text().splitlines(keepends=True)[:45]))
    run = tmp_path / "run"
    done = server.run(["run", config, "--run-dir", run], tmp_path, **JOB)
    assert done.returncode == 0, done.stderr[-2000:]
    diagnosis = json.loads((run / "calibration" / "diagnosis.json").read_text())
    layers = size["layers"] - size.get("first_k_dense_replace", 0)
    assert diagnosis["constraints"] == layers * size["experts"] and diagnosis["converged"]
    assert 0.5 <= diagnosis["ess_fraction"] < 0.505 and diagnosis["gap_closed"] > 0.02
    assert (run / "report" / "index.html").is_file() and (run / "evaluation" / "unlearned.json").is_file()
