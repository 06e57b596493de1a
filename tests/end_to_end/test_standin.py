"""The rules of a GPU, without one: nothing mixes devices, reads what has not arrived, or waits more than it must.

Each test runs on a stand-in device (``standin_device.py``) in a process of its own; on a GPU: tools/gpu_acceptance.py.
Not under it: DeepSpeed's engines, and with them ZeRO and AutoEP; experts that run one after the other (transformers'
``eager`` looks up the tokens of each expert, for which the host waits); GRIP, which writes into DeepSpeed's optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import CONTEXT

EXPECTED = {
    "cpu_index": (AssertionError, "copies an index"),
    "item": (AssertionError, "reads a value"),
    "missing_event": (AssertionError, "part"),
    "numpy": (TypeError, "can't convert standin:0 device type tensor to numpy"),
    "cpu_sum": (RuntimeError, "Expected all tensors to be on the same device"),
}
Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def ask() -> Iterator[Ask]:
    """``ask(name, ...)``: the function of that name in ``standin_jobs.py``, in another process."""
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as pool:
        yield lambda name, *arguments: pool.submit(call, name, *arguments).result(timeout=200)


def call(name: str, *arguments: Any) -> Any:
    import standin_jobs  # here: it gives its process a device

    return getattr(standin_jobs, name)(*arguments)


def test_the_device_keeps_the_rules(ask: Ask) -> None:
    ask("rules")


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_collect(ask: Ask, family: str, tmp_path: Path) -> None:
    ask("check_collect", family, tmp_path)


@pytest.mark.parametrize(
    "job", ["rmu", "npo", "undial", "pdu", "adaptive", "kl", "sampled", "seuf", "micro_batches", "finetune"]
)
def test_unlearn(ask: Ask, job: str, tmp_path: Path) -> None:
    ask("check_unlearn", job, tmp_path)


def test_scorer_and_relearning(ask: Ask, tmp_path: Path) -> None:
    ask("check_scorer", tmp_path)


@pytest.mark.parametrize("fault", EXPECTED)
def test_a_fault_fails(ask: Ask, fault: str, tmp_path: Path) -> None:
    error, words = EXPECTED[fault]
    with pytest.raises(error, match=words):
        ask("check_collect", "mixtral", tmp_path, fault)
