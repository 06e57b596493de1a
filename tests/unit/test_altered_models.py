"""Altered model directories, one line a case: each is refused in one line, or read as the safetensors library does."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from command import tree
from forked import JOB, Server
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.models.families import inspect_model
from trace_ds.stages.inspect import inspect
from trace_ds.tensors import model_files
from trace_ds.tensors.model_files import SINGLE_NAME, model_fingerprint, read_safetensors_header

Change = Callable[[Path], object]  # of a copy of the tiny model
GATE = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
HEAD = "lm_head.weight"
OUTSIDE = "secret.txt"  # beside the model


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    (tmp_path / OUTSIDE).write_text("a secret")
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def entry(begin: int, end: int, *, dtype: str = "F32", shape: Any = (2,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# id: (header, bytes of data): the library decides which of them are files
HEADERS: dict[str, tuple[Any, int]] = {
    "whole": ({"a": entry(0, 8), "b": entry(8, 16), "__metadata__": {"format": "pt"}}, 16),
    "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, 12),
    "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, 20),
    "long": ({"a": entry(0, 8)}, 9),
    "short": ({"a": entry(0, 8)}, 7),
    "type": ({"a": entry(0, 8, dtype="F99")}, 8),
    "metadata": ({"a": entry(0, 8), "__metadata__": {"a": 1}}, 8),
    "deep": (b"[" * 100_000, 0),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_refused_where_the_library_refuses_it(tmp_path: Path, name: str) -> None:
    header, nbytes = HEADERS[name]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(nbytes))
    try:
        with safe_open(path, framework="np") as actual:
            expected = {key: tuple(actual.get_slice(key).get_shape()) for key in actual.keys()}  # noqa: SIM118
    except SafetensorError:
        with pytest.raises(UserError, match=r"x\.safetensors"):
            read_safetensors_header(path)
    else:
        assert name == "whole"
        assert {key: value.shape for key, value in read_safetensors_header(path).items()} == expected


def write(name: str, content: object = "") -> Change:
    def act(model: Path) -> None:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return act


def configured(**values: Any) -> Change:
    def act(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | values))

    return act


def stored(change: Callable[[dict[str, np.ndarray[Any, Any]]], object]) -> Change:
    def act(model: Path) -> None:
        tensors = load_file(model / SINGLE_NAME)
        change(tensors)
        save_file(tensors, model / SINGLE_NAME)

    return act


def as_int(name: str, dtype: type) -> Change:
    return stored(lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))


def packed(*names: str, dtype: type = np.uint8) -> Change:
    """The head in parts under other names, as quantisers store it."""

    def change(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
        del tensors[HEAD]
        tensors.update({f"lm_head.{name}": np.ones((4, 4), dtype) for name in names})

    return stored(change)


def both(*changes: Change) -> Change:
    return lambda model: [change(model) for change in changes]


def only(*names: str) -> Change:
    return lambda model: [path.unlink() for path in model.iterdir() if path.name not in names]


def quantised(method: str, **more: Any) -> Change:
    return configured(quantization_config={"quant_method": method, **more})


# id: (change, what the line says it is, what it says to do)
KINDS: dict[str, tuple[Change, str, str]] = {
    "adapter": (both(only(), write("adapter_config.json", {})), "PEFT adapter", "merge_and_unload"),
    "adapter beside a model": (write("adapter_config.json", {}), "PEFT adapter", "merge_and_unload"),
    "FSDP below": (write("pytorch_model_fsdp_0/.metadata"), "checkpoint of FSDP", "merge-weights"),
    "FSDP": (both(only(), write(".metadata")), "checkpoint of FSDP", "merge-weights"),
    "FSDP, one file": (both(only(), write("pytorch_model_fsdp.bin")), "checkpoint of FSDP", "merge-weights"),
    "GGUF": (both(only("config.json"), write("model-Q4_K.gguf")), "GGUF", "gguf_file"),
    "GPTQ": (both(quantised("gptq"), packed("qweight", dtype=np.int32)), "quantised (gptq)", "quantised from"),
    "AWQ, no word of it": (packed("qweight", "qzeros", dtype=np.int32), "quantised (lm_head.qweight", "quantised from"),
    "bitsandbytes": (both(quantised("bitsandbytes"), packed("weight")), "quantised (bitsandbytes)", "dequantise"),
    "MXFP4": (both(quantised("mxfp4"), packed("blocks", "scales")), "quantised (mxfp4)", "dequantise"),
    "FP8": (both(quantised("fp8"), packed("weight")), "quantised (fp8)", "dequantise"),
    "compressed-tensors": (
        both(quantised("compressed-tensors"), packed("weight_packed", dtype=np.int32)),
        "quantised (compressed-tensors)",
        "quantised from",
    ),
    "MLX": (both(configured(quantization={"bits": 4}), packed("weight")), "quantised (quantization)", "quantised from"),
    "in a part of the configuration": (
        both(configured(text_config={"quantization_config": {"quant_method": "gptq"}}), packed("qweight")),
        "quantised (gptq)",
        "quantised from",
    ),
    "int8 without scales": (as_int(HEAD, np.int8), f"quantised ({HEAD} is stored as I8)", "quantised from"),
    "a norm in integers": (as_int("model.norm.weight", np.int64), "model.norm.weight is stored as I64", ""),
}


def message(run: Callable[[], object]) -> str:
    with pytest.raises(UserError) as error:
        run()
    return f"{error.value.line()} {error.value.fix}"


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_plain_model_is_named(model: Path, tmp_path: Path, name: str) -> None:
    change, label, fix = KINDS[name]
    change(model)
    before = tree(tmp_path)
    for read in (lambda: inspect_model(model), lambda: convert_checkpoint(model, tmp_path / "out")):
        said = message(read)
        assert label in said and fix in said
    try:
        said = inspect(model).problems[0]
    except UserError as error:
        said = error.line()
    assert label in said and tree(tmp_path) == before


def test_every_verb_says_the_same(model: Path, tmp_path: Path, server: Server) -> None:
    change, label, fix = KINDS["adapter beside a model"]
    config = str(tiny.write_config(tmp_path, model))
    change(model)
    before = tree(tmp_path)
    at = ["--run-dir", str(tmp_path / "run")]
    for verb in (
        ["plan", config],
        ["submit", config, *at, "--nodes", "1"],
        ["doctor", config, "--json"],
        ["run", config, *at],
    ):
        result = server.run(verb, tmp_path, **JOB)
        said = result.stdout + result.stderr
        assert result.returncode == (1 if verb[0] == "doctor" else 2), result
        assert label in said and fix in said and "Traceback" not in said, result
    assert tree(tmp_path) == before


def linked(name: str, target: str) -> Change:
    def act(model: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return act


def reverse(tensors: dict[str, np.ndarray[Any, Any]]) -> None:
    for name in tensors:
        tensors[name] = np.ascontiguousarray(tensors[name][..., ::-1])


def overlapping(model: Path) -> None:
    """The entries of two tensors of one size point at the same bytes, and nobody's are left in the middle."""
    raw = (model / SINGLE_NAME).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    names = sorted(name for name in header if name.endswith("q_proj.weight"))
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    (model / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


# id: (change, part of the line that refuses it; None: it is another model, converted as the library reads it)
ALTERED: dict[str, tuple[Change, str | None]] = {
    "other values": (stored(reverse), None),
    "dequantised, and config.json not": (quantised("fp8"), None),
    "overlap": (overlapping, "invalid offset"),
    "another type": (
        stored(lambda tensors: tensors.update({EXPERT: tensors[EXPERT].astype(np.float16)})),
        "layers.1.mlp.experts.gate_up_proj cannot be made",
    ),
    "missing tensor": (stored(lambda tensors: tensors.pop(GATE)), f"{GATE} is missing"),
    "shape": (stored(lambda tensors: tensors.update({GATE: tensors[GATE].T.copy()})), f"{GATE} has shape"),
    "link inside": (both(write("real.txt", "#"), linked("merges.txt", "real.txt")), None),
    "link to a file": (linked("merges.txt", f"../{OUTSIDE}"), "merges.txt is a link that leaves"),
    "weights linked": (
        lambda model: (shutil.move(model / SINGLE_NAME, model.parent / "w"), linked(SINGLE_NAME, "../w")(model)),
        None,
    ),
    "configuration of another": (configured(num_local_experts=3), "experts"),
}


@pytest.mark.parametrize("name", ALTERED)
def test_an_altered_model_is_refused_or_converted_exactly(model: Path, tmp_path: Path, name: str) -> None:
    change, words = ALTERED[name]
    change(model)
    if words is not None:
        assert words in message(lambda: convert_checkpoint(model, tmp_path / "out"))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]
        return
    convert_checkpoint(model, tmp_path / "out")
    expected, actual = (load_file(path / SINGLE_NAME) for path in (model, tmp_path / "out"))
    assert actual.keys() == expected.keys() and all(
        np.array_equal(actual[key], value) for key, value in expected.items()
    )
    assert "a secret" not in "".join(map(str, tree(tmp_path / "out").values()))


