"""What users get wrong, each: one clear line that names the place and the fix, exit status 2, nothing written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import tiny
import yaml
from command import environment, trace_ds, tree
from distributed import run_distributed

from trace_ds.config.load import dump_yaml, load_config
from trace_ds.errors import UserError
from trace_ds.parallel.world import AgreedError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.calibrate import calibrate
from trace_ds.stages.pipeline import Request, run_verb
from trace_ds.stages.prepare import prepare


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Path:
    return tiny.write_config(tmp_path, tiny_model)


def refuse(folder: Path, *arguments: str | Path) -> str:
    """Run the command, insist on exit status 2, one line on stderr and nothing written; return the line."""
    before = tree(folder)
    result = trace_ds(*arguments, cwd=folder)
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("trace-ds: error: ")
    after = tree(folder)
    assert after == before, sorted(set(after) ^ set(before))
    return lines[0]


def edit(config: Path, change: Callable[[dict], None]) -> None:
    raw = yaml.safe_load(config.read_text())
    change(raw)
    config.write_text(yaml.safe_dump(raw))


CONFIG_ERRORS: list[tuple[Callable[[dict], object], str]] = [
    (lambda c: c["unlearning"].update(learning_rte=1), "unknown key 'unlearning.learning_rte'"),
    (lambda c: c["unlearning"].update(alhpa=1), "did you mean 'alpha'?"),
    (lambda c: c["data"].pop("retain"), "the key 'data.retain' is missing"),
    (lambda c: c["unlearning"].update(steps="many"), "unlearning.steps: Input should be a valid integer"),
    (lambda c: c["unlearning"].update(steps="7"), "unlearning.steps: Input should be a valid integer (found '7')"),
    (lambda c: c["unlearning"].update(steps=True), "unlearning.steps: Input should be a valid integer (found True)"),
    (lambda c: c.update(seed=True), "seed: Input should be a valid integer (found True)"),
    (lambda c: c["statistics"].update(trace="off"), "statistics.trace: Input should be a valid boolean (found 'off')"),
    (lambda c: c["unlearning"].update(alpha=float("inf")), "unlearning.alpha: Input should be a finite number"),
    (lambda c: c["unlearning"].update(forget_loss="npo"), "npo needs statistics.nll: true"),
    (lambda c: c["calibration"].update(rule="raknig"), "calibration.rule"),
    (lambda c: c["calibration"].update(rule="sources"), "rule: sources and source_weights belong together"),
    (lambda c: c["calibration"].update(source_weights={"a": 2.0}), "rule: sources and source_weights belong together"),
    (lambda c: c["calibration"].update(rule="sources", source_weights={"a": 0.0}), "source_weights.a"),
    (lambda c: c.update(variants={"a": {"model.path": "x"}}), "variants.a may not change model.path"),
]


@pytest.mark.parametrize(("change", "message"), CONFIG_ERRORS)
def test_config_key_or_type(config: Path, change: Callable[[dict], None], message: str) -> None:
    edit(config, change)
    with pytest.raises(UserError) as error:
        Request.load(str(config), [], None)
    assert message in error.value.line()


def test_a_wrong_key_on_the_command_line(config: Path) -> None:
    edit(config, CONFIG_ERRORS[0][0])
    assert CONFIG_ERRORS[0][1] in refuse(config.parent, "run", config)


def test_numbers_as_people_write_them(config: Path) -> None:
    config.write_text(config.read_text().replace("lr: 0.001", "lr: 1e-3"))
    loaded, _ = load_config(str(config), ["unlearning.alpha=2", "calibration.clip=2.5E+1", "name='1e5'"])
    assert loaded.unlearning.optimizer.lr == 0.001 and loaded.name == "1e5"
    (config.parent / "stored.yaml").write_text(dump_yaml(loaded))
    assert load_config(str(config.parent / "stored.yaml"))[0] == loaded
    assert (loaded.unlearning.alpha, loaded.calibration.clip) == (2.0, 25.0)
    assert load_config(str(config), [f"unlearning.optimizer.betas=[0.5, {value}]" for value in (1, 0.75)])[0]


def test_no_config_and_broken_yaml(tmp_path: Path) -> None:
    assert "no such configuration file or recipe" in refuse(tmp_path, "run", "nothere.yaml")
    (tmp_path / "broken.yaml").write_text("name: [unclosed\n")
    assert "not valid YAML in line 2" in refuse(tmp_path, "run", "broken.yaml")
    (tmp_path / "twice.yaml").write_text("name: a\nmodel: {path: m}\nname: b\n")
    with pytest.raises(UserError, match=r"twice\.yaml: not valid YAML in line 3 \('name' is there twice\)"):
        load_config(str(tmp_path / "twice.yaml"))


def test_model_directory(config: Path, tiny_model: Path) -> None:
    folder = config.parent
    assert "there is no model directory" in refuse(folder, "run", config, "--set", "model.path=missing")
    dense = folder / "dense"
    shutil.copytree(tiny_model, dense)
    raw = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 3}))
    assert "is not a Mixture-of-Experts model" in refuse(folder, "run", config, "--set", f"model.path={dense}")
    (dense / "config.json").write_text(json.dumps(raw | {"model_type": "nllb-moe"}))
    line = refuse(folder, "run", config, "--set", f"model.path={dense}")
    assert "'nllb-moe' is not supported" in line and "mixtral, olmoe, qwen2_moe, qwen3_moe" in line
    (dense / "config.json").write_text(json.dumps(raw | {"num_experts_per_tok": 9}))
    assert "num_experts_per_tok 9 is larger than the number of experts (4)" in refuse(
        folder, "run", config, "--set", f"model.path={dense}"
    )


def test_model_shard_missing(config: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    sharded = config.parent / "sharded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(sharded, max_shard_size="100KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, sharded / name)
    shard = sorted(sharded.glob("model-00002-of-*.safetensors"))[0]
    shard.unlink()
    assert shard.name in refuse(config.parent, "run", config, "--set", f"model.path={sharded}")


CORPORA: list[tuple[bytes, str]] = [
    (b"", "the forget corpus is empty"),
    (b'{"text": ""}\n{"text": ""}\n', "no usable token"),
    (b'{"text": "caf\xe9"}\n', "not UTF-8"),
    (b'{"txt": "iron"}\n', "no text under 'text'"),
    (b"iron\n", "not a JSON object"),
]


@pytest.mark.parametrize(("content", "message"), CORPORA)
def test_corpus(config: Path, content: bytes, message: str) -> None:
    path = config.parent / "corpora" / "forget.jsonl"
    path.write_bytes(content)
    before = tree(config.parent)
    with pytest.raises(UserError) as error:
        run_verb("prepare", Request.load(str(config), [], config.parent / "some" / "run"))
    assert message in error.value.line() and "forget.jsonl" in error.value.line()
    assert tree(config.parent) == before and not (config.parent / "some").exists()


LATE_MISTAKES: list[tuple[dict[str, object], str]] = [
    ({"variants": {"even": {"calibration.rul": "uniform"}}}, "unknown key 'calibration.rul'"),
    ({"variants": {"deep": {"unlearning.rmu.layer": 99}}}, "unlearning.rmu.layer: layer 99 of a model with 3"),
    ({"evaluation.models.gold": "no/such/model"}, "no/such/model: there is no model directory"),
    ({"unlearning.ds_config": "no/such/file.json"}, "the DeepSpeed configuration cannot be read"),
]


@pytest.mark.parametrize(("changes", "message"), LATE_MISTAKES)
def test_run_finds_at_once_what_late_stages_would_stumble_on(
    config: Path, changes: dict[str, object], message: str
) -> None:
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    request = Request.load(str(config), overrides, config.parent / "run")
    before = tree(config.parent)
    with pytest.raises(UserError) as error:
        run_verb("run", request)
    assert message in error.value.line()
    assert tree(config.parent) == before


def test_dry_run_says_what_is_not_ready(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    request = Request.load(str(config), ["unlearning.rmu.layer=99"], config.parent / "run")
    assert run_verb("run", request, dry_run=True) == 0
    assert "# not ready: unlearning.rmu.layer: layer 99" in capsys.readouterr().out


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration with a run directory beside it that has been prepared, collected and calibrated."""
    folder = tmp_path_factory.mktemp("calibrated")
    config = tiny.write_config(folder, tiny_model)
    loaded, run = load_config(str(config), [], folder / "run")
    prepare(loaded, RunDirectory(run))
    run_distributed(jobs.collect_job, 1, str(config), str(run), [])
    calibrate(loaded, RunDirectory(run))
    RunDirectory(run, config_text=dump_yaml(loaded)).store_config()
    return config


