"""What the cost model needs to know of a run: its configuration, resolved for one model and one cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_ds.cluster import memory
from trace_ds.cluster.architecture import Architecture
from trace_ds.cluster.spec import ClusterSpec
from trace_ds.config.load import with_changes
from trace_ds.config.schema import Config
from trace_ds.unlearning.needs import FrozenNeeds

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

    def passes(self) -> memory.Passes:
        """What a step runs, of the trained model and of the frozen copy."""
        settings, layers = self.config.unlearning, self.a.layers
        needs = FrozenNeeds.of(settings, layers)
        last = settings.last_layer(layers)
        forget_rows, retain_rows = self._rows()
        seen = forget_rows * needs.forget + retain_rows * needs.retain
        return memory.Passes(
            layers=min(last + 1, layers) if last is not None else layers,
            head=last is None,
            frozen_layers=needs.layers if needs.stays or needs.norm else 0,
            frozen_stays=needs.stays,
            frozen_head=needs.logits,
            frozen_share=seen / (forget_rows + retain_rows) if needs.stays else 0.0,
        )

    def micro_batches(self) -> tuple[int, int]:
        """(micro-batches of a step, rows of one: forget and retain rows together), as the training job cuts them."""
        most = max(self._rows())
        count = ceil_div(most, self.config.unlearning.micro_batch_rows or most)
        return count, sum(ceil_div(side, count) for side in self._rows())

    def _rows(self) -> tuple[int, int]:
        """Forget and retain rows of a rank in a step."""
        settings = self.config.unlearning
        return ceil_div(settings.forget_rows, self.spec.world), ceil_div(settings.retain_rows, self.spec.world)

    def zero(self, stage: int) -> memory.ZeroSettings:
        return memory.zero_settings(stage, self.ds_config)


def variants_of(config: Config) -> dict[str, Config]:
    """The configuration of each variant: jobs of their own, beside the run's."""
    return {name: with_changes(config, changes, f"variants.{name}") for name, changes in config.variants.items()}


def corpus_tokens(config: Config) -> int | None:
    """Tokens of all corpora, estimated from the sizes of their files; None when one is not there."""
    paths = [Path(file.path) for side in config.data.sides for file in getattr(config.data, side)]
    if not all(path.is_file() for path in paths):
        return None
    return sum(path.stat().st_size for path in paths) // BYTES_PER_TOKEN
