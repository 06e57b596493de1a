"""The objective of a job: the terms of its loss over a micro-batch, and the state it keeps between the steps.

``NextToken`` is fine-tuning, ``Unlearning`` the forget and retain losses under the weights of TRACE. The training loop
(:mod:`trace_ds.unlearning.trainer`) is one for both.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.corpora.dataset import Batch
from trace_ds.models.engine import ModelParts, base_ds_config, initialize
from trace_ds.models.engine_config import merge_ds_config, parameter_offload, user_ds_config
from trace_ds.models.families import ModelInfo
from trace_ds.models.token_nll import nll, weighted_sum
from trace_ds.parallel.device import to_device
from trace_ds.parallel.world import World
from trace_ds.routing.collection import whole_head
from trace_ds.unlearning.batches import Batches, CorpusStep, MicroBatch, Step
from trace_ds.unlearning.forget_retain import ForgetRetain, Frozen, Losses
from trace_ds.unlearning.forward import HeadRequest, forward
from trace_ds.unlearning.grip import Projection
from trace_ds.unlearning.hidden_norms import measure
from trace_ds.unlearning.losses import dual_update, rmu_target
from trace_ds.unlearning.needs import MEASURED_SCALES, FrozenNeeds
from trace_ds.unlearning.seuf import Anchor

PDU_BOUND_FACTOR = 1.05  # PDU's bound ε is 1.05 × the retain loss of the first step (our decision)


class Objective:
    """The interface of an objective to the training loop. It keeps no state between the steps unless it overrides
    :meth:`update_state` and :meth:`state`."""

    @property
    def factors(self) -> dict[str, float]:
        """Weight of each term in the loss of the next step, by the term's name (in the log, ``loss_NAME``)."""
        raise NotImplementedError

    def terms(self, engine: Any, step: Any, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        """Yield, per micro-batch, scalars with gradient by the names of :attr:`factors`: this rank's sum divided by the
        step's global count. ``step`` is on the host."""
        raise NotImplementedError

    def update_state(self, losses: dict[str, float]) -> dict[str, float]:
        """Update the state by the global losses of a step; returns numbers for the log."""
        return {}

    def after_update(self, engine: Any, step: int) -> None:
        """After the optimizer step of the 0-based ``step`` (collective)."""

    def state(self) -> dict[str, Any]:
        """What a checkpoint must carry (JSON)."""
        return {}


class NextToken(Objective):
    """The mean next-token loss over the counted tokens of a step."""

    factors = {"nll": 1.0}  # noqa: RUF012 (a constant)

    def terms(self, engine: Any, step: CorpusStep, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        for batch in step.micro_batches:
            yield {"nll": next_token_nll(engine, batch, device).sum() / max(step.tokens, 1)}


def next_token_nll(engine: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    """NLL of the counted tokens of a batch that is on the host, fp32 [N] on ``device``."""
    rows_N, columns_N = to_device(batch.counted_BS.nonzero().T.contiguous(), device)
    ids_BS = to_device(batch.input_ids_BS, device)
    targets_N = ids_BS[rows_N, columns_N + 1]
    request = HeadRequest(rows_N, columns_N, lambda logits_CV, part: nll(logits_CV, targets_N[part]))
    return forward(engine, ids_BS, batch.position_ids_BS, requests=[request]).values[0]


class Unlearning(Objective):
    """γ·L_forget + α·L_retain, and SEUF's anchor where there is one.

    Args:
        trainer_state: of the checkpoint that is resumed; under PDU it holds the multiplier, which replaces α, and the
            bound ε.
        router_projection: GRIP's, or None.

    Attributes:
        alpha: α of the next step.
    """

    def __init__(
        self,
        settings: UnlearningConfig,
        forget_retain: ForgetRetain,
        trainer_state: Mapping[str, Any],
        router_projection: Projection | None = None,
    ) -> None:
        self.settings, self.forget_retain, self.router_projection = settings, forget_retain, router_projection
        self.alpha: float = trainer_state.get("pdu_multiplier", settings.alpha)
        self._bound: float | None = trainer_state.get("pdu_bound")

    @property
    def factors(self) -> dict[str, float]:
        anchor = {"anchor": 1.0} if self.settings.seuf is not None else {}
        return {"forget": self.settings.gamma, "retain": self.alpha} | anchor

    def terms(self, engine: Any, step: Step, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
        batches = [batch.to(device) for batch in step.micro_batches]
        for batch, frozen in zip(batches, self.forget_retain.frozen_states(batches), strict=True):
            yield self._terms(self.forget_retain(engine, batch, frozen), batch, step)

    def _terms(self, losses: Losses, batch: MicroBatch, step: Step) -> dict[str, torch.Tensor]:
        counts = {"token": step.forget_tokens, "sequence": step.forget_sequences}
        weights_RS = batch.weights_BS[batch.forget_rows :]
        terms = {
            "forget": losses.forget / max(counts[losses.forget_per], 1),
            "retain": weighted_sum(losses.retain_RS, weights_RS) / max(step.retain_tokens, 1),
        }
        if losses.penalty is not None:
            terms["anchor"] = losses.penalty / max(step.forget_tokens, 1)
        return terms

    def update_state(self, losses: dict[str, float]) -> dict[str, float]:
        if self.settings.forget_loss != "pdu":
            return {}
        used = self.alpha
        if self._bound is None:
            self._bound = PDU_BOUND_FACTOR * losses["retain"]
        self.alpha = dual_update(used, losses["retain"], self._bound)
        return {"alpha": used}

    def after_update(self, engine: Any, step: int) -> None:
        if self.router_projection is not None:
            self.router_projection.after_update(engine, step)

    def state(self) -> dict[str, Any]:
        return {} if self._bound is None else {"pdu_multiplier": self.alpha, "pdu_bound": self._bound}


def make_objective(
    settings: UnlearningConfig,
    info: ModelInfo,
    world: World,
    batches: Batches,
    trainer_state: dict[str, Any],
    anchored: tuple[int, tuple[int, ...]] | None = None,
    router_projection: Projection | None = None,
    *,
    dtype: str,
    ep: int,
    seed: int,
    log: Callable[[str], None] = lambda line: None,
) -> tuple[Unlearning, dict[str, Any]]:
    """The objective, where a checkpoint's ``trainer_state`` left it, and that state with the measured norms and sinks,
    for exact resumption. Of the frozen model the layers that are needed are loaded, and no others.

    Args:
        anchored: the MoE layer and the experts that SEUF anchors the router on.
        dtype, ep, seed: ``model.dtype``, ``distributed.ep`` and ``seed`` of the job.
        log: receives warnings.
    """
    needs = FrozenNeeds.of(settings, info.decoder_layers)
    measured = needs.norms and not trainer_state.get("step")  # a resumed job uses the norms in its checkpoint
    frozen = None
    if needs.stays or measured:
        parts = ModelParts(needs.layers, needs.logits)
        engine = reference_engine(settings, info, world, parts, dtype, ep)
        if measured:
            assert needs.layer is not None
            norms = measure(engine, needs.layer, world, batches)
            left_out = settings.rmu.sinks == "leave_out"
            if warning := norms.warning(needs.layer, left_out):
                log(f"WARNING {warning}")
            unit = norms.mean if settings.rmu.scale == "mean_norm" else norms.median
            trainer_state = {
                **trainer_state,
                "rmu_hidden_norm": unit,
                "hidden_sinks": list(norms.sinks) if left_out else [],
            }
        if needs.stays:
            frozen = Frozen(engine, _whole_head(engine) if needs.logits else None)
        del engine
        if frozen is None:
            gc.collect()  # the engine has reference cycles: free its memory for the trained model
    target_D = None
    if settings.forget_loss == "rmu":
        unit = trainer_state["rmu_hidden_norm"] if settings.rmu.scale in MEASURED_SCALES else 1.0
        length = settings.rmu.coefficient * unit
        target_D = rmu_target(int(info.config["hidden_size"]), seed, length).to(world.device)
    anchor = None
    if anchored is not None and settings.seuf is not None:
        moe_layer, experts = anchored
        target_E = torch.zeros(info.experts, device=world.device)
        target_E[list(experts)] = 1.0
        anchor = Anchor(moe_layer, target_E)
    sinks = tuple(trainer_state.get("hidden_sinks", ()))
    forget_retain = ForgetRetain(settings, needs, target_D, frozen, anchor, sinks)
    return Unlearning(settings, forget_retain, trainer_state, router_projection), trainer_state


def reference_engine(
    settings: UnlearningConfig,
    info: ModelInfo,
    world: World,
    parts: ModelParts,
    dtype: str,
    ep: int,
) -> Any:
    """Some parts of the frozen model, sharded over the ranks (no optimizer).

    With ZeRO stage 3, and without DeepSpeed's expert parallelism (AutoEP) on more than one rank, each rank holds only
    its partition, on the CPU or on disk if the job's parameters are offloaded there. Otherwise only experts are
    sharded.
    """
    stage = 3 if settings.zero_stage == 3 or (ep == 1 and world.size > 1) else 0
    ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage)
    if stage == 3:
        ds_config["bf16"] = {"enabled": dtype == "bf16"}
        ds_config = merge_ds_config(ds_config, parameter_offload(user_ds_config(settings.ds_config)))
    return initialize(info, world, ds_config, dtype=dtype, parts=parts)


def _whole_head(engine: Any) -> torch.Tensor:
    """The frozen LM head [V, D] on this rank, gathered where ZeRO partitions it."""
    # a copy: ZeRO-3 releases the gathered weight at the end of the block
    with whole_head(engine.module.lm_head) as (weight_VD, _):
        return weight_VD.detach().clone()
