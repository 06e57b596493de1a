"""Live weights whose θ is solved anew every N steps, on the routing of the rows of those steps under the present model.

The rows are taken again with one forward pass without gradient (as many of the last N steps, evenly spaced, as make up
:data:`REFRESH_TOKENS` retain tokens; at least one), not collected while training: all patterns are of one model, and
nothing but θ needs to be in a checkpoint. Where rows were drawn by weight, each stands for 1/weight rows, so that the
dual is that of the corpus. The main process solves, every rank gets its result (our decisions).

Shape legend: N tokens, R rows, L MoE layers, E experts, K = top-k.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from trace_ds.parallel.world import World
from trace_ds.routing.token_files import trace_dtype
from trace_ds.run.artefact import Artefact
from trace_ds.unlearning.batches import Batches, MicroBatch
from trace_ds.unlearning.forward import forward
from trace_ds.unlearning.live_weights import LiveWeights

REFRESH_TOKENS = 1 << 16


class RefreshedWeights(LiveWeights):
    """See the module's docstring. ``scope_LE``: bool, the experts of the calibration."""

    def __init__(self, *arguments: Any, every: int, scope_LE: np.ndarray, calibration: Artefact) -> None:
        super().__init__(*arguments)
        self._every, self._scope_LE = every, scope_LE
        self._clip, self._ess_floor = (float(calibration.settings[name]) for name in ("clip", "ess_floor"))
        self._level = calibration.settings["level"]
        self._inverse = calibration.settings["rule"] == "inverse"

    def end_step(self, engine: Any, world: World, batches: Batches, done: int) -> None:
        if done % self._every or not self._scope_LE.any():
            return
        forget_LE = np.zeros(self._scope_LE.shape, np.int64)
        forget_tokens = 0
        retain: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        engine.eval()
        for step in self._steps(batches, world, done):
            data = batches.at(step, world.rank, world.size)
            forget_tokens += data.forget_tokens
            for micro_batch in data.micro_batches:
                batch = micro_batch.to(world.device)
                with torch.no_grad(), self.recording():
                    forward(engine, batch.input_ids_BS, batch.position_ids_BS, last=True)
                self._count(batch, forget_LE)
                retain.append(self._patterns(batch))
        engine.train()
        mine = [np.concatenate(column) for column in zip(*retain, strict=True)]
        every = [np.concatenate(column) for column in zip(*world.gather(mine), strict=True)]
        forget_LE = world.sum_int64(forget_LE)
        solved = world.broadcast_agreed(lambda: self._solve(forget_LE / max(forget_tokens, 1), *every))
        self.set(*solved)

    def _steps(self, batches: Batches, world: World, done: int) -> list[int]:
        tokens = max(batches.at(done - 1, world.rank, world.size).retain_tokens, 1)
        count = min(max(REFRESH_TOKENS // tokens, 1), self._every)
        return [done - 1 - (number * self._every) // count for number in range(count)]

    def _count(self, batch: MicroBatch, forget_LE: np.ndarray) -> None:
        counted_FS = batch.counted_BS[: batch.forget_rows]
        for layer, counts_E in enumerate(forget_LE):
            chosen = self.indices(layer, batch)[: batch.forget_rows][counted_FS]
            counts_E += torch.bincount(chosen.reshape(-1), minlength=len(counts_E)).cpu().numpy()

    def _patterns(self, batch: MicroBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(selected [N, L, K], multiplicity [N] float64, counted tokens of each row [R]) of the retain rows."""
        split = batch.forget_rows
        counted_RS = batch.counted_BS[split:]
        layers = [self.indices(layer, batch)[split:][counted_RS] for layer in range(len(self.theta_LE))]
        selected_NLK = torch.stack(layers, dim=1).cpu().numpy().astype(trace_dtype(self.theta_LE.shape[1]))
        weight_N = batch.weights_BS[split:][counted_RS].double().cpu().numpy()
        return selected_NLK, weight_N, counted_RS.sum(1).cpu().numpy()

    def _solve(
        self, forget_LE: np.ndarray, selected_NLK: np.ndarray, weight_N: np.ndarray, sizes_R: np.ndarray
    ) -> tuple[np.ndarray, float]:
        from trace_ds.calibration.raking import rake
        from trace_ds.calibration.rows import RowStore, count_by_row
        from trace_ds.calibration.rules import row_exponent
        from trace_ds.calibration.units import TokenUnits, Units, evaluate
        from trace_ds.calibration.weights import largest_exponent

        units: Units = TokenUnits.of(selected_NLK, self._scope_LE, weight_N)
        if self._per_row:
            sizes_R = sizes_R[sizes_R > 0]
            row_N = np.repeat(np.arange(len(sizes_R)), sizes_R)
            counts_RS = count_by_row(self._scope_LE, selected_NLK, row_N, len(sizes_R))
            first_R = np.cumsum(sizes_R) - sizes_R
            units = RowStore(self._scope_LE, counts_RS, sizes_R.astype(np.float64), weight_N[first_R])
        solving = units if self._level == "sequence" else TokenUnits.of(selected_NLK, self._scope_LE, weight_N)
        retain_S = evaluate(solving, np.zeros(int(self._scope_LE.sum()))).frequency_S
        theta_S = rake(solving, forget_LE[self._scope_LE], retain_S, self._clip, self._ess_floor).theta_S
        if self._inverse:  # the control stays one: turned round and flattened as in the calibration
            theta_S = -theta_S
            theta_S *= largest_exponent(lambda c: evaluate(units, c * theta_S).ess, self._ess_floor)
        if isinstance(units, RowStore) and self._level == "row":
            theta_S *= row_exponent(units.scores(theta_S), self._ess_floor, weight_N[first_R])
        theta_LE = np.zeros(self._scope_LE.shape)
        theta_LE[self._scope_LE] = theta_S
        return theta_LE, evaluate(units, theta_S).log_mean
