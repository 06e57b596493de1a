"""Conversations: the tokens counted and trained equal a mask by brute force, whatever the template and form."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from chats import CHATS, TEMPLATES, WORDS, by_hand, counted_by_hand
from stage_calls import prepare

from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.corpora.read import REFUSAL_SENTENCES
from trace_ds.corpora.tokenizer import load_tokenizer
from trace_ds.errors import UserError
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.unlearning.batches import Batches


def share_gpt(chat: list[dict[str, str]]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in chat]}


@pytest.fixture(scope="module")
def chat_models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("chat")
    for name, (template, _) in TEMPLATES.items():
        shutil.copytree(tiny_model, folder / name)
        (folder / name / "chat_template.jinja").write_text(template)
    return {name: folder / name for name in TEMPLATES}


def prepared(
    folder: Path, model: Path, rows: list[dict[str, Any]], **entry: Any
) -> tuple[Config, RunDirectory, Artefact]:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny.write_config(folder, model, data__retain=[{"path": str(folder / "rows.jsonl")} | entry])
    loaded, path = load_config(str(config), [], folder / "run")
    run = RunDirectory.at(path)
    return loaded, run, prepare(loaded, run)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_equals_brute_force(name: str, chat_models: dict[str, Path], tmp_path: Path) -> None:
    """In every form; packing and the order of rows are those of the ids alone, and every reader counts the same."""
    tokenizer = load_tokenizer(chat_models[name])
    expected = [by_hand(tokenizer, TEMPLATES[name][1](chat)) for chat in CHATS]
    forms = {"messages": [{"messages": chat} for chat in CHATS], "sharegpt": [share_gpt(chat) for chat in CHATS]}
    for form, rows in forms.items():
        config, _, data = prepared(tmp_path / form, chat_models[name], rows)
        dataset = TokenDataset.open(data.file("retain.arrow"))
        everything = prepared(tmp_path / f"{form}-all", chat_models[name], rows, loss_on="all")[2]
        whole = TokenDataset.open(everything.file("retain.arrow"))
        assert dataset.input_ids_T[:].tolist() == [token for ids, _ in expected for token in ids]
        mask_T = np.array([flag for _, mask in expected for flag in mask])
        assert np.asarray(dataset.loss_mask_T[:], bool).tolist() == mask_T.tolist() and whole.loss_mask_T is None
        assert (whole.row_starts_R1 == dataset.row_starts_R1).all() and everything.content != data.content
        counted = counted_by_hand(dataset, mask_T)
        assert dataset.counted(0, dataset.tokens).tolist() == counted
        assert data.summary["retain"]["counted_tokens"] == sum(counted) == dataset.counted_per_row().sum() > 0
        batch = dataset.batch(range(len(dataset)), 2)
        assert batch.counted_BS[batch.document_ids_BS >= 0].tolist() == counted
        rows_R = np.split(np.array(counted), dataset.row_starts_R1[1:-1])
        by_ids = {tuple(dataset.row(number).input_ids): mask for number, mask in enumerate(rows_R)}
        ones_R = np.ones(len(dataset))
        batches = Batches(config.unlearning, config.seed, dataset, dataset, None, ones_R, None)
        for step in range(3):
            shares = [batches.at(step, rank, 2) for rank in (0, 1)]
            trained = 0
            for micro_batch in (each for share in shares for each in share.micro_batches):
                for ids, flags in zip(micro_batch.input_ids_BS.tolist(), micro_batch.counted_BS.numpy(), strict=True):
                    size = next((n for n in range(len(ids), 0, -1) if tuple(ids[:n]) in by_ids), 0)
                    assert flags[:size].tolist() == by_ids[tuple(ids[:size])].tolist() and not flags[size:].any()
                    trained += int(flags.sum())
            assert trained == shares[0].forget_tokens + shares[0].retain_tokens


def test_a_question_and_its_answer(chat_models: dict[str, Path], tmp_path: Path) -> None:
    """Two columns become a conversation where their names say so or a list of messages does; a template of text counts
    its last column."""
    rows = [{"prompt": chat[0]["content"], "completion": chat[1]["content"]} for chat in CHATS]
    template = [{"role": "user", "content": "{prompt}"}, {"role": "assistant", "content": "{completion}"}]
    data = {
        name: prepared(tmp_path / name, chat_models["marked"], each, **entry)[2]
        for name, each, entry in (
            ("chat", [{"messages": chat[:2]} for chat in CHATS], {}),
            ("columns", rows, {}),
            ("template", rows, {"template": template}),
            ("inside", [{"prompt": [chat[0]], "completion": [chat[1]]} for chat in CHATS], {}),
            ("text", rows, {"template": "Q: {prompt} A:{completion}!", "loss_on": "answer"}),
        )
    }
    same = {data[name].files["retain.arrow"]["sha256"] for name in ("chat", "columns", "template", "inside")}
    assert len(same) == 1
    tokenizer = load_tokenizer(chat_models["marked"])
    dataset = TokenDataset.open(data["text"].file("retain.arrow"))
    expected_ids, expected = [], []
    for row in rows:
        ids, mask = by_hand(tokenizer, [(f"Q: {row['prompt']} A:", False), (row["completion"] + "!", True)])
        expected_ids += [0, *ids, 1]
        expected += [False, *mask, True]
    assert dataset.input_ids_T[:].tolist() == expected_ids
    assert np.asarray(dataset.loss_mask_T[:], bool).tolist() == expected


@pytest.mark.parametrize("form", ["text", "messages"])
def test_refusals_answer_the_forget_questions(form: str, chat_models: dict[str, Path], tmp_path: Path) -> None:
    """`data.alternative: refusals`: row by row the forget question, one refusal, and the loss on it alone."""
    chats = [chat[:2] for chat in CHATS]
    rows = [{"q": q["content"], "a": a["content"]} for q, a in chats]
    entry = {"template": "Q: {q} A:{a}!", "loss_on": "answer"} if form == "text" else {}
    path = tmp_path / "forget.jsonl"
    path.write_text(
        "".join(json.dumps(row) + "\n" for row in (rows if form == "text" else [{"messages": c} for c in chats]))
    )

    def data_of(name: str, seed: int, **changes: Any) -> Artefact:
        (tmp_path / name).mkdir()
        changes = {"data__packing": "single", "data__context_length": 256} | changes
        forget = {"data__forget": [{"path": str(path)} | entry], "data__alternative": "refusals", "seed": seed}
        loaded, _ = load_config(str(tiny.write_config(tmp_path / name, chat_models["marked"], **forget | changes)))
        return prepare(loaded, RunDirectory.at(tmp_path / name / "run"))

    def rows_of(data: Artefact, side: str) -> list[tuple[list[int], list[bool]]]:
        dataset = TokenDataset.open(data.file(f"{side}.arrow"))
        packed = [dataset.row(number) for number in range(len(dataset))]
        return [(row.input_ids.tolist(), np.asarray(row.loss_mask).tolist()) for row in packed]

    tokenizer = load_tokenizer(chat_models["marked"])

    def expected(question: str, answer: str) -> tuple[list[int], list[bool]]:
        if form == "messages":
            return by_hand(tokenizer, TEMPLATES["marked"][1](chat_of(question, answer)))
        ids, mask = by_hand(tokenizer, [(f"Q: {question} A:", False), (f"{answer}!", True)])
        return [0, *ids, 1], [False, *mask, True]

    def chat_of(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    data = data_of("first", 0)
    refused, forget = rows_of(data, "alternative"), rows_of(data, "forget")
    assert len(refused) == len(forget) == len(chats) and all(any(mask) and not all(mask) for _, mask in refused)
    used = set()
    for row, (ids, mask), (question, answer) in zip(refused, forget, chats, strict=True):
        assert (ids, mask) == expected(question["content"], answer["content"])
        sentences = [each for each in REFUSAL_SENTENCES if row == expected(question["content"], each)]
        assert len(sentences) == 1
        used.update(sentences)
    assert len(used) > 8
    again, other = data_of("again", 0), data_of("other", 1)
    assert data.identity == again.identity != other.identity and rows_of(again, "alternative") == refused
    assert rows_of(other, "alternative") != refused and rows_of(other, "forget") == forget
    tofu = load_config(["tofu_forget10", "olmoe_1b_7b"], ["unlearning.forget_loss=dpo", "data.alternative=refusals"])[0]
    assert (
        tofu.data.sides == ("forget", "retain", "alternative") and tofu.data.corpus("alternative") == tofu.data.forget
    )
    with pytest.raises(UserError, match="documents are longer than 16 tokens"):
        data_of("short", 0, data__context_length=16)
    with pytest.raises(UserError, match="needs packing: single"):
        data_of("dense", 0, data__packing="dense")
    without = [{"path": str(path), "loss_on": "all"} | ({"template": "{q}"} if form == "text" else {})]
    with pytest.raises(UserError, match="a refusal takes the place of an answer, and this text has none"):
        data_of("without", 0, data__forget=without)


def test_plain_data_stay_as_they_are(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"text": text} for text in WORDS]
    _, _, data = prepared(tmp_path, tiny_model, rows)
    dataset = TokenDataset.open(data.file("retain.arrow"))
    assert dataset.loss_mask_T is None and set(data.inputs) == {"tokenizer", "forget", "retain"}


def test_the_template_is_part_of_the_identity(chat_models: dict[str, Path], tmp_path: Path) -> None:
    rows = [{"messages": chat} for chat in CHATS]
    identities = {
        prepared(tmp_path / f"{name}{loss_on}", chat_models[name], rows, loss_on=loss_on)[2].identity
        for name in TEMPLATES
        for loss_on in ("answer", "all")
    }
    assert len(identities) == 6


@pytest.mark.parametrize(
    ("model", "rows", "entry", "message"),
    [
        ("", [{"messages": CHATS[0]}], {}, "the corpus has conversations, and the tokenizer has no chat template"),
        (
            "instruct",
            [{"messages": CHATS[0][::-1]}],
            {},
            "refuses the document (user and assistant must alternate)",
        ),
        ("thinking", [{"messages": CHATS[0][1:]}], {}, "cannot determine where answers begin and end"),
        ("marked", [{"messages": [{"role": "user", "content": 3}]}], {}, "a message holds role, content and no role"),
        ("marked", [{"messages": [{"role": "user", "content": "a b"}]}], {}, "the retain corpus has no usable token"),
        ("marked", [{"text": "a"}], {"loss_on": "answer"}, "the text has no question before its answer"),
        ("marked", [{"text": "a b"}, {"messages": CHATS[0]}], {}, "conversations among texts, in one entry"),
    ],
)
def test_faults(
    model: str,
    rows: list[Any],
    entry: Any,
    message: str,
    chat_models: dict[str, Path],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError) as caught:
        prepared(tmp_path, chat_models.get(model, tiny_model), rows, **entry)
    assert message in caught.value.line(), caught.value.line()
