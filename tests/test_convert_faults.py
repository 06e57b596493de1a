"""Damaged and hostile sources, full disks: one line that names the file or tensor, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import tree
from safetensors.torch import load_file, save_file
from test_convert_engines import Case, base_model, checkpoints

from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.conversion.torch_archive import LazyTensor, read_archive
from trace_ds.errors import UserError

CASE = Case("mixtral", 3, 2)
TOOL = Path(__file__).parent.parent / "tools" / "convert_checkpoint.py"
FUZZ_ROUNDS = 60
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


@contextlib.contextmanager
def limit(kind: int, value: int) -> Iterator[None]:
    """Lower a resource limit of this process."""
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, (value, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(kind, before)


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


# Of every kind of source: its name, the file with the metadata, and another one.
KINDS = {
    "zero3": (CASE.name, "zero_pp_rank_0_mp_rank_00_model_states.pt", OPTIM),
    "zero1": (Case("mixtral", 1, 2).name, "mp_rank_00_model_states.pt", OPTIM),
    "stage0": (
        Case("mixtral", 0, 2, "fp32").name,
        "mp_rank_00_model_states.pt",
        "layer_1_expert_3_mp_rank_00_model_states.pt",
    ),
    "universal": ("", "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero/model.norm.weight/fp32.pt"),
}


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("universal") / "folder"
    convert_checkpoint(checkpoints(2) / CASE.name, folder, to="universal")
    return folder


@pytest.fixture
def source(kind: str, tmp_path: Path, universal: Path) -> Path:
    """A private copy of a source of this kind."""
    origin = universal if kind == "universal" else checkpoints(2) / KINDS[kind][0]
    shutil.copytree(origin / "step_000001", tmp_path / "step_000001")
    return tmp_path / "step_000001"


def cut(kept: int) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[:kept]) and None


def damage_zip_directory(path: Path) -> None:
    """The version that the first entry says is needed to extract it."""
    flip(path, path.read_bytes().index(b"PK\x01\x02") + 6)


FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": cut(0),
    "cut early": cut(100),
    "cut late": cut(-1),
    "cut": cut(-1000),
    "zip directory": damage_zip_directory,
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("file", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file(source: Path, tmp_path: Path, kind: str, file: int, fault: str) -> None:
    FILE_FAULTS[fault](source / KINDS[kind][file])
    missing_model = kind in ("zero1", "stage0") and file == 1 and fault == "missing"
    refused(source, tmp_path / "model", source.name if missing_model else KINDS[kind][file])


def put(*path: Any) -> Callable[[Any], None]:
    """Put the last argument at the place that the others lead to."""
    *keys, last, value = path

    def change(state: Any) -> None:
        for key in keys:
            state = state[key]
        state[last] = value

    return change


OPTIMIZER = "optimizer_state_dict"
# (kind, which file, change): what only a broken or hostile writer would store
WRONG_METADATA = {
    "world": ("zero3", 1, put("dp_world_size", "x")),
    "huge world": ("zero1", 1, put("dp_world_size", 1 << 40)),
    "no shapes": ("zero3", 1, put("param_shapes", None)),
    "a shape of fractions": ("zero3", 1, put("param_shapes", 0, "model.norm.weight", (9.0,))),
    "no module": ("stage0", 1, put("module", None)),
    "step": ("stage0", 1, put("global_steps", "many")),
    "buffers": ("zero3", 1, put("buffer_names", 3)),
    "frozen": ("zero3", 1, put("frozen_param_fragments", {"x": 1})),
    "shared": ("universal", 1, put("shared_params", 3)),
    "shapes": ("universal", 1, put("param_shapes", [{"model.norm.weight": "ab"}])),
    "layers": ("zero1", 1, put("ds_autoep_layers", 0, "moe_layer_id", [])),
    "experts": ("zero1", 1, put("ds_autoep_layers", 0, "num_experts", 1 << 40)),
    "configuration": ("zero1", 1, put("ds_config", "x")),
    "partitions": ("zero3", 2, put(OPTIMIZER, "ds_zero_partition_groups", 0, {"partition_count": 0})),
    "many partitions": ("zero3", 2, put(OPTIMIZER, "partition_count", [2, "x"])),
    "groups": ("zero3", 2, put(OPTIMIZER, "fp32_flat_groups", 7)),
    "states": ("zero3", 2, put(OPTIMIZER, OPTIMIZER, "state", [1])),
    "optimizer step": ("zero3", 2, put(OPTIMIZER, OPTIMIZER, "state", 0, "step", torch.zeros(3))),
    "mappings": ("zero1", 2, put(OPTIMIZER, "param_slice_mappings", 0, "model.norm.weight", None)),
    "stage": ("zero1", 2, put(OPTIMIZER, "zero_stage", "three")),
    "parts": ("zero1", 2, put(OPTIMIZER, "partition_count", "x")),
}


@pytest.mark.parametrize(("kind", "file", "change"), WRONG_METADATA.values(), ids=list(WRONG_METADATA))
def test_wrong_metadata(source: Path, tmp_path: Path, kind: str, file: int, change: Callable[[Any], None]) -> None:
    rewrite(source / KINDS[kind][file], change)
    huge = change is WRONG_METADATA["huge world"][2]
    refused(source, tmp_path / "model", "zero_pp_rank_2_" if huge else KINDS[kind][file])


def restored(path: Path, data: bytes) -> bytes:
    """The zip archive ``data`` with the checksums that its own pickle now has (as a forger would leave it)."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith("/data.pkl"))
    name = len(info.filename)
    extra = int.from_bytes(data[info.header_offset + 28 : info.header_offset + 30], "little")
    begin = info.header_offset + 30 + name + extra
    checksum = zlib.crc32(data[begin : begin + info.file_size]).to_bytes(4, "little")
    return data.replace(info.CRC.to_bytes(4, "little"), checksum)


