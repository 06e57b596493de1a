"""`trace-ds demo` itself, whole, as a newcomer runs it; and what must hold of the real data and models it makes."""

from __future__ import annotations

import csv
import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from command import memory_of_tree
from forked import JOB, Server
from safetensors.numpy import load_file
from stage_calls import calibrate

from trace_ds.config.load import load_config
from trace_ds.run.directory import RunDirectory

COMMAND = ["demo", "--run-dir", "runs/demo"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A demo that was killed when its models began to train, and run again."""
    folder, peak = tmp_path_factory.mktemp("demo"), 0
    assert server.run(COMMAND, folder, **JOB, kill=("logs/demo", 2)).returncode == -signal.SIGKILL
    assert sorted(path.name for path in (folder / "runs" / "demo" / "models").iterdir()) == []
    variables = {"COLUMNS": "80", "DS_ACCELERATOR": None}  # which DeepSpeed would find by itself, and say so
    command = server.start(COMMAND, folder, variables, **JOB | {"time_s": 2700})
    while Path(f"/proc/{command}").exists():
        peak = max(peak, memory_of_tree(command))
        time.sleep(6.0)  # to look takes a while itself
    done = server.wait()
    (folder / "printed.txt").write_text(done.stdout)
    (folder / "errors.txt").write_text(done.stderr)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "runs/demo/report/index.html" in done.stdout and "runs/demo/verbatim/report/index.html" in done.stdout
    print(f"demo: {done.seconds / 60:.1f} minutes, peak memory {peak / 1e9:.2f} GB")
    assert 0 < peak < 6e9
    return folder / "runs" / "demo"


def scores(run: Path, name: str) -> dict[str, float]:
    result = json.loads((run / "evaluation" / f"{name}.json").read_text())["scores"]
    return {f"{item['task']} {item['metric']}": item["value"] for item in result}


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_model_knew_it_and_forgets_it(demo: Path) -> None:
    original, gold = scores(demo, "original"), scores(demo, "gold")
    assert original["elements accuracy"] >= 0.85 and original["other_facts accuracy"] >= 0.85
    assert gold["elements accuracy"] <= 0.40 and gold["other_facts accuracy"] >= 0.85
    for run in (demo, demo / "variants" / "uniform", demo / "variants" / "trace_loss"):
        assert scores(run, "unlearned")["elements accuracy"] <= 0.45
    passages = scores(demo / "verbatim", "original"), scores(demo / "verbatim", "gold")
    name = next(key for key in passages[0] if key.startswith("passages ") and "rouge" in key.lower())
    assert passages[0][name] > 0.7 and passages[1][name] < 0.4


@pytest.mark.slow
def test_it_leaves_the_whole_run_directory(demo: Path) -> None:
    records = list(csv.DictReader((demo / "report" / "scores.csv").read_text().splitlines()))
    assert {"original", "gold", "unlearned", "uniform", "trace_loss"} <= {item["model"] for item in records}
    manifest = json.loads((demo / "checkpoints" / "step_000100" / "manifest.json").read_text())
    assert (manifest["world"], manifest["ep"], manifest["zero_stage"]) == (2, 2, 3)
    names = set().union(*(load_file(path) for path in (demo / "model").glob("*.safetensors")))
    assert "model.layers.0.block_sparse_moe.experts.7.w3.weight" in names


ENDS = (
    "report: demo: ",
    "report: demo_verbatim: ",
    "forgot",
    "and kept a utility of",
    "against uniform weights",
    "One seed is no proof",
)


@pytest.mark.slow
def test_the_terminal_tells_the_story(demo: Path) -> None:
    """A line a stage and job with what it found and how long it took, and at the end what it all means; no library's
    own words."""
    folder = demo.parent.parent
    lines = (folder / "printed.txt").read_text().splitlines()
    assert (folder / "errors.txt").read_text() == "" and len(lines) <= 80, lines
    jobs = {stage: ["", " uniform", " trace_loss"] for stage in ("calibrate", "unlearn", "convert", "evaluate")}
    for stage, names in {"prepare": [""], "collect": [""], **jobs, "report": [""]}.items():
        for name in names:
            summary = [line for line in lines if re.match(rf"\[{stage}{name}\] .+ \([\d.]+ (s|min)\)$", line)]
            assert len(summary) == (1 if name == " trace_loss" else 2), (stage, name, lines)
    progress = re.compile(r"\[[a-z_ ]+\] [a-z0-9_ ]+: .* left")
    others = [line for line in lines[:-15] if line.startswith("[") and not progress.match(line)]
    assert all(re.search(r"\([\d.]+ (s|min)\)$", line) for line in others), others
    end = "\n".join(lines[-15:])
    assert all(words in " ".join(end.split()) for words in ENDS), end
    assert end.endswith("runs/demo/report/index.html\n  runs/demo/verbatim/report/index.html")
    kept = (demo / "logs" / "calibrate.jsonl").read_text() + (demo / "logs" / "unlearn.jsonl").read_text()
    assert "forget-critical experts; rule raking" in kept and "elements_accuracy" in kept


@pytest.mark.slow
@pytest.mark.parametrize(("recipe", "apply"), [("demo", "loss"), ("demo", "sampling"), ("demo_verbatim", "sampling")])
def test_weights_bring_selected_experts_closer(demo: Path, tmp_path: Path, recipe: str, apply: str) -> None:
    """The sentence of the abstract, on real routed data: nearer to the forget frequency than before, each by weights of
    tokens, their sum by weights of rows, under which a single expert may move away a little."""
    run = demo if recipe == "demo" else demo / "verbatim"
    for experts in ("all", "selected"):
        changes = [f"unlearning.apply={apply}", f"calibration.experts={experts}"]
        config, _ = load_config(recipe, changes, run)
        calibration = calibrate(config, RunDirectory(tmp_path / experts, parent=run))
        tensors = load_file(calibration.file("calibration.safetensors"))
        selected = tensors["selected_LE"].astype(bool)
        assert selected.any()
        before = np.abs(tensors["frequency_retain_LE"] - tensors["frequency_forget_LE"])[selected]
        after = np.abs(tensors["achieved_LE"] - tensors["frequency_forget_LE"])[selected]
        assert after.sum() < before.sum()
        if apply == "loss":
            assert (after <= before + 1e-9).all()


@pytest.mark.slow
def test_a_second_demo_has_nothing_to_do_and_changes_nothing(demo: Path, server: Server) -> None:
    files = [path for path in demo.rglob("*") if path.is_file() and path.parts[-2] not in ("logs",)]
    before = {path: path.stat().st_mtime_ns for path in files if "/tb/" not in str(path) and "report" not in str(path)}
    result = server.run(COMMAND, demo.parent.parent, **JOB)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("] already done\n") == 24 and len(result.stdout.splitlines()) < 60, result.stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before
