"""Damaged and hostile sources, full disks: one line that names the file or tensor, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_convert_engines import Case, base_model, checkpoints

from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.conversion.torch_archive import LazyTensor, read_archive
from trace_ds.errors import UserError

CASE = Case("mixtral", 3, 2)
TOOL = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"
OPTIM = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_1_mp_rank_00_model_states.pt"


@pytest.fixture
def step(tmp_path: Path) -> Path:
    """A private copy of one checkpoint (world 2, EP 2)."""
    shutil.copytree(checkpoints(2) / CASE.name / "step_000001", tmp_path / "step_000001")
    return tmp_path / "step_000001"


def base() -> Path:
    return checkpoints(2) / "base" / "mixtral"


def add_manifest(step: Path, /, **changes: Any) -> None:
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(step.glob("*.pt"))
    }
    manifest = {"format": 1, "step": 1, "world": 2, "ep": 2, "files": files, "model": {"path": str(base())}}
    (step / "manifest.json").write_text(json.dumps(manifest | changes))


def refused(step: Path, destination: Path, named: str, **options: Any) -> str:
    """The conversion is refused with a line that contains ``named``, and leaves nothing."""
    before = sorted(destination.parent.iterdir())
    with pytest.raises(UserError) as raised:
        convert_checkpoint(step, destination, base_model=base(), **options)
    line = raised.value.line()
    assert named in line and "\n" not in line
    assert raised.value.exit_status == 2
    assert sorted(destination.parent.iterdir()) == before
    return line


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(bytes(data))


def master(step: Path, group: int = 0) -> LazyTensor:
    return read_archive(step / OPTIM)["optimizer_state_dict"]["fp32_flat_groups"][group]


@pytest.mark.parametrize("name", [OPTIM, MODEL])
@pytest.mark.parametrize("manifest", [False, True])
def test_missing_rank_file(step: Path, tmp_path: Path, name: str, manifest: bool) -> None:
    if manifest:
        add_manifest(step)
    (step / name).unlink()
    refused(step, tmp_path / "model", name)


@pytest.mark.parametrize("kept", [0, 100, -1, -1000])
def test_truncated_file(step: Path, tmp_path: Path, kept: int) -> None:
    data = (step / OPTIM).read_bytes()
    (step / OPTIM).write_bytes(data[:kept])
    refused(step, tmp_path / "model", OPTIM)


@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize("element", [0, 5, -1])
def test_flipped_byte_of_a_weight(step: Path, tmp_path: Path, group: int, element: int) -> None:
    """Found by the archive's own checksums, without a manifest, wherever it is (the last element may be padding)."""
    tensor = master(step, group)
    start = tensor.storage.offset_bytes + (element % tensor.numel()) * 4
    flip(step / OPTIM, start + 1)
    refused(step, tmp_path / "model", OPTIM)
    refused(step, tmp_path / "model", OPTIM, jobs=3)


def test_flipped_byte_of_the_pickle(step: Path, tmp_path: Path) -> None:
    """A byte that leaves the pickle well-formed: only the checksum can tell."""
    flip(step / MODEL, (step / MODEL).read_bytes().index(b"0.19.8") + 2)
    refused(step, tmp_path / "model", MODEL)


def test_flipped_byte_that_no_weight_needs_is_found_by_verify(step: Path, tmp_path: Path) -> None:
    add_manifest(step)
    moment = read_archive(step / OPTIM)["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg"]
    flip(step / OPTIM, moment.storage.offset_bytes + 8)
    convert_checkpoint(step, tmp_path / "whole", base_model=base())
    refused(step, tmp_path / "model", OPTIM, verify=True)


def test_mixed_steps(step: Path, tmp_path: Path) -> None:
    rewrite(step / MODEL, lambda state: state.update(global_steps=7))
    refused(step, tmp_path / "model", MODEL)


