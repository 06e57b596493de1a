"""WMDP and MMLU: our numbers are lm-eval's own on the same model and the same files."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import yaml
from processes import run_distributed
from test_evaluation_models import save_model

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation import harness
from trace_ds.evaluation.items import ChoiceItem, read_task
from trace_ds.evaluation.kinds import evaluate_choice, evaluate_perplexity
from trace_ds.evaluation.language_model import ModelSettings, Sequence, Sharding, open_language_model
from trace_ds.evaluation.tasks import run_task
from trace_ds.reporting.tables import item_cells

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


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Path]:
    """A folder with a model that has room for the prompts, and a file of questions for each task."""
    folder = tmp_path_factory.mktemp("harness")
    shutil.copytree(tiny_model, folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    (folder / "model" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    for name in SUBJECTS:
        write_questions(folder / f"{name}.jsonl", 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("lm_eval.tasks.manager.__file__", str(folder / "all" / "manager.py"))  # reading all takes seconds
        yield folder


def our_outcomes(world: Any, folder: str, sharding: Sharding | None = None) -> list[tuple[Any, Any]]:
    """Scores and logs of both tasks on the processes of a world (None: on this one)."""
    from transformers import AutoTokenizer

    path = f"{folder}/model"
    settings = ModelSettings("fp32", add_bos=True, add_eos=True, batch_rows=4)
    raw = {"type": "lm_eval", "include_path": f"{folder}/tasks", "role": "forget"}
    with open_language_model(
        path, AutoTokenizer.from_pretrained(path), settings, world, sharding or Sharding()
    ) as model:
        configs = [TaskConfig.model_validate(raw | {"name": name, "task": f"{name}_here"}) for name in SUBJECTS]
        tasks = list(map(read_task, configs))
        results = [run_task(model, task, max_new_tokens=4, context_length=64) for task in tasks]
    return [(outcome.scores, outcome.items) for outcome in results]


@pytest.mark.parametrize(
    ("automatic", "add_bos", "begin", "equal"),
    [
        (True, True, "", True),
        (False, True, "", False),
        (False, True, "<s> ", True),  # a prompt that begins as the run's documents do
    ],
)
def test_choices_are_scored_as_the_harness_does_where_texts_begin_alike(
    automatic: bool, add_bos: bool, begin: str, equal: bool, tmp_path: Path
) -> None:
    """The harness leaves the BOS token to the tokenizer, ``choice`` follows ``data.add_bos``."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    path = save_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(path)
    if automatic:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", None, [("<s>", 0)])
    draw = random.Random(3)
    words = [f"w{number}" for number in range(60)]
    items = [
        ChoiceItem(str(n), " ".join(draw.choices(words, k=4)), tuple(draw.sample(words, 4)), n % 4, "")
        for n in range(12)
    ]
    with open_language_model(str(path), tokenizer, ModelSettings("fp32", add_bos, True, 4)) as model:
        ours = evaluate_choice(model, items, "here")
        theirs = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=4, backend="causal").loglikelihood(
            [
                Instance("loglikelihood", {}, (begin + item.prompt, f" {choice}"), number)
                for item in items
                for number, choice in enumerate(item.choices)
            ],
            disable_tqdm=True,
        )
    expected_IC = np.array([log_prob for log_prob, _ in theirs]).reshape(len(items), 4)
    actual_IC = np.array([log["log_prob"] for log in ours.logs])
    assert np.allclose(actual_IC, expected_IC, atol=1e-5) == equal
    lengths_IC = np.array([[len(choice) for choice in item.choices] for item in items])
    if equal:
        assert [log["predicted"] for log in ours.logs] == expected_IC.argmax(1).tolist()
        assert [log["predicted_norm"] for log in ours.logs] == (expected_IC / lengths_IC).argmax(1).tolist()
    else:
        assert np.abs(actual_IC - expected_IC).max() > 0.01


