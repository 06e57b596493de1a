"""The training loop: steps, evaluations, checkpoints, stopping. Collective: every rank runs it in the same way."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trace_ds.checkpoints import serialization
from trace_ds.checkpoints.commit import save
from trace_ds.checkpoints.manifest import Manifest
from trace_ds.config.sections.training import BETAS, TrainingConfig
from trace_ds.errors import JobFailed, StopRequested
from trace_ds.models.engine import ModelParts, base_ds_config, initialize
from trace_ds.models.engine_config import RANKS_SUMMED_IN_BF16, merge_ds_config, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.parallel.device import peak_memory_bytes
from trace_ds.parallel.environment import local_rank_and_size
from trace_ds.parallel.world import World
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import Progress, StageLog
from trace_ds.unlearning import trainable
from trace_ds.unlearning.batches import Batches, CorpusBatches
from trace_ds.unlearning.evaluator import Evaluator
from trace_ds.unlearning.objective import Objective


class NumericalFailure(JobFailed):
    """A loss or gradient is NaN or infinite: nothing of the step is saved, the last checkpoint stands."""


@contextmanager
def termination_noted() -> Iterator[Callable[[], bool]]:
    """Inside the block, note SIGTERM and SIGINT (Ctrl-C) instead of ending; yields a function: was one received?

    Launchers pass on what the process got itself, so a second one means nothing here: who started the job ends it then.
    A SIGINT that is ignored (by who started the process) stays so.
    """
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda number, frame: received.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
        if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout, if the model has any) as a function of these: no generator state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def rate_factor(schedule: str, steps: int) -> Callable[[int], float]:
    """What the learning rate is multiplied by in each step, from 0 on: transformers' own schedule without warm-up.

    A function of the step alone, so that a resumed job goes on exactly.
    """
    from transformers import get_scheduler

    scheduler: Any = get_scheduler(schedule, torch.optim.SGD([torch.zeros(1)], lr=1.0), 0, steps)
    return lambda step: float(scheduler.lr_lambdas[0](step))


def train(
    engine: Any,
    world: World,
    rows: Batches | CorpusBatches,
    objective: Objective,
    settings: TrainingConfig,
    steps: int,
    run: RunDirectory,
    manifest: Manifest,
    log: StageLog,
    evaluator: Evaluator | None = None,
) -> None:
    """Train from step ``manifest.step`` to ``steps``, or to where ``evaluator`` ends the job, saving as configured.

    Only a state whose weights, moments and next losses are finite is saved. ``manifest.trainer_state`` is updated in
    place.

    Raises:
        StopRequested: the stop file appeared, SIGTERM or SIGINT came; a complete checkpoint was saved.
        JobFailed: a loss, gradient or weight is not finite (NumericalFailure), or a score violated a guard. Nothing is
            saved then: the last checkpoint, from before, stands.
    """
    trainer_state = manifest.trainer_state
    progress = Progress(log, "training", steps, start=manifest.step)
    if evaluator is not None:
        evaluator.begin(engine, trainer_state, manifest.step)
    factor = rate_factor(settings.optimizer.schedule, steps)
    with termination_noted() as terminated:
        # one process looks at the shared storage, each at its own signals: run_step sums what they say
        def stop_requested() -> bool:
            return terminated() or (world.is_main and any(path.is_file() for path in run.stop_files))

        for step in range(manifest.step, steps):
            done, began_s = step + 1, time.monotonic()
            data = rows.at(step, world.rank, world.size)
            seed_step(trainer_state["seed"], step, world.rank)
            values = run_step(engine, world, data, objective, settings, step, stop_requested, factor(step))
            stop = bool(values.pop("stop"))
            # run_step has read its losses from the device, so all of the step's work is done by now
            tokens_per_s = data.tokens / (time.monotonic() - began_s)
            memory_gb = peak_memory_bytes(world.device) / 1e9
            log.scalars(done, **values, tokens_per_s=tokens_per_s, memory_gb=memory_gb)
            progress.advance(1, **{name: values[f"loss_{name}"] for name in objective.factors})
            last = done == steps
            reason = evaluator.evaluate(engine, trainer_state, done, last=last) if evaluator is not None else ""
            if reason and not last:
                log.line(f"finished early, after step {done} of {steps}: {reason}")
                last = True
            if (done % settings.save_every == 0 or last or stop) and not (last and settings.keep == 0):
                require_finite(engine, world, objective, rows, done)
                current = replace(
                    manifest, step=done, trainer_state={**trainer_state, **objective.state(), "step": done}
                )
                save(engine, world, run.checkpoints, current, keep=max(settings.keep, 2), log=log)
            if last:
                break
            if stop:
                if world.is_main:
                    for path in run.stop_files:
                        path.unlink(missing_ok=True)
                log.line(f"stopped on request after step {done} of {steps}; run again to go on")
                raise StopRequested(f"stopped after step {done}")
    progress.close()


def require_finite(engine: Any, world: World, objective: Objective, rows: Batches | CorpusBatches, done: int) -> None:
    """Refuse to save a state that no job could go on from (collective): one forward pass on the rows of the next step.

    An update can leave weights that are finite and useless, which only a loss shows; and weights that no token of a
    batch reaches, which only the weights show.

    Raises:
        NumericalFailure: a weight, a moment of the optimizer or a loss of the next step is not finite, on any rank.
    """
    engine.eval()
    losses = 0.0
    data: Any = rows.at(done, world.rank, world.size)
    with torch.no_grad():
        for terms in objective.terms(engine, replace(data, micro_batches=data.micro_batches[:1]), world.device):
            losses += sum(float(term) for term in terms.values())
    engine.train()
    if world.max_int(int(not (math.isfinite(losses) and finite_state(engine)))):
        raise NumericalFailure(
            f"the model is not finite after step {done}: its weights, their moments or the losses of the next step are "
            "NaN or infinite; nothing was saved and the last checkpoint stands; lower the learning rate or the weights "
            "of the losses",
            done,
        )


def finite_state(engine: Any) -> bool:
    """Whether this rank's weights, and the fp32 partitions and moments of its optimizer, are all finite."""
    # under ZeRO-3 a parameter is empty between passes; its share on this rank is ``ds_tensor``
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    state = engine.optimizer.optimizer.state
    values = [*weights, *state, *(value for entry in state.values() for value in entry.values())]
    tensors = [value.detach() for value in values if isinstance(value, torch.Tensor) and value.numel()]
    # NaN and infinities are among the extremes, which need no mask of the tensor's size
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) for tensor in tensors)


