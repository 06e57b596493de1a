"""A whole run with as many experts, layers and selections per token as the largest model that the method is for.

Everything else of this model is tiny, so that a run is seconds of work: what grows with the number of experts (hooks,
counts, constraints, tensors, pages) is met at its real size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import JOB, Server

DEEPSEEK_V3: dict[str, Any] = {"layers": 61, "experts": 256, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}


@pytest.mark.slow
def test_a_whole_run_meets_the_floor(tmp_path: Path, server: Server) -> None:
    model = tiny.make_model(tmp_path / "model", "deepseek_v3", top_k=8, moe_intermediate_size=8, **DEEPSEEK_V3)
    config = tiny.write_config(tmp_path, model, statistics__batch_rows=32, unlearning__steps=2)
    retain = tmp_path / "corpora" / "retain.jsonl"  # raking factorises a matrix with a row for every token
    retain.write_text("".join(retain.read_text().splitlines(keepends=True)[:45]))
    run = tmp_path / "run"
    done = server.run(["run", config, "--run-dir", run], tmp_path, **JOB)
    assert done.returncode == 0, done.stderr[-2000:]
    diagnosis = json.loads((run / "calibration" / "diagnosis.json").read_text())
    assert diagnosis["constraints"] == (61 - 3) * 256
    assert 0.5 - 1e-9 <= diagnosis["row_ess_fraction"] < 0.505 and diagnosis["gap_closed"] > 0.02
    assert (run / "report" / "index.html").is_file() and (run / "evaluation" / "unlearned.json").is_file()
