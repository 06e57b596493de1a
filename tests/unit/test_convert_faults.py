"""Damaged and hostile sources, full disks: one line that names the file or tensor, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command import tree
from safetensors.torch import load_file, save_file
from test_convert_engines import Case, base_model, checkpoints

from trace_ds.checkpoints import serialization
from trace_ds.checkpoints.elastic import write_universal
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.tensors.opening import open_source
from trace_ds.tensors.torch_archive import read_archive

CASE = Case("mixtral", 3, 2)
OPTIM = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_1_mp_rank_00_model_states.pt"
OPTIMIZER = "optimizer_state_dict"
ZERO3, REPLICATED = "zero_pp_rank_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"
SOURCES = {"zero3": CASE, "zero1": Case("mixtral", 1, 2), "stage0": Case("mixtral", 0, 2, "fp32")}
KINDS = {"zero3": ZERO3, "zero1": OPTIM, "stage0": "layer_1_expert_3_mp_rank_00_model_states.pt"}  # a file to damage
Change = Callable[[Any], object]


@pytest.fixture
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A private copy of a source of the test's ``kind`` (a ZeRO-3 checkpoint of world 2, EP 2, where it has none)."""
    kind = request.node.callspec.params.get("kind", "zero3") if hasattr(request.node, "callspec") else "zero3"
    shutil.copytree(checkpoints(2) / SOURCES[kind].name / "step_000001", tmp_path / "step_000001")
    return tmp_path / "step_000001"


def base() -> Path:
    return checkpoints(2) / "base" / "mixtral"


def manifest(step: Path, /, **changes: Any) -> None:
    files = {path.name: artefact.file_entry(path) for path in sorted(step.glob("*.pt"))}
    written = {"format": 1, "step": 1, "world": 2, "ep": 2, "files": files, "model": {"path": str(base())}}
    (step / "manifest.json").write_text(json.dumps(written | changes))


def refused(step: Path, destination: Path, named: str, **options: Any) -> str:
    """The conversion is refused with a line that contains ``named``, and leaves nothing."""
    before = sorted(destination.parent.iterdir())
    options = options if "base_model" in options else options | {"base_model": base()}
    with pytest.raises(UserError) as raised:
        convert_checkpoint(step, destination, **options)
    line = raised.value.line()
    assert named in line and "\n" not in line and len(line) < 1000
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


def a_gigabyte_more() -> contextlib.AbstractContextManager[None]:
    memory = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return limit(resource.RLIMIT_AS, memory + (1 << 30))


def rewrite(path: Path, change: Change) -> None:
    state = torch.load(path, weights_only=False)
    change(state)
    torch.save(state, path)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 0x40
    path.write_bytes(bytes(data))


