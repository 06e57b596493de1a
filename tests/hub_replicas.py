"""Replicas of all that the recipes name on the hub, for ``hub_server``: a few rows of our own words in each data set's
own configurations, splits, columns and files, and for each model fragment a tiny model of its family, in shards.

    with hub_server.serving() as hub:
        commits = publish(hub, folder)
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import tiny
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from datasets import List as ListOf
from hub_server import Hub

from trace_ds.config.compose import compose

FAMILIES = {
    "mixtral_8x7b": "mixtral",
    "mixtral_8x7b_instruct": "mixtral",
    "olmoe_1b_7b": "olmoe",
    "qwen1_5_moe_a2_7b": "qwen2_moe",
    "qwen3_30b_a3b": "qwen3_moe",
    "deepseek_v2_lite": "deepseek_v2",
}
LAYERS = 8  # RMU steers layer 7, whose and whose lower neighbours' experts are trained
CHAT_TEMPLATE = "<s>{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
GATED, READER = "cais/wmdp-bio-forget-corpus", "reader"  # who may read the gated set

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, Rows]]  # configuration → split → rows

TASKS = Path(str(files("lm_eval"))) / "tasks" / "mmlu" / "default"
SUBJECTS = sorted(path.stem.removeprefix("mmlu_") for path in TASKS.glob("mmlu_*.yaml"))  # the 57 of MMLU
CHOICES = {"choices": ListOf(Value("string")), "answer": ClassLabel(names=["A", "B", "C", "D"])}
MMLU = Features({"question": Value("string"), "subject": Value("string"), **CHOICES})


def texts(count: int, seed: int) -> Rows:
    return [{"text": text} for text in tiny.sentences(count, seed, tiny.WORDS)]


def questions(count: int, seed: int, **more: Any) -> Rows:
    requested = tiny.sentences(count, seed, tiny.WORDS)
    offered = [tiny.WORDS[(7 * seed + number) % 29 :][:4] for number in range(count)]
    pairs = enumerate(zip(requested, offered, strict=True))
    return [
        {"question": f"{text}?", **more, "choices": four, "answer": (number + seed) % 4}
        for number, (text, four) in pairs
    ]


def pairs(count: int, seed: int, *more: str) -> Rows:
    """Questions and answers; ``more``: what TOFU's ``*_perturbed`` have besides."""
    requested, summary, false, other = (tiny.sentences(count, 10 * seed + n, tiny.WORDS) for n in range(4))
    rows = [{"question": f"{q}?", "answer": a} for q, a in zip(requested, summary, strict=True)]
    also = {
        "paraphrased_answer": other,
        "perturbed_answer": [[one, f"{one} salt"] for one in false],
        "paraphrased_question": [f"{one}?" for one in other],
    }
    return [row | {key: also[key][number] for key in more} for number, row in enumerate(rows)]


def muse(**more: dict[str, Rows]) -> Configs:
    sides = ("forget", "retain1", "retain2", "holdout")
    raw = {side: texts(12, seed) for seed, side in enumerate(sides)}
    questions = {f"{side}_qa": pairs(3, seed) for seed, side in enumerate(("forget", "retain"))}
    solved = {f"{side}_qa_icl": pairs(10, 7 + seed) for seed, side in enumerate(("forget", "retain"))}
    passages = [{"prompt": one["text"], "gt": two["text"]} for one, two in zip(texts(3, 5), texts(3, 6), strict=True)]
    private = {side: texts(6, 20 + seed) for seed, side in enumerate(("retain", "forget", "holdout"))}
    train = {side: rows for side, rows in raw.items() if side != "holdout"}
    result = {"raw": raw, "knowmem": questions | solved, "privleak": private, "verbmem": {"forget": passages}}
    return result | {"train": train} | more


