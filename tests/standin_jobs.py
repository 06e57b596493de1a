"""What runs on the stand-in device, or on a GPU, in a process of its own: each checks itself against the CPU."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import tiny
import torch
from standin_device import DEVICE, Standin

from tools import gpu_acceptance
from trace_ds.routing import collection

Waits = Counter[tuple[str, str]]
WAITS_PER_BATCH, WAITS_PER_STEP = 1, 1
FAULTS = ("cpu_index", "item", "missing_event", "numpy", "cpu_sum")


@contextlib.contextmanager
def device() -> Iterator[tuple[Any, Any]]:
    """(a world of one process on the device, what counts waits on it inside a block)."""
    torch.set_num_threads(1)
    with Standin() as standin:

        @contextlib.contextmanager
        def observe(device: torch.device) -> Iterator[Waits]:
            before, waits = Counter(standin.waits), Counter()
            yield waits
            waits.update(standin.waits - before)

        yield gpu_acceptance.lone_world(DEVICE.type), observe


def within(waits: Waits, allowed: int) -> None:
    assert sum(waits.values()) <= allowed, f"the host waits {sum(waits.values())} times: {dict(waits)}"


def alike(differences: dict[str, float], tolerance: float = 1e-4) -> None:
    assert max(differences.values()) <= tolerance, differences


# --- the device itself -----------------------------------------------------------------------------------------------


def rules() -> None:
    with Standin() as standin:
        host = torch.arange(6.0).reshape(2, 3)
        there = host.to(DEVICE)
        assert there.device == DEVICE and [reason for reason, _ in standin.waits] == ["a copy to the device"]
        assert next(iter(standin.waits))[1].startswith("tests/standin_jobs.py:")
        standin.waits.clear()
        there = host.pin_memory().to(DEVICE, non_blocking=True)
        for refused in (there.numpy, lambda: np.asarray(there)):
            with pytest.raises(TypeError, match="can't convert standin:0 device type tensor to numpy"):
                refused()
        with pytest.raises(RuntimeError, match="same device"):
            there + host
        with pytest.raises(RuntimeError, match="same device"):
            torch.nn.functional.linear(there, host)
        doubled = there + torch.tensor(1.0) + there.mT.contiguous().mT  # a scalar may come from the host
        doubled[0] = 7.0
        doubled[:, 2].add_(1)
        assert not standin.waits
        assert doubled.tolist() == [[7.0, 7.0, 8.0], [7.0, 9.0, 12.0]] and standin.waits.total() == 1
        standin.waits.clear()
        assert bool(torch.empty(3, device=DEVICE).isnan().all()) and there[0, 1].item() == 1.0
        assert there[there > 2].sum().item() == 12.0 and (there == 2).nonzero().tolist() == [[0, 2]]
        assert torch.equal(there[torch.tensor([1, 0])].cpu(), host[[1, 0]])
        there.masked_fill_(there > 4, 4.0)
        there[there > 3] = 3.0  # filled: nobody waits
        actual = Counter(reason for reason, _ in standin.waits.elements())
        assert actual == {
            "reads a value": 3,
            "a mask as an index": 1,
            "a shape that depends on values": 1,
            "a copy to the host": 2,
            "copies an index": 1,
        }
        standin.waits.clear()
        copy = there.to("cpu", non_blocking=True)
        there.add_(1.0)
        later = there.to("cpu", non_blocking=True)
        event = torch.get_device_module(DEVICE).Event()
        event.record()
        latest = there.to("cpu", non_blocking=True)
        assert copy.isnan().all() and not standin.waits
        assert there.sum().item() == 18.0 and copy.isnan().all()  # another wait does not count
        event.synchronize()
        assert copy.sum() == 12.0 and later.sum() == 18.0 and latest.isnan().all()
        torch.get_device_module(DEVICE).synchronize()
        assert latest.sum() == 18.0
        trained = torch.nn.Linear(3, 2).to(DEVICE)
        weight = trained.weight.cpu().detach()
        trained(there).square().sum().backward()
        assert trained.weight.grad.device == DEVICE
        torch.optim.SGD(trained.parameters(), lr=0.1).step()
        expected = weight - 0.1 * trained.weight.grad.cpu()
        assert torch.allclose(trained.weight.detach().cpu(), expected)


# --- what the package does on it -------------------------------------------------------------------------------------


def check_collect(family: str, folder: Path, fault: str = "") -> None:
    """A pass that records everything gives what it gives on the CPU, and waits at most once a batch."""
    with device() as (world, observe), planted(fault):
        differences, waits = gpu_acceptance.compare_collect(family, world, folder, observe)
    alike(differences)
    within(waits, 6 * WAITS_PER_BATCH)


def check_unlearn(job: str, folder: Path) -> None:
    """Three steps give the losses and weights that they give on the CPU; a fourth waits at most once."""
    with device() as (world, observe):
        differences, waits = gpu_acceptance.compare_unlearn(job, world, folder, observe)
    alike(differences)
    within(waits, WAITS_PER_STEP)


def check_scorer(folder: Path) -> None:
    """Scores, continuations and relearning are those of the CPU; scoring waits at most twice a batch."""
    with device() as (world, observe):
        there = scores("mixtral", world.device, folder, observe)
    here = scores("mixtral", torch.device("cpu"), folder, gpu_acceptance.counted_waits)
    waits = there.pop("waits")
    here.pop("waits")
    alike(gpu_acceptance.differences(here, there))
    within(waits, 2 * 3)


def scores(family: str, device: torch.device, folder: Path, observe: Any) -> dict[str, Any]:
    from trace_ds.config.sections.evaluation import RelearningConfig
    from trace_ds.corpora.tokenizer import load_tokenizer
    from trace_ds.evaluation.drift import sample_routing
    from trace_ds.evaluation.language_model import LanguageModel, ModelSettings, Sequence
    from trace_ds.evaluation.relearning import relearn

    tiny.make_tokenizer(folder)
    model = gpu_acceptance.tiny_model(family, device)
    settings = ModelSettings("fp32", add_bos=False, add_eos=False, batch_rows=4)
    tested = LanguageModel(model, load_tokenizer(str(folder)), settings)
    draw = np.random.default_rng(0)
    sequences = [Sequence(tuple(draw.integers(3, 300, 6 + n).tolist()), 2 + n % 3) for n in range(12)]
    result: dict[str, Any] = {}

    with observe(device) as waits:
        for number, scored in enumerate(tested.score(sequences)):
            result.update({f"{number} {key}": value for key, value in vars(scored).items()})
    new = tested.continue_greedily([list(one.ids) for one in sequences[:5]], [6] * 5)
    result["continued"] = [token for tokens in new for token in [len(tokens), *tokens]]
    dataset = gpu_acceptance.ragged_rows(folder, "forget")
    result["routing"] = sample_routing(tested, dataset, 5, 2).indices_TLK
    relearning = RelearningConfig(steps=4, lr=1e-2)
    model.requires_grad_(True)
    result["relearned"] = relearn(tested, dataset, relearning, 0)["loss"]
    return result | {"waits": waits}


# --- faults ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """One of :data:`FAULTS` in the code that collects, inside the block."""
    forward, keep, trace = collection.frozen_pass, collection.Collection._keep, collection.Collection._trace

    def hooked(engine: Any, *rest: Any) -> Any:
        def spoilt(layer: Any, inputs: Any, output: Any) -> Any:
            if fault == "item":
                output.sum().item()
            return output + torch.zeros(output.shape[-1]) if fault == "cpu_sum" else output

        hooks = [layer.register_forward_hook(spoilt) for layer in engine.module.model.layers]
        try:
            return forward(engine, *rest)
        finally:
            for hook in hooks:
                hook.remove()

    def traced(own: Any, recorder: Any, where_T: torch.Tensor) -> torch.Tensor:
        return trace(own, recorder, where_T.cpu())

    def kept(own: Any, name: str, where: slice, values: torch.Tensor) -> None:
        keep(own, name, where, torch.from_numpy(values.numpy()))

    faults = {
        "": mock.patch.object(collection, "frozen_pass", forward),
        "item": mock.patch.object(collection, "frozen_pass", hooked),
        "cpu_sum": mock.patch.object(collection, "frozen_pass", hooked),
        "cpu_index": mock.patch.object(collection.Collection, "_trace", traced),
        "missing_event": mock.patch.object(collection, "event_now", mock.Mock()),
        "numpy": mock.patch.object(collection.Collection, "_keep", kept),
    }
    with faults[fault]:
        yield
