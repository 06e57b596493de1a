"""The objective of a job with what it needs from the frozen model, built once before the first step (collective)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trace_ds.config.schema import Config
from trace_ds.models.engine import reference_engine
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.world import World
from trace_ds.unlearning.batches import Batches
from trace_ds.unlearning.loss import RMU, Objective, TokenLoss, hidden_at
from trace_ds.unlearning.objectives import rmu_target


def make_objective(
    config: Config, info: ModelInfo, world: World, batches: Batches, cursor: dict[str, Any]
) -> tuple[Objective, dict[str, Any]]:
    """The objective, and the cursor with the job constants it needs (kept in checkpoints for exact resumption)."""
    settings = config.unlearning
    if settings.forget_loss != "rmu":
        return TokenLoss(settings), cursor
    layer = settings.rmu.layer if settings.rmu.layer is not None else info.decoder_layers // 2
    reference = reference_engine(config, info, world, layers=layer + 1)
    if "rmu_hidden_norm" not in cursor:
        cursor = {**cursor, "rmu_hidden_norm": mean_hidden_norm(reference, layer, world, batches)}
    length = settings.rmu.coefficient * cursor["rmu_hidden_norm"]
    target_D = rmu_target(int(info.config["hidden_size"]), config.seed, length).to(world.device)
    return RMU(layer, target_D, reference, whole=settings.weights == "live"), cursor


def mean_hidden_norm(reference: Any, layer: int, world: World, batches: Batches, steps: int = 4) -> float:
    """Mean Euclidean norm of the frozen hidden states over the forget tokens of the first ``steps`` steps."""
    totals = np.zeros(2)
    for step in range(steps):
        for micro_batch in batches.at(step, world.rank, world.size).micro_batches:
            batch = micro_batch.to(world.device)
            with torch.no_grad():
                hidden_BSD = hidden_at(reference, layer, batch)[: batch.forget_rows]
            norms = hidden_BSD.float().norm(dim=-1)[batch.counted_BS[: batch.forget_rows]]
            totals += [float(norms.double().sum()), len(norms)]
    totals = world.sum_float64(totals)
    return float(totals[0] / totals[1])
