"""How long calibration takes and how much memory it needs on a large synthetic retain trace.

    python tools/bench_calibrate.py                          # 10 M tokens, 16 layers x 64 experts, top-8, 200 selected
    python tools/bench_calibrate.py --experts-in-scope all   # the same trace, all 1,024 experts
    python tools/bench_calibrate.py --shape qwen3_30b_a3b --tokens 2000000   # all experts of that model's shape
    python tools/bench_calibrate.py --shape qwen3_30b_a3b --rows 200000        # weights of rows, without a trace
    python tools/bench_calibrate.py --tokens 1000000 --json
    python tools/bench_calibrate.py --max-seconds 120 --max-gib 3    # exit status 1 beyond a limit: a regression check

``--rows``: the selections of so many rows of 1,024 tokens,
drawn around those of stretches of a small corpus, and a sample of its tokens, instead of a trace.

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
    rng = np.random.default_rng(arguments.seed)
    tables = choice_tables(rng, arguments.layers, arguments.experts, arguments.top_k)
    write_corpus(folder / "forget", rng, tables, max(arguments.tokens // 20, 10 * DOCUMENT_TOKENS), True)
    write_corpus(folder / "retain", rng, tables, 400_000 if arguments.rows else arguments.tokens, False)
    if arguments.rows:
        write_rows(folder, rng, arguments)


def write_rows(folder: Path, rng: np.random.Generator, arguments: argparse.Namespace) -> None:
    """``rows.npy`` uint16 [rows, L, E]: Poisson-like counts around the selections of stretches of the small corpus."""
    trace = np.load(folder / "retain.npy", mmap_mode="r")
    layers, experts, top_k = arguments.layers, arguments.experts, arguments.top_k
    counts = []
    for start in range(0, len(trace) - DOCUMENT_TOKENS, DOCUMENT_TOKENS):
        piece = np.asarray(trace[start : start + DOCUMENT_TOKENS])
        counts.append([np.bincount(piece[:, layer].ravel(), minlength=experts) for layer in range(layers)])
    mean = np.array(counts, np.float32) * (1024 / DOCUMENT_TOKENS)
    rows = np.lib.format.open_memmap(folder / "rows.npy", "w+", np.uint16, (arguments.rows, layers, experts))
    for start in range(0, arguments.rows, 2000):
        chosen = mean[rng.integers(0, len(mean), min(2000, arguments.rows - start))]
        noise = rng.standard_normal(chosen.shape, np.float32)
        result = np.minimum(np.maximum(np.rint(chosen + noise * np.sqrt(chosen)), 0), 1024).astype(np.int64)
        excess = result.sum(axis=2) - 1024 * top_k  # every token selects K experts
        largest = result.argmax(axis=2)
        np.put_along_axis(
            result, largest[:, :, None], np.take_along_axis(result, largest[:, :, None], 2) - excess[:, :, None], 2
        )
        rows[start : start + 2000] = result
    rows.flush()


def measure_rows(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Weights of rows, by what ``collect`` records."""
    from trace_ds.calibration.rules import WeightRequest, weigh_rows
    from trace_ds.calibration.tokens import RowSelections, TokenMap
    from trace_ds.config.sections.calibration import CalibrationConfig
    from trace_ds.run.files import new_array, open_mapped

    parts = (open_mapped(folder / "rows.npy"),)
    selected_NLK = np.array(open_mapped(folder / "retain.npy")[::2])
    forget = open_mapped(folder / "forget.npy")
    shape = arguments.layers, arguments.experts
    forget_LE = np.array([np.bincount(forget[:, layer].ravel(), minlength=shape[1]) for layer in range(shape[0])])
    starts = np.arange(arguments.rows + 1, dtype=np.int64) * 1025
    documents = new_array(folder / "documents.i32", np.int32, (int(starts[-1]),))
    for start in range(0, arguments.rows, 1000):
        documents[start * 1025 : (start + 1000) * 1025] = np.arange(start, min(start + 1000, arguments.rows)).repeat(
            1025
        )
    tokens = TokenMap(starts, documents, arguments.rows)
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    selections = RowSelections(parts, arguments.top_k, selected_NLK, np.zeros(len(selected_NLK), np.int64))
    counts_LE = selections.sums(np.ones(arguments.rows))
    retain_LE = counts_LE / (1024 * arguments.rows)
    now_s = time.perf_counter()
    config = CalibrationConfig(ess_floor=arguments.ess_floor)
    scope_LE = np.ones(shape, dtype=bool)
    forget_LE = forget_LE / len(forget)
    sides = forget_LE, retain_LE, np.zeros_like(retain_LE)
    threads = int(os.environ["OMP_NUM_THREADS"])
    weighting = weigh_rows(
        WeightRequest(config, tokens, scope_LE, *sides, threads=threads, log=lambda line: None), selections
    )
    weights_s = time.perf_counter() - now_s
    w = weighting.row_weight_R
    return {
        "rows": arguments.rows,
        "constraints": int(scope_LE.sum()),
        "check_s": round(now_s - began_s, 2),
        "weights_s": round(weights_s, 2),
        "total_s": round(time.perf_counter() - began_s, 2),
        "cpu_s": round(time.process_time() - began_cpu_s, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "lambda": weighting.strength,
        "exponent": weighting.exponent,
        "row_ess_fraction": float(w.sum() ** 2 / (len(w) * (w * w).sum())),
        "max_weight": weighting.max_weight,
        "iterations": 0 if weighting.raking is None else weighting.raking.passes,
        "converged": weighting.converged,
        "gap_closed": 1.0
        - float(np.abs(weighting.achieved_LE - forget_LE).sum() / np.abs(retain_LE - forget_LE).sum()),
        "cores": os.cpu_count(),
        "threads": os.environ["OMP_NUM_THREADS"],
    }


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from trace_ds.calibration.diagnose import document_sums
    from trace_ds.calibration.rules import WeightRequest, weigh_tokens
    from trace_ds.calibration.tokens import TokenMap, Trace, count_selections
    from trace_ds.config.sections.calibration import CalibrationConfig
    from trace_ds.run.files import open_mapped

    def corpus(name: str) -> tuple[TokenMap, Trace]:
        trace = open_mapped(folder / f"{name}.npy")
        documents = open_mapped(folder / f"{name}_documents.npy")
        starts = np.append(np.arange(0, len(trace), arguments.row_tokens), len(trace)).astype(np.int64)
        return TokenMap(starts, documents, int(documents[-1]) + 1), Trace((trace,))

    times: dict[str, float] = {}

    def timed(name: str, began_s: float) -> float:
        now_s = time.perf_counter()
        times[name] = round(now_s - began_s, 2)
        return now_s

    forget_tokens, forget_trace = corpus("forget")
    retain_tokens, retain_trace = corpus("retain")
    forget_LE = count_selections(forget_trace, forget_tokens, arguments.experts) / forget_tokens.counted_total()
    began_cpu_s = time.process_time()
    began_s = now_s = time.perf_counter()
    counted = retain_tokens.counted_total()
    retain_LE = count_selections(retain_trace, retain_tokens, arguments.experts) / counted
    now_s = timed("check_s", now_s)
    scope_LE = np.ones(retain_LE.shape, dtype=bool)
    if arguments.experts_in_scope != "all":
        scope_LE[:] = False
        difference = (forget_LE - retain_LE).ravel()
        scope_LE.flat[np.argsort(-difference, kind="stable")[: int(arguments.experts_in_scope)]] = True
    config = CalibrationConfig(ess_floor=arguments.ess_floor)
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
        "lambda": weighting.strength,
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
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--experts-in-scope", default="200", help="a number (those of largest difference) or 'all'")
    parser.add_argument("--ess-floor", type=float, default=0.5)
    parser.add_argument("--row-tokens", type=int, default=ROW_TOKENS)
    parser.add_argument("--shape", choices=SHAPES, help="layers, experts and top-k of a model; all experts in scope")
    parser.add_argument("--rows", type=int, default=0, help="weights of so many rows, from their selections")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, help="fail when it took more seconds of CPU (busy cores or not)")
    parser.add_argument("--max-gib", type=float, help="fail when the process needed more memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.shape is not None:
        arguments.layers, arguments.experts, arguments.top_k = SHAPES[arguments.shape]
        arguments.experts_in_scope = "all"
    if arguments.generate is not None:
        generate(arguments, arguments.generate)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate", folder], check=True)
        result = (measure_rows if arguments.rows else measure)(arguments, Path(folder))
    if arguments.json:
        print(json.dumps(result, indent=1))
    else:
        for name, value in result.items():
            print(f"{name:>16}  {value:.6g}" if isinstance(value, float) else f"{name:>16}  {value}")
    for limit, name, unit in ((arguments.max_seconds, "cpu_s", "s of CPU"), (arguments.max_gib, "peak_rss_gib", "GiB")):
        if limit is not None and result[name] > limit:
            sys.exit(f"bench_calibrate: {result[name]:g} {unit}, more than the limit of {limit:g}")


if __name__ == "__main__":
    main()
