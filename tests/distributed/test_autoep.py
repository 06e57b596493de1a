"""The shim for AutoEP under transformers 5.23 and newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import run_distributed

from trace_ds.models import autoep
from trace_ds.models.families import inspect_model


def passes(world: Any, path: str) -> list[tuple[Any, bool]]:
    """Of the engine that counts and the one that trains: the logits, and whether the routers' are among the outputs."""
    import torch

    from trace_ds.config.sections.training import TrainingConfig
    from trace_ds.models.engine import inference_engine
    from trace_ds.unlearning.trainer import training_engine

    results = []
    shape: dict[str, Any] = {"dtype": "fp32", "ep": 2}
    info = inspect_model(path)
    for engine in (inference_engine(info, world, **shape), training_engine(TrainingConfig(), info, world, 1, **shape)):
        layers = [module for module in engine.module.modules() if type(module).__name__ == autoep.AUTOEP_LAYER]
        with torch.no_grad():
            requested = engine.module(torch.arange(3, 35).view(2, 16), output_router_logits=True)
        recorded = requested.router_logits is not None and len(requested.router_logits) == len(layers)
        results.append((requested.logits.numpy(), recorded))
        engine.destroy()
    return results


@pytest.mark.slow
def test_the_routers_logits_reach_the_outputs_of_every_engine(tiny_model: Path) -> None:
    for (counted, _), (trained, recorded) in run_distributed(passes, 2, str(tiny_model)):
        assert recorded
        np.testing.assert_allclose(trained, counted, atol=1e-6)
