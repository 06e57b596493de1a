"""A whole study on a tiny random model: killed, finished, run again; its runs are those of the pipeline."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import yaml
from distributed import run_distributed
from forked import JOB, Server, refuse

from trace_ds.config.load import load_config
from trace_ds.errors import JobFailed, UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.report import report_study
from trace_ds.studies import run_list, worker
from trace_ds.studies import study as study_module
from trace_ds.studies.worker import Study

BENCH: dict[str, Any] = {
    "seeds": [0, 1],
    "methods": {"uniform": {"calibration.rule": "uniform"}, "sampling": {}},
    "grid": {"unlearning.alpha": [1.0, 4.0]},
    "grids": {"sampling": {"unlearning.alpha": [4.0]}},
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
    while len(list(directory.glob("seed_*/trials/**/*.json"))) < 2 and Path(f"/proc/{first}").exists():
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    assert "left: 2 base models, 6 runs of 3 steps" in server.wait().stdout
    made = {path: path.read_bytes() for path in directory.glob("seed_*/trials/**/*.json")}
    done = server.run(["bench", recipe, "--run-dir", directory, "--workers", "2"], recipe.parent, **JOB)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in made.items())
    assert "same strength" in done.stdout and "own alpha" in done.stdout
    return directory


def single_process(world: Any, recipe: str, folder: str) -> dict[str, Any]:
    """In one process: the study anew, the study with a method changed, and the pipeline of one of its runs."""
    from trace_ds.config.load import dump_yaml, load_config
    from trace_ds.run.directory import RunDirectory
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
        todo = [job for job in Study(recipe, directory / "again", overrides).jobs(world) if not job.is_done()]
        for job in todo:
            job.do()
            assert job.is_done()
        made.append(sorted(str(job.result) for job in todo))
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
    return {"first": len(made[0]), "redone": made[1]}


@pytest.fixture(scope="module")
def alone(recipe: Path) -> dict[str, Any]:
    return run_distributed(single_process, 1, str(recipe), str(recipe.parent / "alone"))[0]


def test_a_killed_study_is_finished_and_a_second_one_writes_the_same_bytes(
    study: Path, recipe: Path, server: Server
) -> None:
    assert len(list(study.glob("seed_*/trials/**/*.json"))) == 2 * (2 + 1)
    before = {name: (study / name).read_bytes() for name in ("study.json", "frontier.csv")}
    again = server.run(["bench", recipe, "--run-dir", study, "--json"], recipe.parent)
    assert again.returncode == 0 and json.loads(again.stdout)["seeds"] == [0, 1]
    assert {name: (study / name).read_bytes() for name in before} == before
    assert before["frontier.csv"].count(b"\n") == 1 + 6 * 2  # steps 2 and 3
    text = report_study(RunDirectory.at(study)).read_text(encoding="utf-8")
    assert "questions_forget exact_match ↑" in text and "own alpha" in text
    row = next(r for r in json.loads(before["study.json"])["comparisons"] if r["strength"] == "own alpha")
    assert row["edges"] and all(seeds for seeds in row["edges"].values())  # two values: each is an end


def test_the_csv_alone_gives_the_comparisons_again(study: Path, recipe: Path) -> None:
    from tools.study_from_csv import comparisons, read_curves

    told = json.loads((study / "study.json").read_text())
    config, _ = load_config(str(recipe), [], "out")
    found = comparisons(config, read_curves(config, study / "frontier.csv", told["target"]))
    wanted = [row for row in told["comparisons"] if row["at"] != "cross"]
    assert len(found) == len(wanted) > 0
    for row, expected in zip(found, wanted, strict=True):
        assert row["seeds"] == expected["seeds"] and row["points"] == expected["points"]
        assert row["value"] == pytest.approx(expected["value"], rel=1e-5)  # the CSV has six digits


def test_neither_kills_nor_workers_change_a_result(study: Path, recipe: Path, alone: dict[str, Any]) -> None:
    assert alone["first"] == 2 + 6
    for path in sorted(study.glob("seed_*/trials/recipe/uniform/*.json")):
        assert path.read_bytes() == (recipe.parent / "alone/again" / path.relative_to(study)).read_bytes()


def test_a_changed_method_is_all_that_is_run_again(alone: dict[str, Any]) -> None:
    assert [path.split("/")[-5:] for path in alone["redone"]] == [
        [f"seed_{seed}", "trials", "recipe", "sampling", "alpha=4.0.json"] for seed in (0, 1)
    ]


def test_a_run_of_a_study_is_the_run_of_the_pipeline(study: Path, recipe: Path, alone: dict[str, Any]) -> None:
    run = recipe.parent / "alone" / "run"
    scored = json.loads((run / "evaluation" / "unlearned.json").read_text(encoding="utf-8"))["scores"]
    theirs = {f"{score['task']} {score['metric']}": score["value"] for score in scored}
    result = json.loads((study / "seed_1/trials/recipe/uniform/alpha=4.0.json").read_text(encoding="utf-8"))
    assert result["curve"][-1]["scores"] == theirs and result["curve"][-1]["step"] == 3
    manifest = json.loads((run / "checkpoints" / "step_000003" / "manifest.json").read_text(encoding="utf-8"))
    assert result["job"] == manifest["job"]


def identities(recipe: str | Path, directory: Path) -> list[str]:
    return [job.identity for job in Study(str(recipe), directory, []).jobs(None)]


def test_results_belong_to_what_the_files_hold_not_to_where_they_are(recipe: Path, tmp_path: Path) -> None:
    assert identities("bench_entangled", tmp_path / "here") == identities("bench_entangled", tmp_path / "moved")
    raw = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    shutil.copytree(raw["model"]["path"], tmp_path / "model")
    task = raw["evaluation"]["tasks"][0]
    shutil.copy(task["path"], tmp_path / Path(task["path"]).name)
    raw["model"]["path"], task["path"] = str(tmp_path / "model"), str(tmp_path / Path(task["path"]).name)
    changed = tmp_path / "recipe.yaml"
    changed.write_text(yaml.safe_dump(raw, sort_keys=False), encoding="utf-8")
    seen = [identities(recipe, tmp_path), identities(changed, tmp_path)]
    assert seen[0] == seen[1]
    with Path(task["path"]).open("a") as handle:
        handle.write("\n")
    seen.append(identities(changed, tmp_path))
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"abcd")
    seen.append(identities(changed, tmp_path))
    assert all(a != b for one, other in itertools.pairwise(seen[1:]) for a, b in zip(one, other, strict=True))


def test_workers_take_turns_on_the_gpus_that_are_given(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"nvidia{number}").touch()
    for inherited, wanted in (({}, list("01234567")), ({"CUDA_VISIBLE_DEVICES": "4,5"}, ["4", "5", "4"])):
        given = [worker.device_of(number, inherited, tmp_path) for number in range(len(wanted))]
        assert [environment["CUDA_VISIBLE_DEVICES"] for environment in given] == wanted
    assert "CUDA_VISIBLE_DEVICES" not in worker.device_of(0, {}, tmp_path / "none")


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


def test_a_killed_worker_ends_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_module, "do", dies)
    job = worker.StudyJob(tmp_path / "result.json", dict, "identity")
    with pytest.raises(JobFailed, match="was killed"):
        study_module._work(SimpleNamespace(asked=()), tmp_path / "logs", [job], 1, quiet=True)  # type: ignore[arg-type]
