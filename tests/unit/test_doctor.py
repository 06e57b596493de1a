"""``trace-ds doctor``: a healthy run passes, and each planted fault is found, named and given a fix."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import tiny

from trace_ds.cluster import checks
from trace_ds.cluster.checks import Check, guarded
from trace_ds.cluster.doctor import doctor, run_checks, share_checks
from trace_ds.config.load import dump_yaml, load_config
from trace_ds.config.schema import Config
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.pipeline import Request, run_verb


def loaded(tmp_path: Path, model: Path, **changes: Any) -> Config:
    config, _ = load_config(str(tiny.write_config(tmp_path, model, **changes)), [], tmp_path / "run")
    return config


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def of(result: list[Check], group: str) -> dict[str, Check]:
    return {check.name: check for check in result if check.group == group}


def only_fault(result: list[Check], *words: str) -> Check:
    """The single MISS of a list; its text contains the words and it names a fix."""
    missing = [check for check in result if check.status == "MISS"]
    assert len(missing) == 1, missing
    for word in words:
        assert word in f"{missing[0].name} {missing[0].detail} {missing[0].fix}"
    assert missing[0].fix
    return missing[0]


def test_a_healthy_run_has_no_miss(tmp_path: Path, tiny_model: Path) -> None:
    result = run_checks(loaded(tmp_path, tiny_model), tmp_path / "run")
    ours = [check for check in result if check.group not in ("accelerators",)]
    assert [check for check in ours if check.status == "MISS"] == []
    groups = {check.group for check in result}
    assert groups >= {"python", "network", "SLURM", "capacity", "storage", "corpora", "run"}
    assert all(check.fix for check in result if check.status != "OK")
    assert not any(check.fix for check in result if check.status == "OK")
    assert not (tmp_path / "run").exists(), "doctor must not make the run directory"
    assert not list(tmp_path.glob(".trace-ds*")), "doctor must remove what it wrote"


def test_exit_status_and_json(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = loaded(tmp_path, model)
    status = doctor(config, tmp_path / "run", json=True)
    result = json.loads(capsys.readouterr().out)
    assert status == any(check["status"] == "MISS" for check in result)
    assert {tuple(check) for check in result} == {("group", "name", "status", "detail", "fix")}
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-10])
    assert doctor(config, tmp_path / "run", json=False) == 1
    printed = capsys.readouterr().out
    assert "truncated" in printed and "fix:" in printed and "MISS" in printed


# Faults of versions and toolchain


def test_every_dependency_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    (result,) = (check for check in checks.python_checks() if check.name == "packages")
    assert result.status == "OK" and result.detail.count(", ") > 20
    assert all(f"{name} " in result.detail for name in ("deepspeed", "torch", "transformers", "mpi4py"))
    monkeypatch.setattr(checks.importlib.metadata, "requires", lambda name: ["numpy>=99", "no-such-package"])
    missing = {check.name: check for check in checks.python_checks() if check.status == "MISS"}
    assert missing["numpy"].fix == 'pip install "numpy>=99"' and "is not >=99" in missing["numpy"].detail
    assert missing["no-such-package"].detail == "not installed"


# Faults of the cluster


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def test_too_many_processes_and_too_little_memory(tmp_path: Path, tiny_model: Path) -> None:
    config = loaded(tmp_path, tiny_model, distributed__threads=4)
    results = list(checks.capacity_checks(config, 10_000, 1e18))
    assert of(results, "capacity")["cores"].status == "WARN"
    assert "--nproc" in only_fault(results, "memory", "loading needs").fix


def test_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    results = list(checks.accelerator_checks(None))
    if Path("/dev/nvidiactl").exists():
        only_fault(results, "GPUs")
    else:
        assert of(results, "accelerators")["GPUs"].status == "WARN"
    program(tmp_path, "nvidia-smi", "echo 580.159.03")
    monkeypatch.setenv("PATH", str(tmp_path))
    only_fault(list(checks.accelerator_checks(None)), "580.159.03", "torch sees no GPU", "CUDA build")


# Faults of a run


def test_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x", encoding="utf-8")
    only_fault(list(checks.storage_checks(tmp_path / "file" / "run", None)), "a part of the path is a file")
    if Path("/proc/self").is_dir():
        only_fault(list(checks.storage_checks(Path("/proc/run"), None)), "cannot be written", "--run-dir")
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        only_fault(list(checks.storage_checks(tmp_path / "closed" / "run", None)), "cannot be written")


def test_storage_that_is_full(tmp_path: Path) -> None:
    """A limit on the size of files: the write ends as on a full disk."""
    size, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 21, size[1]))
    try:
        only_fault(list(checks.storage_checks(tmp_path / "run", None)), "cannot be written (File too large)")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, size)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_storage_that_is_too_small(tmp_path: Path) -> None:
    fault = only_fault(list(checks.storage_checks(tmp_path / "run", 1e18)), "free space", "1000000000.0 GB")
    assert "unlearning.keep" in fault.fix


def test_it_refuses_what_run_refuses(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In run's own words: a size that does not divide the processes which `run` starts here."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = loaded(tmp_path, tiny_model, evaluation__ep=2)
    with pytest.raises(UserError) as refused:
        run_verb("run", Request(config, RunDirectory(tmp_path / "run")))
    fault = only_fault(run_checks(config, tmp_path / "run"))
    assert fault.name == "its own checks" and fault.fix == refused.value.fix
    assert fault.detail == f"{refused.value.where}: {refused.value.problem}"


def test_automatic_sizes_fit_the_machine(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a recipe has them: 1 for one process, 4 of 8 processes for 4 experts; the written configuration keeps them."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    sizes = {"distributed__ep": "auto", "evaluation__ep": "auto"}
    config = loaded(tmp_path, tiny_model, **sizes)
    assert not [check for check in run_checks(config, tmp_path / "run") if check.status == "MISS"]
    assert dump_yaml(config).count("ep: auto\n") == 2
    for changes, expected in (({}, (1, 1)), ({"distributed__nproc": 8, "evaluation__nproc": 2}, (4, 2))):
        request = Request(loaded(tmp_path, tiny_model, **sizes, **changes), RunDirectory(tmp_path / "run"))
        assert (request.config.distributed.ep, request.config.evaluation.ep) == expected
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert (request.config.distributed.ep, request.config.evaluation.ep) == (2, 2)  # not larger than a node


def test_corpus_faults(tmp_path: Path, tiny_model: Path) -> None:
    config = loaded(tmp_path, tiny_model)
    assert {check.status for check in checks.corpus_checks(config)} == {"OK"}
    path = Path(config.data.forget[0].path)
    for content, words in ((b"", "empty"), (b'{"body": "x"}\n', "no text under 'text'")):
        path.write_bytes(content)
        assert only_fault(list(checks.corpus_checks(config)), words).name == f"forget: {path}"
    path.unlink()
    only_fault(list(checks.corpus_checks(config)), "does not exist")


TASK = {"name": "facts", "type": "choice", "role": "forget"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__alternative": "nowhere.jsonl"}, ("alternative: nowhere.jsonl", "does not exist")),
        ({"evaluation__tasks": [TASK | {"path": "bad.jsonl"}]}, ("bad.jsonl:1", "'prompt'")),
        ({"evaluation__tasks": [TASK | {"type": "lm_eval", "task": "wmdp_bio"}]}, ("pip install 'trace-ds[lm-eval]'",)),
        ({"evaluation__models": {"gold": "nowhere"}}, ("no model directory",)),
        ({"variants": {"steered": {"unlearning.rmu.layer": 9}}}, ("layer 9 does not exist: the model has",)),
    ],
)
def test_what_late_stages_and_variants_would_stumble_on(
    changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name, *rest)
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"text": "salt", "choices": ["a", "b", "c", "d"], "answer": 0}\n')
    result = share_checks(loaded(tmp_path, tiny_model, **changes), tmp_path / "run")
    only_fault([check for check in result if check.group != "hub"], *words)  # there: what was not fetched


def test_a_check_that_fails_does_not_hide_the_others() -> None:
    def broken() -> list[Check]:
        raise RuntimeError("boom")

    only_fault(guarded("group", "name", broken), "boom", "RuntimeError")
