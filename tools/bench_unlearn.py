#!/usr/bin/env python3
"""What the retain weights of TRACE cost a training step, in time and memory, and what NPO costs over GradDiff.

    python tools/bench_unlearn.py                       # about 2 GB of memory, some minutes on two cores
    python tools/bench_unlearn.py --hidden 64 --steps 4 # small: to see that it works

A Mixtral-shaped model (random weights) and random corpora are made on the spot and go through prepare, collect and
calibrate. Then, with everything the same but the named thing:

* time: one process, one engine, steps in turn with the calibrated token weights and with uniform ones (order
  alternating); from choosing rows to the updated weights. The median of the steps' ratios, by the clock and by CPU time
  of the process (which other work on the machine disturbs less).
* memory: a fresh process for each of trace, uniform, npo, graddiff; the peak of three steps above what the process held
  before the model was loaded: resident set size on a CPU, ``torch.cuda.max_memory_allocated`` on a GPU.

Tokens/s and MFU on a GPU against the loop that people write: ``tools/gpu_acceptance.py``.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from trace_ds.config.load import load_config
from trace_ds.parallel.world import join
from trace_ds.run.directory import RunDirectory
from trace_ds.stages import unlearn
from trace_ds.stages.pipeline import STAGES
from trace_ds.unlearning.objective import make_objective
from trace_ds.unlearning.trainer import run_step

ARMS: dict[str, dict[str, str]] = {
    "trace": {"calibration.rule": "raking", "unlearning.forget_loss": "graddiff"},
    "uniform": {"calibration.rule": "uniform", "unlearning.forget_loss": "graddiff"},
    "npo": {"calibration.rule": "raking", "unlearning.forget_loss": "npo"},
    "graddiff": {"calibration.rule": "raking", "unlearning.forget_loss": "graddiff"},
}
WORDS = 2000


def make_model(folder: Path, options: argparse.Namespace) -> Path:
    """A random Mixtral with a tokenizer of whole words."""
    heads = max(1, options.hidden // 64)
    config = MixtralConfig(
        hidden_size=options.hidden,
        intermediate_size=2 * options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=WORDS + 48,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {word: number for number, word in enumerate(["<s>", "</s>", "<pad>", *(f"w{n}" for n in range(WORDS))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


def make_config(work: Path, options: argparse.Namespace) -> Path:
    draw = random.Random(0)
    paths = {}
    for side, low, high in (("forget", 0, WORDS // 2), ("retain", WORDS // 4, WORDS)):
        rows = max(64, 2 * options.rows)
        texts = [" ".join(f"w{draw.randrange(low, high)}" for _ in range(options.context - 2)) for _ in range(rows)]
        paths[side] = work / f"{side}.jsonl"
        paths[side].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    config = {
        "name": "bench",
        "model": {"path": str(make_model(work / "model", options)), "dtype": "fp32"},
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


def prepared(config_path: Path, arm: str) -> Any:
    """(config, run directory) of an arm; its calibration lies in a variant's directory beside the others."""
    changes = [f"{key}={value}" for key, value in ARMS[arm].items()]
    config, _ = load_config(str(config_path), changes, config_path.parent / "run")
    main = RunDirectory.at(config_path.parent / "run")
    return config, main.variant(config.calibration.rule)


def make_artefacts(config_path: Path) -> None:
    for arm in ("trace", "uniform"):
        config, run = prepared(config_path, arm)
        run.mark()
        if arm == "trace":
            STAGES["prepare"].module.check(config, run, 1).run(None)
            STAGES["collect"].module.check(config, run, 1).run(join(config.distributed.threads, 30))
        STAGES["calibrate"].module.check(config, run, 1).run(None)


class Job:
    """A training engine with the data of one or more arms."""

    def __init__(self, config_path: Path, arms: list[str]) -> None:
        config, run = prepared(config_path, arms[0])
        self.settings = config.unlearning
        self.world = join(config.distributed.threads, 30)
        self.base_bytes = current_bytes()
        self.batches = {}
        for arm in arms:
            own, directory = prepared(config_path, arm)
            self.batches[arm] = unlearn.make_unlearn_batches(unlearn.check(own, directory, 1))
        job = unlearn.check(config, run, 1)
        batches = self.batches[arms[0]]
        self.engine, routers = unlearn.make_engine(job, self.world, batches)
        trainer_state: dict[str, Any] = {"step": 0, "seed": 0}
        self.objective, _ = make_objective(
            self.settings,
            job.info,
            self.world,
            batches,
            trainer_state,
            router_projection=routers,
            dtype=config.model.dtype,
            ep=config.distributed.ep,
            seed=config.seed,
        )

    def step(self, arm: str, number: int) -> float:
        """Seconds of one step."""
        began_s = time.perf_counter()
        run_step(self.engine, self.world, self.batches[arm].at(number, 0, 1), self.objective, self.settings, number)
        synchronize()
        return time.perf_counter() - began_s


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def current_bytes() -> int:
    """Memory of this process now (resident, or allocated on the GPU)."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def forget_peak() -> None:
    """From now on :func:`peak_bytes` counts anew: loading the model is not what is compared."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
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
        "step_s": {arm: statistics.median(times) for arm, times in wall_s.items()},
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


def child(work: Path, label: str, *arguments: str) -> dict[str, Any]:
    """Run one measurement in a fresh process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--child", label, *arguments, "--work-dir", str(work)]
    # One arena and no pools of freed blocks: resident memory is what is in use.
    steady = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    environment = os.environ | (steady if label == "memory" else {})
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        raise SystemExit(f"{label} {arguments} failed:\n{result.stdout[-1000:]}\n{result.stderr[-3000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    make_config(work, options)
    child(work, "artefacts")
    result = child(work, "times", "--steps", str(options.steps))
    memory = {arm: child(work, "memory", "--arm", arm)["bytes"] for arm in ARMS}
    result["memory_bytes"] = memory
    result["peak_memory_ratio"] = memory["trace"] / memory["uniform"]
    result["npo_peak_memory_ratio"] = memory["npo"] / memory["graddiff"]
    return result


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help="forget rows and retain rows of a step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40, help="of each arm")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work-dir", type=Path, help=argparse.SUPPRESS)
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
    }
    return children[options.child]() or {}


def main() -> None:
    options = parse(sys.argv[1:])
    if options.child:
        print("\n" + json.dumps(run_child(options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
