"""Looking at the model while it is trained: scores of fixed rows, and what follows from them.

The training losses cannot tell: RMU's retain loss starts at 0, and one batch is noise. So the same rows of both corpora
(evenly spaced, seen in training too) go through the sharded model every few steps: mean NLL, and how many of the top-k
experts are still those of the frozen model, whose choices ``collect`` recorded for a sample of tokens (all of them, in
a corpus of no more). Sums are global, so any world size
gives the same numbers up to rounding.

Shape legend: B rows, S positions, N sampled tokens, L MoE layers, K top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from trace_ds.checkpoints.manifest import REACHED
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import JobFailed
from trace_ds.models.routers import find_routers, record_routing
from trace_ds.parallel.world import World
from trace_ds.routing.token_files import SampledRouting
from trace_ds.run.log import StageLog
from trace_ds.unlearning.goals import next_token_nll


@dataclass(frozen=True)
class HeldRows:
    """The rows of one corpus that are looked at; ``frozen``: the frozen model's routing of sampled tokens, or None."""

    dataset: TokenDataset
    rows: np.ndarray
    frozen: SampledRouting | None

    @classmethod
    def of(cls, dataset: TokenDataset, count: int, frozen: SampledRouting | None) -> HeldRows:
        """``count`` evenly spaced rows among those with a counted token."""
        usable = np.flatnonzero(dataset.counted_per_row())
        places = np.linspace(0, len(usable) - 1, min(count, len(usable))).round().astype(np.int64)
        return cls(dataset, usable[places], frozen)

    def before(self, rows: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray] | None:
        """(places in a batch of ``rows`` of ``length`` positions, experts [N, L, K]) of their sampled tokens; None when
        there is none. Rows of -1 are filling."""
        starts = self.dataset.row_starts_R1
        found = [
            (number * length + positions_N, experts_NLK)
            for number, row in enumerate(rows)
            if row >= 0 and self.frozen is not None
            for positions_N, experts_NLK in [self.frozen.within(*starts[row : row + 2])]
            if len(positions_N)
        ]
        if not found:
            return None
        return np.concatenate([places_N for places_N, _ in found]), np.concatenate([before for _, before in found])


class Evaluator:
    """Scores of the held rows of each side (collective).

    Args:
        batch_rows: rows per process and forward pass.
    """

    def __init__(self, sides: Mapping[str, HeldRows], world: World, batch_rows: int) -> None:
        self._sides, self._world, self._batch_rows = sides, world, batch_rows

    def __call__(self, engine: Any) -> dict[str, float]:
        """``{side}_nll`` (nats a token) and, of the sampled tokens, ``{side}_overlap`` (share of the top-k, 0 to 1)."""
        engine.eval()
        with torch.no_grad():
            sums = np.stack([self._sums(engine, held) for held in self._sides.values()])
        engine.train()
        totals = self._world.sum_float64(sums)
        found = {}
        for side, (nll_sum, tokens, common, slots) in zip(self._sides, totals, strict=True):
            found[f"{side}_nll"] = float(nll_sum / tokens)
            if slots:
                found[f"{side}_overlap"] = float(common / slots)
        return found

    def _sums(self, engine: Any, held: HeldRows) -> np.ndarray:
        """This rank's [Σ NLL, counted tokens, experts in common, experts chosen] as float64."""
        mine = held.rows[self._world.rank :: self._world.size]
        passes = math.ceil(len(held.rows) / (self._world.size * self._batch_rows))  # the same on every rank
        filled = np.full(passes * self._batch_rows, -1, dtype=np.int64)
        filled[: len(mine)] = mine
        sums = np.zeros(4)
        layers = len(find_routers(engine.module))
        for rows in filled.reshape(passes, self._batch_rows):
            batch = held.dataset.batch(rows.tolist(), pad_id=0)
            with record_routing(engine.module) as recorder:
                nll_N = next_token_nll(engine, batch, self._world.device)
            counted = batch.counted_BS.reshape(-1)
            sums[:2] += [float(nll_N.double().sum()), int(counted.sum())]
            before = held.before(rows, batch.counted_BS.shape[1])
            if before is None:
                continue
            places_N, before_NLK = before
            after_LTK = torch.stack([recorder.layer(layer)[1] for layer in range(layers)]).cpu().numpy()
            for layer in range(layers):
                after_NK = after_LTK[layer, places_N]
                common_N = (before_NLK[:, layer, :, None] == after_NK[:, None, :]).any(2).sum(1)
                sums[2:] += [common_N.sum(), after_NK.size]
        return sums


@dataclass(frozen=True)
class Verdict:
    """What an evaluation means for the job: go_on, finish (the target is reached), back_off or stop, and why."""

    action: str
    reason: str = ""


def judge(
    settings: UnlearningConfig, start: Mapping[str, float], found: Mapping[str, float], back_offs: int, *, last: bool
) -> Verdict:
    """The verdict on an evaluation; pure. A model that breaks a bound has not reached its target.

    A score that is not finite stops the job whatever the guards say: a smaller learning rate brings no number back.

    Args:
        start: the evaluation of the frozen model.
        back_offs: halvings of the learning rate so far.
        last: no step follows in which a smaller learning rate could help.
    """
    guards = settings.guards
    ruined = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
    broken = broken_bounds(settings, start, found)
    if ruined or broken:
        can_back_off = guards.action == "back_off" and back_offs < guards.max_back_offs and not (ruined or last)
        return Verdict("back_off" if can_back_off else "stop", "; ".join(ruined + broken))
    target = settings.evaluate.target_forget_nll
    if target is not None and found["forget_nll"] >= target:
        return Verdict("finish", f"the forget NLL is {found['forget_nll']:.4g} (target {target:g})")
    return Verdict("go_on")


