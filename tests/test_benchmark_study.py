"""A whole study on a tiny random model: killed, finished, run again; its runs are those of the pipeline.

(Many ranks, and a study on a cluster: tests/test_slurm.py.)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from distributed import run_distributed
from forked import JOB, Server, refuse

from trace_ds.config.load import load_config
from trace_ds.errors import JobFailed, UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.studies import jobs, run_list
from trace_ds.studies import study as study_module
from trace_ds.studies.jobs import Study
from trace_ds.studies.matched import matched

BENCH: dict[str, Any] = {
    "seeds": [0, 1],
    "methods": {"uniform": {"calibration.rule": "uniform"}, "sampling": {}},
    "grid": {"unlearning.alpha": [1.0, 4.0]},
    "grids": {"uniform": {"unlearning.alpha": [1.0, 4.0, 1e38]}, "sampling": {"unlearning.alpha": [4.0]}},
    "score_every": 2,
    "score_at_end": ["questions_utility"],
    "margin": 1.0,
    "forget": "questions_forget accuracy",
    "utility": ["questions_forget exact_match", "questions_utility accuracy util*"],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """With dropout, so that a step's random numbers show in its result."""
    folder = tmp_path_factory.mktemp("study")
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(raw | {"attention_dropout": 0.2}), encoding="utf-8")
    return tiny.write_config(
        folder, model, bench=BENCH, unlearning__zero_stage=1, distributed={"nproc": 1}, unlearning__steps=3
    )


@pytest.fixture(scope="module")
def study(recipe: Path, server: Server) -> Path:
    """Killed (its workers too) after its first runs, then finished by two workers."""
    directory = recipe.parent / "out"
    first = server.start(["bench", recipe, "--run-dir", directory, "--workers", "1"], recipe.parent, **JOB)
    while len(curves(directory)) < 2 and Path(f"/proc/{first}").exists():
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    assert "[bench] runs: 8 of 3 steps, 2 times scored, on base models 0, 1" in server.wait().stdout
    made = {path: path.read_bytes() for path in curves(directory)}
    done = server.run(["bench", recipe, "--run-dir", directory, "--workers", "2"], recipe.parent, **JOB)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in made.items())
    assert "same strength" in done.stdout and "own alpha" in done.stdout
    return directory


def curves(study: Path) -> list[Path]:
    return sorted(study.glob("seed_*/trials/*/*/*/curve.json"))


def single_process(world: Any, recipe: str, folder: str) -> dict[str, Any]:
    """In one process: the study anew, the study with a method changed, and the pipeline of one of its runs."""
    from trace_ds.config.load import dump_yaml, load_config
    from trace_ds.stages.calibrate import calibrate
    from trace_ds.stages.collect import collect
    from trace_ds.stages.convert import convert
    from trace_ds.stages.evaluate import evaluate
    from trace_ds.stages.prepare import prepare
    from trace_ds.stages.unlearn import unlearn

    directory = Path(folder)
    changes = ["bench.methods.sampling={calibration.ess_floor: 0.9}"]
    made: list[list[str]] = []
    for overrides in ([], changes):
        study = Study([recipe], directory / "again", overrides)
        made.append([])
        for phase in study.phases:
            for job in [job for job in study.jobs(phase) if not job.is_done()]:
                job.do()
                assert job.is_done()
                made[-1].append(str(job.request.run.path.relative_to(directory / "again")))
    changes = ["seed=1", "bench=null", "calibration.rule=uniform", "statistics.trace=true"]  # as the study records
    asked, _ = load_config(recipe, changes, directory / "run")
    run = RunDirectory(directory / "run")
    run.create(dump_yaml(asked))
    prepare(asked, run)
    collect(asked, run, world)
    calibrate(asked, run)
    unlearn(asked, run, world)
    convert(asked, run)
    evaluate(asked, run)
    return {"first": made[0], "redone": made[1]}


@pytest.fixture(scope="module")
def alone(recipe: Path) -> dict[str, Any]:
    return run_distributed(single_process, 1, str(recipe), str(recipe.parent / "alone"))[0]


