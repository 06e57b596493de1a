"""``evaluate`` from the run directory to the files and the table: resuming, copying, refusing."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import made_once, only_the_main_process_fingerprints
from processes import run_distributed
from stage_calls import evaluate, prepare
from test_evaluation_models import WORDS, change_weights, save_model, save_tokenizer

from trace_ds.config.load import validate
from trace_ds.config.schema import Config
from trace_ds.errors import AgreedError, UserError
from trace_ds.evaluation import drift, language_model, subjects
from trace_ds.reporting import tables
from trace_ds.reporting.gather import gather
from trace_ds.run.directory import RunDirectory
from trace_ds.run.files import write_json
from trace_ds.stages import evaluate as stage
from trace_ds.stages.pipeline import Request, check_early
from trace_ds.terminal import VERBOSE


def write_lines(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def text(generator: np.random.Generator, words: int) -> str:
    return " ".join(f"w{number}" for number in generator.integers(0, 60, words))


@dataclasses.dataclass
class Case:
    raw: dict[str, Any]
    run: RunDirectory

    def config(self, **changes: Any) -> Config:
        raw = json.loads(json.dumps(self.raw))
        raw["evaluation"].update(changes)
        return validate(raw, "test")

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(self.run.evaluation.iterdir())}

    def result(self, name: str) -> dict[str, Any]:
        return json.loads((self.run.evaluation / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    """Models, corpora, tasks and a run directory in ``tmp_path``: a copy of what a test run makes once."""
    case_path = made_once("evaluation-case", make_case)
    shutil.copytree(case_path, tmp_path, dirs_exist_ok=True)
    raw = (tmp_path / "case.json").read_text(encoding="utf-8").replace(str(case_path), str(tmp_path))
    return Case(json.loads(raw), RunDirectory(tmp_path / "run"))


def make_case(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for seed, name in enumerate(("original", "gold", "unlearned")):
        save_model(folder / name, seed)
    corpora = {
        side: write_lines(folder / f"{side}.jsonl", [{"text": text(generator, 15)} for _ in range(20)])
        for side in ("forget", "retain")
    }
    questions = [
        {
            "id": f"q{number}",
            "prompt": text(generator, 4),
            "choices": [text(generator, 2) for _ in range(4)],
            "answer": number % 4,
            "source": f"s{number % 2}",
        }
        for number in range(12)
    ]
    passages = [
        {"id": f"p{number}", "prompt": text(generator, 5), "continuation": text(generator, 7)} for number in range(5)
    ]
    files = {
        "facts": ("choice", write_lines(folder / "facts.jsonl", questions), "forget"),
        "passages": ("verbatim", write_lines(folder / "passages.jsonl", passages), "forget"),
        "general": ("perplexity", corpora["retain"], "utility"),
    }
    raw = {
        "name": "case",
        "model": {"path": str(folder / "original"), "dtype": "fp32"},
        "data": {side: [{"path": path}] for side, path in corpora.items()} | {"context_length": 24},
        "evaluation": {
            "tasks": [
                {"name": name, "type": kind, "path": path, "role": role} for name, (kind, path, role) in files.items()
            ],
            "models": {"gold": str(folder / "gold")},
            "batch_rows": 8,
            "max_new_tokens": 6,
        },
    }
    run = RunDirectory(folder / "run")
    run.path.mkdir()
    shutil.copytree(folder / "unlearned", run.model)
    prepare(validate(raw, "test"), run)
    write_json(folder / "case.json", raw)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the model directories that were loaded, in order (the real loader runs)."""
    paths: list[str] = []
    real = language_model.open_language_model

    def counting(path: str, *rest: Any) -> Any:
        paths.append(Path(path).name)
        return real(path, *rest)

    monkeypatch.setattr(language_model, "open_language_model", counting)
    return paths


