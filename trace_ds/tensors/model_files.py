"""Read a Hugging Face model directory from ``config.json`` and the safetensors headers alone.

    files = read_model_directory("/models/Mixtral-8x7B-v0.1")
    files.tensors["lm_head.weight"].shape, files.parameters, files.bytes

No torch, and no weight is read, so a 700 B model takes seconds. Files from elsewhere are hostile until proven
otherwise: the safetensors library validates every header, shard names may not leave the directory, pickled weights are
refused, and so are adapters, checkpoints of FSDP, GGUF files and quantised weights.

A safetensors file (huggingface.co/docs/safetensors) is 8 bytes of little-endian header length N, N bytes of JSON
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}`` with offsets relative to byte 8 + N, then the data.
"""

from __future__ import annotations

import collections
import copy
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from trace_ds.errors import UserError
from trace_ds.run.files import canonical_json, once_a_process, sha256_text
from trace_ds.run.foreign import read_object
from trace_ds.run.hub_names import no_directory

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
FINGERPRINT_BLOCKS = 64
FINGERPRINT_BLOCK_BYTES = 1 << 16
FINGERPRINT_WHOLE_BYTES = 1 << 29  # of the smallest tensors: routers and norms of every model there is

# What a model's configuration may count, by key: from 1 (0 for OR_NONE) to far above any model there is.
_LARGEST = {
    "num_hidden_layers": 1 << 10,
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), 1 << 14),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 1 << 16),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "moe_intermediate_size", "head_dim", "v_head_dim"), 1 << 24),
    **dict.fromkeys(("vocab_size", "max_position_embeddings"), 1 << 28),
}
OR_NONE = (
    *("n_shared_experts", "first_k_dense_replace", "decoder_sparse_step", "n_group", "topk_group"),
    *("shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"),
    *("qk_rope_head_dim", "qk_nope_head_dim", "sliding_window"),
)
_LARGEST |= dict.fromkeys(OR_NONE, 1 << 24)
# Values of these keys, at any depth, for which transformers has its own code; others name a repository (or stand for
# one) from which it fetches kernels and runs them.
BUILT_IN = {"attn": ("eager", "sdpa", "flex_attention"), "experts": ("eager", "grouped_mm", "batched_mm")}
IMPLEMENTATION = re.compile(r"_?(attn|experts)_implementation(_internal)?")
COPY_AGAIN = "copy or download the model again"
FLOATS = ("F64", "F32", "F16", "BF16")
QUANTISATION_KEYS = ("quantization_config", "compression_config", "quantization")  # transformers, llm-compressor, MLX


class TensorEntry(NamedTuple):
    """Where a tensor lies: ``begin`` and ``end`` are byte offsets from the start of the file ``file``."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelFiles:
    """A whole model directory.

    Attributes:
        tensors: every tensor of the model by its name on disk, in sorted order.
        files: the names of the safetensors files that hold them, sorted.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, TensorEntry]
    files: tuple[str, ...]

    @property
    def model_type(self) -> str:
        """``model_type`` of the configuration, or an empty string."""
        return str(self.config.get("model_type", ""))

    @property
    def parameters(self) -> int:
        """Elements of all tensors on disk (tied weights are stored once)."""
        return sum(entry.elements for entry in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors on disk, without the headers."""
        return sum(entry.end - entry.begin for entry in self.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """Elements by type, most frequent first."""
        totals = collections.Counter[str]()
        for entry in self.tensors.values():
            totals[entry.dtype] += entry.elements
        return dict(totals.most_common())


def read_json_object(path: Path, label: str) -> dict[str, Any]:
    """Read a model's JSON object, called ``label`` in the :class:`UserError` where there is none."""
    return read_object(path, label, COPY_AGAIN, infinite=True)


def read_model_config(path: str | Path) -> dict[str, Any]:
    """The ``config.json`` of a model directory.

    Raises:
        UserError: the directory or the file is not there; a count in it is none, or beyond any model; a key would
            make transformers fetch and run code (``auto_map`` is only ignored: nothing here trusts remote code).
    """
    directory = Path(path)
    refuse_other_kinds(directory)
    if not directory.is_dir():
        problem = "the model path is a file, not a directory" if directory.is_file() else "there is no model directory"
        raise no_directory(path, problem, "set model.path to a Hugging Face model directory on this machine")
    if not (directory / CONFIG_NAME).is_file():
        fix = "set model.path to a Hugging Face model directory"
        raise UserError(f"the directory has no {CONFIG_NAME}", str(directory), fix)
    config = copy.deepcopy(_read_config(directory / CONFIG_NAME))
    if scheme := quantisation(config):
        files = [path for path in directory.glob("*.safetensors") if path.is_file()]
        entries = [entry for file in files for entry in read_safetensors_header(file).values()]
        if not entries or any(len(entry.shape) > 1 and entry.dtype not in FLOATS for entry in entries):
            raise _quantised(directory, scheme)  # else it was dequantised since, as DeepSeek's own script does it
    return config


def refuse_other_kinds(path: Path) -> None:
    """Raise :class:`UserError` where the names of its files show that ``path`` is no model directory."""
    fsdp = [folder for folder in (path, *path.glob("*_fsdp_*")) if (folder / ".metadata").is_file()]
    fsdp += path.glob("pytorch_model_fsdp*")
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not any(path.glob("*.safetensors"))):
        problem = "this is a GGUF model: weights that llama.cpp reads, usually quantised"
        fix = "use the model it was made from, or load it with from_pretrained(MODEL, gguf_file=FILE) and save that"
    elif (path / "adapter_config.json").is_file():
        problem = "this is a PEFT adapter (adapter_config.json), not a whole model"
        fix = "merge it: AutoPeftModelForCausalLM.from_pretrained(ADAPTER).merge_and_unload().save_pretrained(MODEL)"
    elif fsdp:
        problem = f"this is a checkpoint of FSDP (torch.distributed.checkpoint, {fsdp[0].name}), not a whole model"
        fix = "consolidate it: `accelerate merge-weights CHECKPOINT MODEL`, with config.json and tokenizer beside it"
    else:
        return
    raise UserError(problem, str(path), fix)


