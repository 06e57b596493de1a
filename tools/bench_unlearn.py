#!/usr/bin/env python3
"""What the retain weights of TRACE cost a training step, in time and memory, and what NPO costs over GradDiff.

    python tools/bench_unlearn.py                 # a table; about 2 GB of memory, some minutes on two cores
    python tools/bench_unlearn.py --json
    python tools/bench_unlearn.py --hidden 64 --steps 4 # small: to see that it works

A Mixtral-shaped model (random weights) and random corpora are made on the spot and go through prepare, collect and
calibrate. Then, with everything the same but the named thing:

* time: one process, one engine, steps in turn with the calibrated token weights and with uniform ones (order
  alternating); from choosing rows to the updated weights. The median of the steps' ratios, by the clock and by CPU time
  of the process (which other work on the machine disturbs less).
* memory: a fresh process for each of trace, uniform, npo, graddiff; the peak of three steps above what the process held
  before the model was loaded: resident set size on a CPU, ``torch.cuda.max_memory_allocated`` on a GPU.

With a GPU also, for a Mixtral (2 layers) and a Qwen3-MoE (4 layers) shape in bf16: tokens/s, peak memory and model
FLOPs utilisation of our NPO step against what people write: transformers under ZeRO-3, NPO and retain loss from whole
logits, and the frozen model resident beside it. Both recompute activations.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

ARMS: dict[str, dict[str, str]] = {
    "trace": {"calibration.rule": "raking", "unlearning.forget_loss": "graddiff"},
    "uniform": {"calibration.rule": "uniform", "unlearning.forget_loss": "graddiff"},
    "npo": {"calibration.rule": "raking", "unlearning.forget_loss": "npo"},
    "graddiff": {"calibration.rule": "raking", "unlearning.forget_loss": "graddiff"},
}
WORDS = 2000
# hidden, expert width, experts, top-k, heads, key-value heads, layers, vocabulary
GPU_SHAPES = {
    "mixtral": ("mixtral", 4096, 14336, 8, 2, 32, 8, 2, 32000),
    "qwen3_moe": ("qwen3_moe", 2048, 768, 128, 8, 32, 4, 4, 151936),
}
H100_FLOPS = 989e12


def make_model(folder: Path, shape: tuple[Any, ...], dtype: str) -> Path:
    """A random model of that shape with a tokenizer of whole words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    family, hidden, ffn, experts, top_k, heads, kv_heads, layers, vocabulary = shape
    own = {"num_local_experts": experts, "intermediate_size": ffn}
    if family == "qwen3_moe":
        own = {"num_experts": experts, "moe_intermediate_size": ffn, "intermediate_size": ffn, "head_dim": 128}
    config = AutoConfig.for_model(
        family,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_experts_per_tok=top_k,
        vocab_size=vocabulary,
        tie_word_embeddings=False,
        **own,
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16 if dtype == "bf16" else torch.float32)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model.to("cpu").save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def make_config(work: Path, shape: tuple[Any, ...], options: argparse.Namespace, dtype: str) -> Path:
    import yaml

    draw = random.Random(0)
    paths = {}
    for side, low, high in (("forget", 0, WORDS // 2), ("retain", WORDS // 4, WORDS)):
        rows = max(64, 2 * options.rows)
        texts = [" ".join(f"w{draw.randrange(low, high)}" for _ in range(options.context - 2)) for _ in range(rows)]
        paths[side] = work / f"{side}.jsonl"
        paths[side].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = {
        "name": "bench",
        "model": {"path": str(make_model(work / "model", shape, dtype)), "dtype": dtype},
        "data": {side: [{"path": str(path)}] for side, path in paths.items()} | {"context_length": options.context},
        "distributed": {"threads": options.threads},
        "statistics": {"nll": True, "batch_rows": options.rows},
        "calibration": {"if_none_found": "continue"},
        "unlearning": {
            "apply": "loss",
            "forget_rows": options.rows,
            "retain_rows": options.rows,
            "micro_batch_rows": options.rows,
        },
    }
    path = work / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def prepared(config_path: Path, arm: str, extra: dict[str, str] | None = None) -> Any:
    """(config, run directory) of an arm; its calibration lies in a variant's directory beside the others."""
    from trace_ds.config.load import load_config
    from trace_ds.run.directory import RunDirectory

    changes = [f"{key}={value}" for key, value in (ARMS[arm] | (extra or {})).items()]
    config, _ = load_config(str(config_path), changes, config_path.parent / "run")
    main = RunDirectory.at(config_path.parent / "run")
    return config, main.variant(config.calibration.rule)


def make_artefacts(config_path: Path) -> None:
    from trace_ds.parallel.world import join
    from trace_ds.stages.pipeline import run_stage

    for arm in ("trace", "uniform"):
        config, run = prepared(config_path, arm)
        run.create("")
        if arm == "trace":
            run_stage("prepare", config, run)
            run_stage("collect", config, run, join(config.distributed.threads, 30))
        run_stage("calibrate", config, run)


class Job:
    """A training engine with the data of one or more arms."""

    def __init__(self, config_path: Path, arms: list[str], extra: dict[str, str] | None = None) -> None:
        from trace_ds.parallel.world import join
        from trace_ds.stages import unlearn

        config, run = prepared(config_path, arms[0], extra)
        self.settings = config.unlearning
        self.world = join(config.distributed.threads, 30)
        self.base_bytes = current_bytes()
        self.batches = {}
        for arm in arms:
            own, directory = prepared(config_path, arm, extra)
            self.batches[arm] = unlearn.make_batches(unlearn.check(own, directory, 1))
        job = unlearn.check(config, run, 1)
        batches = self.batches[arms[0]]
        self.engine, routers = unlearn.make_engine(job, self.world, batches)
        trainer_state: dict[str, Any] = {"step": 0, "seed": 0}
        self.objective, _ = unlearn.make_objective(job, self.world, self.engine, batches, trainer_state, routers)

    def step(self, arm: str, number: int) -> float:
        """Seconds of one step."""
        from trace_ds.unlearning.trainer import run_step

        began_s = time.perf_counter()
        run_step(self.engine, self.world, self.batches[arm].at(number, 0, 1), self.objective, self.settings, number)
        synchronize()
        return time.perf_counter() - began_s


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def current_bytes() -> int:
    """Memory of this process now (resident, or allocated on the GPU)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def forget_peak() -> None:
    """From now on :func:`peak_bytes` counts anew: loading the model is not what is compared."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))


def time_arms(config_path: Path, steps: int) -> dict[str, Any]:
    job = Job(config_path, ["trace", "uniform"])
    for number in range(2):
        for arm in ("trace", "uniform"):
            job.step(arm, number)
    wall_s: dict[str, list[float]] = {"trace": [], "uniform": []}
    cpu_s: dict[str, list[float]] = {"trace": [], "uniform": []}
    for number in range(steps):
        for arm in ("trace", "uniform") if number % 2 else ("uniform", "trace"):
            began_s = time.process_time()
            wall_s[arm].append(job.step(arm, number))
            cpu_s[arm].append(time.process_time() - began_s)
    return {
        "step_s": {arm: statistics.median(held) for arm, held in wall_s.items()},
        "step_time_ratio": paired_ratio(wall_s),
        "cpu_time_ratio": paired_ratio(cpu_s),
    }


def paired_ratio(times: dict[str, list[float]]) -> float:
    """Median of trace / uniform over the steps: both see the same rows, one right after the other."""
    return statistics.median(a / b for a, b in zip(times["trace"], times["uniform"], strict=True))


def memory_of(config_path: Path, arm: str) -> dict[str, Any]:
    job = Job(config_path, [arm])
    forget_peak()
    for number in range(3):
        job.step(arm, number)
    return {"bytes": peak_bytes() - job.base_bytes}


def gpu_ours(config_path: Path, steps: int) -> dict[str, Any]:
    job = Job(config_path, ["npo"], {"unlearning.recompute": "true"})
    return throughput(lambda number: job.step("npo", number), steps)


def gpu_plain(config_path: Path, steps: int) -> dict[str, Any]:
    """The loop people write: transformers and ZeRO-3, whole logits, the frozen model beside the trained one."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM

    from trace_ds.parallel.world import quiet_deepspeed

    job_config, run = prepared(config_path, "npo")
    from trace_ds.parallel.world import join
    from trace_ds.stages import unlearn

    world = join(job_config.distributed.threads, 30)
    batches = unlearn.make_batches(unlearn.check(job_config, run, 1))
    dtype = torch.bfloat16 if job_config.model.dtype == "bf16" else torch.float32
    model, frozen = (AutoModelForCausalLM.from_pretrained(job_config.model.path, dtype=dtype) for _ in range(2))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ds_config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3},
        "bf16": {"enabled": job_config.model.dtype == "bf16"},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}},
        "steps_per_print": 1 << 62,
    }
    engine, *_ = quiet_deepspeed().initialize(model=model, model_parameters=model.parameters(), config=ds_config)
    frozen = frozen.to(world.device).eval()
    beta = job_config.unlearning.npo.beta

    def row_nll(net: Any, ids: Any) -> Any:
        logits = net(input_ids=ids, use_cache=False).logits[:, :-1].float()
        flat = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return flat.view(len(ids), -1)

    def step(number: int) -> float:
        began_s = time.perf_counter()
        batch = batches.at(number, 0, 1).micro_batches[0].to(world.device)
        forget, retain = batch.input_ids_BS[: batch.forget_rows], batch.input_ids_BS[batch.forget_rows :]
        with torch.no_grad():
            reference = row_nll(frozen, forget).sum(1)
        gap = row_nll(engine, forget).sum(1) - reference
        loss = -(2 / beta) * functional.logsigmoid(beta * gap).mean() + row_nll(engine, retain).mean()
        engine.backward(loss)
        engine.step()
        synchronize()
        return time.perf_counter() - began_s

    return throughput(step, steps)


def throughput(step: Any, steps: int) -> dict[str, Any]:
    forget_peak()
    for number in range(3):
        step(number)
    times = [step(number) for number in range(3, 3 + steps)]
    return {"step_s": statistics.median(times), "bytes": peak_bytes()}


def child(work: Path, what: str, *arguments: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", what, *arguments, "--work-dir", str(work)]
    # One arena and no pools of freed blocks: resident memory is what is in use.
    steady = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = os.environ | (steady if what == "memory" else {})
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{what} {arguments} failed:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def on_gpu(work: Path, name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ours against the plain loop on one shape."""
    from trace_ds.cluster.architecture import read_architecture
    from trace_ds.cluster.cost import forward_flops_per_token

    folder = work / name
    folder.mkdir()
    make_config(folder, GPU_SHAPES[name], argparse.Namespace(**vars(options) | {"rows": 4, "context": 2048}), "bf16")
    child(folder, "artefacts")
    ours, plain = (child(folder, arm, "--steps", "10") for arm in ("gpu_ours", "gpu_plain"))
    a = read_architecture(json.loads((folder / "model" / "config.json").read_text()), name)
    tokens = 2 * 4 * 2048
    flops = 3 * forward_flops_per_token(a, 2048, head=True) * tokens
    return {
        "tokens_per_s": tokens / ours["step_s"],
        "plain_tokens_per_s": tokens / plain["step_s"],
        "speedup": plain["step_s"] / ours["step_s"],
        "memory_ratio": ours["bytes"] / plain["bytes"],
        "mfu": flops / ours["step_s"] / H100_FLOPS,
        "plain_mfu": flops / plain["step_s"] / H100_FLOPS,
    }


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    import torch

    heads = max(1, options.hidden // 64)
    shape = ("mixtral", options.hidden, 2 * options.hidden, 8, 2, heads, heads, options.layers, WORDS + 48)
    make_config(work, shape, options, "fp32")
    child(work, "artefacts")
    result = child(work, "times", "--steps", str(options.steps))
    memory = {arm: child(work, "memory", "--arm", arm)["bytes"] for arm in ARMS}
    result["memory_bytes"] = memory
    result["peak_memory_ratio"] = memory["trace"] / memory["uniform"]
    result["npo_peak_memory_ratio"] = memory["npo"] / memory["graddiff"]
    if torch.cuda.is_available():
        result["gpu"] = torch.cuda.get_device_name()
        result["shapes"] = {name: on_gpu(work, name, options) for name in GPU_SHAPES}
    return result


def print_table(result: dict[str, Any]) -> None:
    step, memory = result["step_s"], result["memory_bytes"]
    print(
        f"step, trace / uniform: {step['trace']:.3f} / {step['uniform']:.3f} s, ratio {result['step_time_ratio']:.3f} "
        f"(CPU time {result['cpu_time_ratio']:.3f})"
    )
    for name, (one, other) in {
        "peak_memory_ratio": ("trace", "uniform"),
        "npo_peak_memory_ratio": ("npo", "graddiff"),
    }.items():
        print(f"peak, {one} / {other}: {memory[one] / 1e6:,.0f} / {memory[other] / 1e6:,.0f} MB = {result[name]:.3f}")
    for name, held in result.get("shapes", {}).items():
        print(
            f"{result['gpu']}, {name}: {held['tokens_per_s']:,.0f} tokens/s ({held['mfu']:.1%} MFU) against "
            f"{held['plain_tokens_per_s']:,.0f} ({held['plain_mfu']:.1%}): {held['speedup']:.2f} x, "
            f"{held['memory_ratio']:.2f} x the memory"
        )


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="forget rows and retain rows of a step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="of each arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, help="default: a temporary directory")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--arm", default="trace", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_child(options: argparse.Namespace) -> dict[str, Any]:
    """One measurement, in this process."""
    path = options.work_dir / "config.yaml"
    children: dict[str, Any] = {
        "artefacts": lambda: make_artefacts(path),
        "times": lambda: time_arms(path, options.steps),
        "memory": lambda: memory_of(path, options.arm),
        "gpu_ours": lambda: gpu_ours(path, options.steps),
        "gpu_plain": lambda: gpu_plain(path, options.steps),
    }
    return children[options.child]() or {}


def main() -> int:
    options = parse(sys.argv[1:])
    if options.child:
        print("\n" + json.dumps(run_child(options)))
        return 0
    with tempfile.TemporaryDirectory(dir=options.work_dir) as folder:
        result = measure(options, Path(folder))
    if options.json:
        print(json.dumps(result, indent=1))
    else:
        print_table(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
