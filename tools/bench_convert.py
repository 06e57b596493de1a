#!/usr/bin/env python3
"""Measure the conversion against DeepSpeed's own converter and against a plain copy, on a checkpoint made on the spot.

    python tools/bench_convert.py                 # 4.4 GB of checkpoint, 20 GB of disk (in $TMPDIR), 10 GB of memory
    python tools/bench_convert.py --layers 2

A Mixtral-shaped model (random weights, bf16) makes one real step under ZeRO-3 with AutoEP on two processes, once with
the given number of layers and once with half of them. Then, each in a fresh process, one at a time:

* ours: checkpoint → Hugging Face hub layout, fp32 masters cast to bf16, every file hashed (two jobs);
* DeepSpeed: ``python -m deepspeed.checkpoint.ds_to_universal`` with its default workers;
* copy: read as many bytes as ours reads and write as many as it writes, in blocks, and fsync.

Memory is the largest sum over the process tree of proportional set sizes (/proc/PID/smaps_rollup), sampled every
50 ms: shared pages count once, mapped files as far as they are resident. (Growth compares the resident set sizes that
the two processes report of themselves: what other processes share of torch's libraries would blur it.) Times are wall
clock of the whole process; ``time_ratio_vs_copy`` compares the conversion itself with the copy itself, without the
start of Python and its imports (``start_up_s``), ``cpu_ratio_vs_copy`` the processor time of all their threads. There
the medians of ``--repeats`` runs count, elsewhere the best; DeepSpeed's converter runs once.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

WORLD, JOBS = 2, 2
HIDDEN, FFN, EXPERTS, VOCABULARY = 512, 1792, 8, 4096
SAMPLE_EVERY_S = 0.05
COPY_BLOCK_BYTES = 4 << 20


def make_checkpoint(rank: int, port: int, layers: int, directory: str) -> None:
    """One process of a two-process job that makes one step and saves."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch
    from transformers import AutoModelForCausalLM

    from trace_ds.models.autoep import readable_recorders

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would need a C++ compiler
    deepspeed.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(model_config(layers))
    torch.set_default_dtype(torch.float32)
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
    tokens = torch.randint(0, VOCABULARY, (1, 32), generator=torch.Generator().manual_seed(rank))
    engine.backward(engine(input_ids=tokens, labels=tokens, use_cache=False).loss)
    engine.step()
    engine.save_checkpoint(str(Path(directory) / "checkpoint"), tag="step_000001", save_latest=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def model_config(layers: int) -> Any:
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=FFN,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
        max_position_embeddings=2048,
    )


def build(layers: int, directory: Path) -> Path:
    import torch

    directory.mkdir(parents=True)
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(make_checkpoint, (port, layers, str(directory)), nprocs=WORLD)
    return directory


def tree_memory_bytes(pid: int) -> int:
    """Proportional set size of a process and all its descendants."""
    total, pending = 0, [pid]
    while pending:
        current = pending.pop()
        try:
            for line in Path(f"/proc/{current}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
            for task in Path(f"/proc/{current}/task").iterdir():
                pending += map(int, (task / "children").read_text().split())
        except (OSError, ValueError):
            continue  # it ended while we looked
    return total


def measure(command: list[str]) -> dict[str, float]:
    """Run a command; seconds of wall clock, peak memory of its process tree, and what it printed about itself."""
    peak = 0
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"})  # fmt: skip
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, tree_memory_bytes(process.pid))
            done.wait(SAMPLE_EVERY_S)

    sampler = threading.Thread(target=sample)
    sampler.start()
    out, error = process.communicate()
    elapsed_s = time.perf_counter() - begin
    done.set()
    sampler.join()
    if process.returncode:
        raise RuntimeError(f"{command} failed:\n{error[-2000:]}")
    said = [line for line in out.splitlines() if line.startswith("{")]
    return {"time_s": elapsed_s, "peak_bytes": peak, **(json.loads(said[-1]) if said else {})}


