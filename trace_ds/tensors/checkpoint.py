"""What every kind of source looks like to the rest: whole tensors under the engine's names, still on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trace_ds.tensors.runs import TensorSource

RANK_FILE = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_(model|optim)_states\.pt$")
MODEL_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt$")
MOMENTS = ("exp_avg", "exp_avg_sq")
EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt$")


@dataclass
class Checkpoint:
    """A source, opened.

    Attributes:
        path: its directory.
        kind: zero3, zero12, expert_parallel or huggingface.
        tensors: parameters and persistent buffers in the best precision there is (fp32 masters if any), whole: all
            partitions and all experts joined. Names are the engine's (AutoEP's ``mlp.experts.w1``), or those on disk
            for a Hugging Face directory.
        moments: the Adam moments ``exp_avg`` and ``exp_avg_sq`` by name of the parameter, where there are any.
        trained: names of the parameters that have an fp32 master, so that they are the optimizer's.
        dtype: bf16, fp16 or fp32, the type that the engine computes in (empty: each tensor's own).
        step, world, ep, zero_stage: of the job that wrote it, as far as its files say.
        family: transformers' ``model_type``; None where no manifest, configuration or report of a conversion says it.
        decoder_layers: how many it holds, from the first on, without norm and LM head: the rest is as in the model that
            the job started from. None: it holds all.
        lacks_frozen: whether frozen parameters may have been left out (``exclude_frozen_parameters``).
        base: fingerprint of that model, where a manifest or report says it.
        layers: AutoEP's metadata of the MoE layers (of rank 0).
        files: the DeepSpeed files that belong to it, relative to ``path``.
        notes: what the user should know (masters missing, for example).
    """

    path: Path
    kind: str
    tensors: dict[str, TensorSource]
    moments: dict[str, dict[str, TensorSource]] = field(default_factory=dict)
    trained: tuple[str, ...] = ()
    dtype: str = ""
    step: int | None = None
    world: int = 1
    ep: int = 1
    zero_stage: int | None = None
    family: str | None = None
    decoder_layers: int | None = None
    lacks_frozen: bool = False
    base: str | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    manifest: dict[str, Any] | None = None
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def distinct(self) -> dict[str, TensorSource]:
        """The tensors without those that are another one again: tied heads, AutoEP's alias of a router."""
        return {n: t for n, t in self.tensors.items() if n not in self.shared and not is_alias(n, self.tensors)}

    def summary(self) -> dict[str, Any]:
        """Facts for reports and ``trace-ds inspect``; JSON-compatible and without paths."""
        named = ("kind", "step", "world", "ep", "zero_stage", "family", "decoder_layers", "base", "dtype")
        sources = self.distinct.values()
        return {
            **{name: getattr(self, name) for name in named},
            "tensors": len(sources),
            "parameters": sum(source.numel for source in sources),
            "bytes": sum(source.numel * source.dtype.itemsize for source in sources),
            "optimizer_states": sorted(self.moments),
            "files": len(self.files),
            "notes": self.notes,
        }


def is_alias(name: str, tensors: Mapping[str, Any]) -> bool:
    """Whether AutoEP holds this tensor of a router a second time under the name of its own router."""
    match = re.match(r"(.+)\.gate\.(gate\.weight|gate\.bias|e_score_correction_bias)$", name)
    return bool(match) and f"{match[1]}.router.{match[2]}" in tensors  # type: ignore[index]


def origin(facts: dict[str, Any]) -> str:
    """What a report says of its source, in words."""
    if facts.get("kind") == "huggingface":
        return "a hub model"
    return f"{facts.get('kind')} (step {facts.get('step')}, world {facts.get('world')}, ep {facts.get('ep')})"
