"""Reading a model directory from headers alone: what is there, and each way it can be damaged."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from trace_ds.errors import UserError
from trace_ds.tensors.model_files import INDEX_NAME, SINGLE_NAME, read_model_directory, read_safetensors_header


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_model: Path, tmp_path: Path) -> Path:
    """The same model cut into three shards with an index."""
    directory = tmp_path / "sharded"
    directory.mkdir()
    tensors = load_file(tiny_model / SINGLE_NAME)
    names = sorted(tensors)
    placed = {}
    for part in range(3):
        file = f"model-{part + 1:05d}-of-00003.safetensors"
        chosen = names[part::3]
        save_file({name: tensors[name] for name in chosen}, directory / file)
        placed |= dict.fromkeys(chosen, file)
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": placed}), encoding="utf-8")
    shutil.copy(tiny_model / "config.json", directory)
    return directory


def test_every_tensor_lies_where_the_header_says(sharded: Path, tiny_model: Path) -> None:
    expected = load_file(tiny_model / SINGLE_NAME)
    files = read_model_directory(sharded)
    assert set(files.tensors) == set(expected)
    assert list(files.tensors) == sorted(files.tensors)
    assert files.model_type == "mixtral"
    assert files.parameters == sum(array.size for array in expected.values())
    assert files.bytes == 4 * files.parameters
    assert files.dtypes == {"F32": files.parameters}
    for name, entry in files.tensors.items():
        raw = (sharded / entry.file).read_bytes()[entry.begin : entry.end]
        np.testing.assert_array_equal(np.frombuffer(raw, np.float32).reshape(entry.shape), expected[name])


def refused(path: Path, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        read_model_directory(path)
    for word in words:
        assert word in caught.value.line()
    assert caught.value.fix


def test_missing_things_are_named(model: Path, sharded: Path, tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere", "no model directory")
    refused(model / "config.json", "is a file")
    (sharded / "model-00002-of-00003.safetensors").unlink()
    refused(sharded, "model-00002-of-00003.safetensors is missing", "1 of 3")
    (model / SINGLE_NAME).rename(model / "weights.bin")
    refused(model, "no weights")
    (model / "weights.bin").rename(model / "pytorch_model.bin")
    refused(model, "pickled", "pytorch_model.bin")
    (model / "config.json").unlink()
    refused(model, "no config.json")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(sharded: Path, keep: int) -> None:
    path = sharded / "model-00003-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(sharded, path.name)


def test_an_index_that_lies(sharded: Path) -> None:
    index = sharded / INDEX_NAME
    placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    other = next(file for file in placed.values() if file != placed["lm_head.weight"])
    for changed, word in (
        ({**placed, "model.ghost.weight": other}, "model.ghost.weight"),
        ({**placed, "lm_head.weight": other}, "lm_head"),
        ({**placed, "lm_head.weight": "../elsewhere.safetensors"}, "outside"),
        ({}, "weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": changed}), encoding="utf-8")
        refused(sharded, word)


def test_a_header_length_beyond_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as handle:  # a sparse file: the claimed header exists, but nobody should read it
        handle.write(struct.pack("<Q", 200_000_000))
        handle.truncate(300_000_000)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        read_safetensors_header(path)
