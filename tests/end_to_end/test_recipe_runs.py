"""Every task runs with every model from ``fetch`` to the report: the recipes, on replicas of what they name.

The hub is ``hub_server`` on loopback, its content ``hub_replicas``; sizes are cut down. Six of the pairs always
run, each benchmark and family among them; ``make matrix`` runs the others, and compares with lm-eval's own command.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import command
import pytest
from forked import JOB, Server, serving
from hub_replicas import FAMILIES, READER, hub_id, publish, write_model
from hub_server import Hub
from hub_server import serving as serving_hub

from trace_ds.config.compose import recipe_names
from trace_ds.config.load import load_config
from trace_ds.models.families import inspect_model
from trace_ds.stages.pipeline import Request
from trace_ds.stages.unlearn import check_unlearning_settings

README = Path(__file__).parents[2] / "README.md"
TASKS = recipe_names("task")
SMALL = {
    "model.dtype": "fp32",
    "distributed.ep": 1,
    "distributed.nproc": 1,
    "data.context_length": 64,
    "statistics.batch_rows": 16,
    "unlearning.steps": 2,
    "unlearning.forget_rows": 2,
    "unlearning.retain_rows": 2,
    "unlearning.zero_stage": 1,
    "evaluation.batch_rows": 64,
    "evaluation.max_new_tokens": 8,
}
ALWAYS: dict[tuple[str, str], tuple[str, ...]] = {  # pair → the variants that run too
    ("wmdp_cyber", "olmoe_1b_7b"): (),
    ("wmdp_bio", "deepseek_v2_lite"): (),
    ("muse_books", "qwen3_30b_a3b"): (),
    ("muse_news", "qwen1_5_moe_a2_7b"): (),
    ("tofu_forget10", "mixtral_8x7b_instruct"): ("simnpo",),
    ("tofu_forget05", "qwen3_30b_a3b"): (),
}
AS_THEY_ARE = ("wmdp_cyber", "wmdp_bio", "muse_news_sust")  # tasks that make no model first
OTHERS = [pair for pair in itertools.product(TASKS, FAMILIES) if pair not in ALWAYS]


@pytest.mark.parametrize("model", FAMILIES)
def test_runs_and_their_variants_fit_the_model(model: str, tmp_path: Path) -> None:
    """What is trained, steered and selected exists in a model of the family; of every variant too."""
    directory = write_model(tmp_path, model)
    for task in TASKS:
        request = Request.load([task, model], [f"model.path={directory}"], tmp_path / task).with_variants("all")
        assert len(request.run_and_variants()) == 7
        for item in request.run_and_variants():
            check_unlearning_settings(item.config, inspect_model(request.config.model.path))


@dataclass
class Place:
    """A hub with everything, and a user of it."""

    hub: Hub
    home: Path
    server: Server
    without: Server  # a network
    commits: dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("matrix")
    with serving_hub() as hub:
        commits = publish(hub, folder / "hub")
        home = folder / "home"
        with serving(hub.environment(home)) as server, serving(hub.environment(home, offline=True)) as without:
            yield Place(hub, home, server, without, commits)


def run_of(task: str, model: str, **changes: Any) -> list[str]:
    """The words of the command line after the verb; ``changes`` are dotted keys (``__`` for dots)."""
    keys = SMALL | {"variants": {}} | {key.replace("__", "."): value for key, value in changes.items()}
    keys |= {} if task in AS_THEY_ARE else {"finetune.epochs": None, "finetune.steps": 1, "finetune.batch_rows": 4}
    return [task, model, *(word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}"))]


def from_fetch_to_report(place: Place, folder: Path, words: list[str]) -> Path:
    """The run directory (the default one) of a whole run; after ``fetch`` nothing is asked of the hub."""
    fetched = place.server.run(["fetch", *words], folder, {"HF_TOKEN": READER}, **JOB)
    assert fetched.returncode == 0, fetched
    requested = len(place.hub.requests)
    done = place.without.run(["run", *words, "--variants", "all"], folder, time_s=600, memory_bytes=8 << 30)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert place.hub.requests[requested:] == []
    lines = (done.stdout + done.stderr).splitlines()
    assert len(lines) <= 40 and all(re.match(r"\[[a-z]+( \S+)?\] ", line) for line in lines), lines  # ours only
    return folder / "runs" / f"{words[0]}-{words[1]}"


def check_report(
    place: Place, run: Path, task: str, model: str, variants: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> None:
    assert f"{hub_id(model)}@{place.commits[hub_id(model)]}" in (run / "model" / "README.md").read_text()
    scores = list(csv.DictReader((run / "report" / "scores.csv").read_text().splitlines()))
    models = {score["model"] for score in scores}
    assert models == {"original", "unlearned", *variants} | (set() if task in AS_THEY_ARE else {"retrained"})
    tasks = {each.name for each in load_config([task, model])[0].evaluation.tasks}
    assert {score["task"] for score in scores} >= tasks - {*without}
    result = {(score["model"], score["task"], score["metric"]): float(score["value"] or "nan") for score in scores}
    if "wmdp" in task:
        assert all(0 <= result["unlearned", name, "acc"] <= 1 for name in {task, "mmlu"} - {*without})
    if "muse" in task and task not in AS_THEY_ARE:
        result_of = json.loads((run / "evaluation" / "unlearned.json").read_text())
        (note,) = (score["note"] for score in result_of["scores"] if score["metric"] == "priv_leak")
        assert note.startswith("AUC of the retrained model retrained")
    if "tofu" in task:
        assert result["retrained", "tofu_forget", "forget_quality"] == 1
        assert 0 <= result["unlearned", "tofu_forget", "forget_quality"] <= 1
        assert 0 <= result["unlearned", "tofu_retain", "model_utility"] <= 1
    if task not in AS_THEY_ARE:
        card = (run / "finetune" / "target" / "model" / "README.md").read_text()
        assert f"base_model: {json.dumps(hub_id(model))}" in card
    for card in (run / "model" / "README.md", run / "report" / "model_card.md"):
        assert hub_id(model) in card.read_text().split("---")[1], card


@pytest.mark.slow
@pytest.mark.parametrize(("task", "model"), ALWAYS)
def test_from_fetch_to_the_report(task: str, model: str, place: Place, tmp_path: Path) -> None:
    config = load_config([task, model])[0]
    changes: dict[str, Any] = {"variants": {name: config.variants[name] for name in ALWAYS[task, model]}}
    without = ("mmlu",) if task == "wmdp_bio" else ()  # its 57 subjects are asked with WMDP-cyber
    if without:
        tasks = [one for one in config.evaluation.tasks if one.name not in without]
        changes["evaluation__tasks"] = [one.model_dump(mode="json", exclude_unset=True) for one in tasks]
    run = from_fetch_to_report(place, tmp_path, run_of(task, model, **changes))
    check_report(place, run, task, model, ALWAYS[task, model], without)
    if model == "olmoe_1b_7b":
        check_readme(place, tmp_path)


def check_readme(place: Place, folder: Path) -> None:
    """The README's way from nothing to this run, as it stands there; ``submit`` up to the queue."""
    block = README.read_text(encoding="utf-8").partition("A complete example, WMDP-cyber on OLMoE:\n\n```\n")[2]
    lines = [shlex.split(line, comments=True) for line in block.partition("```")[0].splitlines()]
    assert [words[:2] for words in lines] == [
        ["pip", "install"],
        *(["trace-ds", verb] for verb in ("plan", "fetch", "submit", "report")),
    ]
    for _, verb, *words in (lines[1], lines[3], lines[4]):
        done = place.without.run([verb, *words, *(["--dry-run"] if verb == "submit" else [])], folder, time_s=60)
        assert done.returncode == 0, done


