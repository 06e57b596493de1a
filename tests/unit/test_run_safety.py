"""What is the user's stays the user's: what stages may replace and delete, where they write, under which names."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny

from trace_ds import cli
from trace_ds.checkpoints.commit import discard_all
from trace_ds.checkpoints.manifest import Manifest, step_name
from trace_ds.config.load import dump_yaml, load_config
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.run import artefact, directory
from trace_ds.run.directory import RunDirectory, locked
from trace_ds.run.files import MODEL, remove_leftovers, replacing_directory
from trace_ds.stages.pipeline import Request, run_verb

VERBS = ("prepare", "unlearn", "report", "run")


def state(path: Path) -> dict[str, str | bytes]:
    """Everything below a directory: files with their content, links with their target, folders."""
    return {
        str(item.relative_to(path)): str(item.readlink())
        if item.is_symlink()
        else item.read_bytes()
        if item.is_file()
        else "folder"
        for item in path.rglob("*")
    }


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A configuration (``mine.yaml``, of a model that is not there) with corpora and tasks."""
    config = tiny.write_config(tmp_path, tmp_path / "base", variants={"even": {"calibration.rule": "uniform"}})
    config.rename(tmp_path / "mine.yaml")
    return tmp_path


def write(path: Path, text: str = "a thesis") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def make_run(project: Path) -> Path:
    """A run directory with something of ours in every place, written by what the stages write it with."""
    config, path = load_config(str(project / "mine.yaml"), [], project / "run")
    run = RunDirectory(path)
    for each in (run, run.variant("even")):
        each.mark()
    for folder in (run.path, run.variant("even").path):
        places = {
            "data": "data",
            "statistics/forget": "statistics",
            "statistics/retain": "statistics",
            "calibration": "calibration",
            "report": "report",
        }
        for place, kind in places.items():
            if folder == run.path or not place.startswith(("data", "statistics")):
                write(folder / place / "values.npy", "ours")
                artefact.describe(folder / place, kind, {}, {}, {})
        write(folder / "model" / "config.json", "{}")
        write(folder / "model" / "conversion.json", json.dumps({"source": {}, "parameters": 1, "tensors": {}}))
        write(folder / "evaluation" / "original.json", json.dumps({"identity": "x", "scores": []}))
        write(folder / "logs" / "unlearn.jsonl", '{"event": "line", "time_s": 1.0, "text": "x"}\n{"torn')
        shards = folder / "checkpoints" / step_name(2)
        write(shards / "a_model_states.pt", "ours")
        entry = artefact.file_entry(shards / "a_model_states.pt")
        Manifest(2, 1, 1, 3, "mixtral", "job", {}, "c", "fp32", {}, {}, {"a_model_states.pt": entry}).write(shards)
        write(folder / "checkpoints" / "latest", "step_000002\n")
        write(folder / "statistics" / "retain.partial" / "shape.json", "{}")
    write(run.config, dump_yaml(config))
    return path


def refused(project: Path, verb: str, run: Path | str, *changes: str) -> str:
    """The line with which a verb refuses, before it has changed anything in the project."""
    before = state(project)
    with pytest.raises(UserError) as error:
        run_verb(verb, Request.load(str(project / "mine.yaml"), changes, Path(run)).with_variants("all"))
    assert state(project) == before
    return error.value.line()


# Below RUN: a file of the user's in a directory without a marker that a stage would replace, or in the place of one.
FOREIGN = [
    "data/forget.jsonl",
    "model/model.safetensors",
    "report/index.html",
    "data",
    "variants/even/model/model.safetensors",
]


@pytest.mark.parametrize("place", FOREIGN)
def test_what_is_not_ours_is_not_replaced(project: Path, place: str) -> None:
    """In the place of ours in a run of ours, where everything else is."""
    run = make_run(project)
    first = run / place
    while first.parent != run and first.parent.name not in ("variants", "even", "statistics", "checkpoints"):
        first = first.parent
    if first.is_dir():
        shutil.rmtree(first)
    elif first.is_file():
        first.unlink()
    write(run / place)
    line = refused(project, "run", run)
    assert str(run) in line and ("trace_ds did not" in line or "of trace_ds's" in line)


