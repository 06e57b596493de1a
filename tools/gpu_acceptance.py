#!/usr/bin/env python3
"""The first hour on a GPU, in six minutes: is it right there, and what does it cost?

    python tools/gpu_acceptance.py                         # one GPU of 80 GB; prints one JSON object
    python tools/gpu_acceptance.py --device cpu --tiny     # the whole path, in a minute, without a GPU

Nothing is downloaded; weights are random. Each part is a process of its own with a time limit, so one that fails leaves
the others:

* `correct_collect`, `correct_unlearn`: what the pass and the step compute on tiny models, against the CPU in fp32, and
  how often the host waits for the device (at most once a batch and once a step).
* `collect_SHAPE`: tokens per second of collecting against plain transformers forward passes, four documents in a row.
* `unlearn_SHAPE`: an NPO step of ours against the loop that people write (whole logits, the frozen model beside it,
  attention across documents), the same rows, weights in bf16 under fused AdamW and recomputation in both.

MFU is that of the parameters that take part (2 FLOPs each and token forward, 6 in training; attention and recomputation
are not counted) against the card's dense bf16 peak. The exit status is 0 if no part failed or was wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from torch import distributed
from torch.nn import functional

from tools import bench
from trace_ds.config.sections.training import FinetuneConfig
from trace_ds.config.sections.unlearning import UnlearningConfig
from trace_ds.corpora.dataset import FlatArray, PackedRow, TokenDataset, write_rows
from trace_ds.models.attention import adopt
from trace_ds.models.loading import ModelParts, leave_out
from trace_ds.parallel.world import World
from trace_ds.routing.collection import Collection
from trace_ds.routing.token_files import Recording
from trace_ds.run.log import StageLog
from trace_ds.unlearning import trainable
from trace_ds.unlearning.batches import Batches, CorpusBatches
from trace_ds.unlearning.forget_retain import ForgetRetain, Frozen
from trace_ds.unlearning.losses import rmu_target
from trace_ds.unlearning.needs import FrozenNeeds
from trace_ds.unlearning.objective import NextToken, Unlearning
from trace_ds.unlearning.seuf import Anchor
from trace_ds.unlearning.trainer import run_step

# Of the published shapes, so that weights, moments and a frozen copy fit in 80 GB.
TRAINED_LAYERS = {"mixtral": 2, "qwen3_moe": 4}
COMMON = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
COMMON |= {"num_key_value_heads": 2}
LATENT = {"intermediate_size": 48, "moe_intermediate_size": 24, "n_routed_experts": 4, "n_shared_experts": 1}
LATENT |= {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
LATENT |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "head_dim": 8, "num_key_value_heads": 4}
TINY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 24, "intermediate_size": 48, "head_dim": 8}
    | {"num_experts_per_tok": 2},
    "deepseek_v3": LATENT | {"num_experts_per_tok": 2},
}
# Changes of the settings of a job; see objective_of for what is made beside them.
JOBS: dict[str, dict[str, Any]] = {
    **{loss: {"forget_loss": loss} for loss in ("rmu", "graddiff", "npo", "simnpo", "dpo", "wga", "satimp")},
    **{loss: {"forget_loss": loss} for loss in ("undial", "ceu", "pdu")},
    "adaptive": {"forget_loss": "rmu", "rmu": {"scale": "adaptive"}},
    "kl": {"forget_loss": "npo", "retain_loss": "kl"},
    "hidden_mse": {"forget_loss": "graddiff", "retain_loss": "hidden_mse"},
    "sampled": {"forget_loss": "npo", "apply": "sampling"},
    "seuf": {"forget_loss": "npo", "seuf": {"experts": 1}},
    "recompute": {"forget_loss": "npo", "recompute": True},
    "micro_batches": {"forget_loss": "graddiff", "micro_batch_rows": 2},
    "finetune": {},
}


# --- small models, exactly -------------------------------------------------------------------------------------------


def tiny_model(family: str, device: Any, *, recompute: bool = False, bf16: bool = False) -> Any:
    """A random model whose routers decide something (the usual initialisation is nearly flat)."""
    model = bench.build(family, COMMON | TINY[family], torch.float32, "cpu", "grouped_mm")
    adopt(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.mul_(25.0)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-0.1, 0.1, generator=torch.Generator().manual_seed(0))
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.to(device, torch.bfloat16) if bf16 else model.to(device)


def ragged_rows(folder: Path, name: str, rows: int = 12, length: int = 40) -> Any:
    """A token dataset: three documents in a row, rows of three lengths; the same for the same name."""
    draw = np.random.default_rng(sum(map(ord, name)))
    packed = []
    for row in range(rows):
        local = (np.arange(length - row % 3) // -(-length // 3)).astype(np.int32)
        packed.append(PackedRow(draw.integers(0, 300, len(local), dtype=np.int32), local + np.int32(3 * row)))
    write_rows(folder / f"{name}.arrow", packed)
    return TokenDataset.open(folder / f"{name}.arrow")


def collect(model: Any, world: Any, dataset: Any, folder: Path) -> dict[str, Any]:
    """Everything that a pass can record, as arrays by name."""
    collection = Collection(
        Engine(model),
        world,
        dataset,
        experts=4,
        top_k=2,
        recording=Recording(trace=True, nll=True, rows=True, sample_tokens=70),
        batch_rows=2,
        directory=folder,
    )
    sums = asdict(collection.run(StageLog("collect", None, None), "rows", save_every=0))
    return sums | {f"part {name}": np.array(part) for name, part in collection.parts.items()}


class Engine:
    """What the passes and the step need of an engine, for one process: a module, and AdamW where it is trained.

    DeepSpeed's is not used: it knows no device but the machine's.
    """

    def __init__(self, model: Any, optimizer: Any = None, *, accumulation: int = 1, clipping: float = 1.0) -> None:
        self.module, self.optimizer = model, optimizer
        self._accumulation, self._clipping = accumulation, clipping
        self._norm: Any = None

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def train(self) -> None:
        self.module.train()

    def eval(self) -> None:
        self.module.eval()

    def set_gradient_accumulation_boundary(self, boundary: bool) -> None:
        pass

    def backward(self, loss: Any) -> None:
        (loss / self._accumulation).backward()

    def step(self) -> None:
        self._norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self._clipping)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Any:
        return self._norm

    def was_step_applied(self) -> bool:
        return True


def adamw(model: Any, lr: float) -> Any:
    on_gpu = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr=lr, fused=True if on_gpu else None)


def unlearn(
    job: str, family: str, world: Any, folder: Path, *, steps: int = 3, bf16: bool = False
) -> tuple[list[dict[str, float]], Any, Any]:
    """(what :func:`run_step` told of each step, the trained model, a function that makes another step)."""
    settings = UnlearningConfig(**{"forget_rows": 4, "retain_rows": 4, "apply": "loss", **JOBS[job]})
    sides = {side: ragged_rows(folder, side) for side in ("forget", "retain", "alternative")}
    draw = np.random.default_rng(3)
    nll = {s: FlatArray([draw.uniform(3, 8, sides[s].tokens).astype(np.float32)]) for s in ("forget", "alternative")}
    batches = Batches(
        settings,
        0,
        sides["forget"],
        sides["retain"],
        FlatArray([draw.uniform(0.5, 2, sides["retain"].tokens).astype(np.float32)]),
        draw.uniform(0.5, 2, len(sides["retain"])),
        nll["forget"],
        sides["alternative"] if job == "dpo" else None,
        nll["alternative"],
    )
    model, frozen = (tiny_model(family, world.device, recompute=settings.recompute, bf16=bf16) for _ in range(2))
    model.train().requires_grad_(True)
    engine = Engine(model, adamw(model, 1e-3), accumulation=batches.micro_batches_per_step(world.size))
    chosen = {1: (2,)} if settings.seuf is not None else None
    trained = trainable.trained_by(model, settings, chosen, settings.last_layer(COMMON["num_hidden_layers"]))
    trainable.freeze(model, trained)
    objective: Any = Unlearning(settings, objective_of(settings, frozen, world.device), {})
    rows: Any = batches
    if job == "finetune":
        tuning = FinetuneConfig(models={"target": ["forget", "retain"]}, steps=4, batch_rows=4)
        objective, rows = NextToken(), CorpusBatches(tuning, 0, [sides["forget"], sides["retain"]])

    def step(number: int) -> dict[str, float]:
        data = rows.at(number, world.rank, world.size)
        return run_step(engine, world, data, objective, settings, number)

    torch.manual_seed(0)
    return [step(number) for number in range(steps)], model, step


def objective_of(settings: Any, frozen: Any, device: Any) -> Any:
    """The losses of a job with its frozen model beside it, as ``unlearning/objective.py`` makes them with DeepSpeed."""
    needs = FrozenNeeds.of(settings, frozen.config.num_hidden_layers)
    copy = Frozen(Engine(frozen), frozen.lm_head.weight if needs.logits else None) if needs.stays else None
    target = anchor = None
    if settings.forget_loss == "rmu":
        target = rmu_target(frozen.config.hidden_size, 0, settings.rmu.coefficient).to(device)
    if settings.seuf is not None:
        expected = torch.tensor([0.0, 0.0, 1.0, 0.0]).to(device)
        anchor = Anchor(1, expected)
    return ForgetRetain(settings, needs, target, copy, anchor)


# --- correctness on the device ---------------------------------------------------------------------------------------


def lone_world(device: str) -> Any:
    """A process group of this process alone, on ``device``; the GPU is the first one."""
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return World(0, 1, torch.device("cuda", 0) if device == "cuda" else torch.device(device))


@contextmanager
def counted_waits(device: Any) -> Iterator[Counter[tuple[str, str]]]:
    """How often the host waits for the device inside, by line, as torch's debug mode tells (none on the CPU)."""
    waits: Counter[tuple[str, str]] = Counter()
    if device.type != "cuda":
        yield waits
        return
    with warnings.catch_warnings(record=True) as error_info:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits.update(("waits", f"{w.filename}:{w.lineno}") for w in error_info if "synchronizing" in str(w.message))


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """By name, the largest difference over the largest value (at least .001); of integers, the share that differs."""
    result = {}
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        if np.issubdtype(a.dtype, np.floating):
            result[name] = float(np.abs(a - b).max(initial=0.0) / np.abs(a).max(initial=1e-3))
        else:
            result[name] = float((a != b).mean()) if a.size else 0.0
    return result


