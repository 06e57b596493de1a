"""The hub on loopback is one to the real clients: what they fetch from it, they find again without it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hub_server import Hub, serving

README = """---
configs:
- config_name: {config}
  data_files: [{{split: train, path: "{files}"}}]
---
# A data set
"""
DATA = {  # one format a data set: `datasets` reads all configurations as it reads the first
    "org/data": ("near", "near/train-*.parquet", [f"row {number}" for number in range(4)]),
    "org/lines": ("lines", "lines.jsonl", ["one", "two"]),
    "org/cells": ("cells", "cells.csv", ["three"]),
}


def weights(folder: Path, content: bytes) -> Path:
    """Files as a model has them, in eight places, so that a listing takes pages."""
    (folder / "sub").mkdir(parents=True)
    for number in range(6):
        (folder / f"part-{number}.json").write_text(json.dumps({"part": number}))
    (folder / "model.safetensors").write_bytes(content)
    (folder / "sub" / "pytorch_model.bin").write_bytes(b"never asked for")
    return folder


def data_sets(hub: Hub, folder: Path) -> None:
    """Parquet in two shards, JSON Lines and CSV, each with the YAML of its page."""
    for name, (config, files, rows) in DATA.items():
        place = folder / name
        (place / "near").mkdir(parents=True)
        (place / "README.md").write_text(README.format(config=config, files=files))
        for shard in range(2 if config == "near" else 0):
            table = pyarrow.table({"text": rows[2 * shard : 2 * shard + 2]})
            pyarrow.parquet.write_table(table, place / "near" / f"train-0000{shard}-of-00002.parquet")
        if config == "lines":
            (place / files).write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        if config == "cells":
            (place / files).write_text("\n".join(["text", *rows, ""]))
        hub.add("datasets", name, place)


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as found:
        yield found


def client(code: str, variables: dict[str, str], *arguments: str | Path) -> Any:
    """The JSON that a process prints which runs ``code`` with those variables."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


SNAPSHOT = """
import json, pathlib, sys
from huggingface_hub import snapshot_download
path = pathlib.Path(snapshot_download("org/tiny", allow_patterns=["*.safetensors", "*.json"], revision=sys.argv[1]))
print(json.dumps([path.name, {str(file.relative_to(path)): file.read_text() for file in path.rglob("*.*")}]))
"""

API = """
import json
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
api, told = HfApi(), {}
told["info"] = [api.model_info("org/tiny").sha, api.dataset_info("org/data").id]
told["tree"] = [entry.path for entry in api.list_repo_tree("org/tiny", recursive=True)]
told["top"] = [entry.path for entry in api.list_repo_tree("org/tiny")]
told["paths"] = [type(entry).__name__ for entry in api.get_paths_info("org/tiny", ["part-0.json", "sub", "none"])]
for name, kind, revision, file in (
    ("org/none", "model", None, "x"), ("org/tiny", "model", "v9", "part-0.json"), ("org/tiny", "model", None, "none"),
    ("org/shut", "model", None, "part-0.json"), ("org/own", "dataset", None, "part-0.json"),
):
    try:
        told[f"{name} {revision} {file}"] = hf_hub_download(name, file, repo_type=kind, revision=revision) and "read"
    except HfHubHTTPError as error:
        told[f"{name} {revision} {file}"] = f"{type(error).__name__} {error.response.status_code}"
print(json.dumps(told))
"""

LOAD = """
import json, sys
from datasets import load_dataset
streaming = sys.argv[1] == "stream"
told = {name: [row["text"] for row in load_dataset(name, config, split="train", streaming=streaming)]
        for name, config in zip(sys.argv[2::2], sys.argv[3::2])}
print(json.dumps(told))
"""


def test_a_snapshot_follows_the_revision_and_stays_when_the_hub_is_gone(hub: Hub, tmp_path: Path) -> None:
    first = hub.add("models", "org/tiny", weights(tmp_path / "first", b"weights" * 1000))
    hub.add("models", "org/tiny", tmp_path / "first", ref="v1")
    online = hub.environment(tmp_path / "home")
    commit, files = client(SNAPSHOT, online, "main")
    assert commit == first and files["model.safetensors"] == "weights" * 1000
    assert sorted(files) == ["model.safetensors", *(f"part-{number}.json" for number in range(6))]
    second = hub.add("models", "org/tiny", weights(tmp_path / "second", b"other"))
    assert client(SNAPSHOT, online, "main")[0] == second
    assert client(SNAPSHOT, online, first) == [first, files]
    asked = len(hub.requests)
    assert client(SNAPSHOT, hub.environment(tmp_path / "home", offline=True), "main")[1]["model.safetensors"] == "other"
    assert len(hub.requests) == asked


def test_the_rest_of_the_protocol(hub: Hub, tmp_path: Path) -> None:
    folder = weights(tmp_path / "model", b"w")
    commit = hub.add("models", "org/tiny", folder)
    data_sets(hub, tmp_path / "data")
    hub.add("models", "org/shut", folder, gated=True, readers=("friend",))
    hub.add("datasets", "org/own", folder, private=True, readers=("friend",))
    told = client(API, hub.environment(tmp_path / "home"))
    names = ["model.safetensors", *(f"part-{number}.json" for number in range(6)), "sub"]
    assert told == {
        "info": [commit, "org/data"],
        "tree": [*names, "sub/pytorch_model.bin"],
        "top": names,
        "paths": ["RepoFile", "RepoFolder"],
        "org/none None x": "RepositoryNotFoundError 401",
        "org/tiny v9 part-0.json": "RevisionNotFoundError 404",
        "org/tiny None none": "RemoteEntryNotFoundError 404",
        "org/shut None part-0.json": "GatedRepoError 401",
        "org/own None part-0.json": "RepositoryNotFoundError 401",
    }
    friend = client(API, hub.environment(tmp_path / "other", token="friend"))
    assert (friend["org/shut None part-0.json"], friend["org/own None part-0.json"]) == ("read", "read")
    assert friend["org/none None x"] == "RepositoryNotFoundError 404"
    stranger = client(API, hub.environment(tmp_path / "third", token="stranger"))
    assert stranger["org/shut None part-0.json"] == "GatedRepoError 403"


def test_data_sets_load_stream_and_stay(hub: Hub, tmp_path: Path) -> None:
    data_sets(hub, tmp_path / "data")
    names = [word for name, (config, _, _) in DATA.items() for word in (name, config)]
    rows = {name: texts for name, (_, _, texts) in DATA.items()}
    online = hub.environment(tmp_path / "home")
    assert client(LOAD, online, "stream", *names) == rows
    assert client(LOAD, online, "load", *names) == rows
    asked = len(hub.requests)
    assert client(LOAD, hub.environment(tmp_path / "home", offline=True), "load", *names) == rows
    assert len(hub.requests) == asked
