"""Attention sinks: a model whose first token of each document is a thousand times as long as the others."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import processes
import pytest
import torch
from test_forward import Plain
from transformers import AutoModelForCausalLM

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.unlearning import hidden_norms
from trace_ds.unlearning.batches import MicroBatch
from trace_ds.unlearning.forget_retain import ForgetRetain, Frozen
from trace_ds.unlearning.needs import FrozenNeeds

LAYER, ROWS, LENGTH, DOCUMENT = 1, 6, 18, 6
ALONE = SimpleNamespace(rank=0, size=1, device=torch.device("cpu"), sum_float64=lambda x: x, gather=lambda x: [x])


class Steps:
    """Three documents a row; each starts with token 0."""

    def at(self, step: int, rank: int, size: int) -> Any:
        rows = range(rank, ROWS, size)
        return SimpleNamespace(micro_batches=[self.batch(step, [row]) for row in rows if row < ROWS // 2])

    def batch(self, step: int, rows: list[int]) -> MicroBatch:
        """The forget rows ``rows`` and as many retain rows."""
        generator = torch.Generator().manual_seed(step)
        ids = torch.randint(3, 300, (ROWS, LENGTH), generator=generator)
        ids[:, ::DOCUMENT] = 0
        positions = (torch.arange(LENGTH) % DOCUMENT).expand(ROWS, LENGTH)
        counted = positions != DOCUMENT - 1
        chosen = [*rows, *(row + ROWS // 2 for row in rows)]
        weights = torch.ones(len(chosen), LENGTH)
        return MicroBatch(ids[chosen], positions[chosen], counted[chosen], weights, weights, len(rows))


def model_with(tiny_model: Path, factor: float) -> Any:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[0] *= factor  # the residual stream carries it to every layer
    return model


def norms_of(model: Any) -> tuple[np.ndarray, np.ndarray]:
    """(norms of the forget tokens that count, their offsets), from the whole model's own outputs."""
    lengths, offsets = [], []
    for step in range(hidden_norms.MEASURED_STEPS):
        batch = Steps().batch(step, [0, 1, 2])
        out = model(
            input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False, output_hidden_states=True
        )
        counted = batch.counted_BS[: batch.forget_rows]
        lengths.append(out.hidden_states[LAYER + 1][: batch.forget_rows][counted].double().norm(dim=-1))
        offsets.append(batch.position_ids_BS[: batch.forget_rows][counted])
    return torch.cat(lengths).detach().numpy(), torch.cat(offsets).numpy()


def measure(world: Any, path: str, factor: float) -> hidden_norms.HiddenNorms:
    return hidden_norms.measure(Plain(model_with(Path(path), factor)), LAYER, world, Steps())  # type: ignore[arg-type]


def test_the_sink_is_found_and_the_median_does_not_mind_it(tiny_model: Path) -> None:
    result = measure(ALONE, str(tiny_model), 1e5)
    length, offset = norms_of(model_with(tiny_model, 1e5))
    assert result.sinks == (0,)
    assert result.mean == pytest.approx(length.mean(), rel=1e-5)
    assert result.median == pytest.approx(np.sort(length)[(len(length) - 1) // 2], rel=1e-6)
    assert result.longest > 100 * result.median and result.mean > 10 * result.median
    warning = result.warning(LAYER, left_out=True)
    assert "offset 0 of a document" in warning and "left out" in warning
    assert offset[length > 10 * result.median].max() == 0


def test_ranks_measure_what_one_process_does(tiny_model: Path) -> None:
    alone = measure(ALONE, str(tiny_model), 1e5)
    for result in processes.run_distributed(measure, 2, str(tiny_model), 1e5):
        assert result.median == alone.median and result.sinks == alone.sinks and result.longest == alone.longest
        assert result.mean == pytest.approx(alone.mean, rel=1e-6)


@pytest.mark.parametrize("sinks", [(), (0,)])
def test_hidden_losses_leave_sinks_out(tiny_model: Path, sinks: tuple[int, ...]) -> None:
    """Against the sum over the positions written out; the first tokens' gradient comes from later ones alone."""
    settings = UnlearningConfig(forget_loss="rmu", rmu={"layer": LAYER})  # type: ignore[arg-type]
    frozen, model = model_with(tiny_model, 1e5), model_with(tiny_model, 1e5)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight += 0.1
    target, batch = torch.full((32,), 0.5), Steps().batch(0, [0, 1])
    objective = ForgetRetain(settings, FrozenNeeds.of(settings, 3), target, Frozen(Plain(frozen), None), None, sinks)
    losses = objective(Plain(model), batch, *objective.frozen_states([batch]))
    states = [
        net(
            input_ids=batch.input_ids_BS, position_ids=batch.position_ids_BS, use_cache=False, output_hidden_states=True
        )
        .hidden_states[LAYER + 1]
        .detach()
        .double()
        for net in (model, frozen)
    ]
    heard = batch.counted_BS & ~torch.isin(batch.position_ids_BS, torch.tensor(sinks))
    forget = (((states[0] - target) ** 2).mean(-1) * heard)[:2].sum()
    retain = (((states[0] - states[1]) ** 2).mean(-1) * heard)[2:]
    assert float(losses.forget) == pytest.approx(float(forget), rel=1e-5)
    torch.testing.assert_close(losses.retain_RS.double(), retain, rtol=1e-3, atol=1e-6)
    assert bool(losses.retain_RS[:, ::DOCUMENT].any()) == (not sinks)
