"""What users get wrong, each: one clear line that names the place and the fix, exit status 2, nothing written.

Tables, one line a case. Each case is a process of its own (:mod:`forked`), on the configuration of :mod:`tiny`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import jobs
import pyarrow as pa
import pyarrow.parquet
import pytest
import tiny
import yaml
from command import environment
from forked import Server
from processes import run_distributed
from stage_calls import calibrate

from trace_ds.config.load import dump_yaml, load_config
from trace_ds.config.schema import Config
from trace_ds.config.sections.base import Section
from trace_ds.corpora.dataset import open_stream
from trace_ds.errors import AgreedError, UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.pipeline import Request, run_verb

Change = Callable[[Path], object]  # of the folder with config.yaml, corpora/ and (after `own_model`) model/


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path, tiny_model)


def refused(config: Path, changes: list[str]) -> str:
    """The line that says what is wrong with a configuration after these ``--set``."""
    with pytest.raises(UserError) as error:
        load_config(str(config), changes)
    return error.value.line()


STUDY = "bench={{methods: {{a: {{}}, b: {{}}}}, baseline: a, forget: x y, utility: [x y], {}}}"
CONFIG_ERRORS = [
    ("unlearning.learning_rte=1", "unknown key 'unlearning.learning_rte'"),
    ("unlearning.alhpa=1", "did you mean 'alpha'?"),
    ("data={forget: [{path: x}]}", "the key 'data.retain' is missing"),
    ("unlearning.steps=many", "unlearning.steps: Input should be a valid integer"),
    ("unlearning.steps='7'", "unlearning.steps: Input should be a valid integer (found '7')"),
    ("statistics.trace='off'", "statistics.trace: Input should be a valid boolean (found 'off')"),
    ("unlearning.alpha=.inf", "unlearning.alpha: Input should be a finite number"),
    ("unlearning.forget_loss=npo", "npo needs statistics.nll: true"),
    ("unlearning.npo.beta=1.0", "unlearning.npo is a setting of another loss than unlearning.forget_loss rmu"),
    ("variants={a: {unlearning.npo.beta: 2}}", "variants.a: unlearning.npo.beta is a setting of another loss than rmu"),
    ("calibration.source_weights={a: 2.0}", "source_weights are the weights of rule: uniform, not of rule: raking"),
    ("calibration.rule=literal", "calibration.rule: literal gives weights of tokens: it needs unlearning.apply: loss"),
    ("variants={a: {model.path: x}}", "variants.a may not change model.path"),
    ("unlearning.optimizer.lr=1e300", "lr: no number here can be above 3.4e+38 (found 1e+300)"),
    (f"seed={2**64}", "seed: Input should be less than 9223372036854775808"),
    ('model.path="a\\0b"', "model.path: a path cannot hold NUL"),
    ("unlearning.steps.most=7", "'steps' is a value and has no keys. Fix: end the key with steps"),
    ("unlearning.evaluate={every: 1, until: ['loss <= 1']}", "retain_overlap or 'TASK METRIC' of its tasks (none)"),
    (
        STUDY.format("grids: {c: {}}"),
        "grids names 'c', which is no method: a, b",
    ),
    (STUDY.format("grids: {a: {unlearning.alpha: [1]}}"), "run and never tuned; grid has none"),
    ("=7", "'=7' is not KEY=VALUE"),
    ("seed=[", "the value of 'seed' is not valid YAML in line 1"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS)
def test_config_key_type_or_value(config: Path, change: str, message: str) -> None:
    line = refused(config, [change])
    assert message in line and len(line) < 600


YAML_ERRORS = [
    ("", "the file holds no keys"),
    ("name: [unclosed\n", "not valid YAML in line 2"),
    ("name: a\nmodel: {path: m}\nname: b\n", "not valid YAML in line 3 (a key is there twice)"),
    ("seed: 0x_\n", "not valid YAML (invalid literal"),
    ("seed: !!int abc\n", "not valid YAML (invalid literal"),
    ("seed: !!python/object/apply:os.system [ls]\n", "could not determine a constructor for the tag"),
    (f"seed: {'9' * 5000}\n", "not valid YAML (Exceeds the limit"),
    ("name: 2024-13-45\n", "the key 'model' is missing"),
    ("seed: &a [*a]\n", "not valid YAML in line 1 (aliases are not read)"),
    (f"seed: {'[' * 2000}{']' * 2000}\n", "nested too deep"),
    ("1: a\n", "a key is no text: quote it"),
    ("? {a: b}\n: c\n", "a key is no text: quote it"),
    ("a: 1\n---\nb: 2\n", "but found another document"),
    ("#" * (1 << 19), "more than 262,144 characters"),
]


@pytest.mark.parametrize(("text", "message"), YAML_ERRORS)
def test_yaml_of_a_file_and_of_set(config: Path, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    line = refused(tmp_path / "bad.yaml", [])
    assert message in line and line.startswith(f"{tmp_path / 'bad.yaml'}: ") and len(line) < 400
    line = refused(config, [f"seed={text}"])
    assert len(line) < 500 and "Fix: " in line


def test_every_number_is_bounded() -> None:
    """Also those of sections and fields to come."""

    def sections(kind: type[Section]) -> set[type[Section]]:
        return {kind, *(more for below in kind.__subclasses__() for more in sections(below))}

    looked_at = 0
    for section in sections(Section):
        for name, field in section.model_fields.items():
            if not any(part in str(field.annotation) for part in ("int", "float")):
                continue
            plain = field.annotation in (int, float) or "list" not in str(field.annotation)
            for value in (10**39, -(10**39), 1e300, -1e300):
                with pytest.raises(ValueError) as error:
                    section.model_validate({name: value if plain else [value]})
                assert name in {str(item["loc"][0]) for item in error.value.errors()}, (section, name)  # type: ignore[attr-defined]
            looked_at += 1
    assert looked_at > 40 and Config in sections(Section)


def test_home_is_expanded_once_in_every_path_of_a_config(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    task = "{name: k, type: knowmem, path: ~/k, examples: ~/e, role: forget}"
    task += ", {name: l, type: lm_eval, task: t, include_path: ~/i, role: forget}"
    keys = ["model.path=~/m", "model.tokenizer=~/t", "data.forget=[{path: ~/f}]", "unlearning.ds_config=~/d"]
    keys += ["evaluation.models={gold: ~/g}", f"evaluation.tasks=[{task}]"]
    loaded, run = load_config(str(config), keys, "~/run")
    result = dump_yaml(loaded) + str(run)
    assert "~" not in result and all(
        f"/home/someone/{name}" in result for name in ["m", "t", "f", "d", "g", "k", "e", "i", "run"]
    )


def test_numbers_as_people_write_them(config: Path) -> None:
    config.write_text("\ufeff" + config.read_text().replace("lr: 0.001", "lr: 1e-3"))  # and a byte order mark
    loaded, _ = load_config(str(config), ["unlearning.alpha=2", "calibration.clip=2.5E+1", "name='1e5'"])
    assert loaded.unlearning.optimizer.lr == 0.001 and loaded.name == "1e5"
    (config.parent / "stored.yaml").write_text(dump_yaml(loaded))
    assert load_config(str(config.parent / "stored.yaml"))[0] == loaded
    assert (loaded.unlearning.alpha, loaded.calibration.clip) == (2.0, 25.0)


def own_model(folder: Path) -> Path:
    """Let the configuration use a copy of its model, to be changed."""
    raw = yaml.safe_load((folder / "config.yaml").read_text())
    shutil.copytree(raw["model"]["path"], folder / "model")
    raw["model"]["path"] = str(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    return folder / "model"


def model_config(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        path = own_model(folder) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def model_is(raw: dict[str, Any]) -> Change:
    return lambda folder: (own_model(folder) / "config.json").write_text(json.dumps(raw))


def in_model(name: str, content: str) -> Change:
    return lambda folder: (own_model(folder) / name).write_text(content)


def forget(content: bytes) -> Change:
    return lambda folder: (folder / "corpora" / "forget.jsonl").write_bytes(content)


def parquet(column: Any, field: str = "text") -> Change:
    def change(folder: Path) -> None:
        pyarrow.parquet.write_table(pa.table({field: column}), folder / "corpora" / "forget.parquet")

    return change


def torn_parquet(folder: Path) -> None:
    parquet([f"{n} iron gold" * 40 for n in range(4000)])(folder)
    path = folder / "corpora" / "forget.parquet"
    whole = bytearray(path.read_bytes())
    whole[1000:3000] = bytes(2000)
    path.write_bytes(whole)


def sharded(folder: Path) -> None:
    """Without its second shard."""
    from transformers import AutoModelForCausalLM

    model = own_model(folder)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="100KB")
    next(iter(sorted(model.glob("model-00002-of-*.safetensors")))).unlink()


def question(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        item = {"prompt": "iron is", "choices": ["a", "b", "c", "d"], "answer": 0} | changes
        (folder / "corpora" / "questions_forget.jsonl").write_text(json.dumps(item))

    return change


def a_run(folder: Path) -> None:
    config, _ = load_config(str(folder / "config.yaml"))
    RunDirectory(folder / "run", config_text=dump_yaml(config)).store_config()


def nothing(folder: Path) -> None:
    """What is wrong is on the command line."""


FORGET = "'data.forget=[{path: corpora/forget.parquet}]'"
ATTENTION = "attn_implementation 'owner/name' would make transformers run code from elsewhere"
RUN, PREPARE, PLAN = "run config.yaml", "prepare config.yaml", "plan config.yaml"
CASES: list[tuple[str, str, Change, str]] = [
    # the configuration and the command line
    ("wrong key", f"{RUN} --set unlearning.learning_rte=1", nothing, "unknown key 'unlearning.learning_rte'"),
    ("ep 3", "collect config.yaml --nproc 3 --ep 3", nothing, "does not divide the 4 experts"),
    *(
        (f"{verb} too early", f"{verb} config.yaml", nothing, "there is no data artefact here")
        for verb in ("collect", "calibrate", "unlearn", "evaluate")
    ),
    ("convert too early", "convert config.yaml", nothing, "there is no complete checkpoint"),
    ("a variant's data", f"{PREPARE} --run-dir run/variants/even", a_run, "use --run-dir "),
    # the model
    ("no model", f"{RUN} --set model.path=missing", nothing, "there is no model directory"),
    ("no tokenizer", f"{PREPARE} --set model.tokenizer=missing", nothing, "there is no directory with a tokenizer"),
    ("dense", RUN, model_is({"model_type": "llama", "num_hidden_layers": 3}), "is not a Mixture-of-Experts model"),
    ("unknown", RUN, model_config(model_type="nllb-moe"), "'nllb-moe' is not supported"),
    ("top k", RUN, model_config(num_experts_per_tok=9), "9 is larger than the number of experts (4)"),
    ("shard missing", RUN, sharded, "weight shard model-00002-of-"),
    ("layers", RUN, model_config(num_hidden_layers=1e9), "num_hidden_layers is 1000000000.0, no whole number"),
    ("negative", PLAN, model_config(hidden_size=-1), "hidden_size is -1, no whole number from 1 to"),
    ("not JSON", RUN, in_model("config.json", '{"a": ' + "9" * 5000), "configuration is damaged (Exceeds the limit"),
    ("kernel", RUN, model_config(attn_implementation="owner/name"), ATTENTION),
    ("kernel 6", RUN, model_config(experts_implementation="sonicmoe"), "would make transformers run code"),
    ("other weights", RUN, model_config(transformers_weights="a.bin"), "transformers_weights names other weights"),
    ("tokenizer", RUN, in_model("tokenizer.json", "{"), "the tokenizer is damaged ("),
    # corpora
    ("no corpus", PREPARE, lambda f: (f / "corpora" / "retain.jsonl").unlink(), "the corpus file does not exist"),
    ("empty", PREPARE, forget(b""), "the forget corpus is empty"),
    ("latin-1", PREPARE, forget(b'{"text": "caf\xe9"}\n'), "forget.jsonl:1: not UTF-8 (byte 13 of the line)"),
    ("no JSON", PREPARE, forget(b"iron\n"), "not a JSON object"),
    ("surrogate", PREPARE, forget(b'{"text": "a \\ud83d b"}'), r"forget.jsonl:1: \ud83d is half of a surrogate pair"),
    ("int column", f"{PREPARE} --set {FORGET}", parquet([1, 2]), "the column 'text' holds int64, no text"),
    (
        "column",
        f"{PREPARE} --set {FORGET}",
        parquet(["a"], "body"),
        "it has body: set the corpus' template to one of them in braces",
    ),
    ("torn pages", f"{PREPARE} --set {FORGET}", torn_parquet, "not a whole Parquet file ("),
    # tasks
    ("task answer", RUN, question(answer=4), "questions_forget.jsonl:1: the answer 4 is out of range"),
    # what only a late stage, or a variant, would stumble on
    (
        "variant",
        f"{RUN} --set 'variants={{a: {{calibration.rul: uniform}}}}'",
        nothing,
        "unknown key 'calibration.rul'",
    ),
    (
        "layer",
        f"{RUN} --variants a --set 'variants={{a: {{unlearning.rmu.layer: 99}}}}'",
        nothing,
        "layer 99 does not exist: the model has 3",
    ),
    ("gold", f"{RUN} --set 'evaluation.models={{gold: no/such/model}}'", nothing, "no/such/model: there is no model"),
    ("ds_config", f"{RUN} --set unlearning.ds_config=no/file.json", nothing, "DeepSpeed configuration cannot be read"),
]


@pytest.mark.parametrize(("words", "change", "message"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_refused(server: Server, config: Path, words: str, change: Change, message: str) -> None:
    change(config.parent)
    assert message in forked.refuse(server, config.parent, *shlex.split(words))


def test_an_error_holds_no_escape_sequence() -> None:
    line = UserError("bad \x1b[2J\x9b2J", "a\u202eb\ud800", "c\x07").line()
    assert line == r"a\u202eb\ud800: bad \u001b[2J\u009b2J. Fix: c\u0007"


def test_sources_and_tasks_as_they_come(server: Server, config: Path) -> None:
    """A null source is none, a byte order mark no text; nothing of a file's reaches a terminal as it is."""
    folder = config.parent
    lines = ['\ufeff{"text": "iron gold", "source": null}', '{"text": "lead tin", "source": "a\\u001b]0;x\\u0007"}']
    (folder / "corpora" / "forget.jsonl").write_text("\n".join(lines))
    assert server.run(["prepare", "config.yaml", "--run-dir", "run"], folder).returncode == 0
    table = open_stream(folder / "run" / "data" / "forget_documents.arrow").read_all()
    assert table.column("source").to_pylist() == ["forget", r"a\u001b]0;x\u0007"]
    assert table.column("text_start").to_pylist() == ["iron gold", "lead tin"]