def test_a_model_in_the_hubs_cache_is_converted_with_its_blobs(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--org--name"
    for folder in ("blobs", "snapshots/0123"):
        (cache / folder).mkdir(parents=True)
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.move(path, cache / "blobs" / str(number))
        (cache / "snapshots/0123" / path.name).symlink_to(f"../../blobs/{number}")
    convert_checkpoint(cache / "snapshots/0123", tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_change_of_one_small_tensor_is_another_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One element of a router or norm, wherever it lies among large tensors: a sample of blocks does not see it."""
    tiny.make_model(tmp_path / "model")
    path = tmp_path / "model" / SINGLE_NAME
    tensors = load_file(path)
    filler = {f"model.filler.{number}.weight": np.zeros((1 << 18, 16), np.float32) for number in range(2)}
    monkeypatch.setattr(model_files, "FINGERPRINT_WHOLE_BYTES", 1 << 20)
    save_file(tensors | filler, path)
    before = model_fingerprint(tmp_path / "model")
    result = read_safetensors_header(path)
    for name in [name for name in tensors if "norm" in name or "gate" in name]:
        with path.open("r+b") as file:
            file.seek(result[name].end - 1)
            byte = file.read(1)[0]
            file.seek(result[name].end - 1)
            file.write(bytes([byte ^ 1]))
            file.flush()
            assert model_fingerprint(tmp_path / "model") != before, name
            file.seek(result[name].end - 1)
            file.write(bytes([byte]))
    assert model_fingerprint(tmp_path / "model") == before
