"""One rank's pass over its rows: forward, count, record; saved now and then, continued after a kill.

Shape legend: B rows of a batch, S positions, T tokens, L MoE layers, E experts, K = top-k, R rows.

The device is never waited for inside a batch: what a batch leaves is copied to the host while the next one runs, and
the next one's rows are read meanwhile by a thread. ``state-RANK-BATCH.safetensors`` holds the sums after that many
batches, the per-token arrays lie in the parts themselves; all ranks save at the same batches, so the newest state that
every rank has is a point to continue from, and what follows is the same bytes again.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from trace_ds.corpora.dataset import Batch, TokenDataset
from trace_ds.errors import StopRequested, UserError
from trace_ds.models.attention import packed
from trace_ds.models.routers import RoutingRecorder, moe_decoder_layers, record_output, record_routing
from trace_ds.models.token_nll import chunked_nll
from trace_ds.parallel.device import event_now, to_device
from trace_ds.parallel.world import World
from trace_ds.routing.counter import RoutingCounter
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.routing.token_files import Recording, count_dtype, create_part, sample_places, trace_dtype
from trace_ds.run.log import Progress, StageLog

CHECK_EVERY_BATCHES = 64
KEPT_STATES = 2
STATE = re.compile(r"state-(\d+)-(\d+)\.safetensors$")


class Collection:
    """This rank's part of a pass over ``dataset``; writes the parts and its state into ``directory``."""

    def __init__(
        self,
        engine: Any,
        world: World,
        dataset: TokenDataset,
        *,
        experts: int,
        top_k: int,
        recording: Recording,
        batch_rows: int,
        directory: Path,
    ) -> None:
        self.engine, self.world, self.dataset, self.recording = engine, world, dataset, recording
        self.directory, self.experts = directory, experts
        self.layers = moe_decoder_layers(engine.module)
        self.begin, self.end = (len(dataset) * rank // world.size for rank in (world.rank, world.rank + 1))
        self.first_token = int(dataset.row_starts_R1[self.begin])
        self.tokens = int(dataset.row_starts_R1[self.end]) - self.first_token
        rows = world.max_int(self.end - self.begin)  # of the rank that has most
        self.batch_rows = min(batch_rows, rows)
        self.batches = -(-rows // self.batch_rows)
        self.counter = RoutingCounter(len(self.layers), experts, top_k, world.device)
        self.sampled = self._draw_sample() if recording.sample_tokens else np.zeros(0, dtype=np.int64)
        self.parts: dict[str, np.ndarray] = {}
        self.saved: list[int] = []  # batches of this rank's states on the disk, ascending
        self._pending: list[tuple[np.ndarray, slice, torch.Tensor]] = []
        self._copied: Any = None

    def run(self, log: StageLog, side: str, save_every: int, stop_files: Sequence[Path] = ()) -> RoutingStatistics:
        """The statistics of the whole world (collective).

        Args:
            save_every: batches between saved states.
            stop_files: one that is there when a state has been saved ends the pass; the main process looks.

        Raises:
            UserError, AgreedError: a router's weights are NaN or infinite; the layer is named.
            OSError, AgreedError: a file cannot be read or written (a full disk), on this rank or another.
            StopRequested: a stop file appeared; it is removed, and the saved state is where the next pass goes on.
        """
        done = self._resume()
        self.world.run_on_all_ranks(lambda: self._open_parts(fresh=done == 0))
        if done:
            log.line(f"{side}: continues after batch {done:,} of {self.batches:,}")
        total = self.dataset.tokens
        at = int(self.dataset.row_starts_R1[min(self.begin + done * self.batch_rows, self.end)]) - self.first_token
        progress = Progress(log, side, total, start=min(at * self.world.size, total), unit="token")
        with closing(self._prefetched(done)) as batches:
            for number, batch in enumerate(batches, start=done):
                size = self._step(number, batch)
                if number % CHECK_EVERY_BATCHES == 0 or number == self.batches - 1:
                    self._check_finite()
                if save_every and (number + 1) % save_every == 0 and number + 1 < self.batches:
                    self._save(number + 1)
                    self._stop_if_requested(log, f"{side}: stopped on request after batch {number + 1:,}", stop_files)
                progress.advance(min(size * self.world.size, total))
        progress.close()
        self.world.run_on_all_ranks(self._flush_parts)
        return self.counter.reduce(self.world)

    def _stop_if_requested(self, log: StageLog, message: str, stop_files: Sequence[Path]) -> None:
        present = [path for path in stop_files if path.is_file()] if self.world.is_main else []
        if self.world.max_int(len(present)):
            for path in present:
                path.unlink(missing_ok=True)
            log.line(f"{message} of {self.batches:,}; run again to go on")
            raise StopRequested(message)

    def _step(self, number: int, batch: Batch) -> int:
        """One forward pass; returns this rank's tokens in it."""
        model, device = self.engine.module, self.world.device
        first_row = min(self.begin + number * self.batch_rows, self.end)
        last_row = min(first_row + self.batch_rows, self.end)
        with record_routing(model) as recorder, record_output(model.model) as body:
            output = frozen_pass(self.engine, batch, device)
        self._write_pending()  # of the batch before: its copies had this forward pass to finish
        counts_BLE = self.counter.add(recorder, batch.counted_BS, batch.document_ids_BS)
        tokens = slice(*(int(self.dataset.row_starts_R1[row]) - self.first_token for row in (first_row, last_row)))
        rows = slice(first_row - self.begin, last_row - self.begin)
        filled_T = (batch.document_ids_BS.reshape(-1) >= 0).nonzero().squeeze(1)
        real_T = to_device(filled_T, device)
        if self.recording.rows and last_row > first_row:
            self._keep("row_counts", rows, counts_BLE[: last_row - first_row])
        if self.recording.trace and len(real_T):
            self._keep("trace", tokens, self._trace(recorder, real_T))
        drawn = slice(*np.searchsorted(self.sampled, (tokens.start, tokens.stop)).tolist())
        if drawn.stop > drawn.start:
            drawn_T = to_device(filled_T[torch.from_numpy(self.sampled[drawn] - tokens.start)], device)
            self._keep("sample", drawn, self._trace(recorder, drawn_T))
        if self.recording.nll:
            assert number or head_is_all(model.lm_head, body[0], output.logits)
            nll_BS = _batch_nll(model.lm_head, body[0], batch)
            if len(real_T):
                self._keep("nll", tokens, nll_BS.reshape(-1)[real_T])
        self._copied = event_now(device)
        return tokens.stop - tokens.start

    def _trace(self, recorder: RoutingRecorder, where_T: torch.Tensor) -> torch.Tensor:
        """The experts of some tokens, ascending [T, L, K], in the smallest type torch can index into."""
        indices = torch.stack([recorder.layer(number)[1][where_T] for number in range(len(self.layers))], dim=1)
        return indices.sort(dim=-1).values.to(torch.uint8 if self.experts <= 256 else torch.int16)

    def _keep(self, name: str, where: slice, values: torch.Tensor) -> None:
        self._pending.append((self.parts[name], where, values.to("cpu", non_blocking=True)))

    def _write_pending(self) -> None:
        if self._copied is not None:
            self._copied.synchronize()
        for array, where, values in self._pending:
            array[where] = values.numpy().astype(array.dtype, copy=False)
        self._pending, self._copied = [], None

    def _flush_parts(self) -> None:
        """Bring everything computed so far to the disk."""
        self._write_pending()
        for array in self.parts.values():
            if isinstance(array, np.memmap):
                array.flush()

    def _check_finite(self) -> None:
        bad = self.counter.not_finite_L.nonzero().squeeze(1).tolist()
        error = None
        if bad:
            problem = f"the router of decoder layer {self.layers[bad[0]]} gave NaN or infinite weights"
            error = UserError(
                problem, str(self.engine.module.config.name_or_path or "model"), "check the model's weights"
            )
        self.world.raise_on_all_ranks(error)

    def _prefetched(self, done: int) -> Generator[Batch, None, None]:
        """The batches from ``done`` on, each read while the one before is computed."""

        def read(number: int) -> Batch:
            first = self.begin + number * self.batch_rows
            rows = [row if row < self.end else -1 for row in range(first, first + self.batch_rows)]
            return self.dataset.batch(rows, pad_id=0)

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(read, done)
            for number in range(done, self.batches):
                batch, coming = coming.result(), pool.submit(read, number + 1)
                yield batch

    def _open_parts(self, *, fresh: bool) -> None:
        shapes: dict[str, tuple[tuple[int, ...], np.dtype]] = {}
        rows, layers = self.end - self.begin, len(self.layers)
        if self.recording.trace:
            shapes["trace"] = ((self.tokens, layers, self.counter.top_k), trace_dtype(self.experts))
        if self.recording.nll:
            shapes["nll"] = ((self.tokens,), np.dtype(np.float32))
        if self.recording.rows:
            longest = int(np.diff(self.dataset.row_starts_R1).max(initial=1))
            shapes["row_counts"] = ((rows, layers, self.experts), count_dtype(longest - 1))
        if self.recording.sample_tokens:
            shapes["sample"] = ((len(self.sampled), layers, self.counter.top_k), trace_dtype(self.experts))
            shapes["sample_positions"] = (self.sampled.shape, self.sampled.dtype)
        for name, (shape, dtype) in shapes.items():
            self.parts[name] = create_part(
                self.directory, name, self.world.rank, self.world.size, shape, dtype, fresh=fresh
            )
        if self.recording.sample_tokens:
            self.parts["sample_positions"][:] = self.sampled + self.first_token

    def _draw_sample(self) -> np.ndarray:
        """int64, ascending: which of this rank's tokens are in the sample, its first token being 0 (collective)."""
        spans = self.dataset.spans(self.first_token, self.first_token + self.tokens)
        counted = self.world.gather(sum(int(self.dataset.counted(*span).sum()) for span in spans))
        places = sample_places(sum(counted), self.recording.sample_tokens)
        before, sampled = sum(counted[: self.world.rank]), [np.zeros(0, dtype=np.int64)]
        for start, stop in spans:
            counted_N = np.flatnonzero(self.dataset.counted(start, stop))
            here = places[slice(*np.searchsorted(places, (before, before + len(counted_N))))]
            sampled.append(counted_N[here - before] + start - self.first_token)
            before += len(counted_N)
        return np.concatenate(sampled)

    def _resume(self) -> int:
        """Restore the newest state that every rank has; returns its batches (0: none).

        The main process alone lists the directory: with thousands of ranks each would read thousands of entries.
        """
        from safetensors.torch import load_file

        self.saved = self.world.run_on_main_and_broadcast(self._common_states)
        done = max(self.saved, default=0)
        if done:
            self.world.run_on_all_ranks(lambda: self.counter.restore(load_file(self._state(done))))
        return done

    def _common_states(self) -> list[int]:
        """Batches after which every rank has saved its state, ascending."""
        names = (path.name for path in self.directory.iterdir())
        ranks = Counter(int(match[2]) for match in map(STATE.fullmatch, names) if match)
        return sorted(done for done, number in ranks.items() if number == self.world.size)

    def _state(self, done: int) -> Path:
        return self.directory / f"state-{self.world.rank:05d}-{done:09d}.safetensors"

    def _save(self, done: int) -> None:
        """Make the first ``done`` batches safe against a kill; the newest two states are kept (collective)."""
        # a state with NaN in it would be where every later start goes on
        self._check_finite()
        self.world.run_on_all_ranks(lambda: self._write_state(done))

    def _write_state(self, done: int) -> None:
        from safetensors.torch import save

        from trace_ds.run.files import write_bytes

        self._flush_parts()
        write_bytes(self._state(done), save(self.counter.state()))
        self.saved.append(done)
        while len(self.saved) > KEPT_STATES:
            self._state(self.saved.pop(0)).unlink(missing_ok=True)


def remove_states(directory: Path) -> None:
    """Delete every rank's states: what is left is the artefact."""
    for path in directory.iterdir():
        if STATE.fullmatch(path.name):
            path.unlink()


def frozen_pass(engine: Any, batch: Batch, device: torch.device) -> Any:
    """A forward pass without gradients; logits are made for the last position only."""
    with torch.no_grad():
        return engine(
            input_ids=to_device(batch.input_ids_BS, device),
            logits_to_keep=1,
            **packed(engine.module, batch.position_ids_BS, device),
        )


def refused_packing(engine: Any, vocabulary: int, device: torch.device) -> UserError | None:
    """An error when the second document of a packed row is not computed as if it were alone (collective).

    Some families of transformers ignore restarting positions, or carry a state from token to token.
    """
    # the second document once behind another and once alone, in rows of one length
    first, second, pad = 8, 6, 0
    ids_T = torch.randint(1, vocabulary, (first + second,), generator=torch.Generator().manual_seed(0))
    alone_T = torch.cat([ids_T[first:], torch.full((first,), pad)])
    positions_T = torch.cat([torch.arange(first), torch.arange(second)])
    positions_BS = torch.stack([positions_T, torch.arange(first + second)])
    nothing_BS = torch.zeros(2, first + second, dtype=torch.bool)
    batch = Batch(torch.stack([ids_T, alone_T]), positions_BS, nothing_BS, positions_BS)
    with record_output(engine.module.model) as body:
        frozen_pass(engine, batch, device)
    packed_SD, alone_SD = body[0][0, first:].float(), body[0][1, :second].float()
    tolerance = 1e-3 if body[0].dtype == torch.float32 else 0.1
    if float((packed_SD - alone_SD).norm() / alone_SD.norm()) <= tolerance:
        return None
    return UserError(
        f"{type(engine.module).__name__} mixes the documents of a packed row",
        "data.packing",
        "set data.packing: single and run `trace-ds prepare` again",
    )


@contextmanager
def whole_head(head: nn.Module) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """(weight, bias) of a linear layer (the language-model head), gathered when ZeRO-3 partitioned it (collective
    then)."""
    from trace_ds.parallel.world import quiet_deepspeed

    parameters = [parameter for parameter in head.parameters() if hasattr(parameter, "ds_tensor")]
    with quiet_deepspeed().zero.GatheredParameters(parameters) if parameters else nullcontext():
        yield head.weight, getattr(head, "bias", None)  # type: ignore[misc]


def _batch_nll(head: nn.Module, hidden_BSD: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Loss of the next token at counted positions, 0 elsewhere, fp32 [B, S] on the device of the hidden states."""
    device = hidden_BSD.device
    rows, columns = batch.counted_BS.nonzero(as_tuple=True)
    targets_N = to_device(batch.input_ids_BS[rows, columns + 1], device)
    rows, columns = to_device(rows, device), to_device(columns, device)
    nll_BS = torch.zeros(batch.counted_BS.shape, dtype=torch.float32, device=device)
    with whole_head(head) as (weight_VD, bias_V):
        nll_BS[rows, columns] = chunked_nll(weight_VD, bias_V, hidden_BSD[rows, columns], targets_N)
    return nll_BS


def head_is_all(head: nn.Module, hidden_BSD: torch.Tensor, logits_B1V: torch.Tensor) -> bool:
    """Whether the logits are the head's output on the last hidden states, which the losses rely on."""
    with whole_head(head) as (weight_VD, bias_V):
        expected = nn.functional.linear(hidden_BSD[:, -1:], weight_VD, bias_V)
    return torch.allclose(expected.float(), logits_B1V.float(), rtol=2e-2, atol=1e-3, equal_nan=True)
