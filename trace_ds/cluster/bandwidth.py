"""A real all-reduce and all-to-all between the ranks of a job, checked for their result and timed.

Bus bandwidth is defined as in NVIDIA's nccl-tests: ``2 (n-1)/n`` times the size over the time for an all-reduce,
``(n-1)/n`` for an all-to-all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from trace_ds.cluster.checks import Check

SIZE_BYTES = 1 << 25
REPEATS = 5


def time_collectives(device: Any, group: Any = None) -> dict[str, float]:
    """Bytes/s by collective over a process group of all ranks (default: the default one), the best of :data:`REPEATS`.

    Raises:
        RuntimeError: a collective gave a wrong result.
    """
    import torch
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    elements = SIZE_BYTES // 4 // world * world
    result = {}
    for name, factor in (("all-reduce", 2.0), ("all-to-all", 1.0)):
        best_s = float("inf")
        for _ in range(REPEATS):
            sent = torch.full((elements,), float(rank + 1), device=device)
            received = torch.empty_like(sent)
            distributed.barrier(group)
            start = time.perf_counter()
            if name == "all-reduce":
                distributed.all_reduce(sent, group=group)
            else:
                distributed.all_to_all_single(received, sent, group=group)
            if device.type == "cuda":
                torch.cuda.synchronize()
            best_s = min(best_s, time.perf_counter() - start)
        if name == "all-reduce":
            correct = bool((sent == world * (world + 1) / 2).all())
        else:
            blocks = received.view(world, -1)
            correct = all(bool((blocks[peer] == peer + 1).all()) for peer in range(world))
        if not correct:
            raise RuntimeError(f"the {name} gave a wrong result")
        result[name] = factor * (world - 1) / world * elements * 4 / best_s
    return result


def bandwidth_lines(result: dict[str, float], backend: str, where: str) -> Iterator[Check]:
    """A check per collective of :func:`time_collectives`; ``where`` says between what."""
    for name in ("all-reduce", "all-to-all"):
        detail = f"{result[name] / 1e9:.2f} GB/s bus bandwidth, {where}, {SIZE_BYTES >> 20} MiB, correct"
        yield Check("collectives", f"{backend} {name}", "OK", detail)
