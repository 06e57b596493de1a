"""Peak memory of a token loss at a large vocabulary: logits whole against the chunked LM head.

    python tools/bench_head.py [--tokens 2048] [--vocabulary 150000] [--hidden 1024] [--dtype fp32] [--json]

Each variant runs forward and backward in a process of its own; the figure is the growth of its peak resident memory
over the weights, inputs and the gradient of the weight. On a GPU, the device's peak is measured instead.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def measure(variant: str, arguments: argparse.Namespace, queue: Any) -> None:
    import torch
    from torch.nn import functional

    from trace_ds.models.token_nll import nll
    from trace_ds.unlearning.forward import LOGITS_PER_CHUNK, head_values

    cuda = torch.cuda.is_available()
    torch.manual_seed(0)
    device = torch.device("cuda" if cuda else "cpu")
    dtype = getattr(torch, DTYPES[arguments.dtype])
    weight = torch.randn(arguments.vocabulary, arguments.hidden, device=device).to(dtype).requires_grad_()
    hidden = torch.randn(arguments.tokens, arguments.hidden, device=device).to(dtype).requires_grad_()
    targets = torch.randint(0, arguments.vocabulary, (arguments.tokens,), device=device)
    weight.grad = torch.zeros_like(weight)

    def peak_bytes() -> int:
        if cuda:
            return torch.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak_bytes()
    start = time.perf_counter()
    if variant == "whole":
        logits = functional.linear(hidden, weight)
        loss = functional.cross_entropy(logits.float(), targets, reduction="none").sum()
    else:
        chunk = max(1, LOGITS_PER_CHUNK // arguments.vocabulary)
        sides = targets.chunk(2)  # forget and retain tokens, as in a step of unlearning
        functions = [(len(own), lambda part_CV, part, own=own: nll(part_CV, own[part])) for own in sides]
        loss = head_values(hidden, weight, functions, chunk).sum()
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    queue.put((float(loss.detach()), peak_bytes() - before, time.perf_counter() - start))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=150_000)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found = {}
    for variant in ("whole", "chunked"):
        queue = context.Queue()
        process = context.Process(target=measure, args=(variant, arguments, queue))
        process.start()
        loss, peak, seconds = queue.get(timeout=600)
        process.join()
        found[variant] = {"loss": loss, "peak_growth_bytes": peak, "seconds": seconds}
    ratio = found["chunked"]["peak_growth_bytes"] / found["whole"]["peak_growth_bytes"]
    if arguments.json:
        print(json.dumps({**found, "head_memory_ratio": ratio}))
        return
    for variant, values in found.items():
        print(f"{variant:8} {values['peak_growth_bytes'] / 1e9:6.2f} GB  {values['seconds']:6.1f} s")
    print(f"memory ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
