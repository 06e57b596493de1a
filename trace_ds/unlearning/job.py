"""The training loop: steps, guards, checkpoints, stopping. Collective: every rank runs it in the same way."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from trace_ds.checkpoints.commit import save
from trace_ds.checkpoints.manifest import Manifest
from trace_ds.config.schema import UnlearningConfig
from trace_ds.errors import JobFailed, StopRequested
from trace_ds.models.token_nll import weighted_sum
from trace_ds.parallel.world import World
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import Progress, StageLog
from trace_ds.unlearning.batches import Batches, Step
from trace_ds.unlearning.loss import Objective
from trace_ds.unlearning.multiplier import Multiplier
from trace_ds.unlearning.online_weights import RetainWeights
from trace_ds.unlearning.realign import Realignment
from trace_ds.unlearning.watch import Evaluator, Verdict, broken_bounds, judge


class NumericalFailure(JobFailed):
    """A loss or gradient is NaN or infinite: the step was not taken, the last checkpoint stands."""


@contextmanager
def termination_noted() -> Iterator[Callable[[], bool]]:
    """SIGTERM and SIGINT (Ctrl-C) become a question (was one received?) instead of an end.

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


def learning_rate(settings: UnlearningConfig, step: int) -> float:
    """Learning rate of the 0-based ``step``: linear warm-up, then constant (a function of the step alone)."""
    warmup = settings.optimizer.warmup_steps
    return settings.optimizer.lr * min(1.0, (step + 1) / (warmup + 1))


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout, if the model has any) as a function of these: no generator state to save."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> np.uint64(1)))


def train(
    engine: Any,
    world: World,
    batches: Batches,
    objective: Objective,
    weights: RetainWeights,
    evaluator: Evaluator | None,
    settings: UnlearningConfig,
    run: RunDirectory,
    manifest: Manifest,
    log: StageLog,
    realignment: Realignment | None = None,
) -> None:
    """Train from step ``manifest.step`` to ``settings.steps`` or to the forgetting target, saving as configured.

    Only a sound state is saved: its weights, moments and next losses are finite, and it keeps within the guards.

    Raises:
        StopRequested: the stop file appeared, SIGTERM or SIGINT came; a complete checkpoint was saved, unless the state
            broke a guard (the job goes on from the checkpoint before, to the same result).
        JobFailed: a loss, gradient or weight is not finite (NumericalFailure), or an evaluation broke a guard. Nothing
            is saved then: the last checkpoint, from before, stands.
    """
    cursor = dict(manifest.cursor)
    progress = Progress(log, "unlearning", settings.steps, start=manifest.step)
    if evaluator is not None and "evaluation_start" not in cursor:
        start = cursor["evaluation_start"] = evaluator(engine)
        log.evaluation(manifest.step, **start)
    multiplier = Multiplier.of(settings, manifest.cursor)
    with termination_noted() as terminated:
        for step in range(manifest.step, settings.steps):
            done = step + 1
            data = batches.at(step, world.rank, world.size)
            seed_step(cursor["seed"], step, world.rank)
            slower = 0.5 ** cursor.get("back_offs", 0)
            values = run_step(engine, world, data, objective, weights, settings, step, multiplier.alpha, slower)
            multiplier = multiplier.after(values["loss_retain"])
            cursor.update(multiplier.cursor())
            stop = terminated() or (world.is_main and any(path.is_file() for path in run.stop_files))
            stop = bool(world.max_int(int(stop)))
            if done % settings.log_every == 0 or done == settings.steps:
                log.scalars(done, **values)
            progress.advance(forget=values["loss_forget"], retain=values["loss_retain"])
            last = done == settings.steps
            verdict = None
            if last and realignment is not None:
                realignment.apply(engine)
            if evaluator is not None and settings.evaluate.every and (last or done % settings.evaluate.every == 0):
                verdict = look(engine, evaluator, settings, cursor, done, log)
                if verdict.action == "finish" and not last:
                    last = True
                    if realignment is not None:
                        realignment.apply(engine)
                        verdict = None  # it was about the routers before
            if done % settings.save_every == 0 or last or stop:
                require_finite(engine, world, objective, batches, done)
                broken = broken_guards(engine, evaluator, settings, cursor, verdict)
                if broken and last:
                    raise JobFailed(f"stopped after step {done}: {broken}; the last checkpoint stands")
                if broken:
                    log.line(f"WARNING no checkpoint of step {done}: {broken}")
                else:
                    current = replace(manifest, step=done, cursor={**cursor, **weights.state(), "step": done})
                    save(engine, world, run.checkpoints, current, keep=settings.keep, keep_every=settings.keep_every)
                    log.event("checkpoint", step=done)
            if last:
                break
            if stop:
                if world.is_main:
                    for path in run.stop_files:
                        path.unlink(missing_ok=True)
                log.line(f"stopped on request after step {done} of {settings.steps}; run again to go on")
                raise StopRequested(f"stopped after step {done}")
    progress.close()


def require_finite(engine: Any, world: World, objective: Objective, batches: Batches, done: int) -> None:
    """Refuse to save a state that no job could go on from (collective): one forward pass on the rows of the next step.

    An update can leave weights that are finite and useless, which only a loss shows; and weights that no token of a
    batch reaches, which only the weights show.

    Raises:
        NumericalFailure: a weight, a moment of the optimizer or a loss of the next step is not finite, on any rank.
    """
    engine.eval()
    losses = 0.0
    with torch.no_grad():
        for micro_batch in batches.at(done, world.rank, world.size).micro_batches[:1]:
            found = objective(engine, micro_batch.to(world.device))
            losses += float(found.forget) + float(found.retain_RS.sum())
    engine.train()
    if world.max_int(int(not (math.isfinite(losses) and finite_state(engine)))):
        raise NumericalFailure(
            f"the model is not finite after step {done}: its weights, their moments or the losses of the next step are "
            "NaN or infinite; nothing was saved and the last checkpoint stands; lower the learning rate or alpha"
        )