def convert_worker(source: str, destination: str, base_model: str) -> None:
    """What a measured process of ours does: the conversion, timed from inside as well."""
    from trace_ds.conversion.convert import convert_checkpoint
    from trace_ds.tensors.layouts import read_layout

    read_layout(Path(base_model))  # makes transformers import what it needs: start-up, not conversion
    begin, cpu = time.perf_counter(), time.process_time()
    report = convert_checkpoint(Path(source), Path(destination), base_model=Path(base_model), jobs=JOBS)
    facts = {"inside_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    facts |= {"written_bytes": report["bytes"], "read_bytes": report["parameters"] * 4}
    print(json.dumps(facts | {"rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}))


def copy_worker(source: str, destination: str, read_bytes: int, write_bytes: int) -> None:
    """Read ``read_bytes`` of the optimizer files and write ``write_bytes``, interleaved, one thread, then fsync."""
    begin, cpu = time.perf_counter(), time.process_time()
    block = bytearray(COPY_BLOCK_BYTES)
    done = written = 0
    with Path(destination).open("wb", buffering=0) as out:
        for path in sorted(Path(source).glob("*_optim_states.pt")):
            with path.open("rb", buffering=0) as handle:
                while done < read_bytes and (count := handle.readinto(block)):
                    done += count
                    while written * read_bytes < done * write_bytes and written < write_bytes:
                        written += out.write(memoryview(block)[: min(len(block), write_bytes - written)])
        os.fsync(out.fileno())
    facts = {"inside_s": time.perf_counter() - begin, "cpu_s": time.process_time() - cpu}
    print(json.dumps(facts | {"read_bytes": done, "written_bytes": written}))


def vs_copy(key: str, ours: list[dict[str, float]], copies: list[dict[str, float]]) -> float:
    return statistics.median(run[key] for run in ours) / statistics.median(run[key] for run in copies)


def best(runs: list[dict[str, float]]) -> dict[str, float]:
    return min(runs, key=lambda run: run.get("inside_s", run["time_s"]))


def fresh(path: Path) -> str:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return str(path)


def bench(layers: int, repeats: int, work: Path) -> dict[str, Any]:
    def ours(model: Path) -> dict[str, float]:
        arguments = [str(model / "checkpoint" / "step_000001"), fresh(work / "out"), str(model / "base")]
        return measure([sys.executable, __file__, "--worker", "convert", *arguments])

    half = build(layers // 2, work / "half")
    small = best([ours(half) for _ in range(repeats)])
    shutil.rmtree(half)
    model = build(layers, work / "full")
    step = model / "checkpoint" / "step_000001"
    hubs, copies = [], []
    for _ in range(repeats):  # in turn, so that both see the same machine
        hubs.append(ours(model))
        sizes = [str(int(hubs[0]["read_bytes"])), str(int(hubs[0]["written_bytes"]))]
        copies.append(measure([sys.executable, __file__, "--worker", "copy", str(step), fresh(work / "copy"), *sizes]))
    hub, copy = best(hubs), best(copies)
    fresh(work / "copy")
    theirs = measure([sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--input_folder", str(step),
                      "--output_folder", str(work / "theirs" / "step_000001")])  # fmt: skip
    return {
        "time_ratio_vs_universal": hub["time_s"] / theirs["time_s"],
        "memory_ratio_vs_universal": hub["peak_bytes"] / theirs["peak_bytes"],
        "memory_growth_on_doubling": hub["rss_bytes"] / small["rss_bytes"] - 1,
        "time_ratio_vs_copy": vs_copy("inside_s", hubs, copies),
        "cpu_ratio_vs_copy": vs_copy("cpu_s", hubs, copies),
        "start_up_s": hub["time_s"] - hub["inside_s"],
        "checkpoint_bytes": sum(path.stat().st_size for path in step.iterdir()),
        "layers": layers,
        "cpus": os.cpu_count(),
        "runs": {"ours": hub, "ours_half": small, "deepspeed": theirs, "copy": copy},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="decoder layers of the checkpoint (16: 4.4 GB)")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    out = os.dup(1)
    os.dup2(2, 1)  # DeepSpeed and its children print on standard output: the result alone shall be there
    with tempfile.TemporaryDirectory() as work:
        result = bench(options.layers, options.repeats, Path(work))
    with os.fdopen(out, "w") as handle:
        handle.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"] and sys.argv[2] == "convert":
        convert_worker(*sys.argv[3:])
    elif sys.argv[1:2] == ["--worker"]:
        copy_worker(sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))
    else:
        main()
