"""Models by their name on the hub: fetched once, used without a network, refused with a line that says what to do.

The clients are the real ones, the hub is ``hub_server`` on loopback.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from chats import CHATS, TEMPLATES, by_hand, counted_by_hand
from command import run
from forked import JOB, Server, refuse, serving
from hub_replicas import questions, write_data_set
from hub_server import Hub
from hub_server import serving as serving_hub

from trace_ds.corpora.dataset import TokenDataset
from trace_ds.corpora.tokenizer import load_tokenizer
from trace_ds.run.hub_names import HubName, hub_name

OTHER_FILES = {
    "pytorch_model.bin": b"pickle",
    "modeling_tiny.py": b"raise SystemExit",
    "original/model.safetensors": b"x",
}


@dataclass
class Place:
    """A hub with replicas, the caches of one user in ``home``, and ``trace-ds`` with this hub as its own; ``away``
    started with HF_HUB_OFFLINE, which is read once."""

    hub: Hub
    home: Path
    server: Server
    away: Server
    models: Path
    commits: dict[str, str]

    def offline(self, *arguments: str | Path, cwd: Path) -> None:
        """``trace-ds ARGUMENTS`` must do without the hub."""
        requested = len(self.hub.requests)
        done = self.away.run(arguments, cwd, **JOB)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert self.hub.requests[requested:] == []


def replica(source: Path, folder: Path, *, shards: bool = False) -> Path:
    """A model directory as its repository on the hub, with what must never be downloaded beside it."""
    shutil.copytree(source, folder)
    if shards:
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder, max_shard_size="60KB")
        (folder / "model.safetensors").unlink()
    for name, content in OTHER_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def wmdp(folder: Path) -> Path:
    write_data_set(folder, "cais/wmdp", {"wmdp-cyber": {"test": questions(3, 0)}})
    return folder


def chats(folder: Path) -> Path:
    """Conversations as a data set of Parquet."""
    write_data_set(folder, "org/chats", {"default": {"train": [{"messages": chat} for chat in CHATS]}})
    return folder


def texts(folder: Path, words: list[str]) -> Path:
    """A corpus as a data set of JSON Lines."""
    folder.mkdir(parents=True)
    lines = [json.dumps({"text": text}) for text in tiny.sentences(40, 3, words)]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def place(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hub")
    model = replica(tiny_model, folder / "model")
    instruct = replica(tiny_model, folder / "instruct")
    (instruct / "chat_template.jinja").write_text(TEMPLATES["instruct"][0])
    gold = replica(tiny_model, folder / "gold", shards=True)
    only_pickles = folder / "pickles"
    only_pickles.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "pytorch_model.bin"):
        shutil.copy(model / name, only_pickles)
    with serving_hub() as hub:
        commits = {
            name: hub.add(kind, name, source, **access)
            for kind, name, source, access in (
                ("models", "org/tiny", model, {}),
                ("models", "org/instruct", instruct, {}),
                ("models", "org/gold", gold, {"ref": "v1"}),
                ("models", "org/gated", model, {"gated": True, "readers": ("friend",)}),
                ("models", "org/pickles", only_pickles, {}),
                ("datasets", "cais/wmdp", wmdp(folder / "wmdp"), {}),
                ("datasets", "org/chats", chats(folder / "chats"), {}),
                ("datasets", "org/texts", texts(folder / "texts", tiny.WORDS[:10]), {}),
            )
        }
        home = folder / "home"
        with serving(hub.environment(home)) as server, serving(hub.environment(home, offline=True)) as away:
            yield Place(hub, home, server, away, folder, commits)


def written(folder: Path, model: str, **changes: Any) -> Path:
    return tiny.write_config(folder, Path(model), **changes)


def artefact_summary(path: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((path / "artefact.json").read_text(encoding="utf-8"))["summary"]
    return summary


@pytest.mark.slow
def test_fetched_once_a_whole_run_needs_no_network(place: Place, tmp_path: Path) -> None:
    tasks = [*tiny.write_tasks(tmp_path), {"name": "cyber", "type": "lm_eval", "task": "wmdp_cyber", "role": "forget"}]
    config = written(
        tmp_path,
        "org/instruct",
        evaluation__models={"gold": "org/gold@v1"},
        evaluation__tasks=tasks,
        unlearning__steps=2,
        data__forget=[{"dataset": "org/chats", "loss_on": "answer"}],
    )
    shutil.rmtree(place.home, ignore_errors=True)
    run = tmp_path / "run"
    fetched = place.server.run(["fetch", config], tmp_path, **JOB)
    assert fetched.returncode == 0, fetched
    commits = (place.commits[name][:12] for name in ("org/instruct", "org/gold", "org/chats"))
    names = ("org/instruct", "org/gold@v1", "org/chats", "wmdp_cyber", *commits, "HF_HUB_OFFLINE=1")
    assert all(name in fetched.stdout for name in names), fetched.stdout
    requested = [line for line in place.hub.requests if line.endswith(tuple(OTHER_FILES))]
    assert requested == [], "a pickle, code or the weights of another format were asked for"

    place.offline("run", config, "--run-dir", run, cwd=tmp_path)
    pieces = [by_hand(load_tokenizer(place.models / "instruct"), TEMPLATES["instruct"][1](chat)) for chat in CHATS]
    counted = counted_by_hand(
        TokenDataset.open(run / "data" / "forget.arrow"), [of for _, mask in pieces for of in mask]
    )
    assert artefact_summary(run / "statistics" / "forget")["tokens"] == sum(counted) > 0
    assert yaml.safe_load((run / "config.yaml").read_text())["model"]["path"] == "org/instruct"
    named = f"org/instruct@{place.commits['org/instruct']}"
    assert artefact_summary(run / "statistics" / "retain")["model"] == named
    manifest = next((run / "checkpoints").glob("step_*/manifest.json"))
    assert json.loads(manifest.read_text())["model"]["source"] == named
    results = {name: json.loads((run / "evaluation" / f"{name}.json").read_text()) for name in ("original", "gold")}
    assert results["original"]["source"] == named
    assert results["gold"]["source"] == f"org/gold@{place.commits['org/gold']}"
    assert results["gold"]["scores"] == results["original"]["scores"], "the same weights in one file and in shards"
    for card in (run / "model" / "README.md", run / "report" / "model_card.md"):
        front = yaml.safe_load(card.read_text().split("---")[1])
        assert front["base_model"] in ("org/instruct", ["org/instruct"]), card
        assert named in card.read_text()
    page = (run / "report" / "index.html").read_text()
    assert named in page and str(place.home) not in page


def test_prepare_brings_the_tokenizer_and_no_weights(place: Place, tmp_path: Path) -> None:
    name = "org/only-prepared"
    place.hub.add("models", name, place.models / "model")
    config = written(tmp_path, name)
    done = place.server.run(["prepare", config, "--run-dir", tmp_path / "run"], tmp_path)
    assert done.returncode == 0, done
    requested = [line for line in place.hub.requests if name in line and "resolve/" in line]
    assert any("tokenizer.json" in line for line in requested)
    assert not any(".safetensors" in line for line in requested)


def test_a_directory_that_is_there_wins(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.models / "model", tmp_path / "org" / "unknown")
    requested = len(place.hub.requests)
    done = place.server.run(["prepare", written(tmp_path, "org/unknown"), "--run-dir", "run"], tmp_path)
    assert done.returncode == 0, done
    assert place.hub.requests[requested:] == []


@pytest.mark.parametrize(
    ("name", "summary"),
    [
        ("org/none", ("there is no directory org/none", "the hub has no model org/none", "log in")),
        ("org/gated", ("org/gated is gated", "/org/gated, log in")),
        ("org/tiny@v9", ("org/tiny has no revision v9", "Fix: it has main: name one of these")),
        ("org/pickles", ("no safetensors weights (pickles are never read). Fix: it has ", "pytorch_model.bin")),
    ],
)
def test_models_that_cannot_be_had_are_refused(
    place: Place, tmp_path: Path, name: str, summary: tuple[str, ...]
) -> None:
    fetch = ["fetch", written(tmp_path, name)]
    line = refuse(place.server, tmp_path, *fetch)
    assert "model.path: " in line and all(text in line for text in summary), line
    if name == "org/gated":  # it comes for those who may
        done = place.server.run(fetch, tmp_path, {"HF_TOKEN": "friend"})
        assert done.returncode == 0 and place.commits["org/gated"][:12] in done.stdout, done


def test_without_a_network_and_a_cache(place: Place, tmp_path: Path) -> None:
    place.hub.add("models", "org/never-fetched", place.models / "model")
    prepare = ["prepare", written(tmp_path, "org/never-fetched"), "--run-dir", "run"]
    line = refuse(place.away, tmp_path, *prepare)
    assert "HF_HUB_OFFLINE is set" in line and "trace-ds fetch CONFIG" in line
    variables = place.hub.environment(tmp_path / "home") | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    line = run([sys.executable, "-m", "trace_ds", *prepare], tmp_path, variables=variables).stderr
    assert line.count("\n") == 1 and not (tmp_path / "run").exists(), line
    assert "org/never-fetched is not whole in the hub's cache" in line
    assert "http://127.0.0.1:9 does not give it (Connect" in line, line


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>log in to the network</html>",
        b"[]",
        pytest.param(None, marks=pytest.mark.slow),  # asked once, for 20 s
    ],
)
def test_a_hub_that_does_not_answer_as_one(place: Place, tmp_path: Path, answer: bytes | None) -> None:
    place.hub.add("models", "org/odd", place.models / "model")
    place.hub.answers["org/odd"] = answer
    requested = len(place.hub.requests)
    line = refuse(place.server, tmp_path, "prepare", written(tmp_path, "org/odd"), "--run-dir", "run", time_s=60)
    assert "org/odd is not whole in the hub's cache" in line and "does not give it (" in line, line
    assert len(place.hub.requests) == requested + 1


def test_a_task_without_its_data_is_refused_before_the_first_stage(place: Place, tmp_path: Path) -> None:
    tasks = [{"name": "bio", "type": "lm_eval", "task": "wmdp_bio", "role": "forget"}]
    config = written(tmp_path, str(place.models / "model"), evaluation__tasks=tasks)
    line = refuse(place.server, tmp_path, "run", config, time_s=120)  # lm-eval reads thousands of files
    assert "lm-eval cannot run the task wmdp_bio" in line
    line = refuse(place.server, tmp_path, "submit", config, time_s=120)
    assert "cais/wmdp (wmdp-bio), which lm-eval's wmdp_bio needs, is not in the cache" in line


@pytest.mark.parametrize(
    ("data", "summary"),
    [
        ({"dataset": "org/none"}, "org/none: the hub has no such data set, or it is private. Fix: correct the name"),
        ({"dataset": "org/shut"}, "org/shut: the data set is gated: its terms must be accepted first. Fix: accept"),
        ({"dataset": "org/texts@v9"}, "org/texts: the data set has no revision 'v9'. Fix: it has main: name one"),
        ({"dataset": "org/texts", "split": "trian"}, "the data set has no split 'trian'. Fix: did you mean 'train'?"),
    ],
)
def test_data_that_cannot_be_had_are_refused(place: Place, tmp_path: Path, data: dict[str, str], summary: str) -> None:
    place.hub.add("datasets", "org/shut", place.models / "texts", gated=True, readers=("friend",))
    config = written(tmp_path, str(place.models / "model"), data__forget=[data])
    assert summary in refuse(place.server, tmp_path, "fetch", config)


def test_permissions_are_asked_for_before_anything_large_comes(place: Place, tmp_path: Path) -> None:
    """Of gated data sets first; then sizes are shown, and data come before models."""
    place.hub.add("models", "org/large", place.models / "model")
    place.hub.add("models", "org/closed", place.models / "model", gated=True, readers=("friend",))
    place.hub.add("datasets", "org/locked", place.models / "chats", gated=True, readers=("friend",))
    config = written(
        tmp_path,
        "org/large",
        data__forget=[{"dataset": "org/locked", "template": "{messages}"}],
        evaluation__models={"gated": "org/closed"},
    )
    fetch = ["fetch", config]
    before = len(place.hub.requests)
    assert "org/locked: the data set is gated" in refuse(place.server, tmp_path, *fetch)
    place.hub.repositories["datasets", "org/locked"].gated = False
    assert "org/closed is gated" in refuse(place.server, tmp_path, *fetch, variables={"HF_TOKEN": "stranger"})
    large = (".safetensors", ".parquet", ".jsonl")
    assert not any(each.startswith("GET") and each.endswith(large) for each in place.hub.requests[before:])
    done = place.server.run(fetch, tmp_path, {"HF_TOKEN": "friend"}, **JOB)
    assert done.returncode == 0, done
    size = (place.models / "model" / "model.safetensors").stat().st_size
    assert f"[fetch] model.path: {size / 1000:.3g} kB to download\n" in done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("[fetch]")]
    assert [line.endswith(" in all") for line in lines].index(True) == 3
    came = [each for each in place.hub.requests[before:] if each.startswith("GET") and each.endswith(large)]
    kinds = [Path(each).suffix for each in came]
    assert kinds == sorted(kinds) and {".parquet", ".safetensors"} == set(kinds), kinds
    again = place.server.run(fetch, tmp_path, {"HF_TOKEN": "friend"}, **JOB)
    assert "[fetch] model.path: nothing to download" in again.stdout and "[fetch] 0 B in all" in again.stdout


def test_looking_never_downloads(place: Place, tmp_path: Path) -> None:
    name = "org/looked-at"
    place.hub.add("models", name, place.models / "model")
    config, run = written(tmp_path, name), tmp_path / "run"
    requested = len(place.hub.requests)
    shown = place.server.run(["run", config, "--run-dir", run, "--dry-run"], tmp_path)
    assert shown.returncode == 0 and f"path: {name}" in shown.stdout, shown
    assert "not ready" in shown.stdout and "trace-ds fetch CONFIG" in shown.stdout
    for verb in ("plan", "submit"):
        assert "no model of this name is in the hub's cache" in refuse(place.server, tmp_path, verb, config)
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    line = refuse(place.server, tmp_path, "collect", config, "--run-dir", run, variables=rank)
    assert name in line and "`trace-ds fetch CONFIG` brings it" in line
    assert place.hub.requests[requested:] == []
    assert not run.exists()


def test_doctor_says_what_is_missing(place: Place, tmp_path: Path) -> None:
    place.hub.add("models", "org/examined", place.models / "model")
    place.hub.add("datasets", "org/unseen", place.models / "chats")
    forget = [{"dataset": "org/unseen", "template": "{messages}"}]
    config, run = written(tmp_path, "org/examined", data__forget=forget), tmp_path / "run"
    doctor = ["doctor", config, "--run-dir", run, "--json"]
    keys = ["model.path", "data.forget[0]"]

    def of_the_hub() -> tuple[list[dict[str, str]], set[str]]:
        checks = json.loads(place.server.run(doctor, tmp_path, time_s=120).stdout)
        return [check for check in checks if check["group"] == "hub"], {check["group"] for check in checks}

    result, groups = of_the_hub()
    assert [check["name"] for check in result] == keys
    assert all((check["status"], check["fix"]) == ("MISS", "trace-ds fetch CONFIG") for check in result)
    assert "run" not in groups, "said once"
    assert place.server.run(["fetch", config], tmp_path, time_s=120).returncode == 0
    result, groups = of_the_hub()
    assert [(check["name"], check["status"]) for check in result] == [(key, "OK") for key in keys]
    assert "run" in groups


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/name", HubName("org/name")),
        ("org/name@refs/pr/1", HubName("org/name", "refs/pr/1")),
        *((text, None) for text in ("/org/name", "../name", "name", "a/b/c", "org/name@", "org/a..b", "org/name@../x")),
    ],
)
def test_what_is_a_name_on_the_hub(text: str, name: HubName | None) -> None:
    assert hub_name(text) == name
    assert name is None or str(name) == text
