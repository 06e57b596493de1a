"""A job saves what it trains, and holds the layers that its losses need; the rest is the base model's."""

from __future__ import annotations

import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny
from processes import run_distributed
from safetensors.numpy import load_file
from test_unlearn import GRADIENT_LIKE, calibrated_run, copy_of, losses_of, weights_of

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.errors import UserError
from trace_ds.tensors.opening import open_source

LAYERS, LAST = 4, 1
WHOLE = ["unlearning.evaluate.every=9", "unlearning.evaluate.rows=4"]  # looks at the model, which changes nothing
HELD_LINE = f"the losses end at layer {LAST}: {LAST + 1} of {LAYERS} decoder layers are loaded"
FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe_text", "gpt_oss")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory up to the calibration) of RMU at layer 1 of 4."""
    folder = tmp_path_factory.mktemp("held")
    model = tiny.make_model(folder / "model", layers=LAYERS)
    config = tiny.write_config(folder, model, unlearning__rmu={"layer": LAST}, unlearning__forget_loss="rmu")
    return config, calibrated_run(config, folder / "run")


def is_above(name: str) -> bool:
    return any(f".layers.{layer}." in name for layer in (2, 3)) or name in ("model.norm.weight", "lm_head.weight")


def log_of(run: Path) -> str:
    return (run / "logs" / "unlearn.jsonl").read_text()


def step_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def trained_elements(run: Path, step: int) -> int:
    """Elements of the parameters that have an fp32 master in a checkpoint; the files have no room for others."""
    checkpoint = open_source(step_of(run, step))
    elements = sum(checkpoint.tensors[name].numel for name in checkpoint.trained)
    states = sum(path.stat().st_size for path in step_of(run, step).glob("*optim_states.pt"))
    assert states < 1.1 * (elements * 12 + 20_000 * checkpoint.world), (states, elements)
    return elements


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "shapes"),
    [(1, [(1, 1)]), (2, [(2, 3), (1, 2), (2, 1)])],
    ids=["alone", "two ranks"],
)
def test_half_of_the_model_and_the_same_weights(
    calibrated: tuple[Path, Path], tmp_path: Path, world: int, shapes: list[tuple[int, int]]
) -> None:
    """``shapes``: expert-parallel size, ZeRO stage. The whole model is held where it is looked at."""
    config, prepared = calibrated
    base = load_file(config.parent / "model" / "model.safetensors")
    work = {}
    for ep, stage in shapes:
        for kind, more in (("part", []), ("whole", WHOLE)):
            shape = [f"distributed.ep={ep}", f"unlearning.zero_stage={stage}", "unlearning.optimizer.weight_decay=0.1"]
            work[ep, stage, kind] = copy_of(prepared, tmp_path / f"{kind}{ep}{stage}"), [*shape, *more]
    runs = [(str(run), overrides) for run, overrides in work.values()]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, world, str(config), runs)))
    for ep, stage in shapes:
        part, whole = (work[ep, stage, kind][0] for kind in ("part", "whole"))
        assert HELD_LINE in log_of(part) and "the losses end at" not in log_of(whole)
        assert trained_elements(part, 4) == trained_elements(whole, 4)
        assert trained_elements(part, 4) == sum(value.size for name, value in base.items() if not is_above(name))
        assert losses_of(part) == losses_of(whole)
        actual, other = (weights_of(run, 4, tmp_path / f"{run.name}-model") for run in (part, whole))
        assert actual.keys() == other.keys() == base.keys()
        for name, value in actual.items():
            assert np.array_equal(value, other[name]), (ep, stage, name)
            assert np.array_equal(value, base[name]) == is_above(name), (ep, stage, name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainable", "stage", "elements"),
    [("[all]", 3, 52_992), ("['*.layers.1.*experts*']", 3, 18_432), ("['*.layers.1.*experts*', routers]", 1, 18_688)],
    ids=["all", "experts of a layer", "stage 1"],
)
def test_it_goes_on_bitwise_and_on_another_shape(
    calibrated: tuple[Path, Path], tmp_path: Path, trainable: str, stage: int, elements: int
) -> None:
    config, prepared = calibrated
    straight, broken, moved = (copy_of(prepared, tmp_path / name) for name in ("straight", "broken", "moved"))
    shape = [*GRADIENT_LIKE, "distributed.ep=2", "unlearning.save_every=1", f"unlearning.trainable={trainable}"]
    shape += [f"unlearning.zero_stage={stage}"]
    half = [*shape, "unlearning.steps=2"]
    for run, overrides in ((straight, shape), (broken, half), (broken, shape), (moved, half)):
        run_distributed(jobs.unlearn_job, 2, str(config), str(run), overrides)
    assert read_manifest(step_of(broken, 4)) == read_manifest(step_of(straight, 4))  # every file's hash
    for world, ep, steps in ((1, 1, 3), (2, 1, 4)):
        other = [*shape, f"distributed.ep={ep}", f"unlearning.steps={steps}"]
        run_distributed(jobs.unlearn_job, world, str(config), str(moved), other)
    assert "converting it" in log_of(moved) and trained_elements(straight, 4) == trained_elements(moved, 4) == elements
    np.testing.assert_allclose(losses_of(moved), losses_of(straight), rtol=1e-6, atol=2e-13)
    expected = weights_of(straight, 4, tmp_path / "expected")
    for name, value in weights_of(moved, 4, tmp_path / "found").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)


@pytest.mark.slow
def test_the_rest_comes_from_the_base_model_or_is_asked_for(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    config, prepared = calibrated
    run = copy_of(prepared, tmp_path / "run")
    run_distributed(jobs.unlearn_job, 1, str(config), str(run), ["unlearning.steps=1"])
    step, base = step_of(run, 1), config.parent / "model"
    expected = weights_of(run, 1, tmp_path / "expected")
    report = convert_checkpoint(step, tmp_path / "model", base_model=base, verify=True)
    assert any(note.startswith("the checkpoint holds no frozen parameters: ") for note in report["notes"])
    actual = load_file(tmp_path / "model" / "model.safetensors")
    assert actual.keys() == expected.keys() and all(np.array_equal(actual[n], v) for n, v in expected.items())
    other, bare = tmp_path / "other", tmp_path / "bare"
    tiny.make_model(other, layers=LAYERS, seed=1)
    shutil.copytree(base, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for place, words in ((other, "another model than the job started from"), (bare, "the directory has no weights")):
        with pytest.raises(UserError, match=rf"holds no frozen parameters.*{words}.*--base-model"):
            convert_checkpoint(step, tmp_path / "refused", base_model=place)
    assert not (tmp_path / "refused").exists()
