"""Settings at their ends: each is refused in one line (exit status 2), fails as diverged (1), or has the right outcome.

One line a case. Each is a process of its own (:mod:`forked`), of one stage, on a run that has everything before it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from forked import JOB, Result, Server, refuse
from safetensors.numpy import load_file

VERBATIM = "evaluation.tasks=[{name: words, type: verbatim, path: words.jsonl, role: forget}]"
HUGE = 10**9


@pytest.fixture(scope="module")
def done(server: Server, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration, with the whole run of it beside it."""
    config = tiny.write_config(tmp_path_factory.mktemp("done"), tiny_model)
    (config.parent / "words.jsonl").write_text('{"prompt": "iron gold", "continuation": " lead tin zinc"}\n')
    result = server.run(["run", config, "--run-dir", "run"], config.parent, **JOB)
    assert result.returncode == 0, result
    return config


def start(server: Server, done: Path, folder: Path, verb: str, changes: list[str], *kept: str) -> Result:
    """One stage with ``changes``, in a copy of the ``kept`` parts of the run; never a traceback."""
    run = folder / "run"
    run.mkdir()
    for name in (".trace_ds.json", "config.yaml", *kept):
        whole = done.parent / "run" / name
        shutil.copytree(whole, run / name) if whole.is_dir() else shutil.copy(whole, run / name)
    words = [word for change in changes for word in ("--set", change)]
    result = server.run([verb, done, "--run-dir", run, *words], done.parent, **JOB)
    assert "Traceback" not in result.stderr, result.stderr
    return result


REFUSED = [
    ("data.context_length=1", "greater than or equal to 2"),
    (f"data.context_length={HUGE}", "less than or equal to 16777216"),
    ("statistics.batch_rows=0", "greater than or equal to 1"),
    ("unlearning.steps=0", "greater than or equal to 1"),
    ("unlearning.forget_rows=0", "greater than or equal to 1"),
    ("unlearning.alpha=-1", "greater than or equal to 0"),
    ("unlearning.alpha=1e39", "no number here can be above"),
    ("unlearning.optimizer.lr=0", "greater than 0"),
    ("unlearning.keep=1", "must be 0, or 2 or more"),
    ("unlearning.keep=0", "unlearning.keep 0 needs unlearning.evaluate.tasks"),
    ("unlearning.rmu.layer=3", "layer 3 does not exist: the model has 3 decoder layers"),
    ("unlearning.rmu.coefficient=0", "greater than 0"),
    ("calibration.ess_floor=0", "greater than 0"),
    ("calibration.ess_floor=1.01", "less than or equal to 1"),
    ("calibration.clip=1", "greater than 1"),
    ("calibration.detection.min_ratio=0", "greater than 0"),
    ("evaluation.max_new_tokens=0", "greater than or equal to 1"),
    (f"evaluation.nproc={HUGE}", f"{HUGE} processes on this machine"),
    (f"distributed.nproc={HUGE}", f"{HUGE} processes on this machine"),
    (f"distributed.threads={HUGE}", "less than or equal to 1024"),
    ("distributed.timeout_minutes=0", "greater than or equal to 1"),
    (f"distributed.timeout_minutes={HUGE}", "less than or equal to 525600"),
    (f"seed={2**63}", "less than 9223372036854775808"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED)
def test_refused_before_anything_is_written(server: Server, done: Path, change: str, message: str) -> None:
    assert message in refuse(server, done.parent, "run", done, "--run-dir", "other", "--set", change)


def statistics(run: Path) -> dict[str, np.ndarray]:
    return load_file(run / "statistics/retain/statistics.safetensors")


COLLECT = ["batch_rows=1", f"batch_rows={HUGE}", f"save_every={HUGE}", "save_every=1"]


@pytest.mark.parametrize("change", COLLECT)
def test_what_is_counted_is_the_same_in_any_batches(server: Server, done: Path, tmp_path: Path, change: str) -> None:
    result = start(server, done, tmp_path, "collect", [f"statistics.{change}"], "data")
    assert result.returncode == 0 and result.seconds < 60, result
    usual, actual = (statistics(run) for run in (done.parent / "run", tmp_path / "run"))
    for name in ("counts_LE", "documents"):
        assert name not in usual or np.array_equal(usual[name], actual[name])
    assert usual.keys() == actual.keys() and "counts_LE" in usual


@pytest.mark.parametrize("length", [2, 1 << 24])
def test_rows_of_any_length_hold_every_token(server: Server, done: Path, tmp_path: Path, length: int) -> None:
    result = start(server, done, tmp_path, "prepare", [f"data.context_length={length}"])
    assert result.returncode == 0, result
    usual, actual = (
        json.loads((run / "data/artefact.json").read_text())["summary"]
        for run in (done.parent / "run", tmp_path / "run")
    )
    for side in ("forget", "retain"):
        assert all(usual[side][key] == actual[side][key] for key in ("documents", "tokens"))


UNIFORM = "the rule raking gave uniform weights"
CALIBRATE = [
    (["calibration.ess_floor=1e-300"], ""),
    (["calibration.ess_floor=1"], ""),
    (["calibration.clip=3e38"], ""),
    (["calibration.clip=1.0000000000001"], UNIFORM),
    (["calibration.detection.min_ratio=1e38"], ""),
    (["calibration.detection.min_ratio=1e38", "calibration.if_none_found=stop"], "no forget-critical expert"),
    (["calibration.detection.min_ratio=1e-300"], ""),
    (["calibration.detection.layers=[0, 99]"], "layer 99 is not one of the model's 3 MoE layers"),
]


@pytest.mark.parametrize(("changes", "message"), CALIBRATE)
def test_weights_are_whole_and_above_the_floor(
    server: Server, done: Path, tmp_path: Path, changes: list[str], message: str
) -> None:
    result = start(server, done, tmp_path, "calibrate", changes, "data", "statistics")
    assert (result.returncode, message in result.stderr) == (2 if message else 0, True), result
    assert (tmp_path / "run/calibration").exists() == (not message)
    if not message:
        w = np.load(tmp_path / "run/calibration/row_weights.npy").astype(np.float64)
        w = w[w > 0]  # a row without a counted token has none
        floor = 1 if "calibration.ess_floor=1" in changes else 1e-300 if "e-300" in changes[0] else 0.5
        assert np.isfinite(w).all() and len(w) > 30 and w.sum() ** 2 / (len(w) * (w * w).sum()) > floor - 1e-3


NOT_FINITE = "is not finite"
STEPS = ["step_000002", "step_000004"]
UNLEARN: list[tuple[list[str], list[str] | str]] = [  # changes -> the checkpoints, or how it fails
    (["unlearning.steps=1"], ["step_000001"]),
    ([f"unlearning.save_every={HUGE}"], ["step_000004"]),
    ([f"unlearning.keep={HUGE}", "unlearning.save_every=1"], [f"step_00000{n}" for n in (1, 2, 3, 4)]),
    (["unlearning.forget_rows=1", "distributed.nproc=2"], STEPS),
    ([f"unlearning.micro_batch_rows={HUGE}"], STEPS),
    ([f"unlearning.evaluate.rows={HUGE}", "unlearning.evaluate.every=4", f"statistics.batch_rows={HUGE}"], STEPS),
    (["unlearning.alpha=0"], STEPS),
    (["unlearning.alpha=3e38"], STEPS),
    (["unlearning.rmu.layer=0"], STEPS),
    (["unlearning.rmu.layer=2"], STEPS),
    ([f"seed={2**63 - 1}"], STEPS),
    (["unlearning.gamma=3e38"], STEPS),
    (["unlearning.rmu.coefficient=3e38"], NOT_FINITE),
    (["unlearning.optimizer.lr=1e30"], NOT_FINITE),
    (["unlearning.optimizer.lr=3e38"], NOT_FINITE),
    (["unlearning.optimizer.weight_decay=3e38"], NOT_FINITE),
]


@pytest.mark.parametrize(("changes", "outcome"), UNLEARN)
def test_checkpoints_are_there_and_none_of_a_model_that_diverged(
    server: Server, done: Path, tmp_path: Path, changes: list[str], outcome: list[str] | str
) -> None:
    result = start(server, done, tmp_path, "unlearn", changes, "data", "statistics", "calibration")
    checkpoints = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("step_*"))
    if isinstance(outcome, str):
        assert result.returncode == 1 and outcome in result.stderr and not checkpoints, result
        assert len(result.stderr.strip().splitlines()) == 1
    else:
        assert (result.returncode, checkpoints) == (0, outcome), result


