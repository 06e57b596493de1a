"""The tool that measures `prepare` runs on a little text and says what it promises (the times mean nothing)."""

from __future__ import annotations

from pathlib import Path

from tools import bench_prepare


def test_times_of_one_and_two_threads(tmp_path: Path) -> None:
    found = bench_prepare.measure(0.4, [1, 2], 1, tmp_path)
    for kind in bench_prepare.KINDS:
        assert found[kind]["same"] and found[kind]["ratio"] > 0
        assert found[kind]["seconds"].keys() == {"1", "2"}
