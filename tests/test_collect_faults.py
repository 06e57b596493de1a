"""Collecting when things go wrong: a kill, NaN weights, corpora at the edge, files that do not belong together."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import pytest
import tiny
from command import trace_ds, tree
from distributed import run_distributed
from safetensors.numpy import load_file, save_file

from trace_ds.config.load import load_config
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.calibrate import calibrate
from trace_ds.stages.prepare import prepare


def prepared(folder: Path, model: Path, run: Path, **changes: object) -> Path:
    config = tiny.write_config(folder, model, **changes)
    loaded, directory = load_config(str(config), [], run)
    RunDirectory.at(directory).create("")
    prepare(loaded, RunDirectory.at(directory))
    return config


@pytest.mark.slow
def test_a_stopped_and_killed_collection_continues_and_ends_byte_identical(tiny_model: Path, tmp_path: Path) -> None:
    everything = {"statistics__nll": True, "statistics__hidden": True, "statistics__batch_rows": 1}
    config = prepared(tmp_path, tiny_model, tmp_path / "killed", **everything, statistics__save_every=3)
    prepared(tmp_path, tiny_model, tmp_path / "straight", **everything, statistics__save_every=3)
    (tmp_path / "killed" / "stop").touch()
    left = run_distributed(jobs.stopped_collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert left == ["forget: stopped on request after batch 3"] * 2
    assert not (tmp_path / "killed" / "stop").exists()
    with pytest.raises(AssertionError, match=r"rank \d (died|failed)"):
        run_distributed(jobs.killed_collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert "forget: continues after batch 3" in (tmp_path / "killed" / "logs" / "collect.jsonl").read_text()
    assert not (tmp_path / "killed" / "statistics" / "retain").exists()
    partial = tmp_path / "killed" / "statistics" / "retain.partial"
    assert any(path.name.startswith("state-00001") for path in partial.iterdir())
    run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert "retain: continues after batch" in (tmp_path / "killed" / "logs" / "collect.jsonl").read_text()
    run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "straight"), [])
    expected = tree(tmp_path / "straight" / "statistics")
    assert len(expected) >= 14 and tree(tmp_path / "killed" / "statistics") == expected


@pytest.mark.slow
def test_nan_weights_stop_before_anything_is_computed(tiny_model: Path, tmp_path: Path) -> None:
    model = damaged(tiny_model, tmp_path / "model", "model.layers.1.self_attn.k_proj.weight", float("nan"))
    config = prepared(tmp_path, model, tmp_path / "run")
    before = set(tree(tmp_path / "run"))
    result = trace_ds("collect", config, "--run-dir", tmp_path / "run", "--nproc", "1")
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert "model.safetensors: the weights model.layers.1.self_attn.k_proj.weight hold NaN" in lines[0]
    assert {name for name in tree(tmp_path / "run") if "statistics" in name} <= before


@pytest.mark.slow
def test_nan_router_weights_name_the_layer(tiny_model: Path, tmp_path: Path) -> None:
    name = next(name for name in load_file(tiny_model / "model.safetensors") if "layers.1" in name and "gate" in name)
    model = damaged(tiny_model, tmp_path / "model", name, 3e38)  # finite, but the logits are not
    config = prepared(tmp_path, model, tmp_path / "run")
    with pytest.raises(AssertionError, match="the router of decoder layer 1 gave NaN or infinite weights"):
        run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "run"), ["distributed.ep=2"])
    assert not list((tmp_path / "run" / "statistics").iterdir())


def damaged(source: Path, destination: Path, tensor: str, value: float) -> Path:
    import shutil

    shutil.copytree(source, destination)
    tensors = load_file(destination / "model.safetensors")
    tensors[tensor][:] = value
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination


def test_a_corpus_of_one_token_and_documents_split_and_empty(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny.write_config(tmp_path, tiny_model, data__add_bos=False, data__add_eos=False)
    loaded, run = load_config(str(config), [], tmp_path / "run")
    RunDirectory.at(run).create("")
    prepare(loaded, RunDirectory.at(run))
    assert "53 documents split at 24 tokens, 1 empty" in capsys.readouterr().out
    corpus = tmp_path / "corpora" / "retain.jsonl"
    corpus.write_text(json.dumps({"text": "a"}) + "\n")
    with pytest.raises(UserError, match=r"retain corpus has no usable token.*retain\.jsonl|retain\.jsonl.*no usable"):
        prepare(loaded, RunDirectory.at(run))


@pytest.mark.slow
def test_a_trace_of_another_dataset_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = prepared(tmp_path, tiny_model, tmp_path / "run")
    run_distributed(jobs.collect_job, 1, str(config), str(tmp_path / "run"), [])
    prepared(tmp_path, tiny_model, tmp_path / "run", data__context_length=20)
    loaded, run = load_config(str(config), [], tmp_path / "run")
    with pytest.raises(UserError, match="made with another"):
        calibrate(loaded, RunDirectory.at(run))
