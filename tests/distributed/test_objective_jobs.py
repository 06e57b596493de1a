"""Objectives in whole jobs: losses and weights equal an independent float64 run, whatever the shape of the cluster."""

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

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.config.load import load_config
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.unlearn import check as check_unlearn

STEPS = 2
# One objective of each kind: token losses with and without the frozen model's logits on either side, sequence losses,
# hidden states on either side.
OBJECTIVES = {
    "graddiff": ["forget_loss=graddiff"],
    "npo": ["forget_loss=npo"],
    "wga_kl": ["forget_loss=wga", "retain_loss=kl"],
    "undial_hidden": ["forget_loss=undial", "retain_loss=hidden_mse"],
    "dpo": ["forget_loss=dpo", "dpo.beta=0.03"],
    "adaptive_rmu_nll": ["forget_loss=rmu", "rmu.scale=adaptive", "retain_loss=nll"],
    "pdu": ["forget_loss=pdu"],
}
# Further ones of these kinds, in one shape.
OTHERS = {
    "satimp": ["forget_loss=satimp"],  # whose p⁵ is next to nothing here: the retain loss moves the weights
    "ceu": ["forget_loss=ceu"],
    "rmu": ["forget_loss=rmu"],
    "simnpo_sampled": ["forget_loss=simnpo", "apply=sampling"],
    "absolute_rmu": ["forget_loss=rmu", "rmu.scale=absolute", "rmu.coefficient=7"],
}
# What GRIP does to the routers after clipped updates with weight decay: margins that break.
ROUTERS = {
    "grip": [
        "forget_loss=graddiff", "optimizer.weight_decay=0.5", "grip={tokens: 25, steps: 2}", "optimizer.lr=0.3",
    ],
}  # fmt: skip
# What a loss is does not depend on the shape: each in one with everything, and of the others what asks for different
# tensors (token losses, hidden states and logits of the frozen model, sequences with alternatives, routers).
SOME = {name: OBJECTIVES[name] for name in ("graddiff", "undial_hidden", "dpo")}
SHAPES = [
    (2, 2, 3, OBJECTIVES | ROUTERS),
    (2, 2, 2, OTHERS),
    (1, 1, 3, SOME),
    (2, 1, 1, SOME | ROUTERS),
]


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path) -> tuple[Path, Path]:
    """(configuration, run directory) with three corpora, their statistics and a calibration with unequal weights."""

    def make(folder: Path) -> None:
        folder.mkdir()
        refusals = folder / "refusals.jsonl"
        texts = ["the window is a garden", "no letter of the king", "a winter street"]
        refusals.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        changes = {"data__alternative": str(refusals), "data__packing": "single"}
        calibrated_run(tiny.write_config(folder, tiny_model, statistics__nll=True, **changes), folder / "run", world=2)

    folder = jobs.made_once("objectives", make)
    return folder / "config.yaml", folder / "run"


def overrides_of(name: str, ep: int = 1, stage: int = 3) -> list[str]:
    own = [f"unlearning.{key}" for key in (OBJECTIVES | OTHERS | ROUTERS)[name]]
    shape = [f"distributed.ep={ep}", f"unlearning.zero_stage={stage}"]
    return [*GRADIENT_LIKE, "unlearning.apply=loss", *own, *shape, f"unlearning.steps={STEPS}"]


@pytest.fixture(scope="module")
def references(calibrated: tuple[Path, Path]) -> dict[str, dict[str, Any]]:
    config, run = calibrated
    names = OBJECTIVES | OTHERS | ROUTERS
    result = {name: reference_run(str(config), str(run), overrides_of(name), STEPS) for name in names}
    assert result["grip"]["broken"]
    return result


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ep", "stage", "names"), SHAPES)
def test_losses_and_weights_equal_the_reference(
    calibrated: tuple[Path, Path],
    references: dict[str, dict[str, Any]],
    tiny_model: Path,
    tmp_path: Path,
    world: int,
    ep: int,
    stage: int,
    names: dict[str, list[str]],
) -> None:
    config, prepared = calibrated
    start = {name: value for path in tiny_model.glob("*.safetensors") for name, value in load_file(path).items()}
    runs = [(str(copy_of(prepared, tmp_path / name)), overrides_of(name, ep, stage)) for name in names]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, world, str(config), runs)))
    errors = {}
    for name, (run, _) in zip(names, runs, strict=True):
        expected = references[name]
        # a KL of nearly equal distributions is a difference of logits: its error is absolute
        np.testing.assert_allclose(losses_of(Path(run)), expected["losses"], rtol=1e-6, atol=1e-7, err_msg=name)
        actual = weights_of(Path(run), STEPS, tmp_path / f"{name}-model")
        errors[name] = relative(actual, expected["weights"], start)  # of the change that the steps made
        for tensor, value in expected["weights"].items():
            atol = 1e-6 * float(np.abs(value).max())
            np.testing.assert_allclose(actual[tensor], value, rtol=1e-6, atol=atol, err_msg=f"{name} {tensor}")
        moved = [tensor for tensor, value in expected["weights"].items() if not np.array_equal(value, start[tensor])]
        assert any("experts" in tensor for tensor in moved) and any("gate" in tensor for tensor in moved)
    assert max(errors.values()) < 5e-4, errors  # the rounding of fp32 against a small change in float64


