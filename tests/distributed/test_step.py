"""What a training step is made of beside its arithmetic: collectives, passes of the frozen model, threads, kernels."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
from processes import run_distributed
from test_unlearn import calibrated_once, copy_of
from torch.utils._python_dispatch import TorchDispatchMode

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.run.directory import RunDirectory

SHAPE = ["distributed.ep=1", "unlearning.zero_stage=3", "unlearning.micro_batch_rows=1"]


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path) -> tuple[Path, Path]:
    return calibrated_once(tiny_model)


class Collectives(TorchDispatchMode):
    """How often each collective is asked for inside, whoever asks: DeepSpeed, torch or this project."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.counts[function._opname.strip("_")] += 1
        return function(*args, **(kwargs or {}))


def collectives_of_a_step(world: Any, config: str, run_dir: str, overrides: list[str]) -> dict[str, int]:
    """Of the third one: before it DeepSpeed does not know the order of the modules."""
    _, _, step = jobs.prepared_steps(world, config, run_dir, overrides)
    for number in range(2):
        step(number)
    with Collectives() as counted:
        step(2)
    return dict(counted.counts)


@pytest.mark.parametrize(("loss", "gathers"), [("npo", 30), ("rmu", 19)])
def test_collectives_of_a_step(calibrated: tuple[Path, Path], loss: str, gathers: int) -> None:
    """Two micro-batches on each of two ranks: our one all-reduce, DeepSpeed's of the gradient's norm, and ZeRO-3's
    gathers of parameters (RMU: up to its layer, and the frozen model once, not for each micro-batch) and sums of
    gradients."""
    config, run = calibrated
    overrides = [*SHAPE, f"unlearning.forget_loss={loss}"]
    result = run_distributed(collectives_of_a_step, 2, str(config), str(run), overrides)
    assert result == [{"allreduce": 2, "allgather_base": gathers, "reduce_scatter_base": 2}] * 2


def states_of_the_host(world: Any, config: str, run_dir: str, overrides: list[str]) -> dict[str, Any]:
    from trace_ds.unlearning import trainer

    trainer.RANKS_SUMMED_IN_BF16 = 0  # as if one rank were many
    engine, _, step = jobs.prepared_steps(world, config, run_dir, overrides)
    threads: list[int] = []
    engine.optimizer.optimizer.register_step_pre_hook(lambda *_: threads.append(torch.get_num_threads()))
    step(0)
    return {"update": set(threads), "after": torch.get_num_threads(), "sums": engine.communication_data_type}


def test_offloaded_states_are_updated_by_all_cores_and_many_ranks_sum_in_fp32(calibrated: tuple[Path, Path]) -> None:
    config, run = calibrated
    offload = Path(__file__).parents[2] / "ds_configs" / "cpu_offload.json"
    overrides = ["model.dtype=bf16", f"unlearning.ds_config={offload}", "unlearning.forget_loss=graddiff"]
    (result,) = run_distributed(states_of_the_host, 1, str(config), str(run), overrides)
    assert result == {"update": {len(os.sched_getaffinity(0))}, "after": 1, "sums": torch.float32}


def flags() -> tuple[Any, ...]:
    memory, cudnn = torch.utils.deterministic.fill_uninitialized_memory, torch.backends.cudnn
    return torch.are_deterministic_algorithms_enabled(), memory, cudnn.deterministic, cudnn.benchmark


def watched_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> list[Any]:
    """``unlearn``; what torch was told in each step and after the last one, and cuBLAS."""
    from trace_ds.unlearning import trainer

    make_step, seen = trainer.run_step, []

    def run_step(*arguments: Any) -> dict[str, float]:
        seen.append(flags())
        return make_step(*arguments)

    trainer.run_step = run_step
    jobs.unlearn_job(world, config, run_dir, overrides)
    return [set(seen), flags(), os.environ.get("CUBLAS_WORKSPACE_CONFIG")]


def test_a_deterministic_job(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    """On the CPU it changes no bit; the kernels are torch's affair."""
    config, prepared = calibrated
    manifests = []
    for name, on, cublas in (("without", False, None), ("with", True, ":4096:8")):
        run = copy_of(prepared, tmp_path / name)
        overrides = [f"distributed.deterministic={on}".lower(), "unlearning.steps=2", "unlearning.forget_loss=npo"]
        (result,) = run_distributed(watched_job, 1, str(config), str(run), overrides)
        assert result == [
            {(True, False, True, False) if on else (False, True, False, False)},
            (False, True, False, False),
            cublas,
        ]
        manifests.append(read_manifest(run / "checkpoints" / "step_000002"))
    assert manifests[0] == manifests[1]  # every file's hash


def test_tensorboard_shows_speed_memory_and_settings_of_all_variants(
    calibrated: tuple[Path, Path], tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    config, prepared = calibrated
    run = RunDirectory.at(copy_of(prepared, tmp_path / "run"))
    run_distributed(jobs.unlearn_job, 1, str(config), str(run.path), ["unlearning.steps=2", "unlearning.alpha=0.5"])
    events = EventAccumulator(str(run.tb / "unlearn"))
    events.Reload()
    assert [event.step for event in events.Scalars("tokens_per_s")] == [1, 2]
    assert all(0.1 < event.value < 1000 for event in events.Scalars("memory_gb"))
    begun = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(begun).session_start_info.hparams
    assert settings["alpha"].number_value == 0.5 and settings["optimizer.lr"].number_value > 0
    (loss,) = events.Scalars("final/loss")
    assert loss.value == events.Scalars("loss")[-1].value
    page = Path(__file__).parents[2] / "docs" / "cluster.md"
    assert "tensorboard --logdir runs/try`" in page.read_text()  # RUN/tb would be the run's own jobs alone
    assert run.variant("other").tb.is_relative_to(run.path)