@pytest.mark.slow
def test_artefacts_of_another_model_or_tokenizer_and_damaged_ones(calibrated: Path, tiny_model: Path) -> None:
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
        assert message in refuse(folder, verb, *common, "--set", change), (verb, change)
    weights = run / "calibration" / "weights.npy"
    whole = weights.read_bytes()
    try:
        for content, message in (
            (whole[:-1], f"the file has {len(whole) - 1} bytes instead of {len(whole)}"),
            (whole[:-1] + bytes([whole[-1] ^ 1]), "the file was altered after it was written"),
        ):
            weights.write_bytes(content)
            line = refuse(folder, "unlearn", *common, "--set", "unlearning.alpha=9")
            assert message in line and "weights.npy" in line
    finally:
        weights.write_bytes(whole)


def one_sided(world: Any) -> list[str]:
    """Checks that fail on rank 1 only, as where a node does not see the model, or its storage does not answer."""
    errors = (
        UserError("there is no model directory", "/models/m", "mount it"),
        OSError(errno.EIO, "Input/output error", "/models/m/config.json"),
    )
    told = []
    for error in errors:

        def check(verify: bool, error: Exception = error) -> str:
            if world.rank == 1:
                raise error
            return "fine"

        try:
            world.agree_each(check)
        except (UserError, AgreedError) as end:
            told.append(f"{type(end).__name__}: {end}")
    return told