@pytest.mark.matrix
@pytest.mark.parametrize(("task", "model"), OTHERS)
def test_the_other_pairs(task: str, model: str, place: Place, tmp_path: Path) -> None:
    check_report(place, from_fetch_to_report(place, tmp_path, run_of(task, model)), task, model)


@pytest.mark.matrix
def test_scores_are_those_of_the_command(place: Place, tmp_path: Path) -> None:
    """WMDP and the whole of MMLU, also 5-shot through a chat template: ``lm_eval`` on what ``fetch`` brought."""
    model, shots = "mixtral_8x7b_instruct", {"num_fewshot": 5, "apply_chat_template": True}
    tasks: list[dict[str, Any]] = [
        {"name": "wmdp_cyber", "type": "lm_eval", "task": "wmdp_cyber", "role": "forget"},
        {"name": "mmlu", "type": "lm_eval", "task": "mmlu", "role": "utility"},
    ]
    tasks.append(tasks[1] | {"name": "shots"} | shots)
    run = from_fetch_to_report(place, tmp_path, run_of("wmdp_cyber", model, evaluation__tasks=tasks))
    result = json.loads((run / "evaluation" / "original.json").read_text())
    ours = {score["task"]: score["value"] for score in result["scores"] if score["metric"] == "acc"}
    theirs = {}
    for name, requested, options in (
        ("plain", "wmdp_cyber,mmlu", ()),
        ("shots", "mmlu", ("--num_fewshot", "5", "--apply_chat_template")),
    ):
        words = [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--device", "cpu", "--batch_size", "16"),
            *("--model_args", f"pretrained={hub_id(model)},dtype=float32", "--tasks", requested),
            *("--output_path", str(tmp_path / name), *options),
        ]
        done = command.run(words, tmp_path, 800, place.hub.environment(place.home, offline=True))
        assert done.returncode == 0, done.stderr[-2000:]
        results = json.loads(next((tmp_path / name).rglob("results_*.json")).read_text(encoding="utf-8"))["results"]
        theirs |= {name if name == "shots" else task: results[task]["acc,none"] for task in requested.split(",")}
    assert ours == theirs and ours["shots"] != ours["mmlu"]
