"""A whole study on a tiny random model: killed, finished, run again; its runs are those of the pipeline.

(Many ranks, and a study on a cluster: tests/cluster/test_slurm.py.)
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
from forked import JOB, Server, refuse

from trace_ds.config.load import load_config
from trace_ds.studies.analysis import Comparison, Matched, matched
from trace_ds.studies.study import Study

BENCH: dict[str, Any] = {
    "seeds": [0, 1],
    "methods": {"uniform": {"calibration.rule": "uniform"}, "sampling": {}},
    "grid": {"unlearning.alpha": [1.0, 4.0]},
    "grids": {"uniform": {"unlearning.alpha": [1.0, 4.0, 1e38]}, "sampling": {"unlearning.alpha": [4.0]}},
    "forget": "questions_forget accuracy",
    "utility": ["questions_forget exact_match", "questions_utility accuracy util*"],
}
TASKS = ["questions_forget", "questions_utility"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """With dropout, so that a step's random numbers show in its result."""
    folder = tmp_path_factory.mktemp("study")
    model = Path(shutil.copytree(tiny_model, folder / "model"))
    raw = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps(raw | {"attention_dropout": 0.2}), encoding="utf-8")
    settings = {"unlearning__zero_stage": 1, "unlearning__steps": 3, "distributed": {"nproc": 1}}
    settings["unlearning__evaluate"] = {"every": 2, "rows": 0, "tasks": TASKS}
    return tiny.write_config(folder, model, bench=BENCH, **settings)


@pytest.fixture(scope="module")
def study(recipe: Path, server: Server) -> Path:
    """Killed after its first runs, then finished."""
    directory = recipe.parent / "out"
    first = server.start(["bench", recipe, "--run-dir", directory], recipe.parent, **JOB)
    while len(curves(directory)) < 2 and Path(f"/proc/{first}").exists():
        time.sleep(0.02)
    os.kill(first, signal.SIGKILL)
    assert "[bench] 8 runs of at most 3 steps, scored every 2: 4 methods" in server.wait().stdout
    contents = {path: path.read_bytes() for path in curves(directory)}
    done = server.run(["bench", recipe, "--run-dir", directory], recipe.parent, **JOB)
    assert done.returncode == 0, done.stderr
    assert all(path.read_bytes() == content for path, content in contents.items())
    assert "nothing to forget" in done.stdout  # a margin of .03 above chance: a random model knows nothing
    return directory


def curves(study: Path) -> list[Path]:
    return sorted([*study.glob("seed_*/curve.json"), *study.glob("seed_*/variants/*/curve.json")])


def test_a_killed_study_is_finished_and_a_second_one_writes_the_same_bytes(
    study: Path, recipe: Path, server: Server
) -> None:
    assert len(curves(study)) == 2 * (3 + 1)
    assert not list(study.glob("seed_*/**/step_*"))  # no weights are kept
    before = {name: (study / name).read_bytes() for name in ("study.json", "frontier.csv", "study.html")}
    again = server.run(["bench", recipe, "--run-dir", study, "--analyse"], recipe.parent)
    assert again.returncode == 0 and "No verdict: sampling and uniform both forgot on 0 of 2 seeds" in again.stdout
    assert {name: (study / name).read_bytes() for name in before} == before
    assert before["frontier.csv"].count(b"\n") == 1 + 6 * 3 + 2  # steps 0, 2, 3; those that diverge have step 0
    diverged = json.loads(before["study.json"])["diverged"]
    assert diverged == [f"seed {seed}, uniform, alpha=1e+38" for seed in (0, 1)]


def test_the_csv_alone_gives_the_comparisons_again(study: Path, recipe: Path) -> None:
    from tools.study_from_csv import read_curves

    config, _ = load_config(str(recipe), [], "out")
    read = {
        "csv": read_curves(config, study / "frontier.csv"),
        "runs": Study([str(recipe)], study, []).read_curves()[0],
    }

    def measure(steps: list[int], forget: list[float], utility: list[float]) -> Matched:
        return matched(steps, [1.0, *[0.0] * (len(forget) - 1)], utility, 0.5)  # as if each step had forgotten

    rows = {name: Comparison(config, curves, measure).rows() for name, curves in read.items()}
    assert len(rows["csv"]) == len(rows["runs"]) > 0
    for row, expected in zip(rows["csv"], rows["runs"], strict=True):
        assert row["seeds"] == expected["seeds"] and row["strengths"] == expected["strengths"]
        assert row["value"] == pytest.approx(expected["value"], rel=1e-5)  # the CSV has six digits


