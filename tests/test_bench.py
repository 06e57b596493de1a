"""`trace-ds bench`: matched forgetting per seed, paired differences, honest gaps; and the command itself, whole."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from command import trace_ds

from trace_ds.demo import run as demo
from trace_ds.demo.bench import Outcome, bench, seed_outcomes, table
from trace_ds.demo.pretrain import pretrain
from trace_ds.errors import UserError
from trace_ds.run.files import write_json


def write(run: Path, name: str, forget: float, utility: float) -> None:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    scores = [
        {"role": "forget", "task": "f", "metric": "accuracy", "value": forget},
        {"role": "utility", "task": "u", "metric": "exact_match", "value": utility},
    ]
    (run / "evaluation" / f"{name}.json").write_text(json.dumps({"scores": scores}))


def test_a_method_has_forgotten_from_the_first_checkpoint_at_the_target(tmp_path: Path) -> None:
    write(tmp_path, "gold", 0.30, 1.0)
    for step, forget, utility in ((10, 0.5, 0.9), (20, 0.35, 0.4), (30, 0.37, 0.8)):
        write(tmp_path, f"step_{step:06d}", forget, utility)
        write(tmp_path / "variants" / "uniform", f"step_{step:06d}", 0.5, 0.9)
    found = {item.method: item for item in seed_outcomes(tmp_path, 7)}
    assert found["trace"].step == 20 and found["uniform"].step is None
    assert found["trace"].curves == {"u exact_match": {10: 0.9, 20: 0.4, 30: 0.8}}
    assert math.isclose(found["trace"].mean_from("u exact_match", 20), 0.6)
    (tmp_path / "evaluation" / "gold.json").unlink()
    with pytest.raises(UserError, match=r"gold\.json: this evaluation is missing"):
        seed_outcomes(tmp_path, 7)


def test_table_compares_on_the_same_checkpoints_and_counts_what_is_missing() -> None:
    def outcome(seed: int, method: str, step: int | None, *values: float) -> Outcome:
        return Outcome(seed, method, step, {"u": dict(zip((10, 20, 30), values, strict=True))})

    outcomes = [
        outcome(0, "uniform", 10, 0.9, 0.5, 0.5),
        outcome(0, "trace", 20, 0.1, 0.5, 0.7),  # from step 20 on: .6 against .5
        outcome(1, "uniform", 30, 0.9, 0.9, 0.4),
        outcome(1, "trace", 10, 0.1, 0.1, 0.44),  # from step 30 on: .44 against .4
        outcome(2, "uniform", 10, 0.8, 0.8, 0.8),
        outcome(2, "trace", None, 0.9, 0.9, 0.9),
    ]
    lines = {line["method"]: line for line in table(outcomes)}
    assert lines["trace"]["relative_by_seed"] == pytest.approx([0.2, 0.1])
    assert lines["trace"]["relative"] == pytest.approx(0.15)
    assert lines["trace"]["utility"] == pytest.approx((0.6 + 0.44) / 2)
    # Student's t with one degree of freedom at 97.5 % is 12.706; the deviation of (0.2, 0.1) is 0.0707
    assert lines["trace"]["half_width"] == pytest.approx(12.7062 * 0.0707107 / math.sqrt(2), rel=1e-4)
    assert lines["trace"]["not_reached"] == 1 and lines["uniform"]["not_reached"] == 0
    assert lines["uniform"]["relative"] == pytest.approx(0.0)


@pytest.mark.slow
def test_the_default_comparison_with_changes_of_its_recipe(tmp_path: Path) -> None:
    """As the README's command, with inputs that are there already (models of three steps) and fewer, shorter runs."""
    folder = tmp_path / "runs" / "bench" / "seed_0"
    corpora = demo.prepare_corpora(folder, 0)
    for name in demo.MODELS:
        pretrain(folder / "corpora", folder / "models" / name, gold=name == "gold", seed=0, steps=3)
        made = {"corpora": corpora.content, "seed": 0, "fingerprint": demo._fingerprint(folder / "models" / name)}
        write_json(folder / "models" / f"{name}.json", made)
    changes = {
        "unlearning.steps": 1,
        "unlearning.save_every": 1,
        "distributed": {"nproc": 1, "ep": 1},
        "calibration.if_none_found": "continue",
        "evaluation.drift": False,
        "variants": {"uniform": {"calibration.rule": "uniform"}},
    }
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    result = trace_ds("bench", "--seeds", "1", *words, cwd=tmp_path, timeout_s=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    assert "numbers: runs/bench/bench.json" in result.stdout
    found = json.loads((tmp_path / "runs" / "bench" / "bench.json").read_text())
    assert {(item["method"], *item["curves"]["general_text perplexity"]) for item in found["outcomes"]} == {
        (method, "1") for method in ("trace", "uniform")
    }
    assert (found["recipe"], found["seeds"], len(found["set"])) == ("bench_knowledge", 1, len(changes))


def test_the_seeds_of_a_comparison_cannot_be_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"say how many with --seeds"):
        bench("bench_knowledge", tmp_path, 3, False, ["seed=7"])
