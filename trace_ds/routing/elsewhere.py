"""Routing that another program recorded, counted as if the model had been run here: no GPU, no weight is read.

A file of JSON lines, one for each document of each row, in order (docs/data.md has the few lines of Python that ask
vLLM for them): a response of its completions API under ``--enable-return-routed-experts``, or the same from ``LLM``.

=========================  ============================================================================================
``prompt_token_ids``       the tokens that were asked about: those of the document in the row
``prompt_routed_experts``  [tokens, L, K] their experts, as lists or as an ``.npy`` file in base64; where it is not
                           there, ``routed_experts``, in which those of generated tokens follow
=========================  ============================================================================================

Each at the top of the object or in its first choice. vLLM returns no gate weights: every selection counts as 1 / K.
Source: docs.vllm.ai, "Routed Experts Replay" (training/routed_experts_replay, 0.21) and "Routed Experts Return"
(training/routed_experts, later versions).

Shape legend: B rows of a batch, S positions, T = B·S, N tokens of a document in a row, L MoE layers, K = top-k.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_ds.corpora.dataset import Batch, TokenDataset
from trace_ds.errors import UserError
from trace_ds.models.routers import RoutingRecorder
from trace_ds.parallel.device import to_device
from trace_ds.parallel.world import World
from trace_ds.routing.collection import Collection, Passed

KEYS = ("prompt_token_ids", "prompt_routed_experts", "routed_experts")
AGAIN = "ask again for the data of this run, a line for each document of each row (docs/data.md)"


class CollectionElsewhere(Collection):
    """This rank's part of a pass over ``dataset`` whose routing the file ``path`` holds; ``model``, without data, says
    which decoder layers have routers."""

    def __init__(self, path: Path, model: nn.Module, world: World, dataset: TokenDataset, **arguments: Any) -> None:
        super().__init__(SimpleNamespace(module=model), world, dataset, **arguments)
        self._path = path
        self._lines: Iterator[tuple[int, bytes]] | None = None

    def _pass(self, batch: Batch, first_row: int) -> Passed:
        experts_BSLK = np.zeros((*batch.input_ids_BS.shape, len(self.layers), self.counter.top_k), dtype=np.int64)
        self.world.tell_together(lambda: self._read(experts_BSLK, first_row), str(self._path))
        recorder = RoutingRecorder(len(self.layers))
        for layer in range(len(self.layers)):
            experts_TK = to_device(torch.from_numpy(experts_BSLK[:, :, layer].copy()), self.world.device).flatten(0, 1)
            recorder.indices_TK[layer] = experts_TK
            recorder.scores_TK[layer] = torch.full(experts_TK.shape, 1 / self.counter.top_k, device=self.world.device)
        return recorder, [], [], None

    def _read(self, experts_BSLK: np.ndarray, first_row: int) -> None:
        """The experts of the rows from ``first_row`` on, as many as this rank has of them."""
        last_row = min(first_row + len(experts_BSLK), self.end)
        if self._lines is None:
            before = sum(1 for _ in documents_in_rows(self.dataset, 0, first_row))
            self._lines = islice(enumerate(self._path.open("rb"), start=1), before, None)
        for row, begin, tokens_N in documents_in_rows(self.dataset, first_row, last_row):
            number, line = next(self._lines, (0, b""))
            place = f"{self._path}:{number}" if number else str(self._path)
            if not line.strip():
                raise UserError(f"there is no line for the document at position {begin} of row {row}", place, AGAIN)
            experts_NLK = experts_of(line, tokens_N, experts_BSLK.shape[2:], self.experts, place)
            experts_BSLK[row - first_row, begin : begin + len(tokens_N)] = experts_NLK
        if last_row == len(self.dataset) and first_row < last_row and next(self._lines, None) is not None:
            raise UserError("it has more lines than the data have documents in rows", str(self._path), AGAIN)


def documents_in_rows(
    dataset: TokenDataset, first_row: int = 0, last_row: int | None = None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(row, position in it, token ids int32 [N]) of every document of every row, in order: what is to be asked about.

    A document that a row cuts is there once for each of its rows, as the model sees it.
    """
    for row in range(first_row, len(dataset) if last_row is None else last_row):
        packed = dataset.row(row)
        begins = np.flatnonzero(np.diff(packed.document_ids, prepend=-1))
        for begin, tokens_N in zip(begins, np.split(packed.input_ids, begins[1:]), strict=True):
            yield row, int(begin), tokens_N


def experts_of(line: bytes, tokens_N: np.ndarray, shape: tuple[int, ...], experts: int, place: str) -> np.ndarray:
    """The experts [N, L, K] that a line gives for the tokens.

    Args:
        shape: (L, K). experts: how many a layer has. place: file and line, for errors.

    Raises:
        UserError: it is about other tokens, or does not hold so many experts of so many layers for each of them.
    """
    try:
        answer = json.loads(line)
        choice = (answer.get("choices") or [{}])[0]
        ids, of_prompt, of_all = (choice.get(key) if answer.get(key) is None else answer[key] for key in KEYS)
        held = of_all if of_prompt is None else of_prompt
        if isinstance(held, str):
            held = np.load(io.BytesIO(base64.b64decode(held, validate=True)), allow_pickle=False)
        asked_N, experts_NLK = np.asarray(ids), np.asarray(held)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, RecursionError) as error:
        raise UserError(f"this is no response with routed experts ({type(error).__name__})", place, AGAIN) from None
    if asked_N.shape != tokens_N.shape or not (asked_N == tokens_N).all():
        raise UserError("prompt_token_ids are not the tokens of the document in the row", place, AGAIN)
    if experts_NLK.dtype.kind not in "iu" or experts_NLK.shape[1:] != shape or len(experts_NLK) < len(tokens_N):
        what = f"routed experts have shape {list(experts_NLK.shape)}, and [{len(tokens_N)}, {shape[0]}, {shape[1]}]"
        raise UserError(f"{what} (tokens, MoE layers, top-k) is needed", place, AGAIN)
    experts_NLK = np.sort(experts_NLK[: len(tokens_N)].astype(np.int64), axis=-1)
    if experts_NLK.min() < 0 or experts_NLK.max() >= experts or (np.diff(experts_NLK, axis=-1) == 0).any():
        what = f"these are no {shape[1]} experts of {experts} for each token (vLLM puts -1 where its cache answered)"
        raise UserError(what, place, "ask again, without what was cached")
    return experts_NLK
