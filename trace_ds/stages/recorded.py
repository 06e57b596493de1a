"""Which keys of a configuration need what ``collect`` records besides the counts of a corpus.

The routing trace of 200,000 rows of 1,024 tokens takes 79 GB on Qwen3-30B-A3B, the selections of its rows 2.4 GB
(docs/method.md, section 8), so the trace is written only where something here asks for it. The row selections of the
retain side and the samples are written in any case; asking for them says who cannot do without.
"""

from __future__ import annotations

from collections.abc import Iterator

from trace_ds.config.load import variants_of
from trace_ds.config.schema import Config
from trace_ds.config.sections.calibration import WITHOUT_TRACE

TRACE, ROW_COUNTS, SAMPLE = "trace", "row_counts", "sample"


def keys_needing(what: str, config: Config, side: str) -> list[str]:
    """The keys that need ``what`` of ``side``, as a person would write them.

    The variants and the study of a configuration, which share its statistics, are asked as well.

    Args:
        what: TRACE, the top-k experts of every token; ROW_COUNTS, the selections of each row; SAMPLE, the top-k
            experts of sampled tokens.
    """
    keys = [key for needed, key in _needs(config, side) if needed == what]
    for name, changed in variants_of(config).items():
        of_variant = [key for needed, key in _needs(changed, side) if needed == what]
        keys += [f"variants.{name} ({key})" for key in of_variant if key not in keys]
    return keys


def _needs(config: Config, side: str) -> Iterator[tuple[str, str]]:
    """(what, key) of the configuration itself."""
    calibration = config.calibration
    if config.unlearning.evaluate.compares_routing:
        yield SAMPLE, "unlearning.evaluate"
    if side == "retain":
        if calibration.rule not in WITHOUT_TRACE and calibration.level == "row":
            yield ROW_COUNTS, "calibration.level: row"
            yield SAMPLE, "calibration.level: row"
        elif calibration.rule not in WITHOUT_TRACE:
            yield TRACE, f"calibration.rule: {calibration.rule}"
        if config.bench is not None:  # its methods may have any rule
            yield TRACE, "bench"
            changes = [*config.bench.methods.values(), *config.bench.losses.values()]
            if any(changed.get("calibration.level") == "row" for changed in changes):
                yield ROW_COUNTS, "bench"
                yield SAMPLE, "bench"