def finite_state(engine: Any) -> bool:
    """Whether this rank's weights, and the fp32 partitions and moments of its optimizer, are all finite."""
    weights = [getattr(parameter, "ds_tensor", parameter) for parameter in engine.module.parameters()]
    state = engine.optimizer.optimizer.state
    held = [*weights, *state, *(value for entry in state.values() for value in entry.values())]
    tensors = [value.detach() for value in held if isinstance(value, torch.Tensor) and value.numel()]
    return all(bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()) for tensor in tensors)


def broken_guards(
    engine: Any,
    evaluator: Evaluator | None,
    settings: UnlearningConfig,
    cursor: dict[str, Any],
    verdict: Verdict | None,
) -> str:
    """Why the present state must not be saved (empty: it may be), by the evaluation of this step or by one made now.

    One made now acts on nothing else: what a job computes does not depend on when it is saved or stopped.
    """
    if verdict is not None:
        return verdict.reason if verdict.action == "back_off" else ""
    if evaluator is None or not settings.guards.on:
        return ""
    return "; ".join(broken_bounds(settings, cursor["evaluation_start"], evaluator(engine)))


def look(
    engine: Any, evaluator: Evaluator, settings: UnlearningConfig, cursor: dict[str, Any], done: int, log: StageLog
) -> Verdict:
    """Evaluate after step ``done`` and act on it; what it means for the job. Changes ``cursor``.

    Raises:
        JobFailed: a guard is broken.
    """
    found = evaluator(engine)
    log.evaluation(done, **found)
    verdict = judge(
        settings, cursor["evaluation_start"], found, cursor.get("back_offs", 0), last=done == settings.steps
    )
    if verdict.action == "stop":
        raise JobFailed(
            f"stopped after step {done}: {verdict.reason}; the last checkpoint stands. "
            "Lower the learning rate, gamma or the number of steps, or raise alpha"
        )
    if verdict.action == "back_off":
        cursor["back_offs"] = cursor.get("back_offs", 0) + 1
        log.line(f"WARNING after step {done}: {verdict.reason}; halving the learning rate")
    if verdict.action == "finish":
        cursor["reached_forget_nll"] = found["forget_nll"]
        log.line(f"finished early, after step {done} of {settings.steps}: {verdict.reason}")
    return verdict


def run_step(
    engine: Any,
    world: World,
    step_data: Step,
    objective: Objective,
    weights: RetainWeights,
    settings: UnlearningConfig,
    step: int,
    alpha: float,
    slower: float = 1.0,
) -> dict[str, float]:
    """One optimizer step; returns the losses (global), the gradient norm and the learning rate.

    L = γ·L_forget + α·L_retain with sums over this rank divided by global counts. DeepSpeed averages gradients over
    the ranks and divides the loss by the number of micro-batches, so both factors are put back here.

    Args:
        slower: factor of the learning rate.

    Raises:
        NumericalFailure: the loss or the gradient is not finite, on any rank; every rank raises.
    """
    lr = learning_rate(settings, step) * slower
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    sums = np.zeros(3)  # forget, retain, and SEUF's penalty
    accumulation = len(step_data.micro_batches)
    counts = {"token": step_data.forget_tokens, "sequence": step_data.forget_sequences}
    for number, micro_batch in enumerate(step_data.micro_batches):
        engine.set_gradient_accumulation_boundary(number == accumulation - 1)
        batch = micro_batch.to(world.device)
        with weights.recording():
            losses = objective(engine, batch)
        forget = losses.forget / max(counts[losses.forget_per], 1)
        retain = weighted_sum(losses.retain_RS, weights.of(batch)) / max(step_data.retain_tokens, 1)
        sums[:2] += [float(forget.detach()), float(retain.detach())]
        loss = settings.gamma * forget + alpha * retain
        if losses.penalty is not None:
            penalty = losses.penalty / max(step_data.forget_tokens, 1)
            sums[2] += float(penalty.detach())
            loss = loss + penalty
        engine.backward(loss * world.size * accumulation)
    # One collective a step: the losses (and whether every rank's are finite), and what online weights need to know.
    totals = world.sum_float64(np.concatenate([sums, weights.local_sums()]))
    if not np.isfinite(totals[:3]).all():
        raise NumericalFailure(
            f"the loss is not finite in step {step + 1} (forget {sums[0]}, retain {sums[1]} on this rank); "
            "the step was not taken and the last checkpoint stands; lower the learning rate or alpha"
        )
    engine.step()
    told = weights.follow(totals[3:], step_data.forget_tokens, step_data.retain_tokens)
    norm = engine.get_global_grad_norm()
    norm = float(norm) if norm is not None else 0.0  # None: the user's DeepSpeed settings turn it off
    # DeepSpeed has seen it too, on all ranks alike, and has not taken the step
    if not np.isfinite(norm) or not engine.was_step_applied():
        raise NumericalFailure(
            f"the gradient is not finite in step {step + 1} (the loss is); the step was not taken and the last "
            "checkpoint stands; lower alpha or gamma"
        )
    return {
        "loss_forget": float(totals[0]),
        "loss_retain": float(totals[1]),
        "loss": float(settings.gamma * totals[0] + alpha * totals[1] + totals[2]),
        **({"loss_anchor": float(totals[2])} if settings.seuf is not None else {}),
        **({"alpha": alpha} if settings.forget_loss == "pdu" else {}),
        "grad_norm": norm,
        "lr": lr,
        **told,
    }
