"""The tool that measures `prepare` runs on a little text and says what it promises (the times mean nothing)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools import bench_prepare


def test_times_of_one_and_two_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trace_ds.corpora.processes.HERE_CHARACTERS", 10_000)
    found = bench_prepare.measure(0.4, [1, 2], 1, tmp_path)
    for kind in bench_prepare.KINDS:
        assert found[kind]["same"] and found[kind]["ratio"] > 0
        assert found[kind]["seconds"].keys() == {"1", "2"}
