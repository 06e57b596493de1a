"""Files of others: regular ones only, no more bytes than allowed, each read once a process; any damage is one line."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from fake_run import write_run
from forked import Server

from trace_ds.cli import main
from trace_ds.errors import UserError
from trace_ds.models.engine_config import user_ds_config
from trace_ds.run import files, foreign
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import sha256_file
from trace_ds.run.foreign import read_object, read_text
from trace_ds.stages.pipeline import Request, run_verb
from trace_ds.stages.report import report
from trace_ds.tensors.model_files import read_model_config

OWN = "evaluation.tasks=[{name: own, type: lm_eval, task: own, include_path: tasks, role: forget}]"


def special(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(str(path))
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    return path


SMALL_FILES = [  # places in a folder with config.yaml, corpora/ and model/, and what reads them
    ("config.yaml", "prepare config.yaml"),
    ("extra.json", "run config.yaml --set unlearning.ds_config=extra.json"),
    ("model/config.json", "run config.yaml"),
    ("model/tokenizer.json", "run config.yaml"),
    ("model/tokenizer_config.json", "prepare config.yaml"),
    ("model/model.safetensors.index.json", "run config.yaml"),
    ("corpora/forget.jsonl", "prepare config.yaml"),
    ("corpora/questions_forget.jsonl", "run config.yaml"),
    ("tasks/own.yaml", f"run config.yaml --set '{OWN}'"),
]


@pytest.mark.parametrize("kind", ["device", "gigantic"])
@pytest.mark.parametrize(("place", "words"), SMALL_FILES)
def test_no_command_waits_for_a_special_file_or_reads_a_gigantic_one(
    server: Server, tiny_model: Path, tmp_path: Path, place: str, words: str, kind: str
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    tiny.write_config(tmp_path, tmp_path / "model")
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    if kind == "gigantic" and path.suffix == ".jsonl" and "questions" not in path.name:
        pytest.skip("a corpus is streamed and may be of any size")
    if kind == "gigantic":
        path.touch()
        os.truncate(path, 1 << 40)
    else:
        special(tmp_path, kind).rename(path)
    result = server.run(shlex.split(words), tmp_path)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("trace-ds: error: "), result
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder", "device"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = special(tmp_path, kind)
    with pytest.raises(UserError, match=f"{kind}: the DeepSpeed configuration cannot be read"):
        user_ds_config(str(path))
    with pytest.raises(UserError, match="cannot be read"):
        read_text(path, "the file", "")
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        sha256_file(path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").symlink_to(path)
    with pytest.raises(UserError):
        read_model_config(tmp_path / "model")


def test_no_more_is_read_than_allowed(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps({"a": "x" * 100}))
    assert read_object(path, "the file", "")
    with pytest.raises(UserError, match="more than 50 bytes"):
        read_text(path, "the file", "", 50)


@pytest.mark.slow
def test_a_run_reads_each_file_once(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: Counter[tuple[str, str]] = Counter()  # (path, why)
    open_regular = foreign.open_regular

    def counted(why: str) -> Any:
        def count(path: Path) -> Any:
            opened[os.path.realpath(path), why] += 1
            return open_regular(path)

        return count

    monkeypatch.setattr(files, "open_regular", counted("hash"))
    monkeypatch.setattr(foreign, "open_regular", counted("JSON"))
    shutil.copytree(tiny_model, tmp_path / "base")  # which no test before this one has read in this process
    config, run = tiny.write_config(tmp_path, tmp_path / "base"), tmp_path / "run"
    assert run_verb("run", Request.load(str(config), [], run)) == 0
    once = [key for key in opened if Path(key[0]).parts[-2] in ("base", "data", "corpora")]
    assert {Path(path).name for path, _ in once} >= {"config.json", "tokenizer.json", "forget.arrow", "forget.jsonl"}
    assert {key: opened[key] for key in once if opened[key] > 1} == {}


# ------------------------------------------------------------------------------------------------ altered artefacts


def altered(path: Path, *keys: str | int, value: Any) -> None:
    raw: Any = yaml.safe_load(path.read_text())  # JSON too
    at = raw
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    text = json.dumps(raw)
    size = path.stat().st_size
    path.write_text(text if len(text) > size else text.ljust(size))  # of the same size where that can be


RESULT = "evaluation/unlearned.json"
ALTERED: list[tuple[str, tuple[str | int, ...], Any]] = [
    (RESULT, ("drift", "forget"), 1),
    (RESULT, ("drift", "forget", "overlap"), ["x"]),
    (RESULT, ("items",), [1]),
    (RESULT, ("items", "elements", 0, "predicted"), 99),
    (RESULT, ("items", "novels", 0, "nll"), "much"),
    (RESULT, ("scores", 0, "direction"), "sideways"),
    (RESULT, ("scores", 0, "n"), -1),
    (RESULT, ("scores", 0, "value"), True),
    (RESULT, ("scores", 0, "task"), "\ud800"),
    ("variants/uniform/evaluation/unlearned.json", ("scores", 0, "value"), "x"),
    ("variants/uniform/calibration/diagnosis.json", ("selected",), 3),
    ("config.yaml", ("evaluation", "tasks"), [1]),
    ("calibration/diagnosis.json", ("share_by_source",), 3),
    ("calibration/artefact.json", ("kind",), "[/x]"),
    ("statistics/forget/artefact.json", ("summary", "layers"), "abc"),
]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("written") / "run")


@pytest.mark.parametrize(("file", "keys", "value"), ALTERED)
def test_an_altered_artefact_is_one_line(
    written: Path, tmp_path: Path, file: str, keys: tuple[str | int, ...], value: Any
) -> None:
    """Neither a traceback nor a page made of it."""
    path = Path(shutil.copytree(written, tmp_path / "run"))
    altered(path / file, *keys, value=value)
    with pytest.raises(UserError, match=Path(file).name) as error:
        report(RunDirectory.at(path))
    line = error.value.line()
    assert f"{path / file}: " in line and "Fix: " in line and not (path / "report").exists()


@pytest.mark.parametrize("module", ["typer", "trace_ds.config.compose"])
def test_ctrl_c_while_modules_are_imported(tmp_path: Path, module: str) -> None:
    """Whatever is imported at the moment: one quiet line."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\n"
        "class Interrupt:\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupt)\n"
    )
    variables = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    command = [sys.executable, "-m", "trace_ds", "recipes"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, "", "trace-ds: interrupted"), done


def test_ctrl_c_inside_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("trace_ds.config.compose.recipes", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["trace-ds", "recipes"])
    monkeypatch.setattr("trace_ds.parallel.world._joined", [])  # a test before may have made this process a rank
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130 and capsys.readouterr().err.strip() == "trace-ds: interrupted"
