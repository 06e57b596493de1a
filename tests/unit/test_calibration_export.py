"""TRACE outside its own job: the rows with their weights, the loss, and the Trainer example of the documentation."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from stage_calls import calibrate
from test_calibration_stage import prepared  # noqa: F401 (a fixture)

from trace_ds.calibration.export import RetainRows, collate_rows, weighted_retain_loss
from trace_ds.config.load import load_config
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory

EXAMPLE = Path(__file__).parents[2] / "docs" / "trainer_example.py"


@pytest.fixture(scope="module")
def calibrated(prepared, tmp_path_factory):  # noqa: F811
    config_path, run_path = prepared
    run = RunDirectory(tmp_path_factory.mktemp("exported") / "run")
    run.path.symlink_to(run_path)
    calibrate(load_config(str(config_path))[0], run)
    return config_path, run


def rows_of(calibrated) -> list[dict]:
    rows = RetainRows(calibrated[1].path)
    return [rows[number] for number in range(6)]


def test_collated_rows_equal_the_jobs_own_batches(calibrated) -> None:
    _, run = calibrated
    dataset = TokenDataset.open(artefact.load_artefact(run.data, "data").file("retain.arrow"))
    mine, theirs = collate_rows(rows_of(calibrated), pad_id=2), dataset.batch(range(6), pad_id=2)
    assert torch.equal(mine["input_ids"], theirs.input_ids_BS)
    counted = theirs.counted_BS
    assert torch.equal(mine["labels"][:, 1:] != -100, counted[:, :-1])
    assert torch.equal(mine["weights"] > 0, counted)
    weights = np.load(run.calibration / "weights.npy")
    np.testing.assert_array_equal(torch.cat([row["weights"] for row in RetainRows(run.path)]), weights)
    np.testing.assert_array_equal(RetainRows(run.path).row_weight_R, np.load(run.calibration / "row_weights.npy"))
    real = theirs.document_ids_BS >= 0
    assert torch.equal(mine["position_ids"][real], theirs.position_ids_BS[real])


def test_loss_against_the_slow_way_and_its_divisor(calibrated) -> None:
    batch = collate_rows(rows_of(calibrated))
    logits = torch.randn(*batch["input_ids"].shape, 300, generator=torch.Generator().manual_seed(0))
    expected, n = 0.0, 0
    for row, ids in enumerate(batch["input_ids"]):
        for t in range(len(ids) - 1):
            if batch["labels"][row, t + 1] != -100:
                n += 1
                expected -= float(batch["weights"][row, t] * logits[row, t].log_softmax(-1)[ids[t + 1]])
    loss = weighted_retain_loss(logits, batch["labels"], batch["weights"])
    assert float(loss) == pytest.approx(expected / n, rel=1e-5)
    twice = weighted_retain_loss(logits, batch["labels"], 2 * batch["weights"])
    assert float(twice) == pytest.approx(2 * expected / n, rel=1e-5), "the weights of a batch are not renormalised"
    assert float(weighted_retain_loss(logits, batch["labels"], batch["weights"], 7)) == pytest.approx(expected / 7)


@pytest.mark.parametrize("sampling", [False, True])
def test_trainer_example_runs_and_its_first_loss_is_the_weighted_one(calibrated, tmp_path, sampling: bool) -> None:
    """Accumulation over two micro-batches: the logged loss is Σ wℓ / n over both, n the tokens of both."""
    from transformers import AutoModelForCausalLM

    config_path, run = calibrated
    example = runpy.run_path(str(EXAMPLE))
    trainer_class = example["RetainTrainer"]
    trainer_class.compute_loss.__globals__["SAMPLING"] = sampling
    model = str(config_path.parent / "model")
    options = {
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 0.0,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
    }
    seen: list[dict] = []
    original = trainer_class.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        seen.append({name: value.clone() for name, value in inputs.items()})
        return original(self, model, inputs, *args, **kwargs)

    trainer_class.compute_loss = spy
    trainer = example["main"](model, str(run.path), str(tmp_path / "out"), **options)
    reference = AutoModelForCausalLM.from_pretrained(model)
    total = n = 0.0
    for batch in seen:
        with torch.no_grad():
            logits = reference(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        weights = batch["weights"] > 0 if sampling else batch["weights"]
        total += float(weighted_retain_loss(logits, batch["labels"], weights, 1))
        n += float((batch["labels"][:, 1:] != -100).sum())
    assert len(seen) == 2
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(total / n, rel=1e-4)
    if sampling:
        drawn, rows = torch.tensor(list(trainer._get_train_sampler())), len(RetainRows(run.path))
        assert len(drawn) == rows and len(set(drawn.tolist())) < rows, "drawn with replacement"
