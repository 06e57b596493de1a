"""What the cost model needs to know of a run: its configuration, resolved for one model and one cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import Architecture
from trace_ds.cluster.spec import ClusterSpec
from trace_ds.config.schema import Config

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
BYTES_PER_TOKEN = 4  # of English text; for the length of `collect` before the corpora are tokenised


def ceil_div(total: int, parts: int) -> int:
    """``total / parts``, rounded up."""
    return -(-total // parts)


@dataclass(frozen=True)
class Job:
    """What of the configuration the cost model needs, resolved for one model and cluster."""

    a: Architecture
    spec: ClusterSpec
    config: Config
    ds_config: Mapping[str, Any]

    @property
    def b(self) -> int:
        return DTYPE_BYTES[self.config.model.dtype]

    @property
    def context(self) -> int:
        return self.config.data.context_length

    @property
    def rmu_layers(self) -> int | None:
        """Decoder layers of an RMU step (its layer and all below); None when a loss needs logits."""
        settings = self.config.unlearning
        if settings.forget_loss != "rmu" or settings.retain_term != "hidden_mse":
            return None
        layer = self.a.layers // 2 if settings.rmu.layer is None else settings.rmu.layer
        return min(layer + 1, self.a.layers)

    def micro_batches(self) -> tuple[int, int]:
        """(micro-batches of a step, rows of one: forget and retain rows together), as the training job cuts them."""
        settings = self.config.unlearning
        sides = [ceil_div(n, self.spec.world) for n in (settings.forget_rows, settings.retain_rows)]
        count = ceil_div(max(sides), settings.micro_batch_rows or max(sides))
        return count, sum(ceil_div(side, count) for side in sides)

    def zero(self, stage: int) -> memory.ZeroSettings:
        return memory.zero_settings(stage, self.ds_config)


def corpus_tokens(config: Config) -> int | None:
    """Tokens of both corpora, estimated from the sizes of their files; None when one is not there."""
    paths = [Path(file.path) for file in (*config.data.forget, *config.data.retain)]
    if not all(path.is_file() for path in paths):
        return None
    return sum(path.stat().st_size for path in paths) // BYTES_PER_TOKEN
