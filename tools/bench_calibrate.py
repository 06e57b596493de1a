"""How long calibration takes and how much memory it needs on a large synthetic retain trace.

    python tools/bench_calibrate.py                              # 2 M tokens of OLMoE's shape
    python tools/bench_calibrate.py --shape mixtral_8x7b --tokens 200000

The routing is synthetic with the correlations of real routing: the token's type (Zipf-distributed) decides most of the
choice in each layer, the document's topic some of it, and a little is noise. Making the trace is not timed and happens
in a process of its own; what is timed is everything `trace-ds calibrate` does with a trace except hashing the files.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

from trace_ds.calibration.diagnose import document_sums
from trace_ds.calibration.rules import WeightRequest, weigh_tokens
from trace_ds.calibration.tokens import TokenMap, Trace, count_selections
from trace_ds.config.sections.calibration import CalibrationConfig
from trace_ds.run.files import open_mapped

SHAPES = {  # MoE layers, routed experts, top-k
    "mixtral_8x7b": (32, 8, 2),
    "olmoe_1b_7b": (16, 64, 8),
    "qwen3_30b_a3b": (48, 128, 8),
    "deepseek_v3": (58, 256, 8),
}
TOPICS, TYPES, VARIANTS = 20, 2048, 4
DOCUMENT_TOKENS, ROW_TOKENS = 500, 2048
NEAR_SHARE = 0.05


def choice_tables(rng: np.random.Generator, layers: int, experts: int, top_k: int) -> np.ndarray:
    """uint8 [topics, layers, types, variants, K]: Gumbel top-k of type + topic + noise logits; topic 1 is near 0."""
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


def write_corpus(path: Path, rng: np.random.Generator, tables: np.ndarray, tokens: int, forget: bool) -> None:
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


def generate(arguments: argparse.Namespace, folder: Path) -> None:
    rng = np.random.default_rng(0)
    tables = choice_tables(rng, *SHAPES[arguments.shape])
    write_corpus(folder / "forget", rng, tables, max(arguments.tokens // 20, 10 * DOCUMENT_TOKENS), True)
    write_corpus(folder / "retain", rng, tables, arguments.tokens, False)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    def corpus(name: str) -> tuple[TokenMap, Trace]:
        trace = open_mapped(folder / f"{name}.npy")
        documents = open_mapped(folder / f"{name}_documents.npy")
        starts = np.append(np.arange(0, len(trace), ROW_TOKENS), len(trace)).astype(np.int64)
        return TokenMap(starts, documents, int(documents[-1]) + 1), Trace((trace,))

    times: dict[str, float] = {}

    def timed(name: str, began_s: float) -> float:
        now_s = time.perf_counter()
        times[name] = round(now_s - began_s, 2)
        return now_s

    forget_tokens, forget_trace = corpus("forget")
    retain_tokens, retain_trace = corpus("retain")
    experts = SHAPES[arguments.shape][1]
    forget_LE = count_selections(forget_trace, forget_tokens, experts) / forget_tokens.counted_total()
    began_cpu_s = time.process_time()
    began_s = now_s = time.perf_counter()
    counted = retain_tokens.counted_total()
    retain_LE = count_selections(retain_trace, retain_tokens, experts) / counted
    now_s = timed("check_s", now_s)
    scope_LE = np.ones(retain_LE.shape, dtype=bool)
    config = CalibrationConfig(ess_floor=0.5)
    sides = forget_LE, retain_LE, np.zeros_like(retain_LE)
    threads = int(os.environ["OMP_NUM_THREADS"])
    request = WeightRequest(config, retain_tokens, scope_LE, *sides, threads=threads, log=lambda line: None)
    weighting = weigh_tokens(request, retain_trace, folder)
    now_s = timed("weights_s", now_s)
    document_sums(retain_tokens, weighting.weight_T)
    timed("diagnosis_s", now_s)
    times["total_s"] = round(time.perf_counter() - began_s, 2)
    return {
        "tokens": counted,
        "constraints": int(scope_LE.sum()),
        **times,
        "cpu_s": round(time.process_time() - began_cpu_s, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "lambda": weighting.lambda_,
        "ess_fraction": weighting.ess,
        "max_weight": weighting.max_weight,
        "iterations": 0 if weighting.raking is None else weighting.raking.passes,
        "converged": weighting.converged,
        "largest_miss": float(np.abs(weighting.achieved_LE - weighting.target_LE)[scope_LE].max()),
        "cores": os.cpu_count(),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="olmoe_1b_7b", help="whose layers, experts and top-k")
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate is not None:
        generate(arguments, arguments.generate)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate", folder], check=True)
        print(json.dumps(measure(arguments, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
