"""Ranks wait for what the main process does alone, longer than a collective may last; not for one that died."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from processes import end_of_ranks, run_distributed

LIMIT_S, WORK_S = 1.0, 1.6


def slow_main(world: Any) -> list[Any]:
    from trace_ds.parallel.world import wait_longer

    def work(value: Any) -> Any:
        time.sleep(WORK_S)
        return value

    wait_longer(LIMIT_S / 60)
    results = [
        world.run_on_main_and_broadcast(lambda: work("made")),
        world.run_on_main_first(lambda: work(1) if world.is_main else 2),
    ]
    return [*results, world.broadcast(work("told") if world.is_main else None)]


def dying_main(world: Any) -> None:
    def die() -> None:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)

    world.run_on_main_and_broadcast(die)


def test_a_main_process_that_works_longer_than_a_collective_may_last() -> None:
    assert run_distributed(slow_main, 2) == [["made", 1, "told"], ["made", 2, "told"]]


def test_nobody_waits_for_a_main_process_that_died() -> None:
    main, other = end_of_ranks(dying_main, 2, limit_s=60.0)
    assert main == -signal.SIGKILL and "Connection" in str(other)
