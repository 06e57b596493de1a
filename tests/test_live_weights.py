"""Retain weights that follow the router: against a token-by-token reference, on any cluster shape, over a resume."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
from distributed import run_distributed
from safetensors.numpy import load_file
from test_unlearn import GRADIENT_LIKE, calibrated, copy_of, losses_of  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM

from trace_ds.checkpoints.manifest import read_manifest
from trace_ds.config.load import load_config
from trace_ds.config.schema import RULES, WITHOUT_THETA
from trace_ds.errors import UserError
from trace_ds.run.directory import RunDirectory
from trace_ds.run.inspect import inspect
from trace_ds.stages.convert import checkpoint_to_directory
from trace_ds.stages.unlearn import check_unlearn, make_batches
from trace_ds.unlearning.batches import MicroBatch
from trace_ds.unlearning.live_refresh import RefreshedWeights
from trace_ds.unlearning.live_weights import OnlineWeights

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
        (1, 1, []),
        (2, 1, ["unlearning.micro_batch_rows=1"]),
        (1, 1, RMU_LOSS),
        (2, 2, [*RMU_LOSS, "unlearning.weights=live", "unlearning.recompute=true"]),
        (2, 1, ["unlearning.forget_loss=simnpo", "unlearning.weights=live"]),
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
    if (world, ep) != (2, 2) or "unlearning.weights=live" in overrides:
        run = copy_of(prepared_run, tmp_path / "run")
        run_distributed(jobs.unlearn_job, world, str(config), str(run), overrides)
    overrides += ["unlearning.micro_batch_rows=null", "distributed.ep=1"]
    expected = jobs.reference_training(str(config), str(run), overrides, 3)
    np.testing.assert_allclose(losses_of(run), expected["losses"], rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(theta_of(run, 3), expected["thetas"][-1], rtol=0, atol=1e-12)
    if "unlearning.weights=live" not in overrides:
        assert np.abs(theta_of(run, 3)).max() > 0.01
        rmu = "unlearning.forget_loss=rmu" in overrides
        assert theta_of(run, 3)[-1].any() != rmu  # RMU's pass ends below the last layer
    elif "unlearning.apply=loss" in overrides:  # an unchanged router: the live weights are the calibrated ones
        frozen = jobs.reference_training(str(config), str(run), [*overrides, "unlearning.weights=reference"], 1)
        np.testing.assert_allclose(losses_of(run)[0], frozen["losses"][0], rtol=1e-6)


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


@pytest.mark.slow
@pytest.mark.parametrize(("apply", "level"), [("sampling", "token"), ("loss", "sequence")])
def test_refreshed_theta_solves_the_dual_of_the_present_routing(
    calibrated: tuple[Path, Path],  # noqa: F811
    tmp_path: Path,
    apply: str,
    level: str,
) -> None:
    """After step 2: one λ fits all experts, the mean weight is 1, the floor holds; two ranks find what one finds."""
    from trace_ds.stages.calibrate import calibrate

    config, prepared_run = calibrated
    runs = [copy_of(prepared_run, tmp_path / str(world)) for world in ((1, 2) if apply == "sampling" else (1,))]
    overrides = [*GRADIENT_LIKE, "unlearning.weights=live", "unlearning.live.refresh_steps=2", "unlearning.steps=2"]
    overrides += [f"unlearning.apply={apply}", f"calibration.level={level}", "unlearning.forget_loss=graddiff"]
    overrides += ["unlearning.retain_rows=24"]  # whole rows are the units at level sequence
    loaded, _ = load_config(str(config), overrides, runs[0])
    for world, run in enumerate(runs, start=1):
        if level == "sequence":
            calibrate(loaded, RunDirectory.at(run))
        run_distributed(jobs.unlearn_job, world, str(config), str(run), overrides)
    theta_LE = theta_of(runs[0], 2)
    np.testing.assert_allclose(theta_of(runs[-1], 2), theta_LE, atol=1e-8)
    old = load_file(runs[0] / "calibration" / "calibration.safetensors")["theta_LE"]
    assert np.abs(theta_LE - old).max() > 1e-3
    checkpoint_to_directory(runs[0] / "checkpoints" / "step_000002", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    batches = make_batches(loaded, check_unlearn(loaded, RunDirectory.at(runs[0]), 1))
    forget, retain, scores, standing = [], [], [], []
    for step in range(2):
        batch = batches.at(step, 0, 1).micro_batches[0]
        with torch.no_grad():
            out = model(
                input_ids=batch.input_ids_BS,
                position_ids=batch.position_ids_BS,
                use_cache=False,
                output_router_logits=True,
            )
        active = torch.stack(
            [torch.zeros_like(x).scatter_(1, x.topk(2).indices, 1.0) for x in out.router_logits], dim=1
        ).double()
        active = active.reshape(*batch.counted_BS.shape, *theta_LE.shape).numpy()
        for row, counted_S in enumerate(batch.counted_BS.numpy()):
            mine = active[row][counted_S]
            if row < batch.forget_rows:
                forget.append(mine)
                continue
            u = (mine * theta_LE).sum((1, 2))
            retain.append(mine)
            scores.append(np.full(len(u), u.mean()) if level == "sequence" else u)
            standing.append(batch.weights_BS.numpy()[row][counted_S])
    p_forget, a, base = np.concatenate(forget).mean(0), np.concatenate(retain), np.concatenate(standing)
    log_mean = read_manifest(runs[0] / "checkpoints" / "step_000002").cursor["log_mean"]
    w = np.exp(np.concatenate(scores) - log_mean)
    assert (w * base).sum() / base.sum() == pytest.approx(1, abs=1e-6)
    assert (w * base).sum() ** 2 / (base.sum() * (w * w * base).sum()) >= 0.5 - 1e-6
    p, q = (np.tensordot(x, a, 1) / x.sum() for x in (base, w * base))
    shift, moved = (p_forget - p).ravel(), (q - p).ravel()
    strength = (shift @ moved) / (shift @ shift)
    assert 0 < strength <= 1 + 1e-9
    np.testing.assert_allclose(moved, strength * shift, atol=1e-5)


def test_rules_without_a_theta_have_no_live_weights(calibrated: tuple[Path, Path]) -> None:  # noqa: F811
    config, run = calibrated
    for rule in WITHOUT_THETA:
        given = ["calibration.source_weights={a: 2}"] if rule == "sources" else []
        with pytest.raises(UserError, match=f"live needs a calibration.rule that has a theta, not {rule}"):
            load_config(str(config), ["unlearning.weights=live", f"calibration.rule={rule}", *given], run)


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
        told.append(weights.follow(weights.local_sums(), 200, 400))
    assert told[-1]["routing_gap"] < 0.85 * told[0]["routing_gap"]
    assert told[-1]["retain_weight_mean"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("level", ["token", "row", "sequence"])
def test_a_refreshed_theta_of_the_inverse_rule_is_still_inverse(level: str) -> None:
    """The same rows by both rules: opposite shifts of the frequencies, and the floor holds."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.gumbel(size=(600, 2, 4)) + rng.normal(size=(30, 2, 4)).repeat(20, axis=0), axis=2)[..., 2:]
    active = np.zeros((600, 2, 4))
    np.put_along_axis(active, chosen, 1.0, axis=2)
    p_LE = active.mean(0)
    forget_LE = np.array([[0.9, 0.5, 0.3, 0.3], [0.2, 0.4, 0.4, 1.0]])
    moved = {}
    for rule in ("raking", "inverse"):
        made = SimpleNamespace(settings={"clip": 20.0, "ess_floor": 0.9, "rule": rule, "level": level})
        weights = RefreshedWeights(
            torch.nn.Identity(), np.zeros((2, 4)), 0.0, 20.0, level != "token", torch.device("cpu"),
            every=1, scope_LE=np.ones((2, 4), dtype=bool), calibration=made,
        )  # fmt: skip
        theta_LE, log_mean = weights._solve(forget_LE, chosen.astype(np.uint8), np.ones(600), np.full(30, 20))
        u = (active * theta_LE).sum((1, 2))
        w = np.exp((u if level == "token" else u.reshape(30, 20).mean(1).repeat(20)) - log_mean)
        assert w.mean() == pytest.approx(1, abs=1e-9) and 1 / (w**2).mean() >= 0.9 - 1e-9
        moved[rule] = (np.tensordot(w, active, 1) / 600 - p_LE).ravel()
    wanted = (forget_LE - p_LE).ravel()
    assert moved["raking"] @ wanted > 0 > moved["inverse"] @ wanted