@pytest.mark.parametrize("kind", KINDS)
def test_random_damage_is_refused_or_harmless(source: Path, tmp_path: Path, kind: str) -> None:
    """One changed byte anywhere, or in a pickle whose checksum was made to fit: an error of one line, or a conversion
    as if nothing had happened (padding, states that no weight needs, names that nobody reads)."""
    good = convert_checkpoint(source, tmp_path / "good", base_model=base())["tensors"]
    files = sorted(path for path in source.rglob("*.pt") if "exp_avg" not in path.name and path.name != "step.pt")
    draw = random.Random(kind)
    ended = Counter[str]()
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    with limit(resource.RLIMIT_AS, memory + (1 << 30)):  # a damaged pickle may ask for any amount
        for number in range(FUZZ_ROUNDS):
            path = draw.choice(files)
            data = path.read_bytes()
            forged = number % 2 == 1
            position = draw.randrange(len(data))
            if forged:
                begin = data.index(b"\x80\x02")
                position = begin + draw.randrange(data.index(b"PK", begin) - begin)
            changed = bytearray(data)
            changed[position] ^= draw.randrange(1, 256)
            path.write_bytes(restored(path, bytes(changed)) if forged else changed)
            try:
                report = convert_checkpoint(source, tmp_path / f"model{number}", base_model=base())
                ended["converted"] += 1
                assert forged or report["tensors"] == good, (path.name, position)
            except UserError as error:
                ended["refused"] += 1
                assert "\n" not in error.line()
                assert not (tmp_path / f"model{number}").exists()
            path.write_bytes(data)
    assert not list(tmp_path.glob("*.tmp-*"))
    assert ended["refused"] > FUZZ_ROUNDS // 4, ended


def test_the_optimizer_is_ahead_of_the_job(step: Path, tmp_path: Path) -> None:
    def set_step(value: int) -> Callable[[Any], None]:
        return lambda state: state[OPTIMIZER][OPTIMIZER]["state"][0].update(step=torch.tensor(float(value)))

    for path in step.glob("*_optim_states.pt"):
        rewrite(path, set_step(7))
    refused(step, tmp_path / "model", "7 steps, the job 1")
    for path in step.glob("*_optim_states.pt"):  # allowed: weights were loaded without optimizer states
        rewrite(path, set_step(0))
    assert (
        "has made 0 steps and the job 1" in convert_checkpoint(step, tmp_path / "model", base_model=base())["notes"][0]
    )


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


def test_a_mount_point_is_refused_at_once(step: Path) -> None:
    """Nothing can be renamed onto it (/proc is one on every Linux)."""
    with pytest.raises(UserError, match="mount point"):
        convert_checkpoint(step, Path("/proc"), base_model=base())


def test_more_files_than_a_process_may_open(tmp_path: Path) -> None:
    """A file for every expert, as a source and as a target, under a limit below their number."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=8, hidden_size=4, intermediate_size=2, num_hidden_layers=1, num_local_experts=200,
                           num_attention_heads=1, num_key_value_heads=1)  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(tmp_path / "base")
    with limit(resource.RLIMIT_NOFILE, len(list(Path("/proc/self/fd").iterdir())) + 100):
        convert_checkpoint(tmp_path / "base", tmp_path / "ep", to="ep", jobs=3)
        convert_checkpoint(tmp_path / "ep", tmp_path / "model", base_model=tmp_path / "base", jobs=3)
    assert len(list((tmp_path / "ep" / "model").iterdir())) == 201
    original, back = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "model"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)


def test_a_missing_tensor_is_named_as_it_is_on_disk(tmp_path: Path) -> None:
    shutil.copytree(base(), tmp_path / "base")
    tensors = load_file(base() / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match=rf": {re.escape(name)} is missing\."):
        convert_checkpoint(tmp_path / "base", tmp_path / "model", to="ep")


def test_experts_of_different_types(tmp_path: Path) -> None:
    shutil.copytree(base(), tmp_path / "base")
    tensors = load_file(base() / "model.safetensors")
    name = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
    save_file(tensors | {name: tensors[name].half()}, tmp_path / "base" / "model.safetensors")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj cannot be made"):
        convert_checkpoint(tmp_path / "base", tmp_path / "model", to="hf-fused")


def test_what_transformers_does_not_load_is_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3's directory on the hub: a layer for multi-token prediction, and the base model's quantisation."""
    base_model("deepseek_v3").save_pretrained(tmp_path / "base")
    original = load_file(tmp_path / "base" / "model.safetensors")
    more = {f"model.layers.61.{name}.weight": torch.ones(3) for name in ("embed_tokens", "eh_proj")}
    save_file(original | more, tmp_path / "base" / "model.safetensors")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "fp8"}})
    )
    report = convert_checkpoint(tmp_path / "base", tmp_path / "model")
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert converted.keys() == original.keys() and all(
        torch.equal(converted[name], original[name]) for name in original
    )
    assert "model.layers.61.eh_proj.weight" in report["notes"][0]
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())


