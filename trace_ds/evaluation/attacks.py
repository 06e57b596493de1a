"""Is the knowledge gone, or only out of sight? Two attacks on an unlearned model, measured by its forget scores.

**Relearning**: fine-tune the model for a few steps on a small share of the forget corpus and score in between. What was
hidden comes back in a few steps, and facts that were not in the share come back with it; a model that never knew
(``gold``) is the reference. Score: ``relearned_METRIC``, the forget score after the last step, and the curve by step.
Reference: Lynch et al., arXiv 2402.16835; Hu et al., *Jogging the Memory*, arXiv 2406.13356. Our decision: AdamW
without decay on the mean next-token loss, all parameters.

**Expert forcing**: an MoE can forget by sending forget queries to other experts, the old ones still holding what they
know. So forget queries are sent through other experts than the model's router asks for: ``without_first`` forbids each
token's first expert, ``without_critical`` the forget-critical experts of the calibration. Score: ``forced_METRIC``,
the higher of the two.
Our own attack; the gate weights are recomputed from the router's logits for the experts taken, by the router's own
rule (softmax or sigmoid, normalised or not, scaled), which is detected by trying it.

Both scores have the range, direction and chance of the metric they attack; close to the unattacked score is best.

Shape legend: T tokens of a forward pass, E experts, K = top-k, L MoE layers, D hidden size.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trace_ds.config.sections.evaluation import EvaluationConfig, RelearningConfig
from trace_ds.config.sections.training import BETAS, OptimizerConfig, TrainingConfig
from trace_ds.corpora.dataset import Batch, TokenDataset
from trace_ds.errors import UserError
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import Diverged, LanguageModel
from trace_ds.evaluation.tasks import run_task
from trace_ds.models import autoep
from trace_ds.models.attention import packed
from trace_ds.models.routers import find_routers, logits_of, meta_model, places_of, routing_of, without_data
from trace_ds.parallel.device import to_device
from trace_ds.run.artefact import Artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.unlearning.batches import CorpusStep, EpochRows, generator, share_of_rank
from trace_ds.unlearning.objective import NextToken
from trace_ds.unlearning.trainer import NumericalFailure, run_step

ATTACKABLE = ("choice", "verbatim", "knowmem")  # their score is what the model generates or prefers
RELEARNING_ROWS, SCORE_EVERY = 8, 5  # rows a step, and steps between scores
SHARE = 0.1  # of the forget rows, which the attacker has
SHARE_STREAM, ORDER_STREAM = 11, 12
TRIAL_TOKENS, TRIAL_LOGIT_STD, TRIAL_TOLERANCE = 64, 2.0, 1e-3
FUNCTIONS = {"softmax": lambda logits_TE: logits_TE.softmax(-1), "sigmoid": torch.sigmoid}
Decide = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # (layer, logits_TE, indices_TK) -> indices_TK


def relearn(
    language_model: LanguageModel, forget: TokenDataset, settings: RelearningConfig, seed: int, score: Callable[[], Any]
) -> dict[str, Any]:
    """Fine-tune the loaded model (which is changed) on a share of the forget rows; ``score`` is called before the first
    step, every :data:`SCORE_EVERY` steps and after the last.

    A model that is sharded was loaded to be trained (``engine``), and the processes share out the rows of a step. Of
    several that each hold all of it the main one trains; the others get its weights before each scoring, so that all
    score one model (copies trained apart would differ on GPUs, whose sums have no fixed order).

    Returns:
        ``rows`` (how many were trained on) and ``curve``: [{"step", "loss", "scores"}], loss in nats per token.
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
    curve: list[dict[str, Any]] = [{"step": 0, "loss": None, "scores": score()}]
    loss: torch.Tensor | float | None = None
    for step in range(settings.steps):
        chosen = order.at(step)
        if engine is not None:
            try:
                loss = _sharded_step(language_model, forget, chosen, settings, step)
            except NumericalFailure:  # on all processes
                curve.append({"step": step + 1, "loss": None, "scores": {}})  # as of a whole model that diverged
                break
        elif optimizer is not None:
            loss = _whole_step(language_model, optimizer, forget.batch(chosen.tolist(), 0))
        if (step + 1) % SCORE_EVERY == 0 or step + 1 == settings.steps:
            if engine is None and world is not None and world.size > 1:
                world.broadcast_tensors(whole.data for whole in model.parameters())
            loss_nats = None if loss is None else float(loss)
            curve.append({"step": step + 1, "loss": loss_nats, "scores": score()})
    return {"rows": count, "curve": curve}


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