FILE_FAULTS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "zip directory": lambda path: flip(path, path.read_bytes().index(b"PK\x01\x02") + 6),  # version of its first entry
    "a directory": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("fault", FILE_FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_file(source: Path, tmp_path: Path, kind: str, fault: str) -> None:
    FILE_FAULTS[fault](source / KINDS[kind])
    refused(source, tmp_path / "model", KINDS[kind])


def put(*path: Any) -> Change:
    """Put the last argument at the place that the others lead to."""
    *keys, last, value = path

    def change(state: Any) -> None:
        for key in keys:
            state = state[key]
        state[last] = value

    return change


STEP_OF = (OPTIMIZER, OPTIMIZER, "state", 0, "step")
# id: (kind, glob of the files, change, part of the line; empty: the file's name): no writer in order stores these
WRONG_METADATA: dict[str, tuple[str, str, Change, str]] = {
    "world": ("zero3", ZERO3, put("dp_world_size", "x"), ""),
    "huge world": ("zero1", REPLICATED, put("dp_world_size", 1 << 40), "zero_pp_rank_2_"),
    "world 3": ("zero3", "*_model_states.pt", put("dp_world_size", 3), "zero_pp_rank_"),
    "a huge shape": ("zero3", ZERO3, put("param_shapes", 0, "model.norm.weight", (1 << 2000,) * 9), ""),
    "step": ("stage0", REPLICATED, put("global_steps", "many"), ""),
    "mixed steps": ("zero3", MODEL, put("global_steps", 7), ""),
    "frozen": ("zero3", ZERO3, put("frozen_param_fragments", {"x": 1}), ""),
    "shapes": ("zero1", REPLICATED, put("param_shapes", [{"model.norm.weight": "ab"}]), ""),
    "experts": ("zero1", REPLICATED, put("ds_autoep_layers", 0, "num_experts", 1 << 40), ""),
    "contradicting experts": ("zero3", MODEL, put("ds_autoep_layers", 1, "num_local_experts", 3), ""),
    "partitions": ("zero3", OPTIM, put(OPTIMIZER, "ds_zero_partition_groups", 0, {"partition_count": 0}), ""),
    "wrong partitions": ("zero3", OPTIM, put(OPTIMIZER, "partition_count", 4), ""),
    "optimizer step": ("zero3", OPTIM, put(*STEP_OF, torch.zeros(3)), ""),
    "mixed optimizer steps": ("zero3", OPTIM, put(*STEP_OF, torch.tensor(4.0)), ""),
    "optimizer ahead": ("zero3", "*_optim_states.pt", put(*STEP_OF, torch.tensor(7.0)), "7 steps and the job 1"),
    "paddings": ("zero1", OPTIM, put(OPTIMIZER, "param_alignment_paddings", 0, [4]), ""),
}


@pytest.mark.parametrize(("kind", "files", "change", "named"), WRONG_METADATA.values(), ids=list(WRONG_METADATA))
def test_wrong_metadata(source: Path, tmp_path: Path, kind: str, files: str, change: Change, named: str) -> None:
    for path in source.glob(files):
        rewrite(path, change)
    refused(source, tmp_path / "model", named or files)


def flip_master(step: Path) -> None:
    tensor = read_archive(step / OPTIM)[OPTIMIZER]["fp32_flat_groups"][0]
    flip(step / OPTIM, tensor.storage.offset_bytes + 1)


def flip_moment(step: Path) -> None:
    """A byte that no weight needs, under a manifest: found by ``verify`` alone."""
    manifest(step)
    moment = read_archive(step / OPTIM)[OPTIMIZER][OPTIMIZER]["state"][0]["exp_avg"]
    flip(step / OPTIM, moment.storage.offset_bytes + 8)
    convert_checkpoint(step, step.parent / "whole", base_model=base())
    shutil.rmtree(step.parent / "whole")


def nothing(step: Path) -> None:
    pass


def with_manifest(then: Callable[[Path], object] = nothing, **changes: Any) -> Callable[[Path], object]:
    return lambda step: (manifest(step, **changes), then(step))


ENTRY = {"bytes": 1, "sha256": ""}
SNAPSHOT = "/old/hub/models--org--name/snapshots/1"
# id: (what is done to a ZeRO-3 checkpoint, part of the line, options of the conversion)
FAULTS: dict[str, tuple[Callable[[Path], object], str, dict[str, Any]]] = {
    "no optimizer file, manifest": (with_manifest(lambda step: (step / OPTIM).unlink()), OPTIM, {}),
    "master": (flip_master, OPTIM, {"verify": True}),
    "pickle": (lambda step: flip(step / MODEL, (step / MODEL).read_bytes().index(b"0.19.8") + 2), MODEL, {}),
    "moment": (flip_moment, OPTIM, {"verify": True}),
    "manifest step": (with_manifest(step=9), "manifest.json", {}),
    "manifest size": (with_manifest(lambda step: (step / MODEL).open("ab").write(b"x")), MODEL, {}),
    "manifest files": (with_manifest(files=[1]), "manifest.json", {}),
    "manifest outside": (with_manifest(files={"../../etc/passwd": ENTRY}), "no name of a file", {}),
    "manifest model": (with_manifest(model=[]), "say which model", {"base_model": None}),
    "moved cache": (with_manifest(model={"path": SNAPSHOT}),
                    "org/name@1, is no longer in this cache of the hub", {"base_model": None}),
    "manifest NaN": (lambda step: (step / "manifest.json").write_text('{"files": NaN}'), "NaN", {}),
    "universal": (lambda step: (step / "zero").mkdir(), "a DeepSpeed universal folder", {}),
    "type": (nothing, "int3", {"dtype": "int3"}),
    "size": (nothing, "apples", {"max_shard_size": "5 apples"}),
    "no base model": (nothing, "--base-model", {"base_model": None}),
    "not empty": (lambda step: (step.parent / "model").mkdir() or (step.parent / "model/x").write_text("mine"),
                  "not empty", {}),
}  # fmt: skip


@pytest.mark.parametrize(("act", "named", "options"), FAULTS.values(), ids=list(FAULTS))
def test_fault(
    source: Path, tmp_path: Path, act: Callable[[Path], object], named: str, options: dict[str, Any]
) -> None:
    act(source)
    before = tree(tmp_path)
    refused(source, tmp_path / "model", named, **options)
    assert tree(tmp_path) == before


def test_configuration_of_no_model(source: Path, tmp_path: Path) -> None:
    shutil.copytree(base(), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": -1}))
    refused(source, tmp_path / "model", "config.json", base_model=tmp_path / "base")


def text(value: str) -> bytes:
    return b"X" + len(value.encode()).to_bytes(4, "little") + value.encode()


def tensor(key: str = "0", numel: int = 6) -> bytes:
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + bytes([75, numel]) + b"tQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x00K\x06\x85K\x01\x85\x89}tR"


HOSTILE: dict[str, bytes] = {  # pickles that no writer leaves
    "os.system": b"cposix\nsystem\n" + text("touch payload_ran") + b"\x85R",
    "getattr": b"c__builtin__\ngetattr\n" + b"ctorch\nTensor\n" + text("__init__") + b"\x86R",
    "a function of ours": b"ctrace_ds.run.files\nwrite_text\n" + text("payload_ran") + text("x") + b"\x86R",
    "a record outside": tensor(key="../../../../etc/passwd"),
    "a storage beyond the file": tensor(numel=255),
    "no end": b"]" * 10,
}


def forge(path: Path, pickle: bytes) -> None:
    """The archive with another pickle, checksums and all."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, pickle if name.endswith("data.pkl") else data)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Every reader refuses it in one line, and nothing in it runs."""
    monkeypatch.chdir(tmp_path)
    step = tmp_path / "checkpoint"
    step.mkdir()
    torch.save({"weight": torch.arange(6.0)}, step / ZERO3)
    forge(step / ZERO3, b"\x80\x02" + HOSTILE[name] + b"." * (name != "no end"))
    for read in (read_archive, serialization.load_shard):
        with pytest.raises(UserError, match=r"refused|not a whole torch checkpoint file"):
            read(step / ZERO3)
    refused(step, tmp_path / "model", ZERO3, base_model=None)
    assert not (tmp_path / "payload_ran").exists()


def test_states_pickled_by_name_are_read(tmp_path: Path) -> None:
    """What Python 3.11.2 left of DeepSpeed's enum, and what others did; objects are their fields."""
    path = tmp_path / "state.pt"
    name = b"cdeepspeed.runtime.zero.config\nZeroStageEnum\n"
    scaler = b"cdeepspeed.runtime.fp16.loss_scaler\nLossScaler\n)\x81}" + text("cur_scale") + b"K\x01sb"
    for member in (b"c__builtin__\ngetattr\n" + name + text("weights") + b"\x86R", name + b"K\x03\x85R"):
        torch.save({}, path)
        forge(path, b"\x80\x02}" + text("zero_stage") + member + b"s" + text("loss_scaler") + scaler + b"s.")
        assert read_archive(path) == {"zero_stage": 3, "loss_scaler": {"cur_scale": 1}}
        assert serialization.load_shard(path)["zero_stage"] == 3


def test_reading_allocates_no_tensor(tmp_path: Path) -> None:
    """A file of a gigabyte (of which nothing is on the disk) is opened in less memory than it would take."""
    path = tmp_path / "large.pt"
    with torch.serialization.skip_data():
        torch.save({"weight": torch.empty(1 << 28)}, path)
    with a_gigabyte_more():
        (weight,) = read_archive(path).values()
    assert (weight.shape, weight.storage.numel) == ((1 << 28,), 1 << 28)


@pytest.mark.parametrize(
    ("value", "dtype", "warning"),
    [("nan", "same", "holds NaN"), ("1e30", "fp16", "overflows in the target type")],
)
def test_what_is_not_finite_is_a_warning_that_names_the_tensors(
    source: Path, tmp_path: Path, value: str, dtype: str, warning: str
) -> None:
    rewrite(source / OPTIM, lambda state: state[OPTIMIZER]["fp32_flat_groups"][0].data.__setitem__(3, float(value)))
    report = convert_checkpoint(source, tmp_path / "model", base_model=base(), dtype=dtype)
    assert report["warnings"] == [f"model.embed_tokens.weight {warning}"]
    assert warning in (tmp_path / "model" / "README.md").read_text()


def test_a_checkpoint_without_all_moments_is_not_gone_on_from(source: Path, tmp_path: Path) -> None:
    for path in source.glob("*_optim_states.pt"):
        rewrite(path, lambda state: state[OPTIMIZER][OPTIMIZER]["state"][0].pop("exp_avg_sq"))
    with pytest.raises(UserError, match="has no exp_avg_sq"):
        write_universal(open_source(source), tmp_path)


def test_what_transformers_does_not_load_is_left_out(tmp_path: Path) -> None:
    """DeepSeek-V3's directory on the hub: a layer for multi-token prediction, quantisation, and code of its own."""
    base_model("deepseek_v3").save_pretrained(tmp_path / "base")
    original = load_file(tmp_path / "base" / "model.safetensors")
    more = {f"model.layers.61.{name}.weight": torch.ones(3) for name in ("embed_tokens", "eh_proj")}
    save_file(original | more, tmp_path / "base" / "model.safetensors")
    left_out = {"quantization_config": {"quant_method": "fp8"}, "auto_map": {"AutoModel": "modeling_x.X"}}
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | left_out))
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps({"a": 1, "auto_map": {"AutoTokenizer": "x.X"}}))
    report = convert_checkpoint(tmp_path / "base", tmp_path / "model")
    converted = load_file(tmp_path / "model" / "model.safetensors")
    assert converted.keys() == original.keys()
    assert all(torch.equal(converted[name], original[name]) for name in original)
    assert "model.layers.61.eh_proj.weight" in report["notes"][0]
    assert not left_out.keys() & json.loads((tmp_path / "model" / "config.json").read_text()).keys()
    assert json.loads((tmp_path / "model" / "tokenizer_config.json").read_text()) == {"a": 1}