def test_optimizer_states_of_some_parameters_only(step: Path, tmp_path: Path) -> None:
    def forget(state: Any) -> None:
        del state["optimizer_state_dict"]["optimizer_state_dict"]["state"][0]["exp_avg_sq"]

    for path in step.glob("*_optim_states.pt"):
        rewrite(path, forget)
    refused(step, tmp_path / "universal", "has no exp_avg_sq", to="universal")
    convert_checkpoint(step, tmp_path / "model", base_model=base())


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


@pytest.mark.parametrize(
    ("to", "file_bytes", "named"),
    [
        ("hf", 4096, "model.safetensors"),
        ("hf", 1 << 17, "tokenizer.json"),
        ("ep", 512, ".pt"),
        ("universal", 512, ".pt"),
    ],
)
def test_no_space_left(step: Path, tmp_path: Path, to: str, file_bytes: int, named: str) -> None:
    """A limit on the size of files stands for a full disk (the same path in the code, and it needs no mount)."""
    shutil.copytree(base(), tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_bytes(bytes(1 << 18))
    with limit(resource.RLIMIT_FSIZE, file_bytes), pytest.raises(UserError, match=r"cannot hold the result") as raised:
        convert_checkpoint(step, tmp_path / "model", base_model=tmp_path / "base", to=to)
    assert named in raised.value.where
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", step.name]


def test_no_space_left_at_the_last_fsync(step: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Network file systems say so only then."""

    def full(descriptor: int) -> None:
        if not list(tmp_path.glob("model.tmp-*/conversion.json")):
            return fsync(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    refused(step, tmp_path / "model", "cannot hold the result")


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
    """Of the package's dependencies torch, transformers and safetensors are enough (None: as if not installed)."""
    add_manifest(step)
    absent = (
        "deepspeed triton accelerate datasets pyarrow scipy mpi4py psutil pydantic typer tensorboard jinja2 matplotlib"
    )
    guard = f"import sys; sys.modules.update(dict.fromkeys('{absent}'.split()))\n"
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
    here, gone = socket.gethostname(), f"{dead.pid}-0123abcd"
    names = [f"model.tmp-{here}-{gone}", f"model.tmp-another-node-{gone}", f"model.tmp-{here}-{os.getpid()}-0123abcd"]
    for name in names:
        (tmp_path / name).mkdir()
    convert_checkpoint(step, tmp_path / "model", base_model=base())
    # a process of another node cannot be seen from here: its directory may be a conversion that still runs
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]
    assert (tmp_path / "model" / "conversion.json").is_file()


def test_two_conversions_to_the_same_place(step: Path, tmp_path: Path) -> None:
    """The one that ends last is refused at its rename, and what the first one wrote stays."""
    first: list[dict[str, bytes]] = []

    def other(done_bytes: int, total_bytes: int) -> None:
        if not first:
            convert_checkpoint(step, tmp_path / "model", base_model=base(), dtype="fp32")
            first.append(tree(tmp_path / "model"))

    with pytest.raises(UserError, match="not empty"):
        convert_checkpoint(step, tmp_path / "model", base_model=base(), progress=other)
    assert tree(tmp_path / "model") == first[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", step.name]


def test_verify_finds_a_result_that_differs(step: Path, tmp_path: Path) -> None:
    from trace_ds.conversion.convert import verify_huggingface

    report = convert_checkpoint(step, tmp_path / "model", base_model=base(), verify=True)
    flip(tmp_path / "model" / "model.safetensors", -3)
    with pytest.raises(UserError, match=r"model\.safetensors"):
        verify_huggingface(tmp_path / "model", report)


def test_pickles_of_the_tests_are_what_they_claim() -> None:
    assert pickle.dumps(Payload(), protocol=2).startswith(b"\x80\x02cposix\nsystem")
