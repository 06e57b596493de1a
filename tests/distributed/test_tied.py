"""Models whose head is their embedding: loaded, trained, saved and converted as one tensor, at any stage and world."""

from __future__ import annotations

from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny
from objective_reference import reference_run
from processes import run_distributed
from safetensors.numpy import load_file
from test_unlearn import GRADIENT_LIKE, calibrated_run, copy_of, losses_of, relative, weights_of

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
        actual = weights_of(Path(run_dir), 2, tmp_path / f"{Path(run_dir).name}_model")
        assert actual.keys() == base.keys() and not np.array_equal(actual[EMBEDDING], base[EMBEDDING])
        assert relative(actual, expected["weights"], base) < 5e-4