def test_perplexity_differs_from_the_harness_by_the_end_of_each_document(tmp_path: Path) -> None:
    """Ours counts EOS where ``data.add_eos`` puts one after the documents; without it the sums are the same."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    path = save_model(tmp_path / "model")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    draw = random.Random(3)
    texts = [" ".join(draw.choices([f"w{n}" for n in range(60)], k=draw.randint(3, 20))) for _ in range(20)]
    nll = {}
    for add_eos in (True, False):
        with open_language_model(str(path), tokenizer, ModelSettings("fp32", True, add_eos, 4)) as model:
            outcome = evaluate_perplexity(model, [Document(text, "") for text in texts], 64, "here")
            nll[add_eos] = float(outcome.columns["nll"].sum())
            ended = [(*model.encode(text), tokenizer.eos_token_id) for text in texts]
            ends = model.score([Sequence(ids, len(ids) - 1) for ids in ended])
            theirs = HFLM(pretrained=model.model, tokenizer=tokenizer, batch_size=4, backend="causal")
            requests = [Instance("loglikelihood_rolling", {}, (text,), n) for n, text in enumerate(texts)]
            expected = -sum(theirs.loglikelihood_rolling(requests, disable_tqdm=True))
    assert nll[False] == pytest.approx(expected, abs=1e-2)
    assert nll[True] - nll[False] == pytest.approx(-sum(float(end.log_prob[0]) for end in ends), abs=1e-2)


def reference(model: Path, include: Path, names: list[str], **keys: Any) -> dict[str, Any]:
    """What the ``lm_eval`` command computes, on a model of its own class."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include), include_defaults=False)
    shape: dict[str, Any] = {"model": "hf", "model_args": f"pretrained={model},dtype=float32", "device": "cpu"}
    results = simple_evaluate(**shape, batch_size=4, tasks=names, task_manager=manager, bootstrap_iters=0, **keys)
    assert results is not None
    return dict(results)


def log_probs_of(results: dict[str, Any], name: str) -> list[Any]:
    samples = results["samples"][name]
    return [pytest.approx([float(pair[0]) for pair in sample["filtered_resps"]], abs=1e-5) for sample in samples]