def test_a_killed_study_is_finished_and_a_second_one_writes_the_same_bytes(
    study: Path, recipe: Path, server: Server
) -> None:
    assert len(curves(study)) == 2 * (3 + 1)
    assert not list(study.glob("seed_*/trials/**/step_*"))  # no weights are kept
    before = {name: (study / name).read_bytes() for name in ("study.json", "frontier.csv")}
    again = server.run(["bench", recipe, "--run-dir", study, "--json"], recipe.parent)
    assert again.returncode == 0 and json.loads(again.stdout)["seeds"] == [0, 1]
    assert {name: (study / name).read_bytes() for name in before} == before
    assert (
        before["frontier.csv"].count(b"\n") == 1 + 2 + 6 * 2
    )  # the originals; steps 2 and 3 of those that do not diverge
    diverged = json.loads(before["study.json"])["diverged"]
    assert diverged == [f"seed {seed}, recipe, uniform, alpha=1e+38" for seed in (0, 1)]
    row = next(r for r in json.loads(before["study.json"])["comparisons"] if r["strength"] == "own alpha")
    assert row["edges"] and all(seeds for seeds in row["edges"].values())  # two values: each is an end


def test_the_csv_alone_gives_the_comparisons_again(study: Path, recipe: Path) -> None:
    from tools.study_from_csv import comparisons, read_curves

    told = json.loads((study / "study.json").read_text())
    config, _ = load_config(str(recipe), [], "out")
    found = comparisons(config, read_curves(config, study / "frontier.csv", partial(matched, target=told["target"])))
    wanted = [row for row in told["comparisons"] if row["at"] != "cross"]
    assert len(found) == len(wanted) > 0
    for row, expected in zip(found, wanted, strict=True):
        assert row["seeds"] == expected["seeds"] and row["points"] == expected["points"]
        assert row["value"] == pytest.approx(expected["value"], rel=1e-5)  # the CSV has six digits


def test_neither_kills_nor_workers_change_a_result(study: Path, recipe: Path, alone: dict[str, Any]) -> None:
    assert len(alone["first"]) == 2 + 4 + 8
    for path in curves(study):
        if path.parts[-3] != "sampling":  # made again, differently
            assert path.read_bytes() == (recipe.parent / "alone/again" / path.relative_to(study)).read_bytes()


def test_a_changed_method_is_all_that_is_run_again(alone: dict[str, Any]) -> None:
    calibrations = [path for path in alone["redone"] if "calibrated" in path]
    assert len(calibrations) == 2 and not set(calibrations) & set(alone["first"])
    runs = [f"seed_{seed}/trials/recipe/sampling/alpha=4.0" for seed in (0, 1)]
    assert alone["redone"] == [*calibrations, *runs] and set(runs) <= set(alone["first"])


def test_a_run_of_a_study_is_the_run_of_the_pipeline(study: Path, recipe: Path, alone: dict[str, Any]) -> None:
    run = recipe.parent / "alone" / "run"
    scored = json.loads((run / "evaluation" / "unlearned.json").read_text(encoding="utf-8"))["scores"]
    theirs = {f"{score['task']} {score['metric']}": score["value"] for score in scored}
    result = json.loads((study / "seed_1/trials/recipe/uniform/alpha=4.0/curve.json").read_text(encoding="utf-8"))
    assert [point["step"] for point in result["curve"]] == [2, 3]
    assert jobs.scores_of(result["curve"][-1])["scores"] == theirs
    assert {score["task"] for score in result["curve"][0]["scores"]} == {"questions_forget"}  # the other one at the end
    manifest = json.loads((run / "checkpoints" / "step_000003" / "manifest.json").read_text(encoding="utf-8"))
    assert result["job"] == manifest["job"]


def undone(recipe: Path, directory: Path) -> list[str]:
    """The phases of a study in which there is something to do."""
    study = Study([str(recipe)], directory, [])
    return [phase for phase in study.phases if not all(job.is_done() for job in study.jobs(phase))]