def test_dry_run_says_what_is_not_ready(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request.load(str(config), ["unlearning.rmu.layer=99"], config.parent / "run")
    assert run_verb("run", request, dry_run=True) == 0
    assert "# not ready: unlearning.rmu.layer: layer 99" in capsys.readouterr().out


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a run directory beside it that has been prepared, collected and calibrated."""
    folder = tmp_path_factory.mktemp("calibrated")
    config = tiny.write_config(folder, tiny_model)
    loaded, run = load_config(str(config))[0], jobs.prepared_run(config, folder / "run")
    run_distributed(jobs.collect_job, 1, str(config), str(run), [])
    calibrate(loaded, RunDirectory(run))
    RunDirectory(run, config_text=dump_yaml(loaded)).store_config()
    return config


@pytest.mark.slow
def test_artefacts_of_another_model_or_tokenizer_and_damaged_ones(
    server: Server, calibrated: Path, tiny_model: Path
) -> None:
    """Refused by the bare verbs with everything as it was, the stored configuration too."""
    folder, run = calibrated.parent, calibrated.parent / "run"
    for name in ("other", "tokenizer", "topk"):
        shutil.copytree(tiny_model, folder / name)
    tiny.make_model(folder / "other", seed=1)
    for path, key, value in (
        ("tokenizer/tokenizer.json", "version", "2"),
        ("topk/config.json", "num_experts_per_tok", 1),
    ):
        whole = json.loads((folder / path).read_text())
        (folder / path).write_text(json.dumps(whole | {key: value}))
    common = (calibrated, "--run-dir", run)
    for verb, change, message in (
        ("unlearn", f"model.path={folder / 'other'}", "made with another model"),
        ("unlearn", f"model.path={folder / 'topk'}", "made with another model"),
        ("calibrate", f"model.path={folder / 'topk'}", "made with another model"),
        ("collect", f"model.tokenizer={folder / 'tokenizer'}", "made with another tokenizer"),
    ):
        assert message in forked.refuse(server, folder, verb, *common, "--set", change), (verb, change)
    weights = run / "calibration" / "weights.npy"
    whole = weights.read_bytes()
    try:
        for content, message in (
            (whole[:-1], f"the file has {len(whole) - 1} bytes instead of {len(whole)}"),
            (whole[:-1] + bytes([whole[-1] ^ 1]), "the file was altered after it was written"),
        ):
            weights.write_bytes(content)
            line = forked.refuse(server, folder, "unlearn", *common, "--set", "unlearning.alpha=9")
            assert message in line and "weights.npy" in line
    finally:
        weights.write_bytes(whole)


def one_sided(world: Any) -> list[str]:
    """Checks that fail on rank 1 only, as where a node does not see the model, or its storage does not answer."""
    errors = (
        UserError("there is no model directory", "/models/m", "mount it"),
        OSError(errno.EIO, "Input/output error", "/models/m/config.json"),
    )
    lines = []
    for error in errors:

        def check(error: Exception = error) -> str:
            if world.rank == 1:
                raise error
            return "fine"

        try:
            world.run_on_main_first(check)
        except (UserError, AgreedError) as end:
            lines.append(f"{type(end).__name__}: {end}")
    return lines


@pytest.mark.slow
def test_what_only_one_rank_finds_wrong_ends_all_of_them() -> None:
    said, silent = run_distributed(one_sided, 2)
    assert said == [
        "UserError: /models/m: on rank 1: there is no model directory. Fix: mount it",
        "UserError: /models/m/config.json: on rank 1: Input/output error. Fix: check the storage there",
    ]
    assert silent == ["AgreedError: "] * 2


def test_more_processes_than_the_machine_has(server: Server, config: Path) -> None:
    limit = 4 * (os.cpu_count() or 1)
    line = forked.refuse(server, config.parent, "collect", config, "--nproc", str(limit + 1))
    assert f"{limit + 1} processes on this machine" in line and f"set distributed.nproc to {limit} at most" in line
    line = forked.refuse(server, config.parent, "run", config, "--set", f"evaluation.nproc={limit + 1}")
    assert f"evaluation.nproc: {limit + 1} processes on this machine" in line


def test_run_directory_cannot_be_written(server: Server, config: Path) -> None:
    blocked = config.parent / "file"
    blocked.write_text("")
    assert "cannot write here" in forked.refuse(server, config.parent, "run", config, "--run-dir", blocked / "run")


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a full file system needs root")
def test_full_disk_while_collecting_and_calibrating(calibrated: Path, server: Server) -> None:
    """Per-token files are written through memory maps, where a full disk would be a SIGBUS."""
    folder, run = calibrated.parent / "small", calibrated.parent / "small" / "run"
    folder.mkdir()
    for verb, parts, room_kb in (("collect", ("data",), 28), ("calibrate", ("data", "statistics"), 24)):
        size_kb = sum(
            -(-path.stat().st_size // 4096) * 4
            for part in parts
            for path in (calibrated.parent / "run" / part).rglob("*")
        )
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_kb + room_kb}k", "tmpfs", folder], check=True)
        try:
            jobs.copied_run(calibrated.parent / "run", run, *parts)
            result = server.run([verb, calibrated, "--run-dir", run], calibrated.parent, **forked.JOB)
            assert result.returncode == 2 and "No space left on device" in result.stderr, (verb, result.stderr)
            assert len(result.stderr.splitlines()) == 1
        finally:
            subprocess.run(["umount", folder], check=True)


def test_file_system_without_locks(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match=r"run/\.lock: files cannot be locked here \(No locks available\)"):
        run_verb("prepare", Request.load(str(config), [], config.parent / "run"))


def test_errors_in_a_rank_end_the_job_with_status_2(config: Path) -> None:
    """Started by a launcher, the main process says what is wrong and every rank leaves with status 2."""
    from trace_ds.parallel.environment import free_port

    job = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    with forked.warm_command(config.parent) as command:
        ranks = [
            subprocess.Popen(
                [*command.split(), "collect", str(config)],
                cwd=config.parent,
                env=environment() | job | {"RANK": str(rank)},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(2)
        ]
        errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "there is no data artefact here" in errors[0] and "error" not in errors[1]
