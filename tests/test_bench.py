"""The arithmetic of `trace-ds bench`: matched forgetting per seed, paired differences, and honest gaps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from trace_ds.demo.bench import Outcome, seed_outcomes, table
from trace_ds.errors import UserError


def write(run: Path, name: str, forget: float, utility: float) -> None:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    scores = [
        {"role": "forget", "task": "f", "metric": "accuracy", "value": forget},
        {"role": "utility", "task": "u", "metric": "exact_match", "value": utility},
    ]
    (run / "evaluation" / f"{name}.json").write_text(json.dumps({"scores": scores}))


def test_utility_counts_from_the_crossing_on(tmp_path: Path) -> None:
    write(tmp_path, "gold", 0.30, 1.0)
    for step, forget, utility in ((10, 0.5, 0.9), (20, 0.3, 0.4), (30, 0.35, 0.8)):
        write(tmp_path, f"step_{step:06d}", forget, utility)
        write(tmp_path / "variants" / "uniform", f"step_{step:06d}", 0.5, 0.9)
    found = {item.method: item for item in seed_outcomes(tmp_path, 7)}
    assert found["trace"].step == 20 and math.isclose(found["trace"].utility["u exact_match"] or 0, 0.6)
    assert found["uniform"].step is None and found["uniform"].utility == {"u exact_match": None}
    (tmp_path / "evaluation" / "gold.json").unlink()
    with pytest.raises(UserError, match=r"gold\.json: this evaluation is missing"):
        seed_outcomes(tmp_path, 7)


def test_table_pairs_seeds_and_counts_what_is_missing() -> None:
    outcomes = [
        Outcome(seed, method, 10, {"u": value})
        for seed, pair in enumerate([(0.5, 0.6), (0.4, 0.44), (0.8, None)])
        for method, value in zip(("uniform", "trace"), pair, strict=True)
    ]
    lines = {line["method"]: line for line in table(outcomes)}
    assert lines["trace"]["relative_by_seed"] == pytest.approx([0.2, 0.1])
    assert lines["trace"]["relative"] == pytest.approx(0.15)
    # Student's t with one degree of freedom at 97.5 % is 12.706; the deviation of (0.2, 0.1) is 0.0707
    assert lines["trace"]["half_width"] == pytest.approx(12.7062 * 0.0707107 / math.sqrt(2), rel=1e-4)
    assert lines["trace"]["not_reached"] == 1 and lines["uniform"]["not_reached"] == 0
    assert lines["uniform"]["relative"] == pytest.approx(0.0)
