"""Every task runs from its data to the report, on replicas: tiny models, and data sets in the layout of the hub's.

The recipes' own configurations, splits, columns, losses, evaluation and variants are used; sizes are cut down, and a
folder in the layout of the hub's, of our own words, stands for each data set on the hub.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
from forked import JOB, Server

from trace_ds.config.compose import compose, recipe_names
from trace_ds.config.load import load_config
from trace_ds.config.plain_yaml import dump_text
from trace_ds.models.families import inspect_model
from trace_ds.stages.pipeline import Request
from trace_ds.stages.unlearn import check_settings

FAMILIES = {
    "mixtral_8x7b": "mixtral",
    "mixtral_8x7b_instruct": "mixtral",
    "olmoe_1b_7b": "olmoe",
    "qwen1_5_moe_a2_7b": "qwen2_moe",
    "qwen3_30b_a3b": "qwen3_moe",
    "deepseek_v2_lite": "deepseek_v2",
}
LAYERS = 8  # RMU steers layer 7, whose and whose lower neighbours' experts are trained
TASKS = recipe_names("task")


def texts(count: int, seed: int) -> list[dict[str, Any]]:
    return [{"text": text} for text in tiny.sentences(count, seed, tiny.WORDS)]


def pairs(count: int, seed: int, **more: Any) -> list[dict[str, Any]]:
    questions, answers, others = (tiny.sentences(count, 10 * seed + n, tiny.WORDS) for n in range(3))
    rows = [{"question": f"{q}?", "answer": a} for q, a in zip(questions, answers, strict=True)]
    if "paraphrased" in more:
        false = tiny.sentences(count, seed + 99, tiny.WORDS)
        rows = [row | {"perturbed_answer": [one, f"{one} salt"]} for row, one in zip(rows, false, strict=True)]
        if more["paraphrased"]:
            rows = [row | {"paraphrased_answer": other} for row, other in zip(rows, others, strict=True)]
    return rows


def muse() -> dict[tuple[str, str], list[dict[str, Any]]]:
    raw = {("raw", split): texts(12, n) for n, split in enumerate(("forget", "holdout", "retain1", "retain2"))}
    passages = [{"prompt": one["text"], "gt": two["text"]} for one, two in zip(texts(4, 5), texts(4, 6), strict=True)]
    asked = {("knowmem", split): pairs(3, n) for n, split in enumerate(("forget_qa", "retain_qa"))}
    solved = {("knowmem", f"{side}_qa_icl"): pairs(10, 7) for side in ("forget", "retain")}
    private = {("privleak", split): texts(8, 20 + n) for n, split in enumerate(("forget", "retain", "holdout"))}
    return raw | {("verbmem", "forget"): passages} | asked | solved | private


def data_sets() -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    """Data set -> (configuration, split) -> rows, named and shaped as on the hub."""
    corpora = ("bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus")
    paper = {"title": "iron", "abstract": "gold", "doi": "10"}
    return {
        "cais/wmdp-corpora": {(name, "train"): texts(20, n) for n, name in enumerate(corpora)},
        "cais/wmdp-bio-forget-corpus": {("default", "train"): [paper | row for row in texts(20, 3)]},
        "Salesforce/wikitext": {("wikitext-2-raw-v1", "test"): [{"text": ""}, *texts(10, 4)]},
        "muse-bench/MUSE-Books": muse(),
        "muse-bench/MUSE-News": muse(),
        "locuslab/TOFU": {
            ("forget10", "train"): pairs(8, 1),
            ("retain90", "train"): pairs(16, 2),
            ("forget10_perturbed", "train"): pairs(8, 1, paraphrased=True),
            ("retain_perturbed", "train"): pairs(4, 2, paraphrased=True),
            ("real_authors_perturbed", "train"): pairs(4, 3, paraphrased=False),
            ("world_facts_perturbed", "train"): pairs(4, 4, paraphrased=False),
        },
    }


def write_data_set(folder: Path, splits: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    configs: dict[str, list[dict[str, str]]] = {}
    for (config, split), rows in splits.items():
        file = f"{config}/{split}-00000-of-00001.parquet"
        (folder / config).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), folder / file)
        configs.setdefault(config, []).append({"split": split, "path": file})
    listed = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    (folder / "README.md").write_text(f"---\n{dump_text({'configs': listed})}---\n", encoding="utf-8")


@pytest.fixture(scope="module")
def replicas(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("replicas")
    for name, splits in data_sets().items():
        write_data_set(folder / name, splits)
    questions = [
        {"question": f"{text}?", "choices": tiny.WORDS[n : n + 4], "answer": n % 4}
        for n, text in enumerate(tiny.sentences(6, 30, tiny.WORDS))
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions), encoding="utf-8")
    for fragment, family in FAMILIES.items():
        model = folder / compose([fragment]).raw["model"]["path"]
        tiny.make_model(model, family, layers=LAYERS)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    yield folder


def local(replicas: Path, task: str, model: str, folder: Path) -> Path:
    """The merged recipe as a file, with the replicas for what it names on the hub."""
    raw = compose([task, model]).raw
    for each in raw["evaluation"]["tasks"]:
        if each["type"] == "lm_eval":  # of MMLU's 57 subjects there is no replica: WMDP's questions stand for all
            each |= {"task": "wmdp_cyber", "path": str(replicas / "questions.jsonl")}
    text = dump_text({"name": f"{task}-{model}"} | raw)
    for name in (*data_sets(), compose([model]).raw["model"]["path"]):
        text = text.replace(f": {name}\n", f": {replicas / name}\n")
    (folder / "local.yaml").write_text(text, encoding="utf-8")
    return folder / "local.yaml"


@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_and_its_variants_fit_the_model(task: str, model: str, replicas: Path, tmp_path: Path) -> None:
    """What is trained, steered and selected exists in a model of the family; of every variant too."""
    path = local(replicas, task, model, tmp_path)
    request = Request.load(str(path), [], tmp_path / "run")
    info = inspect_model(request.config.model.path)
    assert len(request.all()) == 7
    for item in request.all():
        check_settings(item.config, info)


SMALL = {
    "model.dtype": "fp32",
    "distributed.ep": 1,
    "distributed.nproc": 1,
    "data.context_length": 64,
    "statistics.batch_rows": 8,
    "unlearning.steps": 2,
    "unlearning.forget_rows": 2,
    "unlearning.retain_rows": 2,
    "unlearning.zero_stage": 1,
    "evaluation.batch_rows": 16,
    "evaluation.drift_rows": 4,
    "evaluation.max_new_tokens": 8,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "model", "variants"),
    [
        ("wmdp_cyber", "olmoe_1b_7b", ("seuf", "grip")),
        ("wmdp_bio", "deepseek_v2_lite", ()),
        ("muse_books", "qwen3_30b_a3b", ("rmu",)),
        ("muse_news", "qwen1_5_moe_a2_7b", ()),
        ("tofu_forget10", "mixtral_8x7b", ("simnpo",)),
    ],
)
def test_from_the_data_to_the_report(
    task: str, model: str, variants: tuple[str, ...], replicas: Path, tmp_path: Path, server: Server
) -> None:
    path = local(replicas, task, model, tmp_path)
    kept = {name: load_config([task, model])[0].variants[name] for name in variants}
    changes = SMALL | {"variants": kept} | ({"finetune.epochs": 1} if "wmdp" not in task else {})
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    result = server.run(["run", path, "--run-dir", tmp_path / "run", *words], tmp_path, **JOB)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    scores = json.loads((tmp_path / "run" / "report" / "scores.json").read_text())
    models = {score["model"] for score in scores}
    assert {"original", "unlearned", *variants} <= models
    asked = {each.name for each in load_config([task, model])[0].evaluation.tasks}
    assert {score["task"] for score in scores} >= asked
    found = {(score["model"], score["metric"]): score["value"] for score in scores}
    if "wmdp" not in task:
        assert "retrained" in models
    if "muse" in task:
        result_of = json.loads((tmp_path / "run" / "evaluation" / "unlearned.json").read_text())
        (note,) = (score["note"] for score in result_of["scores"] if score["metric"] == "priv_leak")
        assert note.startswith("AUC of the retrained model retrained")
    if "tofu" in task:
        assert found["retrained", "forget_quality"] == 1 and 0 <= found["unlearned", "forget_quality"] <= 1
        assert 0 <= found["unlearned", "model_utility"] <= 1
