"""Which keys of a configuration need the routing trace.

The trace of 200,000 rows of 1,024 tokens takes 79 GB on Qwen3-30B-A3B, the selections of its rows 2.4 GB
(docs/method.md, section 8), so it is written only where something here asks for it. The row selections of the retain
side and a sample of tokens are written in any case.
"""

from __future__ import annotations

from collections.abc import Iterator

from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config


def keys_needing_trace(config: Config, side: str) -> list[str]:
    """The keys that need the top-k experts of every token of ``side``, as a person would write them, of the
    configuration and of the variants that share its statistics."""
    if side != "retain":
        return []
    keys = list(_keys(config))
    for name, changed in variants_of(config).items():
        keys += [f"variants.{name} ({key})" for key in _keys(changed) if key not in keys]
    return keys


def _keys(config: Config) -> Iterator[str]:
    """Those of the configuration itself."""
    if config.unlearning.apply == "loss" and config.calibration.rule != "uniform":
        yield f"unlearning.apply: loss with calibration.rule: {config.calibration.rule}"
