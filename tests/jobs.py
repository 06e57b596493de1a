"""Bodies that tests run on every rank (importable by the worker processes), and the single-process references."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tiny

from trace_ds.config.load import load_config
from trace_ds.run.directory import RunDirectory


def made_once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that ``make`` fills, for the first worker of a test run that asks; the others wait and use it."""
    folder = Path(os.environ["SHARED_FOLDER"]) / name
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            folder.with_suffix(".made").touch()
    return folder


def family_model(family: str) -> Path:
    """A tiny model of a family, made once in a test run: to be copied before anything is changed."""
    return made_once(f"model-{family}", lambda folder: tiny.make_model(folder, family))


def prepared_run(config: Path, run: Path) -> Path:
    """The run directory ``run`` of a configuration, with its data."""
    from stage_calls import prepare

    loaded, run = load_config(str(config), [], run)
    RunDirectory.at(run).mark()
    prepare(loaded, RunDirectory.at(run))
    return run


def copied_run(source: Path, destination: Path, *parts: str) -> Path:
    """These parts of a run as a run directory of their own, for commands to go on in."""
    for part in parts:
        shutil.copytree(source / part, destination / part)
    RunDirectory(destination).mark()
    return destination


def collect_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``collect`` as one rank of a job."""
    from stage_calls import collect

    loaded, directory = load_config(config, overrides, run_dir)
    collect(loaded, RunDirectory.at(directory), world)


def only_the_main_process_fingerprints(world: Any) -> None:
    """From now on the other ranks fail when they read samples of a model's files."""
    from trace_ds.tensors import model_files

    def refuse(path: Path) -> str:
        raise AssertionError(f"rank {world.rank} reads {path} for a fingerprint")

    if not world.is_main:
        model_files.sample_sha256 = refuse


