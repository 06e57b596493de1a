"""How near each retain row is to the forget text: four similarities behind one form, one float64 per row.

Shape legend: R rows, T tokens, S constraints (layer, expert), L MoE layers, E experts, D hidden size, V vocabulary.

============  =======================================================================================================
``routing``   cosine of z_r and z_F, where z = (p − p^R) / √(p^R (1 − p^R)) over all experts that take part: what a row
              selects more or less than the pool does, in units of a token's spread, so that rare experts count as much
              as frequent ones. Unlike a likelihood ratio it does not grow with one extreme expert, and it is bounded
              like the cosines below. Credibility: a short row's profile is noisy, so the cosine is taken with the norm
              that noise alone would give added, √(‖z_r‖² + S/n_r)
``hidden``    cosine of the row's mean hidden state and the forget corpus's, both less the pool's mean
``tfidf``     cosine of tf-idf over token ids (idf over the pool's rows, smoothed) and the centroid of the forget rows
============  =======================================================================================================

The fourth, ``weight``, is a row's mean raking weight (rules.py). Routing costs nothing extra, since ``collect`` records
each row's selections; hidden states and tf-idf are the baselines it has to beat. All are our decisions. Every pass is
in chunks of rows: memory is O(R), whatever the number of tokens and experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trace_ds.calibration.rows import RowSelections
from trace_ds.calibration.tokens import open_stream

HIDDEN_ROWS = 4096


def routing_similarity(
    selections: RowSelections, experts_LE: np.ndarray, forget_LE: np.ndarray, pool_LE: np.ndarray
) -> np.ndarray:
    """Cosine of the standardised profiles (see the module's docstring), float64 [rows].

    Args:
        experts_LE: bool, the experts that take part. forget_LE, pool_LE: frequencies on forget text and on the pool.
    """
    pool_S, forget_S = pool_LE[experts_LE], forget_LE[experts_LE]
    spread_S = np.sqrt(pool_S * (1.0 - pool_S))
    used_S = spread_S > 1e-9  # an expert that every row uses alike says nothing
    scale_S = np.where(used_S, 1.0 / np.maximum(spread_S, 1e-9), 0.0)
    forget_S = (forget_S - pool_S) * scale_S
    length = float(np.sqrt((forget_S**2).sum()))
    found_R = np.zeros(selections.rows)
    for rows, counts in selections.blocks():
        sizes_R = selections.sizes(counts, experts_LE.shape[1])
        size_R1 = np.maximum(sizes_R, 1)[:, None]
        profile_RS = (counts[:, experts_LE.ravel()] / size_R1 - pool_S) * scale_S
        norm_R = np.sqrt((profile_RS**2).sum(axis=1) + float(used_S.sum()) / size_R1[:, 0])
        cosine_R = np.einsum("rs,s->r", profile_RS, forget_S) / np.maximum(norm_R * length, 1e-300)
        found_R[rows] = np.where(sizes_R > 0, cosine_R, 0.0)
    return found_R


def hidden_similarity(
    forget: Sequence[np.ndarray], forget_sizes: np.ndarray, pool: Sequence[np.ndarray], pool_sizes: np.ndarray
) -> np.ndarray:
    """Cosine of centred mean hidden states, float64 [pool rows]; 0 for a row without counted tokens.

    Args:
        forget, pool: fp32 parts [rows, D] (memory maps), in row order. *_sizes: counted tokens of each row.
    """
    centre_D = _mean(pool, pool_sizes)
    forget_D = _mean(forget, forget_sizes) - centre_D
    length = float(np.sqrt((forget_D**2).sum()))
    found, at = [np.zeros(0)], 0
    for part in _row_blocks(pool):
        moved = (part.astype(np.float64) - centre_D) * (pool_sizes[at : at + len(part), None] > 0)
        norm = np.sqrt((moved**2).sum(axis=1)) * length
        found.append(np.einsum("rd,d->r", moved, forget_D) / np.maximum(norm, 1e-300))
        at += len(part)
    return np.concatenate(found)


def _row_blocks(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for at in range(0, len(part), HIDDEN_ROWS):
            yield np.asarray(part[at : at + HIDDEN_ROWS])


def _mean(parts: Sequence[np.ndarray], sizes: np.ndarray) -> np.ndarray:
    """Mean over tokens: rows weighted by their counted tokens, float64 [D]."""
    total, at = np.zeros(parts[0].shape[1]), 0
    for part in _row_blocks(parts):
        total += np.einsum("rd,r->d", part.astype(np.float64), sizes[at : at + len(part)].astype(np.float64))
        at += len(part)
    return total / max(float(sizes.sum()), 1.0)


def tfidf_similarity(forget: Path, pool: Path) -> np.ndarray:
    """Cosine of each pool row's tf-idf vector and the centroid of the forget rows', float64 [pool rows].

    tf is the count, idf = log((1 + R) / (1 + rows with the token)) + 1 over the pool (scikit-learn's smoothing), rows
    are scaled to unit length. Token ids are the terms, so nothing needs hashing: three arrays of the vocabulary's size.

    Args:
        forget, pool: Arrow files of prepared rows (``RUN/data/*.arrow``), streamed (the pool twice).
    """
    frequency, rows = np.zeros(0, np.int64), 0
    for ids, row, size in _tokens(pool):
        _, token, _ = _terms(ids, row)
        fresh = np.bincount(token, minlength=len(frequency))
        fresh[: len(frequency)] += frequency
        frequency, rows = fresh, rows + size
    idf = np.log((1.0 + rows) / (1.0 + frequency)) + 1.0
    unseen = float(np.log(1.0 + rows) + 1.0)
    centroid = np.zeros(len(idf))
    for ids, row, size in _tokens(forget):
        where, token, count = _terms(ids, row)
        grown = int(token.max(initial=-1)) + 1 - len(idf)
        if grown > 0:
            idf = np.concatenate([idf, np.full(grown, unseen)])
            centroid = np.concatenate([centroid, np.zeros(grown)])
        value = count * idf[token]
        norm = np.sqrt(np.bincount(where, value**2, size))
        centroid += np.bincount(token, value / norm[where], len(centroid))
    centroid /= max(float(np.sqrt((centroid**2).sum())), 1e-300)
    found = [np.zeros(0)]
    for ids, row, size in _tokens(pool):
        where, token, count = _terms(ids, row)
        value = count * idf[token]
        norm = np.sqrt(np.bincount(where, value**2, size))
        found.append(np.bincount(where, value * centroid[token], size) / np.maximum(norm, 1e-300))
    return np.concatenate(found)


def _tokens(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """(token ids, row of each inside the batch, rows) of every Arrow batch."""
    for batch in open_stream(path):
        offsets = np.asarray(batch.column("input_ids").offsets)
        ids = np.asarray(batch.column("input_ids").values)[offsets[0] : offsets[-1]]
        yield ids.astype(np.int64), np.repeat(np.arange(len(batch)), np.diff(offsets)), len(batch)


def _terms(ids: np.ndarray, row: np.ndarray) -> tuple[Any, Any, Any]:
    """(row, token, count) of every distinct token of every row."""
    width = int(ids.max(initial=0)) + 1
    keys, count = np.unique(row * width + ids, return_counts=True)
    return keys // width, keys % width, count
