"""Activation patterns of the retain tokens, packed so that the dual of raking is a few table look-ups per token.

Shape legend: T tokens of a chunk, L MoE layers, E experts, K = top-k, S constraints (layer, expert), G columns of
a packed pattern, V values of a column.

A token's pattern a(t) in {0,1}^S says which constrained experts it selects. It is packed in the shorter of two ways:

* ``bits``: eight constraints per byte, G = ceil(S / 8), V = 256 (few constraints per layer, or few experts);
* ``index``: the trace itself, G = (layers with constraints) x K, V = E (all experts of a layer with very many).

Either way ``Σ_s θ_s a_s(t) = Σ_g table_g[column_g(t)]`` and ``Σ_t w_t a_s(t)`` is a histogram of each column folded
back to constraints, so the solver never sees a dense T × S matrix. A store keeps its columns in memory up to a limit
and in a spool file beyond it, so memory is bounded whatever the corpus.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from trace_ds.calibration.tokens import TokenMap, Trace

MAX_UNIQUE_PATTERNS = 1 << 16
MEMORY_LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class Encoding:
    """How patterns of the constraints ``layer_S, expert_S`` (sorted by layer, then expert) are packed.

    ``slot_layers`` lists the layers with constraints; ``index`` columns are (slot layer, k) in order.
    """

    layer_S: np.ndarray
    expert_S: np.ndarray
    experts: int
    top_k: int
    kind: str
    slot_layers: tuple[int, ...]

    @classmethod
    def choose(cls, constrained_LE: np.ndarray, top_k: int, kind: str | None = None) -> Encoding:
        """The encoding with fewer bytes per token; ``kind`` forces one (tests)."""
        layer_S, expert_S = np.nonzero(constrained_LE)
        slots = tuple(int(layer) for layer in np.unique(layer_S))
        experts = constrained_LE.shape[1]
        index_bytes = len(slots) * top_k * (1 if experts <= 256 else 2)
        bits_bytes = -(-len(layer_S) // 8)
        kind = kind or ("bits" if bits_bytes <= 2 * index_bytes else "index")
        return cls(layer_S, expert_S, experts, top_k, kind, slots)

    @property
    def constraints(self) -> int:
        return len(self.layer_S)

    @property
    def columns(self) -> int:
        return -(-self.constraints // 8) if self.kind == "bits" else len(self.slot_layers) * self.top_k

    @property
    def values(self) -> int:
        return 256 if self.kind == "bits" else self.experts

    @property
    def dtype(self) -> type:
        return np.uint8 if self.values <= 256 else np.uint16

    def encode(self, selected_TLK: np.ndarray) -> np.ndarray:
        """Columns [G, T] of the tokens' top-k experts."""
        tokens = len(selected_TLK)
        if self.kind == "index":
            slots_TGK = selected_TLK[:, list(self.slot_layers), :]
            return np.ascontiguousarray(slots_TGK.reshape(tokens, self.columns).T.astype(self.dtype))
        bits_ST = np.zeros((self.constraints, tokens), dtype=bool)
        for layer in self.slot_layers:
            # One contiguous array per k: comparing bytes is then a vector instruction, far faster than a look-up.
            chosen_KT = np.ascontiguousarray(selected_TLK[:, layer, :].T)
            for s in np.nonzero(self.layer_S == layer)[0]:
                expert = int(self.expert_S[s])  # a Python int: a numpy one would widen every comparison to int64
                for chosen_T in chosen_KT:
                    bits_ST[s] |= chosen_T == expert
        return np.packbits(bits_ST, axis=0, bitorder="little")

    def tables(self, theta_S: np.ndarray) -> np.ndarray:
        """float64 [G, V]: what each value of each column contributes to Σ_s θ_s a_s."""
        if self.kind == "bits":
            padded = np.zeros(self.columns * 8)
            padded[: self.constraints] = theta_S
            values_V8 = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            return np.einsum("vb,gb->gv", values_V8.astype(np.float64), padded.reshape(-1, 8))
        theta_LE = np.zeros((max(self.slot_layers, default=0) + 1, self.experts))
        theta_LE[self.layer_S, self.expert_S] = theta_S
        return np.repeat(theta_LE[list(self.slot_layers)], self.top_k, axis=0)

    def largest(self, value_S: np.ndarray) -> np.ndarray:
        """float64 [G, V]: the largest value among the constraints a column value says are active, −inf for none."""
        if self.kind == "bits":
            padded = np.full(self.columns * 8, -np.inf)
            padded[: self.constraints] = value_S
            values_V8 = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            return np.where(values_V8[None] == 1, padded.reshape(-1, 1, 8), -np.inf).max(axis=2)
        value_LE = np.full((max(self.slot_layers, default=0) + 1, self.experts), -np.inf)
        value_LE[self.layer_S, self.expert_S] = value_S
        return np.repeat(value_LE[list(self.slot_layers)], self.top_k, axis=0)

    def fold(self, histogram_GV: np.ndarray) -> np.ndarray:
        """float64 [S]: column histograms back to sums per constraint (the transpose of :meth:`tables`)."""
        if self.kind == "bits":
            values_V8 = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
            folded = np.einsum("vb,gv->gb", values_V8.astype(np.float64), histogram_GV)
            return folded.reshape(-1)[: self.constraints]
        per_layer = histogram_GV.reshape(len(self.slot_layers), self.top_k, self.experts).sum(axis=1)
        slot_S = np.searchsorted(np.array(self.slot_layers), self.layer_S)
        return per_layer[slot_S, self.expert_S]

    def unpack(self, columns_GT: np.ndarray) -> np.ndarray:
        """bool [T, S] from packed columns (for the Hessian of a sample)."""
        if self.kind == "bits":
            bits = np.unpackbits(columns_GT, axis=0, bitorder="little")[: self.constraints]
            return bits.T.astype(bool)
        tokens = columns_GT.shape[1]
        active = np.zeros((tokens, self.constraints), dtype=bool)
        slot_S = np.searchsorted(np.array(self.slot_layers), self.layer_S)
        per_slot = columns_GT.reshape(len(self.slot_layers), self.top_k, tokens)
        for s in range(self.constraints):
            active[:, s] = (per_slot[slot_S[s]] == int(self.expert_S[s])).any(axis=0)
        return active