def scores(run: Path, model: str) -> list[float | None]:
    return [score["value"] for score in json.loads((run / f"evaluation/{model}.json").read_text())["scores"]]


EVALUATE = [  # changes, and whether the scores are those of the whole run
    (["evaluation.tasks=[]"], False),
    ([VERBATIM, "evaluation.max_new_tokens=1"], False),
    ([VERBATIM, f"evaluation.max_new_tokens={HUGE}"], False),
    (["evaluation.batch_rows=1"], True),
    ([f"evaluation.batch_rows={HUGE}"], True),
]


@pytest.mark.parametrize(("changes", "same"), EVALUATE)
def test_scores_of_no_task_and_of_many_at_once(
    server: Server, done: Path, tmp_path: Path, changes: list[str], same: bool
) -> None:
    parts = ("data", "statistics", "calibration", "checkpoints", "model")
    result = start(server, done, tmp_path, "evaluate", changes, *parts)
    assert result.returncode == 0, result
    actual = scores(tmp_path / "run", "unlearned")
    assert (actual == []) == ("evaluation.tasks=[]" in changes)
    assert not same or actual == pytest.approx(scores(done.parent / "run", "unlearned"))


def test_a_step_too_small_to_change_anything_changes_nothing(server: Server, done: Path, tmp_path: Path) -> None:
    """And is no forgetting: both models have the same scores."""
    parts = ("data", "statistics", "calibration")
    result = start(server, done, tmp_path, "run", ["unlearning.optimizer.lr=1e-300"], *parts)
    assert result.returncode == 0, result
    assert scores(tmp_path / "run", "unlearned") == scores(tmp_path / "run", "original")