def test_mixed_optimizer_steps(step: Path, tmp_path: Path) -> None:
    def later(state: Any) -> None:
        state["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["step"] += 3

    rewrite(step / OPTIM, later)
    refused(step, tmp_path / "model", OPTIM)


@pytest.mark.parametrize("world", [1, 3])
def test_wrong_world_size(step: Path, tmp_path: Path, world: int) -> None:
    for path in step.glob("*_model_states.pt"):
        rewrite(path, lambda state: state.update(dp_world_size=world))
    refused(step, tmp_path / "model", "zero_pp_rank_")


def test_wrong_partition_count(step: Path, tmp_path: Path) -> None:
    rewrite(step / OPTIM, lambda state: state["optimizer_state_dict"].update(partition_count=4))
    refused(step, tmp_path / "model", OPTIM)


def test_contradicting_expert_metadata(step: Path, tmp_path: Path) -> None:
    rewrite(step / MODEL, lambda state: state["ds_autoep_layers"][1].update(num_local_experts=3))
    refused(step, tmp_path / "model", MODEL)


@pytest.mark.parametrize(("key", "value"), [("step", 9), ("world", 4), ("ep", 4)])
def test_manifest_of_another_checkpoint(step: Path, tmp_path: Path, key: str, value: int) -> None:
    add_manifest(step, **{key: value})
    refused(step, tmp_path / "model", "manifest.json")


def test_manifest_size(step: Path, tmp_path: Path) -> None:
    add_manifest(step)
    with (step / MODEL).open("ab") as handle:
        handle.write(b"x")
    refused(step, tmp_path / "model", MODEL)


def test_nan_is_a_warning_that_names_the_tensors(step: Path, tmp_path: Path) -> None:
    def poison(state: Any) -> None:
        state["optimizer_state_dict"]["fp32_flat_groups"][0].data[3] = float("nan")

    rewrite(step / OPTIM, poison)
    report = convert_checkpoint(step, tmp_path / "model", base_model=base())
    assert report["warnings"] == ["model.embed_tokens.weight holds NaN"]
    assert "holds NaN" in (tmp_path / "model" / "README.md").read_text()


class Payload:
    def __reduce__(self) -> Any:
        return os.system, ("touch payload_ran",)


class Indirect:
    """getattr(builtins) chains must fail as well: every global goes through the same gate."""

    def __reduce__(self) -> Any:
        return eval, ("__import__('os').system('touch payload_ran')",)


@pytest.mark.parametrize("payload", [Payload, Indirect])
@pytest.mark.parametrize("name", [MODEL, OPTIM])
def test_a_pickle_that_runs_code_is_refused_and_not_run(
    step: Path, tmp_path: Path, payload: type, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rewrite(step / name, lambda state: state.update(evil=payload()))
    line = refused(step, tmp_path / "model", name)
    assert "refused" in line
    assert not (tmp_path / "payload_ran").exists()
    torch.load(step / name, weights_only=False)  # the payload is live: this is what an unpickler would have run
    assert (tmp_path / "payload_ran").exists()


def test_a_stand_in_never_runs_the_class_it_stands_for(tmp_path: Path) -> None:
    """Names of DeepSpeed and NumPy become inert objects: their arguments are kept, nothing is imported or called."""
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.arange(6.0), "order": OrderedDict(a=1)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    hostile = b"\x80\x02cnumpy.f2py.diagnose\nrun_command\nX\x11\x00\x00\x00touch payload_ran\x85R."
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, hostile if name.endswith("data.pkl") else data)
    result = read_archive(path)
    assert result.args == ("touch payload_ran",) and not Path("payload_ran").exists()


@pytest.mark.parametrize("change", ["beyond", "negative", "kind"])
def test_a_tensor_that_points_outside_its_record_is_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "state.pt"
    torch.save({"weight": torch.arange(6.0)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    key = next(name for name in records if name.endswith("data.pkl"))
    old, new = {
        "beyond": (b"K\x06\x85", b"K\x60\x85"),  # the tensor's shape
        "negative": (b"K\x00K\x06\x85", b"J\xff\xff\xff\xffK\x06\x85"),  # its offset
        "kind": (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00stolage"),
    }[change]
    assert old in records[key]
    records[key] = records[key].replace(old, new, 1)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(UserError, match=r"state\.pt"):
        read_archive(path)


def test_destination_not_empty(step: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "precious.txt").write_text("mine")
    refused(step, tmp_path / "model", str(tmp_path / "model"))
    assert (tmp_path / "model" / "precious.txt").read_text() == "mine"


def test_another_model(step: Path, tmp_path: Path) -> None:
    base_model("olmoe").save_pretrained(tmp_path / "olmoe")
    with pytest.raises(UserError, match="not of this model"):
        convert_checkpoint(step, tmp_path / "model", base_model=tmp_path / "olmoe")
    with pytest.raises(UserError, match=r"--base-model"):
        convert_checkpoint(step, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [({"to": "gguf"}, "gguf"), ({"dtype": "int3"}, "int3"), ({"max_shard_size": "5 apples"}, "apples")],
)
def test_wrong_options(step: Path, tmp_path: Path, options: dict[str, str], named: str) -> None:
    refused(step, tmp_path / "model", named, **options)


def test_nothing_there(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "absent"):
        refused(tmp_path / name, tmp_path / "model", name)


def run_tool(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_no_space_left(step: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk (the same path in the code, and it needs no mount)."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    result = run_tool(step, tmp_path / "model", "--base-model", base(), preexec_fn=limit)
    assert result.returncode == 2, result.stderr
    assert "model.safetensors" in result.stderr.splitlines()[-1] and "cannot hold" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000001"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_no_space_left_on_a_small_file_system(step: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    try:
        refused(step, small / "model", str(small))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_the_tool_needs_no_deepspeed_no_gpu_and_no_compiler(step: Path, tmp_path: Path) -> None:
    add_manifest(step)
    guard = "import sys; sys.modules['deepspeed'] = None; sys.modules['triton'] = None\n"
    (tmp_path / "sitecustomize.py").write_text(guard)
    environment = {"PATH": "/nonexistent", "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    result = run_tool(step, tmp_path / "model", "--verify", "--jobs", 2, env=environment, cwd="/")
    assert result.returncode == 0, result.stderr
    assert "verified" in result.stdout and (tmp_path / "model" / "model.safetensors").is_file()
    again = run_tool(step, tmp_path / "model", env=environment, cwd="/")
    assert again.returncode == 2 and "not empty" in again.stderr and "Traceback" not in again.stderr


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(step: Path, tmp_path: Path) -> None:
    """The temporary directory of a process that is gone is cleared away by the next conversion."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    leftover = tmp_path / f"model.tmp-{dead.pid}"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    convert_checkpoint(step, tmp_path / "model", base_model=base())
    assert not leftover.exists() and (tmp_path / "model" / "conversion.json").is_file()


def test_verify_finds_a_result_that_differs(step: Path, tmp_path: Path) -> None:
    from trace_ds.conversion.convert import verify_huggingface

    report = convert_checkpoint(step, tmp_path / "model", base_model=base(), verify=True)
    flip(tmp_path / "model" / "model.safetensors", -3)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        verify_huggingface(tmp_path / "model", report)


def test_pickles_of_the_tests_are_what_they_claim() -> None:
    assert pickle.dumps(Payload(), protocol=2).startswith(b"\x80\x02cposix\nsystem")
