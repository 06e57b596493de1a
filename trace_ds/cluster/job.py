"""What the cost model needs to know of a run: the cluster, and the configuration resolved for one model on it.

A cluster's defaults are nodes of eight H100 SXM GPUs (NVIDIA's data sheet: 80 GB, 989 TFLOP/s dense bf16); that of host
memory is a placeholder. GB = 1e9 bytes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trace_ds.cluster.architecture import Architecture
from trace_ds.config.schema import Config
from trace_ds.config.sections.training import FinetuneSettings
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.errors import UserError
from trace_ds.tensors.model_files import read_json_object
from trace_ds.unlearning.needs import FrozenNeeds, layers_held, micro_batches_together

GB = 1e9
DTYPE_BYTES = {"bf16": 2, "fp32": 4}
BYTES_PER_TOKEN = 4  # of English text; for the length of `collect` before the corpora are tokenised


def ceil_div(total: int, parts: int) -> int:
    """``total / parts``, rounded up."""
    return -(-total // parts)


@dataclass(frozen=True)
class ClusterSpec:
    """The nodes of a cluster and their GPUs; see the module's docstring for the defaults.

    Attributes:
        gpu_memory_gb: memory of one GPU; ``reserved_gb`` of it is taken by the CUDA context, NCCL and
            fragmentation.
        tflops: dense bf16 peak of one GPU.
        host_memory_gb: of one node.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    gpu_memory_gb: float = 80.0
    tflops: float = 989.0
    host_memory_gb: float = 1000.0
    reserved_gb: float = 5.0

    @property
    def world(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of one GPU that tensors may fill."""
        return max(self.gpu_memory_gb - self.reserved_gb, 0.0) * GB


@dataclass(frozen=True)
class ZeroSettings:
    """The keys of a DeepSpeed configuration that decide memory, with DeepSpeed 0.19.8's defaults; None: chosen by the
    model (models/engine.py:stage3_limits)."""

    stage: int = 3
    reduce_bucket_size: int = 500_000_000
    stage3_prefetch_bucket_size: int | None = None
    stage3_max_live_parameters: int | None = None
    stage3_max_reuse_distance: int | None = None
    sub_group_size: int = 1_000_000_000
    offload_optimizer: bool = False
    offload_param: bool = False

    @classmethod
    def of(cls, stage: int, section: Mapping[str, Any]) -> ZeroSettings:
        """Those of a ``zero_optimization`` section (``"auto"`` counts as the default)."""
        values: dict[str, Any] = {}
        for name, value in section.items():
            if name.startswith("offload_"):
                values[name] = (value or {}).get("device") not in (None, "none")
            elif isinstance(value, int | float) and not isinstance(value, bool):
                values[name] = int(value)
        names = {entry.name for entry in fields(cls)} - {"stage"}
        return cls(stage, **{name: value for name, value in values.items() if name in names})


@dataclass(frozen=True)
class Passes:
    """What one step of ``unlearn`` or ``finetune`` runs, in decoder layers from the first one on.

    Attributes:
        layers: of the trained model.
        head: whether logits are made.
        frozen_layers: of the frozen copy (and what is below and above them); 0: there is none.
        frozen_stays: False: it is gone before the first step (norms of hidden states are measured with it).
        frozen_head: whether every rank keeps the copy's LM head whole.
        frozen_share: share of the rows that also go through the copy.
        frozen_together: micro-batches that do so in one pass.
    """

    layers: int
    head: bool = True
    frozen_layers: int = 0
    frozen_stays: bool = False
    frozen_head: bool = False
    frozen_share: float = 0.0
    frozen_together: int = 1


@dataclass(frozen=True)
class PlannedJob:
    """A run, or a variant of it, on a cluster: what the cost model reads of the configuration, for one model.

    ``settings`` is the section of its training job; ``ep`` and ``zero`` are the configuration's own, or those of
    another choice that is weighed against it.
    """

    a: Architecture
    spec: ClusterSpec
    config: Config
    settings: UnlearningConfig | FinetuneSettings
    ep: int
    zero: ZeroSettings

    @classmethod
    def of(
        cls, a: Architecture, spec: ClusterSpec, config: Config, settings: FinetuneSettings | None = None
    ) -> PlannedJob:
        """The job as configured (without ``settings``: of ``unlearn``); UserError for a DeepSpeed file that cannot be
        read."""
        section = settings or config.unlearning
        ds_config = (
            read_json_object(Path(section.ds_config), "the DeepSpeed configuration") if section.ds_config else {}
        )
        zero = ZeroSettings.of(section.zero_stage, ds_config.get("zero_optimization") or {})
        return cls(a, spec, config, section, config.distributed.ep, zero)

    @property
    def b(self) -> int:
        return DTYPE_BYTES[self.config.model.dtype]

    @functools.cached_property
    def kept(self) -> Architecture:
        """What the job loads, trains and saves of the model."""
        if isinstance(self.settings, FinetuneSettings):
            return self.a
        layers = layers_held(self.settings, self.a.layers)
        return self.a if layers is None else self.a.loaded(layers)

    @property
    def context(self) -> int:
        return self.config.data.context_length

    @property
    def rows_per_step(self) -> tuple[int, ...]:
        """Rows of a step over all GPUs, of each side: forget and retain, or those of a fine-tuning alone."""
        if isinstance(self.settings, FinetuneSettings):
            return (self.settings.batch_rows,)
        return self.settings.forget_rows, self.settings.retain_rows

    def passes(self) -> Passes:
        """What a step runs, of the trained model and of the frozen copy."""
        settings, layers = self.settings, self.a.layers
        if isinstance(settings, FinetuneSettings):
            return Passes(layers)
        needs = FrozenNeeds.of(settings, layers)
        last = settings.last_layer(layers)
        forget_rows, retain_rows = self._rows()
        seen = forget_rows * needs.forget + retain_rows * needs.retain
        return Passes(
            layers=min(last + 1, layers) if last is not None else layers,
            head=last is None,
            frozen_layers=needs.layers if needs.stays or needs.norms else 0,
            frozen_stays=needs.stays,
            frozen_head=needs.logits,
            frozen_share=seen / (forget_rows + retain_rows) if needs.stays else 0.0,
            frozen_together=micro_batches_together(forget_rows + retain_rows, seen) if needs.stays else 1,
        )

    def steps(self, corpora: list[str] | None = None) -> int | None:
        """Optimizer steps of the whole job; None: it trains for epochs over corpora that are not on this machine."""
        settings = self.settings
        if settings.steps is not None or not isinstance(settings, FinetuneSettings):
            return settings.steps
        tokens = corpus_tokens(self.config, corpora)
        if tokens is None or settings.epochs is None:
            return None
        return max(math.ceil(settings.epochs * tokens / self.context / settings.batch_rows), 1)

    def micro_batches(self) -> tuple[int, int]:
        """(micro-batches of a step, rows of one: of all sides together), as the training job cuts them."""
        most = max(self._rows())
        count = ceil_div(most, self.settings.micro_batch_rows or most)
        return count, sum(ceil_div(side, count) for side in self._rows())

    def _rows(self) -> tuple[int, ...]:
        """The same of a rank."""
        return tuple(ceil_div(rows, self.spec.world) for rows in self.rows_per_step)


def corpus_tokens(config: Config, sides: Iterable[str] | None = None) -> int | None:
    """Tokens of all corpora, or of ``sides``, estimated from the sizes of their files; None when one is not on this
    machine."""
    from trace_ds.corpora.sources import files_here

    entries = [(entry, f"data.{side}") for side in sides or config.data.sides for entry in config.data.corpus(side)]
    try:
        paths = [path for entry, key in entries for path in files_here(entry, key)]
    except UserError:
        return None
    return sum(path.stat().st_size for path in paths) // BYTES_PER_TOKEN
