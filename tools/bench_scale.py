#!/usr/bin/env python3
"""How the cost of counting and of training grows with ranks, experts, layers and tokens, on CPU processes here.

    python tools/bench_scale.py             # a table with its slopes; about three minutes on two cores
    python tools/bench_scale.py --json
    python tools/bench_scale.py --steps 9 --axes experts layers tokens

A small Mixtral (random weights, fp32) is counted (forward without LM head, router counter on, counts all-reduced) and
trained (ZeRO-3, forward, backward, AdamW). One quantity changes at a time; the others stay at their middle value:
1 rank, 8 experts, 4 layers, 2,048 tokens in the batch. On the axis of ranks the tokens of all ranks together stay the
same and the expert-parallel size is the number of ranks (4 and 8 included).

The cost is CPU time summed over the ranks, the median of the steps: on a machine with fewer cores than ranks the wall
clock measures the machine. The slope is that of log cost over log quantity by least squares: 1 is proportional growth,
0 no growth at all; on the axis of ranks what lies above 0 is the price of distribution.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

AXES: dict[str, tuple[int, ...]] = {
    "ranks": (1, 2, 4, 8),
    "experts": (4, 8, 16, 32),
    "layers": (2, 4, 8),
    "tokens": (1024, 2048, 4096),
}
ROW_TOKENS = 128
COSTS = ("count", "train")


@dataclass(frozen=True)
class Case:
    ranks: int = 1
    experts: int = 8
    layers: int = 4
    tokens: int = 2048


def measure(case: Case, world: Any, folder: Path, steps: int) -> dict[str, float]:
    """Median CPU seconds of a step, summed over the ranks, by kind (collective)."""
    import numpy as np
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from trace_ds.config.schema import Config
    from trace_ds.models.engine import inference_engine
    from trace_ds.models.families import inspect_model
    from trace_ds.models.routers import record_routing
    from trace_ds.routing.counter import RoutingCounter
    from trace_ds.unlearning.training_engine import training_engine

    path = folder / "-".join(str(value) for value in asdict(case).values())
    if world.is_main:
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        counts = {"num_hidden_layers": case.layers, "num_local_experts": case.experts, "num_experts_per_tok": 2}
        config = AutoConfig.for_model("mixtral", vocab_size=512, **shape, **counts)
        AutoModelForCausalLM.from_config(config).save_pretrained(path)
    world.barrier()
    files = [{"path": "unused"}]
    config = Config.model_validate(
        {
            "name": "scale",
            "model": {"path": str(path), "dtype": "fp32"},
            "data": {"forget": files, "retain": files},
            "distributed": {"ep": case.ranks},
        }
    )
    info = inspect_model(path)
    job: dict[str, Any] = {"dtype": config.model.dtype, "ep": case.ranks}
    rows = case.tokens // ROW_TOKENS // world.size
    ids = torch.randint(0, 512, (rows, ROW_TOKENS), generator=torch.Generator().manual_seed(world.rank))
    counted, documents = torch.ones_like(ids, dtype=torch.bool), torch.zeros_like(ids)

    def median_cpu_s(step: Callable[[], None]) -> float:
        times = []
        for _ in range(steps + 1):
            world.barrier()
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        return float(world.sum_float64(np.array([statistics.median(times[1:])]))[0])

    def count() -> None:
        counter = RoutingCounter(case.layers, case.experts, 2, world.device)
        with torch.no_grad(), record_routing(engine.module) as recorder:
            engine.module.model(input_ids=ids, use_cache=False)
            counter.add(recorder, counted, documents)
        counter.reduce(world)

    def train() -> None:
        engine.backward(engine(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).mean())
        engine.step()

    found = {}
    for name, make, step in (
        ("count", lambda: inference_engine(info, world, **job), count),
        (
            "train",
            lambda: training_engine(config.unlearning, info, world, 1, **job),
            train,
        ),
    ):
        engine = make()
        found[name] = median_cpu_s(step)
        engine.destroy()
    return found


def worker(cases: list[Case], folder: Path, steps: int) -> None:
    """One rank: measure the cases; rank 0 prints them."""
    import warnings

    warnings.filterwarnings("ignore")
    from trace_ds.parallel.world import join, leave

    world = join(threads=1, timeout_minutes=10)
    found = [asdict(case) | measure(case, world, folder, steps) for case in cases]
    if world.is_main:
        (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")
    world.barrier()
    leave()


def launch(cases: list[Case], steps: int) -> list[dict[str, float]]:
    """Measure cases of the same number of ranks in fresh processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = cases[0].ranks
    with tempfile.TemporaryDirectory() as folder:
        arguments = [json.dumps([asdict(case) for case in cases]), folder, str(steps)]
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *arguments],
                env=os.environ
                | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
                | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(ranks)
        ]
        statuses = [process.wait() for process in processes]
        if any(statuses):
            raise SystemExit(f"a rank of {ranks} failed")
        return list(json.loads((Path(folder) / "found.json").read_text(encoding="utf-8")))


def slope(points: list[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x."""
    import numpy as np

    x, y = np.log(np.array(points)).T
    return float(np.polyfit(x, y, 1)[0])


def main() -> None:
    if sys.argv[1:2] == ["--worker"]:
        cases, folder, steps = sys.argv[2:]
        return worker([Case(**case) for case in json.loads(cases)], Path(folder), int(steps))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    result: dict[str, Any] = {"rows": [], "slopes": {}}
    for axis in arguments.axes:
        cases = [replace(Case(), **{axis: value}) for value in AXES[axis]]
        groups = [[case] for case in cases] if axis == "ranks" else [cases]
        found = [row for group in groups for row in launch(group, arguments.steps)]
        result["rows"] += [{"axis": axis} | row for row in found]
        result["slopes"][axis] = {cost: slope([(row[axis], row[cost]) for row in found]) for cost in COSTS}
    if arguments.json:
        print(json.dumps(result, indent=1))
        return None
    print("| axis | value | counting, CPU s | training step, CPU s |\n| --- | ---: | ---: | ---: |")
    for axis in arguments.axes:
        for row in (row for row in result["rows"] if row["axis"] == axis):
            print(f"| {axis} | {row[axis]:,} | {row['count']:.3f} | {row['train']:.3f} |")
        print(f"| {axis} | slope | {result['slopes'][axis]['count']:.2f} | {result['slopes'][axis]['train']:.2f} |")
    return None


if __name__ == "__main__":
    main()