@pytest.mark.slow
def test_what_only_one_rank_finds_wrong_ends_all_of_them() -> None:
    said, silent = run_distributed(one_sided, 2)
    assert said == [
        "UserError: /models/m: on rank 1: there is no model directory. Fix: mount it",
        "UserError: /models/m/config.json: on rank 1: it cannot be read (Input/output error). "
        "Fix: check the storage that it lies on",
    ]
    assert silent == ["AgreedError: "] * 2


def test_corpus_missing(config: Path) -> None:
    (config.parent / "corpora" / "retain.jsonl").unlink()
    assert "the corpus file does not exist" in refuse(config.parent, "prepare", config)


def test_expert_parallel_size(config: Path) -> None:
    folder = config.parent
    assert "does not divide the 4 experts" in refuse(folder, "collect", config, "--nproc", "3", "--ep", "3")
    assert "does not divide the world size 2" in refuse(folder, "run", config, "--nproc", "2", "--ep", "4")


def test_more_processes_than_the_machine_has(config: Path) -> None:
    limit = 4 * (os.cpu_count() or 1)
    line = refuse(config.parent, "collect", config, "--nproc", str(limit + 1))
    assert f"{limit + 1} processes on this machine" in line and f"set distributed.nproc to {limit} at most" in line
    line = refuse(config.parent, "run", config, "--set", f"evaluation.nproc={limit + 1}")
    assert f"evaluation.nproc: {limit + 1} processes on this machine" in line


def test_more_processes_than_accelerators() -> None:
    from trace_ds.errors import UserError
    from trace_ds.parallel.launch import check_process_count

    check_process_count(8, accelerators=8, cores=1)
    with pytest.raises(UserError, match="which has 4 accelerators"):
        check_process_count(8, accelerators=4, cores=64)


def test_stage_before_its_inputs(config: Path) -> None:
    for verb in ("collect", "calibrate", "unlearn", "convert", "evaluate"):
        line = refuse(config.parent, verb, config)
        assert "there is no data artefact here" in line and "trace-ds prepare" in line
    assert not (config.parent / "runs").exists()


def test_run_directory_cannot_be_written(config: Path) -> None:
    blocked = config.parent / "file"
    blocked.write_text("")
    assert "cannot write here" in refuse(config.parent, "run", config, "--run-dir", blocked / "run")


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a full and a read-only file system needs root")
def test_full_and_read_only_run_directory(config: Path) -> None:
    folder = config.parent / "mount"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], check=True)
    try:
        result = trace_ds("prepare", config, "--run-dir", folder / "run", cwd=config.parent)
        assert result.returncode == 2 and "No space left" in result.stderr, result.stderr
        assert not list((folder / "run").glob("data*"))
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        result = trace_ds("prepare", config, "--run-dir", folder / "other", cwd=config.parent)
        assert result.returncode == 2 and "Read-only file system" in result.stderr, result.stderr
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a full file system needs root")
def test_full_disk_while_collecting_and_calibrating(calibrated: Path) -> None:
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
            for part in parts:
                shutil.copytree(calibrated.parent / "run" / part, run / part)
            result = trace_ds(verb, calibrated, "--run-dir", run, cwd=calibrated.parent)
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


def test_run_directory_in_use(config: Path) -> None:
    run = config.parent / "run"
    run.mkdir()
    with (run / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        line = refuse(config.parent, "prepare", config, "--run-dir", run)
        assert "another process is using this run directory" in line


def test_wrong_words_on_the_command_line(tmp_path: Path) -> None:
    for words in (["colect", "x"], ["run"], ["run", "x", "--nprc", "2"], ["run", "x", "--nproc", "zero"]):
        result = trace_ds(*words, cwd=tmp_path)
        assert result.returncode == 2, words
        assert "Error" in result.stderr and not list(tmp_path.iterdir())


def test_errors_in_a_rank_end_the_job_with_status_2(config: Path) -> None:
    """Started by a launcher, the main process says what is wrong and every rank leaves with status 2."""
    from trace_ds.parallel.environment import free_port

    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "trace_ds", "collect", str(config)],
            cwd=config.parent,
            env=environment()
            | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=300)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2]
    assert "there is no data artefact here" in errors[0] and "error" not in errors[1]
