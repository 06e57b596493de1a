"""``trace-ds collect``: one forward pass of the frozen model over both corpora → routing statistics (and more).

Every rank reads a contiguous range of rows; experts are sharded over expert-parallel groups by DeepSpeed AutoEP; the
integer counts are all-reduced over the whole world once, at the end.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.config.schema import Config
from trace_ds.corpora.tokenizer import tokenizer_fingerprint
from trace_ds.models.families import ModelInfo, check_expert_parallel, inspect_model
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory

if TYPE_CHECKING:
    import torch

    from trace_ds.corpora.dataset import Batch, TokenDataset
    from trace_ds.parallel.world import World
    from trace_ds.routing.statistics import RoutingStatistics
    from trace_ds.run.log import StageLog

SIDES = ("forget", "retain")
HEAD_CHUNK_TOKENS = 4096


@dataclass(frozen=True)
class CollectJob:
    """What is to be collected, checked: model, data artefact, and by side the inputs of the artefact to make."""

    info: ModelInfo
    data: artefact.Artefact
    inputs: dict[str, dict[str, str]]
    settings: dict[str, Any]

    def done(self, run: RunDirectory) -> list[str]:
        """The sides whose artefact is already there, whole, from the same inputs."""
        return [
            side
            for side in SIDES
            if artefact.is_done(
                run.statistics / side,
                "statistics",
                artefact.identity_of("statistics", self.inputs[side], self.settings),
            )
        ]


def check_collect(config: Config, run: RunDirectory, world_size: int, *, verify: bool = True) -> CollectJob:
    """Everything that can be wrong before a weight is loaded; raises :class:`UserError`."""
    info = inspect_model(config.model.path)
    check_expert_parallel(info, config.distributed.ep, world_size)
    data = artefact.load(run.data, "data", "prepare CONFIG", verify=verify)
    tokenizer = tokenizer_fingerprint(config.model.tokenizer or config.model.path)
    artefact.require_same(data, "tokenizer", tokenizer, "tokenizer", "prepare CONFIG")
    inputs = {
        side: {"model": info.fingerprint, "tokenizer": tokenizer, "data": data.content, "side": side} for side in SIDES
    }
    settings = {
        "dtype": config.model.dtype,
        "trace": config.statistics.trace,
        "nll": config.statistics.nll,
        "hidden_layer": middle_layer(info) if config.statistics.hidden else None,
        "top_k": info.top_k,
    }
    return CollectJob(info, data, inputs, settings)


def middle_layer(info: ModelInfo) -> int:
    """The decoder layer (0-based) whose output ``statistics.hidden`` averages, RMU's default layer as well."""
    return info.decoder_layers // 2


def collect(config: Config, run: RunDirectory, world: World) -> None:
    """Collect the statistics of both corpora (collectively, on every rank); skips a side that is already done."""
    from trace_ds.models.engine import inference_engine
    from trace_ds.run.log import stage_log

    job = world.agree(lambda: check_collect(config, run, world.size))
    job = job or check_collect(config, run, world.size, verify=False)
    done = world.broadcast(job.done(run) if world.is_main else [])
    todo = [side for side in SIDES if side not in done]
    if not todo:
        return
    with stage_log(run, "collect", enabled=world.is_main) as log:
        log.line(f"world size {world.size}, expert-parallel size {config.distributed.ep}, {', '.join(todo)}")
        engine = inference_engine(config, job.info, world, ep=config.distributed.ep)
        for side in todo:
            _collect_side(config, run, world, job, side, engine, log)


def _collect_side(
    config: Config, run: RunDirectory, world: World, job: CollectJob, side: str, engine: Any, log: StageLog
) -> None:
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.models.routers import moe_decoder_layers

    dataset = TokenDataset.open(job.data.file(f"{side}.arrow"))
    destination = run.statistics / side
    temporary = Path(world.broadcast(str(_temporary(destination)) if world.is_main else ""))
    try:
        statistics = _pass_over(config, world, dataset, job.info, side, engine, temporary, log)
        world.barrier()  # every part is written before the main process hashes them
        if world.is_main:
            from trace_ds.run.files import commit_directory

            statistics.save(temporary / "statistics.safetensors")
            summary = {
                "layers": moe_decoder_layers(engine.module),
                "experts": job.info.experts,
                "top_k": job.info.top_k,
                "tokens": statistics.tokens,
                "documents": statistics.documents,
                "rows": len(dataset),
            }
            artefact.describe(temporary, "statistics", job.inputs[side], job.settings, summary)
            commit_directory(temporary, destination)
            log.line(f"{side}: {statistics.tokens:,} tokens of {statistics.documents:,} documents counted")
    except BaseException:
        if world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    world.barrier()


def _temporary(destination: Path) -> Path:
    import os

    path = destination.with_name(f"{destination.name}.tmp-{os.getpid()}")
    path.mkdir(parents=True)
    return path


