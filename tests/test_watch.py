"""Looking at the model while it is trained: scores against brute force, guards, early stop, recomputation."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jobs
import numpy as np
import pytest
import torch
from distributed import run_distributed
from test_unlearn import calibrated, copy_of, losses_of, weights_of  # noqa: F401  (a fixture)

from trace_ds.checkpoints.manifest import complete_steps, read_manifest
from trace_ds.config.load import load_config
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.corpora.dataset import FlatArray, TokenDataset
from trace_ds.errors import UserError
from trace_ds.parallel.world import World
from trace_ds.routing.token_files import SampledRouting
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.convert import checkpoint_to_directory
from trace_ds.stages.unlearn import check_unlearn, make_evaluator
from trace_ds.unlearning.watch import HeldRows, Watch, judge

EVALUATE = ["unlearning.evaluate.every=2", "unlearning.evaluate.rows=5", "statistics.batch_rows=2"]
STRONG = ["unlearning.forget_loss=graddiff", "unlearning.optimizer.lr=0.01", "unlearning.alpha=0"]
SHAPE = ["distributed.ep=2"]
# name -> (overrides, part of the error; empty: the job ends well)
JOBS: dict[str, tuple[list[str], str]] = {
    "graddiff": (["unlearning.forget_loss=graddiff"], ""),
    "graddiff_recomputed": (["unlearning.forget_loss=graddiff", "unlearning.recompute=true"], ""),
    "rmu": ([], ""),
    "rmu_recomputed": (["unlearning.recompute=true"], ""),
    "evaluated": ([*STRONG, *EVALUATE], ""),
    "early": ([*STRONG, *EVALUATE, "unlearning.steps=9", "unlearning.evaluate.target_forget_nll=6"], ""),
    "stopped": (
        [*STRONG, *EVALUATE, "unlearning.guards.max_retain_ratio=1.012", "unlearning.save_every=1"],
        "JobFailed: stopped after step 2: the retain NLL is",
    ),
    "between": (  # broken from step 2 on, and every step could be saved before the evaluation that ends the job
        [
            *STRONG,
            *EVALUATE,
            "unlearning.evaluate.every=4",
            "unlearning.guards.max_retain_ratio=1.012",
            "unlearning.save_every=1",
        ],
        "JobFailed: stopped after step 4: the retain NLL is",
    ),
    "drifted": (
        [*STRONG, *EVALUATE, "unlearning.guards.min_retain_overlap=0.7", "unlearning.save_every=1"],
        "of the retain tokens' experts are still the frozen model's (bound 0.7); the last checkpoint stands",
    ),
    "backed_off": (
        [
            *STRONG,
            *EVALUATE,
            "unlearning.guards.max_retain_ratio=1.0001",
            "unlearning.guards.action=back_off",
            "unlearning.guards.max_back_offs=2",
            "unlearning.evaluate.every=1",
            "unlearning.save_every=1",
        ],
        "JobFailed: stopped after step 3: the retain NLL is",
    ),
    "recovered": (  # too long a step over a good one: the bound holds after step 1, not after 2, and then again
        [
            *EVALUATE,
            "unlearning.forget_loss=graddiff",
            "unlearning.gamma=0",
            "unlearning.alpha=1",
            "unlearning.optimizer.lr=0.02",
            "unlearning.guards.max_retain_ratio=1.0001",
            "unlearning.guards.action=back_off",
            "unlearning.evaluate.every=1",
            "unlearning.save_every=1",
            "unlearning.keep=9",
        ],
        "",
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


def log_of(run: Path) -> str:
    return (run / "logs" / "unlearn.jsonl").read_text()


def rates_of(run: Path) -> list[float]:
    lines = [json.loads(line) for line in log_of(run).splitlines()]
    return [line["lr"] for line in lines if line["event"] == "step"]


def evaluations(run: Path) -> dict[int, dict[str, float]]:
    lines = [json.loads(line) for line in (run / "logs" / "unlearn.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if line["event"] == "evaluation"}


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["rmu", "graddiff"])
def test_recomputed_activations_change_nothing(finished: dict[str, Path], tmp_path: Path, loss: str) -> None:
    kept, recomputed = finished[loss], finished[f"{loss}_recomputed"]
    np.testing.assert_allclose(losses_of(recomputed), losses_of(kept), rtol=1e-7)
    expected, found = (weights_of(run, 4, tmp_path / run.name) for run in (kept, recomputed))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_evaluations_equal_brute_force_and_do_not_depend_on_the_world(
    finished: dict[str, Path],
    calibrated: tuple[Path, Path],  # noqa: F811
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    config, prepared = calibrated
    run = finished["evaluated"]
    found = evaluations(run)
    assert sorted(found) == [0, 2, 4]
    assert found[0]["forget_overlap"] == found[0]["retain_overlap"] == 1.0
    checkpoint_to_directory(run / "checkpoints" / "step_000004", tmp_path / "model")
    for side in ("forget", "retain"):
        arrow = run / "data" / f"{side}.arrow"
        rows = HeldRows.of(TokenDataset.open(arrow), 5, None).rows.tolist()
        assert len(set(rows)) == 5
        for step, model in ((0, tiny_model), (4, tmp_path / "model")):
            expected = jobs.brute_force_scores(model, tiny_model, arrow, rows)
            for name, value in expected.items():
                assert math.isclose(found[step][f"{side}_{name}"], value, rel_tol=1e-5), (side, step, name)
    alone = copy_of(prepared, tmp_path / "alone")
    run_distributed(jobs.unlearn_job, 1, str(config), str(alone), [*STRONG, *EVALUATE, "unlearning.optimizer.eps=0.1"])
    for name, value in evaluations(alone)[0].items():
        if name not in ("time_s", "event"):
            assert math.isclose(value, found[0][name], rel_tol=1e-6), name


@pytest.mark.slow
def test_a_job_that_reached_its_target_is_done(finished: dict[str, Path], calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    run = finished["early"]
    last = max(evaluations(run))
    assert 0 < last < 9 and evaluations(run)[last]["forget_nll"] >= 6 > evaluations(run)[last - 2]["forget_nll"]
    assert complete_steps(run / "checkpoints")[0][-1] == last
    for target, expected in ((6, True), (600, False)):
        overrides = [*SHAPE, *JOBS["early"][0], f"unlearning.evaluate.target_forget_nll={target}"]
        config, directory = load_config(str(calibrated[0]), overrides, run)
        paths = RunDirectory.at(directory)
        assert check_unlearn(config, paths, 2).settled(config, paths) is expected


@pytest.mark.slow
def test_guards_stop_before_the_broken_state_is_saved(finished: dict[str, Path]) -> None:
    for name in ("stopped", "drifted", "between"):
        assert complete_steps(finished[name] / "checkpoints") == ([1], []), name
    for step in (2, 3):
        assert f"WARNING no checkpoint of step {step}: the retain NLL is" in log_of(finished["between"])
    assert not (finished["gradient"] / "checkpoints").exists()


@pytest.mark.slow
def test_backing_off_halves_the_learning_rate_and_saves_good_states_only(finished: dict[str, Path]) -> None:
    assert rates_of(finished["backed_off"]) == [0.01, 0.005, 0.0025]
    assert not (finished["backed_off"] / "checkpoints").exists()
    assert rates_of(finished["recovered"]) == [0.02, 0.02, 0.01, 0.01]
    checkpoints = finished["recovered"] / "checkpoints"
    assert complete_steps(checkpoints) == ([1, 3, 4], [])
    found = [read_manifest(checkpoints / f"step_{step:06d}").cursor.get("back_offs", 0) for step in (1, 3, 4)]
    assert found == [0, 1, 1]  # what a resumed job goes on with


def test_guards_need_evaluations(calibrated: tuple[Path, Path], tmp_path: Path) -> None:  # noqa: F811
    config, run = calibrated
    with pytest.raises(UserError, match=r"guards\.max_retain_ratio needs unlearning\.evaluate\.every"):
        load_config(str(config), ["unlearning.guards.max_retain_ratio=2"], run)
    changed, _ = load_config(str(config), [*EVALUATE, "unlearning.guards.min_retain_overlap=.5"], run)
    found = artefact.load(run / "statistics" / "retain", "statistics")
    old = copy_of(run, tmp_path / "old")
    for path in (old / "statistics" / "retain").glob("sample*"):
        path.unlink()
    artefact.describe(old / "statistics" / "retain", "statistics", found.inputs, found.settings, found.summary)
    with pytest.raises(
        UserError, match=r"min_retain_overlap needs the routing of a sample of tokens.*trace-ds collect"
    ):
        check_unlearn(changed, RunDirectory.at(old), 2)
    job = check_unlearn(changed, RunDirectory.at(run), 2)
    with pytest.MonkeyPatch.context() as patch:
        nothing = SampledRouting(np.zeros(0, np.int64), FlatArray([np.zeros((0, 3, 2), np.uint8)]))
        patch.setattr(SampledRouting, "of", lambda _: nothing)
        with pytest.raises(UserError, match=r"evaluate\.rows: none of the 5 retain rows .* has a token in the sample"):
            make_evaluator(changed, job, World(0, 1, torch.device("cpu")))


START = {"forget_nll": 2.0, "retain_nll": 2.0, "retain_overlap": 1.0}


@pytest.mark.parametrize(
    ("changes", "found", "back_offs", "action"),
    [
        ({}, {}, 0, "go_on"),
        ({"target": 3.0}, {"forget_nll": 2.9}, 0, "go_on"),
        ({"target": 3.0}, {"forget_nll": 3.0}, 0, "finish"),
        ({"ratio": 2.0}, {"retain_nll": 4.0}, 0, "go_on"),
        ({"ratio": 2.0}, {"retain_nll": 4.1}, 0, "stop"),
        ({"ratio": 2.0, "target": 3.0}, {"retain_nll": 4.1, "forget_nll": 9.0}, 0, "stop"),
        ({"overlap": 0.8}, {"retain_overlap": 0.79}, 0, "stop"),
        ({}, {"retain_nll": float("nan")}, 0, "stop"),
        ({}, {"forget_nll": float("inf")}, 0, "stop"),
        ({"ratio": 2.0, "action": "back_off"}, {"retain_nll": 5.0}, 2, "back_off"),
        ({"ratio": 2.0, "action": "back_off"}, {"retain_nll": 5.0}, 3, "stop"),
        ({"ratio": 2.0, "action": "back_off", "last": True}, {"retain_nll": 5.0}, 0, "stop"),
        ({"ratio": 2.0, "action": "back_off"}, {"retain_nll": float("nan")}, 0, "stop"),
        ({"ratio": 2.0, "action": "back_off"}, {"retain_nll": 5.0, "forget_nll": float("inf")}, 0, "stop"),
    ],
)
def test_verdicts(changes: dict[str, Any], found: dict[str, float], back_offs: int, action: str) -> None:
    settings = UnlearningConfig.model_validate(
        {
            "evaluate": {"every": 1, "target_forget_nll": changes.get("target")},
            "guards": {
                "max_retain_ratio": changes.get("ratio"),
                "min_retain_overlap": changes.get("overlap"),
                "action": changes.get("action", "stop"),
            },
        }
    )
    assert judge(settings, START, START | found, back_offs, last=changes.get("last", False)).action == action


def test_a_curve_ends_at_the_first_look_that_is_low_enough() -> None:
    """Both scores must be low, and they are what is kept; a job that goes on has reached nothing."""
    evaluate = {"every": 2, "tasks": ["a", "b"], "curve_only": True, "until": {"a accuracy": 0.5, "b accuracy": 0.4}}
    settings = UnlearningConfig.model_validate({"steps": 10, "evaluate": evaluate})
    looks = iter([(0.6, 0.3), (0.4, 0.5), (0.5, None), (0.45, 0.35)])

    def score(last: bool) -> dict[str, Any]:
        scores = [{"task": t, "metric": "accuracy", "value": v} for t, v in zip("ab", next(looks), strict=True)]
        return {"scores": scores, "by_source": {}}

    engine, log = SimpleNamespace(eval=lambda: None, train=lambda: None), SimpleNamespace()
    log.line = log.evaluation = lambda *told, **values: None
    watch, cursor = Watch(None, settings, log, score), {"reached_scores": {"a accuracy": 0.1}}  # type: ignore[arg-type]
    watch.begin(engine, cursor, 0)
    actions = []
    for step in range(1, 9):
        verdict = watch.look(engine, cursor, step, last=False)
        if verdict is not None:
            actions.append(verdict.action)
            assert ("reached_scores" in cursor) == (verdict.action == "finish")
    assert actions == ["go_on"] * 3 + ["finish"]
    assert cursor["reached_scores"] == {"a accuracy": 0.45, "b accuracy": 0.35}


def test_held_rows_are_evenly_spaced_and_counted(calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    dataset = TokenDataset.open(calibrated[1] / "data" / "retain.arrow")
    rows = HeldRows.of(dataset, 4, None).rows
    assert rows[0] <= 1 and rows[-1] >= len(dataset) - 2 and (np.diff(rows) > 0).all()
    assert len(HeldRows.of(dataset, 10**6, None).rows) <= len(dataset)


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