class Store(Protocol):
    """What the solver needs: units (patterns of tokens, or whole rows) with features in [0, 1] for each constraint.

    ``exact``: few enough units for a Hessian over all of them. ``tokens``: the sum of their multiplicities.
    """

    @property
    def encoding(self) -> Encoding: ...
    @property
    def tokens(self) -> int: ...
    @property
    def exact(self) -> bool: ...

    def scored(
        self, theta_S: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, Callable[[np.ndarray], np.ndarray]]]:
        """Yield per block (Σ θ·feature float64 [N], multiplicities [N] or None, weights [N] -> Σ w·feature [S])."""

    def sample(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """(features [N, S], multiplicities float64 [N]): all units of an exact store (as long as they fit), else about
        ``limit`` at most, evenly spread and always the same."""


@dataclass
class PatternStore:
    """Packed patterns with multiplicities; iterate :meth:`blocks`.

    ``exact`` says that the blocks are the de-duplicated patterns in sorted order (few enough for a full Hessian, and
    independent of the order of the tokens bit by bit); otherwise they are the tokens in flat order.
    """

    encoding: Encoding
    tokens: int
    exact: bool
    _memory: list[np.ndarray] = field(default_factory=list)
    _multiplicity: np.ndarray | None = None
    _file: Path | None = None
    _lengths: list[int] = field(default_factory=list)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
        """Yield (columns [G, T], multiplicities float64 [T] or None for one each)."""
        if self._file is None:
            at = 0
            for columns_GT in self._memory:
                size = columns_GT.shape[1]
                yield columns_GT, None if self._multiplicity is None else self._multiplicity[at : at + size]
                at += size
            return
        encoding = self.encoding
        with self._file.open("rb") as handle:
            for size in self._lengths:
                flat: np.ndarray = np.fromfile(handle, dtype=encoding.dtype, count=encoding.columns * size)
                yield flat.reshape(encoding.columns, size), None

    def scored(
        self, theta_S: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray | None, Callable[[np.ndarray], np.ndarray]]]:
        """See :class:`Store`: Σ_s θ_s a_s(t) by table look-ups, weighted sums by histograms."""
        encoding, tables_GV = self.encoding, self.encoding.tables(theta_S)
        for columns_GT, multiplicity_T in self.blocks():
            if columns_GT.shape[1]:

                def fold(weights_T: np.ndarray, columns_GT: np.ndarray = columns_GT) -> np.ndarray:
                    return encoding.fold(histogram(columns_GT, weights_T, encoding.values))

                yield score(columns_GT, tables_GV), multiplicity_T, fold

    def sample(self, limit: int) -> tuple[np.ndarray, np.ndarray]:
        """See :class:`Store`. Inside a block the choice of tokens is seeded by the block's number."""
        if self.exact:
            blocks = list(self.blocks())
            counts = [m if m is not None else np.ones(c.shape[1]) for c, m in blocks]
            return np.concatenate([self.encoding.unpack(c) for c, _ in blocks]), np.concatenate(counts)
        fraction = min(1.0, limit / max(self.tokens, 1))
        active = []
        for number, (columns_GT, _) in enumerate(self.blocks()):
            size = columns_GT.shape[1]
            take = int(np.ceil(size * fraction))
            chosen = np.sort(np.random.default_rng(number).permutation(size)[:take])
            active.append(self.encoding.unpack(np.ascontiguousarray(columns_GT[:, chosen])))
        return np.concatenate(active), np.ones(sum(len(a) for a in active))

    @classmethod
    def from_selections(
        cls, selected_TLK: np.ndarray, constrained_LE: np.ndarray, multiplicity_T: np.ndarray
    ) -> PatternStore:
        """A de-duplicated store of tokens held in memory; the order of the tokens does not matter."""
        encoding = Encoding.choose(constrained_LE, selected_TLK.shape[2])
        columns, counts = _merge(encoding.encode(selected_TLK), multiplicity_T)
        return cls(encoding, round(float(counts.sum())), len(counts) <= MAX_UNIQUE_PATTERNS, [columns], counts)

    @classmethod
    def from_activations(cls, active_TS: np.ndarray, multiplicity_T: np.ndarray | None = None) -> PatternStore:
        """A store from a dense 0/1 matrix (small problems, tests): its columns are constraints of one layer, which has
        one more expert, so that nothing is known of their sum."""
        constraints = active_TS.shape[1]
        encoding = Encoding.choose(np.arange(constraints + 1)[None] < constraints, constraints, "bits")
        columns = np.packbits(active_TS.astype(bool).T, axis=0, bitorder="little")
        counts = np.ones(len(active_TS)) if multiplicity_T is None else np.asarray(multiplicity_T, np.float64)
        columns, counts = _merge(columns, counts)
        return cls(encoding, int(counts.sum()), len(counts) <= MAX_UNIQUE_PATTERNS, [columns], counts)