@dataclass(frozen=True)
class GateRule:
    """How a router makes gate weights of logits: ``scale`` times a function of each, over their sum if normalised."""

    function: str
    normalised: bool
    scale: float

    def gates(self, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        """Gate weights of the experts taken, float32 [T, K]."""
        gates_TK = FUNCTIONS[self.function](logits_TE.float()).gather(1, indices_TK.long())
        return self.scale * (gates_TK / gates_TK.sum(-1, keepdim=True) if self.normalised else gates_TK)


def gate_rule(router: Any) -> GateRule:
    """The rule of a router: an attribute of AutoEP's, else detected with a copy on random weights and hidden states
    (reads no weights). UserError: none of the rules known fits."""
    if autoep.is_autoep_router(router):
        return GateRule(router.score_func, router.route_norm, router.route_scale)
    trial = copy.deepcopy(router).to_empty(device="cpu").float()
    draw = torch.Generator().manual_seed(0)
    for buffer in trial.buffers():
        buffer.zero_()
    width = trial.get_parameter("weight").shape[1]
    for parameter in trial.parameters():
        nn.init.normal_(parameter, std=TRIAL_LOGIT_STD / width**0.5, generator=draw)
    hidden_TD = torch.randn(TRIAL_TOKENS, width, generator=draw)
    with torch.no_grad():
        output = trial(hidden_TD)
        scores_TK, indices_TK = routing_of(trial, output)
        for function, normalised in itertools.product(FUNCTIONS, (False, True)):
            gates_TK = GateRule(function, normalised, 1.0).gates(logits_of(trial, output), indices_TK)
            ratio_TK = scores_TK.float() / gates_TK
            scale = float(ratio_TK.median())
            if bool(((ratio_TK / scale - 1).abs() < TRIAL_TOLERANCE).all()):
                return GateRule(function, normalised, scale)
    problem = f"the gate weights of {type(router).__name__} follow no rule that is known"
    raise UserError(problem, "evaluation.expert_forcing", "switch the attack off for this family")


def check_forcing(path: str | Path) -> None:
    """:class:`UserError` when a router of the model in a directory follows no known :class:`GateRule`."""
    for router in {type(router): router for router in find_routers(meta_model(path))}.values():
        gate_rule(router)


@contextlib.contextmanager
def forced(model: nn.Module, decide: Decide) -> Iterator[None]:
    """Inside the block, route every token to the experts that ``decide`` names, with the gate weights that the router
    gives them."""
    routers = find_routers(model)
    plain = routers
    if not autoep.is_autoep_router(routers[0]) and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        # a copy of a router whose weights lie on other ranks computes nothing
        plain = find_routers(without_data(model.config))
    rules = {kind: gate_rule(router) for kind, router in {type(router): router for router in plain}.items()}

    def hook_for(layer: int) -> Callable[..., Any]:
        def hook(router: Any, inputs: Any, output: Any) -> Any:
            scores, indices = places_of(router, output)
            sharded = autoep.is_autoep_router(router)
            logits_TE = router.gate(inputs[0]) if sharded else logits_of(router, output)
            taken_TK = decide(layer, logits_TE, output[indices])
            gates_TK = rules[type(router)].gates(logits_TE, taken_TK)
            changed = list(output)
            changed[scores] = gates_TK.to(output[scores].dtype)
            changed[indices] = taken_TK.to(output[indices].dtype)
            if sharded:  # how many tokens each expert is sent
                counts_E = torch.bincount(taken_TK.reshape(-1), minlength=logits_TE.shape[1])
                changed[2] = counts_E.to(output[2].dtype)
            return tuple(changed)

        return hook

    handles = [router.register_forward_hook(hook_for(layer)) for layer, router in enumerate(routers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_first(layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """The best K experts but each token's first: of those that the router takes, the one with the largest logit."""
    first_T1 = indices_TK.gather(1, logits_TE.gather(1, indices_TK.long()).argmax(-1, keepdim=True))
    return logits_TE.float().scatter(1, first_T1.long(), -torch.inf).topk(indices_TK.shape[1], dim=-1).indices


def without_experts(forbidden_LE: np.ndarray) -> Decide:
    """The best K of the experts that are not forbidden; a layer with fewer than K others keeps its choice."""

    def decide(layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        top_k = indices_TK.shape[1]
        forbidden_E = torch.from_numpy(forbidden_LE[layer].astype(bool))
        if int((~forbidden_E).sum()) < top_k:
            return indices_TK
        forbidden_E = to_device(forbidden_E, logits_TE.device)
        return logits_TE.float().masked_fill(forbidden_E, -torch.inf).topk(top_k, dim=-1).indices

    return decide


def critical_experts(run: RunDirectory) -> np.ndarray | None:
    """The forget-critical experts of the run's calibration, bool [L, E]; None without a calibration."""
    path = run.calibration / "calibration.safetensors"
    if not path.is_file():
        return None
    from safetensors.numpy import load_file

    return load_file(path)["selected_LE"].astype(bool)


@dataclass(frozen=True)
class Attacks:
    """The attacks of a run, as configured, on its forget tasks."""

    settings: EvaluationConfig
    context_length: int
    seed: int
    run: RunDirectory
    tasks: list[Task]
    data: Artefact | None

    def score(self, model: LanguageModel, tasks: list[Task]) -> dict[str, float | None]:
        """``{"TASK METRIC": value}``; nothing of a task on which the model under attack has diverged."""
        scores: dict[str, float | None] = {}
        for task in tasks:
            with contextlib.suppress(Diverged):
                result = run_task(
                    model, task, max_new_tokens=self.settings.max_new_tokens, context_length=self.context_length
                )
                scores |= {f"{score['task']} {score['metric']}": score["value"] for score in result.scores}
        return scores

    def forget_tasks(self) -> list[Task]:
        return [task for task in self.tasks if task.config.role == "forget" and task.config.type in ATTACKABLE]

    def forced(self, model: LanguageModel, tasks: list[Task]) -> dict[str, dict[str, float | None]]:
        """Scores unforced (``none``) and under both kinds of forcing (without a calibration: the first)."""
        by_kind = {"none": self.score(model, tasks)}
        with forced(model.model, without_first):
            by_kind["without_first"] = self.score(model, tasks)
        critical_LE = critical_experts(self.run)
        if critical_LE is not None and critical_LE.any():
            with forced(model.model, without_experts(critical_LE)):
                by_kind["without_critical"] = self.score(model, tasks)
        return by_kind

    def attack(self, model: LanguageModel, result: dict[str, Any]) -> None:
        """Add both attacks to a result; relearning comes last, since it changes the model."""
        tasks, relearning = self.forget_tasks(), self.settings.relearning
        attacked: dict[str, dict[str, float | None]] = {}
        result["attacks"] = {}
        if self.settings.expert_forcing:
            by_kind = result["attacks"]["expert_forcing"] = self.forced(model, tasks)
            attacked["forced"] = {}
            for name in by_kind["none"]:
                values = [scores.get(name) for kind, scores in by_kind.items() if kind != "none"]
                attacked["forced"][name] = max((value for value in values if value is not None), default=None)
        if relearning is not None:
            assert self.data is not None
            forget = TokenDataset.open(self.data.file("forget.arrow"))
            learned = relearn(model, forget, relearning, self.seed, lambda: self.score(model, tasks))
            result["attacks"]["relearning"] = learned
            attacked["relearned"] = learned["curve"][-1]["scores"]
        result["scores"] += [
            {**score, "metric": f"{attack}_{score['metric']}", "value": values[key]}
            for attack, values in attacked.items()
            for score in result["scores"]
            if (key := f"{score['task']} {score['metric']}") in values
        ]