def test_results_have_the_agreed_form(
    case: Case, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VERBOSE, "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the run asks for 1: it must get it, and give the former number back
    try:
        evaluate(case.config(), case.run)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    for name in ("original", "gold", "unlearned"):
        result = case.result(name)
        assert result["model"] == name
        rows = [(score["task"], score["metric"], score["n"], score["chance"]) for score in result["scores"]]
        assert rows == [
            ("facts", "accuracy", 12, 0.25),
            ("facts", "accuracy_norm", 12, 0.25),
            ("facts", "exact_match", 12, None),
            ("facts", "choice_probability", 12, 0.25),
            ("passages", "rouge_l", 5, None),
            ("passages", "exact_tokens", 5, None),
            ("passages", "token_probability", 5, None),
            ("general", "perplexity", 20 * 16, None),
        ]
        assert {score["direction"] for score in result["scores"]} == {"lower"}
        assert result["scores"][0]["value"] == sum(item["correct"] for item in result["items"]["facts"]) / 12
        assert result["by_source"]["facts"]["s0"]["n"] == 6
        assert (result["drift"] is not None) == (name == "unlearned")
    drift = case.result("unlearned")["drift"]
    for side in ("forget", "retain"):
        assert drift[side]["rows"] == 15 and len(drift[side]["overlap"]) == 2
        assert 0.2 < drift[side]["overlap_mean"] < 0.9  # two unrelated random models
    first = [case.result(name)["scores"][0]["value"] for name in ("original", "unlearned")]
    printed = capsys.readouterr().out
    assert f"[evaluate] 3 models: facts {first[0]:.3f} → {first[1]:.3f}, passages 0." in printed


def test_a_killed_evaluation_continues_to_the_same_bytes(case: Case, loads: list[str], tmp_path: Path) -> None:
    """Nothing that is written depends on place or time; results of models that are gone are removed."""
    evaluate(case.config(), case.run)
    whole = case.files()
    assert not any(str(tmp_path).encode() in content for content in whole.values())
    evaluate(case.config(), case.run)
    assert loads == ["original", "gold", "model"]  # nothing to do the second time
    (case.run.evaluation / "gold.json").unlink()
    (case.run.evaluation / "original.json").write_bytes(whole["original.json"][:100])  # torn
    del loads[:]
    evaluate(case.config(), case.run)
    assert loads == ["original", "gold"] and case.files() == whole
    (case.run.evaluation / "unlearned.json").unlink()
    del loads[:]
    moved = Case(case.raw, RunDirectory(Path(shutil.copytree(case.run.path, tmp_path / "elsewhere"))))
    evaluate(case.config(), moved.run)
    assert loads == ["original", "model"]  # the original's routing is needed again
    assert moved.files() == whole
    evaluate(case.config(models={}), case.run)
    assert list(case.files()) == ["original.json", "unlearned.json"]


def test_what_matters_makes_results_anew_and_the_rest_does_not(
    case: Case, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(case.config(), case.run)
    before = case.result("original")["identity"]
    del loads[:]
    evaluate(case.config(batch_rows=3), case.run)
    assert loads == []
    monkeypatch.setattr(subjects, "DRIFT_ROWS", 4)
    monkeypatch.setattr(drift, "DRIFT_ROWS", 4)
    evaluate(case.config(), case.run)
    assert loads == ["original", "model"] and case.result("unlearned")["drift"]["forget"]["rows"] == 4
    assert case.result("original")["identity"] == before
    task = Path(case.raw["evaluation"]["tasks"][0]["path"])
    task.write_text("\n".join(task.read_text(encoding="utf-8").splitlines()[:6]) + "\n", encoding="utf-8")
    del loads[:]
    evaluate(case.config(), case.run)
    assert loads == ["original", "gold", "model"]
    assert case.result("gold")["scores"][0]["n"] == 6
    shutil.copytree(case.run.path.parent / "gold", case.run.model, dirs_exist_ok=True)
    del loads[:]
    evaluate(case.config(drift=False), case.run)
    assert loads == ["model"] and case.result("unlearned")["scores"] == case.result("gold")["scores"]


def test_a_variant_takes_shared_results_from_its_parent(case: Case, loads: list[str]) -> None:
    evaluate(case.config(), case.run)
    variant = case.run.variant("other")
    variant.path.mkdir(parents=True)
    shutil.copytree(case.run.path.parent / "gold", variant.model)
    del loads[:]
    evaluate(case.config(), variant)
    assert loads == ["original", "model"]  # the original for its routing only
    for name in ("original.json", "gold.json"):
        assert (variant.evaluation / name).read_bytes() == (case.run.evaluation / name).read_bytes()
    (case.run.evaluation / "gold.json").write_text("{}")  # the parent's is not what is wanted: made here
    (variant.evaluation / "gold.json").unlink()
    del loads[:]
    evaluate(case.config(), variant)
    assert loads == ["gold"]


@pytest.mark.parametrize("kinds", [slice(None), slice(1, 2)])  # all, verbatim alone
def test_a_diverged_model_is_reported_and_the_others_are_scored(
    case: Case, capsys: pytest.CaptureFixture[str], kinds: slice
) -> None:
    change_weights(case.run.model, lambda weights: weights["model.norm.weight"].fill_(float("nan")))
    evaluate(case.config(tasks=case.raw["evaluation"]["tasks"][kinds]), case.run)
    assert "unlearned has diverged" in capsys.readouterr().out
    result, other = case.result("unlearned"), case.result("gold")
    assert result["diverged"] and result["drift"] is None and result["items"] == {}
    expected = [score | {"n": 0, "value": None} for score in other["scores"]]
    assert [score | {"n": 0} for score in result["scores"]] == expected
    assert not other["diverged"] and other["scores"][0]["value"] is not None


def refused(case: Case, config: Config, match: str, run: RunDirectory | None = None) -> None:
    with pytest.raises(UserError, match=match):
        evaluate(config, run or case.run)
    assert not case.run.evaluation.exists()
    assert not case.run.logs.joinpath("evaluate.jsonl").exists()


def test_bad_input_is_refused_before_anything_is_written(case: Case, tmp_path: Path) -> None:
    task = case.raw["evaluation"]["tasks"][0]
    refused(case, case.config(tasks=[task, task]), "two tasks are named 'facts'")
    refused(case, case.config(tasks=[], drift=False), "nothing to evaluate")
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "w1", "choices": ["w1"] * 5, "answer": 0}])
    refused(case, case.config(tasks=[{**task, "path": bad}]), "bad.jsonl:1: the question has 5 choices")
    refused(case, case.config(models={"gold": str(tmp_path / "none")}), "there is no model directory")
    case.run.model.rename(tmp_path / "kept")
    refused(case, case.config(), "there is no unlearned model here.*trace-ds convert")


