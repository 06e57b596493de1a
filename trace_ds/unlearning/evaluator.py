"""Scores of the model while it is trained, and what ends the job: ``unlearning.evaluate``.

The training losses cannot tell: RMU's retain loss starts at 0, and one batch is noise. So every few steps the same rows
of both corpora (evenly spaced, seen in training too) and some of the run's tasks are scored on the sharded model:

    forget_nll, retain_nll          mean NLL of the rows, nats a token
    forget_overlap, retain_overlap  share of the top-k experts that are still the frozen model's, 0 to 1, of a sample of
                                    tokens whose experts ``collect`` recorded
    TASK METRIC                     as ``evaluate`` computes it

Sums are global, so any world size gives the same numbers up to rounding.

Shape legend: B rows, S positions, N sampled tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_ds.config.sections.unlearning import EvaluateConfig
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import JobFailed
from trace_ds.models.routers import find_routers, record_routing
from trace_ds.parallel.world import World
from trace_ds.routing.token_files import SampledRouting
from trace_ds.run.curve import has_ended, scores_of
from trace_ds.run.log import StageLog
from trace_ds.unlearning.objective import next_token_nll


@dataclass(frozen=True)
class FixedRows:
    """The rows of one corpus that are scored; ``frozen``: the frozen model's routing of sampled tokens."""

    dataset: TokenDataset
    rows: np.ndarray
    frozen: SampledRouting

    @classmethod
    def of(cls, dataset: TokenDataset, count: int, frozen: SampledRouting) -> FixedRows:
        """``count`` evenly spaced rows among those with a counted token."""
        usable = np.flatnonzero(dataset.counted_per_row())
        places = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(np.int64)
        return cls(dataset, usable[places], frozen)

    def sampled(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(places in a batch of ``rows`` of ``length`` positions, frozen experts [N, L, K]) of their sampled tokens;
        None when there is none. Rows of -1 are filling."""
        starts = self.dataset.row_starts_R1
        places, experts = [], []
        for number, row in enumerate(rows):
            if row >= 0:
                positions_N, experts_NLK = self.frozen.within(*starts[row : row + 2])
                places.append(number * length + positions_N)
                experts.append(experts_NLK)
        if not sum(map(len, places)):
            return None
        return np.concatenate(places), np.concatenate(experts)


def score_rows(engine: Any, sides: Mapping[str, FixedRows], world: World, batch_rows: int) -> dict[str, float]:
    """``{side}_nll`` and, of the sampled tokens, ``{side}_overlap`` (collective); ``batch_rows`` a process and pass."""
    with torch.no_grad():
        sums = np.stack([_row_sums(engine, fixed, world, batch_rows) for fixed in sides.values()])
    scores = {}
    for side, (nll_sum, tokens, common, slots) in zip(sides, world.sum_float64(sums), strict=True):
        scores[f"{side}_nll"] = float(nll_sum / tokens)
        if slots:
            scores[f"{side}_overlap"] = float(common / slots)
    return scores


def _row_sums(engine: Any, fixed: FixedRows, world: World, batch_rows: int) -> np.ndarray:
    """This rank's [Σ NLL, counted tokens, experts in common, experts chosen] as float64."""
    mine = fixed.rows[world.rank :: world.size]
    # a forward pass of the engine is collective: every rank makes as many, the last ones on filling where it has none
    most = math.ceil(len(fixed.rows) / world.size)
    batch_rows = min(batch_rows, most)
    passes = math.ceil(most / batch_rows)
    filled = np.full(passes * batch_rows, -1, dtype=np.int64)
    filled[: len(mine)] = mine
    sums = np.zeros(4)
    layers = len(find_routers(engine.module))
    for rows in filled.reshape(passes, batch_rows):
        batch = fixed.dataset.batch(rows.tolist(), pad_id=0)
        with record_routing(engine.module) as recorder:
            nll_N = next_token_nll(engine, batch, world.device)
        sums[:2] += [float(nll_N.double().sum()), int(batch.counted_BS.sum())]
        sampled = fixed.sampled(rows, batch.counted_BS.shape[1])
        if sampled is None:
            continue
        places_N, frozen_NLK = sampled
        now_LTK = torch.stack([recorder.layer(layer)[1] for layer in range(layers)]).cpu().numpy()
        for layer in range(layers):
            now_NK = now_LTK[layer, places_N]
            common_N = (frozen_NLK[:, layer, :, None] == now_NK[:, None, :]).any(2).sum(1)
            sums[2:] += [common_N.sum(), now_NK.size]
    return sums


@dataclass(frozen=True)
class Evaluator:
    """Scores an unlearning job while it trains (collective).

    ``trainer_state["curve"]``, which checkpoints keep, holds a point for each evaluation: ``{"step", "rows", "scores",
    "by_source"}``.

    Attributes:
        rows: scores fixed rows, see :func:`score_rows`; None: none.
        tasks: scores tasks, ``{"scores", "by_source"}`` as in the evaluation artefact; None where log-probabilities are
            not finite.
    """

    settings: EvaluateConfig
    log: StageLog
    rows: Callable[[Any], dict[str, float]] | None
    tasks: Callable[[], dict[str, Any] | None] | None

    def begin(self, engine: Any, trainer_state: dict[str, Any], step: int) -> None:
        """Score the frozen model, step 0 of the curve, unless an earlier start of the job has."""
        if step == 0 and not trainer_state.get("curve"):
            self._add_point(engine, trainer_state, 0)

    def evaluate(self, engine: Any, trainer_state: dict[str, Any], step: int, *, last: bool) -> str:
        """Evaluate after ``step``, if it is time; returns why the job ends here, or nothing.

        Raises:
            JobFailed: a score is not finite, or violated a guard.
        """
        if not (last or step % (self.settings.every or 1) == 0):
            return ""
        point = self._add_point(engine, trainer_state, step)
        scores = scores_of(point)
        broken = [f"{name} is {value}" for name, value in point["rows"].items() if not math.isfinite(value)]
        broken += [
            f"{_score_text(scores, bound.score)} (guard: {bound})"
            for bound in self.settings.bounds("guards")
            if not bound.holds(scores.get(bound.score))
        ]
        if broken:
            raise stopped(step, broken)
        if not has_ended(self.settings, point):
            return ""
        until = self.settings.bounds("until")
        return "; ".join(f"{_score_text(scores, bound.score)} (until {bound})" for bound in until)

    def _add_point(self, engine: Any, trainer_state: dict[str, Any], step: int) -> dict[str, Any]:
        """Score the model and add a point to the curve and to the log; JobFailed where it cannot be scored."""
        engine.eval()
        rows = self.rows(engine) if self.rows is not None else {}
        tasks = self.tasks() if self.tasks is not None else {"scores": [], "by_source": {}}
        engine.train()
        if tasks is None:
            raise stopped(step, ["log-probabilities of a task are not finite"])
        point = {"step": step, "rows": rows, **tasks}
        earlier = [point for point in trainer_state.get("curve", []) if point["step"] < step]
        trainer_state["curve"] = [*earlier, point]
        values = {name.replace(" ", "_"): value for name, value in scores_of(point).items() if value is not None}
        self.log.evaluation(step, **values)
        return point


def _score_text(scores: Mapping[str, float | None], name: str) -> str:
    value = scores.get(name)
    return f"{name} is {'not known' if value is None else f'{value:.4g}'}"


def stopped(step: int, reasons: Sequence[str]) -> JobFailed:
    """The error that ends a job at a guard or at a score that is not finite."""
    return JobFailed(
        f"stopped after step {step}: {'; '.join(reasons)}; the last checkpoint stands. "
        "Lower the learning rate, gamma or the number of steps, or raise alpha",
        step,
    )
