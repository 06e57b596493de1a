"""Models whose head is their embedding: loaded, trained, saved and converted as one tensor, at any stage and world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from objective_reference import reference_run
from processes import run_distributed
from safetensors.numpy import load_file
from test_unlearn import GRADIENT_LIKE, calibrated_run, copy_of, losses_of, relative, weights_of

from trace_ds.conversion.convert import convert_checkpoint

FAMILIES = (
    "mixtral",
    "deepseek_v3",
    "phimoe",
    "granitemoe",
    "gpt_oss",
)  # others: test_convert_engines.py
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory up to the calibration) of a tied Mixtral."""
    folder = tmp_path_factory.mktemp("tied")
    config = tiny.write_config(folder, tiny.make_model(folder / "model", tied=True), statistics__nll=True)
    return config, calibrated_run(config, folder / "run")


@pytest.mark.slow
def test_training_equals_the_single_process_reference(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    """NPO's gradient reaches the matrix from both of its ends."""
    config, prepared = calibrated
    base = load_file(config.parent / "model" / "model.safetensors")
    assert HEAD not in base
    common = [*GRADIENT_LIKE, "unlearning.forget_loss=npo", "unlearning.apply=loss", "unlearning.steps=2"]
    runs = []
    for stage, ep in ((2, 2), (3, 1), (3, 2)):
        run = copy_of(prepared, tmp_path / f"zero{stage}_ep{ep}")
        runs.append((str(run), [*common, f"unlearning.zero_stage={stage}", f"distributed.ep={ep}"]))
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, 2, str(config), runs)))
    expected = reference_run(str(config), runs[0][0], common, 2)
    for run_dir, _ in runs:
        np.testing.assert_allclose(losses_of(Path(run_dir)), expected["losses"], rtol=1e-6, atol=1e-9)
        found = weights_of(Path(run_dir), 2, tmp_path / f"{Path(run_dir).name}_model")
        assert found.keys() == base.keys() and not np.array_equal(found[EMBEDDING], base[EMBEDDING])
        assert relative(found, expected["weights"], base) < 5e-4


def save_engines(world: Any, folder: str, models: dict[str, str]) -> None:
    """A checkpoint of an engine that has trained nothing, for every model, under ZeRO-2 and ZeRO-3 in turn."""
    from trace_ds.checkpoints import serialization
    from trace_ds.models.engine import base_ds_config, initialize
    from trace_ds.models.families import inspect_model
    from trace_ds.models.loading import ModelParts

    for number, (name, path) in enumerate(models.items()):
        info = inspect_model(path)
        ep = 2 if info.family.autoep_preset else 1
        ds_config = base_ds_config(ep=ep, info=info, zero_stage=2 + number % 2) | {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
            "bf16": {"enabled": False},
        }
        engine = initialize(
            info, world, ds_config, dtype="fp32", parts=ModelParts(), parameters=lambda m: list(m.parameters())
        )
        head, embedding = engine.module.lm_head.weight, engine.module.get_input_embeddings().weight
        assert (head is embedding) == ("untied" not in name)
        serialization.install(engine)
        engine.save_checkpoint(f"{folder}/{name}_engine", tag="step_000000", save_latest=False)


@pytest.mark.slow
def test_tied_and_untied_go_through_an_engine_and_back_exactly(tmp_path: Path) -> None:
    models = {family: str(tiny.make_model(tmp_path / family, family, tied=True)) for family in FAMILIES}
    models["untied"] = str(tiny.make_model(tmp_path / "untied"))
    run_distributed(save_engines, 2, str(tmp_path), models)
    for name, path in models.items():
        base, made = load_file(Path(path) / "model.safetensors"), tmp_path / f"{name}_made"
        assert (HEAD in base) == (name == "untied")
        convert_checkpoint(tmp_path / f"{name}_engine" / "step_000000", made, base_model=Path(path))
        back = load_file(made / "model.safetensors")
        assert back.keys() == base.keys()
        for tensor, value in base.items():
            assert np.array_equal(back[tensor], value), (name, tensor)
        assert json.loads((made / "config.json").read_text())["tie_word_embeddings"] == (name != "untied")