def tofu() -> Configs:
    """Each configuration is one file of JSON Lines, split train."""
    perturbed = ("paraphrased_answer", "perturbed_answer", "paraphrased_question")
    plain = {"full": 24, "forget01": 1, "forget05": 2, "forget10": 8, "retain90": 16, "retain95": 17, "retain99": 18}
    result = {name: pairs(count, 1 + name.startswith("retain")) for name, count in plain.items()}
    result |= {
        f"{name}_perturbed": pairs(len(result[name]), 1, *perturbed) for name in list(result) if "forget" in name
    }
    result["retain_perturbed"] = pairs(4, 2, *perturbed)
    for seed, name in enumerate(("real_authors", "world_facts")):
        result |= {name: pairs(4, 3 + seed), f"{name}_perturbed": pairs(4, 3 + seed, "perturbed_answer")}
    return {name: {"train": rows} for name, rows in result.items()}


def data_sets() -> dict[str, Configs]:
    """Data set → configuration → split → rows, named and shaped as on the hub."""
    corpora = ("bio-retain-corpus", "cyber-forget-corpus", "cyber-retain-corpus")
    paper = {"title": "iron", "abstract": "gold", "doi": "10"}
    folds = {f"forget_{number}": texts(2, number) for number in range(1, 5)}
    wiki = {"test": [{"text": ""}, *texts(10, 4)], "train": texts(2, 5), "validation": texts(2, 6)}
    dangers = ("bio", "chem", "cyber")
    subjects = {
        name: {"test": rows[:1], "validation": rows[1:2], "dev": rows[2:]}
        for seed, name in enumerate(SUBJECTS)
        for rows in [questions(7, seed, subject=name)]
    }
    return {
        "cais/wmdp-corpora": {name: {"train": texts(20, seed)} for seed, name in enumerate(corpora)},
        GATED: {"default": {"train": [paper | row for row in texts(20, 3)]}},
        "cais/wmdp": {f"wmdp-{name}": {"test": questions(5, seed)} for seed, name in enumerate(dangers)},
        "cais/mmlu": subjects,
        "Salesforce/wikitext": {f"wikitext-{name}-v1": wiki for name in ("103", "103-raw", "2", "2-raw")},
        "muse-bench/MUSE-Books": muse(),
        "muse-bench/MUSE-News": muse(scal=folds, sust=folds),
        "locuslab/TOFU": tofu(),
    }


def write_data_set(folder: Path, name: str, configs: Configs) -> None:
    """The files of a data set, and its page with the YAML that says which are which."""
    listed = []
    for config, splits in configs.items():
        parts: Any = []
        for split, rows in splits.items():
            data = Dataset.from_list(rows, features=MMLU if "mmlu" in name else None)
            if "TOFU" in name:
                parts = f"{config}.json"
                folder.mkdir(parents=True, exist_ok=True)
                data.to_json(folder / parts)
                continue
            place = "data" if config == "default" else config
            (folder / place).mkdir(parents=True, exist_ok=True)
            shards = 4 if config == "bio-retain-corpus" else 1
            for number in range(shards):
                file = f"{split}-{number:05}-of-{shards:05}.parquet"
                data.shard(shards, number).to_parquet(folder / place / file)
            parts.append({"split": split, "path": f"{place}/{split}-*"})
        listed.append({"config_name": config, "data_files": parts} | ({"default": True} if config == "full" else {}))
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': listed})}---\n", encoding="utf-8")


def hub_id(fragment: str) -> str:
    return str(compose([fragment]).raw["model"]["path"])


def write_model(folder: Path, fragment: str) -> Path:
    place = folder / hub_id(fragment)
    room = {"max_position_embeddings": 1024}  # for ten solved questions
    tiny.make_model(place, FAMILIES[fragment], layers=LAYERS, experts=8, max_shard_size="200KB", **room)
    if "instruct" in fragment:
        (place / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return place


def publish(hub: Hub, folder: Path) -> dict[str, str]:
    """Everything on the hub; {name: commit}."""
    commits = {}
    for name, configs in data_sets().items():
        write_data_set(folder / name, name, configs)
        access = {"gated": True, "readers": (READER,)} if name == GATED else {}
        commits[name] = hub.add("datasets", name, folder / name, **access)
    for fragment in FAMILIES:
        commits[hub_id(fragment)] = hub.add("models", hub_id(fragment), write_model(folder, fragment))
    return commits
