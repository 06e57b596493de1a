"""``bench``: the study that ``trace-ds bench`` runs."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from trace_ds.config.sections.base import Name, Number, Section, Seed
from trace_ds.errors import listed


class BenchConfig(Section):
    """A study: methods x a grid of strengths x seeds, compared at matched forgetting.

    Every run is one of `trace-ds run`, scored as `unlearning.evaluate` says; the recipe's own values of the grid's keys
    are the strength that all share.
    """

    regime: Literal["standard", "scarce", "absent", "entangled"] | None = Field(
        None, description="Make the demo's inputs of this regime for every seed; null: the recipe names its own."
    )
    seeds: list[Seed] = Field(default_factory=lambda: [0, 1, 2, 3, 4, 5], min_length=2)
    baseline: str = Field("uniform", description="The method all others are compared with.")
    methods: dict[Name, dict[str, Any]] = Field(description="Name -> {dotted.key: value}.", min_length=2)
    grid: dict[str, list[Any]] = Field(
        default_factory=dict, description="Strengths to choose from, in the order of tuning: dotted.key -> values."
    )
    grids: dict[str, dict[str, list[Any]]] = Field(default_factory=dict, description="Other values for a method.")
    margin: Number = Field(
        0.03, ge=0, description="Forgotten: a forget score of at most the gold model's, or chance, plus this."
    )
    forget: str = Field(description="'TASK METRIC' that says what is forgotten (lower is more).")
    utility: list[str] = Field(
        min_length=1,
        description="'TASK METRIC' or 'TASK METRIC SOURCES' (a pattern such as near/*). The first one, where higher is "
        "better, is what strengths are chosen by.",
    )

    @model_validator(mode="after")
    def _names_agree(self) -> BenchConfig:
        if self.baseline not in self.methods:
            raise ValueError(f"the baseline {self.baseline!r} is not among the methods {', '.join(self.methods)}")
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError("seeds holds one number twice")
        for name in self.grids:
            if name not in self.methods:
                raise ValueError(f"grids names {name!r}, which is no method: {listed(self.methods)}")
            for key in self.grids[name]:
                if key not in self.grid:
                    problem = f"grids.{name} has {key}, which grid lacks: it would be run and never tuned"
                    raise ValueError(f"{problem}; grid has {listed(self.grid)}")
        sections = [*self.methods.values(), self.grid, *self.grids.values()]
        for key in {key for section in sections for key in section}:
            if key.split(".")[0] not in ("calibration", "unlearning"):
                raise ValueError(f"a study may not change {key}: only calibration and unlearning")
        return self
