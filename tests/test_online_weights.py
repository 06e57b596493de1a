"""Retain weights that follow the router: against a token-by-token reference, on any cluster shape, over a resume."""

from __future__ import annotations

from pathlib import Path

import jobs
import numpy as np
import pytest
import torch
from distributed import run_distributed
from objective_reference import reference_run
from test_unlearn import GRADIENT_LIKE, calibrated, copy_of, losses_of  # noqa: F401 (a fixture)

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.config.load import load_config
from trace_ds.config.sections.calibration import RULES
from trace_ds.errors import UserError
from trace_ds.stages.inspect import inspect
from trace_ds.unlearning.batches import MicroBatch
from trace_ds.unlearning.online_weights import OnlineWeights

ONLINE = [
    *GRADIENT_LIKE,
    "unlearning.forget_loss=graddiff",
    "unlearning.weights=online",
    "unlearning.steps=3",
    "unlearning.save_every=3",
]

RMU_LOSS = ["unlearning.forget_loss=rmu", "unlearning.apply=loss"]


def theta_of(run: Path, step: int) -> np.ndarray:
    return np.array(read_manifest(run / "checkpoints" / f"step_{step:06d}").cursor["theta_LE"])


@pytest.fixture(scope="module")
def straight(calibrated: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """Three steps with online weights on two ranks, experts sharded."""
    config, prepared_run = calibrated
    run = copy_of(prepared_run, tmp_path_factory.mktemp("straight") / "run")
    run_distributed(jobs.unlearn_job, 2, str(config), str(run), [*ONLINE, "distributed.ep=2"])
    return run


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "ep", "overrides"),
    [
        (2, 2, []),
        (2, 1, ["unlearning.micro_batch_rows=1"]),
        (1, 1, RMU_LOSS),
        (2, 1, ["unlearning.forget_loss=simnpo", "unlearning.recompute=true"]),
    ],
)
def test_equals_a_token_by_token_reference(
    calibrated: tuple[Path, Path],  # noqa: F811
    straight: Path,
    tmp_path: Path,
    world: int,
    ep: int,
    overrides: list[str],
) -> None:
    config, prepared_run = calibrated
    overrides = [*ONLINE, *overrides, f"distributed.ep={ep}"]
    run = straight
    if (world, ep) != (2, 2):
        run = copy_of(prepared_run, tmp_path / "run")
        run_distributed(jobs.unlearn_job, world, str(config), str(run), overrides)
    overrides += ["unlearning.micro_batch_rows=null", "distributed.ep=1"]
    expected = reference_run(str(config), str(run), overrides, 3)
    np.testing.assert_allclose(losses_of(run), expected["losses"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(theta_of(run, 3), expected["thetas"][-1], rtol=0, atol=1e-12)
    assert np.abs(theta_of(run, 3)).max() > 0.01
    rmu = "unlearning.forget_loss=rmu" in overrides
    assert theta_of(run, 3)[-1].any() != rmu  # RMU's pass ends below the last layer


@pytest.mark.slow
def test_online_weights_resume_bitwise(
    calibrated: tuple[Path, Path],  # noqa: F811
    straight: Path,
    tmp_path: Path,
) -> None:
    config, prepared_run = calibrated
    overrides = [*ONLINE, "distributed.ep=2"]
    stopped = copy_of(prepared_run, tmp_path / "stopped")
    (stopped / "stop").touch()
    with pytest.raises(AssertionError, match="StopRequested"):
        run_distributed(jobs.unlearn_job, 2, str(config), str(stopped), overrides)
    assert theta_of(stopped, 1).any()
    run_distributed(jobs.unlearn_job, 2, str(config), str(stopped), overrides)
    manifests = [read_manifest(run / "checkpoints" / "step_000003") for run in (straight, stopped)]
    assert manifests[0] == manifests[1] and losses_of(straight) == losses_of(stopped)
    assert "theta_LE" not in str(inspect(stopped / "checkpoints" / "step_000003").facts)


def test_live_weights_are_refused_with_what_to_use(calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    """They were taken out. What a version that had them wrote beside other weights is still read."""
    config, run = calibrated
    with pytest.raises(UserError, match=r"unlearning\.weights: was taken out.* use reference or online"):
        load_config(str(config), ["unlearning.weights=live"], run)
    load_config(str(config), ["unlearning.live={refresh_steps: null}"], run)
    with pytest.raises(UserError, match=r"unknown key 'unlearning\.live'"):
        load_config(str(config), ["unlearning.live={refresh_steps: 2}"], run)


def test_online_weights_are_refused_where_the_rule_would_not_show(calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    """They know the forget frequencies and nothing of the rule: a control would be TRACE under another name."""
    config, run = calibrated

    def load(rule: str, apply: str) -> None:
        changes = ["unlearning.weights=online", f"unlearning.apply={apply}", f"calibration.rule={rule}"]
        given = ["calibration.source_weights={a: 2}"] if rule == "sources" else []
        load_config(str(config), changes + given, run)

    for apply in ("loss", "sampling"):
        for rule in RULES:
            if rule in ("raking", "random_experts") or (apply == "sampling" and rule.startswith("ratio_")):
                load(rule, apply)
            else:
                with pytest.raises(UserError, match=f"calibration.rule {rule} would not be what it says: use raking"):
                    load(rule, apply)


class KnownRouting(OnlineWeights):
    """Online weights whose router is a table: expert indices [B, S, K] of each layer."""

    table: list[torch.Tensor]

    def layers(self) -> list[int]:
        return list(range(len(self.table)))

    def indices(self, layer: int, batch: MicroBatch) -> torch.Tensor:
        return self.table[layer]


@pytest.mark.parametrize("per_row", [False, True])
def test_online_weights_bring_the_frequencies_closer(per_row: bool) -> None:
    """The sentence of the abstract: with the routing held still, the gap of the batches falls, and the mean stays 1."""
    generator = torch.Generator().manual_seed(0)
    taste_BLE = 1.5 * torch.randn(12, 2, 6, generator=generator)
    taste_BLE[:4] += 1.5 * torch.randn(2, 6, generator=generator)  # forget rows have a liking in common
    noise_BSLE = -torch.empty(12, 50, 2, 6).exponential_(generator=generator).log()
    chosen_BSLK = (taste_BLE[:, None] + noise_BSLE).topk(2).indices
    weights = KnownRouting(
        torch.nn.Identity(), np.zeros((2, 6)), 0.0, 20.0, per_row, torch.device("cpu"),
        step_size=0.3, decay=0.1, scope_LE=np.ones((2, 6), dtype=bool),
    )  # fmt: skip
    weights.table = [chosen_BSLK[:, :, layer] for layer in range(2)]
    blank = torch.zeros(12, 50)
    ones = torch.ones(12, 50)
    batch = MicroBatch(blank.long(), blank.long(), ones.bool(), ones, blank, 4)
    told = []
    for _ in range(60):
        weights.of(batch)
        told.append(weights.follow(weights.local_sums().numpy(), 200, 400))
    assert told[-1]["routing_gap"] < 0.85 * told[0]["routing_gap"]
    assert told[-1]["retain_weight_mean"] == pytest.approx(1, abs=0.01)
