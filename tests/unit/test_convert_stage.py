"""The stage: RUN/checkpoints/step_N → RUN/model, from real checkpoints with the project's own manifests."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from command import tree
from stage_calls import convert
from test_convert_engines import Case, checkpoints

from trace_ds.checkpoints.manifest import Manifest, point_latest, step_name
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import sha256_file

CASE = Case("mixtral", 3, 2)
MANIFEST = Manifest(1, 2, 2, 3, "mixtral", "job", {}, "calibration", "bf16", {}, {})


def put_checkpoint(run: RunDirectory, step: int, source_step: int) -> Path:
    """A complete checkpoint directory named ``step`` (its files say ``source_step``, as ZeRO's always did here)."""
    directory = run.checkpoints / step_name(step)
    shutil.copytree(checkpoints(2) / CASE.name / "step_000001", directory)
    files = {path.name: artefact.file_entry(path) for path in sorted(directory.glob("*.pt"))}
    model = {"path": str(checkpoints(2) / "base" / "mixtral"), "fingerprint": "f"}
    replace(MANIFEST, step=source_step, files=files, model=model).write(directory)
    point_latest(run.checkpoints, step)
    return directory


def make_config(**sections: Any) -> Config:
    data = {"forget": [{"path": "f.jsonl"}], "retain": [{"path": "r.jsonl"}]}
    model = {"path": str(checkpoints(2) / "base" / "mixtral")}
    return Config.model_validate(
        {"name": "trial", "model": model, "data": data, "unlearning": {"steps": 1}, **sections}
    )


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory.at(tmp_path / "run")
    put_checkpoint(run, 1, 1)
    return run


def test_the_newest_checkpoint_becomes_the_model(run: RunDirectory) -> None:
    from transformers import AutoModelForCausalLM

    convert(make_config(), run)
    report = json.loads((run.model / "conversion.json").read_text())
    assert report["source"]["manifest_sha256"] == sha256_file(run.checkpoints / "step_000001" / "manifest.json")
    model = AutoModelForCausalLM.from_pretrained(run.model)
    assert model.dtype == torch.bfloat16
    card = (run.model / "README.md").read_text()
    assert "# trial" in card and "weight rule" in card and "only the abstract" in card.lower()
    assert str(run.path) not in "".join(path.read_text() for path in run.model.glob("*.json"))


def test_done_is_not_done_again_and_a_rerun_gives_the_same_bytes(run: RunDirectory) -> None:
    convert(make_config(), run)
    first, inode = tree(run.model), (run.model / "conversion.json").stat().st_ino
    convert(make_config(), run)
    assert (run.model / "conversion.json").stat().st_ino == inode
    shutil.rmtree(run.model)
    convert(make_config(), run)
    assert tree(run.model) == first


def test_another_type_or_a_damaged_model_is_made_anew(run: RunDirectory) -> None:
    convert(make_config(), run)
    first = tree(run.model)
    fp32 = make_config()
    convert(fp32.model_copy(update={"model": fp32.model.model_copy(update={"dtype": "fp32"})}), run)
    assert json.loads((run.model / "config.json").read_text())["dtype"] == "float32"
    convert(make_config(), run)
    assert tree(run.model) == first
    with (run.model / "model.safetensors").open("ab") as handle:
        handle.truncate(1000)
    convert(make_config(), run)
    assert tree(run.model) == first


def test_a_damaged_newest_checkpoint_falls_back_loudly(run: RunDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = put_checkpoint(run, 2, 1)
    next(damaged.glob("*optim*")).write_bytes(b"")
    convert(make_config(unlearning={"steps": 2}), run)
    assert json.loads((run.model / "conversion.json").read_text())["source"]["name"] == "step_000001"
    said = capsys.readouterr().out
    assert "step_000002" in said and "of step 1 of 2" in said


def test_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="trace-ds unlearn"):
        convert(make_config(), RunDirectory.at(tmp_path / "empty"))
    assert not (tmp_path / "empty" / "model").exists()