def compare_collect(
    family: str, world: World, folder: Path, observe: Callable[[Any], Any] = counted_waits
) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """(differences of a pass on the device from one on the CPU, waits of six batches by line).

    The waits are those that a pass over twelve batches has more than one over six, in bf16 on a GPU: in fp32 torch
    multiplies by groups one after the other there, and waits for their sizes.
    """
    dataset = ragged_rows(folder, "rows")
    here, there = (collect(tiny_model(family, w.device), w, dataset, folder) for w in (lone_world("cpu"), world))
    results = []
    for rows in (12, 24):
        model = tiny_model(family, world.device, bf16=world.device.type == "cuda")
        with observe(world.device) as waits:
            collect(model, world, ragged_rows(folder, "rows", rows), folder)
        results.append(waits)
    return differences(here, there), results[1] - results[0]


def compare_unlearn(
    job: str, world: World, folder: Path, observe: Callable[[Any], Any] = counted_waits
) -> tuple[dict[str, float], Counter[tuple[str, str]]]:
    """(differences of the losses and weights of three steps from those on the CPU, waits of another step by line)."""
    sides = []
    for place in (lone_world("cpu"), world):
        steps, model, step = unlearn(job, "mixtral", place, folder)
        losses = {f"{number} {key}": value for number, one in enumerate(steps) for key, value in one.items()}
        sides.append(losses | {name: value.detach().cpu().numpy() for name, value in model.named_parameters()})
    actual = differences(*sides)
    if world.device.type == "cuda":
        *_, step = unlearn(job, "mixtral", world, folder, steps=1, bf16=True)
    with observe(world.device) as waits:
        step(3)
    return actual, waits


