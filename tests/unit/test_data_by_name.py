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

import hub_replicas
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
from trace_ds.corpora import tokenizer
from trace_ds.corpora.read import check_files, corpus_fingerprint, read_documents
from trace_ds.corpora.records import rows_of
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


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
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
    from datasets import Dataset, DatasetDict

    lines = json_lines(ROWS)
    files = {
        "a.jsonl": lines,
        "b.jsonl": b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"),
        "c.jsonl.gz": gzip.compress(lines[:50]) + gzip.compress(lines[50:]),
        "d.jsonl.zst": zstd(lines),
        "e.json": b"\xef\xbb\xbf " + json.dumps(ROWS, indent=2).encode(),
        "f.json": lines,
        "g.json.gz": gzip.compress(json.dumps(ROWS).encode()),
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
    (folder / "k.csv.gz").write_bytes(gzip.compress((folder / "j.csv").read_bytes()))
    write_parquet(folder / "l.parquet", ROWS)
    write_parquet(folder / "shards" / "train-00000-of-00002.parquet", ROWS[:2])
    write_parquet(folder / "shards" / "train-00001-of-00002.parquet", ROWS[2:])
    Dataset.from_list(ROWS).save_to_disk(folder / "saved")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(folder / "splits")
    data_set(folder / "named")
    names = [*sorted(path.name for path in folder.iterdir() if path.is_file()), "folder", "shards", "saved", "splits"]
    forms: dict[str, dict[str, Any]] = {name: {"path": str(folder / name)} for name in names}
    forms["pattern"] = {"path": str(folder / "folder" / "*.jsonl")}
    forms["deep pattern"] = {"path": str(folder / "many" / "**" / "*.jsonl*")}
    forms["split of a saved one"] = {"path": str(folder / "splits"), "split": "train"}
    forms["directory"] = {"dataset": str(folder / "named"), "config": "near"}
    return forms


FORMS = [
    *("a.jsonl", "b.jsonl", "c.jsonl.gz", "d.jsonl.zst", "e.json", "f.json", "g.json.gz"),
    *("j.csv", "k.csv.gz", "l.parquet", "folder", "shards", "saved", "splits"),
    *("pattern", "deep pattern", "split of a saved one", "directory"),
]


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found = make_forms(tmp_path_factory.mktemp("forms"))
    assert set(found) == set(FORMS)
    return found


def entry(**keys: Any) -> CorpusEntry:
    return CorpusEntry.model_validate(keys)


def texts(found: CorpusEntry) -> list[str]:
    check_files([found], "data.forget")
    return [document.text for document in read_documents([found])]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_documents(form: str, forms: dict[str, dict[str, Any]]) -> None:
    found = entry(**forms[form])
    assert texts(found) == TEXTS
    assert texts(entry(**forms[form], rows=2)) == TEXTS[:2]
    whole, cut = corpus_fingerprint([found]), corpus_fingerprint([entry(**forms[form], rows=2)])
    assert whole == corpus_fingerprint([found]) != cut
    made = entry(**forms[form], template="{title}: {{{text}}}\n")
    assert texts(made) == [f"{row['title']}: {{{row['text']}}}\n" for row in ROWS]
    assert corpus_fingerprint([made]) not in (whole, cut)
    assert texts(entry(**forms[form], field="title")) == [row["title"] for row in ROWS]


def test_sources_are_named_after_what_was_read(forms: dict[str, dict[str, Any]]) -> None:
    names = {form: {document.source for document in read_documents([entry(**raw)])} for form, raw in forms.items()}
    assert names["c.jsonl.gz"] == {"c"} and names["a.jsonl"] == {"a"} and names["folder"] == {"part"}
    assert names["shards"] == {"train"} and names["deep pattern"] == {"1", "2"}
    assert names["saved"] == {"saved"} and names["directory"] == {"named/near"}
    own = [document.source for document in read_documents([entry(**forms["shards"], source="mine")])]
    assert set(own) == {"mine"}


def test_the_content_decides_and_not_the_place(tmp_path: Path) -> None:
    first, second = data_set(tmp_path / "a" / "named"), data_set(tmp_path / "b" / "named")
    near = [entry(dataset=str(folder), config="near") for folder in (first, second)]
    assert len({corpus_fingerprint([found]) for found in near}) == 1
    assert corpus_fingerprint(near[:1]) != corpus_fingerprint([entry(dataset=str(first), config="near", split="test")])
    before = corpus_fingerprint(near[:1])
    write_parquet(first / "near" / "test.parquet", ROWS[2:])  # of another split
    assert corpus_fingerprint(near[:1]) == before
    write_parquet(first / "near" / "train-00001-of-00002.parquet", ROWS[3:])
    assert corpus_fingerprint(near[:1]) != before and texts(near[0]) == TEXTS[:2] + TEXTS[3:]


ARRAYS = {
    b"[]": [],
    b" [ ] \n": [],
    b'[{"text": "a"}]': ["a"],
    b'[{"text": "]"} ,\n{"text": "[{\\"x\\": 1}, "}\n]\n': ["]", '[{"x": 1}, '],
    b'[{"text": "a"},]': "the file is not a JSON array",
    b'[{"text": "a"}': "the file is not a JSON array",
    b'[{"text": "a"} {"text": "b"}]': "line 1 column 16",
    b'[{"text": "a"}, 1]': ":2: the item is not a JSON object",
    b'[{"text": "a"}] x': "the file is not a JSON array",
    b'[{"text": "\\ud83d"}]': "is half of a surrogate pair",
    b'[{"text": "\xff"}]': "not UTF-8",
    b"[" * 5_000: "the file is not a JSON array",
    b'[{"text": "' + b"a" * 100 + b'"}]': "write JSON Lines",
}


@pytest.mark.parametrize("content", ARRAYS, ids=lambda content: str(content[:30]))
def test_an_array_of_objects(content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if len(content) > 100 and content[1:2] == b"{":
        monkeypatch.setattr("trace_ds.corpora.records.MAX_ARRAY_CHARACTERS", 100)
    path = tmp_path / "x.json"
    path.write_bytes(content)
    expected = ARRAYS[content]
    if isinstance(expected, list):
        assert [row["text"] for _, row in rows_of(path)] == expected
    else:
        with pytest.raises(UserError, match=re.escape(expected)):
            list(rows_of(path))


def put(name: str, content: bytes) -> Any:
    def change(folder: Path) -> dict[str, Any]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        return {"path": str(folder / name)}

    return change


def saved(**splits: list[dict[str, Any]]) -> Any:
    def change(folder: Path) -> dict[str, Any]:
        from datasets import Dataset, DatasetDict

        DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(folder / "saved")
        return {"path": str(folder / "saved")}

    return change


def broken_saved(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = saved(train=ROWS)(folder)
    next((folder / "saved" / "train").glob("*.arrow")).write_bytes(b"torn")
    return found


def directory(folder: Path) -> dict[str, Any]:
    return {"dataset": str(data_set(folder / "named")), "config": "near"}


def media(folder: Path) -> dict[str, Any]:
    (folder / "media").mkdir()
    (folder / "media" / "a.tar").write_bytes(b"")
    return {"dataset": str(folder / "media")}


def mixed(folder: Path) -> dict[str, Any]:
    put("mixed/a.jsonl", json_lines(ROWS))(folder)
    put("mixed/notes.txt", b"x")(folder)
    return {"path": str(folder / "mixed")}


LINES = json_lines(ROWS)
NUMBERS = [{"text": 1}, {"text": 2}]
FAULTS: list[tuple[str, Any, dict[str, Any], str]] = [
    ("nothing", lambda folder: {"path": str(folder / "x.jsonl")}, {}, "the corpus file does not exist"),
    ("empty folder", lambda folder: {"path": str(folder)}, {}, "the folder holds no file that can be read"),
    ("empty pattern", lambda folder: {"path": str(folder / "*.jsonl")}, {}, "no file matches the pattern"),
    ("kind", put("x.docx", b""), {}, "cannot read files of the kind '.docx'"),
    ("compressed Parquet", put("x.parquet.gz", b""), {}, "cannot read files of the kind '.parquet'"),
    ("kind in a pattern", lambda f: put("x.docx", b"")(f) | {"path": str(f / "*")}, {}, "of the kind '.docx'"),
    ("mixed", mixed, {}, "text files and others are mixed"),
    ("split of files", put("x.jsonl", LINES), {"split": "train"}, "files have no splits"),
    ("torn gzip", put("x.jsonl.gz", gzip.compress(LINES)[:-20]), {}, "not a whole .gz file"),
    ("no gzip", put("x.jsonl.gz", LINES), {}, "not a whole .gz file"),
    ("flipped gzip", put("x.jsonl.gz", gzip.compress(LINES)[:40] + b"\xff" * 30), {}, "not a whole .gz file"),
    ("torn zstd", put("x.jsonl.zst", zstd(LINES * 200)[:-9]), {}, "not a whole .zst file"),
    ("no zstd", put("x.jsonl.zst", LINES), {}, "not a whole .zst file"),
    ("latin-1 text", put("x.txt", b"caf\xe9"), {}, "x.txt: not UTF-8 (near byte"),
    ("latin-1 CSV", put("x.csv", b"text\ncaf\xe9\n"), {}, "x.csv:2: not UTF-8 (byte 3 of the line)"),
    ("ragged CSV", put("x.csv", b"a,text\n1,2\n1\n"), {}, "x.csv:3: the row has 1 cells, the first line 2"),
    ("open quote", put("x.csv", b'text\n"never closed\n'), {}, "not CSV (unexpected end of data)"),
    ("twice a column", put("x.csv", b"text,text\na,b\n"), {}, "two columns have one name"),
    ("CSV column", put("x.csv", b"body\na\n"), {}, "x.csv:2: the line has no text under 'text'"),
    ("template", put("x.jsonl", LINES), {"template": "{titel}"}, "under 'titel'. Fix: did you mean 'title'? correct"),
    ("template of text", put("x.txt", b"a b"), {"template": "{title}"}, "a text file has no columns"),
    ("saved split", saved(forget=ROWS, other=ROWS), {"split": "forgot"}, "did you mean 'forget'? it has forget, other"),
    ("saved default split", saved(a=ROWS, b=ROWS), {}, "the data set has no split 'train'"),
    ("saved column", saved(train=ROWS), {"field": "txet"}, "there is no column 'txet'. Fix: did you mean 'text'?"),
    ("saved numbers", saved(train=NUMBERS), {}, "the column 'text' holds int64, no text"),
    ("broken saved", broken_saved, {}, "the data set cannot be read"),
    ("config", directory, {"config": "neer"}, "the data set has no configuration 'neer'. Fix: did you mean 'near'?"),
    ("no config", directory, {"config": None}, "the configuration is missing. Fix: it has near, far"),
    ("split", directory, {"split": "tset"}, "the data set has no split 'tset'. Fix: did you mean 'test'?"),
    ("column", directory, {"field": "body"}, "there is no column 'body'"),
    ("template column", directory, {"template": "{title} {txt}"}, "there is no column 'txt'. Fix: did you mean 'text'"),
    ("not its key", lambda f: {"dataset": saved(train=ROWS)(f)["path"]}, {}, "what save_to_disk left"),
    ("media", media, {}, "cannot read data sets of the kind WebDataset"),
    ("no such directory", lambda folder: {"dataset": str(folder / "x")}, {}, "there is no such directory"),
    ("offline", lambda folder: {"dataset": "nobody/nothing"}, {}, "is not in the cache"),
    ("no id", lambda folder: {"dataset": "org/a/b"}, {}, "there is no such directory, and it is no id of the hub"),
]


@pytest.mark.parametrize(("name", "change", "keys", "message"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_faults(name: str, change: Any, keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with pytest.raises(UserError) as caught:
        texts(entry(**(change(tmp_path / "in") | keys)))
    assert message in caught.value.line()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "a corpus has no path and no dataset"),
        ({"path": "a", "dataset": "b"}, "has a path and a dataset: give one"),
        ({"path": "a", "config": "v1"}, "a corpus has a config, which goes with dataset"),
        ({"dataset": "a", "field": "x", "template": "{y}"}, "field and template exclude each other"),
        ({"dataset": "a", "template": "no column"}, "the template names no column"),
        ({"dataset": "a", "template": "{x"}, "template: expected '}'"),
        ({"dataset": "a", "template": "{x:>{y}} {z!r}"}, "names of columns in braces"),
        ({"dataset": "a", "rows": 0}, "greater than or equal to 1"),
    ],
)
def test_entries_that_say_too_little_or_too_much(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        entry(**raw)


# ---------------------------------------------------------------------------------------------------- prepare


@pytest.fixture
def many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BATCH_PIECES", 7)
    monkeypatch.setattr(tokenizer, "PIECE_CHARACTERS", 1 << 10)


def test_the_data_are_the_same_whatever_the_number_of_threads(
    tmp_path: Path, tiny_model: Path, many_batches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny.write_config(tmp_path, tiny_model)
    long = " ".join(tiny.sentences(3000, 5, tiny.WORDS))  # a document in many pieces
    with (tmp_path / "corpora" / "retain.jsonl").open("a") as handle:
        handle.write(json.dumps({"text": long}) + "\n" + json.dumps({"text": "iron"}) + "\n")
    found = []
    for number in (1, 2, 3):
        monkeypatch.setattr("trace_ds.stages.prepare.default_threads", lambda number=number: number)
        config, directory = load_config(str(path), [], tmp_path / f"run{number}")
        made = prepare(config, RunDirectory.at(directory))
        found.append({item.name: item.read_bytes() for item in (tmp_path / f"run{number}" / "data").iterdir()})
        assert made.summary["retain"]["documents"] == 92
    assert found[0] == found[1] == found[2] and len(found[0]) == 5


def test_what_goes_wrong_in_a_thread_is_told_here() -> None:
    def refusing(texts: list[str]) -> list[list[int]]:
        raise UserError("the tokenizer fails", "x", "repair it")

    with pytest.raises(UserError, match=r"x: the tokenizer fails\. Fix: repair it"):
        list(tokenizer.encode_documents([["a"]] * 4, refusing, 2))


# ---------------------------------------------------------------------------------------------------- questions

CHOICES = ["Au", "Ag", "Pb", "Fe"]


def task(type_: str, **keys: Any) -> TaskConfig:
    return TaskConfig.model_validate({"name": "t", "type": type_, "role": "forget"} | keys)


def questions(folder: Path) -> Path:
    """Questions under others' names of the columns, each kind in a configuration of its own."""
    kinds: dict[str, dict[str, list[dict[str, Any]]]] = {
        "choice": {
            "test": [{"question": f"q{n}", "choices": CHOICES, "answer": n, "subject": "gold"} for n in range(3)]
        },
        "verbmem": {"forget": [{"prompt": "It is a", "gt": "truth"}]},
        "knowmem": {
            "forget_qa": [{"question": "Who?", "answer": "Jane"}],
            "forget_qa_icl": [{"question": "What?", "answer": "A book"}],
        },
        "privleak": {"forget": [{"text": "seen"}], "holdout": [{"text": "never seen"}]},
        "bodies": {"train": [{"body": "some words"}, {"body": " "}]},
    }
    page: list[dict[str, Any]] = []
    for name, splits in kinds.items():
        for split, rows in splits.items():
            write_parquet(folder / name / f"{split}.parquet", rows)
        files = [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        page.append({"config_name": name, "data_files": files})
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': page})}---\n")
    return folder


def test_questions_by_the_name_of_a_data_set(tmp_path: Path) -> None:
    where = {"dataset": str(questions(tmp_path / "muse"))}
    columns = {"prompt": "question", "source": "subject"}
    chosen = read_task(task("choice", **where, config="choice", columns=columns))
    assert [(item.prompt, item.answer, item.source) for item in chosen.items] == [
        ("q0", 0, "gold"), ("q1", 1, "gold"), ("q2", 2, "gold")
    ]  # fmt: skip
    passages = read_task(task("verbatim", **where, config="verbmem", columns={"continuation": "gt"}))
    assert [(item.prompt, item.continuation, item.source) for item in passages.items] == [
        ("It is a", "truth", "muse/verbmem/forget")
    ]
    known = read_task(task("knowmem", **where, config="knowmem", split="forget_qa", examples="forget_qa_icl"))
    assert [item.question for item in known.items] == ["Who?"] and known.examples[0].answers == ("A book",)
    seen = read_task(task("membership", **where, config="privleak", split="forget", holdout="holdout"))
    assert [(item.text, item.member) for item in seen.items] == [("seen", True), ("never seen", False)]
    bodies = read_task(task("perplexity", **where, config="bodies", columns={"text": "body"}))
    assert [item.text for item in bodies.items] == ["some words"]
    assert len({item.sha256 for item in (chosen, passages, known, seen, bodies)}) == 5
    other = read_task(task("choice", **where, config="choice", columns={"prompt": "question"}))
    assert other.sha256 != chosen.sha256


def test_questions_of_files_keep_their_fingerprint_and_take_columns(tmp_path: Path) -> None:
    from trace_ds.run.files import canonical_json, sha256_file, sha256_text

    asked, solved = tmp_path / "asked.jsonl", tmp_path / "solved.csv"
    asked.write_bytes(json_lines([{"question": "Who?", "gt": "Jane"}]))
    write_csv(solved, [{"question": "What?", "gt": "A book"}])
    found = read_task(task("knowmem", path=str(asked), examples=str(solved), columns={"answer": "gt"}))
    assert found.items[0].answers == ("Jane",) and found.examples[0].answers == ("A book",)  # type: ignore[union-attr]
    write_csv(solved, [{"question": "What?", "answer": "A book"}])
    asked.write_bytes(json_lines([{"question": "Who?", "answer": "Jane"}]))
    plain = read_task(task("knowmem", path=str(asked), examples=str(solved)))
    assert plain.sha256 == sha256_text(canonical_json([sha256_file(asked), sha256_file(solved)]))
    bodies = read_task(task("perplexity", path=str(asked), columns={"text": "question"}))
    assert bodies.items == list(read_documents([entry(path=str(asked), field="question")]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"type": "choice", "columns": {"prompt": "questoin"}}, "there is no column 'questoin'. Fix: did you mean"),
        ({"type": "choice", "config": "privleak", "split": "forget"}, "there is no text under 'prompt'"),
        ({"type": "choice", "split": "train"}, "the data set has no split 'train'. Fix: it has test"),
        ({"type": "perplexity", "config": "bodies"}, "there is no column 'text'"),
    ],
)
def test_faults_of_questions(raw: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_task(task(raw["type"], **{"dataset": str(questions(tmp_path / "muse")), "config": "choice"} | raw))
    assert message in caught.value.line()


def test_an_lm_eval_task_brings_its_own_data_set() -> None:
    with pytest.raises(ValueError, match="lm_eval brings its own data set; dataset is for other types"):
        task("lm_eval", task="wmdp_bio", dataset="cais/wmdp")
    with pytest.raises(ValueError, match=r"columns\.reply\.\[key\]"):
        task("verbatim", path="x", columns={"reply": "gt"})


# ---------------------------------------------------------------------------------------------------- the hub

READ = """
import json, os, sys
import datasets  # once, not in every fork
from trace_ds.config.sections.data import CorpusEntry
from trace_ds.config.sections.evaluation import TaskConfig
from trace_ds.corpora import sources
from trace_ds.corpora.read import check_files, corpus_fingerprint, read_documents
from trace_ds.errors import UserError
from trace_ds.evaluation.items import read_task

def told(raw):
    if "type" in raw:
        return len(read_task(TaskConfig.model_validate({"name": "t", "role": "forget"} | raw)).items)
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
            "commit": sources.open_table(entry, "data").commit if sources.is_table(entry) else None}

for line in sys.stdin:
    if os.fork():
        assert os.wait()[1] == 0
        continue
    found = []
    for raw in json.loads(line):
        try:
            found.append(told(raw))
        except UserError as error:
            found.append(error.line())
    print(json.dumps(found), flush=True)
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
    with serving() as found:
        yield found


def test_a_data_set_of_the_hub_is_read_again_without_it(
    hub: Hub, asking: Callable[[dict[str, str]], Ask], tmp_path: Path
) -> None:
    first = hub.add("datasets", "org/Data-Set", data_set(tmp_path / "first"))
    tagged = hub.add("datasets", "org/Data-Set", tmp_path / "first", ref="v1")
    near = {"dataset": "org/Data-Set", "config": "near"}
    forms = [near, {"dataset": "org/Data-Set", "config": "far", "rows": 1}, near | {"split": "test"}]
    home = tmp_path / "home"
    ask, ask_offline = (asking(hub.environment(home, offline=offline)) for offline in (False, True))
    online = ask([*forms, near | {"dataset": "org/Data-Set@v1"}])
    assert [found["texts"] for found in online] == [TEXTS, TEXTS[3:4], TEXTS[:1], TEXTS]
    assert [found["sources"] for found in online[:3]] == [
        ["Data-Set/near"],
        ["Data-Set/far/forget"],
        ["Data-Set/near/test"],
    ]
    assert [found["commit"] for found in online] == [first, first, first, tagged]
    assert "is not in the cache, and the hub was not asked" in online[0]["missing"] and online[2]["missing"] is None
    asked = len(hub.requests)
    named = ask([near | {"source": "s", "split": split} for split in ("train", "test")])
    assert named[0]["fingerprint"] != named[1]["fingerprint"] and len(hub.requests) == asked + 1  # what main is
    asked = len(hub.requests)
    offline = ask_offline([*forms, near | {"dataset": "org/Data-Set@v1"}])
    assert [found | {"missing": None} for found in online] == offline and len(hub.requests) == asked
    # the hub's main moves on: what is pinned stays, and what is not is another corpus
    second = hub.add("datasets", "org/Data-Set", data_set(tmp_path / "second", [*ROWS[1:], ROWS[0]]))
    moved = ask([near, near | {"dataset": f"org/Data-Set@{first}"}, near | {"dataset": "org/Data-Set@v1"}])
    assert [found["commit"] for found in moved] == [second, first, tagged]
    assert moved[0]["texts"] == TEXTS[1:] + TEXTS[:1] and moved[0]["fingerprint"] != online[0]["fingerprint"]
    assert [found["fingerprint"] for found in moved[1:]] == [online[0]["fingerprint"], online[3]["fingerprint"]]
    hub.shutdown()  # no network, and nobody said so
    gone = ask([near, near | {"dataset": f"org/Data-Set@{first}"}, near | {"config": "none"}])
    assert [gone[0]["commit"], gone[1]["commit"]] == [second, first]
    assert "(configuration none) is not in the cache, and the hub cannot be reached" in gone[2]


# ---------------------------------------------------------------------------------------------------- the page


def page_blocks() -> list[dict[str, Any]]:
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    return [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)]


def test_every_example_of_the_page_is_read(hub: Hub, asking: Callable[[dict[str, str]], Ask], tmp_path: Path) -> None:
    from datasets import Dataset

    for name, configs in hub_replicas.data_sets().items():  # in the layout that they have on the hub, with rows of ours
        if name not in (hub_replicas.GATED, "cais/mmlu"):
            hub_replicas.write_data_set(tmp_path / "sets" / name, name, configs)
            hub.add("datasets", name, tmp_path / "sets" / name)
    rows = [row | {"question": "q", "answer": "a", "body": "b"} for row in ROWS]
    blocks = page_blocks()
    entries = [one for block in blocks for side in block.get("data", {}).values() for one in side]
    tasks = [one for block in blocks for one in block.get("evaluation", {}).get("tasks", [])]
    assert len(entries) > 10 and len(tasks) > 4
    for raw in entries:
        place = tmp_path / raw.get("path", "x").replace("*", "1")
        place.parent.mkdir(parents=True, exist_ok=True)
        if place.suffix == ".gz":
            place.write_bytes(gzip.compress(json_lines(rows)))
        elif place.suffix == ".zst":
            place.write_bytes(zstd(json_lines(rows)))
        elif place.suffix == ".parquet":
            write_parquet(place, rows)
        elif place.suffix == ".csv":
            write_csv(place, rows)
        elif place.suffix in (".jsonl", ".txt"):
            place.write_bytes(json_lines(rows))
        elif place.suffix == ".json":
            place.write_text(json.dumps(rows))
        elif "saved" in place.name:
            Dataset.from_list(rows).save_to_disk(place)
        elif "path" in raw:
            write_parquet(place / "train-00000-of-00001.parquet", rows)
        elif raw["dataset"].startswith("./"):
            write_parquet(tmp_path / raw["dataset"] / "data" / "train-00000-of-00001.parquet", rows)
    kinds = [{key: value for key, value in one.items() if key not in ("name", "role")} for one in tasks]
    ask = asking(hub.environment(tmp_path / "home"))
    for raw, found in zip([*entries, *kinds], ask([*entries, *kinds]), strict=True):
        assert isinstance(found, int) or (isinstance(found, dict) and found["texts"]), (raw, found)
