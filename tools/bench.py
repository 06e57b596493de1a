#!/usr/bin/env python3
"""Time and memory of trace_ds against what people do otherwise, both measured in one run, in turns.

    python tools/bench.py collect step evaluate prepare convert calibrate      # any of them
    python tools/bench.py step --hidden 768 --layers 4 --memory-only           # 200 million parameters

Weights are random and nothing is downloaded. A ratio is the median, over the rounds, of ours / theirs, with the first
and third quartile: of CPU time, which other work on the machine disturbs less than the clock, except where a line says
``time``. One thread unless ``--threads`` says otherwise.

========= ============================================= ==============================================================
work      ours                                          against
========= ============================================= ==============================================================
collect   ``Collection.run`` over a dataset on disk     hooks on the routers of a transformers body, counts by
                                                        ``bincount``; the same engine's bare forward passes
step      a step of ``unlearn`` with loss weights       open-unlearning's loss in a plain loop with fused AdamW (whole
                                                        logits; NPO and RMU with a copied reference model)
evaluate  ``LanguageModel.score``                       lm-evaluation-harness's ``HFLM`` on the same requests: four
                                                        letters, and four endings, of each question
prepare   the stage, hashes and all                     ``datasets``: load, map (tokenise), map (pack), save
convert   checkpoint → Hugging Face directory           a copy of as many bytes; ``ds_to_universal``
calibrate weights of all tokens of a synthetic trace    scipy's L-BFGS on the dual of the same targets
========= ============================================= ==============================================================
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from trace_ds.config.load import load_config
from trace_ds.corpora.dataset import PackedRow, TokenDataset, TokenMap, write_rows
from trace_ds.models.attention import adopt
from trace_ds.models.engine import expert_kernel
from trace_ds.parallel.world import World, join, leave, quiet_deepspeed
from trace_ds.routing.collection import Collection, frozen_pass
from trace_ds.routing.token_files import Recording
from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import StageLog
from trace_ds.stages.pipeline import STAGES

COMMON = {"tie_word_embeddings": False, "max_position_embeddings": 4096}
# Published shapes, of which `num_hidden_layers` layers are built (tools/gpu_acceptance.py).
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    name: (name, dict(zip(("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads",
                           "num_experts_per_tok", "vocab_size"), sizes, strict=True)) | own)
    for name, sizes, own in (
        ("mixtral", (8, 4096, 32, 8, 2, 32000), {"intermediate_size": 14336, "num_local_experts": 8}),
        ("olmoe", (16, 2048, 16, 16, 8, 50304), {"intermediate_size": 1024, "num_experts": 64}),
        ("qwen3_moe", (12, 2048, 32, 4, 8, 151936),
         {"moe_intermediate_size": 768, "intermediate_size": 6144, "head_dim": 128, "num_experts": 128}),
    )
}  # fmt: skip
SAMPLE_TOKENS = 200_000  # as collect
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bf16, from the vendor's data sheets
WORDS = 2000  # of the made-up language
LOSSES = ("graddiff", "npo", "rmu")
BLOCK_BYTES = 4 << 20
Options = argparse.Namespace


# --- measuring -------------------------------------------------------------------------------------------------------


def rounds_s(functions: dict[str, Callable[[], Any]], rounds: int, device: Any) -> dict[str, list[tuple[float, float]]]:
    """(seconds, CPU seconds of the process) of each function in each round, in turns, after one warm-up of each."""
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    for number in range(rounds + 1):
        for name, function in functions.items() if number % 2 else reversed(functions.items()):
            synchronize(device)
            began = time.perf_counter(), time.process_time()
            function()
            synchronize(device)
            if number:
                taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    return taken


def synchronize(device: Any) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def median_s(function: Callable[[], Any], rounds: int, device: Any) -> float:
    return statistics.median(seconds for seconds, _ in rounds_s({"": function}, rounds, device)[""])


def ratio(ours: list[tuple[float, float]], theirs: list[tuple[float, float]], clock: int = 1) -> dict[str, float]:
    """Ours / theirs round by round: the median and the quartiles; ``clock`` 0: wall clock, 1: CPU time."""
    ratios = [a[clock] / b[clock] for a, b in zip(ours, theirs, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    seconds = {
        "ours_s": statistics.median(a[clock] for a in ours),
        "theirs_s": statistics.median(b[clock] for b in theirs),
    }
    return {"ratio": middle, "low": low, "high": high, **seconds}


def forget_peak() -> None:
    """From now on :func:`peak_bytes` counts anew."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_bytes() -> int:
    """The largest resident set of this process so far."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def in_fresh_process(work: str, part: str, options: Options, folder: Path) -> dict[str, Any]:
    """What ``part`` of a work prints, run in a process of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), *options.words, "--part", work, part, str(folder)]
    # One arena and no pools of freed blocks: resident memory is what is in use.
    steady = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = os.environ | steady | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(options.threads)}
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if ended.returncode:
        raise SystemExit(f"{work} {part} failed:\n{ended.stderr[-3000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


# --- models and text -------------------------------------------------------------------------------------------------


def build(family: str, shape: dict[str, Any], dtype: Any, device: Any, experts: str | None = None) -> Any:
    """A random model on the device (normal weights: what is measured does not depend on them)."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **shape)
    arguments = {} if experts is None else {"experts_implementation": experts}
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa", **arguments)
    return model.eval().requires_grad_(False)


def small_shape(options: Options) -> dict[str, Any]:
    """OLMoE's kind of shape: many small experts, eight of them active."""
    heads = max(1, options.hidden // 64)
    sizes = {"hidden_size": options.hidden, "intermediate_size": max(8, options.hidden // 4)}
    sizes |= {"num_attention_heads": heads, "num_key_value_heads": heads, "num_hidden_layers": options.layers}
    return sizes | {"num_experts": 32, "num_experts_per_tok": 8, "vocab_size": WORDS + 48}


def experts_of(shape: dict[str, Any]) -> int:
    return int(shape.get("num_local_experts") or shape["num_experts"])


def chosen_kernel(shape: dict[str, Any], device: Any) -> str:
    """What ``collect`` chooses for a shape here: eager or grouped_mm."""
    info: Any = SimpleNamespace(config=shape)
    return expert_kernel(info, device) or "grouped_mm"


def active_parameters(model: Any, shape: dict[str, Any]) -> int:
    """Parameters that take part in one token's forward pass, without the embedding and what was left out."""
    total = 0
    for name, parameter in model.named_parameters():
        if "embed_tokens" not in name:
            share = shape["num_experts_per_tok"] / experts_of(shape) if parameter.dim() == 3 else 1
            total += int(parameter.numel() * share)
    return total


def tokenizer_of_words() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def text_of(draw: random.Random, words: int, low: int = 0, high: int = WORDS) -> str:
    return " ".join(f"w{draw.randrange(low, high)}" for _ in range(words))


def write_texts(path: Path, texts: Iterator[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


# --- collect ---------------------------------------------------------------------------------------------------------


def dataset_of(folder: Path, vocabulary: int, rows: int, length: int) -> Any:
    """A token dataset of packed rows, four documents in each."""
    draw = np.random.default_rng(1)
    local = (np.arange(length) // -(-length // 4)).astype(np.int32)
    packed = (
        PackedRow(draw.integers(0, vocabulary, length, dtype=np.int32), local + np.int32(4 * row))
        for row in range(rows)
    )
    write_rows(folder / "rows.arrow", packed)
    return TokenDataset.open(folder / "rows.arrow")


def collecting(
    world: Any, engine: Any, dataset: Any, shape: dict[str, Any], batch_rows: int, folder: Path
) -> Callable[[], Any]:
    """A function that collects the dataset as ``trace-ds collect`` does, from opening the parts to the statistics, with
    the selections of each row and the routing of sampled tokens."""
    recording = Recording(trace=False, nll=False, rows=True, sample_tokens=SAMPLE_TOKENS)
    sizes = {"experts": experts_of(shape), "top_k": shape["num_experts_per_tok"], "batch_rows": batch_rows}

    def run() -> None:
        collection = Collection(engine, world, dataset, recording=recording, directory=folder, **sizes)
        collection.run(StageLog("collect", None, None), "rows", save_every=0)

    return run


def hooked(model: Any, batches: list[Any], experts: int) -> Callable[[], Any]:
    """A function that counts with a careful script: no logits, one hook a router, the counts added on the device."""

    def run() -> Any:
        routers = [layer.mlp.gate for layer in model.model.layers]
        counts_LE = torch.zeros(len(routers), experts, dtype=torch.int64)

        def count(number: int, output: Any) -> None:
            counts_LE[number] += torch.bincount(output[2].flatten(), minlength=experts)

        hooks = [
            router.register_forward_hook(lambda _m, _i, output, number=number: count(number, output))
            for number, router in enumerate(routers)
        ]
        with torch.no_grad():
            for batch in batches:
                model.model(input_ids=batch.input_ids_BS, use_cache=False)
        for hook in hooks:
            hook.remove()
        return counts_LE

    return run


def bench_collect(options: Options, folder: Path) -> dict[str, Any]:
    world = join(options.threads, timeout_minutes=10)
    shape = small_shape(options) | {"num_hidden_layers": options.collect_layers}
    dataset = dataset_of(folder, shape["vocab_size"], options.rows * 2, options.context)
    batches = [dataset.batch(range(n, n + options.rows), pad_id=0) for n in (0, options.rows)]
    model = build("olmoe", shape, torch.float32, world.device, chosen_kernel(shape, world.device))
    theirs = hooked(copy.deepcopy(model), batches, experts_of(shape))
    adopt(model)
    ds_config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 0}, "steps_per_print": 1 << 62}
    engine = quiet_deepspeed().initialize(model=model, config=ds_config)[0]
    engine.eval()

    def bare() -> None:
        for batch in batches:
            frozen_pass(engine, batch, world.device)

    ours = collecting(world, engine, dataset, shape, options.rows, folder)
    taken = rounds_s({"ours": ours, "hooks": theirs, "bare": bare}, options.rounds, world.device)
    return {f"against {name}": ratio(taken["ours"], taken[name]) for name in ("hooks", "bare")}


# --- step ------------------------------------------------------------------------------------------------------------


def write_run(folder: Path, options: Options) -> Path:
    """A model, two corpora of whole rows, and a configuration; prepared, collected and calibrated."""
    build("olmoe", small_shape(options), torch.float32, "cpu").save_pretrained(folder / "model")
    tokenizer_of_words().save_pretrained(folder / "model")
    draw, data = random.Random(0), {}
    for side, low, high in (("forget", 0, WORDS // 2), ("retain", WORDS // 4, WORDS)):
        texts = (text_of(draw, options.context - 2, low, high) for _ in range(2 * options.rows))
        data[side] = [{"path": write_texts(folder / f"{side}.jsonl", texts)}]
    rows = {"forget_rows": options.rows, "retain_rows": options.rows, "micro_batch_rows": 2 * options.rows}
    config = {
        "name": "bench",
        "model": {"path": str(folder / "model"), "dtype": "fp32"},
        "data": {**data, "context_length": options.context},
        "distributed": {"threads": options.threads},
        "statistics": {"nll": True, "batch_rows": options.rows},
        "calibration": {"if_none_found": "continue"},
        "unlearning": {"apply": "loss", "optimizer": {"lr": 1e-5}, **rows},
    }
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    written, run = load_config(str(folder / "config.yaml"), [], folder / "run")[0], RunDirectory.at(folder / "run")
    run.mark()
    world = join(options.threads, timeout_minutes=30)
    for verb in ("prepare", "collect", "calibrate"):
        STAGES[verb].module.check(written, run, 1).run(world if verb == "collect" else None)
    return folder / "config.yaml"


def changes_of(loss: str, options: Options) -> list[str]:
    """RMU as published: steered at one layer, the ``down_proj`` of it and of the two below trained."""
    if loss != "rmu":
        return [f"unlearning.forget_loss={loss}"]
    layer = rmu_layer(options)
    patterns = [f"model.layers.{n}.mlp.experts.down_proj" for n in range(max(0, layer - 2), layer + 1)]
    return [
        "unlearning.forget_loss=rmu",
        f"unlearning.rmu.layer={layer}",
        f"unlearning.trainable={json.dumps(patterns)}",
    ]


def rmu_layer(options: Options) -> int:
    return max(0, options.layers // 2)


def our_step(loss: str, options: Options, folder: Path, world: World) -> Callable[[int], Any]:
    from trace_ds.stages import unlearn
    from trace_ds.unlearning.objective import make_objective
    from trace_ds.unlearning.trainer import run_step

    config, _ = load_config(str(folder / "config.yaml"), changes_of(loss, options), folder / "run")
    job = unlearn.check(config, RunDirectory.at(folder / "run"), 1)
    batches, settings = unlearn.make_unlearn_batches(job), config.unlearning
    engine, _ = unlearn.make_engine(job, world, batches)
    state: dict[str, Any] = {"step": 0, "seed": 0}
    shape = {"dtype": config.model.dtype, "ep": 1, "seed": config.seed}
    objective, _ = make_objective(settings, job.info, world, batches, state, **shape)

    def step(number: int) -> None:
        run_step(engine, world, batches.at(number, 0, 1), objective, settings, number)

    return step


def plain_step(loss: str, options: Options, folder: Path) -> Callable[[int], Any]:
    """open-unlearning's loss, as its trainer computes it, on rows of the same size."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).train()
    frozen = copy.deepcopy(model).eval().requires_grad_(False) if loss in ("npo", "rmu") else None
    layer, control = rmu_layer(options), torch.rand(options.hidden)
    if loss == "rmu":
        trained = {f"model.layers.{n}.mlp.experts.down_proj" for n in range(max(0, layer - 2), layer + 1)}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    draw = torch.Generator().manual_seed(0)

    def nll(net: Any, ids_BS: torch.Tensor) -> torch.Tensor:
        """Mean NLL of each row."""
        logits = net(input_ids=ids_BS, use_cache=False).logits[:, :-1]
        flat = functional.cross_entropy(logits.flatten(0, 1).float(), ids_BS[:, 1:].flatten(), reduction="none")
        return flat.view(len(ids_BS), -1).mean(1)

    def hidden(net: Any, ids_BS: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = net.model.layers[layer].register_forward_hook(lambda _m, _i, output: kept.append(output))
        net(input_ids=ids_BS, use_cache=False)
        hook.remove()
        return kept[0] if isinstance(kept[0], torch.Tensor) else kept[0][0]

    def loss_of(forget_BS: torch.Tensor, retain_BS: torch.Tensor) -> torch.Tensor:
        if loss == "rmu":
            with torch.no_grad():
                kept = hidden(frozen, retain_BS)
            steered = functional.mse_loss(hidden(model, forget_BS), (2 * control).expand(*forget_BS.shape, -1))
            return steered + functional.mse_loss(hidden(model, retain_BS), kept)
        retained = nll(model, retain_BS).mean()
        if loss == "graddiff":
            return retained - nll(model, forget_BS).mean()
        with torch.no_grad():
            reference = nll(frozen, forget_BS)
        return retained - 20 * functional.logsigmoid(0.1 * (nll(model, forget_BS) - reference)).mean()

    def step(number: int) -> None:
        forget_BS, retain_BS = torch.randint(3, WORDS, (2, options.rows, options.context), generator=draw)
        loss_of(forget_BS, retain_BS).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def part_of_step(part: str, options: Options, folder: Path) -> dict[str, Any]:
    """``prepare``, ``LOSS times`` or ``LOSS ours|plain`` (its memory above what the process held before)."""
    if part == "prepare":
        return {"config": str(write_run(folder, options))}
    loss, kind = part.split()
    world = join(options.threads, timeout_minutes=30)
    makers = {
        "ours": lambda: our_step(loss, options, folder, world),
        "plain": lambda: plain_step(loss, options, folder),
    }
    if kind != "times":
        base = peak_bytes()
        step = makers[kind]()
        forget_peak()
        for number in range(3):
            step(number)
        return {"bytes": peak_bytes() - base}
    steps, numbers = {name: make() for name, make in makers.items()}, iter(range(1 << 30))
    functions = {name: lambda step=step: step(next(numbers)) for name, step in steps.items()}
    taken = rounds_s(functions, options.rounds, world.device)
    return ratio(taken["ours"], taken["plain"])


def bench_step(options: Options, folder: Path) -> dict[str, Any]:
    in_fresh_process("step", "prepare", options, folder)
    result: dict[str, Any] = {}
    for loss in LOSSES:
        if not options.memory_only:
            result[loss] = in_fresh_process("step", f"{loss} times", options, folder)
        ours, theirs = (
            in_fresh_process("step", f"{loss} {kind}", options, folder)["bytes"] for kind in ("ours", "plain")
        )
        result[f"{loss} memory"] = {"ratio": ours / theirs, "ours_bytes": ours, "theirs_bytes": theirs}
    return result


# --- evaluate --------------------------------------------------------------------------------------------------------


def bench_evaluate(options: Options, folder: Path) -> dict[str, Any]:
    """Random questions of 40 to 90 words: four letters to choose from, without and with five questions before them that
    all share (as in MMLU), or four endings of 10 to 20 words."""
    from lm_eval.models.huggingface import HFLM

    from trace_ds.evaluation.language_model import LanguageModel, ModelSettings, Sequence

    torch.set_num_threads(options.threads)
    tokenizer, draw, device = tokenizer_of_words(), random.Random(0), torch.device("cpu")
    model = build("olmoe", small_shape(options), torch.float32, "cpu")
    theirs: Any = HFLM(copy.deepcopy(model), backend="causal", tokenizer=tokenizer, batch_size=options.rows)
    adopt(model)
    ours = LanguageModel(model, tokenizer, ModelSettings("fp32", False, False, options.rows))
    result: dict[str, Any] = {}
    for kind, low, high, shots in (("letters", 1, 1, 0), ("letters, five-shot", 1, 1, 5), ("endings", 10, 20, 0)):
        requests, examples = [], tokenizer.encode(text_of(draw, 66 * shots))
        for _ in range(options.questions):
            context = examples + tokenizer.encode(text_of(draw, draw.randint(40, 90)))
            endings = [tokenizer.encode(text_of(draw, draw.randint(low, high))) for _ in range(4)]
            requests += [(("", f"{ending}"), context, ending) for ending in endings]
        sequences = [Sequence(tuple(context + ending), len(context)) for _, context, ending in requests]
        scores: dict[str, list[float]] = {}

        def run_ours(sequences: Any = sequences, scores: Any = scores) -> None:
            scores["ours"] = [float(each.log_prob.sum(dtype=np.float64)) for each in ours.score(sequences)]

        def run_theirs(requests: Any = requests, scores: Any = scores) -> None:
            scores["theirs"] = [pair[0] for pair in theirs._loglikelihood_tokens(requests, disable_tqdm=True)]

        taken = rounds_s({"ours": run_ours, "theirs": run_theirs}, options.rounds, device)
        difference = float(np.abs(np.subtract(scores["ours"], scores["theirs"])).max())
        result[kind] = ratio(taken["ours"], taken["theirs"]) | {"largest_difference": difference}
    return result


# --- prepare ---------------------------------------------------------------------------------------------------------


def with_datasets(folder: Path, options: Options, context: int) -> None:
    """What people write: tokenise and pack with ``datasets.map``, save to disk."""
    import datasets

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    loaded: Any = datasets.load_dataset(
        "json", data_files=str(folder / "corpus.jsonl"), split="train", cache_dir=str(folder / "cache")
    )

    def tokenise(batch: Any) -> Any:
        return {"ids": [[0, *ids, 1] for ids in tokenizer(batch["text"], add_special_tokens=False)["input_ids"]]}

    def pack(batch: Any) -> Any:
        ids = [token for document in batch["ids"] for token in document]
        return {"ids": [ids[start : start + context] for start in range(0, len(ids), context)]}

    arguments = {"batched": True, "num_proc": options.workers, "load_from_cache_file": False}
    mapped = loaded.map(tokenise, remove_columns=["text"], **arguments).map(pack, **arguments)
    mapped.save_to_disk(str(folder / "saved"), num_proc=options.workers)


def bench_prepare(options: Options, folder: Path) -> dict[str, Any]:
    import datasets

    datasets.disable_progress_bars()
    build("olmoe", small_shape(options), torch.float32, "cpu").save_pretrained(folder / "model")
    tokenizer_of_words().save_pretrained(folder / "model")
    draw, words = random.Random(0), int(options.megabytes * 1e6 / 5.6)  # bytes of a word, with the space
    texts = (text_of(draw, draw.randint(50, 800)) for _ in range(max(1, words // 425)))
    write_texts(folder / "corpus.jsonl", texts)
    write_texts(folder / "small.jsonl", (text_of(draw, 50) for _ in range(8)))
    data = {"forget": [{"path": str(folder / "small.jsonl")}], "retain": [{"path": str(folder / "corpus.jsonl")}]}
    config = {"name": "bench", "model": {"path": str(folder / "model")}, "data": data}
    (folder / "config.yaml").write_text(json.dumps(config), encoding="utf-8")
    written, _ = load_config(str(folder / "config.yaml"), [], folder / "run")

    def ours() -> None:
        run = RunDirectory.at(folder / "run")
        run.mark()
        STAGES["prepare"].module.check(written, run, 1).run(None)
        shutil.rmtree(folder / "run")

    def theirs() -> None:
        with_datasets(folder, options, written.data.context_length)
        shutil.rmtree(folder / "saved")
        shutil.rmtree(folder / "cache")

    taken = rounds_s({"ours": ours, "theirs": theirs}, options.rounds, torch.device("cpu"))
    return {"time against datasets": ratio(taken["ours"], taken["theirs"], 0) | {"workers": options.workers}}


# --- convert ---------------------------------------------------------------------------------------------------------


def make_checkpoint(rank: int, store: str, layers: int, directory: str) -> None:
    """One of two processes that make a step of a Mixtral under ZeRO-3 with AutoEP, in bf16, and save."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    from torch import distributed

    from trace_ds.models.autoep import readable_recorders

    torch.set_num_threads(1)
    deepspeed = quiet_deepspeed()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    deepspeed.init_distributed("gloo", verbose=False)
    shape = SHAPES["mixtral"][1] | {"num_hidden_layers": layers, "hidden_size": 512, "intermediate_size": 1792}
    shape |= {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096}
    model = build("mixtral", shape, torch.bfloat16, "cpu").train().requires_grad_(True)
    if rank == 0:
        model.config.save_pretrained(Path(directory) / "base")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "steps_per_print": 1 << 60,
        "zero_optimization": {"stage": 3, "sub_group_size": 1e8},
        "bf16": {"enabled": True},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "expert_parallel": {"enabled": True, "autoep_size": 2, "preset_model": "mixtral"},
    }
    with readable_recorders():
        engine, *_ = deepspeed.initialize(model=model, config=config, model_parameters=model.parameters())
    tokens = torch.randint(0, 4096, (1, 32), generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    engine.save_checkpoint(str(Path(directory) / "checkpoint"), tag="step_000001", save_latest=True)
    distributed.barrier()
    distributed.destroy_process_group()


def copied(source: Path, destination: Path, read_bytes: int, write_bytes: int) -> None:
    """Read ``read_bytes`` of the optimizer files and write ``write_bytes``, interleaved, one thread, then fsync."""
    block, done, written = bytearray(BLOCK_BYTES), 0, 0
    with destination.open("wb", buffering=0) as out:
        for path in sorted(source.glob("*_optim_states.pt")):
            with path.open("rb", buffering=0) as handle:
                while done < read_bytes and (count := handle.readinto(block)):
                    done += count
                    while written * read_bytes < done * write_bytes and written < write_bytes:
                        written += out.write(memoryview(block)[: min(len(block), write_bytes - written)])
        os.fsync(out.fileno())


def part_of_convert(part: str, options: Options, folder: Path) -> dict[str, Any]:
    """``times``: ours and the copy in turns; ``memory``: one conversion's peak above the process's own start."""
    from trace_ds.conversion.convert import convert_checkpoint
    from trace_ds.tensors.layouts import read_layout

    step, base = folder / "checkpoint" / "step_000001", folder / "base"
    read_layout(base)  # makes transformers import what it needs: start-up, not conversion
    sizes: dict[str, int] = {}

    def ours() -> None:
        shutil.rmtree(folder / "out", ignore_errors=True)
        report = convert_checkpoint(step, folder / "out", base_model=base, jobs=2)
        sizes.update(written=report["bytes"], read=report["parameters"] * 4)

    ours()
    if part == "memory":
        return {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    theirs = lambda: copied(step, folder / "copy", sizes["read"], sizes["written"])  # noqa: E731
    taken = rounds_s({"ours": ours, "theirs": theirs}, options.rounds, torch.device("cpu"))
    result = {"time against a copy": ratio(taken["ours"], taken["theirs"], 0)}
    return result | {"CPU time against a copy": ratio(taken["ours"], taken["theirs"])}


def bench_convert(options: Options, folder: Path) -> dict[str, Any]:
    arguments = (str(folder / "store"), options.convert_layers, str(folder))
    torch.multiprocessing.spawn(make_checkpoint, arguments, nprocs=2)
    result = in_fresh_process("convert", "times", options, folder)
    memory = in_fresh_process("convert", "memory", options, folder)["peak_bytes"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", str(folder / "checkpoint" / "step_000001"), "--output_folder", str(folder / "theirs")]
    began_s = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"DS_ACCELERATOR": "cpu"})
    theirs_s, theirs_bytes = (
        time.perf_counter() - began_s,
        1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
    )
    ours_s = result["time against a copy"]["ours_s"]
    result["time against ds_to_universal"] = {"ratio": ours_s / theirs_s, "ours_s": ours_s, "theirs_s": theirs_s}
    # the largest of its worker processes, of which it runs several: a lower bound of its memory
    result["memory against ds_to_universal"] = {"ratio": memory / theirs_bytes, "ours_bytes": memory}
    return result


# --- calibrate -------------------------------------------------------------------------------------------------------

TRACES = {  # MoE layers, routed experts, top-k
    "mixtral_8x7b": (32, 8, 2),
    "olmoe_1b_7b": (16, 64, 8),
    "qwen3_30b_a3b": (48, 128, 8),
}
TOPICS, TYPES, VARIANTS = 20, 2048, 4
DOCUMENT_TOKENS, ROW_TOKENS = 500, 2048
NEAR_SHARE = 0.05


def choice_tables(rng: np.random.Generator, layers: int, experts: int, top_k: int) -> np.ndarray:
    """uint8 [topics, layers, types, variants, K]: Gumbel top-k of type + topic + noise logits; topic 1 is near 0.

    The correlations of real routing: the token's type (Zipf-distributed) decides most of the choice in each layer, the
    document's topic some of it, and a little is noise.
    """
    type_logits = rng.normal(scale=1.5, size=(layers, TYPES, experts)).astype(np.float32)
    topic_logits = rng.normal(scale=0.5, size=(TOPICS, layers, experts)).astype(np.float32)
    topic_logits[1] = 0.8 * topic_logits[0] + 0.2 * topic_logits[1]
    tables = np.empty((TOPICS, layers, TYPES, VARIANTS, top_k), np.uint8)
    for topic in range(TOPICS):
        for layer in range(layers):
            logits = type_logits[layer][:, None, :] + topic_logits[topic, layer]
            noisy = logits + rng.gumbel(size=(TYPES, VARIANTS, experts)).astype(np.float32)
            tables[topic, layer] = np.argpartition(noisy, experts - top_k, axis=2)[:, :, -top_k:]
    return tables


def write_trace(path: Path, rng: np.random.Generator, tables: np.ndarray, tokens: int, forget: bool) -> None:
    """``PATH.npy`` uint8 [tokens, L, K] and ``PATH_documents.npy`` int32 [tokens]."""
    _, layers, _, _, top_k = tables.shape
    trace = np.lib.format.open_memmap(path.with_suffix(".npy"), "w+", np.uint8, (tokens, layers, top_k))
    documents = np.arange(tokens, dtype=np.int32) // DOCUMENT_TOKENS
    topics = np.zeros(int(documents[-1]) + 1, np.int64)
    if not forget:
        topics = np.where(rng.random(len(topics)) < NEAR_SHARE, 1, rng.integers(2, TOPICS, len(topics)))
    zipf = 1.0 / np.arange(1, TYPES + 1)
    cumulative = np.cumsum(zipf / zipf.sum())
    for start in range(0, tokens, 1 << 18):
        stop = min(start + (1 << 18), tokens)
        kinds = np.minimum(np.searchsorted(cumulative, rng.random(stop - start)), TYPES - 1)
        of_topic = topics[documents[start:stop]]
        for layer in range(layers):
            trace[start:stop, layer] = tables[of_topic, layer, kinds, rng.integers(0, VARIANTS, stop - start)]
    trace.flush()
    np.save(path.with_name(path.name + "_documents.npy"), documents)


def by_scipy(trace: np.ndarray, target_LE: np.ndarray) -> float:
    """Minimise log Σ exp(a·θ) − target·θ over the whole sparse matrix at once; the largest miss of a target."""
    from scipy import optimize, sparse

    tokens, layers, top_k = trace.shape
    experts = target_LE.shape[1]
    columns = (trace.astype(np.int32) + experts * np.arange(layers, dtype=np.int32)[:, None]).reshape(tokens, -1)
    indptr = np.arange(0, columns.size + 1, layers * top_k)
    active = sparse.csr_matrix((np.ones(columns.size), columns.ravel(), indptr), (tokens, layers * experts))
    transposed, target = active.T.tocsr(), target_LE.ravel()

    def weights(theta: np.ndarray) -> tuple[np.ndarray, float]:
        score = active @ theta
        top = float(score.max())
        weight = np.exp(score - top)
        return weight / weight.sum(), top + float(np.log(weight.sum()))

    def dual(theta: np.ndarray) -> tuple[float, np.ndarray]:
        weight, log_sum = weights(theta)
        return log_sum - float(target @ theta), transposed @ weight - target

    ends = {"maxiter": 1000, "ftol": 0.0, "gtol": 1e-6}
    theta = optimize.minimize(dual, np.zeros(len(target)), jac=True, method="L-BFGS-B", options=ends).x
    return float(np.abs(transposed @ weights(theta)[0] - target).max())


def part_of_calibrate(part: str, options: Options, folder: Path) -> dict[str, Any]:
    """``trace``: make it; ``weights``: ours, then scipy's on the tempered targets that ours found."""
    from trace_ds.calibration.rules import WeightRequest, weigh_tokens
    from trace_ds.calibration.tokens import Trace, count_selections
    from trace_ds.config.sections.calibration import CalibrationConfig

    layers, experts, top_k = TRACES[options.shape]
    if part == "trace":
        rng = np.random.default_rng(0)
        tables = choice_tables(rng, layers, experts, top_k)
        write_trace(folder / "forget", rng, tables, max(options.tokens // 20, 10 * DOCUMENT_TOKENS), True)
        write_trace(folder / "retain", rng, tables, options.tokens, False)
        return {}
    frequency, maps, traces = {}, {}, {}
    for side in ("forget", "retain"):
        traces[side] = trace = np.load(folder / f"{side}.npy", mmap_mode="r")
        documents = np.load(folder / f"{side}_documents.npy")
        starts = np.append(np.arange(0, len(trace), ROW_TOKENS), len(trace)).astype(np.int64)
        maps[side] = TokenMap(starts, documents, int(documents[-1]) + 1)
        frequency[side] = count_selections(Trace((trace,)), maps[side], experts) / maps[side].counted_total()
    scope_LE, errors_LE = np.ones((layers, experts), dtype=bool), np.zeros((layers, experts))
    sides = frequency["forget"], frequency["retain"], errors_LE
    request = WeightRequest(CalibrationConfig(ess_floor=0.5), maps["retain"], scope_LE, *sides, threads=options.threads)
    began_s = time.process_time()
    weighting = weigh_tokens(request, Trace((traces["retain"],)), folder)
    ours_s, peak = time.process_time() - began_s, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    miss = float(np.abs(weighting.achieved_LE - weighting.target_LE).max())
    facts = {"lambda": weighting.lambda_, "ess_fraction": weighting.ess, "converged": weighting.converged}
    result = {"experts": scope_LE.sum().item(), "largest_miss": miss, "peak_rss_bytes": peak, **facts, "ours_s": ours_s}
    if options.tokens > options.scipy_tokens:
        return result
    began_s = time.process_time()
    theirs_miss = by_scipy(np.asarray(traces["retain"]), weighting.target_LE)
    theirs_s = time.process_time() - began_s
    return result | {"ratio": ours_s / theirs_s, "theirs_s": theirs_s, "theirs_largest_miss": theirs_miss}


def bench_calibrate(options: Options, folder: Path) -> dict[str, Any]:
    in_fresh_process("calibrate", "trace", options, folder)
    return {options.shape: in_fresh_process("calibrate", "weights", options, folder)}


# --- the command -----------------------------------------------------------------------------------------------------

WORKS: dict[str, Callable[[Options, Path], dict[str, Any]]] = {
    "collect": bench_collect, "step": bench_step, "evaluate": bench_evaluate,
    "prepare": bench_prepare, "convert": bench_convert, "calibrate": bench_calibrate,
}  # fmt: skip
PARTS = {"step": part_of_step, "convert": part_of_convert, "calibrate": part_of_calibrate}


def parse(words: list[str]) -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("works", nargs="*", choices=[*WORKS, []], metavar="WORK", help=f"of {', '.join(WORKS)}")
    parser.add_argument("--json", type=Path, help="write the results here too")
    for name, value, text in (
        ("rounds", 15, "measurements of each side"),
        ("threads", 1, "CPU threads"),
        ("hidden", 256, "hidden size of the models of collect, step and evaluate"),
        ("layers", 4, "their layers"),
        ("collect-layers", 16, "layers of collect's model"),
        ("rows", 8, "rows of a batch, and of each side of a step"),
        ("context", 128, "tokens of a row"),
        ("questions", 64, "of evaluate"),
        ("megabytes", 10, "of prepare's corpus"),
        ("workers", 2, "processes of datasets.map"),
        ("convert-layers", 16, "of convert's checkpoint (16: 4.4 GB, on a disk with 20 GB free)"),
        ("tokens", 200_000, "of calibrate's trace"),
        ("scipy-tokens", 200_000, "no comparison of calibrate with more tokens: they need memory"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default {value})")
    parser.add_argument("--shape", choices=TRACES, default="olmoe_1b_7b", help="whose experts calibrate's trace has")
    parser.add_argument("--memory-only", action="store_true", help="of step: no times")
    parser.add_argument("--part", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    options.words = [word for word in words if options.part is None]
    return options


def shown(result: dict[str, Any]) -> str:
    """One measurement as words."""
    text = f"{result['ratio']:.3f}" if "ratio" in result else "no comparison"
    text += f" [{result['low']:.3f}, {result['high']:.3f}]" if "low" in result else ""
    rest = {key: value for key, value in result.items() if key not in ("ratio", "low", "high")}
    return text + "".join(f", {k} {v:.4g}" if isinstance(v, float) else f", {k} {v}" for k, v in rest.items())


def main(words: list[str]) -> None:
    options = parse(words)
    if options.part is not None:
        work, part, folder = options.part
        print("\n" + json.dumps(PARTS[work](part, options, Path(folder))))
        return
    results = {}
    for work in options.works or WORKS:
        with tempfile.TemporaryDirectory() as folder:
            results[work] = WORKS[work](options, Path(folder))
        print(*(f"{work} {name}: {shown(each)}" for name, each in results[work].items()), sep="\n", flush=True)
    if torch.distributed.is_initialized():
        leave()
    if options.json is not None:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
