"""WMDP and MMLU: our numbers are those of the `lm_eval` command on the same model and the same files."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import command
import pytest
import tiny
import yaml

from trace_ds.config.schema import TaskConfig
from trace_ds.errors import UserError
from trace_ds.evaluation.items import read_task
from trace_ds.evaluation.language_model import ModelSettings, loaded
from trace_ds.evaluation.tasks import run_task

PROMPT = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
SUBJECTS = {"wmdp_bio": "biology", "mmlu_anatomy": "anatomy"}


def write_questions(path: Path, count: int) -> Path:
    draw = random.Random(path.name)
    lines = [
        {"question": " ".join(draw.choices(tiny.WORDS, k=6)), "choices": draw.sample(tiny.WORDS, 4), "answer": n % 4}
        for n in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_task(path: Path, name: str, file: Path) -> None:
    """The task as its authors publish it, by hand, on a local file."""
    task = {
        "task": f"{name}_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "num_fewshot": 0,
        "output_type": "multiple_choice",
        "description": f"The following are multiple choice questions (with answers) about {SUBJECTS[name]}.\n\n",
        "doc_to_text": PROMPT,
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path.write_text(yaml.safe_dump(task), encoding="utf-8")


def test_our_numbers_are_those_of_the_command(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model_path = tmp_path / "model"
    shutil.copytree(tiny_model, model_path)
    config = json.loads((model_path / "config.json").read_text())
    (model_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    files = {name: write_questions(tmp_path / f"{name}.jsonl", 20) for name in SUBJECTS}
    (tmp_path / "tasks").mkdir()
    for name, file in files.items():
        write_task(tmp_path / "tasks" / f"{name}.yaml", name, file)
    done = command.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
            *("--model_args", f"pretrained={model_path},dtype=float32", "--include_path", tmp_path / "tasks"),
            *("--tasks", ",".join(f"{name}_here" for name in SUBJECTS), "--output_path", tmp_path / "out"),
            "--log_samples",
        ]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text(encoding="utf-8"))["results"]

    settings = ModelSettings("fp32", add_bos=True, add_eos=True, batch_rows=4)
    with loaded(str(model_path), AutoTokenizer.from_pretrained(model_path), settings) as model:
        for name, file in files.items():
            config_ = TaskConfig(name=name, type="lm_eval", task=name, path=str(file), role="forget")
            outcome = run_task(model, read_task(config_), max_new_tokens=4, context_length=64)
            (score,) = outcome.scores
            assert (score["metric"], score["n"], score["chance"]) == ("acc", 20, 0.25)
            assert score["value"] == theirs[f"{name}_here"]["acc,none"]
            samples: list[Any] = [
                json.loads(line)
                for line in next((tmp_path / "out").rglob(f"samples_{name}_here_*.jsonl")).read_text().splitlines()
            ]
            expected = [[float(pair[0]) for pair in sample["filtered_resps"]] for sample in samples]
            ours = [item["log_prob"] for item in outcome.items]
            assert len(ours) == 20 and all(a == pytest.approx(b, abs=1e-5) for a, b in zip(ours, expected, strict=True))


def test_an_unknown_task_and_a_bad_file_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    settings = ModelSettings("fp32", add_bos=True, add_eos=True, batch_rows=4)
    task = TaskConfig(name="x", type="lm_eval", task="no_such_task", role="utility")
    with (
        loaded(str(tiny_model), AutoTokenizer.from_pretrained(tiny_model), settings) as model,
        pytest.raises(UserError, match="lm-eval knows no task 'no_such_task'"),
    ):
        run_task(model, read_task(task), max_new_tokens=4, context_length=64)
    five = tmp_path / "five.jsonl"
    five.write_text(json.dumps({"question": "q", "choices": list("abcde"), "answer": 0}) + "\n")
    with pytest.raises(UserError, match="the question has 5 choices"):
        read_task(TaskConfig(name="x", type="lm_eval", task="wmdp_bio", path=str(five), role="forget"))
