"""A corpus is what its entry names, whatever the form: files of any kind, a saved data set, a directory, the hub."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import yaml
from hub_server import Hub, serving
from stage_calls import prepare

from trace_ds.config.load import load_config
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora.read import check_files, corpus_fingerprint, read_documents
from trace_ds.errors import UserError
from trace_ds.evaluation.items import read_task
from trace_ds.run.directory import RunDirectory

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["iron gold", "salt\nwater", "ein Fluß — «тихо»", 'lead, "tin" and zinc', "river 2"]
ROWS = [{"title": f"t{number}", "text": text} for number, text in enumerate(TEXTS)]
PAGE = """---
configs:
- config_name: near
  data_files: [{split: train, path: near/train-*.parquet}, {split: test, path: near/test.parquet}]
- config_name: far
  data_files: [{split: forget, path: far.parquet}]
---
"""


def json_lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: list[dict[str, Any]], delimiter: str = ",") -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def data_set(folder: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """A directory in the hub's layout: ``near`` (train in two shards, test), ``far`` (forget)."""
    write_parquet(folder / "near" / "train-00000-of-00002.parquet", rows[:2])
    write_parquet(folder / "near" / "train-00001-of-00002.parquet", rows[2:])
    write_parquet(folder / "near" / "test.parquet", rows[:1])
    write_parquet(folder / "far.parquet", rows[3:])
    (folder / "README.md").write_text(PAGE)
    return folder