def test_a_run_of_ours_is_taken_and_strangers_beside_ours_stay(project: Path) -> None:
    run = RunDirectory(make_run(project))
    kept = [
        write(run.path / name)
        for name in ("notes.txt", "evaluation/notes.json", "checkpoints/step_1/x", "tb/x", "logs/x")
    ]
    for request in Request.load(str(project / "mine.yaml"), [], run.path).with_variants("all").run_and_variants():
        request.check_run_directory()
        request.run.clear_leftovers()
    assert all(path.read_text() == "a thesis" for path in kept)
    write(run.checkpoints / "step_000100" / "mp_rank_00_model_states.pt", "whose?")  # without a manifest
    discard_all(run.checkpoints)
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step_000100.unreadable-1", "step_1"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_project_is_no_run_directory(project: Path, verb: str) -> None:
    """Whatever its files are called, with a lock that a killed command of ours left, by a link too."""
    for name in (
        "data/forget.jsonl",
        "data/notes.txt",
        "thesis.tmp-draft/t",
        "notes.old-2023.md",
        "model/model.safetensors",
    ):
        write(project / name)
    write(project / ".lock", "")
    (project / "link").symlink_to(".")
    for run in (project, project / "link"):
        assert "this directory is not a run's: it holds 'corpora', and no .trace_ds.json" in refused(project, verb, run)


