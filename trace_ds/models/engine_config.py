"""Read, check and merge the DeepSpeed configuration file that a user may add (no heavy imports)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trace_ds.errors import UserError
from trace_ds.run.foreign import read_object

# Keys that follow from the run's own configuration: from a file they would win over it, and manifests would be wrong.
OWN_KEYS = (
    "expert_parallel",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "zero_optimization.stage",
)

# More ranks than this sum their gradients in fp32. A ring all-reduce rounds once per rank, which in bf16 gives an error
# of .5 % of the gradient with 16 ranks, 1 % with 64, 2 % with 256, and a third with 1,024 (simulated; bf16 gradients
# themselves have an error of .2 %).
RANKS_SUMMED_IN_BF16 = 64


def user_ds_config(path: str | None) -> dict[str, Any]:
    """The DeepSpeed keys a user adds from a JSON file; :class:`UserError` when it cannot be read."""
    if path is None:
        return {}
    value = read_object(Path(path), "the DeepSpeed configuration", "correct the file")
    zero = value.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise UserError("zero_optimization is not a JSON object", path, "correct the file")
    for key in OWN_KEYS:
        if key in value or key in (f"zero_optimization.{inner}" for inner in zero):
            raise UserError(f"the key {key!r} is set by the run's own configuration", path, "remove it from the file")
    return value


def parameter_offload(ds_config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that offload parameters from the GPU, if any."""
    zero = {key: value for key, value in ds_config.get("zero_optimization", {}).items() if key == "offload_param"}
    return {"zero_optimization": zero, **{key: ds_config[key] for key in ("aio",) if key in ds_config}} if zero else {}


def merge_ds_config(base: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``extra`` on top, sections merged key by key."""
    merged = dict(base)
    for key, value in extra.items():
        old = merged.get(key)
        merged[key] = merge_ds_config(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