@pytest.mark.slow
def test_micro_batches_do_not_matter(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    """4 rows as 1×4, 2×2 and 4×1, where a micro-batch also carries alternatives and asks the frozen model."""
    config, prepared = calibrated
    places = {(name, rows): tmp_path / f"{name}-{rows}" for name in SOME for rows in (4, 2, 1)}
    runs = [
        (str(copy_of(prepared, place)), [*overrides_of(name), f"unlearning.micro_batch_rows={rows}"])
        for (name, rows), place in places.items()
    ]
    assert not any(map(any, run_distributed(jobs.unlearn_jobs, 1, str(config), runs)))
    weights = {key: weights_of(place, STEPS, tmp_path / f"{place.name}-model") for key, place in places.items()}
    for (name, rows), place in places.items():
        np.testing.assert_allclose(losses_of(place), losses_of(places[name, 4]), rtol=1e-6, err_msg=name)
        for tensor, value in weights[name, rows].items():
            atol = 1e-6 * float(np.abs(value).max())
            np.testing.assert_allclose(value, weights[name, 4][tensor], rtol=1e-6, atol=atol, err_msg=tensor)


@pytest.mark.slow
def test_refusals_are_preferred_to_answers_and_resume_bitwise(tiny_model: Path, tmp_path: Path) -> None:
    """IdkDPO: the loss is of answers alone, in float64 that of the reference; two halves are one job, bit for bit."""
    answers = {"template": "{source} is: {text}", "loss_on": "answer"}
    data = {f"data__{side}": [answers | {"path": f"{tmp_path}/corpora/{side}.jsonl"}] for side in ("forget", "retain")}
    data |= {"data__alternative": "refusals", "data__packing": "single", "data__context_length": 512}
    config = tiny.write_config(tmp_path, tiny_model, statistics__nll=True, **data)
    prepared = calibrated_run(config, tmp_path / "run", world=2)
    overrides = [*overrides_of("dpo"), "unlearning.save_every=1"]
    whole, halves = (copy_of(prepared, tmp_path / name) for name in ("whole", "halves"))
    for run, steps in ((whole, 2), (halves, 1), (halves, 2)):  # processes of their own: DeepSpeed numbers parameters
        changes = [*overrides, f"unlearning.steps={steps}"]
        run_distributed(jobs.unlearn_job, 2, str(config), str(run), changes)
    manifests = [read_manifest(run / "checkpoints" / "step_000002") for run in (whole, halves)]
    assert manifests[0] == manifests[1] and losses_of(whole) == losses_of(halves)
    expected = reference_run(str(config), str(prepared), overrides, STEPS)
    np.testing.assert_allclose(losses_of(whole), expected["losses"], rtol=1e-6, atol=1e-7)
    assert abs(expected["losses"][1][0] - expected["losses"][0][0]) > 1e-3
    for tensor, value in weights_of(whole, STEPS, tmp_path / "model").items():
        target = expected["weights"][tensor]
        np.testing.assert_allclose(value, target, rtol=1e-6, atol=1e-6 * float(np.abs(target).max()), err_msg=tensor)


def test_what_a_loss_needs_is_asked_for(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    config, prepared = calibrated
    with pytest.raises(UserError, match=r"dpo needs statistics\.nll: true"):
        load_config(str(config), ["unlearning.forget_loss=dpo", "statistics.nll=false"], prepared)
    with pytest.raises(UserError, match=r"dpo needs data\.alternative"):
        load_config(str(config), ["unlearning.forget_loss=dpo", "data.alternative=null"], prepared)
    with pytest.raises(UserError, match=r"unlearning\.retain_loss"):
        load_config(str(config), ["unlearning.retain_loss=mse"], prepared)
    loaded, run = load_config(str(config), ["unlearning.forget_loss=dpo"], copy_of(prepared, tmp_path / "run"))
    (run / "statistics" / "alternative" / "artefact.json").unlink()
    with pytest.raises(UserError, match=r"statistics"):
        check_unlearn(loaded, RunDirectory.at(run), 1)