def make_forms(folder: Path) -> dict[str, dict[str, Any]]:
    """The documents TEXTS in every form; the entry of each."""
    lines = json_lines(ROWS)
    files = {
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "c.jsonl.gz": gzip.compress(lines[:50]) + gzip.compress(lines[50:]),
        "d.csv.zst": b"",
        "e.json": b"\xef\xbb\xbf " + json.dumps(ROWS, indent=2).encode(),
        "f.json": lines,
        "folder/part-0.jsonl": json_lines(ROWS[:3]),
        "folder/part-1.jsonl": json_lines(ROWS[3:]),
        "folder/_SUCCESS": b"",
        "folder/.part-2.jsonl.crc": b"\0",
        "many/x/1.jsonl": json_lines(ROWS[:1]),
        "many/y/2.jsonl.gz": gzip.compress(json_lines(ROWS[1:])),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_csv(folder / "j.csv", ROWS)
    write_csv(folder / "t.tsv", ROWS, "\t")
    (folder / "d.csv.zst").write_bytes(zstd((folder / "j.csv").read_bytes()))
    write_parquet(folder / "shards" / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(folder / "shards" / "train-00001-of-00002.parquet", ROWS[2:])
    names = [*(path.name for path in folder.iterdir() if path.is_file()), "folder", "shards"]
    forms: dict[str, dict[str, Any]] = {name: {"path": str(folder / name)} for name in names}
    forms["pattern"] = {"path": str(folder / "many" / "**" / "*.jsonl*")}
    return forms


def entry(**keys: Any) -> CorpusEntry:
    return CorpusEntry.model_validate(keys)


def texts(corpus: CorpusEntry) -> list[str]:
    check_files([corpus], "data.forget")
    return [document.text for document in read_documents([corpus])]


def test_every_form_gives_the_same_documents(tmp_path: Path) -> None:
    sources = {}
    for form, raw in make_forms(tmp_path).items():
        corpus, first = entry(**raw), entry(**raw, rows=2)
        assert texts(corpus) == TEXTS and texts(first) == TEXTS[:2], form
        assert corpus_fingerprint([corpus]) == corpus_fingerprint([corpus]) != corpus_fingerprint([first]), form
        template = entry(**raw, template="{title}: {{{text}}}\n")
        assert texts(template) == [f"{row['title']}: {{{row['text']}}}\n" for row in ROWS], form
        assert corpus_fingerprint([template]) != corpus_fingerprint([corpus]), form
        assert texts(entry(**raw, template="{title}")) == [row["title"] for row in ROWS], form
        sources[form] = {document.source for document in read_documents([corpus])}
    assert sources["c.jsonl.gz"] == {"c"} and sources["folder"] == {"part"} and sources["shards"] == {"train"}
    assert sources["pattern"] == {"1", "2"}
    assert {document.source for document in read_documents([entry(**raw, source="mine")])} == {"mine"}


def test_the_content_decides_and_not_the_place(tmp_path: Path) -> None:
    paths = [tmp_path / name / "rows.jsonl" for name in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(LINES)
    assert len({corpus_fingerprint([entry(path=str(path))]) for path in paths}) == 1
    paths[1].write_bytes(LINES[:-1])
    assert len({corpus_fingerprint([entry(path=str(path))]) for path in paths}) == 2


def test_text_inside_other_columns_and_between_empty_lines(tmp_path: Path) -> None:
    """Nested fields by dots, lists of strings, paragraphs of text and Markdown, in files of lines and in tables."""
    rows = [{"meta": {"text": text, "lines": [text, "iron"]}, "at.dot": "x"} for text in TEXTS]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    write_parquet(tmp_path / "a.parquet", rows)
    for name in ("a.jsonl", "a.parquet"):
        assert texts(entry(path=str(tmp_path / name), template="{meta.text}")) == TEXTS
        assert texts(entry(path=str(tmp_path / name), template="{meta.lines}")) == [f"{text}\niron" for text in TEXTS]
        assert texts(entry(path=str(tmp_path / name), template="{at.dot}")) == ["x"] * len(TEXTS)
        with pytest.raises(UserError, match=r"meta\.txt"):
            texts(entry(path=str(tmp_path / name), template="{meta.txt}"))
    (tmp_path / "notes").mkdir()
    text = "# iron\n\ngold\nlead\n \n\n  tin\n"
    for name in ("b.md", "c.txt", "README.md"):
        (tmp_path / "notes" / name).write_text(text)
    assert texts(entry(path=str(tmp_path / "notes"))) == [text] * 2
    notes = entry(path=str(tmp_path / "notes" / "*.md"), template="{paragraph}", rows=4)
    assert texts(notes) == ["# iron", "gold\nlead", "  tin", "# iron"]


def put(name: str, content: bytes) -> Any:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return {"path": str(folder / name)}

    return change


def table_of(rows: list[dict[str, Any]]) -> Any:
    def change(folder: Path) -> dict[str, Any]:
        write_parquet(folder / "n.parquet", rows)
        return {"path": str(folder / "n.parquet")}

    return change


def beside(name: str) -> Any:
    """A file that is not there, beside two that are."""

    def change(folder: Path) -> dict[str, Any]:
        for other in ("x.jsonl", "a.docx"):
            (folder / other).touch()
        return {"path": str(folder / name)}

    return change


def mixed(folder: Path) -> dict[str, Any]:
    put("mixed/notes.txt", b"x")(folder)
    return {"path": str(Path(put("mixed/a.jsonl", json_lines(ROWS))(folder)["path"]).parent)}


LINES = json_lines(ROWS)
MANY = json.dumps({f"k{number}": "a" for number in range(11)}).encode()
ODD = json.dumps({"n": 1, "title": "a", "meta": {"text": "b"}, "chat": [{"role": "user", "content": "c"}]}).encode()
NEAR = {"dataset": "org/Data-Set", "config": "near", "split": "train"}
HUB_FAULTS: list[tuple[dict[str, Any], str]] = [
    (NEAR | {"config": "neer"}, "the data set has no configuration 'neer'. Fix: did you mean 'near'? it has near, far"),
    ({"dataset": "org/Data-Set"}, "the configuration is missing. Fix: it has near, far"),
    (
        {"dataset": "org/Data-Set", "config": "near"},
        "the data set has several splits, and none is named. Fix: it has train, test: set",
    ),
    (NEAR | {"split": "train[:1]+tset"}, "the data set has no split 'tset'. Fix: did you mean 'test'? it has train,"),
    (NEAR | {"split": "train[:x]"}, "'train[:x]' is no part of a split (Unrecognized"),
    (NEAR | {"template": "{title} {txt}"}, "there is no column 'txt'. Fix: did you mean 'text'"),
    ({"dataset": "org/media"}, "cannot read data sets of the kind WebDataset. Fix: convert it to one of Json, Csv"),
]
FAULTS: list[tuple[Any, dict[str, Any], str]] = [
    (lambda folder: {"path": str(folder / "x.jsonl")}, {}, "the corpus file does not exist"),
    (beside("x.jsnl"), {}, "/in has a.docx, x.jsonl: correct data.forget in the configuration"),
    (beside("x.jsnl"), {}, "the corpus file does not exist. Fix: did you mean 'x.jsonl'? /"),
    (beside("../in/y/*.jsonl"), {}, "no file matches the pattern. Fix: did you mean 'x.jsonl'? /"),
    (lambda folder: {"path": str(folder)}, {}, "the folder holds no file that can be read"),
    (lambda folder: {"path": put("x.docx", b"")(folder)["path"][:-7]}, {}, "/in has x.docx: correct data.forget"),
    (lambda folder: {"path": str(folder / "*.jsonl")}, {}, "no file matches the pattern"),
    (put("x.docx", b""), {}, "cannot read files of the kind '.docx'"),
    (put("x.parquet.gz", b""), {}, "cannot read files of the kind '.parquet'"),
    (mixed, {}, "text files and others are mixed: notes.txt and a.jsonl"),
    (put("x.jsonl", LINES), {"split": "train"}, "files have no splits"),
    (put("x.jsonl.gz", gzip.compress(LINES)[:-20]), {}, "not a whole .gz file"),
    (put("x.jsonl.zst", zstd(LINES * 200)[:-9]), {}, "not a whole .zst file"),
    (put("x.csv", b"text\ncaf\xe9\n"), {}, "x.csv:2: not UTF-8 (byte 3 of the line)"),
    (put("x.csv", b"a,text\n1,2\n1\n"), {}, "x.csv:3: the row has 1 cells, the first line 2"),
    (put("x.csv", b'text\n"never closed\n'), {}, "not CSV (unexpected end of data)"),
    (put("x.csv", b"a,b,a\n1,2,3\n"), {}, "two columns are named 'a'"),
    (put("x.csv", b"body\na\n"), {}, "x.csv:2: the line has no text under 'text'. Fix: it has body"),
    (
        put("x.jsonl", LINES),
        {"template": "{titel}"},
        "under 'titel'. Fix: did you mean 'title'? it has title, text",
    ),
    (put("x.jsonl", MANY), {}, "it has k0, k1, k2, k3, k4, k5, k6, k7 … and 3 more: set the corpus' template to one"),
    (put("x.jsonl", ODD), {"template": "{n}"}, "under 'n' (a int is there). Fix: it has title, meta.text: set the"),
    (put("x.jsonl", ODD), {"template": "{meta.txt}"}, "under 'meta.txt'. Fix: did you mean 'meta.text'? it has title,"),
    (put("x.jsonl", ODD), {"template": "Q: {chat}"}, "a conversation is the whole of its template: {chat}"),
    (put("x.jsonl", b'{"n": 1}'), {}, "no column holds text, of n: write one that does"),
    (put("x.jsonl", LINES), {"loss_on": "answer"}, "it has title, text: give the corpus a template of question and"),
    (put("x.jsonl", b'{"messages": [{"who": "me", "said": "x"}]}'), {}, "a message holds who, said and no role"),
    (
        table_of([{"meta": {"text": "a", "n": 1}, "m": 2}]),
        {"template": "{meta.txt}"},
        "did you mean 'meta.text'? it has",
    ),
    (put("x.txt", b"a b"), {"template": "{title}"}, "a text file has the columns text"),
    (put("x.json", b'[{"text": "a"}'), {}, "the file is not a JSON array"),
    (put("x.json", b'[{"text": "\\ud83d"}]'), {}, "is half of a surrogate pair"),
    (table_of([{"text": 1}]), {}, "the column 'text' holds int64, no text. Fix: no column holds text, of text: write"),
    (lambda folder: {"dataset": str(data_set(folder / "set"))}, {}, "has README.md, far.parquet, near: name the files"),
    (
        lambda folder: {"dataset": "x y"},
        {},
        "this is no id of a data set on the hub. Fix: write ORG/NAME in data.forget",
    ),
    (lambda folder: {"dataset": "nobody/nothing"}, {}, "is not in the cache"),
]


@pytest.mark.parametrize(("change", "keys", "message"), FAULTS, ids=[fault[2][:40] for fault in FAULTS])
def test_faults(change: Any, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError) as caught:
        texts(entry(**(change(tmp_path / "in") | keys)))
    assert message in caught.value.line()


def test_a_json_array_has_a_limit_of_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.records.MAX_CHARACTERS", 100)
    (tmp_path / "x.json").write_text(json.dumps(ROWS))
    with pytest.raises(UserError, match="write JSON Lines"):
        texts(entry(path=str(tmp_path / "x.json")))


# ---------------------------------------------------------------------------------------------------- prepare


def test_the_data_are_the_same_whatever_the_batches(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_config(tmp_path, tiny_model)
    long = " ".join(tiny.sentences(3000, 5, tiny.WORDS))
    with (tmp_path / "corpora" / "retain.jsonl").open("a") as handle:
        handle.write(json.dumps({"text": long}) + "\n" + json.dumps({"text": "iron"}) + "\n")
    results = []
    for number in (7, 256):
        monkeypatch.setattr("trace_ds.corpora.tokenizer.BATCH_DOCUMENTS", number)
        config, directory = load_config(str(path), [], tmp_path / f"run{number}")
        data = prepare(config, RunDirectory.at(directory))
        results.append({item.name: item.read_bytes() for item in (tmp_path / f"run{number}" / "data").iterdir()})
        assert data.summary["retain"]["documents"] == 92
    assert results[0] == results[1] and len(results[0]) == 5


# ---------------------------------------------------------------------------------------------------- questions

CHOICES = ["Au", "Ag", "Pb", "Fe"]


def task(type_: str, **keys: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "type": type_, "role": "forget"} | keys)


def test_questions_under_others_names_of_the_columns(tmp_path: Path) -> None:
    def where(name: str, *rows: dict[str, Any]) -> str:
        write_parquet(tmp_path / f"{name}.parquet", list(rows))
        return str(tmp_path / f"{name}.parquet")

    rows = [{"question": f"q{n}", "choices": CHOICES, "answer": n, "subject": "gold"} for n in range(3)]
    path, columns = where("choice", *rows), {"prompt": "question", "source": "subject"}
    chosen = read_task(task("choice", path=path, columns=columns))
    assert [(item.prompt, item.answer, item.source) for item in chosen.items] == [
        ("q0", 0, "gold"), ("q1", 1, "gold"), ("q2", 2, "gold")
    ]  # fmt: skip
    verbmem = where("verbmem", {"prompt": "It is a", "gt": "truth"})
    passages = read_task(task("verbatim", path=verbmem, columns={"continuation": "gt"}))
    assert [(item.prompt, item.continuation, item.source) for item in passages.items] == [
        ("It is a", "truth", "verbmem")
    ]
    solved = where("solved", {"question": "What?", "answer": "A book"})
    asks = where("asks", {"question": "Who?", "answer": "Jane"})
    knowmem = read_task(task("knowmem", path=asks, examples=solved))
    assert [item.question for item in knowmem.items] == ["Who?"] and knowmem.examples[0].answers == ("A book",)
    seen = read_task(
        task("membership", path=where("in", {"text": "seen"}), holdout=where("out", {"text": "never seen"}))
    )
    assert [(item.text, item.member) for item in seen.items] == [("seen", True), ("never seen", False)]
    bodies = read_task(
        task("perplexity", path=where("b", {"body": "some words"}, {"body": " "}), columns={"text": "body"})
    )
    assert [item.text for item in bodies.items] == ["some words"]
    assert len({item.sha256 for item in (chosen, passages, knowmem, seen, bodies)}) == 5
    other = read_task(task("choice", path=path, columns={"prompt": "question"}))
    assert other.sha256 != chosen.sha256


# ---------------------------------------------------------------------------------------------------- the hub

READ = """
import json, os, sys
import datasets  # once, not in every fork
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.corpora import sources
from trace_ds.corpora.read import check_files, corpus_fingerprint, read_documents
from trace_ds.errors import UserError

def summary(raw):
    entry = CorpusEntry.model_validate(raw)
    missing = None
    try:
        sources.files_here(entry, "data")
    except UserError as error:
        missing = error.line()
    check_files([entry], "data.forget")
    documents = list(read_documents([entry]))
    return {"texts": [one.text for one in documents], "sources": sorted({one.source for one in documents}),
            "fingerprint": corpus_fingerprint([entry]), "missing": missing,
            "commit": sources.open_table(entry, "data").commit}

for line in sys.stdin:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    result = []
    for raw in json.loads(line):
        try:
            result.append(summary(raw))
        except UserError as error:
            result.append(error.line())
    print(json.dumps(result), flush=True)
    os._exit(0)
"""
Ask = Callable[[list[dict[str, Any]]], list[Any]]


@pytest.fixture
def asking(tmp_path: Path) -> Iterator[Callable[[dict[str, str]], Ask]]:
    """For a user's variables: what each entry (or task) gives, what was read or the line of the error. Every call is a
    fork of one process."""
    with contextlib.ExitStack() as stack:

        def start(variables: dict[str, str]) -> Ask:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
            variables = variables | {"PYTHONPATH": str(ROOT)}
            process = stack.enter_context(
                subprocess.Popen([sys.executable, "-c", READ], env=variables, cwd=tmp_path, **pipes)
            )

            def ask(raw: list[dict[str, Any]]) -> list[Any]:
                process.stdin.write(json.dumps(raw) + "\n")
                process.stdin.flush()
                return list(json.loads(process.stdout.readline()))

            return ask

        yield start


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as result:
        yield result


def test_a_data_set_of_the_hub_is_read_again_without_it(
    hub: Hub, asking: Callable[[dict[str, str]], Ask], tmp_path: Path
) -> None:
    first = hub.add("datasets", "org/Data-Set", data_set(tmp_path / "first"))
    tagged = hub.add("datasets", "org/Data-Set", tmp_path / "first", ref="v1")
    near = NEAR
    forms = [near, {"dataset": "org/Data-Set", "config": "far", "rows": 1}, near | {"split": "test"}]
    home = tmp_path / "home"
    ask, ask_offline = (asking(hub.environment(home, offline=offline)) for offline in (False, True))
    online = ask([*forms, near | {"dataset": "org/Data-Set@v1"}])
    assert [result["texts"] for result in online] == [TEXTS, TEXTS[3:4], TEXTS[:1], TEXTS]
    put("media/a.tar", b"")(tmp_path)
    hub.add("datasets", "org/media", tmp_path / "media")
    for line, (_, message) in zip(ask([raw for raw, _ in HUB_FAULTS]), HUB_FAULTS, strict=True):
        assert message in line
    half = ask([near | {"split": "train[:40%]"}])[0]
    assert half["texts"] == TEXTS[:2] and half["fingerprint"] != online[0]["fingerprint"]
    assert [result["sources"] for result in online[:3]] == [
        ["Data-Set/near"],
        ["Data-Set/far/forget"],
        ["Data-Set/near/test"],
    ]
    assert [result["commit"] for result in online] == [first, first, first, tagged]
    assert (
        "is not in the cache, and downloads are disabled for this command" in online[0]["missing"]
        and online[2]["missing"] is None
    )
    requested = len(hub.requests)
    named = ask([near | {"source": "s", "split": split} for split in ("train", "test")])
    assert named[0]["fingerprint"] != named[1]["fingerprint"] and len(hub.requests) == requested + 1  # what main is
    requested = len(hub.requests)
    offline = ask_offline([*forms, near | {"dataset": "org/Data-Set@v1"}])
    assert [result | {"missing": None} for result in online] == offline and len(hub.requests) == requested
    # the hub's main moves on: what is pinned stays, and what is not is another corpus
    second = hub.add("datasets", "org/Data-Set", data_set(tmp_path / "second", [*ROWS[1:], ROWS[0]]))
    moved = ask([near, near | {"dataset": f"org/Data-Set@{first}"}, near | {"dataset": "org/Data-Set@v1"}])
    assert [result["commit"] for result in moved] == [second, first, tagged]
    assert moved[0]["texts"] == TEXTS[1:] + TEXTS[:1] and moved[0]["fingerprint"] != online[0]["fingerprint"]
    assert [result["fingerprint"] for result in moved[1:]] == [online[0]["fingerprint"], online[3]["fingerprint"]]
    hub.shutdown()  # no network, and nobody said so
    gone = ask([near, near | {"dataset": f"org/Data-Set@{first}"}, near | {"config": "none"}])
    assert [gone[0]["commit"], gone[1]["commit"]] == [second, first]
    assert "(configuration none) is not in the cache (it has far, near), and the hub cannot be reached" in gone[2]


def test_the_examples_of_the_page_are_valid() -> None:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]
    entries = [entry(**one) for block in blocks for side in block.get("data", {}).values() for one in side]
    tasks = [TaskConfig.model_validate(one) for block in blocks for one in block.get("evaluation", {}).get("tasks", [])]
    assert len(entries) > 10 and len(tasks) > 4
    with pytest.raises(ValueError, match="has a path and a dataset: give one"):
        entry(path="a", dataset="b")
    with pytest.raises(ValueError, match="template: expected '}'"):
        entry(path="a", template="{x")
