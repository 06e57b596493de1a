"""Routing statistics of one corpus: how often each expert is selected, exactly, with document-clustered errors.

Shape legend: L MoE layers, E experts, K = top-k.

For a corpus with n counted tokens in D documents, ``c_dle`` is the number of counted tokens of document d that select
expert e in layer l and ``n_d`` the document's counted tokens. The activation frequency is the ratio estimator
``p_le = Σ_d c_dle / Σ_d n_d``. Tokens of a document are correlated, so its variance is the linearised (Taylor)
variance of a ratio under cluster sampling (Cochran, *Sampling Techniques*, 3rd ed., ch. 6 and 9A):

    Var(p) = D*/(D*−1) · Σ_d (c_d − p n_d)² / n²,   Σ_d (c_d − p n_d)² = S_cc − 2 p S_cn + p² S_nn

with D* = n² / S_nn, Kish's effective number of documents (*Survey Sampling*, 1965, §11.7): D where all are equally
long, and far fewer where a few long ones hold most of the tokens. A document weighs as it is long, and with D in the
place of D* (the textbook's form for equal clusters) such corpora get errors that are too small. All this
needs only the additive moments S_cc = Σ c_d², S_cn = Σ c_d n_d and S_nn = Σ n_d²: integers, so they are
identical whatever the world size, expert-parallel size, batch size or order.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from trace_ds.run.files import safetensors_errors
from trace_ds.run.foreign import reading


@dataclass(frozen=True)
class RoutingStatistics:
    """Additive sums over one corpus (see the module's docstring). All arrays are indexed [layer, expert].

    Attributes:
        counts_LE: int64, counted tokens that select the expert; each row sums to ``top_k · tokens``.
        gate_mass_LE: float64, sum over counted tokens of the expert's gate weight (0 when not selected).
        square_LE: int64, S_cc = Σ_d c_d².
        cross_LE: int64, S_cn = Σ_d c_d n_d.
        square_tokens: int, S_nn = Σ_d n_d².
        tokens: int, n = counted (loss-bearing) tokens.
        documents: int, D = documents with at least one counted token.
        top_k: int, K.
        row_gate_LE: float64, sum over the rows of the mean gate weight of a row's counted tokens (None: not counted).
    """

    counts_LE: np.ndarray
    gate_mass_LE: np.ndarray
    square_LE: np.ndarray
    cross_LE: np.ndarray
    square_tokens: int
    tokens: int
    documents: int
    top_k: int
    row_gate_LE: np.ndarray | None = None

    @property
    def frequency_LE(self) -> np.ndarray:
        """p_le, float64; Σ_e p_le = K."""
        return self.counts_LE / max(self.tokens, 1)

    @property
    def effective_documents(self) -> float:
        """D* = n² / S_nn, between 1 and D: how many documents of equal length would say as much (Kish 1965)."""
        return self.tokens**2 / max(self.square_tokens, 1)

    def variance_LE(self) -> np.ndarray:
        """Document-clustered variance of p_le, float64 (formula above); infinite with fewer than two documents."""
        if self.documents < 2:
            return np.full(self.counts_LE.shape, np.inf)
        p_LE = self.frequency_LE
        residual_LE = self.square_LE - 2.0 * p_LE * self.cross_LE + p_LE**2 * float(self.square_tokens)
        # D*/(D*−1) / n² = 1 / (n² − S_nn)
        return np.maximum(residual_LE, 0.0) / float(self.tokens**2 - self.square_tokens)

    def save(self, path: Path) -> None:
        """Write as safetensors (scalars as one-element int64 tensors)."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors = {
            name: np.array([value], dtype=np.int64) if isinstance(value, int) else np.ascontiguousarray(value)
            for name, value in values.items()
            if value is not None
        }
        with safetensors_errors(path):
            save_file(tensors, path)

    @classmethod
    def load(cls, path: Path) -> RoutingStatistics:
        with reading(path, "the statistics", "make them again with `trace-ds collect CONFIG`"):
            tensors = load_file(path)
            values: dict[str, Any] = {
                item.name: tensors[item.name] if item.name.endswith("_LE") else int(tensors[item.name][0])
                for item in fields(cls)
                if item.name in tensors or item.default is MISSING
            }
            return cls(**values)
