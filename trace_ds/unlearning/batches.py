"""The data of a step: micro-batches of forget and retain rows, in one tensor, with their weights; for fine-tuning, rows
of any corpora. Which rows a step sees is a pure function of (seed, step), so resuming and changes of the world
size leave the data as they are.

Shape legend: F forget rows, R retain rows, B = F + R, S positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from trace_ds.config.sections.training import FinetuneSettings
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.corpora.dataset import Batch, FlatArray, TokenDataset
from trace_ds.parallel.device import to_device

FORGET_STREAM, RETAIN_STREAM, CORPUS_STREAM, GRIP_STREAM = 1, 2, 3, 4


def generator(seed: int, stream: int, counter: int) -> np.random.Generator:
    """A counter-based generator: independent for every (seed, stream, counter), no state to save."""
    # Drawing increments Philox's lowest counter word, so streams with different highest words never overlap.
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))


@dataclass(frozen=True)
class EpochRows:
    """Every row once per epoch, reshuffled for each epoch."""

    rows: np.ndarray
    per_step: int
    seed: int
    stream: int
    _orders: dict[int, np.ndarray] = field(default_factory=dict, init=False, repr=False, compare=False)

    def at(self, step: int) -> np.ndarray:
        """Row numbers of ``step`` (0-based), int64 [per_step]."""
        positions = np.arange(step * self.per_step, (step + 1) * self.per_step)
        # a step may lie in two epochs, or in more where a corpus has fewer rows than a step
        epochs, places = np.divmod(positions, len(self.rows))
        for epoch in {int(epoch) for epoch in epochs}.difference(self._orders):
            self._orders[epoch] = generator(self.seed, self.stream, epoch).permutation(self.rows)
        rows = np.array([self._orders[int(epoch)][place] for epoch, place in zip(epochs, places, strict=True)])
        # an order is as long as the corpus: keep only those of this step's epochs
        for epoch in set(self._orders).difference(int(epoch) for epoch in epochs):
            del self._orders[epoch]
        return rows


class SampledRows:
    """Rows drawn with replacement in proportion to a weight: row i has expected share ``weights[i] / Σ weights``.

    The draws of a step are stratified over the cumulative weights (one in each of ``per_step`` equal strata), which
    keeps every row's expected share exact and lowers the variance; uniform weights go through the same sampler, so a
    comparison differs in the weights only.
    """

    def __init__(self, rows: np.ndarray, weights_R: np.ndarray, per_step: int, seed: int, stream: int) -> None:
        if not (weights_R >= 0).all() or not weights_R.sum() > 0:
            raise ValueError("row weights must be non-negative with a positive sum")
        self._rows = rows
        self._cumulative_R = np.cumsum(weights_R, dtype=np.float64)
        self._per_step, self._seed, self._stream = per_step, seed, stream

    def at(self, step: int) -> np.ndarray:
        """Row numbers of ``step`` (0-based), int64 [per_step]."""
        draws = generator(self._seed, self._stream, step).random(self._per_step)
        points = (np.arange(self._per_step) + draws) / self._per_step * self._cumulative_R[-1]
        places = np.searchsorted(self._cumulative_R, points, side="right")
        # rounding can push a point to the total, past the last row
        return self._rows[np.minimum(places, len(self._rows) - 1)]


def micro_batches(largest: int, micro_rows: int | None, world_size: int) -> int:
    """Gradient accumulation steps for ``largest`` rows a step, the same on every rank, for every step."""
    per_rank = -(-largest // world_size)
    return -(-per_rank // (micro_rows or per_rank))


def share_of_rank(rows: np.ndarray, rank: int, world_size: int, count: int) -> np.ndarray:
    """This rank's rows of a step in ``count`` equal micro-batches [count, rows], padded with -1 (empty rows)."""
    per_rank = -(-len(rows) // world_size)
    own = rows[rank::world_size]
    filled = np.full(count * -(-per_rank // count), -1, dtype=np.int64)
    filled[: len(own)] = own
    return filled.reshape(count, -1)


@dataclass(frozen=True)
class MicroBatch:
    """Forget rows first, retain rows after them, one forward pass.

    Attributes:
        input_ids_BS, position_ids_BS: int64, as in :class:`trace_ds.corpora.dataset.Batch`; the positions stay on the
            host, where a pass looks for the documents.
        counted_BS: bool, loss-bearing positions.
        weights_BS: fp32, retain weight of each position (1 where the weights act by sampling);
            0 in forget rows.
        reference_nll_BS: fp32, the frozen model's losses of the forget rows (zeros when not recorded).
        forget_rows: F.
        alternative: the rows preferred to the forget rows, one for each (dpo), in the same shape.
        counted_2N: int64, rows and columns of the counted positions in order, the first ``forget_counted`` of them in
            the forget rows; computed on the host, since on a device this would force a sync.
    """

    input_ids_BS: torch.Tensor
    position_ids_BS: torch.Tensor
    counted_BS: torch.Tensor
    weights_BS: torch.Tensor
    reference_nll_BS: torch.Tensor
    forget_rows: int
    alternative: MicroBatch | None = None
    counted_2N: torch.Tensor = None  # type: ignore[assignment]
    forget_counted: int = -1

    def __post_init__(self) -> None:
        if self.counted_2N is None:
            object.__setattr__(self, "counted_2N", self.counted_BS.nonzero().T.contiguous())
            object.__setattr__(self, "forget_counted", int(self.counted_BS[: self.forget_rows].sum()))

    def to(self, device: torch.device) -> MicroBatch:
        """The same rows on ``device``; the host does not wait."""
        moved: dict[str, Any] = {
            name: to_device(value, device)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor) and name != "position_ids_BS"
        }
        if self.alternative is not None:
            moved["alternative"] = self.alternative.to(device)
        return replace(self, **moved)


@dataclass(frozen=True)
class Step:
    """One optimizer step: this rank's micro-batches and the global counts the sums are divided by."""

    micro_batches: list[MicroBatch]
    forget_tokens: int
    forget_sequences: int
    retain_tokens: int

    @property
    def tokens(self) -> int:
        """Loss-bearing tokens of the step over all ranks."""
        return self.forget_tokens + self.retain_tokens


class Batches:
    """The data of the job: any step, on any rank, as a pure function of the seed and the step.

    Args:
        seed: the seed of the run.
        forget, retain: token datasets.
        token_weights: fp32 weights of all retain tokens in flat order; None: 1 each.
        row_weights_R: mean weights of the retain rows; rows of weight 0 are never seen. With ``apply:
            sampling`` rows are drawn in proportion, else each comes once per epoch.
        reference_nll: the frozen model's losses of the forget tokens, or None.
        alternative, alternative_nll: dpo: the corpus preferred to the forget rows and the frozen model's losses of it.
    """

    def __init__(
        self,
        settings: UnlearningConfig,
        seed: int,
        forget: TokenDataset,
        retain: TokenDataset,
        token_weights: FlatArray | None,
        row_weights_R: np.ndarray,
        reference_nll: FlatArray | None,
        alternative: TokenDataset | None = None,
        alternative_nll: FlatArray | None = None,
    ) -> None:
        self._forget, self._retain = forget, retain
        self._token_weights, self._reference_nll = token_weights, reference_nll
        self._counted_forget = forget.counted_per_row()
        self._counted_retain = retain.counted_per_row()
        usable_forget = np.flatnonzero(self._counted_forget)
        usable_retain = np.flatnonzero((self._counted_retain > 0) & (row_weights_R > 0))
        self._forget_rows = EpochRows(usable_forget, settings.forget_rows, seed, FORGET_STREAM)
        self._retain_rows: EpochRows | SampledRows
        if settings.apply == "loss":
            self._retain_rows = EpochRows(usable_retain, settings.retain_rows, seed, RETAIN_STREAM)
        else:
            self._retain_rows = SampledRows(
                usable_retain, row_weights_R[usable_retain], settings.retain_rows, seed, RETAIN_STREAM
            )
        self._settings = settings
        self._alternative, self._alternative_nll = alternative, alternative_nll
        self._usable_alternative = np.flatnonzero(alternative.counted_per_row()) if alternative else np.zeros(0, int)

    def micro_batches_per_step(self, world_size: int) -> int:
        settings = self._settings
        return micro_batches(max(settings.forget_rows, settings.retain_rows), settings.micro_batch_rows, world_size)

    def at(self, step: int, rank: int, world_size: int) -> Step:
        """The data of optimizer step ``step`` (0-based) for one rank."""
        forget_rows, retain_rows = self._forget_rows.at(step), self._retain_rows.at(step)
        count = self.micro_batches_per_step(world_size)
        shares = (share_of_rank(rows, rank, world_size, count) for rows in (forget_rows, retain_rows))
        return Step(
            [self._micro_batch(forget, retain) for forget, retain in zip(*shares, strict=True)],
            forget_tokens=int(self._counted_forget[forget_rows].sum()),
            forget_sequences=len(forget_rows),
            retain_tokens=int(self._counted_retain[retain_rows].sum()),
        )

    def _micro_batch(self, forget_rows: np.ndarray, retain_rows: np.ndarray) -> MicroBatch:
        sides = [(self._forget, forget_rows), (self._retain, retain_rows)]
        if self._alternative is not None:  # row i's is row i modulo their number
            usable = self._usable_alternative
            sides.append((self._alternative, np.where(forget_rows < 0, -1, usable[forget_rows % len(usable)])))
        # at least 1: a rank without rows runs the same passes as the others, on filling
        length = max(1, *(_length(corpus, row) for corpus, rows in sides for row in rows))
        forget, retain, *alternatives = (corpus.batch(rows.tolist(), 0, length) for corpus, rows in sides)
        alternative = None
        if alternatives and self._alternative_nll is not None:
            reference = _rows_of(self._alternative_nll, *sides[2], length)
            alternative = _micro_batch_of(alternatives[0], torch.zeros(reference.shape), reference, len(forget_rows))
        weights_RS = retain.counted_BS.float()
        if self._token_weights is not None:
            weights_RS = _rows_of(self._token_weights, *sides[1], length)
        reference_FS = torch.zeros(forget.counted_BS.shape)
        if self._reference_nll is not None:
            reference_FS = _rows_of(self._reference_nll, *sides[0], length)
        together = Batch(*(torch.cat(pair) for pair in zip(vars(forget).values(), vars(retain).values(), strict=True)))
        weights_BS = torch.cat([torch.zeros(forget.counted_BS.shape), weights_RS])
        reference_BS = torch.cat([reference_FS, torch.zeros(weights_RS.shape)])
        return _micro_batch_of(together, weights_BS, reference_BS, len(forget_rows), alternative)


def _micro_batch_of(
    batch: Batch,
    weights_BS: torch.Tensor,
    reference_BS: torch.Tensor,
    forget_rows: int,
    alternative: MicroBatch | None = None,
) -> MicroBatch:
    tensors = batch.input_ids_BS, batch.position_ids_BS, batch.counted_BS, weights_BS, reference_BS
    return MicroBatch(*tensors, forget_rows, alternative)


@dataclass(frozen=True)
class CorpusStep:
    """One optimizer step of fine-tuning: this rank's micro-batches and the global count of their tokens."""

    micro_batches: list[Batch]
    tokens: int


class CorpusBatches:
    """Rows of some corpora, numbered through: each comes once per epoch, in an order shuffled anew for each.

    Any step, on any rank, is a pure function of the seed and the step.
    """

    def __init__(self, settings: FinetuneSettings, seed: int, corpora: Sequence[TokenDataset]) -> None:
        self._settings, self._corpora = settings, corpora
        self._counted = np.concatenate([corpus.counted_per_row() for corpus in corpora])
        self._starts = np.cumsum([0, *(len(corpus) for corpus in corpora[:-1])])
        usable = np.flatnonzero(self._counted)
        self._rows = EpochRows(usable, settings.batch_rows, seed, CORPUS_STREAM)
        self.steps = settings.steps or math.ceil((settings.epochs or 1) * len(usable) / settings.batch_rows)

    def micro_batches_per_step(self, world_size: int) -> int:
        return micro_batches(self._settings.batch_rows, self._settings.micro_batch_rows, world_size)

    def at(self, step: int, rank: int, world_size: int) -> CorpusStep:
        """The data of optimizer step ``step`` (0-based) for one rank."""
        rows = self._rows.at(step)
        shares = share_of_rank(rows, rank, world_size, self.micro_batches_per_step(world_size))
        return CorpusStep([self._batch(share) for share in shares], tokens=int(self._counted[rows].sum()))

    def _batch(self, rows: np.ndarray) -> Batch:
        """The rows of one share; an empty row where it has none, so that every process takes part in every pass."""
        rows = rows[rows >= 0]
        places = np.searchsorted(self._starts, rows, side="right") - 1
        numbers = zip(places, rows - self._starts[places], strict=True)
        chosen = [(self._corpora[place], int(row)) for place, row in numbers] or [(self._corpora[0], -1)]
        length = max(1, *(_length(*each) for each in chosen))
        parts = [corpus.batch([row], 0, length) for corpus, row in chosen]
        return Batch(*(torch.cat(tensors) for tensors in zip(*(vars(part).values() for part in parts), strict=True)))


def _length(dataset: TokenDataset, row: int) -> int:
    return int(dataset.row_starts_R1[row + 1] - dataset.row_starts_R1[row]) if row >= 0 else 0


def _rows_of(array: FlatArray, dataset: TokenDataset, rows: np.ndarray, length: int) -> torch.Tensor:
    """Values of tokens [rows, length] of some rows, 0 where a row is shorter or empty."""
    result = np.zeros((len(rows), length), dtype=np.float32)
    for number, row in enumerate(rows):
        if row >= 0:
            values = array[slice(*dataset.row_starts_R1[row : row + 2])]
            result[number, : len(values)] = values
    return torch.from_numpy(result)