def test_another_tokenizer_is_refused_and_a_rewritten_one_is_not(case: Case, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "gold", [*reversed(WORDS)])
    refused(case, case.config(), "the model's tokenizer is not the run's.*gold|gold.*tokenizer is not the run's")
    save_tokenizer(tmp_path / "gold")
    rules = tmp_path / "gold" / "tokenizer.json"
    rules.write_text(json.dumps(json.loads(rules.read_text(encoding="utf-8"))), encoding="utf-8")
    original = tmp_path / "original" / "tokenizer.json"
    assert rules.read_bytes() != original.read_bytes()
    evaluate(case.config(), case.run)
    rules.unlink()  # a directory without a tokenizer is read with the run's
    evaluate(case.config(), case.run)


def test_drift_needs_the_data_of_this_tokenizer(case: Case, tmp_path: Path) -> None:
    shutil.rmtree(case.run.data)
    refused(case, case.config(), "trace-ds prepare")
    refused(case, case.config(drift=False, relearning={"steps": 1}), "trace-ds prepare")
    nothing_of_it = case.config(drift=False)
    write_json(case.run.model / "conversion.json", {"source": {}, "parameters": 1, "tensors": {}})
    check_early("evaluate", Request(nothing_of_it, case.run))
    evaluate(nothing_of_it, case.run)
    assert case.result("unlearned")["scores"]


def evaluate_on(world: Any, raw: dict[str, Any], path: str) -> bool:
    only_the_main_process_fingerprints(world)
    evaluate(validate(raw, "test"), RunDirectory(Path(path)), world)
    return world.is_main


def evaluate_on_a_full_disk(world: Any, raw: dict[str, Any], path: str) -> str:
    def full(file: Path, value: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    stage.write_json = full
    try:
        evaluate(validate(raw, "test"), RunDirectory(Path(path)), world)
    except (UserError, AgreedError) as error:
        return f"{type(error).__name__}: {error}"
    return "wrote it"


def test_a_full_disk_ends_all_processes(case: Case) -> None:
    case.raw["evaluation"] |= {"drift": False, "tasks": case.raw["evaluation"]["tasks"][:1], "models": {}}
    main, other = run_distributed(evaluate_on_a_full_disk, 2, case.raw, str(case.run.path))
    assert main.startswith(f"UserError: {case.run.evaluation}: cannot write here (No space left on device)")
    assert other == "AgreedError: "


def with_every_kind_of_task(case: Case, tmp_path: Path) -> list[dict[str, Any]]:
    """The tasks of the case, now of every kind; its models have room for ten solved questions."""
    forget, retain = (case.raw["data"][side][0]["path"] for side in ("forget", "retain"))
    questions = [{"question": f"w{n} w3", "answer": f"w{n}"} for n in range(5)]
    solved = write_lines(tmp_path / "solved.jsonl", questions)
    case.raw["evaluation"]["tasks"] += [
        {"name": "mia", "type": "membership", "path": forget, "holdout": retain, "role": "forget"},
        {"name": "know", "type": "knowmem", "path": solved, "examples": solved, "role": "utility"},
    ]
    for name in ("original", "gold", "unlearned"):
        path = tmp_path / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 128}))
    shutil.copy(tmp_path / "unlearned" / "config.json", case.run.model)
    tasks: list[dict[str, Any]] = case.raw["evaluation"]["tasks"]
    return tasks


def test_many_processes_give_the_files_of_one(case: Case, tmp_path: Path) -> None:
    """Every kind of task, the drift, relearning and a checkpoint's worth of models: bytes, not digits."""
    tasks = with_every_kind_of_task(case, tmp_path)
    case.raw["evaluation"] |= {"relearning": {"steps": 2, "lr": 1e-2}}
    evaluate(case.config(), case.run)
    alone = case.files()
    assert {score["task"] for score in case.result("gold")["scores"]} == {task["name"] for task in tasks}
    shutil.rmtree(case.run.evaluation)
    assert run_distributed(evaluate_on, 2, case.raw, str(case.run.path)) == [True, False]
    assert case.files() == alone
    rows = tables.items(gather(case.run.path)).rows()
    assert {row["task"] for row in rows} >= {task["name"] for task in tasks if task["role"] == "forget"}
    assert all(row["text"].startswith("w") and row["gold score"] is not None for row in rows)


def test_a_model_that_diverges_on_one_process_has_diverged_on_all(case: Case) -> None:
    change_weights(case.run.model, lambda weights: weights["lm_head.weight"].fill_(float("nan")))
    assert run_distributed(evaluate_on, 2, case.raw, str(case.run.path)) == [True, False]
    assert case.result("unlearned")["diverged"] and not case.result("gold")["diverged"]