def test_results_belong_to_what_the_files_hold_not_to_where_they_are(study: Path, recipe: Path, tmp_path: Path) -> None:
    assert undone(recipe, tmp_path / "none") == ["bases", "calibrations", "runs"]
    moved = Path(shutil.copytree(study, tmp_path / "moved", symlinks=True))
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    shutil.copytree(raw["model"]["path"], tmp_path / "model")
    task = raw["evaluation"]["tasks"][0]
    shutil.copy(task["path"], tmp_path / Path(task["path"]).name)
    raw["model"]["path"], task["path"] = str(tmp_path / "model"), str(tmp_path / Path(task["path"]).name)
    changed = tmp_path / "recipe.yaml"
    changed.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    assert undone(recipe, study) == undone(changed, moved) == []
    with Path(task["path"]).open("a") as handle:
        handle.write("\n")
    assert undone(changed, moved) == ["bases", "runs"]  # what is scored with it
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    assert undone(changed, moved) == ["bases", "calibrations", "runs"]


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("bench.margin=2", "bench.margin"),
        ("bench.seeds=[0,1,2]", "bench.seeds"),
        ("unlearning.steps=4", "unlearning.steps"),
    ],
)
def test_a_directory_of_another_plan_is_refused(
    study: Path, recipe: Path, server: Server, change: str, key: str
) -> None:
    line = refuse(server, study, "bench", recipe, "--run-dir", study, "--set", change)
    assert f"a study with another plan was begun here ({key} differs)" in line
    done = server.run(["bench", recipe, "--run-dir", study, "--dry-run", "--set", "distributed.threads=2"], study)
    assert done.returncode == 0 and "[bench] runs: 8 of 3 steps" in done.stdout  # how it is computed is no plan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distributed.ep=2"], "expert-parallel size 2 does not divide the world size 1"),
        (["distributed.nproc=999"], "999 processes on this machine"),
        (["bench.grids={sampling: {unlearning.steps: [3]}}"], "would be run and never tuned"),
    ],
)
def test_jobs_that_cannot_be_run_are_refused(
    recipe: Path, tmp_path: Path, server: Server, changes: list[str], message: str
) -> None:
    options = [word for change in changes for word in ("--set", change)]
    assert message in refuse(server, tmp_path, "bench", recipe, "--run-dir", tmp_path / "out", *options)


def test_workers_take_turns_on_the_gpus_that_are_given(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    for ranks, inherited, wanted in (
        (1, {}, list("01234567")),
        (1, {"CUDA_VISIBLE_DEVICES": "4,5"}, ["4", "5", "4"]),
        (4, {}, ["0,1,2,3", "4,5,6,7", "0,1,2,3"]),
    ):
        given = [jobs.devices_of(number, ranks, inherited, tmp_path) for number in range(len(wanted))]
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in given] == wanted
    assert "CUDA_VISIBLE_DEVICES" not in jobs.devices_of(0, 1, {}, tmp_path / "none")


@pytest.mark.parametrize(
    ("forget", "message"),
    [("questions_forget exact_match", "no chance level"), ("general perplexity", "does not fall as more is forgotten")],
)
def test_a_study_without_a_target_is_refused(recipe: Path, forget: str, message: str) -> None:
    config, _ = load_config(str(recipe), [f"bench.forget={forget}"])
    if forget.startswith("general"):
        task = config.evaluation.tasks[0].model_copy(update={"name": "general", "type": "perplexity"})
        config.evaluation.tasks.append(task)
    with pytest.raises(UserError, match=message):
        run_list.check(config)
    run_list.check(load_config(str(recipe), [])[0])


def test_a_recipe_without_a_study_is_refused(tmp_path: Path, server: Server) -> None:
    fix = "start from `trace-ds recipes --show bench_entangled`"
    line = f"trace-ds: error: demo: the recipe has no bench section. Fix: {fix}"
    assert refuse(server, tmp_path, "bench", "demo") == line


def test_a_failing_worker_ends_the_study_with_its_line(recipe: Path, tmp_path: Path, server: Server) -> None:
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    raw["model"]["path"] = str(tmp_path / "absent")
    changed = tmp_path / "absent.yaml"
    changed.write_text(yaml.safe_dump(raw), encoding="utf-8")
    done = server.run(["bench", changed, "--run-dir", tmp_path / "out", "--workers", "1"], tmp_path, **JOB)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "absent" in done.stderr


def dies(*asked: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_ends_the_study(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "do", dies)
    study = Study([str(recipe)], tmp_path, [])
    with pytest.raises(JobFailed, match="was killed"), study_module.Workers(study, 1, 1, quiet=True) as pool:
        pool.finish("bases")