def quantisation(config: Mapping[str, Any]) -> str:
    """The quantisation scheme that a model's configuration names; empty: none."""
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key in QUANTISATION_KEYS:
            if value := part.get(key):
                settings = value if isinstance(value, dict) else {}
                return str(settings.get("quant_method") or settings.get("quant_algo") or key)[:40]
    return ""


def _is_packed(name: str, entry: TensorEntry) -> bool:
    """Whether a tensor holds quantised weights: a matrix of small numbers, or integers where the name says weight."""
    if entry.dtype in FLOATS or name.endswith(("bias", "mask")):
        return False
    is_matrix = len(entry.shape) > 1 and entry.dtype not in ("I64", "I32", "BOOL")
    return is_matrix or name.endswith(("weight", "_proj", "_packed"))


def _quantised(path: Path, scheme: str) -> UserError:
    fix = "use the model that it was quantised from, or dequantise it with transformers, in bf16, fp16 or fp32"
    return UserError(f"its weights are quantised ({scheme})", str(path), fix)


@once_a_process
def _read_config(path: Path) -> dict[str, Any]:
    config = read_json_object(path, "the model's configuration")
    try:
        for key, value in _flat(config):
            _check_key(key, value)
    except ValueError as error:
        raise UserError(str(error), str(path), "correct it, or copy the model again") from None
    except RecursionError:
        raise UserError("the model's configuration is nested too deep", str(path), COPY_AGAIN) from None
    return config


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(key, value) of every value at any depth; what a list holds, and what the sections of an implementation hold
    (``{"": "sdpa"}``), goes by the key above."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _flat(item, key if IMPLEMENTATION.fullmatch(key) else name)
    elif isinstance(value, list):
        for item in value:
            yield from _flat(item, key)
    else:
        yield key, value


def _check_key(key: str, value: Any) -> None:
    if (match := IMPLEMENTATION.fullmatch(key)) and value is not None and value not in (own := BUILT_IN[match[1]]):
        raise ValueError(f"{key} {value!r} would make transformers run code from elsewhere (its own: {', '.join(own)})")
    if key == "transformers_weights" and value is not None:
        raise ValueError(f"{key} names other weights ({value!r}) than those that are checked")
    if not isinstance(value, bool | int | float):
        return
    smallest, largest = int(key not in OR_NONE), _LARGEST.get(key)
    if largest is not None and (isinstance(value, bool | float) or not smallest <= value <= largest):
        raise ValueError(f"{key} is {str(value)[:20]}, no whole number from {smallest} to {largest:,}")
    if abs(value) > 1 << 63 and math.isfinite(value):
        raise ValueError(f"{key[:40]} is {str(value)[:20]}, beyond 64 bits")


def read_model_directory(path: str | Path) -> ModelFiles:
    """Read and check a model directory.

    Raises:
        UserError: the directory is missing; no or damaged ``config.json``; no safetensors weights; a shard is missing
            or truncated (named); the index names a tensor that its shard does not hold.
    """
    directory = Path(path)
    config = read_model_config(directory)
    index_path = directory / INDEX_NAME
    if os.path.lexists(index_path):  # also what is no regular file: reading it says so
        placed = _read_index(index_path)
        files = tuple(sorted(set(placed.values())))
    elif (directory / SINGLE_NAME).is_file():
        placed, files = {}, (SINGLE_NAME,)
    elif pickled := sorted([*directory.glob("pytorch_model*.bin"), *directory.glob("*.pth")]):
        problem = f"the model has pickled weights only ({pickled[0].name}), which are never loaded"
        fix = "get the safetensors version, or save it again with safe_serialization=True"
        raise UserError(problem, str(directory), fix)
    else:
        raise UserError(f"the directory has no weights ({SINGLE_NAME} or {INDEX_NAME})", str(directory), COPY_AGAIN)
    missing = [name for name in files if not (directory / name).is_file()]
    if missing:
        more = f" (and {len(missing) - 1} more of {len(files)})" if len(missing) > 1 else f" (1 of {len(files)})"
        raise UserError(f"weight shard {missing[0]} is missing{more}", str(directory), COPY_AGAIN)
    tensors: dict[str, TensorEntry] = {}
    for name in files:
        for tensor, entry in read_safetensors_header(directory / name).items():
            if tensor in tensors:
                problem = f"tensor {tensor} is in two shards, {tensors[tensor].file} and {name}"
                raise UserError(problem, str(directory), COPY_AGAIN)
            tensors[tensor] = entry
    for tensor, name in placed.items():
        if tensor not in tensors or tensors[tensor].file != name:
            raise UserError(f"the index names tensor {tensor}, which {name} does not hold", str(index_path), COPY_AGAIN)
    for tensor, entry in tensors.items():
        if _is_packed(tensor, entry):
            raise _quantised(directory, f"{tensor} is stored as {entry.dtype}")
    return ModelFiles(directory, config, dict(sorted(tensors.items())), files)


