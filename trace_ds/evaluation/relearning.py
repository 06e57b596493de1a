"""Is the knowledge gone, or only out of sight? An attack on an unlearned model, measured by its forget scores.

Fine-tune the model for a few steps on a small share of the forget corpus, and score it again. What was hidden comes
back in a few steps, and facts that were not in the share come back with it; a model that never knew (``gold``) is the
reference. Score: ``relearned_METRIC``, the forget score after the last step; range, direction and chance are the
metric's, close to the score without the attack is best.
Reference: Lynch et al., arXiv 2402.16835; Hu et al., *Jogging the Memory*, arXiv 2406.13356. Our decision: AdamW
without decay on the mean next-token loss, all parameters.
"""

from __future__ import annotations

import contextlib
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from trace_ds.config.sections.evaluation import EvaluationConfig, RelearningConfig
from trace_ds.config.sections.training import BETAS, OptimizerConfig, TrainingConfig
from trace_ds.corpora.dataset import Batch, TokenDataset
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import Diverged, LanguageModel
from trace_ds.evaluation.tasks import run_task
from trace_ds.models.attention import packed
from trace_ds.parallel.device import to_device
from trace_ds.unlearning.batches import CorpusStep, EpochRows, generator, share_of_rank
from trace_ds.unlearning.objective import NextToken
from trace_ds.unlearning.trainer import NumericalFailure, run_step

ATTACKABLE = ("choice", "verbatim", "knowmem")  # their score is what the model generates or prefers
RELEARNING_ROWS = 8  # a step
SHARE = 0.1  # of the forget rows, which the attacker has
SHARE_STREAM, ORDER_STREAM = 11, 12


def relearn(
    language_model: LanguageModel, forget: TokenDataset, settings: RelearningConfig, seed: int
) -> dict[str, Any]:
    """Fine-tune the loaded model (which is changed) on a share of the forget rows.

    A model that is sharded was loaded to be trained (``engine``), and the processes share out the rows of a step. Of
    several that each hold all of it the main one trains; the others get its weights at the end, so that all score one
    model (copies trained apart would differ on GPUs, whose sums have no fixed order).

    Returns:
        ``rows`` (how many were trained on) and the last step's ``loss`` in nats per token (None: not computed here).

    Raises:
        NumericalFailure: a sharded model has diverged; on all processes.
    """
    world = language_model.world
    usable = np.flatnonzero(forget.counted_per_row())
    count = max(1, round(SHARE * len(usable)))
    rows = np.sort(generator(seed, SHARE_STREAM, 0).permutation(usable)[:count])
    order = EpochRows(rows, min(RELEARNING_ROWS, count), seed, ORDER_STREAM)
    model, engine = language_model.model, language_model.engine
    optimizer = None
    if engine is None:
        model.requires_grad_(True)
        if world is None or world.is_main:
            optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, betas=BETAS, weight_decay=0.0)
    loss: torch.Tensor | float | None = None
    for step in range(settings.steps):
        chosen = order.at(step)
        if engine is not None:
            loss = _sharded_step(language_model, forget, chosen, settings, step)
        elif optimizer is not None:
            loss = _whole_step(language_model, optimizer, forget.batch(chosen.tolist(), 0))
    if engine is None and world is not None and world.size > 1:
        world.broadcast_tensors(whole.data for whole in model.parameters())
    return {"rows": count, "loss": None if loss is None else float(loss)}


def training_settings(settings: RelearningConfig, zero_stage: Literal[1, 3] = 1) -> TrainingConfig:
    """The attack as a training job: torch's AdamW without decay or clipping."""
    optimizer = OptimizerConfig(lr=settings.lr, gradient_clipping=0)
    return TrainingConfig(zero_stage=zero_stage, optimizer=optimizer)


def _sharded_step(
    language_model: LanguageModel, forget: TokenDataset, chosen: np.ndarray, settings: RelearningConfig, step: int
) -> float:
    """One step of the engine on a share of the ``chosen`` rows (collective); returns the loss in nats per token."""
    world, engine = language_model.world, language_model.engine
    assert world is not None
    share = share_of_rank(chosen, world.rank, world.size, 1)[0].tolist()
    data = CorpusStep([forget.batch(share, 0)], int(forget.counted_per_row()[chosen].sum()))
    engine.train()
    try:
        return float(run_step(engine, world, data, NextToken(), training_settings(settings), step)["loss"])
    finally:
        engine.eval()


def _whole_step(language_model: LanguageModel, optimizer: torch.optim.Optimizer, batch: Batch) -> torch.Tensor:
    """One step of fine-tuning; returns its loss in nats per token, a scalar on the device."""
    model, device = language_model.model, language_model.device
    model.train()
    ids_BS = to_device(batch.input_ids_BS, device)
    logits_BSV = model(input_ids=ids_BS, **packed(model, batch.position_ids_BS, device)).logits
    row_N, column_N = to_device(batch.counted_BS.nonzero().T.contiguous(), logits_BSV.device)
    target_N = ids_BS.to(logits_BSV.device)[row_N, column_N + 1]
    loss = functional.cross_entropy(logits_BSV[row_N, column_N].float(), target_N)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    model.eval()
    return loss.detach()


def attack(
    model: LanguageModel,
    result: dict[str, Any],
    settings: EvaluationConfig,
    tasks: list[Task],
    forget: TokenDataset,
    *,
    context_length: int,
    seed: int,
) -> None:
    """Add the attack to a result: ``relearning``, and the forget scores after its last step (none of a task on which
    the model under attack has diverged). The model is changed."""
    assert settings.relearning is not None
    try:
        result["relearning"] = relearn(model, forget, settings.relearning, seed)
    except NumericalFailure:
        result["relearning"] = None
        return
    for task in tasks:
        if task.config.role == "forget" and task.config.type in ATTACKABLE:
            with contextlib.suppress(Diverged):
                scored = run_task(model, task, max_new_tokens=settings.max_new_tokens, context_length=context_length)
                result["scores"] += [{**score, "metric": f"relearned_{score['metric']}"} for score in scored.scores]
