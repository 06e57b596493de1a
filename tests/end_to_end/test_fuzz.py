"""Whole families of bad input at once: whatever a file or an option holds, a command ends with a status of the
contract, says what is wrong in one line, shows no traceback, and changes nothing but its own run directory.

Each case is a process of its own (:mod:`forked`): at most a gigabyte and 20 seconds. ``TRACE_DS_FUZZ=500`` tries that
many cases of each family instead of :data:`EXAMPLES`, other ones each time.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from command import tree
from forked import JOB, Result, Server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

EXAMPLES = 2  # to see that a search works; the faults that searches found are in the tables
REQUESTED = int(os.environ.get("TRACE_DS_FUZZ", "0"))
fuzz = settings(
    max_examples=REQUESTED or EXAMPLES,
    deadline=None,
    derandomize=not REQUESTED,
    database=None,
    suppress_health_check=list(HealthCheck),
)

DEEP: Any = []
for _ in range(300):
    DEEP = [DEEP]
NASTY: list[Any] = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, -0.5, 1e300, float("nan"), float("inf"), "", "x" * 300]
NASTY += ["../../outside/kept", "/etc/passwd", "a/b", ".", "\x1b]0;x\x07", "\u202e", "\x00", "ü", "[/x]", "1e9", "1:30"]
NASTY += [[], {}, [None], [[]], {"": None}, {"a": {"b": []}}, [1] * 2000, DEEP]
values = st.one_of(
    st.sampled_from(NASTY),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=30),
    st.recursive(st.none() | st.text(max_size=5) | st.integers(), lambda inner: st.lists(inner, max_size=3)),
)


@st.composite
def changed_bytes(draw: st.DrawFn, whole: bytes) -> bytes:
    """``whole`` with some bytes replaced, removed, doubled or put in, or cut off."""
    result = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, max(len(result) - 1, 0)))
        end = min(len(result), begin + draw(st.sampled_from([1, 1, 2, 8, 64])))
        piece = draw(st.one_of(st.binary(max_size=8), st.just(bytes(result[begin:end]) * 2), st.just(b"")))
        result[begin:end] = piece
    return bytes(result[: draw(st.integers(0, len(result)))]) if draw(st.integers(0, 7)) == 0 else bytes(result)


@st.composite
def changed_json(draw: st.DrawFn, whole: Any) -> Any:
    """``whole`` with one to three values at any depth replaced, removed or put under another key."""
    result = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, 3))):
        node = result
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(node[key], dict | list) and node[key] and draw(st.integers(0, 3)):
                node = node[key]
                continue
            kind = draw(st.sampled_from(["replace", "replace", "replace", "remove", "rename"]))
            if kind == "replace" or isinstance(node, list):
                node[key] = draw(values)
            else:
                value = node.pop(key)
                if kind == "rename":
                    node[draw(st.text(max_size=9))] = value
            break
    return result


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def template(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory, server: Server) -> Path:
    """A folder with everything a case starts from: model/, corpora/, config.yaml, a prepared run, a step of a job with
    its manifest (step_000001/) and without (checkpoint/), and a model converted from it."""
    folder = tmp_path_factory.mktemp("template") / "work"
    folder.mkdir()
    shutil.copytree(tiny_model, folder / "model")
    (folder.parent / "outside").mkdir()
    (folder.parent / "outside" / "kept").write_text("a file of the user")
    here = Path.cwd()
    os.chdir(folder)
    try:
        tiny.write_config(Path(), Path("model"))
    finally:
        os.chdir(here)

    def command(words: str) -> None:
        result = server.run(words.split(), folder, **JOB)
        assert result.returncode == 0, result

    command("prepare config.yaml --run-dir run")
    shutil.copytree(folder / "run", folder / "job")
    for verb in ("collect", "calibrate", "unlearn --set unlearning.steps=1 --set unlearning.forget_loss=graddiff"):
        command(f"{verb} config.yaml --run-dir job")
    (folder / "job" / "checkpoints" / "step_000001").rename(folder / "step_000001")
    shutil.rmtree(folder / "job")
    shutil.copytree(folder / "step_000001", folder / "checkpoint", ignore=shutil.ignore_patterns("manifest.json"))
    command("convert checkpoint converted --base-model model")
    return folder.parent


def ends_well(server: Server, template: Path, change: Callable[[Path], object], *command: str) -> Result:
    """The property, for ``trace-ds COMMAND`` in a copy of the template after ``change`` of it."""
    with tempfile.TemporaryDirectory() as name:
        top = Path(name) / "top"
        shutil.copytree(template, top)
        change(top / "work")
        before = tree(top)
        variables = {"HOME": str(top / "home"), "TMPDIR": str(top), "COLUMNS": "160"}
        result = server.run(command, top / "work", variables)
        after = tree(top)
    not_whole = 1 if command[0] == "inspect" and not result.stderr else 0  # its answer, in its table
    assert result.returncode in (0, 2, not_whole), result
    assert "Traceback" not in result.stderr, result.stderr
    if result.returncode == 2:
        lines = result.stderr.splitlines()
        assert len(lines) == 1 and lines[0].startswith("trace-ds: error: ") and len(lines[0]) < 2000, result.stderr
    assert not any(character in result.stdout + result.stderr for character in "\x1b\x07\u202e\x9b"), result
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    own = ("work/run/", "work/made/") if result.returncode == 0 else ()
    assert not [name for name in changed if not name.startswith(own)], (changed, result)
    return result


def put(path: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(content)


KEYS = [
    "data", "model", "unlearning", "variants", "bench", "seed", "name", "model.path", "data.forget", "variants.a",
    "unlearning.optimizer.eps", "unlearning.rmu.layer", "unlearning.trainable", "unlearning.ds_config",
    "calibration.source_weights", "evaluation.models", "evaluation.tasks", "distributed.ep",
]  # fmt: skip
YAML_SCRAPS = [
    "&a ",
    "*a",
    "!!int ",
    "!!python/name:os.system",
    "<<: *a",
    "? ",
    "0x_",
    "2024-13-45",
    "|\n",
    "- ",
    "{",
    "[",
]
YAML_SCRAPS += [": ", "\t", "#", "'", '"', "\\ud800", "~", ".inf", "1_000", "---", "\x85"]


@fuzz
@given(data=st.data())
def test_yaml(server: Server, template: Path, data: st.DataObject) -> None:
    whole = (template / "work" / "config.yaml").read_bytes()
    raw = yaml.safe_load(whole)
    text = data.draw(
        st.one_of(
            changed_bytes(whole),
            changed_json(raw).map(dumped),
            st.lists(st.sampled_from(YAML_SCRAPS) | st.text(max_size=4), max_size=30).map("".join).map(str.encode),
            st.tuples(st.sampled_from(whole.decode().splitlines()), st.sampled_from(YAML_SCRAPS)).map(
                lambda pair: whole.decode().replace(pair[0], pair[0] + pair[1], 1).encode()
            ),
        )
    )
    verb = data.draw(st.sampled_from([["run", "--dry-run"], ["plan"], ["prepare"]]))
    ends_well(server, template, put("config.yaml", text), *verb, "config.yaml", "--run-dir", "run")


@fuzz
@given(data=st.data())
def test_jsonl(server: Server, template: Path, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(["corpora/forget.jsonl", "corpora/questions_forget.jsonl"]))
    whole = (template / "work" / path).read_bytes().splitlines()[0]
    lines = data.draw(st.lists(changed_json(json.loads(whole)).map(dumped) | changed_bytes(whole), max_size=4))
    verb = ["prepare"] if "questions" not in path else ["run", "--dry-run"]
    ends_well(server, template, put(path, b"\n".join(lines)), *verb, "config.yaml", "--run-dir", "run")


CONVERT = ["convert", "checkpoint", "made", "--base-model", "model", "--dry-run"]
JSON_FILES = [
    ("model/config.json", ["plan", "config.yaml"]),
    ("model/config.json", CONVERT),
    ("model/tokenizer.json", ["prepare", "config.yaml", "--run-dir", "made"]),
    ("model/tokenizer_config.json", ["prepare", "config.yaml", "--run-dir", "made"]),
    ("run/data/artefact.json", ["inspect", "run"]),
    ("run/data/artefact.json", ["collect", "config.yaml", "--run-dir", "run", "--dry-run"]),
    ("converted/conversion.json", ["inspect", "converted"]),
    ("step_000001/manifest.json", ["convert", "step_000001", *CONVERT[2:]]),
]


@pytest.mark.parametrize(("path", "command"), JSON_FILES)
@fuzz
@given(data=st.data())
def test_json(server: Server, template: Path, path: str, command: list[str], data: st.DataObject) -> None:
    whole = (template / "work" / path).read_bytes()
    content = data.draw(changed_json(json.loads(whole)).map(dumped) | changed_bytes(whole))
    ends_well(server, template, put(path, content), *command)


@fuzz
@given(data=st.data())
def test_safetensors(server: Server, template: Path, data: st.DataObject) -> None:
    whole = (template / "work" / "model" / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header, rest = whole[8 : 8 + length], whole[8 + length :]
    header = data.draw(changed_json(json.loads(header)).map(dumped) | changed_bytes(header))
    said = data.draw(st.sampled_from([len(header), len(header), len(header), 0, 1, 2**63, 2**64 - 1, len(whole)]))
    command = data.draw(st.sampled_from([["inspect", "model"], ["run", "config.yaml", "--dry-run"]]))
    ends_well(server, template, put("model/model.safetensors", struct.pack("<Q", said) + header + rest), *command)


many = settings(fuzz, max_examples=REQUESTED * 20 or 100)
one = st.sampled_from([*YAML_SCRAPS, "9", "a", "- a\n", "a: b\n", "abc", "&a [*a]"])
scraps = one | st.tuples(one, one).map("".join) | st.lists(one, max_size=6).map("".join)


@many
@given(text=scraps | values.map(json.dumps), name=st.sampled_from(KEYS))
def test_readers_in_this_process(tmp_path_factory: pytest.TempPathFactory, text: str, name: str) -> None:
    """The same of the readers alone, many more times: anything but :class:`UserError` is a fault."""
    from trace_ds.config.load import load_config
    from trace_ds.config.sections.data import CorpusEntry
    from trace_ds.corpora.read import read_documents
    from trace_ds.errors import UserError

    folder = tmp_path_factory.getbasetemp()
    (folder / "a.yaml").write_text(f"seed: {text}\n", encoding="utf-8")
    (folder / "a.jsonl").write_text(f'{{"text": "a", "source": {text}}}\n', encoding="utf-8")
    for read in (
        lambda: load_config(str(folder / "a.yaml")),
        lambda: load_config("demo", [f"{name}={text}"]),
        lambda: list(read_documents([CorpusEntry.model_validate({"path": str(folder / "a.jsonl")})])),
    ):
        with contextlib.suppress(UserError):
            read()