def test_our_numbers_are_lm_evals_on_one_process_and_on_two(place: Path) -> None:
    (place / "tasks").mkdir()
    for name in SUBJECTS:
        write_task(place / "tasks" / f"{name}.yaml", name, place / f"{name}.jsonl")
    outcomes = our_outcomes(None, str(place))
    assert run_distributed(our_outcomes, 2, str(place)) == [outcomes, outcomes]
    for sharded in run_distributed(our_outcomes, 2, str(place), Sharding(2)):  # in lockstep
        for (scores, items), (expected, alone) in zip(sharded, outcomes, strict=True):
            assert scores == expected
            for item, other in zip(items, alone, strict=True):
                assert item == other | {"log_prob": pytest.approx(other["log_prob"], abs=1e-5)}
    theirs = reference(place / "model", place / "tasks", [f"{name}_here" for name in SUBJECTS])
    for name, (scores, items) in zip(SUBJECTS, outcomes, strict=True):
        (score,) = scores
        assert (score["metric"], score["n"], score["chance"]) == ("acc", 20, 0.25)
        assert score["value"] == theirs["results"][f"{name}_here"]["acc,none"]
        assert [item["log_prob"] for item in items] == log_probs_of(theirs, f"{name}_here")
        lines = [json.loads(line) for line in (place / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for item, line in zip(items, lines, strict=True):
            assert (item["choices"], item["answer"]) == (line["choices"], line["answer"])
            shown = f"{line['question']} → {line['choices'][line['answer']]}"
            predicted, correct = line["choices"][item["predicted"]], item["predicted"] == item["answer"]
            assert item_cells(item) == [item["id"], shown, predicted, float(correct)]


TEMPLATE = (
    "{% for m in messages %}<s> w1 {{ m['content'] }} </s>{% endfor %}{% if add_generation_prompt %}w2{% endif %}"
)


def test_solved_examples_and_the_chat_template_are_lm_evals(place: Path) -> None:
    """A task of one's own with a split of solved examples, as MMLU has one; on a model of lm-eval's own class."""
    from transformers import AutoTokenizer

    shutil.copytree(place / "model", place / "chat")
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    assert tokenizer.chat_template is None
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place / "chat")
    (place / "shots").mkdir()
    write_task(place / "shots" / "wmdp_bio.yaml", "wmdp_bio", place / "wmdp_bio.jsonl")
    task = yaml.safe_load((place / "shots" / "wmdp_bio.yaml").read_text())
    del task["num_fewshot"]
    task["dataset_kwargs"]["data_files"]["dev"] = str(write_questions(place / "solved.jsonl", 5))
    task |= {"fewshot_split": "dev", "fewshot_config": {"sampler": "first_n"}}
    (place / "shots" / "wmdp_bio.yaml").write_text(yaml.safe_dump(task))
    theirs = reference(place / "chat", place / "shots", ["wmdp_bio_here"], num_fewshot=2, apply_chat_template=True)
    raw = {"name": "shots", "type": "lm_eval", "task": "wmdp_bio_here", "role": "forget"}
    raw |= {"include_path": str(place / "shots")}
    results = {}
    for keys in ({"num_fewshot": 2, "apply_chat_template": True}, {"num_fewshot": 2}, {}):
        read = read_task(TaskConfig.model_validate(raw | keys))
        with open_language_model(str(place / "chat"), tokenizer, ModelSettings("fp32", True, True, 4)) as model:
            outcome = run_task(model, read, max_new_tokens=4, context_length=64)
        results[tuple(keys)] = [item["log_prob"] for item in outcome.items]
    ours, without, zero_shot = results.values()
    assert ours == log_probs_of(theirs, "wmdp_bio_here") and len(ours) == 20
    assert ours != without != zero_shot
    tokenizer.chat_template = None
    asking = TaskConfig.model_validate(raw | {"apply_chat_template": True})
    with pytest.raises(UserError, match="shots: the tokenizer has no chat template"):
        harness.check_template(asking, tokenizer)
    before = read_task(asking).sha256
    (place / "shots" / "wmdp_bio.yaml").write_text(yaml.safe_dump(task | {"description": "Choose.\n\n"}))
    assert read_task(asking).sha256 != before == read.sha256


def test_a_group_of_ones_own_may_name_any_task(place: Path, tmp_path: Path) -> None:
    """Beside the folder that a task is called after, all others are read where that is not enough."""
    (place / "all").mkdir()
    write_task(place / "all" / "far.yaml", "wmdp_bio", place / "wmdp_bio.jsonl")
    (tmp_path / "group.yaml").write_text(yaml.safe_dump({"group": "mine", "task": ["wmdp_bio_here"]}))
    raw = {"name": "mine", "type": "lm_eval", "task": "mine", "role": "forget", "include_path": str(tmp_path)}
    assert list(harness._load(TaskConfig.model_validate(raw))["tasks"]) == ["wmdp_bio_here"]
    assert "wmdp_bio_here" not in harness._task_manager("wmdp_bio").task_index


FUNCTIONS = """
def raises(docs):
    return docs[0]["nothing"]

def leaves(doc):
    raise SystemExit(0)

def none(doc):
    return None

def endless(doc):
    return endless(doc)

def aggregate(values):
    return values[10_000]
"""
ACC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
MISTAKES: dict[str, tuple[dict[str, Any] | str, str]] = {  # keys changed in a task that is right, or its file; message
    "target 9": ({"doc_to_target": 9}, "own.yaml: .*IndexError: list index out of range"),
    "target -1": ({"doc_to_target": "{{ -1 }}"}, "question 0 .* has the target '-1', which names none"),
    "target letter": ({"doc_to_target": "Z"}, "has the target 'Z', which names none"),
    "target text": ({"doc_to_target": "question"}, "which names none of its 4 choices"),
    "target of the second": ({"doc_to_target": "{{ [0, 7][answer > 0] }}"}, "question 1 .* target 7, which names none"),
    "target none": ({"doc_to_target": "!function f.none"}, "own.yaml: .*TypeError"),
    "targets": ({"doc_to_target": [8, 9]}, r"the target \[8, 9\], which names none"),
    "leaves": ({"doc_to_text": "!function f.leaves"}, r"f.py line 5: .*\(SystemExit: 0\). Fix: correct the task"),
    "raises": ({"process_docs": "!function f.raises"}, r"f.py line 2: .*\(KeyError: .*nothing.*\)"),
    "endless": ({"doc_to_text": "!function f.endless"}, "a function never ends"),
    "aggregate": ({"metric_list": [ACC | {"aggregation": "!function f.aggregate"}]}, "f.py line 14: .*IndexError"),
    "no function": ({"doc_to_text": "!function f.nothing"}, "own.yaml: .*has no function 'nothing'"),
    "no module": ({"doc_to_text": "!function g.nothing"}, "own.yaml: .*Cannot import module 'g'"),
    "no dot": ({"doc_to_text": "!function nothing"}, "own.yaml: .*Invalid function reference"),
    "jinja syntax": ({"doc_to_text": "{{question"}, "own.yaml: .*TemplateSyntaxError"),
    "jinja name": ({"doc_to_text": "{{quetsion}}"}, "own.yaml: .*'quetsion' is undefined"),
    "index": ({"doc_to_text": "{{choices[7]}}"}, "own.yaml: .*UndefinedError"),
    "choices": ({"doc_to_choice": "{{question}}"}, "own.yaml: lm-eval cannot run the task own"),
    "no choice": ({"doc_to_choice": "{{[]}}"}, "own.yaml: lm-eval cannot run the task own"),
    "empty choice": ({"doc_to_choice": ["A", "B", "", "D"]}, "own.yaml: lm-eval cannot run the task own"),
    "metric": ({"metric_list": [{"metric": "accc"}]}, "own.yaml: lm-eval cannot run the task own"),
    "no accuracy": ({"metric_list": [{"metric": "brier_score", "aggregation": "brier_score"}]}, "has none of acc"),
    "split": ({"test_split": "tset"}, "own.yaml: .*KeyError: 'tset'"),
    "file": ({"dataset_kwargs": {"data_files": {"test": "/nowhere.jsonl"}}}, "own.yaml: .*/nowhere.jsonl"),
    "output": ({"output_type": "generate_until"}, "own is not multiple-choice"),
    "output type": ({"output_type": "multiple"}, "own.yaml: lm-eval cannot run the task own"),
    "key": ({"doc_to_txt": "a"}, "own.yaml: .*doc_to_txt"),
    "include": ({"include": "nowhere.yaml"}, "lm-eval (cannot run the|knows no) task"),
    "class": ({"class": "!function f.none"}, "own.yaml: lm-eval cannot run the task own"),
    "number": ("task: 5\n", "lm-eval (cannot run the|knows no) task"),
    "itself": ("group: own\ntask: [own]\n", "own.yaml: .*contains itself"),
    "list": ("- task: own\n", "lm-eval knows no task 'own', and no file in .* defines it"),
    "syntax": ("task: own\nnum_fewshot: [0\n", r"own.yaml line 3: the file is not valid YAML .expected"),
    "tab": ("task: own\n\tnum_fewshot: 0\n", r"own.yaml line 2: the file is not valid YAML"),
    "bytes": ("task: \udcff\n", "own.yaml: the task is damaged"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_task_of_ones_own_is_one_line(mistake: str, place: Path, tmp_path: Path) -> None:
    """Known before a model is loaded; never a score, a traceback or a silent end."""
    change, message = MISTAKES[mistake]
    config = own_task(tmp_path, place, change)
    with pytest.raises(UserError, match=message) as caught:
        read_task(config)
        harness.rehearse(config)
    assert "\n" not in caught.value.line() and caught.value.fix


def own_task(folder: Path, place: Path, change: dict[str, Any] | str) -> TaskConfig:
    """A task named ``own`` in a folder: a right one with keys changed, or the text of a file."""
    (folder / "f.py").write_text(FUNCTIONS.lstrip(), encoding="utf-8")
    text = change
    if isinstance(change, dict):
        write_task(folder / "own.yaml", "wmdp_bio", place / "wmdp_bio.jsonl")
        task = yaml.safe_load((folder / "own.yaml").read_text()) | {"task": "own"} | change
        text = re.sub(r"'?(!function [\w.]+)'?", r"\1", yaml.safe_dump(task))
    (folder / "own.yaml").write_bytes(str(text).encode(errors="surrogateescape"))
    raw = {"name": "own", "type": "lm_eval", "task": "own", "role": "forget", "include_path": str(folder)}
    return TaskConfig.model_validate(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"doc_to_target": "{{ [answer, 0] }}", "metric_list": [ACC, ACC | {"metric": "acc_norm"}]},
        {"doc_to_target": "{{ choices[answer] }}", "doc_to_choice": "choices"},
        {"doc_to_text": "answer", "doc_to_target": "{{ question }}", "doc_to_choice": "choices"},  # as winogrande
    ],
)
def test_a_right_task_of_ones_own_passes_its_rehearsal(change: dict[str, Any], place: Path, tmp_path: Path) -> None:
    config = own_task(tmp_path, place, change)
    read_task(config)
    harness.rehearse(config)


def test_what_a_model_raises_is_no_mistake_of_the_task(place: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = str(place / "model")
    config = own_task(tmp_path, place, {})
    with open_language_model(path, AutoTokenizer.from_pretrained(path), ModelSettings("fp32", True, True, 4)) as model:
        model.model.register_forward_pre_hook(lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            run_task(model, read_task(config), max_new_tokens=4, context_length=64)