@once_a_process
def read_safetensors_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file.

    Raises:
        UserError: the safetensors library refuses it (truncated or too long, tensors that overlap or leave holes, …).
    """
    try:
        with path.open("rb") as handle:
            start = 8 + int.from_bytes(handle.read(8), "little")
            if start > min(MAX_HEADER_BYTES, path.stat().st_size):
                raise ValueError(f"the header claims {start} bytes; truncated, or no safetensors file")
            header = json.loads(handle.read(start - 8))
        with safe_open(path, framework="np"):
            pass
        header.pop("__metadata__", None)
        return {
            name: TensorEntry(
                path.name, entry["dtype"], tuple(entry["shape"]), *(start + n for n in entry["data_offsets"])
            )
            for name, entry in header.items()
        }
    except OSError as error:
        raise UserError(f"the weight file cannot be read ({error.strerror})", str(path), COPY_AGAIN) from None
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"the weight file is truncated or damaged ({str(error)[:200]})"
        raise UserError(problem, str(path), COPY_AGAIN) from None


def _read_index(path: Path) -> dict[str, str]:
    """``weight_map`` of an index: tensor name -> file name in the same directory."""
    placed = read_json_object(path, "the index of the weight shards").get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise UserError("the index of the weight shards has no weight_map", str(path), COPY_AGAIN)
    for tensor, name in placed.items():
        if not isinstance(name, str) or Path(name).name != name:
            raise UserError(f"the index places tensor {tensor} outside the directory ({name!r})", str(path), COPY_AGAIN)
    return placed


def model_fingerprint(model: ModelFiles | str | Path) -> str:
    """SHA-256 that tells models apart without reading a hundred gigabytes.

    Covers the configuration, every tensor's name, type and shape, the smallest tensors whole (routers, norms and
    whatever else fits into :data:`FINGERPRINT_WHOLE_BYTES`), and of each file :data:`FINGERPRINT_BLOCKS` evenly spaced
    blocks of 64 KiB: a sample of the large tensors (training changes every block).
    """
    files = model if isinstance(model, ModelFiles) else read_model_directory(Path(model))
    config = {key: value for key, value in files.config.items() if key not in ("_name_or_path", "transformers_version")}
    tensors = {name: [entry.dtype, list(entry.shape)] for name, entry in files.tensors.items()}
    blocks = {name: sample_sha256(files.path / name) for name in sorted(files.files)}
    facts = {"config": config, "tensors": tensors, "blocks": blocks, "small": _small_sha256(files)}
    return sha256_text(canonical_json(facts))


def _small_sha256(files: ModelFiles) -> str:
    """SHA-256 of the smallest tensors, in the order of the files."""
    by_size = sorted(files.tensors.values(), key=lambda entry: (entry.end - entry.begin, entry.file, entry.begin))
    ends = itertools.accumulate(entry.end - entry.begin for entry in by_size)
    small = [entry for entry, end in zip(by_size, ends, strict=True) if end <= FINGERPRINT_WHOLE_BYTES]
    digest = hashlib.sha256()
    for entry in sorted(small, key=lambda entry: (entry.file, entry.begin)):
        with (files.path / entry.file).open("rb") as handle:
            handle.seek(entry.begin)
            digest.update(handle.read(entry.end - entry.begin))
    return digest.hexdigest()


@once_a_process
def sample_sha256(path: Path) -> str:
    """SHA-256 of a file's size and of :data:`FINGERPRINT_BLOCKS` blocks of it (of the whole, when it is small)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        if size <= FINGERPRINT_BLOCKS * FINGERPRINT_BLOCK_BYTES:
            digest.update(handle.read())
        else:
            for number in range(FINGERPRINT_BLOCKS):
                handle.seek((size - FINGERPRINT_BLOCK_BYTES) * number // (FINGERPRINT_BLOCKS - 1))
                digest.update(handle.read(FINGERPRINT_BLOCK_BYTES))
    return digest.hexdigest()