def unlearn_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``unlearn`` as one rank of a job."""
    from stage_calls import unlearn

    only_the_main_process_fingerprints(world)
    loaded, directory = load_config(config, overrides, run_dir)
    unlearn(loaded, RunDirectory.at(directory), world)


def unlearn_job_killed(world: Any, config: str, run_dir: str, overrides: list[str], step: int) -> None:
    """The same; rank 1 is killed while it writes its optimizer's shard of ``step``."""
    import signal
    import sys

    def kill(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and f"step_{step:06d}.tmp-" in str(arguments[0]) and "optim" in str(arguments[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == 1:
        sys.addaudithook(kill)
    unlearn_job(world, config, run_dir, overrides)


def finetune_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``finetune`` as one rank of a job."""
    from stage_calls import finetune

    only_the_main_process_fingerprints(world)
    loaded, directory = load_config(config, overrides, run_dir)
    finetune(loaded, RunDirectory.at(directory), world)


def unlearn_jobs(world: Any, config: str, runs: list[tuple[str, list[str]]]) -> list[str]:
    """Several jobs of one shape in one process group, one after the other; the error of each (empty: none)."""
    errors = []
    for run_dir, overrides in runs:
        try:
            unlearn_job(world, config, run_dir, overrides)
            errors.append("")
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
        world.barrier()
    return errors


def brute_force_scores(model_path: Path, original_path: Path, arrow: Path, rows: list[int]) -> dict[str, float]:
    """Mean NLL and top-k overlap with the original model on some rows, by plain transformers, a document at a time."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from trace_ds.corpora.dataset import TokenDataset

    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (model_path, original_path)
    ]
    dataset, nll, tokens, common, slots = TokenDataset.open(arrow), 0.0, 0, 0, 0
    for number in rows:
        row = dataset.row(number)
        for document in np.unique(row.document_ids):
            ids = torch.tensor(row.input_ids[row.document_ids == document].astype(np.int64))[None]
            if ids.shape[1] < 2:
                continue
            with torch.no_grad():
                result, before = (model(input_ids=ids, output_router_logits=True) for model in models)
            nll += float(functional.cross_entropy(result.logits[0, :-1].double(), ids[0, 1:], reduction="sum"))
            tokens += ids.shape[1] - 1
            for one, other in zip(result.router_logits, before.router_logits, strict=True):
                for a, b in zip(one[:-1].topk(2).indices.tolist(), other[:-1].topk(2).indices.tolist(), strict=True):
                    common, slots = common + len(set(a) & set(b)), slots + 2
    return {"nll": nll / tokens, "overlap": common / slots}


Cell = tuple[str, str, int, int, str]  # family, type, expert-parallel size, rows per batch, rows packed or padded


def collect_matrix(
    world: Any, models: dict[str, str], datasets: dict[str, str], eps: dict[str, list[int]], folder: str
) -> dict[Cell, dict[str, Any]]:
    """The sums of a pass over each dataset for every family, type, expert-parallel size (``eps``, by family) and number
    of rows per batch, in one process group; with bf16 also what plain transformers counts in the same batches."""
    from dataclasses import asdict

    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts
    from trace_ds.routing.collection import Collection
    from trace_ds.routing.token_files import Recording
    from trace_ds.run.log import StageLog

    result: dict[Cell, dict[str, Any]] = {}
    opened = {rows: TokenDataset.open(Path(path)) for rows, path in datasets.items()}
    recording = Recording(trace=False, nll=False, rows=True, sample_tokens=70)
    arguments: dict[str, Any] = {"recording": recording, "directory": Path(folder)}
    for family, path in models.items():
        info = inspect_model(path)
        for number, dtype in enumerate(("fp32", "bf16")):
            # every two of type, kind of rows and rows per batch meet
            batches = [(rows, (1, 3)[(number + place) % 2]) for place, rows in enumerate(opened)]
            batches = [(rows, batch) for rows, batch in batches if rows == "padded" or family not in tiny.MIXING]
            plain = {}
            if dtype == "bf16":
                plain = {key: same_batches(world, path, opened[key[0]], key[1]) for key in batches}
            for ep in eps[family]:
                parts = ModelParts(head=False, last_output=False)
                engine = inference_engine(info, world, dtype=dtype, ep=ep, parts=parts)
                for rows, batch in batches:
                    arguments |= {"experts": info.experts, "top_k": info.top_k, "batch_rows": batch}
                    collection = Collection(engine, world, opened[rows], **arguments)
                    statistics = collection.run(StageLog("collect", None, None), "forget", 0)
                    sums = asdict(statistics) | {"plain": plain.get((rows, batch))}
                    for name, part in collection.parts.items():
                        sums[name] = np.concatenate(world.gather(np.array(part)))
                    result[family, dtype, ep, batch, rows] = sums
    return result


def same_batches(world: Any, path: str, dataset: Any, batch_rows: int) -> np.ndarray:
    """Counts [L, E] of the routers of plain transformers in bf16, in the very batches that each rank computes: bf16
    sums, and with them near ties, depend on the shape of a batch."""
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.models.attention import adopt, packed

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    adopt(model)  # attention of documents alone (test_attention.py): under a mask it is rounded otherwise
    outputs = record_plainly(model)
    counts = np.zeros((len(outputs), outputs_width(model)), dtype=np.int64)
    begin, end = (len(dataset) * rank // world.size for rank in (world.rank, world.rank + 1))
    for first in range(begin, end, batch_rows):
        rows = [dataset.row(number) for number in range(first, min(first + batch_rows, end))]
        longest = max(len(row.input_ids) for row in rows)
        ids = np.zeros((batch_rows, longest), dtype=np.int64)
        positions = np.tile(np.arange(longest), (batch_rows, 1))
        counted = np.zeros((batch_rows, longest), dtype=bool)
        for number, row in enumerate(rows):
            size, documents = len(row.input_ids), row.document_ids
            ids[number, :size] = row.input_ids
            starts = np.flatnonzero(np.append(True, documents[1:] != documents[:-1]))
            for start in [*starts, size]:  # the filling is numbered as another document
                positions[number, start:] = np.arange(longest - start)
            counted[number, : size - 1] = documents[1:] == documents[:-1]
            if row.loss_mask is not None:
                counted[number, : size - 1] &= row.loss_mask[1:]
        with torch.no_grad():
            model(input_ids=torch.tensor(ids), **packed(model, torch.tensor(positions), torch.device("cpu")))
        for layer, (_, _, indices, *_) in outputs.items():
            np.add.at(counts[layer], indices[counted.reshape(-1)].numpy().reshape(-1), 1)
    return np.asarray(world.sum_int64(counts))


def packed_passes(
    world: Any, models: dict[str, str], rows: list[list[int]]
) -> dict[tuple[str, str], tuple[np.ndarray, np.ndarray]]:
    """Last hidden states of packed rows and a gradient at the embedding, of each family's engine partitioned by ZeRO-3
    at expert-parallel size 2; of Mixtral's also whole, at 1 and 2."""
    import torch
    from test_attention import ids_of, positions

    from trace_ds.models.attention import packed
    from trace_ds.models.engine import base_ds_config, initialize
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts

    result = {}
    for family, path in models.items():
        info = inspect_model(path)
        for ep, stage in ((1, 0), (2, 0), (2, 3)) if family == "mixtral" else ((2, 3),):
            ds_config = base_ds_config(ep=ep, info=info, zero_stage=stage)
            engine = initialize(info, world, ds_config, dtype="fp32", parts=ModelParts())
            inputs = packed(engine.module, positions(rows), torch.device("cpu"))
            assert "documents" in inputs
            ids = ids_of(rows).roll(world.rank, 0)  # other tokens on the other rank
            result[family, f"EP {ep}, ZeRO-{stage}"] = pass_with_gradient(engine, engine.module.model, ids, inputs)
    return result


def pass_with_gradient(call: Any, body: Any, ids: Any, inputs: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(last hidden states, the gradient at the embedding of the sum of their cubes, weighted by token)."""
    embedded: list[Any] = []
    hidden: list[Any] = []
    hooks = [
        body.embed_tokens.register_forward_hook(lambda *given: embedded.append(given[2].requires_grad_()) or given[2]),
        body.norm.register_forward_hook(lambda *given: hidden.append(given[2])),
    ]
    call(input_ids=ids, **inputs)
    for hook in hooks:
        hook.remove()
    (hidden[0] ** 3 * (1 + ids[..., None] % 5)).sum().backward(inputs=embedded)
    return hidden[0].detach().numpy(), embedded[0].grad.numpy()


def record_plainly(model: Any) -> dict[int, Any]:
    """What the routers of plain transformers return in the last forward pass, by layer."""
    outputs: dict[int, Any] = {}
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    for number, router in enumerate(routers):
        outputs[number] = None
        router.register_forward_hook(lambda _m, _i, output, number=number: outputs.__setitem__(number, output))
    return outputs


def outputs_width(model: Any) -> int:
    """The experts among which the routers choose."""
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    return int(routers[0].weight.shape[0])


def collect_job_killed_while_hashing(world: Any, config: str, run_dir: str) -> None:
    """``collect`` whose last rank is killed when it hashes its parts of the retain side."""
    import signal

    from trace_ds.run import artefact

    file_entry = artefact.file_entry

    def killed(path: Path) -> dict[str, Any]:
        if world.rank == world.size - 1 and path.parent.name == "retain.partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return file_entry(path)

    artefact.file_entry = killed
    collect_job(world, config, run_dir, [])


def collect_with_failing_storage(world: Any, config: str, run_dir: str) -> list[str]:
    """``collect`` again and again, the storage of the last rank failing at one place after the other, then not at all;
    the errors of this rank."""
    from unittest import mock

    from trace_ds.routing import collection
    from trace_ds.run import artefact

    failure = mock.Mock(side_effect=OSError(5, "Input/output error", "the file"))
    places = [
        mock.patch.object(os, "preadv", failure),  # reading the weights
        mock.patch.object(collection, "create_part", failure),
        mock.patch.object(np.memmap, "flush", failure),  # saving a state
        mock.patch.object(artefact, "file_entry", failure),
    ]
    ends = []
    for place in [*places, None]:
        if place is not None and world.rank == world.size - 1:
            place.start()
        try:
            collect_job(world, config, run_dir, ["distributed.ep=2"])
            ends.append("")
        except Exception as error:
            ends.append(f"{type(error).__name__}: {error}")
        mock.patch.stopall()
        world.barrier()
    return ends


def killed_collect_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> None:
    """``collect`` whose last rank is killed as soon as it has saved a state of the retain side."""
    import signal
    import threading
    import time

    def observe() -> None:
        partial = Path(run_dir) / "statistics" / "retain.partial"
        while not list(partial.glob(f"state-{world.rank:05d}-*.safetensors")):
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)

    if world.rank == world.size - 1:
        threading.Thread(target=observe, daemon=True).start()
    collect_job(world, config, run_dir, overrides)


def stopped_collect_job(world: Any, config: str, run_dir: str, overrides: list[str]) -> str:
    """``collect`` in a run directory with a stop file; how every rank left."""
    from trace_ds.errors import StopRequested

    try:
        collect_job(world, config, run_dir, overrides)
    except StopRequested as stop:
        return str(stop)
    return "done"


def brute_force_routing(model_path: Path, arrow: Path) -> dict[str, np.ndarray]:
    """Counts from what the routers of plain transformers return, one document piece at a time; no code of ours but
    the rows.

    Returns:
        counts [L, E], gate mass [L, E], the sum of the rows' mean gates [L, E], documents: counts [D, L, E], rows:
        counts [R, L, E], and of the counted tokens their flat positions [N] and experts, ascending, trace [N, L, K].
    """
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.corpora.dataset import TokenDataset

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    outputs = record_plainly(model)
    dataset = TokenDataset.open(arrow)
    shape = (len(outputs), outputs_width(model))
    counts, mass, row_gate = np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(shape)
    documents: dict[int, np.ndarray] = {}
    rows = np.zeros((len(dataset), *shape), dtype=np.int64)
    positions, trace, first = [np.zeros(0, np.int64)], [], 0
    for number in range(len(dataset)):
        row, before = dataset.row(number), mass.copy()
        for document in np.unique(row.document_ids):
            where = np.flatnonzero(row.document_ids == document)
            ids = row.input_ids[where]
            loss = np.ones(len(ids), bool) if row.loss_mask is None else row.loss_mask[where]
            if not loss[1:].any():
                continue
            with torch.no_grad():
                model(input_ids=torch.tensor(ids[None].astype(np.int64)))
            result = np.zeros(shape, dtype=np.int64)
            for layer in range(len(outputs)):
                _, values, indices = outputs[layer][:3]
                chosen = indices[:-1][loss[1:]].reshape(-1).numpy()  # the last position has no loss
                np.add.at(result[layer], chosen, 1)
                np.add.at(mass[layer], chosen, values[:-1][loss[1:]].double().reshape(-1).numpy())
            counts += result
            rows[number] += result
            documents[int(document)] = documents.get(int(document), 0) + result
            positions.append(first + where[:-1][loss[1:]])
            counted = (outputs[layer][2][:-1][loss[1:]] for layer in range(len(outputs)))
            trace.append(np.stack([chosen.sort().values.numpy() for chosen in counted], 1))
        first += len(row.input_ids)
        row_gate += (mass - before) / max(rows[number, 0].sum() // model.config.num_experts_per_tok, 1)
    return {
        "counts": counts,
        "mass": mass,
        "row_gate": row_gate,
        "documents": np.stack(list(documents.values())),
        "rows": rows,
        "positions": np.concatenate(positions),
        "trace": np.concatenate(trace),
    }


def reference_finetuning(config_path: str, run_dir: str, overrides: list[str], name: str) -> dict[str, Any]:
    """The fine-tuning of a model again, in one process, with plain transformers and torch, no code of ours but the
    choice of rows: ``losses``, one number a step, and the ``weights`` at the end {name in the hub layout: float32}."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from trace_ds.stages.finetune import check as check_finetune
    from trace_ds.stages.finetune import make_finetune_batches, settings_of

    config, directory = load_config(config_path, overrides, run_dir)
    settings = settings_of(config)
    (job,) = (
        job
        for job in check_finetune(config, RunDirectory.at(directory), config.distributed.ep).models
        if job.name == name
    )
    batches = make_finetune_batches(config, job.sides, job.data)
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings.optimizer.lr,
        betas=(0.9, 0.99),
        eps=settings.optimizer.eps,
        weight_decay=settings.optimizer.weight_decay,
    )
    losses = []
    for step in range(job.steps):
        nll, tokens = torch.zeros(()), 0
        for batch in batches.at(step, 0, 1).micro_batches:
            for ids, documents in zip(batch.input_ids_BS, batch.document_ids_BS, strict=True):
                for document in documents[documents >= 0].unique():  # a forward pass of its own for every one
                    own = ids[documents == document][None]
                    logits = model(input_ids=own).logits[0, :-1]
                    nll = nll + functional.cross_entropy(logits, own[0, 1:], reduction="sum")
                    tokens += own.shape[1] - 1
        optimizer.zero_grad()
        (nll / tokens).backward()
        if settings.optimizer.gradient_clipping:
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optimizer.gradient_clipping)
        optimizer.step()
        losses.append(float(nll.detach()) / tokens)
    return {"losses": losses, "weights": saved_weights(model)}


def saved_weights(model: Any) -> dict[str, np.ndarray]:
    """The weights of a model as `save_pretrained` writes them (hub names)."""
    import tempfile

    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return {name: value for path in Path(folder).glob("*.safetensors") for name, value in load_file(path).items()}


def prepared_steps(world: Any, config: str, run_dir: str, overrides: list[str]) -> tuple[Any, Any, Any]:
    """(the engine of ``unlearn``, its objective, a function that makes a step by number): no logs, no checkpoints."""
    from trace_ds.stages import unlearn
    from trace_ds.stages.training import model_settings
    from trace_ds.unlearning.objective import make_objective
    from trace_ds.unlearning.trainer import run_step

    loaded, directory = load_config(config, overrides, run_dir)
    job = unlearn.check(loaded, RunDirectory.at(directory), world.size)
    batches = unlearn.make_unlearn_batches(job)
    engine, routers = unlearn.make_engine(job, world, batches)
    if routers is not None:
        routers.begin(engine)
    shape = {**model_settings(loaded), "seed": loaded.seed}
    objective, _ = make_objective(
        loaded.unlearning, job.info, world, batches, {"step": 0, "seed": 0}, job.anchored, routers, **shape
    )

    def step(number: int) -> dict[str, float]:
        data = batches.at(number, world.rank, world.size)
        return run_step(engine, world, data, objective, loaded.unlearning, number)

    return engine, objective, step