def low_enough(until: Mapping[str, float], scores: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The scores that end a job (``unlearning.evaluate.until``); empty unless each is there and low enough."""
    found = {f"{score['task']} {score['metric']}": score["value"] for score in scores}
    low = all(found.get(name) is not None and found[name] <= most for name, most in until.items())
    return {name: found[name] for name in until} if low else {}


def broken_bounds(settings: UnlearningConfig, start: Mapping[str, float], found: Mapping[str, float]) -> list[str]:
    """A line for each guard that an evaluation breaks."""
    guards, broken = settings.guards, []
    ratio = found["retain_nll"] / start["retain_nll"]
    if guards.max_retain_ratio is not None and ratio > guards.max_retain_ratio:
        broken.append(f"the retain NLL is {ratio:.3g} times the frozen model's (bound {guards.max_retain_ratio:g})")
    overlap = found.get("retain_overlap", 1.0)
    if guards.min_retain_overlap is not None and overlap < guards.min_retain_overlap:
        broken.append(
            f"only {overlap:.3g} of the retain tokens' experts are still the frozen model's "
            f"(bound {guards.min_retain_overlap:g})"
        )
    return broken


@dataclass(frozen=True)
class Watch:
    """Looks at the model of an unlearning job while it trains (collective).

    The job's ``cursor``, which its checkpoints keep, holds the frozen model's scores, what evaluations have led to and
    the curve: ``{"step", "scores", "by_source"}`` of every look, where ``score_tasks`` scores tasks on the model as it
    is (all of them when told that the look is the last one); None: their log-probabilities are not finite.
    """

    evaluator: Evaluator
    settings: UnlearningConfig
    log: StageLog
    score_tasks: Callable[[bool], dict[str, Any] | None] | None = None

    @property
    def curve_only(self) -> bool:
        return self.settings.evaluate.curve_only

    @property
    def _judges(self) -> bool:
        """Whether a verdict can be another than to go on; of a curve alone nothing else is asked."""
        return not self.curve_only or self.settings.guards.on or self.settings.evaluate.target_forget_nll is not None

    def begin(self, engine: Any, cursor: dict[str, Any], step: int) -> None:
        """Score the frozen model, unless an earlier start of the job has; it goes on, so no target is reached."""
        for reached in REACHED:
            cursor.pop(reached, None)
        if "evaluation_start" not in cursor and self._judges:
            start = cursor["evaluation_start"] = self.evaluator(engine)
            self.log.evaluation(step, **start)
            if not self.curve_only:  # its study has the scores of the original
                self._score(engine, cursor, step, last=False)

    def _score(self, engine: Any, cursor: dict[str, Any], step: int, *, last: bool) -> bool:
        """Add a point to the curve, in the place of one of this step (of the model before its last change); whether it
        could be scored."""
        if self.score_tasks is None:
            return True
        engine.eval()
        found = self.score_tasks(last)
        engine.train()
        if found is None:
            return False
        before = [point for point in cursor.get("curve", []) if point["step"] < step]
        cursor["curve"] = [*before, {"step": step, **found}]
        told = {f"{score['task']}_{score['metric']}": score["value"] for score in found["scores"]}
        self.log.evaluation(step, **{name: value for name, value in told.items() if value is not None})
        return True

    def look(self, engine: Any, cursor: dict[str, Any], done: int, *, last: bool) -> Verdict | None:
        """Evaluate after step ``done``, if one is due, and act on it; what it means for the job.

        Raises:
            JobFailed: a guard is broken.
        """
        every = self.settings.evaluate.every
        if not every or not (last or done % every == 0):
            return None
        verdict, found = Verdict("go_on"), dict[str, float]()
        if self._judges:
            found = self.evaluator(engine)
            self.log.evaluation(done, **found)
            verdict = judge(self.settings, cursor["evaluation_start"], found, cursor.get("back_offs", 0), last=last)
        if not self._score(engine, cursor, done, last=last or verdict.action == "finish"):
            verdict = Verdict("stop", "log-probabilities of a task are not finite")
        until = self.settings.evaluate.until
        if verdict.action == "go_on" and until and (low := low_enough(until, cursor["curve"][-1]["scores"])):
            told = ", ".join(f"{name} is {value:.4g} (target {until[name]:g})" for name, value in low.items())
            verdict, cursor["reached_scores"] = Verdict("finish", told), low
        if verdict.action == "stop":
            raise JobFailed(
                f"stopped after step {done}: {verdict.reason}; the last checkpoint stands. "
                "Lower the learning rate, gamma or the number of steps, or raise alpha",
                done,
            )
        if verdict.action == "back_off":
            cursor["back_offs"] = cursor.get("back_offs", 0) + 1
            self.log.line(f"WARNING after step {done}: {verdict.reason}; halving the learning rate")
        if verdict.action == "finish":
            if "forget_nll" in found:
                cursor["reached_forget_nll"] = found["forget_nll"]
            if not last:
                self.log.line(f"finished early, after step {done} of {self.settings.steps}: {verdict.reason}")
        return verdict

    def broken(self, engine: Any, cursor: dict[str, Any], verdict: Verdict | None) -> str:
        """Why the present state must not be saved (empty: it may be), by this step's evaluation or by one made now.

        One made now acts on nothing else: what a job computes does not depend on when it is saved or stopped.
        """
        if verdict is not None:
            return verdict.reason if verdict.action == "back_off" else ""
        if not self.settings.guards.on:
            return ""
        return "; ".join(broken_bounds(self.settings, cursor["evaluation_start"], self.evaluator(engine)))