@pytest.mark.parametrize("verb", ["prepare", "demo", "bench", "submit"])
def test_nothing_is_deleted_where_no_run_was(
    project: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    """Leftovers are known by their names in a marked directory alone."""
    shutil.copytree(tiny_model, project / "base")
    for name in ("model.tmp-1/x", "evaluation/.results.json.tmp-3", "evaluation/results.json.tmp-3", "data.tmp-7"):
        write(project / "other" / name)
    before = state(project)
    words = [verb, "mine.yaml", "--run-dir", "other"]
    words = {"demo": [verb, *words[2:]], "bench": [verb, "bench_entangled", *words[2:]]}.get(verb, words)
    monkeypatch.chdir(project)
    status, errors = command(monkeypatch, capsys, *words)
    assert (status, len(errors.splitlines())) == (2, 1) and "not a run's" in errors, errors
    assert state(project) == before


# --set KEY=VALUE, where RUN stands for the run directory and LINK for a link to its model
OVERLAPS = [
    ("model.path=RUN/model", "model.path"),
    ("model.path=LINK", "model.path"),
    ("model.path=RUN", "model.path"),
    ("data.forget=[{path: RUN/data/forget.jsonl}]", "data.forget[0].path"),
    ("data.retain=[{path: RUN/../corpora/retain.jsonl}, {path: RUN/report/x.txt}]", "data.retain[1].path"),
    ("evaluation.models={gold: RUN/variants/even/model}", "evaluation.models.gold"),
    ("unlearning.ds_config=RUN/config.yaml", "unlearning.ds_config"),
    ("variants={even: {unlearning.ds_config: RUN/logs/ds.json}}", "unlearning.ds_config"),
]


@pytest.mark.parametrize(("change", "key"), OVERLAPS)
def test_what_is_read_is_never_written_to(project: Path, change: str, key: str) -> None:
    run = project / "deep" / "run"
    (project / "link").symlink_to(run / "model")
    change = change.replace("RUN", str(run)).replace("LINK", str(project / "link"))
    line = refused(project, "run", run, change)
    assert line.startswith(f"{key}: this command writes to {run}")


def test_a_link_in_the_place_of_an_output_leads_to_what_is_read(project: Path) -> None:
    (project / "run").mkdir()
    (project / "run" / "model").symlink_to(project / "base")
    assert "model.path: this command writes to" in refused(project, "convert", project / "run")


def test_convert_into_its_source(tiny_model: Path, tmp_path: Path) -> None:
    source = shutil.copytree(tiny_model, tmp_path / "outer" / "model")
    before = state(tmp_path)
    for place in (source / "new", tmp_path / "link" / "new"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(source)
        with pytest.raises(UserError, match="SOURCE: this command writes to"):
            convert_checkpoint(source, place)
    (tmp_path / "link").unlink()
    assert state(tmp_path) == before


LEFTOVERS: list[tuple[str, str, bool]] = [  # folder of a run, name, whether a killed writer of ours leaves it
    ("", "data.tmp-123", True),
    ("", "model.tmp-a.host-12-0123abcd", True),
    ("checkpoints", "step_000004.tmp-9", True),
    ("evaluation", ".gold.json.tmp-9", True),
    ("logs", ".unlearn.jsonl.tmp-9", True),
    ("", "thesis.tmp-draft", False),
    ("", "notes.old-2023.md", False),
    ("", "data.tmp-draft", False),
    ("", "model.tmp-1.txt", False),
]


@pytest.mark.parametrize("label", ["folder", "file", "link"])
def test_leftovers_are_known_by_name_and_place(project: Path, label: str) -> None:
    run = RunDirectory(make_run(project))
    write(project / "elsewhere" / "thesis")
    for folder, name, _ in LEFTOVERS:
        place = run.path / folder / name
        place.parent.mkdir(exist_ok=True)
        if label == "folder":
            write(place / "x")
        elif label == "file":
            write(place)
        else:
            place.symlink_to(project / "elsewhere")
    run.clear_leftovers()
    left = {(folder, name) for folder, name, _ in LEFTOVERS if os.path.lexists(run.path / folder / name)}
    assert left == {(folder, name) for folder, name, is_ours in LEFTOVERS if not is_ours}
    assert (project / "elsewhere" / "thesis").is_file()


def test_killed_between_the_two_renames_the_old_one_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, rename, remove_tree = tmp_path / "data", os.replace, shutil.rmtree

    def make(text: str) -> None:
        with replacing_directory(place) as new:
            write(new / "values.npy", text)
            artefact.describe(new, "data", {}, {}, {})

    def killed_at(number: int) -> Callable[..., None]:
        seen = []

        def replace(source: Path, target: Path) -> None:
            seen.append(Path(target).name)
            if len([name for name in seen if not name.endswith(".json")]) == number:
                raise KeyboardInterrupt
            rename(source, target)

        return replace

    make("first")
    monkeypatch.setattr("trace_ds.run.files.shutil.rmtree", lambda *arguments, **options: None)  # a kill cleans nothing
    for number in (1, 2):
        monkeypatch.setattr("trace_ds.run.files.os.replace", killed_at(number))
        with pytest.raises(KeyboardInterrupt):
            make("second")
        monkeypatch.setattr("trace_ds.run.files.os.replace", rename)
        assert place.exists() == (number == 1)
        with monkeypatch.context() as patch:
            patch.setattr("trace_ds.run.files.shutil.rmtree", remove_tree)
            remove_leftovers(tmp_path)
        assert (place / "values.npy").read_text() == "first"
    monkeypatch.undo()
    assert state(tmp_path).keys() == {"data", "data/artefact.json", "data/values.npy"}
    assert (place / "values.npy").read_text() == "first"
    make("third")
    assert (place / "values.npy").read_text() == "third" and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_what_appears_while_a_stage_works_is_not_replaced(tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match="did not make this"),
        replacing_directory(tmp_path / "model", MODEL),
    ):
        write(tmp_path / "model" / "thesis")
    assert state(tmp_path).keys() == {"model", "model/thesis"}


BAD_NAMES = ["/elsewhere", "../../x", "a/b", "", ".hidden", "-rf", "a\nb", "x" * 101, "a.tmp-1"]
NAMED: dict[str, Callable[[str], str]] = {
    "name": lambda name: f"name={json.dumps(name)}",
    "variants": lambda name: f"variants={json.dumps({name: {'calibration.rule': 'uniform'}})}",
    "evaluation.models": lambda name: f"evaluation.models={json.dumps({name: 'm'})}",
    "evaluation.tasks": lambda name: (
        "evaluation.tasks=" + json.dumps([{"name": name, "type": "choice", "role": "forget", "path": "q.jsonl"}])
    ),
    "bench.methods": lambda name: (
        "bench=" + json.dumps({"methods": {"uniform": {}, name: {}}, "forget": "t accuracy", "utility": ["t accuracy"]})
    ),
}


@pytest.mark.parametrize("key", NAMED)
def test_names_that_become_paths(project: Path, key: str) -> None:
    for name in BAD_NAMES:
        with pytest.raises(UserError, match=rf"{key}.*a name ") as error:
            load_config(str(project / "mine.yaml"), [NAMED[key](name)])
        assert "\n" not in error.value.line()
    load_config(str(project / "mine.yaml"), [NAMED[key]("Llama-3.1_8B.v2")])


def test_a_variant_is_known_by_what_is_in_its_parent(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make_run(project)
    monkeypatch.chdir(run / "variants" / "even")
    for path in (Path(), run / "variants" / "even", Path("../even"), Path("../../variants/even")):
        result = RunDirectory.at(path)
        assert result.data.samefile(run / "data"), path
        assert result.calibration.samefile(run / "variants" / "even" / "calibration")
    (project / "link").symlink_to(run / "variants" / "even")
    assert RunDirectory.at(project / "link").data.samefile(run / "data")
    (project / "variants" / "mine").mkdir(parents=True)
    assert RunDirectory.at(project / "variants" / "mine").data == project / "variants" / "mine" / "data"
    line = refused(project, "prepare", run / "variants" / "even")
    assert "this is the directory of a variant" in line and f"use --run-dir {run}," in line


def test_a_run_waits_for_its_variants_and_they_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directory, "LOCK_RETRY_S", 0.0)
    run = RunDirectory(tmp_path / "run")
    run.mark()
    one, other = run.variant("one"), run.variant("other")

    def is_free(expected: RunDirectory, *, replaces_inputs: bool = False) -> bool:
        try:
            with locked(expected, replaces_inputs=replaces_inputs):
                return True
        except UserError as error:
            assert "another process is using this run directory" in error.line()
            return False

    with locked(one):
        assert is_free(other) and is_free(run)
        assert not is_free(one) and not is_free(run, replaces_inputs=True)
    with locked(run, replaces_inputs=True):
        assert not is_free(one) and not is_free(run)
    with locked(run):
        assert is_free(one) and not is_free(run)
    with locked(one), pytest.raises(UserError, match="refused"):
        with locked(other):
            raise UserError("refused")
        raise AssertionError
    assert is_free(run, replaces_inputs=True)


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """(exit status, stderr) of ``trace-ds WORDS``, in this process."""
    monkeypatch.setattr(sys, "argv", ["trace-ds", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return int(end.value.code or 0), capsys.readouterr().err


LONG = "x" * 300
COMMANDS: list[tuple[list[str], str]] = [
    (["prepare", "mine.yaml", "--run-dir", ""], "--run-dir: '' names no run directory"),
    (["run", "mine.yaml", "--run-dir", "-rf"], "--run-dir: '-rf' names no run directory"),
    (["run", "mine.yaml", "--run-dir", "a\udcffb"], "names no run directory. Fix: name one"),
    (["run", "mine.yaml", "--run-dir", LONG], "File name too long"),
    (["run", "mine.yaml", "--set", f"model.path={LONG}"], "File name too long"),
    (["convert", "base", LONG], "File name too long"),
]


@pytest.mark.parametrize(("words", "message"), COMMANDS)
def test_paths_on_the_command_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(project)
    before = state(project)
    status, errors = command(monkeypatch, capsys, *words)
    assert status == 2 and message in errors and len(errors.splitlines()) == 1, errors
    assert state(project) == before


REFUSALS = [
    (
        PermissionError(13, "Permission denied", "/a/b"),
        "/a/b: Permission denied. Fix: correct",
    ),
    (OSError(28, "No space left on device"), "No space left on device. Fix: "),
]


@pytest.mark.parametrize(("error", "message"), REFUSALS)
def test_errors_of_the_system_say_what_helps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    def fail() -> dict[str, Path]:
        raise error

    monkeypatch.setattr("trace_ds.config.compose.recipes", fail)
    status, errors = command(monkeypatch, capsys, "recipes")
    assert status == 2 and message in errors
