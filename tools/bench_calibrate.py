"""How long calibration takes and how much memory it needs on a large synthetic retain trace.

    python tools/bench_calibrate.py                          # 10 M tokens, 16 layers x 64 experts, top-8, 200 selected
    python tools/bench_calibrate.py --experts-in-scope all   # the same trace, all 1,024 experts
    python tools/bench_calibrate.py --level sequence         # one weight per row of 2,048 tokens
    python tools/bench_calibrate.py --retrieve --row-tokens 16   # 625,000 rows, scored by routing and by coverage
    python tools/bench_calibrate.py --tokens 1000000 --json
    python tools/bench_calibrate.py --max-seconds 120 --max-gib 3    # exit status 1 beyond a limit: a regression check

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
    write_corpus(folder / "retain", rng, tables, arguments.tokens, False)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from trace_ds.calibration.diagnose import document_sums, likeness_tables, quantiles
    from trace_ds.calibration.raking import Context
    from trace_ds.calibration.rows import build_row_store
    from trace_ds.calibration.rules import apply_rule
    from trace_ds.calibration.similarity import coverage_gain, routing_similarity
    from trace_ds.calibration.tokens import TokenMap, Trace, count_selections
    from trace_ds.config.schema import CalibrationConfig

    def corpus(name: str) -> tuple[TokenMap, Trace]:
        trace = np.load(folder / f"{name}.npy", mmap_mode="r")
        documents = np.load(folder / f"{name}_documents.npy", mmap_mode="r")
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
    config = CalibrationConfig(ess_floor=arguments.ess_floor, level=arguments.level)
    say = (lambda line: print(line, file=sys.stderr)) if arguments.progress else (lambda line: None)
    context = Context(int(os.environ["OMP_NUM_THREADS"]), None, say)
    made = apply_rule(config, retain_tokens, retain_trace, scope_LE, forget_LE, retain_LE, 0, folder, context=context)
    now_s = timed("weights_s", now_s)
    achieved_LE = count_selections(retain_trace, retain_tokens, arguments.experts, made.weight_T) / counted
    score_LE, _, _ = likeness_tables(forget_LE, retain_LE, counted)
    document_sums(retain_tokens, retain_trace, made.weight_T, score_LE)
    quantiles(made.weight_T, retain_tokens)
    timed("diagnosis_s", now_s)
    times["total_s"] = round(time.perf_counter() - began_s, 2)
    if arguments.retrieve:
        now_s = time.perf_counter()
        everything_LE = np.ones(retain_LE.shape, dtype=bool)
        routing_similarity(retain_trace, retain_tokens, everything_LE, forget_LE, retain_LE)
        now_s = timed("retrieve_routing_s", now_s)
        rows = build_row_store(retain_trace, retain_tokens, scope_LE, folder)
        coverage_gain(rows, forget_LE[scope_LE], max(len(rows.sizes_R) // 10, 1))
        timed("retrieve_coverage_s", now_s)
    return {
        "tokens": counted,
        "constraints": int(scope_LE.sum()),
        **times,
        "cpu_s": round(time.process_time() - began_cpu_s, 2),
        "peak_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "lambda": made.strength,
        "ess_fraction": made.ess,
        "max_weight": made.max_weight,
        "iterations": made.iterations,
        "converged": made.converged,
        "largest_miss": float(np.abs(achieved_LE - made.target_LE)[scope_LE].max()),
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
    parser.add_argument("--level", choices=("token", "sequence"), default="token")
    parser.add_argument("--row-tokens", type=int, default=ROW_TOKENS)
    parser.add_argument("--retrieve", action="store_true", help="also time two similarities (not in total_s)")
    parser.add_argument("--progress", action="store_true", help="the solver's lines, on standard error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-seconds", type=float, help="fail when it took more seconds of CPU (busy cores or not)")
    parser.add_argument("--max-gib", type=float, help="fail when the process needed more memory")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--generate", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.generate is not None:
        generate(arguments, arguments.generate)
        return
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--generate", folder], check=True)
        result = measure(arguments, Path(folder))
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