def _pass_over(
    config: Config,
    world: World,
    dataset: TokenDataset,
    info: ModelInfo,
    side: str,
    engine: Any,
    directory: Path,
    log: StageLog,
) -> RoutingStatistics:
    """This rank's share of one forward pass over the dataset; returns the statistics of the whole world."""
    import numpy as np

    from trace_ds.models.routers import find_routers, record_output, record_routing
    from trace_ds.routing.counter import RoutingCounter
    from trace_ds.routing.token_files import create_part, trace_dtype
    from trace_ds.run.log import Progress

    begin, end = (len(dataset) * rank // world.size for rank in (world.rank, world.rank + 1))
    first_token, last_token = dataset.row_offsets[begin], dataset.row_offsets[end]
    layers = len(find_routers(engine.module))
    counter = RoutingCounter(layers, info.experts, info.top_k, world.device)
    tokens = int(last_token - first_token)
    trace_TLK = nll_T = None
    if config.statistics.trace:
        shape = (tokens, layers, info.top_k)
        trace_TLK = create_part(directory, "trace", world.rank, world.size, shape, trace_dtype(info.experts))
    if config.statistics.nll:
        nll_T = create_part(directory, "nll", world.rank, world.size, (tokens,), np.dtype(np.float32))
    mean_hidden_RD = None
    if config.statistics.hidden:
        rows_shape = (end - begin, engine.module.config.hidden_size)
        mean_hidden_RD = create_part(directory, "hidden", world.rank, world.size, rows_shape, np.dtype(np.float32))
    per_batch = config.statistics.batch_rows
    batches = world.max_int(-(-(end - begin) // per_batch))
    progress = Progress(log, f"{side} (this rank)", batches, unit="batch")
    written = 0
    for number in range(batches):
        rows = [row if row < end else -1 for row in range(begin + number * per_batch, begin + (number + 1) * per_batch)]
        batch = dataset.batch(rows, pad_id=0)
        with (
            record_routing(engine.module) as recorder,
            record_output(engine.module.model.layers[middle_layer(info)]) as middle,
        ):
            hidden_BSD = forward_body(engine, batch, world)
            counter.add(recorder, batch.counted_BS, batch.document_ids_BS)
        real_BS = batch.document_ids_BS >= 0
        size = int(real_BS.sum())
        if trace_TLK is not None and size:
            for layer in range(layers):
                _, indices_TK = recorder.layer(layer)
                sorted_TK = indices_TK.cpu()[real_BS.reshape(-1)].sort(dim=1).values
                trace_TLK[written : written + size, layer] = sorted_TK.numpy()
        if nll_T is not None and size:
            nll_BS = token_nll(engine.module.lm_head, hidden_BSD, batch, world)
            nll_T[written : written + size] = nll_BS[real_BS].numpy()
        if mean_hidden_RD is not None and size:
            first, last = rows[0] - begin, min(rows[0] - begin + per_batch, end - begin)
            means_BD = mean_over(middle[-1], batch.counted_BS.to(world.device))
            mean_hidden_RD[first:last] = means_BD[: last - first].cpu().numpy()
        written += size
        progress.advance()
    progress.close()
    assert written == tokens
    for array in (trace_TLK, nll_T, mean_hidden_RD):
        if isinstance(array, np.memmap):
            array.flush()
    return counter.reduce(world)


def forward_body(engine: Any, batch: Batch, world: World) -> torch.Tensor:
    """The last hidden states [B, S, D] of a batch: the decoder without the LM head, no gradients.

    ``use_cache=False`` matters: with a cache, transformers does not keep attention inside packed documents.
    """
    import torch

    with torch.no_grad():
        return engine.module.model(
            input_ids=batch.input_ids_BS.to(world.device),
            position_ids=batch.position_ids_BS.to(world.device),
            use_cache=False,
        ).last_hidden_state


def mean_over(hidden_BSD: torch.Tensor, counted_BS: torch.Tensor) -> torch.Tensor:
    """Mean hidden state of each row over its counted positions [B, D], fp32; zeros where there is none."""
    counted_BS1 = counted_BS[..., None].float()
    return (hidden_BSD.float() * counted_BS1).sum(1) / counted_BS1.sum(1).clamp(min=1.0)


def token_nll(head: Any, hidden_BSD: torch.Tensor, batch: Batch, world: World) -> torch.Tensor:
    """Negative log-likelihood (nats, fp32, on the CPU) of the next token at counted positions, 0 elsewhere [B, S].

    The logits of at most :data:`HEAD_CHUNK_TOKENS` tokens exist at a time.
    """
    import torch

    nll_BS = torch.zeros(batch.counted_BS.shape, dtype=torch.float32)
    rows, columns = batch.counted_BS.nonzero(as_tuple=True)
    targets = batch.input_ids_BS[rows, columns + 1]
    for start in range(0, len(rows), HEAD_CHUNK_TOKENS):
        part = slice(start, start + HEAD_CHUNK_TOKENS)
        with torch.no_grad():
            hidden = hidden_BSD[rows[part].to(world.device), columns[part].to(world.device)]
            logits = head(hidden).float()
            chosen = logits.gather(1, targets[part].to(world.device)[:, None]).squeeze(1)
            nll_BS[rows[part], columns[part]] = (torch.logsumexp(logits, dim=1) - chosen).cpu()
    return nll_BS
