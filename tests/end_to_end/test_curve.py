"""The forgetting-utility curve that an unlearning job writes of itself, on the sharded model, while it trains."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import jobs
import pytest
from processes import run_distributed
from stage_calls import convert, evaluate
from test_unlearn import calibrated, copy_of  # noqa: F401 (calibrated is a fixture)

from trace_ds.config.load import load_config
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.evaluation.metrics import require_level
from trace_ds.reporting.gather import gather
from trace_ds.run.curve import read_curve
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.unlearn import check as check_unlearn
from trace_ds.stages.unlearn import discard_checkpoints

TASKS = ["questions_forget", "questions_utility"]
CURVE = ["unlearning.evaluate.every=2", f"unlearning.evaluate.tasks={json.dumps(TASKS)}", "unlearning.save_every=2"]
CHECKPOINTS = ["evaluation.drift=false", "unlearning.keep=1000"]


def shard_bytes(run: Path) -> dict[str, bytes]:
    """What the last checkpoint holds beside its manifest, by file."""
    newest = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    return {
        path.name: path.read_bytes()
        for path in sorted(newest.rglob("*"))
        if path.is_file() and "manifest" not in path.name
    }


def curve_of(run: Path, step: int) -> list[dict[str, Any]]:
    return json.loads((run / "checkpoints" / f"step_{step:06d}" / "manifest.json").read_text())["trainer_state"][
        "curve"
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("ep", "stage", "loss"), [(2, 3, "npo"), (1, 1, "rmu")])
def test_a_curve_is_the_scores_of_the_checkpoints_and_changes_nothing(
    calibrated: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    ep: int,
    stage: int,
    loss: str,
) -> None:
    config, prepared = calibrated
    shape = [f"distributed.ep={ep}", f"unlearning.zero_stage={stage}", f"unlearning.forget_loss={loss}"]
    looked, unseen = copy_of(prepared, tmp_path / "looked"), copy_of(prepared, tmp_path / "unseen")
    stopped = [*shape, *CURVE, *CHECKPOINTS]
    for steps in (2, 5):  # goes on
        run_distributed(jobs.unlearn_job, 2, str(config), str(looked), [*stopped, f"unlearning.steps={steps}"])
    every = "unlearning.evaluate.every=2"  # as many layers are held
    run_distributed(jobs.unlearn_job, 2, str(config), str(unseen), [*shape, every, "unlearning.steps=5"])
    assert shard_bytes(looked) == shard_bytes(unseen)
    curve = curve_of(looked, 5)
    assert [point["step"] for point in curve] == [0, 2, 4, 5]
    loaded, _ = load_config(str(config), [*stopped, "unlearning.steps=5"], looked)
    run = RunDirectory.at(looked)
    convert(loaded, run)
    models = {f"at_{step}": tmp_path / f"at_{step}" for step in (2, 4)}
    for path, step in zip(models.values(), (2, 4), strict=True):
        options = {"base_model": Path(loaded.model.path), "dtype": loaded.model.dtype}
        convert_checkpoint(run.checkpoints / f"step_{step:06d}", path, **options)
    scored = loaded.evaluation.model_copy(update={"models": {name: str(path) for name, path in models.items()}})
    evaluate(loaded.model_copy(update={"evaluation": scored}), run)
    for point, name in zip(curve, ("original", *models, "unlearned"), strict=True):
        scores = json.loads((looked / "evaluation" / f"{name}.json").read_text())["scores"]
        assert [score["value"] for score in point["scores"]] == pytest.approx(
            [score["value"] for score in scores], abs=1e-6
        )
        assert [score | {"value": 0} for score in point["scores"]] == [score | {"value": 0} for score in scores]
    drawn = gather(looked).arms[0].checkpoints  # the report has the curve without a checkpoint scored
    assert list(drawn) == [2, 4, 5]
    assert [score.value for score in drawn[4].scores] == [score["value"] for score in curve[2]["scores"]]


@pytest.mark.slow
def test_a_job_that_keeps_nothing_leaves_its_curve(calibrated: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    """Also of a model that breaks down; stopped on the way it goes on; a damaged curve is refused in one line."""
    config, prepared = calibrated
    run = RunDirectory(copy_of(prepared, tmp_path / "run"))
    settings = [*CURVE, "unlearning.forget_loss=graddiff", "unlearning.steps=5", "unlearning.optimizer.lr=0.03"]
    run_distributed(jobs.unlearn_job, 1, str(config), str(run.path), settings)
    expected = json.loads(run.curve.read_text())
    assert [point["step"] for point in expected["curve"]] == [0, 2, 4, 5] and expected["failed_after"] is None
    assert curve_of(run.path, 5) == expected["curve"]
    alone = RunDirectory(copy_of(prepared, tmp_path / "alone"))
    (alone.path / "stop").touch()
    nothing = [*settings, "unlearning.keep=0"]
    with pytest.raises(AssertionError, match="StopRequested"):
        run_distributed(jobs.unlearn_job, 1, str(config), str(alone.path), nothing)
    run_distributed(jobs.unlearn_job, 1, str(config), str(alone.path), nothing)
    result = json.loads(alone.curve.read_text())
    assert result["curve"] == expected["curve"] and not list(alone.checkpoints.glob("step_*"))
    guarded = [*nothing, 'unlearning.evaluate.guards=["forget_nll <= 0.1"]']
    loaded, _ = load_config(str(config), guarded, alone.path)
    assert not check_unlearn(loaded, alone, 1).done()
    run_distributed(jobs.unlearn_job, 1, str(config), str(alone.path), guarded)
    assert check_unlearn(loaded, alone, 1).done()
    result = json.loads(alone.curve.read_text())
    assert result["failed_after"] == 2 and [point["step"] for point in result["curve"]] == [0, 2]
    for damage in (
        {"curve": []},
        {"curve": [*result["curve"][::-1]]},
        {"curve": [result["curve"][0] | {"scores": [{"task": "a", "metric": "b", "value": "c"}]}]},
    ):
        alone.curve.write_text(json.dumps(result | damage))
        with pytest.raises(UserError, match=r"curve\.json: the curve is damaged"):
            read_curve(alone.curve)
    kept = sorted(run.checkpoints.iterdir())
    discard_checkpoints(run, "a curve's identity")  # those of another job stay
    assert sorted(run.checkpoints.iterdir()) == kept and kept


@pytest.mark.parametrize("score", ["questions_forget", "other accuracy"])
def test_scores_that_end_a_job_are_those_that_it_makes(
    calibrated: tuple[Path, Path],  # noqa: F811
    score: str,
) -> None:
    config, run = calibrated
    until = "unlearning.evaluate.until=" + json.dumps([f"{score} <= 0.5"])
    with pytest.raises(UserError, match=re.escape(repr(score))):
        loaded, _ = load_config(str(config), [*CURVE, until], run)
        check_unlearn(loaded, RunDirectory(run), 1)


@pytest.mark.parametrize(
    ("kind", "bound", "message"),
    [
        ("until", "questions_forget accuracy <= 1.25", "questions_forget accuracy is a number from 0 to 1, not 1.25"),
        ("guards", "retain_overlap >= -0.1", "retain_overlap is a number from 0 to 1, not -0.1"),
        ("guards", "retain_nll <= 30", ""),
    ],
)
def test_a_bound_outside_of_its_score_is_refused(
    calibrated: tuple[Path, Path],  # noqa: F811
    kind: str,
    bound: str,
    message: str,
) -> None:
    config, run = calibrated
    require_level("text perplexity", 100.0, "")  # no task of these has one
    loaded, _ = load_config(str(config), [*CURVE, f"unlearning.evaluate.{kind}={json.dumps([bound])}"], run)
    with pytest.raises(UserError) if message else contextlib.nullcontext() as refused:
        check_unlearn(loaded, RunDirectory(run), 1)
    if message:
        assert str(refused.value) == f"unlearning.evaluate.{kind}: {message}. Fix: give one (30 % is 0.3)"
        assert refused.value.exit_status == 2


def test_tasks_of_a_curve_are_named(calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    config, run = calibrated
    with pytest.raises(UserError, match=r"names 'questions', which is not among evaluation.tasks .questions_forget, "):
        load_config(str(config), ['unlearning.evaluate.tasks=["questions"]', "unlearning.evaluate.every=2"], run)
    with pytest.raises(UserError, match=r"unlearning.evaluate.tasks needs unlearning.evaluate.every"):
        load_config(str(config), [f"unlearning.evaluate.tasks={json.dumps(TASKS)}"], run)