def run_step(
    engine: Any,
    world: World,
    data: Any,
    objective: Objective,
    settings: TrainingConfig,
    step: int,
    stop_requested: Callable[[], bool] = lambda: False,
    factor: float = 1.0,
) -> dict[str, float]:
    """One optimizer step; returns the losses (global), the gradient norm, the learning rate, and how many ranks ask to
    ``stop``.

    The loss is a weighted sum of terms, each a sum over this rank divided by a global count. DeepSpeed averages
    gradients over the ranks and divides the loss by the number of micro-batches, so both factors are put back here.

    Args:
        data: of this rank: ``rows.at(step, …)``.
        stop_requested: whether this rank asks to stop; looked at before the update.
        factor: of the learning rate.

    Raises:
        NumericalFailure: the loss or the gradient is not finite, on any rank; every rank raises.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = settings.optimizer.lr * factor
    factors = objective.factors
    # Of this rank. They stay on the device until the step is made: whoever reads them waits for the backward pass.
    sums = torch.zeros(len(factors), dtype=torch.float64, device=world.device)
    accumulation = len(data.micro_batches)
    each = objective.terms(engine, data, world.device)
    for number in range(accumulation):
        engine.set_gradient_accumulation_boundary(number == accumulation - 1)
        terms = next(each)
        sums += torch.stack([terms[name].detach().double() for name in factors])
        # the two factors undo DeepSpeed's means over ranks and micro-batches
        engine.backward(sum(factors[name] * term for name, term in terms.items()) * world.size * accumulation)
    # One collective a step: losses (and whether every rank's are finite) and who asks to stop.
    totals = torch.cat([sums, sums.new_full((1,), stop_requested())])
    world.sum_in_place(totals)
    engine.step()
    norm = engine.get_global_grad_norm()  # None: the user's DeepSpeed settings turn it off
    norm_1 = norm.reshape(1).to(sums) if isinstance(norm, torch.Tensor) else sums.new_full((1,), norm or 0.0)
    norm, *read = torch.cat([norm_1, sums, totals]).tolist()  # the one wait for the device
    here, summed, stop = read[: len(factors)], read[len(factors) : 2 * len(factors)], read[-1]
    losses = dict(zip(factors, summed, strict=True))
    if not np.isfinite(list(losses.values())).all():
        values = ", ".join(f"{name} {value}" for name, value in zip(factors, here, strict=True))
        raise NumericalFailure(
            f"the loss is not finite in step {step + 1} ({values} on this rank); nothing of the step is saved and the "
            "last checkpoint stands; lower the learning rate or the weights of the losses",
            step + 1,
        )
    # DeepSpeed has seen it too, on all ranks alike, and has not taken the step
    if not np.isfinite(norm) or not engine.was_step_applied():
        raise NumericalFailure(
            f"the gradient is not finite in step {step + 1} (the loss is); nothing of the step is saved and the "
            "last checkpoint stands; lower the weights of the losses",
            step + 1,
        )
    objective.after_update(engine, step)
    return {
        **{f"loss_{name}": value for name, value in losses.items()},
        "loss": sum(factors[name] * value for name, value in losses.items()),
        "grad_norm": norm,
        "lr": settings.optimizer.lr * factor,
        "stop": stop,
        **objective.update_state(losses),
    }


def training_engine(
    settings: TrainingConfig,
    info: ModelInfo,
    world: World,
    accumulation: int,
    trained: trainable.Trained | None = None,
    *,
    dtype: str,
    ep: int,
    layers: int | None = None,
) -> Any:
    """The DeepSpeed training engine: AdamW, ZeRO as configured, experts sharded by AutoEP when ep > 1.

    Args:
        trained: None: all that is loaded.
        dtype: ``model.dtype``.
        layers: load only the first so many decoder layers, without norm and LM head; None: the whole model.
    """
    optimizer = settings.optimizer
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=settings.zero_stage)
    ds_config |= {
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizer.gradient_clipping,
        "bf16": {"enabled": dtype == "bf16"},
        **({"communication_data_type": "fp32"} if world.size > RANKS_SUMMED_IN_BF16 else {}),
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optimizer.lr,
                "betas": BETAS,
                "eps": optimizer.eps,
                "weight_decay": optimizer.weight_decay,
                "torch_adam": True,  # no JIT compilation of DeepSpeed's own
                "fused": True,  # 28 bytes moved a parameter, not 72; no temporary of its size
            },
        },
    }
    ds_config = merge_ds_config(ds_config, user_ds_config(settings.ds_config))

    def parameters(model: Any) -> list[Any]:
        if trained is not None:
            trainable.freeze(model, trained)
        return trainable.parameter_groups(model, trained, optimizer.weight_decay)

    parts = ModelParts(layers=layers, head=layers is None)
    training = initialize(
        info, world, ds_config, dtype=dtype, parts=parts, parameters=parameters, recompute=settings.recompute
    )
    if trained is not None:
        trainable.zero_untrained_rows(training.module, trained)
    serialization.install(training)
    if "offload_optimizer" in ds_config["zero_optimization"]:
        update_with_all_cores(training.optimizer.optimizer)
    return training


def update_with_all_cores(optimizer: Any) -> None:
    """States in host memory are updated by this process's share of the cores, however many threads the rest has.

    Each element is computed by itself, so their number changes no bit.
    """
    update = optimizer.step
    cores = len(os.sched_getaffinity(0)) // local_rank_and_size()[1]

    def step(*arguments: Any, **options: Any) -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, cores))
        try:
            return update(*arguments, **options)
        finally:
            torch.set_num_threads(threads)

    optimizer.step = step
