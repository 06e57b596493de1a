"""The forget and retain losses of a micro-batch: one pass of the trained model, at most one of the frozen one.

Any forget loss goes with any retain loss. Three kinds exist: losses of tokens, from their logits, and of sequences,
from token losses (both in the tables of losses.py), and losses of hidden states (``rmu``, ``hidden_mse``), which are
branches here. To add one: docs/objectives.md.

Shape legend: F forget rows, R retain rows, B all rows (forget, retain, and alternative ones last), S positions,
D hidden size, V vocabulary, N tokens of a request, C of a chunk of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.parallel.device import to_device
from trace_ds.unlearning.batches import MicroBatch
from trace_ds.unlearning.forward import HeadRequest, forward
from trace_ds.unlearning.losses import (
    SEQUENCE_LOSSES,
    TOKEN_LOSSES,
    SequenceNLL,
    adaptive_rmu_target,
    hidden_mse,
)
from trace_ds.unlearning.needs import FROZEN_LOGITS, FrozenNeeds, micro_batches_together
from trace_ds.unlearning.seuf import Anchor, router_logits


@dataclass(frozen=True)
class Losses:
    """Losses of this rank's micro-batch, with gradient.

    The job weights and sums the retain losses, so TRACE's weights apply in one place for every objective.

    Attributes:
        forget: scalar, the sum over the forget rows.
        retain_RS: per position of the retain rows, 0 where nothing is counted.
        forget_per: "token" or "sequence": which global count divides ``forget``.
        penalty: scalar, a sum over forget tokens that is added to the loss (SEUF's anchor), or None.
    """

    forget: torch.Tensor
    retain_RS: torch.Tensor
    forget_per: str
    penalty: torch.Tensor | None = None


@dataclass(frozen=True)
class FrozenStates:
    """Hidden states of the frozen model for a micro-batch's rows from ``begin`` on; None where they are not needed.

    Attributes:
        layer_BSD: at the layer that a loss uses.
        last_BSD: inputs of the LM head.
        head_VD: weight of the LM head.
    """

    begin: int = 0
    layer_BSD: torch.Tensor | None = None
    last_BSD: torch.Tensor | None = None
    head_VD: torch.Tensor | None = None

    def hidden(self, begin: int, end: int) -> torch.Tensor:
        assert self.layer_BSD is not None
        return self.layer_BSD[begin - self.begin : end - self.begin]

    def last(self, rows_N: torch.Tensor, columns_N: torch.Tensor) -> torch.Tensor:
        assert self.last_BSD is not None
        return self.last_BSD[rows_N - self.begin, columns_N]

    def head(self) -> torch.Tensor:
        assert self.head_VD is not None
        return self.head_VD


@dataclass(frozen=True)
class Frozen:
    """The frozen model (sharded as :func:`trace_ds.unlearning.objective.reference_engine` says).

    Attributes:
        engine: its layers, as many as are needed.
        head_VD: its LM head, whole on every rank: chunks of logits are computed from it;
            None where no logits are needed.
    """

    engine: Any
    head_VD: torch.Tensor | None


@dataclass(frozen=True)
class ForgetRetain:
    """Computes the forget and the retain loss of a micro-batch.

    Attributes:
        settings: names and constants of the losses.
        needs: the layer whose hidden states a loss uses, and what is compared with the frozen model.
        target_D: RMU: c·u; adaptive: β·u.
        frozen: the frozen model, if ``collect`` did not save all that is needed of it.
        anchor: SEUF's penalty on one router.
        sinks: offsets in a document that hidden-state losses skip (attention sinks, hidden_norms.py).
    """

    settings: UnlearningConfig
    needs: FrozenNeeds
    target_D: torch.Tensor | None = None
    frozen: Frozen | None = None
    anchor: Anchor | None = None
    sinks: tuple[int, ...] = ()

    def __call__(self, engine: Any, batch: MicroBatch, frozen: FrozenStates) -> Losses:
        name, first_retain, end_retain = self.settings.forget_loss, batch.forget_rows, len(batch.counted_BS)
        ids_BS, positions_BS, counted_BS = batch.input_ids_BS, batch.position_ids_BS, batch.counted_BS
        if batch.alternative is not None:
            ids_BS = torch.cat([ids_BS, batch.alternative.input_ids_BS])
            positions_BS = torch.cat([positions_BS, batch.alternative.position_ids_BS])
            counted_BS = torch.cat([counted_BS, batch.alternative.counted_BS])
        # per side: its rows, (row, column) of its counted tokens, and the name of its token loss
        sides: dict[str, tuple[slice, torch.Tensor, str]] = {}
        if name != "rmu":
            counted_2N = batch.counted_2N[:, : batch.forget_counted]
            sides["forget"] = (slice(first_retain), counted_2N, "nll" if name in SEQUENCE_LOSSES else name)
        used_BS = counted_BS
        # positions restart with each document, so they are offsets in it
        for offset in self.sinks:
            used_BS = used_BS & to_device(positions_BS != offset, counted_BS.device)
        retain_loss = self.settings.retain_term
        if retain_loss != "hidden_mse":
            counted_2N = batch.counted_2N[:, batch.forget_counted :]
            sides["retain"] = (slice(first_retain, end_retain), counted_2N, retain_loss)
        if batch.alternative is not None:
            rows_N, columns_N = batch.alternative.counted_2N
            sides["alternative"] = (slice(end_retain, None), torch.stack([rows_N + end_retain, columns_N]), "nll")
        # One pass for all sides: a second one would gather every layer under ZeRO-3, and exchange tokens between the
        # ranks of the experts, once more.
        requests = [
            self._request(ids_BS, counted_2N, token_loss, frozen) for _, counted_2N, token_loss in sides.values()
        ]
        with router_logits(engine.module, self.anchor.moe_layer if self.anchor else None) as logits:
            outputs = forward(engine, ids_BS, positions_BS, layer=self.needs.layer, requests=requests)
        values = {
            side: _scatter(counted_BS, request, value_N)[rows]
            for (side, (rows, _, _)), request, value_N in zip(sides.items(), requests, outputs.values, strict=True)
        }
        if retain_loss == "hidden_mse":
            assert outputs.layer_BSD is not None
            hidden_RSD, frozen_RSD = outputs.layer_BSD[first_retain:end_retain], frozen.hidden(first_retain, end_retain)
            retain_RS = hidden_mse(hidden_RSD, frozen_RSD) * used_BS[first_retain:end_retain]
        else:
            retain_RS = values["retain"]
        counted_FS = counted_BS[:first_retain]
        if name == "rmu":
            assert outputs.layer_BSD is not None and self.target_D is not None
            target = self.target_D
            if self.settings.rmu.scale == "adaptive":
                target = adaptive_rmu_target(target, frozen.hidden(0, first_retain))
            forget = (hidden_mse(outputs.layer_BSD[:first_retain], target) * used_BS[:first_retain]).sum()
        elif name in SEQUENCE_LOSSES:
            reference_FS = batch.reference_nll_BS[:first_retain]
            alternative_FS = None if batch.alternative is None else batch.alternative.reference_nll_BS
            nll = SequenceNLL(values["forget"], reference_FS, counted_FS, values.get("alternative"), alternative_FS)
            forget = SEQUENCE_LOSSES[name](self.settings, nll)
        else:
            forget = values["forget"].sum()
        penalty = self.anchor.penalty(logits[0], counted_FS) if self.anchor else None
        return Losses(forget, retain_RS, "sequence" if name in SEQUENCE_LOSSES else "token", penalty)

    def frozen_states(self, batches: Sequence[MicroBatch]) -> Iterator[FrozenStates]:
        """The frozen model's hidden states for each micro-batch of a step in turn, computed when needed, in as few
        passes as memory allows: under ZeRO-3 each gathers the whole frozen model."""
        if self.frozen is None or not batches:
            yield from (FrozenStates() for _ in batches)
            return
        first = batches[0]  # every micro-batch has the same number of rows, on every rank
        begin = 0 if self.needs.forget else first.forget_rows
        end = len(first.counted_BS) if self.needs.retain else first.forget_rows
        trained = len(first.counted_BS) + (len(first.alternative.counted_BS) if first.alternative is not None else 0)
        together = micro_batches_together(trained, end - begin)
        for start in range(0, len(batches), together):
            yield from self._frozen_pass(batches[start : start + together], begin, end)

    def _frozen_pass(self, batches: Sequence[MicroBatch], begin: int, end: int) -> Iterator[FrozenStates]:
        """The frozen model over the rows ``begin`` to ``end`` of some micro-batches."""
        assert self.frozen is not None
        longest = max(batch.counted_BS.shape[1] for batch in batches)
        ids, positions = [], []
        for batch in batches:
            # padding whose positions begin at 0 is a document of its own, to which no real token attends
            padding = torch.arange(longest - batch.counted_BS.shape[1]).expand(end - begin, -1)
            ids.append(functional.pad(batch.input_ids_BS[begin:end], (0, padding.shape[1])))
            positions.append(torch.cat([batch.position_ids_BS[begin:end], padding], dim=1))
        with torch.no_grad():
            outputs = forward(
                self.frozen.engine,
                torch.cat(ids),
                torch.cat(positions),
                layer=self.needs.layer if self.needs.hidden else None,
                last=self.frozen.head_VD is not None,
            )
        for number, batch in enumerate(batches):
            rows = slice(number * (end - begin), (number + 1) * (end - begin))
            layer_BSD, last_BSD = (
                None if states_BSD is None else states_BSD[rows, : batch.counted_BS.shape[1]]
                for states_BSD in (outputs.layer_BSD, outputs.last_BSD)
            )
            yield FrozenStates(begin, layer_BSD, last_BSD, self.frozen.head_VD)

    def _request(self, ids_BS: torch.Tensor, counted_2N: torch.Tensor, name: str, frozen: FrozenStates) -> HeadRequest:
        rows_N, columns_N = counted_2N
        targets_N = ids_BS[rows_N, columns_N + 1]
        frozen_ND = frozen.last(rows_N, columns_N) if name in FROZEN_LOGITS else None

        def values(logits_CV: torch.Tensor, part: slice) -> torch.Tensor:
            frozen_CV = None if frozen_ND is None else functional.linear(frozen_ND[part], frozen.head())
            return TOKEN_LOSSES[name](self.settings, logits_CV, targets_N[part], frozen_CV)

        return HeadRequest(rows_N, columns_N, values)


def _scatter(counted_BS: torch.Tensor, request: HeadRequest, values_N: torch.Tensor) -> torch.Tensor:
    """Token values at their positions, 0 elsewhere, [B, S]."""
    return torch.zeros(counted_BS.shape, device=values_N.device).index_put(
        (request.rows_N, request.columns_N), values_N
    )