def test_another_model(source: Path, tmp_path: Path) -> None:
    base_model("olmoe").save_pretrained(tmp_path / "olmoe")
    refused(source, tmp_path / "model", "not of this model", base_model=tmp_path / "olmoe")


def test_the_trainers_folder_is_a_checkpoint_and_not_a_model(source: Path, tmp_path: Path) -> None:
    """transformers' Trainer puts DeepSpeed's checkpoint beside a model of rounded weights: the masters count."""
    trainer = Path(shutil.copytree(base(), tmp_path / "trainer"))
    shutil.move(source, trainer / "global_step1")
    (trainer / "latest").write_text("global_step1")
    report = convert_checkpoint(trainer, tmp_path / "model", dtype="fp32")
    assert (report["source"]["kind"], report["source"]["step"]) == ("zero3", 1)
    original, converted = (load_file(folder / "model.safetensors") for folder in (base(), tmp_path / "model"))
    assert any(not torch.equal(converted[name], converted[name].to(torch.bfloat16).float()) for name in converted)
    assert converted.keys() == original.keys()
    for place in (tmp_path, trainer):  # the folder by its name is the same source
        assert open_source(place, trainer.name).path == open_source(trainer).path == trainer / "global_step1"


def test_no_space_left(source: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for a full disk (the same path in the code, and it needs no mount)."""
    with limit(resource.RLIMIT_FSIZE, 4096):
        refused(source, tmp_path / "model", "cannot hold the result")


def test_a_killed_conversion_leaves_nothing_that_looks_like_a_model(source: Path, tmp_path: Path) -> None:
    """The temporary directory of a process that is gone is cleared away by the next conversion."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here, gone = socket.gethostname(), f"{dead.pid}-0123abcd"
    names = [f"model.tmp-{here}-{gone}", f"model.tmp-another-node-{gone}", f"model.tmp-{here}-{os.getpid()}-0123abcd"]
    for name in names:
        (tmp_path / name).mkdir()
    convert_checkpoint(source, tmp_path / "model", base_model=base())
    # a process of another node cannot be seen from here: its directory may be a conversion that still runs
    assert [(tmp_path / name).exists() for name in names] == [False, True, True]
    assert (tmp_path / "model" / "conversion.json").is_file()


def test_two_conversions_to_the_same_place(source: Path, tmp_path: Path) -> None:
    """The one that ends last is refused at its rename, and what the first one wrote stays."""
    first: list[dict[str, bytes]] = []

    def other(done_bytes: int, total_bytes: int) -> None:
        if not first:
            convert_checkpoint(source, tmp_path / "model", base_model=base(), dtype="fp32")
            first.append(tree(tmp_path / "model"))

    with pytest.raises(UserError, match="not empty"):
        convert_checkpoint(source, tmp_path / "model", base_model=base(), progress=other)
    assert tree(tmp_path / "model") == first[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", source.name]
