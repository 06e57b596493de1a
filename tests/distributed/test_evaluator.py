"""Scores of the model while it is trained: against brute force, what ends the job, recomputation."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import numpy as np
import pytest
from processes import run_distributed
from test_unlearn import calibrated, copy_of, losses_of, weights_of  # noqa: F401  (a fixture)

from trace_ds.checkpoints.manifest import complete_steps
from trace_ds.config.load import load_config
from trace_ds.config.sections.unlearning import EvaluateConfig
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import JobFailed, UserError
from trace_ds.run import artefact
from trace_ds.run.curve import has_ended
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import StageLog
from trace_ds.stages.unlearn import check as check_unlearn
from trace_ds.unlearning.evaluator import Evaluator, FixedRows

EVALUATE = ["unlearning.evaluate.every=2", "unlearning.evaluate.rows=5", "statistics.batch_rows=2"]
STRONG = ["unlearning.forget_loss=graddiff", "unlearning.optimizer.lr=0.01", "unlearning.alpha=0"]
SHAPE = ["distributed.ep=2"]
# name -> (overrides, part of the error; empty: the job ends well)
JOBS: dict[str, tuple[list[str], str]] = {
    "graddiff": (["unlearning.forget_loss=graddiff"], ""),
    "graddiff_recomputed": (["unlearning.forget_loss=graddiff", "unlearning.recompute=true"], ""),
    "evaluated": ([*STRONG, *EVALUATE], ""),
    "early": ([*STRONG, *EVALUATE, "unlearning.steps=9", 'unlearning.evaluate.until=["forget_nll >= 6"]'], ""),
    "stopped": (
        [*STRONG, *EVALUATE, 'unlearning.evaluate.guards=["retain_nll <= 5.51"]', "unlearning.save_every=1"],
        "JobFailed: stopped after step 2: retain_nll is",
    ),
    "drifted": (
        [*STRONG, *EVALUATE, 'unlearning.evaluate.guards=["retain_overlap >= 0.7"]', "unlearning.save_every=1"],
        "(guard: retain_overlap >= 0.7); the last checkpoint stands",
    ),
    "gradient": (
        ["unlearning.alpha=1e38", "unlearning.forget_loss=graddiff", "unlearning.micro_batch_rows=1"],
        "NumericalFailure: the gradient is not finite in step 1 (the loss is)",
    ),
}


@pytest.fixture(scope="module")
def finished(calibrated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:  # noqa: F811
    """The run directory of each of :data:`JOBS`, all in one group of two processes."""
    config, prepared = calibrated
    folder = tmp_path_factory.mktemp("watched")
    runs = {name: copy_of(prepared, folder / name) for name in JOBS}
    work = [(str(runs[name]), [*SHAPE, *overrides]) for name, (overrides, _) in JOBS.items()]
    for errors in run_distributed(jobs.unlearn_jobs, 2, str(config), work):
        for (name, (_, expected)), error in zip(JOBS.items(), errors, strict=True):
            assert bool(error) == bool(expected) and expected in error, (name, error)
    return runs


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "logs" / "unlearn.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == "evaluation"}


@pytest.mark.slow
def test_recomputed_activations_change_nothing(finished: dict[str, Path], tmp_path: Path) -> None:
    kept, recomputed = finished["graddiff"], finished["graddiff_recomputed"]
    np.testing.assert_allclose(losses_of(recomputed), losses_of(kept), rtol=1e-7)
    expected, result = (weights_of(run, 4, tmp_path / run.name) for run in (kept, recomputed))
    for name, value in expected.items():
        np.testing.assert_allclose(result[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_evaluations_equal_brute_force_and_do_not_depend_on_the_world(
    finished: dict[str, Path],
    calibrated: tuple[Path, Path],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    config, prepared = calibrated
    run = finished["evaluated"]
    result = evaluations(run)
    assert sorted(result) == [0, 2, 4]
    assert result[0]["forget_overlap"] == result[0]["retain_overlap"] == 1.0
    convert_checkpoint(run / "checkpoints" / "step_000004", tmp_path / "model")
    for side in ("forget", "retain"):
        arrow = run / "data" / f"{side}.arrow"
        rows = FixedRows.of(TokenDataset.open(arrow), 5, None).rows.tolist()
        assert len(set(rows)) == 5
        for step, model in ((0, tiny_model), (4, tmp_path / "model")):
            expected = jobs.brute_force_scores(model, tiny_model, arrow, rows)
            for name, value in expected.items():
                assert math.isclose(result[step][f"{side}_{name}"], value, rel_tol=1e-5), (side, step, name)
    alone = copy_of(prepared, tmp_path / "alone")
    run_distributed(jobs.unlearn_job, 1, str(config), str(alone), [*STRONG, *EVALUATE, "unlearning.optimizer.eps=0.1"])
    for name, value in evaluations(alone)[0].items():
        if name not in ("time_s", "event"):
            assert math.isclose(value, result[0][name], rel_tol=1e-6), name


@pytest.mark.slow
def test_a_job_that_reached_its_target_is_done(finished: dict[str, Path], calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    run = finished["early"]
    last = max(evaluations(run))
    assert 0 < last < 9 and evaluations(run)[last]["forget_nll"] >= 6 > evaluations(run)[last - 2]["forget_nll"]
    assert complete_steps(run / "checkpoints")[0][-1] == last
    for target, expected in ((6, True), (600, False)):
        overrides = [*SHAPE, *JOBS["early"][0], f'unlearning.evaluate.until=["forget_nll >= {target}"]']
        config, directory = load_config(str(calibrated[0]), overrides, run)
        paths = RunDirectory.at(directory)
        assert check_unlearn(config, paths, 2).done() is expected


@pytest.mark.slow
def test_a_guard_ends_the_job_without_saving(finished: dict[str, Path]) -> None:
    for name in ("stopped", "drifted"):
        assert complete_steps(finished[name] / "checkpoints") == ([1], []), name
        assert not (finished[name] / "curve.json").exists()
    assert not (finished["gradient"] / "checkpoints").exists()


def test_a_bound_on_the_routing_needs_recorded_routing(calibrated: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    config, run = calibrated
    guard = 'unlearning.evaluate.guards=["retain_overlap >= 0.5"]'
    with pytest.raises(UserError, match=r"unlearning\.evaluate\.guards needs unlearning\.evaluate\.every"):
        load_config(str(config), [guard], run)
    changed, _ = load_config(str(config), [*EVALUATE, guard], run)
    recorded = artefact.load_artefact(run / "statistics" / "retain", "statistics")
    old = copy_of(run, tmp_path / "old")
    for path in (old / "statistics" / "retain").glob("sample*"):
        path.unlink()
    artefact.describe(old / "statistics" / "retain", "statistics", recorded.inputs, recorded.settings, recorded.summary)
    with pytest.raises(UserError, match=r"unlearning\.evaluate needs the routing of a sample of tokens"):
        check_unlearn(changed, RunDirectory.at(old), 2)


@pytest.mark.parametrize("bound", ["retain_nll < 3", "retain_nll <= nan", "a b c <= 1"])
def test_what_is_no_bound(calibrated: tuple[Path, Path], bound: str) -> None:  # noqa: F811
    with pytest.raises(UserError, match="is no bound on a score"):
        load_config(str(calibrated[0]), [*EVALUATE, f"unlearning.evaluate.until={json.dumps([bound])}"], calibrated[1])


@pytest.mark.parametrize(
    ("rows", "accuracy", "end"),
    [
        ({"forget_nll": 3.0, "retain_nll": 4.0}, 0.51, ""),
        ({"forget_nll": 3.0, "retain_nll": 4.0}, None, ""),
        ({"forget_nll": 3.0, "retain_nll": 4.0}, 0.5, "forget_nll is 3 (until forget_nll >= 3); a accuracy is 0.5 "),
        ({"forget_nll": 3.0, "retain_nll": 4.1}, 0.5, "JobFailed: stopped after step 2: retain_nll is 4.1 (guard:"),
        ({"forget_nll": math.inf, "retain_nll": 4.0}, 0.5, "JobFailed: stopped after step 2: forget_nll is inf"),
        (None, 0.5, "JobFailed: stopped after step 2: log-probabilities of a task are not finite"),
    ],
)
def test_what_ends_a_job(rows: dict[str, float] | None, accuracy: float | None, end: str) -> None:
    """A guard comes first: a model that is past it has not reached its end. The frozen model is never judged."""
    bounds = {"until": ["forget_nll >= 3", "a accuracy <= 0.5"], "guards": ["retain_nll <= 4"]}
    settings = EvaluateConfig.model_validate({"every": 2, "tasks": ["a"], **bounds})
    scores = [{"task": "a", "metric": "accuracy", "value": accuracy}]
    points = iter([({"forget_nll": 9.0, "retain_nll": 9.0}, {"scores": [], "by_source": {}})])
    later = (rows or {}, None if rows is None else {"scores": scores, "by_source": {}})
    given: list[Any] = []

    def next_rows(engine: Any) -> dict[str, float]:
        given[:] = next(points, later)
        return dict(given[0])

    engine = SimpleNamespace(eval=lambda: None, train=lambda: None)
    evaluator = Evaluator(settings, StageLog("unlearn", None, None), next_rows, lambda: given[1])
    trainer_state: dict[str, Any] = {}
    evaluator.begin(engine, trainer_state, 0)
    assert evaluator.evaluate(engine, trainer_state, 1, last=False) == ""
    if end.startswith("JobFailed"):
        with pytest.raises(JobFailed, match=re.escape(end.removeprefix("JobFailed: "))):
            evaluator.evaluate(engine, trainer_state, 2, last=False)
        return
    reason = evaluator.evaluate(engine, trainer_state, 2, last=False)
    assert reason.startswith(end) and bool(reason) == bool(end)
    assert [point["step"] for point in trainer_state["curve"]] == [0, 2]
    assert has_ended(settings, trainer_state["curve"][-1]) == bool(end)


def test_recomputation_without_expert_parallelism(
    calibrated: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Every parameter, the experts' too, sharded by ZeRO-3 and gathered only while its module runs."""
    config, prepared = calibrated
    released = tmp_path / "released.json"
    released.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    settings = ["distributed.ep=1", "unlearning.forget_loss=graddiff", f"unlearning.ds_config={released}"]
    kept, recomputed = (copy_of(prepared, tmp_path / name) for name in ("kept", "recomputed"))
    work = [(str(kept), settings), (str(recomputed), [*settings, "unlearning.recompute=true"])]
    for errors in run_distributed(jobs.unlearn_jobs, 2, str(config), work):
        assert errors == ["", ""]
    assert losses_of(recomputed) == losses_of(kept)
