"""What is ours of AutoEP: its options from a configuration, and the shim for transformers 5.23 and newer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from processes import run_distributed

from trace_ds.config.load import load_config
from trace_ds.errors import UserError
from trace_ds.models import autoep
from trace_ds.models.families import check_expert_parallel, inspect_model


def passes(world: Any, path: str, options: dict[str, Any]) -> list[tuple[set[str], list[Any], bool]]:
    """For the engine that counts and the one that trains, with options and without: how their experts compute, the
    logits, and whether the router's logits are asked of transformers as before."""
    import torch

    from trace_ds.config.sections.training import TrainingConfig
    from trace_ds.models.engine import inference_engine
    from trace_ds.unlearning.trainer import training_engine

    results = []
    for given in ({}, options):
        shape: dict[str, Any] = {"dtype": "fp32", "ep": 2, "options": given}
        info = inspect_model(path)
        for engine in (
            inference_engine(info, world, **shape),
            training_engine(TrainingConfig(), info, world, 1, **shape),
        ):
            layers = [module for module in engine.module.modules() if type(module).__name__ == autoep.AUTOEP_LAYER]
            with torch.no_grad():
                requested = engine.module(torch.arange(3, 35).view(2, 16), output_router_logits=True)
            recorded = requested.router_logits is not None and len(requested.router_logits) == len(layers)
            results.append(({layer.experts.gate_up_impl for layer in layers}, requested.logits.numpy(), recorded))
            engine.destroy()
    return results


@pytest.mark.slow
def test_options_reach_every_engine(tiny_model: Path) -> None:
    """And, with the shim, the logits of AutoEP's routers reach transformers' outputs."""
    for separate, separate_trained, fused, fused_trained in run_distributed(
        passes, 2, str(tiny_model), {"gate_up_impl": "fused"}
    ):
        assert (separate[0], separate_trained[0]) == ({"separate"}, {"separate"})
        assert (fused[0], fused_trained[0]) == ({"fused"}, {"fused"})
        for kind, logits, recorded in (separate_trained, fused, fused_trained):
            assert recorded, kind
            np.testing.assert_allclose(logits, separate[1], atol=1e-6)


def test_recorders_are_read_by_name_and_left_as_they_were(tiny_model: Path) -> None:
    """Where transformers' table has models as keys, AutoEP fails without the shim; when it no longer does, the shim
    (:func:`autoep.readable_recorders`) can go."""
    from deepspeed.module_inject.auto_ep_presets.base import _install_instance_transformers_output_recorders as install
    from transformers import AutoModelForCausalLM
    from transformers.utils import output_capturing

    registry: Any = output_capturing._CAN_RECORD_REGISTRY
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    entries = {
        str(type(model)): {"router_logits": output_capturing.OutputRecorder(type(model.model.layers[0].mlp.gate))}
    }
    before, kind = dict(registry), type(registry)
    if kind is not dict:
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            install(model, entries, output_capturing, lambda model: 0)
    with autoep.readable_recorders():
        assert install(model, entries, output_capturing, lambda model: 0)
        assert registry.get(str(type(model.model)), None) == before[str(type(model.model))]
    assert type(registry) is kind and dict(registry) == before


DEEPEP = {"comm_backend": "deepep", "comm_max_tokens_per_rank": 192}


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (DEEPEP, "comm_backend deepep needs the package deep_ep"),
        ({"comm_backend": "deepep"}, "AutoEP refuses this .comm_max_tokens_per_rank must be a positive integer"),
        ({"gate_up": "fused"}, "AutoEP has no option gate_up"),
        ({"autoep_size": 4}, "AutoEP has no option autoep_size beside"),
        ({"gate_up_impl": "both"}, "AutoEP refuses this"),
        ({"row_weighting_impl": "fused"}, "only runs inside the DeepEP route"),
        ({**DEEPEP, "combine_impl": "fused_weighted_sum"}, "cannot be used with comm_backend"),
        ({"combine_impl": "fused_weighted_sum"}, "combine_impl fused_weighted_sum needs a GPU, and there is none"),
        ({"async_split_plan": True}, "async_split_plan True needs a GPU, and there is none"),
    ],
)
def test_what_cannot_run_is_refused_before_a_weight_is_loaded(
    options: dict[str, Any], problem: str, tiny_model: Path, tmp_path: Path
) -> None:
    changes = ["model.dtype=bf16"]
    changes += [f"distributed.autoep.{key}={str(value).lower()}" for key, value in options.items()]
    config, _ = load_config(str(tiny.write_config(tmp_path, tiny_model)), changes)
    assert config.distributed.autoep == options
    info = inspect_model(tiny_model)
    with pytest.raises(UserError, match=problem):
        check_expert_parallel(info, 2, 2, options=options)
    check_expert_parallel(info, 1, 2, options=options)  # of no effect
