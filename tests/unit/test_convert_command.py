"""``trace-ds convert SOURCE DESTINATION`` as a user types it: what it says, what it writes, what it refuses."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from command import tree
from forked import Server
from safetensors.torch import load_file
from test_convert_engines import Case, checkpoints

from trace_ds import cli
from trace_ds.run.artefact import file_entry

CASE = Case("mixtral", 3, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder as DeepSpeed wrote it, and its base model beside it."""
    shutil.copytree(checkpoints(2) / CASE.name, tmp_path / "checkpoints")
    shutil.copytree(checkpoints(2) / "base" / "mixtral", tmp_path / "base")
    return tmp_path


def test_a_checkpoint_becomes_a_model(folder: Path, server: Server) -> None:
    options = ["--tag", "step_000001", "--base-model", "base", "--dtype", "fp32", "--max-shard-size", "4KB"]
    before = tree(folder)
    result = server.run(["convert", "checkpoints", "model", *options, "--jobs", "2", "--verify"], folder)
    assert result.returncode == 0, result.stderr
    assert "from zero3 (step 1, world 2, ep 2), verified" in result.stdout
    assert result.stderr == "" and "0.0" not in result.stdout  # no progress of what takes no time
    report = json.loads((folder / "model" / "conversion.json").read_text())
    file_of = {name: file.name for file in (folder / "model").glob("*.safetensors") for name in load_file(file)}
    assert report["files"] == {name: file_entry(folder / "model" / name) for name in set(file_of.values())}
    assert report["dtype"] == "fp32" and report["tensors"] == len(file_of) > len(report["files"]) > 1
    shutil.rmtree(folder / "model")
    assert tree(folder) == before


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["trace-ds", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_options_of_the_other_form_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tree(folder)
    line = refused(capsys, monkeypatch, folder / "checkpoints", folder / "model", "--set", "seed=1")
    assert "--set means nothing with SOURCE DESTINATION" in line and tree(folder) == before
    assert "--tag means nothing with a CONFIG" in refused(capsys, monkeypatch, "demo", "--tag", "x")


def test_a_dry_run_checks_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [folder / "checkpoints", folder / "model", "--base-model", folder / "base", "--dry-run"]
    before = tree(folder)
    monkeypatch.setattr(sys, "argv", ["trace-ds", "convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and tree(folder) == before
    assert f"would write {folder / 'model'}" in (said := capsys.readouterr().out) and " parameters, " in said
    optimizer = max((folder / "checkpoints").rglob("*rank_1*_optim_states.pt"))  # of the newest step
    optimizer.unlink()
    assert optimizer.name in refused(capsys, monkeypatch, *arguments)