def score(columns_GT: np.ndarray, tables_GV: np.ndarray) -> np.ndarray:
    """float64 [T]: Σ_g table_g[column_g(t)], added in the order of g."""
    result_T = np.zeros(columns_GT.shape[1])
    for column_T, table_V in zip(columns_GT, tables_GV, strict=True):
        result_T += table_V.take(column_T)
    return result_T


def histogram(columns_GT: np.ndarray, weights_T: np.ndarray, values: int) -> np.ndarray:
    """float64 [G, V]: weighted histogram of each column."""
    result_GV = np.empty((len(columns_GT), values))
    for row_V, column_T in zip(result_GV, columns_GT, strict=True):
        row_V[:] = np.bincount(column_T, weights_T, values)
    return result_GV


def _merge(columns_GU: np.ndarray, counts_U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Unique patterns in sorted (byte-wise) order with summed multiplicities."""
    rows = np.ascontiguousarray(columns_GU.T)
    keys = rows.view(np.dtype((np.void, rows.dtype.itemsize * rows.shape[1]))).ravel()
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.ascontiguousarray(columns_GU[:, first]), np.bincount(inverse, counts_U, len(first))


def build_store(
    trace: Trace,
    tokens: TokenMap,
    constrained_LE: np.ndarray,
    spool: Path,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
    kind: str | None = None,
) -> tuple[PatternStore, PatternStore]:
    """One pass over the trace: (the store of every counted token, the store to solve on).

    The second is the de-duplicated one when there are at most :data:`MAX_UNIQUE_PATTERNS` patterns, else the first.
    """
    encoding = Encoding.choose(constrained_LE, trace.top_k, kind)
    every = PatternStore(encoding, 0, False)
    unique: tuple[np.ndarray, np.ndarray] | None = (
        np.zeros((encoding.columns, 0), encoding.dtype),
        np.zeros(0),
    )
    held_bytes = 0
    for _, _, _, selected_TLK in trace.chunks(tokens):
        columns_GT = encoding.encode(selected_TLK)
        every.tokens += columns_GT.shape[1]
        every._lengths.append(columns_GT.shape[1])
        held_bytes += columns_GT.nbytes
        if every._file is None and held_bytes > memory_limit_bytes:
            every._file = spool / "patterns.bin"
            every._file.write_bytes(b"".join(block.tobytes() for block in every._memory))
            every._memory = []
        if every._file is None:
            every._memory.append(columns_GT)
        else:
            with every._file.open("ab") as handle:
                handle.write(columns_GT.tobytes())
        if unique is not None and encoding.constraints:
            fresh_GU, counts_U = _merge(columns_GT, np.ones(columns_GT.shape[1]))
            unique = _merge(np.concatenate([unique[0], fresh_GU], axis=1), np.concatenate([unique[1], counts_U]))
            if (len(unique[1]) > MAX_UNIQUE_PATTERNS // 2 and 2 * len(unique[1]) > every.tokens) or (
                len(unique[1]) > MAX_UNIQUE_PATTERNS
            ):
                unique = None
    if unique is None or not encoding.constraints:
        return every, every
    return every, PatternStore(encoding, every.tokens, True, [unique[0]], unique[1])
