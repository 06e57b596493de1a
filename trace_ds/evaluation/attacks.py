"""Is the knowledge gone, or only out of sight? Two attacks on an unlearned model, told by its forget scores.

**Relearning**: fine-tune the model for a few steps on a small share of the forget corpus and score in between. What was
hidden comes back in a few steps, and facts that were not in the share come back with it; a model that never knew
(``gold``) is the reference. Score: ``relearned_METRIC``, the forget score after the last step, and the curve by step.
Reference: Lynch et al., arXiv 2402.16835; Hu et al., *Jogging the Memory*, arXiv 2406.13356. Our decision: AdamW
without decay on the mean next-token loss, all parameters.

**Expert forcing**: an MoE can forget by sending forget queries to other experts, the old ones still holding what they
know. So forget queries are sent through other experts than the model's router asks for: ``without_first`` forbids each
token's first expert, ``without_critical`` the forget-critical experts of the calibration, ``original_routing`` takes
the original model's choice for the very same tokens (choice tasks only). Score: ``forced_METRIC``, the highest of them.
Our own attack; the gate weights are recomputed from the router's logits for the experts taken.

Both scores have the range, direction and chance of the metric they attack; close to the unattacked score is best.

Shape legend: T tokens of a forward pass, E experts, K = top-k, L MoE layers, D hidden size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from trace_ds.config.schema import RelearningConfig
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import UserError
from trace_ds.evaluation.items import Task
from trace_ds.evaluation.language_model import LanguageModel
from trace_ds.models.routers import find_routers
from trace_ds.unlearning.rows import EpochRows, generator

SHARE_STREAM, ORDER_STREAM = 11, 12
Decide = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]  # (layer, logits_TE, indices_TK) -> indices_TK
Score = Callable[[list[Task]], dict[str, float | None]]  # of the forget tasks: {"TASK METRIC": value}


def relearn(
    language_model: LanguageModel, forget: TokenDataset, settings: RelearningConfig, seed: int, score: Callable[[], Any]
) -> dict[str, Any]:
    """Fine-tune the loaded model (which is changed) on a share of the forget rows.

    Args:
        forget: the run's forget dataset.
        score: called before the first step and every ``score_every`` steps, and after the last.

    Returns:
        ``rows`` (how many were trained on) and ``curve``: [{"step", "loss", "scores"}], loss in nats per token.
    """
    usable = np.flatnonzero(forget.counted_per_row())
    count = max(1, round(settings.share * len(usable)))
    rows = np.sort(generator(seed, SHARE_STREAM, 0).permutation(usable)[:count])
    order = EpochRows(rows, min(settings.rows, count), seed, ORDER_STREAM)
    model = language_model.model
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    curve: list[dict[str, Any]] = [{"step": 0, "loss": None, "scores": score()}]
    for step in range(settings.steps):
        batch = forget.batch(order.at(step).tolist(), 0)
        model.train()
        logits_BSV = model(
            input_ids=batch.input_ids_BS.to(language_model.device),
            position_ids=batch.position_ids_BS.to(language_model.device),
            use_cache=False,
        ).logits
        row_N, column_N = batch.counted_BS.nonzero(as_tuple=True)
        target_N = batch.input_ids_BS[row_N, column_N + 1].to(language_model.device)
        loss = functional.cross_entropy(logits_BSV[row_N, column_N].float(), target_N)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        model.eval()
        if (step + 1) % settings.score_every == 0 or step + 1 == settings.steps:
            curve.append({"step": step + 1, "loss": float(loss.detach()), "scores": score()})
    return {"rows": count, "curve": curve}


@contextlib.contextmanager
def forced(model: nn.Module, decide: Decide) -> Iterator[None]:
    """Inside the block every router sends its tokens to the experts that ``decide`` names.

    Raises:
        UserError: the router's gate weights are not a softmax over its logits, so they cannot be recomputed.
    """

    def hook_for(layer: int) -> Callable[..., Any]:
        def hook(router: Any, inputs: Any, output: Any) -> Any:
            _, scores_TK, indices_TK = output
            logits_TE = functional.linear(inputs[0].reshape(-1, router.weight.shape[1]), router.weight)
            probability_TE = logits_TE.float().softmax(-1)
            sums_T = scores_TK.float().sum(-1)
            normalised = bool(((sums_T - 1).abs() < 1e-2).all())
            if not torch.allclose(_gates(probability_TE, indices_TK, normalised), scores_TK.float(), atol=2e-2):
                raise UserError(
                    f"the gate weights of {type(router).__name__} are not a softmax",
                    "evaluation.expert_forcing",
                    "switch the attack off for this family",
                )
            taken_TK = decide(layer, logits_TE, indices_TK)
            gates_TK = _gates(probability_TE, taken_TK, normalised).to(scores_TK.dtype)
            return output[0], gates_TK, taken_TK.to(indices_TK.dtype)

        return hook

    handles = [router.register_forward_hook(hook_for(layer)) for layer, router in enumerate(find_routers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gates(probability_TE: torch.Tensor, indices_TK: torch.Tensor, normalised: bool) -> torch.Tensor:
    gates_TK = probability_TE.gather(1, indices_TK.long())
    return gates_TK / gates_TK.sum(-1, keepdim=True) if normalised else gates_TK


def without_first(layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
    """The best K experts but the very best."""
    return logits_TE.topk(indices_TK.shape[1] + 1, dim=-1).indices[:, 1:]


def without_experts(forbidden_LE: np.ndarray) -> Decide:
    """The best K of the experts that are not forbidden; a layer with fewer than K others keeps its choice."""

    def decide(layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        top_k = indices_TK.shape[1]
        forbidden_E = torch.from_numpy(forbidden_LE[layer].astype(bool)).to(logits_TE.device)
        if int((~forbidden_E).sum()) < top_k:
            return indices_TK
        return logits_TE.float().masked_fill(forbidden_E, -torch.inf).topk(top_k, dim=-1).indices

    return decide


class Decisions:
    """The original model's choices, pass by pass, to be repeated by another model on the same passes."""

    def __init__(self) -> None:
        self.passes: list[np.ndarray] = []  # int16 [T, K], the layers of a pass one after the other
        self._next = 0

    def record(self, layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        self.passes.append(indices_TK.cpu().numpy().astype(np.int16))
        return indices_TK

    def repeat(self, layer: int, logits_TE: torch.Tensor, indices_TK: torch.Tensor) -> torch.Tensor:
        if layer == 0 and self._next == len(self.passes):
            self._next = 0
        taken = torch.from_numpy(self.passes[self._next].astype(np.int64)).to(indices_TK.device)
        self._next += 1
        if taken.shape != indices_TK.shape:
            raise ValueError(f"the original model read {tuple(taken.shape)} tokens, this one {tuple(indices_TK.shape)}")
        return taken


@dataclass(frozen=True)
class Attacked:
    """What an attack found, as told in a result, and the score records that sum it up."""

    told: dict[str, Any]
    worst: dict[str, float | None]  # "TASK METRIC" -> score under the attack


def relearning_attack(
    model: LanguageModel, forget: TokenDataset, settings: RelearningConfig, seed: int, score: Callable[[], Any]
) -> Attacked:
    """:func:`relearn` with the forget tasks' scores; the model is changed."""
    told = relearn(model, forget, settings, seed, score)
    return Attacked(told, told["curve"][-1]["scores"])


def forcing_attack(
    model: LanguageModel, tasks: list[Task], score: Score, critical_LE: np.ndarray | None, original: Decisions | None
) -> Attacked:
    """Scores of the forget tasks under every kind of forcing that can be done."""
    told: dict[str, dict[str, float | None]] = {"none": score(tasks)}
    with forced(model.model, without_first):
        told["without_first"] = score(tasks)
    if critical_LE is not None and critical_LE.any():
        with forced(model.model, without_experts(critical_LE)):
            told["without_critical"] = score(tasks)
    chosen = [task for task in tasks if task.config.type == "choice"]
    if original is not None and chosen:
        with forced(model.model, original.repeat):
            told["original_routing"] = score(chosen)
    names = told["none"]
    kinds = [scores for kind, scores in told.items() if kind != "none"]
    worst = {
        name: max((value for scores in kinds if (value := scores.get(name)) is not None), default=None)
        for name in names
    }
    return Attacked(told, worst)


def score_records(result: dict[str, Any], prefix: str, attacked: Attacked) -> list[dict[str, Any]]:
    """The forget scores of a result as the attack left them: metric ``PREFIX_METRIC``."""
    return [
        {**score, "metric": f"{prefix}_{score['metric']}", "value": attacked.worst[key]}
        for score in result["scores"]
        if (key := f"{score['task']} {score['metric']}") in attacked.worst
    ]