def correctness(comparison: tuple[dict[str, float], Counter[tuple[str, str]]], tolerance: float, waits: int) -> Any:
    """What is reported of a comparison: right within a tolerance (relative) and with at most so many waits."""
    actual, lines = comparison
    return {
        "worst": max(actual.items(), key=lambda item: item[1]),
        "waits": [[*key, number] for key, number in lines.items()],
        "ok": max(actual.values()) <= tolerance and sum(lines.values()) <= waits,
    }


def correct_collect(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    world = lone_world(options.device)
    result = {family: correctness(compare_collect(family, world, folder), 1e-3, waits=6) for family in TINY}
    return result | {"ok": all(entry["ok"] for entry in result.values())}


def correct_unlearn(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    world = lone_world(options.device)
    result = {job: correctness(compare_unlearn(job, world, folder), 1e-2, waits=1) for job in JOBS}
    return result | {"ok": all(entry["ok"] for entry in result.values())}


# --- speed -----------------------------------------------------------------------------------------------------------


def shape_of(name: str, options: argparse.Namespace, layers: int | None = None) -> tuple[str, dict[str, Any]]:
    family, shape = bench.SHAPES[name]
    if options.tiny:
        shape = COMMON | TINY[family] | {"num_hidden_layers": 2}
    elif layers is not None:
        shape = shape | {"num_hidden_layers": layers}
    return family, shape


def rates(seconds: float, tokens: int, flops: float, device: Any) -> dict[str, float]:
    """One measurement, with the peak of memory since the last one."""
    result = {"tokens_per_s": tokens / seconds, "seconds": seconds}
    if device.type == "cuda":
        card = torch.cuda.get_device_name()
        peak = next((value for key, value in bench.PEAK_FLOPS.items() if key in card), None)
        result |= {"peak_bytes": torch.cuda.max_memory_allocated()} | ({"mfu": flops / seconds / peak} if peak else {})
        torch.cuda.reset_peak_memory_stats()
    return result


def freed(device: Any) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def bench_of_collect(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Tokens per second of plain forward passes and of collecting, in one process."""
    world = lone_world(options.device)
    device, dtype = world.device, torch.float32 if options.tiny else torch.bfloat16
    family, shape = shape_of(name, options)
    rows, length, batch_rows, rounds = (4, 32, 2, 1) if options.tiny else (32, 2048, 8, 3)
    dataset = bench.dataset_of(folder, shape["vocab_size"], rows, length)
    batches = [dataset.batch(range(first, first + batch_rows), pad_id=0) for first in range(0, rows, batch_rows)]
    inputs = [(batch.input_ids_BS.to(device), batch.position_ids_BS.to(device)) for batch in batches]
    tokens, result = rows * length, {}

    def measure(key: str, model: Any, run: Callable[[], Any]) -> None:
        flops = 2 * tokens * bench.active_parameters(model, shape)
        result[key] = rates(bench.median_s(run, rounds, device), tokens, flops, device)

    for kernel in ("grouped_mm", "eager"):
        model = bench.build(family, shape, dtype, device, kernel)

        @torch.no_grad()
        def plain(*, packed: bool, model: Any = model) -> None:
            for ids, positions in inputs:
                model(input_ids=ids, position_ids=positions if packed else None, use_cache=False)

        for mode in ("packed", "causal"):
            measure(f"plain {kernel} {mode}", model, lambda packed=mode == "packed", plain=plain: plain(packed=packed))
        if kernel == bench.chosen_kernel(shape, device):
            adopt(model)
            leave_out(model, ModelParts(head=False, last_output=False), ep=1)
            collecting = bench.collecting(world, Engine(model), dataset, shape, batch_rows, folder)
            measure("collect", model, collecting)
            del collecting
        del model, plain
        freed(device)
    plain_best = max(entry["tokens_per_s"] for key, entry in result.items() if key.startswith("plain"))
    return result | {"speedup": result["collect"]["tokens_per_s"] / plain_best}


def bench_of_unlearn(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An NPO step, ours and the plain loop, one after the other in one process."""
    world = lone_world(options.device)
    device, dtype = world.device, torch.float32 if options.tiny else torch.bfloat16
    family, shape = shape_of(name, options, TRAINED_LAYERS[name])
    rows, length, steps = (2, 32, 1) if options.tiny else (2, 2048, 6)
    dataset = bench.dataset_of(folder, shape["vocab_size"], 8 * rows, length)
    settings = UnlearningConfig(forget_loss="npo", apply="loss", forget_rows=rows, retain_rows=rows)
    ones = FlatArray([np.ones(dataset.tokens, dtype=np.float32)])
    batches = Batches(settings, 0, dataset, dataset, ones, np.ones(len(dataset)), ones)
    kernel = bench.chosen_kernel(shape, device)

    def engine() -> Any:
        model = bench.build(family, shape, dtype, device, kernel)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train().requires_grad_(True)
        return Engine(model, adamw(model, 1e-6))

    def measured(step: Callable[[int], Any], model: Any) -> dict[str, float]:
        freed(device)
        numbers = iter(range(1000))
        seconds = bench.median_s(lambda: step(next(numbers)), steps, device)
        flops = 6 * 2 * rows * length * bench.active_parameters(model, shape)
        return rates(seconds, 2 * rows * length, flops, device)

    def ours() -> dict[str, float]:
        trained = engine()
        adopt(trained.module)
        objective = Unlearning(settings, objective_of(settings, trained.module, device), {})

        def step(number: int) -> None:
            run_step(trained, world, batches.at(number, 0, 1), objective, settings, number)

        return measured(step, trained.module)

    def plain() -> dict[str, float]:
        trained, frozen = engine(), bench.build(family, shape, dtype, device, kernel)
        beta = settings.npo.beta

        def row_nll(net: Any, batch: Any, rows: slice) -> Any:
            ids, counted = batch.input_ids_BS[rows], batch.counted_BS[rows]
            logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
            flat = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
            return (flat.view(len(ids), -1) * counted[:, :-1]).sum(1)

        def step(number: int) -> None:
            batch = batches.at(number, 0, 1).micro_batches[0].to(device)
            forget, retain = slice(batch.forget_rows), slice(batch.forget_rows, None)
            with torch.no_grad():
                reference = row_nll(frozen, batch, forget)
            nll = row_nll(trained, batch, slice(None))
            loss = -(2 / beta) * functional.logsigmoid(beta * (nll[forget] - reference)).mean()
            loss = loss + nll[retain].sum() / batch.counted_BS[retain].sum()
            trained.backward(loss)
            trained.step()
            float(loss.detach())

        return measured(step, trained.module)

    result: dict[str, Any] = {}
    for arm in (ours, plain):
        try:
            result[arm.__name__] = arm()
        except torch.OutOfMemoryError as error:  # what one arm needs says nothing against the other
            result[arm.__name__] = {"error": str(error).splitlines()[0]}
        freed(device)
    if any("error" in entry for entry in result.values()):
        return result
    result["speedup"] = result["plain"]["seconds"] / result["ours"]["seconds"]
    if "peak_bytes" in result["ours"]:
        result["memory_ratio"] = result["ours"]["peak_bytes"] / result["plain"]["peak_bytes"]
    return result


# --- parts, each in a process of its own -----------------------------------------------------------------------------

Part = Callable[[argparse.Namespace, Path], dict[str, Any]]
PARTS: dict[str, tuple[Part, float]] = {  # what is run, and its limit in seconds
    "correct_collect": (correct_collect, 80),
    "correct_unlearn": (correct_unlearn, 80),
    **{f"collect_{name}": (lambda o, f, n=name: bench_of_collect(n, o, f), 90) for name in bench.SHAPES},
    **{f"unlearn_{name}": (lambda o, f, n=name: bench_of_unlearn(n, o, f), 70) for name in TRAINED_LAYERS},
}


def run_part(name: str, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """One part in a fresh process; whatever happens to it is in what is returned."""
    command = [sys.executable, str(Path(__file__).resolve()), "--part", name, "--device", options.device]
    command += ["--tiny"] if options.tiny else []
    began_s = time.perf_counter()
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"not done after {limit_s:.0f} s", "wall_s": limit_s}
    wall_s = time.perf_counter() - began_s
    try:
        result = json.loads(ended.stdout.splitlines()[-1])
        assert ended.returncode == 0
    except (AssertionError, IndexError, ValueError):
        return {"ok": False, "error": f"status {ended.returncode}: {ended.stderr[-2000:]}", "wall_s": wall_s}
    return {"ok": True, "wall_s": wall_s, **result}


def machine(device: str) -> dict[str, str]:
    card = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"python": platform.python_version(), **versions, "device": card}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes at which the numbers mean nothing")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="default: all")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> int:
    began_s = time.perf_counter()
    options = parse(arguments)
    if options.part is not None:
        with tempfile.TemporaryDirectory() as folder:
            print("\n" + json.dumps(PARTS[options.part][0](options, Path(folder))), flush=True)
        return 0
    result: dict[str, Any] = {"machine": machine(options.device), "parts": {}}
    for name in options.only:
        part = result["parts"][name] = run_part(name, options, PARTS[name][1])
        print(f"{name}: {'ok' if part['ok'] else part.get('error', 'wrong')}", file=sys.stderr, flush=True)
    result["ok"] = all(part["ok"] for part in result["parts"].values())
    result["wall_s"] = time.perf_counter() - began_s
    print(json.dumps(result, indent=1))
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
