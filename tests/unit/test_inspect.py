"""``trace-ds inspect``: every kind of path is recognised, and every kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file

from trace_ds.checkpoints.manifest import Manifest, point_latest, read_manifest, step_name
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.inspect import inspect, inspect_path
from trace_ds.tensors.model_files import SINGLE_NAME


def make_artefact(directory: Path, kind: str, inputs: dict[str, str], text: str = "content") -> artefact.Artefact:
    directory.mkdir(parents=True)
    (directory / "values.txt").write_text(text, encoding="utf-8")
    return artefact.describe(directory, kind, inputs, {"level": 1}, {"rows": 3})


def make_checkpoint(checkpoints: Path, step: int, calibration: str = "c") -> Path:
    directory = checkpoints / step_name(step)
    directory.mkdir(parents=True)
    for rank in range(2):
        torch.save({"step": step + rank}, directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")
    files = {path.name: artefact.file_entry(path) for path in sorted(directory.iterdir())}
    model = {"path": "/models/m", "fingerprint": "f"}
    versions = {"deepspeed": "0.19.8"}
    Manifest(step, 2, 2, 3, "mixtral", "j", model, calibration, "bf16", {"step": step}, versions, files).write(
        directory
    )
    return directory


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """A run directory whose stages are all done."""
    path = tmp_path / "run"
    RunDirectory(path).mark()
    data = make_artefact(path / "data", "data", {"tokenizer": "t", "forget": "f", "retain": "r"})  # as prepare does
    sides = {
        side: make_artefact(path / "statistics" / side, "statistics", {"data": data.content, "side": side}, side)
        for side in ("forget", "retain")
    }
    inputs = {"data": data.content, **{side: statistics.content for side, statistics in sides.items()}}
    calibration = make_artefact(path / "calibration", "calibration", inputs)
    for step in (2, 4):
        make_checkpoint(path / "checkpoints", step, calibration.content)
    point_latest(path / "checkpoints", 4)
    shutil.copytree(tiny_model, path / "model")
    (path / "evaluation").mkdir()
    (path / "evaluation" / "original.json").write_text("{}", encoding="utf-8")
    make_artefact(path / "report", "report", {})
    (path / "config.yaml").write_text("name: x\n", encoding="utf-8")
    return path


def test_a_whole_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = inspect(run)
    assert result.kind == "run" and not result.problems
    assert {name for name, state in result.facts.items() if state != "done"} == {"curve.json"}
    assert inspect_path(run) == 0 and "\nwhole (compared: sizes;" in capsys.readouterr().out
    for part in run.iterdir():
        if part.name != "data" and part.is_dir():
            shutil.rmtree(part)
    facts = inspect(run).facts
    assert facts["data"] == "done" and facts["model"] == "missing"
    assert inspect_path(run) == 0  # a run that has begun


def test_damage_in_a_run_is_named(run: Path) -> None:
    (run / "statistics" / "retain" / "values.txt").write_text("cut", encoding="utf-8")
    (run / "checkpoints" / "step_000004" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    (run / "model" / SINGLE_NAME).write_bytes(b"short")
    result = inspect(run)
    assert {name for name, state in result.facts.items() if state == "damaged"} == {
        "statistics/retain", "checkpoints", "model",
    }  # fmt: skip
    for word in ("values.txt", "zero_pp_rank_1", SINGLE_NAME):
        assert word in " ".join(result.problems)


def test_a_variant_uses_its_parents_data(run: Path) -> None:
    variant = run / "variants" / "uniform"
    RunDirectory(variant).mark()
    make_artefact(variant / "calibration", "calibration", {})
    facts = inspect(variant).facts
    assert facts["data"] == facts["calibration"] == inspect(run).facts["variants/uniform"] == "done"
    assert facts["model"] == "missing"
    (variant / "calibration" / "values.txt").write_text("cut", encoding="utf-8")
    result = inspect(run)
    assert result.facts["variants/uniform"] == "damaged" and "values.txt" in result.problems[0]


def test_an_artefact(run: Path) -> None:
    result = inspect(run / "calibration")
    assert (result.kind, result.facts["artefact"], result.facts["files"]) == ("artefact", "calibration", 1)
    assert not result.problems
    text = (run / "calibration" / "values.txt").read_text(encoding="utf-8")
    (run / "calibration" / "values.txt").write_text(text[::-1], encoding="utf-8")
    assert not inspect(run / "calibration").problems  # same size: only the hash tells
    assert "altered" in inspect(run / "calibration", verify=True).problems[0]
    (run / "calibration" / "artefact.json").write_text('{"kind": "data"}', encoding="utf-8")
    assert "damaged" in inspect(run / "calibration").problems[0]


def test_a_checkpoint_step(run: Path) -> None:
    step = run / "checkpoints" / "step_000004"
    result = inspect(step)
    expected = {"step": 4, "world": 2, "ep": 2, "zero_stage": 3, "family": "mixtral", "files": 2}
    assert {key: result.facts[key] for key in expected} == expected
    assert not inspect(step, verify=True).problems
    shard = step / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")  # the length of a comment
    assert "SHA-256" in inspect(step, verify=True).problems[0]
    shard.write_bytes(bytes(5))
    assert f"5 bytes instead of {size}" in inspect(step).problems[0]
    shard.unlink()
    assert "missing" in inspect(step).problems[0]
    (step / "manifest.json").unlink()
    result = inspect(step)
    assert result.kind == "checkpoint" and "no manifest" in result.problems[0]


def test_the_folder_of_checkpoints(run: Path) -> None:
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / "step_000004", checkpoints / "step_000006.tmp-17")  # left by a killed job: no damage
    result = inspect(checkpoints)
    assert (result.kind, result.facts["steps"], result.problems) == ("checkpoints", [2, 4], [])
    (checkpoints / "latest").write_text("step_000008\n", encoding="utf-8")
    assert "step_000008" in inspect(checkpoints).problems[0]


def test_a_model_directory(tiny_model: Path, tmp_path: Path) -> None:
    result = inspect(tiny_model)
    expected = sum(array.size for array in load_file(tiny_model / SINGLE_NAME).values())
    assert (result.kind, result.facts["family"], result.facts["parameters"]) == ("model", "mixtral", expected)
    shutil.copy(tiny_model / "config.json", tmp_path)
    assert inspect(tmp_path).problems and inspect_path(tmp_path) == 1


def test_a_converted_model_is_compared_with_its_report(tiny_model: Path, tmp_path: Path) -> None:
    convert_checkpoint(tiny_model, tmp_path / "model")
    assert not inspect(tmp_path / "model", verify=True).problems
    weights = tmp_path / "model" / SINGLE_NAME
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not inspect(tmp_path / "model").problems
    assert SINGLE_NAME in inspect(tmp_path / "model", verify=True).problems[0]
    with pytest.raises(UserError, match=SINGLE_NAME):
        convert_checkpoint(tmp_path / "model", tmp_path / "again", verify=True)


ARTEFACT, MANIFEST = "calibration/artefact.json", "checkpoints/step_000004/manifest.json"
DAMAGED: list[tuple[str, str | dict[str, Any]]] = [  # (file, its new text, or values of keys)
    *((file, "[]") for file in (ARTEFACT, MANIFEST, "model/config.json")),
    (ARTEFACT, ""),
    (MANIFEST, "[" * 100_000),
    (ARTEFACT, {"kind": 3}),
    (ARTEFACT, {"inputs": {"data": 3}}),
    (ARTEFACT, {"files": {"values.txt": {"bytes": "9", "sha256": ""}}}),
    (ARTEFACT, {"files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}),
    (MANIFEST, {"files": [1]}),
    (MANIFEST, {"step": "four"}),
    (MANIFEST, {"model": {"path": 3}}),
    (MANIFEST, {"format": 2}),
]


@pytest.mark.parametrize(("file", "damage"), DAMAGED)
def test_a_damaged_description_is_one_line(run: Path, file: str, damage: str | dict[str, Any]) -> None:
    path = run / file
    path.write_text(damage if isinstance(damage, str) else json.dumps(json.loads(path.read_text()) | damage))
    problems = inspect(path.parent, verify=True).problems
    assert len(problems) == 1 and "\n" not in problems[0] and path.name in problems[0]
    assert inspect_path(run) == 1


def test_checkpoints_that_no_reader_takes_are_not_called_whole(run: Path) -> None:
    """Of the right size and hash, but pickled with what no checkpoint needs; and all of them set aside."""
    for step in (2, 4):
        directory = run / "checkpoints" / step_name(step)
        manifest = read_manifest(directory)
        for name, entry in manifest.files.items():
            torch.save({"step": Path.cwd}, directory / name)
            entry.update(artefact.file_entry(directory / name))
        manifest.write(directory)
    assert inspect(run).facts["checkpoints"] == "damaged" and inspect_path(run) == 1
    for step in (2, 4):
        (run / "checkpoints" / step_name(step)).rename(run / "checkpoints" / f"{step_name(step)}.unreadable-1")
    (run / "checkpoints" / "latest").unlink()
    assert inspect(run).facts["checkpoints"] == "damaged"
    make_checkpoint(run / "checkpoints", 3)
    assert inspect(run).facts["checkpoints"] == "done"  # one set aside is no damage


@pytest.mark.parametrize("make", [lambda path: path.mkdir(), lambda path: path.write_text("x"), lambda path: None])
def test_anything_else_is_refused(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(UserError) as caught:
        inspect(path)
    assert "artefact" in caught.value.fix and str(path) in caught.value.line()
