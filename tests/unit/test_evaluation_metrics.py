"""The metrics, against brute force and the packages the field uses."""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation_models import opened, save_model

from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.dataset import TokenDataset, write_rows
from trace_ds.corpora.pack import PackingCounts, pack
from trace_ds.corpora.read import Document
from trace_ds.errors import UserError
from trace_ds.evaluation import drift, kinds, membership, metrics
from trace_ds.evaluation.items import ChoiceItem, VerbatimItem, read_choice_items, read_task, read_verbatim_items
from trace_ds.evaluation.language_model import LanguageModel, TokenScores

GOOD = {"id": "a", "prompt": "w1 w2", "choices": ["w3", "w4", "w5 w6", "w7"], "answer": 2, "source": "s"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with opened(save_model(tmp_path_factory.mktemp("model"))) as language_model:
        yield language_model


def write_lines(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def task(kind: str, path: Path) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "type": kind, "path": str(path), "role": "forget"})


# ---------------------------------------------------------------------------------------------------- files


def test_items_are_read_with_defaults(tmp_path: Path) -> None:
    bare = {key: value for key, value in GOOD.items() if key not in ("id", "source")}
    items = read_choice_items(task("choice", write_lines(tmp_path / "facts.jsonl", GOOD, bare)))
    assert items == [
        ChoiceItem("a", "w1 w2", ("w3", "w4", "w5 w6", "w7"), 2, "s"),
        ChoiceItem("2", "w1 w2", ("w3", "w4", "w5 w6", "w7"), 2, "facts"),
    ]
    path = write_lines(tmp_path / "book.jsonl", {"id": 5, "prompt": "x", "continuation": "y"})
    passages = read_verbatim_items(task("verbatim", path))
    assert passages == [VerbatimItem("5", "x", "y", "book")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": None}, "the answer is missing"),
        ({"answer": 4}, "the answer 4 is out of range"),
        ({"answer": -1}, "the answer -1 is out of range"),
        ({"answer": "2"}, "the answer '2' is out of range"),
        ({"answer": True}, "the answer True is out of range"),
        ({"choices": ["w1", "w2", "w3", "w4", "w5"]}, "the question has 5 choices"),
        ({"choices": ["w1", "w2", "w3"]}, "the question has 3 choices"),
        ({"choices": ["w1", "w2", " ", "w4"]}, "choice 2 is empty"),
        ({"choices": ["w1", "w2", 3, "w4"]}, "not a list of texts"),
        ({"choices": None}, "'choices' is missing"),
        ({"prompt": "  "}, "there is no text under 'prompt'"),
    ],
)
def test_a_bad_question_names_file_and_line(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_lines(tmp_path / "q.jsonl", GOOD, {**GOOD, **change})
    with pytest.raises(UserError) as caught:
        read_choice_items(task("choice", path))
    assert caught.value.where == f"{path}:2"
    assert message in str(caught.value)
    assert caught.value.fix


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the task file is empty"),
        (b"\n \n", "the task file is empty"),
        (b"{}\n", "no text under 'prompt'"),
        (b"[1]\n", ":1: the line is not a JSON object"),
        (b"\n{broken\n", ":2: the line is not a JSON object"),
        (b'{"prompt": "\xff"}\n', ":1: not UTF-8"),
    ],
)
def test_a_bad_file_names_itself(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "q.jsonl"
    path.write_bytes(content)
    for read in (read_choice_items, read_verbatim_items):
        with pytest.raises(UserError, match=message):
            read(task("choice", path))
    with pytest.raises(UserError, match="does not exist"):
        read_choice_items(task("choice", tmp_path / "none.jsonl"))


def test_an_empty_corpus_has_no_perplexity(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "c.jsonl", {"text": " "})
    with pytest.raises(UserError, match="has no text"):
        read_task(TaskConfig(name="p", type="perplexity", path=str(path), role="utility"))
    with pytest.raises(UserError, match="does not exist"):
        read_task(TaskConfig(name="p", type="perplexity", path=str(tmp_path / "n.jsonl"), role="utility"))


# --------------------------------------------------------------------------------------------------- choice


def test_decisions_by_hand() -> None:
    """Choice 1 wins by sum, the long choice 2 by characters; the right one (2) is not greedy, then it is."""
    item = ChoiceItem("a", "p", ("x", "yy", "zzzzzzzz", "u"), 2, "s")

    def scores(exact: bool) -> list[TokenScores]:
        rows = [([-9.0], [False]), ([-1.0, -1.0], [True, True]), ([-2.0, -2.0], [True, exact]), ([-7.0], [False])]
        return [TokenScores(np.array(a, dtype=np.float32), np.array(b)) for a, b in rows]

    result = kinds.decide([item, item], [*scores(False), *scores(True)])
    assert [log["log_prob"] for log in result.logs] == [[-9, -2, -4, -7]] * 2
    right = np.exp(-4.0) / np.exp([-9.0, -2.0, -4.0, -7.0]).sum()
    assert result.metrics() == {
        "accuracy": 0.0,
        "accuracy_norm": 1.0,
        "exact_match": 0.5,
        "choice_probability": pytest.approx(right, rel=1e-12),
    }
    with pytest.raises(ValueError, match="no items"):
        result.metrics(np.zeros(2, dtype=bool))
    with pytest.raises(ValueError, match="8 scores for 1"):
        kinds.decide([item], [*scores(False), *scores(True)])


def random_questions(count: int) -> list[ChoiceItem]:
    generator = np.random.default_rng(0)

    def text(low: int, high: int) -> str:
        return " ".join(f"w{n}" for n in generator.integers(0, 60, int(generator.integers(low, high))))

    return [
        ChoiceItem(str(n), text(2, 9), tuple(text(1, 4) for _ in range(4)), int(generator.integers(0, 4)), "ab"[n % 2])
        for n in range(count)
    ]


def test_choice_equals_brute_force(model: LanguageModel) -> None:
    items = random_questions(30)
    result = kinds.evaluate_choice(model, items, "here")
    for number, item in enumerate(items):
        sums = []
        for text in item.choices:
            prompt = model.encode(item.prompt)
            ids = [*prompt, *model.tokenizer.encode(text, add_special_tokens=False)]
            with torch.no_grad():
                log_prob = torch.log_softmax(model.model(torch.tensor([ids])).logits[0].double(), -1)
            sums.append(sum(float(log_prob[t - 1, ids[t]]) for t in range(len(prompt), len(ids))))
        assert np.allclose(result.logs[number]["log_prob"], sums, atol=1e-4)
        assert result.logs[number]["predicted"] == int(np.argmax(sums))
    sources = result.by_source()
    assert set(sources) == {"a", "b"} and sources["a"]["n"] == 15
    mean = (sources["a"]["accuracy"] + sources["b"]["accuracy"]) / 2
    assert math.isclose(mean, result.metrics()["accuracy"])
    assert 0.0 < result.metrics()["accuracy"] < 0.6  # a random model


def test_exact_match_is_greedy_decoding(model: LanguageModel) -> None:
    """Half of the items have what the model really generates as their right choice."""
    items = []
    for number, item in enumerate(random_questions(20)):
        greedy = model.continue_greedily([model.encode(item.prompt)], [3])[0]
        texts = list(item.choices)
        if number % 2 and len(greedy) == 3:
            texts[item.answer] = str(model.tokenizer.decode(greedy))
        items.append(ChoiceItem(item.id, item.prompt, tuple(texts), item.answer, item.source))
    result = kinds.evaluate_choice(model, items, "here")
    for number, item in enumerate(items):
        wanted = model.tokenizer.encode(item.choices[item.answer], add_special_tokens=False)
        greedy = model.continue_greedily([model.encode(item.prompt)], [len(wanted)])[0]
        assert result.logs[number]["exact"] == (greedy == wanted)
    assert 0.2 < result.metrics()["exact_match"] < 0.8


# ------------------------------------------------------------------------------------------------- verbatim


def test_rouge_l_by_hand() -> None:
    """The longest common subsequence of "a b c d" and "a x c d e" is "a c d": P 3/5, R 3/4."""
    assert math.isclose(kinds.rouge_l("a b c d", "a x c d e"), 2 * 0.6 * 0.75 / 1.35)
    assert kinds.rouge_l("The Cats, sat!", "the cats sat") == 1.0
    assert kinds.rouge_l("running", "run") == 0.0  # no stemming
    assert kinds.rouge_l("a b", "") == 0.0
    assert kinds.exact_tokens([1, 2, 3, 4], [1, 9, 3]) == 0.5
    with pytest.raises(ValueError, match="empty"):
        kinds.exact_tokens([], [1])


@pytest.mark.parametrize(
    ("pair", "expected"),
    [
        (("a", "b"), ("a", " b")),
        (("a ", "b"), ("a", " b")),
        (("a", "\nb"), ("a", "\nb")),
        (("a\n", " b"), ("a", "\n b")),
    ],
)
def test_white_space_goes_to_the_continuation(pair: tuple[str, str], expected: tuple[str, str]) -> None:
    assert kinds.boundary(*pair) == expected


def test_perfect_recall_scores_one_and_other_text_does_not(model: LanguageModel) -> None:
    prompts = [item.prompt for item in random_questions(12)]
    greedy = model.continue_greedily([model.encode(prompt) for prompt in prompts], [10] * 12)
    kept = [(prompt, ids) for prompt, ids in zip(prompts, greedy, strict=True) if len(ids) == 10]
    known = [VerbatimItem(str(n), p, str(model.tokenizer.decode(ids)), "k") for n, (p, ids) in enumerate(kept)]
    result = kinds.evaluate_verbatim(model, known, 6, "here")
    told = result.metrics()
    assert told["rouge_l"] == told["exact_tokens"] == 1.0
    assert [log["reference"] for log in result.logs] == [
        " ".join(item.continuation.split()[:6]) for item in known
    ]  # cut to max_new_tokens
    short = [VerbatimItem("s", kept[0][0], str(model.tokenizer.decode(kept[0][1][:3])), "k")]
    assert kinds.evaluate_verbatim(model, short, 6, "here").metrics()["rouge_l"] == 1.0  # cut to the passage
    other = [VerbatimItem(i.id, i.prompt, "w0 w1 w2 w3 w4 w5", "o") for i in known]
    mixed = kinds.evaluate_verbatim(model, [*known, *other], 6, "here")
    assert mixed.metrics()["exact_tokens"] < 0.75
    assert mixed.by_source()["k"] == pytest.approx({"n": len(known), **told})


def test_the_probability_of_the_true_tokens(model: LanguageModel) -> None:
    """Against logits of the whole passage; cut to max_new_tokens."""
    import torch

    prompt, continuation = "w1 w2 w3", "w4 w5 w0 w6"
    result = kinds.evaluate_verbatim(model, [VerbatimItem("a", prompt, continuation, "s")], 3, "here")
    given, ids = (model.encode(text) for text in (prompt, f"{prompt} {continuation}"))
    with torch.no_grad():
        probability_TV = model.model(torch.tensor([ids])).logits[0].double().softmax(-1)
    expected = [float(probability_TV[place - 1, ids[place]]) for place in range(len(given), len(given) + 3)]
    assert math.isclose(result.metrics()["token_probability"], sum(expected) / 3, rel_tol=1e-4)


def test_too_long_a_passage_is_refused(model: LanguageModel) -> None:
    items = [VerbatimItem("long", "w1 " * 40, "w2 " * 40, "s")]
    with pytest.raises(UserError, match="here item long"):
        kinds.evaluate_verbatim(model, items, 40, "here")


# ----------------------------------------------------------------------------------------------- perplexity


@given(st.lists(st.integers(0, 9), max_size=50), st.integers(2, 12))
def test_windows_predict_every_token_but_the_first_once(ids: list[int], context: int) -> None:
    cut = kinds.windows(ids, context)
    assert all(2 <= len(window.ids) <= context and window.first == 1 for window in cut)
    assert [token for window in cut for token in window.ids[1:]] == ids[1:]


def test_perplexity_equals_brute_force(model: LanguageModel) -> None:
    documents = [Document(item.prompt + " " + " ".join(item.choices), item.source) for item in random_questions(9)]
    result = kinds.evaluate_perplexity(model, documents, 7)
    total, count = 0.0, 0
    for document in documents:
        ids = model.encode_document(document.text)
        assert (ids[0], ids[-1]) == (0, 1)
        for start in range(0, len(ids) - 1, 6):
            window = torch.tensor([ids[start : start + 7]])
            with torch.no_grad():
                log_prob = torch.log_softmax(model.model(window).logits[0, :-1].double(), -1)
            total -= float(log_prob.gather(1, window[0, 1:, None]).sum())
            count += window.shape[1] - 1
    assert count == sum(len(model.encode_document(document.text)) - 1 for document in documents)
    assert result.count() == count
    assert math.isclose(result.metrics()["perplexity"], math.exp(total / count), rel_tol=1e-6)
    assert set(result.by_source()) == {"a", "b"}


def test_perplexity_is_the_mean_over_tokens_not_documents() -> None:
    def perplexity_of(nll: list[float], tokens: list[int], chosen: list[bool] | None = None) -> float:
        columns = {"nll": np.array(nll), "tokens": np.array(tokens)}
        outcome = kinds.PerplexityOutcome(columns, [], ["a", "b"])
        return outcome.metrics(None if chosen is None else np.array(chosen))["perplexity"]

    assert math.isclose(perplexity_of([2.0, 12.0], [1, 3]), math.exp(14 / 4))
    assert math.isclose(perplexity_of([2.0, 12.0], [1, 3], [False, True]), math.exp(4))
    assert perplexity_of([1e4], [1]) == math.inf
    with pytest.raises(ValueError, match="no tokens"):
        perplexity_of([2.0, 12.0], [1, 3], [False, False])


# ---------------------------------------------------------------------------------------------------- drift


@st.composite
def routings(draw: Any) -> tuple[np.ndarray, np.ndarray, int]:
    experts = draw(st.integers(2, 9))
    top_k = draw(st.integers(1, experts))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    tokens = draw(st.integers(1, 30))
    sides = [np.array([generator.permutation(experts)[:top_k] for _ in range(tokens)]) for _ in range(2)]
    return sides[0], sides[1], experts


@given(routings())
def test_overlap_and_kl_equal_brute_force(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    from scipy.stats import entropy

    before, after, experts = case
    expected = np.mean([len(set(a) & set(b)) / len(a) for a, b in zip(before.tolist(), after.tolist(), strict=True)])
    assert math.isclose(drift.top_k_overlap(before, after), float(expected), abs_tol=1e-12)
    counts = [[(side == expert).sum() for expert in range(experts)] for side in (before, after)]
    ours = [drift.selection_counts(side, experts) for side in (before, after)]
    assert [count.tolist() for count in ours] == counts
    reference = entropy(ours[0] + 0.5, ours[1] + 0.5)
    assert math.isclose(drift.kl_divergence(*ours), float(reference), abs_tol=1e-9)
    assert drift.top_k_overlap(before, before[:, ::-1]) == 1.0  # the order of the K experts does not matter
    assert drift.kl_divergence(ours[0], ours[0]) == 0.0


def packed(path: Path, documents: list[list[int]], context: int) -> TokenDataset:
    write_rows(path, pack(([ids] for ids in documents), context, "dense", None, PackingCounts()))
    return TokenDataset.open(path)


def test_routing_of_packed_rows_is_that_of_the_documents_alone(model: LanguageModel, tmp_path: Path) -> None:
    """Attention must not cross documents within a row, and filling must not count."""
    from trace_ds.models.routers import record_routing

    generator = np.random.default_rng(5)
    documents = [generator.integers(3, 63, size).tolist() for size in (7, 1, 12, 5, 3, 9, 2, 11)]
    dataset = packed(tmp_path / "rows.arrow", documents, 20)
    sample = drift.sample_routing(model, dataset, 99, 2)
    assert sample.rows == len(dataset)
    assert sample.indices_TLK.shape == (int(dataset.counted(0, dataset.tokens).sum()), 2, 2)
    expected = []
    for row in range(len(dataset)):
        packed_row = dataset.row(row)
        for document in dict.fromkeys(packed_row.document_ids.tolist()):
            piece = packed_row.input_ids[packed_row.document_ids == document]
            with record_routing(model.model) as recorder, torch.no_grad():
                model.model(torch.tensor([piece.tolist()]))
            layers = [recorder.layer(layer)[1].numpy()[:-1] for layer in range(2)]  # the last position predicts nothing
            expected.append(np.stack(layers, axis=1))
    assert np.array_equal(np.sort(sample.indices_TLK, -1), np.sort(np.concatenate(expected), -1))


def test_no_drift_without_a_change_and_drift_with_one(model: LanguageModel, tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    dataset = packed(tmp_path / "rows.arrow", [generator.integers(3, 63, 30).tolist() for _ in range(6)], 16)
    before = drift.sample_routing(model, dataset, 8, 4)
    assert before.rows == 8
    same = drift.compare(before, before, 4)
    assert (same["overlap"], same["kl"]) == ([1.0, 1.0], [0.0, 0.0])
    assert same["tokens"] == int(dataset.counted(0, int(dataset.row_starts_R1[8])).sum())
    assert np.allclose(np.sum(same["frequency_before"], axis=1), 2, atol=1e-5)
    assert same["chance_overlap"] == 0.5
    changed = before.indices_TLK.copy()
    changed[:, 1] = 3 - changed[:, 1]
    other = drift.compare(before, drift.RoutingSample(changed, before.rows), 4)
    assert other["overlap"][0] == 1.0 and other["overlap"][1] < 0.9
    assert other["overlap_mean"] == np.mean(other["overlap"])
    with pytest.raises(ValueError, match="samples of"):
        drift.compare(before, drift.RoutingSample(changed[1:], before.rows), 4)


# ------------------------------------------------------------------------------------------------------ mia


def test_auc_by_hand_and_what_has_no_rank() -> None:
    """Against scikit-learn, of whole tasks: tests/unit/test_evaluation_privacy.py."""
    assert membership.auc(np.array([3.0, 2.0]), np.array([2.0, 1.0])) == (3 + 0.5) / 4  # a tie counts half
    with pytest.raises(ValueError, match="members and others"):
        membership.auc(np.array([]), np.array([1.0]))
    with pytest.raises(ValueError, match="finite"):
        membership.auc(np.array([np.nan]), np.array([1.0]))


def test_attack_scores_by_hand() -> None:
    scores = TokenScores(
        np.array([-1, -5, -2, -4, -3], dtype=np.float32),
        np.zeros(5, dtype=bool),
        np.array([-2, -2, -2, -2, -3], dtype=np.float32),
        np.array([1, 1, 2, 2, 0], dtype=np.float32),
    )
    found = membership.member_scores(scores, "text")
    assert found["loss"] == -3.0
    assert found["zlib"] == -15 / len(zlib.compress(b"text"))
    assert found["min_k"] == -4.5  # the two lowest of five
    assert found["min_k_plus"] == -2.0  # of 1, -3, 0, -1, 0
    assert "min_k_plus" not in membership.member_scores(TokenScores(scores.log_prob, scores.is_argmax), "text")
    assert membership.lowest_mean(np.array([3.0, 1.0]), 10) == 1.0  # at least one
    with pytest.raises(ValueError, match="of 0 values"):
        membership.lowest_mean(np.array([]))


def test_priv_leak_has_the_sign_of_muse() -> None:
    assert membership.priv_leak(1.0) == -100.0  # every forget text looks like a member: not unlearned
    assert membership.priv_leak(0.5) == 0.0
    assert membership.priv_leak(0.0) == 100.0  # over-unlearned
    assert math.isclose(membership.priv_leak(0.6, 0.6), 0.0, abs_tol=1e-12)
    assert math.isclose(membership.priv_leak(0.85, 0.48), 100 * (0.15 - 0.52) / 0.52)
    with pytest.raises(ValueError, match="retrained"):
        membership.priv_leak(0.5, 1.0)


# ---------------------------------------------------------------------------------------------------- tasks


def test_the_change_of_each_task_in_one_line() -> None:
    def result(name: str, value: float | None) -> dict[str, Any]:
        elements = {"task": "elements", "metric": "accuracy", "value": value, "role": "forget"}
        general = {"task": "general", "metric": "perplexity", "value": 1234.5, "role": "utility"}
        return {"model": name, "scores": [general, elements]}

    results = [result("original", 0.25), result("gold", 0.5), result("unlearned", None)]
    expected = "elements 0.250 → –, general 1,234.5 → 1,234.5"  # forget tasks first
    assert metrics.change(results, "original", "unlearned") == expected


@pytest.mark.parametrize(
    ("metric", "role", "expected"),
    [
        ("accuracy", "forget", "lower"),
        ("accuracy", "utility", "higher"),
        ("rouge_l", "forget", "lower"),
        ("perplexity", "forget", "higher"),
        ("perplexity", "utility", "lower"),
    ],
)
def test_direction(metric: str, role: str, expected: str) -> None:
    assert metrics.direction(metric, role) == expected


def test_a_metric_under_attack_has_a_meaning() -> None:
    assert "fine-tuning" in str(metrics.meaning("relearned_accuracy")) and metrics.meaning("something_else") is None
    assert {name for names in metrics.TASK_METRICS.values() for name in names} == set(metrics.METRICS)
