"""What a task measured, item by item: the common form of all kinds of tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """Scores of the items of a task.

    Attributes:
        columns: float64 [I] by name; here the metrics are their means.
        logs: one JSON-ready record per item.
        sources: of each item; empty: nothing is told by source.
    """

    columns: dict[str, np.ndarray]
    logs: list[dict[str, Any]]
    sources: list[str] = field(default_factory=list)

    def metrics(self, chosen_I: np.ndarray | None = None) -> dict[str, float]:
        """Over all items, or over those of a bool mask [I]; ``ValueError`` when there is nothing to measure."""
        if not self.count(chosen_I):
            raise ValueError("a metric over no items")
        return {name: float(np.mean(self.chosen(name, chosen_I))) for name in self.columns}

    def count(self, chosen_I: np.ndarray | None = None) -> int:
        """What the metrics are made of: items."""
        return len(self.chosen(next(iter(self.columns)), chosen_I))

    def chosen(self, name: str, chosen_I: np.ndarray | None) -> np.ndarray:
        """A column at the items of a mask (None: all)."""
        return self.columns[name] if chosen_I is None else self.columns[name][chosen_I]

    def by_source(self) -> dict[str, dict[str, float]]:
        """The finite metrics, and the number of what they are made of, of each source that has any, sorted by name."""
        sources_I, by_name = np.array(self.sources), {}
        for source in map(str, np.unique(sources_I)):
            chosen_I = sources_I == source
            if n := self.count(chosen_I):
                metrics = {name: value for name, value in self.metrics(chosen_I).items() if math.isfinite(value)}
                by_name[source] = {"n": n, **metrics}
        return by_name


def rounded(value: Any) -> float:
    """A score as it stands in a log."""
    return round(float(value), 6)


def item_logs(items: Sequence[Any], columns: dict[str, np.ndarray], **texts: Sequence[Any]) -> list[dict[str, Any]]:
    """A record for each item: its id and source, its own of ``texts``, and its scores."""
    scores = {name: list(map(rounded, values_I)) for name, values_I in columns.items()}
    keys = {"id": [item.id for item in items], "source": [item.source for item in items], **texts, **scores}
    return [dict(zip(keys, row, strict=True)) for row in zip(*keys.values(), strict=True)]