def test_a_run_of_a_study_is_the_run_of_the_pipeline(study: Path, recipe: Path, server: Server) -> None:
    """Alone, with checkpoints and the model scored: the same job, the same scores."""
    run = recipe.parent / "alone"
    changes = ["seed=1", "bench=null", "calibration.rule=uniform", "statistics.trace=true"]  # as the study records
    words = [word for change in changes for word in ("--set", change)]
    done = server.run(["run", recipe, "--run-dir", run, *words], recipe.parent, **JOB)
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((path / "curve.json").read_text()) for path in (study / "seed_1", run))
    assert [point["step"] for point in ours["curve"]] == [0, 2, 3]
    assert ours["curve"] == theirs["curve"] and ours["job"] == theirs["job"]
    scored = json.loads((run / "evaluation" / "unlearned.json").read_text(encoding="utf-8"))["scores"]
    assert ours["curve"][-1]["scores"] == [score for score in scored if score["task"] in TASKS]


@pytest.mark.parametrize("damage", ['{"curve": []}', "", None])
def test_a_curve_that_is_damaged_or_missing_is_one_line(
    study: Path, recipe: Path, server: Server, tmp_path: Path, damage: str | None
) -> None:
    """Never another result."""
    other = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    for name in ("study.json", "frontier.csv"):
        (other / name).unlink()
    path = curves(other)[-1]
    path.unlink()
    if damage is not None:
        path.write_text(json.dumps(json.loads(curves(study)[-1].read_text()) | json.loads(damage)) if damage else "")
    line = refuse(server, tmp_path, "bench", recipe, "--run-dir", other, "--analyse")
    assert str(path) in line and "curve" in line and "trace-ds unlearn" in line
    assert not (other / "study.json").exists()


def test_a_changed_method_is_all_that_is_run_again(study: Path, recipe: Path, server: Server, tmp_path: Path) -> None:
    other = Path(shutil.copytree(study, tmp_path / "study", symlinks=True))
    before = {path: path.stat().st_mtime_ns for path in curves(other)}
    change = ["--set", "bench.methods.sampling={calibration.ess_floor: 0.9}"]
    done = server.run(["bench", recipe, "--run-dir", other, *change], tmp_path, **JOB)
    assert done.returncode == 0, done.stderr
    again = [path for path in curves(other) if path.stat().st_mtime_ns != before[path]]
    assert len(again) == 2 and all("sampling" in path.parent.name for path in again)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distributed.ep=2"], "does not divide the world size 1"),
        (["distributed.nproc=999"], "999 processes on this machine"),
        (["unlearning.evaluate={every: null, tasks: []}"], "the runs are not scored"),
        (["bench.margin=1.25"], "questions_forget accuracy is a number from 0 to 1, not 1.5. Fix: give one"),
    ],
)
def test_runs_that_cannot_be_are_refused(
    recipe: Path, tmp_path: Path, server: Server, changes: list[str], message: str
) -> None:
    options = [word for change in changes for word in ("--set", change)]
    assert message in refuse(server, tmp_path, "bench", recipe, "--run-dir", tmp_path / "out", *options)


def test_inputs_made_for_a_seed_lie_in_a_directory_that_its_run_accepts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trace_ds.demo import run as demo
    from trace_ds.studies import study as module

    ran: list[str] = []

    def run_verb(verb: str, request: Any) -> int:
        request.check_run_directory()
        return ran.append(verb) or 0

    monkeypatch.setattr(demo, "prepare_inputs", lambda path, seed, regime: (path / "corpora").mkdir())
    monkeypatch.setattr(module, "run_verb", run_verb)
    one = Study(["bench_literal"], tmp_path / "study", ["distributed.nproc=2"])  # else this process joins a group
    module.run_seed(one.requests[201], "entangled")
    assert ran[0] == "prepare" and "unlearn" in ran
