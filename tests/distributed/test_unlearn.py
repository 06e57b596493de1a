"""The unlearning job: equal to a plain single-process reference on any cluster shape, bitwise resumable, crash-safe."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import tiny
import torch
from objective_reference import reference_run
from processes import end_of_ranks, run_distributed
from safetensors.numpy import load_file
from stage_calls import calibrate

from trace_ds.checkpoints.manifest import complete_steps, read_manifest
from trace_ds.config.load import load_config
from trace_ds.conversion.convert import convert_checkpoint
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import UserError
from trace_ds.models.engine_config import parameter_offload, user_ds_config
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.unlearn import check as check_unlearn
from trace_ds.unlearning.trainer import finite_state

# AdamW with a large eps moves each weight nearly in proportion to its gradient, so equal weights mean equal gradients;
# with the usual eps the sign of a gradient that is zero up to rounding would move a weight by the learning rate.
GRADIENT_LIKE = ["unlearning.optimizer.eps=0.1", "unlearning.optimizer.lr=0.01", "unlearning.micro_batch_rows=null"]


@pytest.fixture(scope="module")
def calibrated(tiny_model: Path) -> tuple[Path, Path]:
    return calibrated_once(tiny_model)


def calibrated_once(tiny_model: Path) -> tuple[Path, Path]:
    """(configuration, run directory) with data, statistics (with losses) and a calibration with unequal weights; to be
    copied before anything is changed."""

    def make(folder: Path) -> None:
        calibrated_run(tiny.write_config(folder, tiny_model, statistics__nll=True), folder / "run")

    folder = jobs.made_once("calibrated", make)
    return folder / "config.yaml", folder / "run"


def calibrated_run(config: Path, run: Path, world: int = 1) -> Path:
    run = jobs.prepared_run(config, run)
    run_distributed(jobs.collect_job, world, str(config), str(run), [])
    calibrate(load_config(str(config), [])[0], RunDirectory.at(run))
    weights = np.load(run / "calibration" / "weights.npy")
    assert weights.std() > 0.1  # a test with uniform weights would prove little
    return run


def copy_of(run: Path, destination: Path) -> Path:
    return jobs.copied_run(run, destination, "data", "statistics", "calibration")


def losses_of(run: Path) -> list[tuple[float, float]]:
    lines = [json.loads(line) for line in (run / "logs" / "unlearn.jsonl").read_text().splitlines()]
    steps = {line["step"]: (line["loss_forget"], line["loss_retain"]) for line in lines if line["event"] == "step"}
    return [steps[step] for step in sorted(steps)]


def weights_of(run: Path, step: int, folder: Path) -> dict[str, np.ndarray]:
    convert_checkpoint(run / "checkpoints" / f"step_{step:06d}", folder)
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


def relative(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
    """Largest difference of any weight, relative to the largest change that training made to its tensor."""
    assert actual.keys() == expected.keys()
    worst = 0.0
    for name, value in expected.items():
        change = np.abs(value.astype(np.float64) - start[name]).max()
        scale = max(change, 1e-3 * np.abs(value).max())
        worst = max(worst, float(np.abs(actual[name].astype(np.float64) - value).max() / scale))
    return worst


@pytest.mark.slow
def test_gradients_equal_those_of_one_process(tiny_model: Path, tmp_path: Path) -> None:
    """With an eps far above any gradient AdamW's first step is lr / eps = 1,000 gradients, to the digits of fp32. The
    loss, the routing statistics and the weights are of the answers of both corpora alone."""
    answers = {"template": "{source} is: {text}", "loss_on": "answer"}
    data = {f"data__{side}": [answers | {"path": f"{tmp_path}/corpora/{side}.jsonl"}] for side in ("forget", "retain")}
    config = tiny.write_config(tmp_path, tiny_model, unlearning__apply="loss", **data)
    run = calibrated_run(config, tmp_path / "run")
    retain = TokenDataset.open(run / "data" / "retain.arrow")
    assert 0 < retain.counted_total() < 0.8 * retain.tokens
    assert ((np.load(run / "calibration" / "weights.npy") > 0) == retain.counted(0, retain.tokens)).all()
    changes = ["forget_loss=graddiff", "steps=1"]
    changes += ["optimizer.eps=1e6", "optimizer.lr=1e9", "optimizer.gradient_clipping=0"]
    overrides = ["distributed.ep=2", *(f"unlearning.{change}" for change in changes)]
    run_distributed(jobs.unlearn_job, 2, str(config), str(run), overrides)
    expected = reference_run(str(config), str(run), overrides, 1)["weights"]
    start = {n: v for path in tiny_model.glob("*.safetensors") for n, v in load_file(path).items()}
    actual = weights_of(run, 1, tmp_path / "model")
    assert actual.keys() == expected.keys() == start.keys()
    for name, before in start.items():
        gradient, other = ((weights[name].astype(np.float64) - before) / -1e3 for weights in (expected, actual))
        assert np.abs(gradient).max() > 0, name
        assert np.abs(other - gradient).max() <= 1e-6 * np.abs(gradient).max(), name


@pytest.mark.slow
def test_the_load_balancing_loss_never_enters(calibrated: tuple[Path, Path], tiny_model: Path, tmp_path: Path) -> None:
    """A model whose configuration asks for router logits and a huge auxiliary loss trains to the same weights."""
    config, prepared_run = calibrated
    model = shutil.copytree(tiny_model, tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    requested = {"output_router_logits": True, "router_aux_loss_coef": 10.0}
    (model / "config.json").write_text(json.dumps(settings | requested))
    other = tmp_path / "config.yaml"
    other.write_text(config.read_text().replace(str(tiny_model), str(model)))
    plain, auxiliary = copy_of(prepared_run, tmp_path / "plain"), calibrated_run(other, tmp_path / "auxiliary")
    overrides = ["unlearning.forget_loss=graddiff", "unlearning.apply=loss", "unlearning.steps=2"]
    run_distributed(jobs.unlearn_job, 1, str(config), str(plain), overrides)
    run_distributed(jobs.unlearn_job, 1, str(other), str(auxiliary), overrides)
    assert losses_of(auxiliary) == losses_of(plain)
    expected = weights_of(plain, 2, tmp_path / "expected")
    for name, value in weights_of(auxiliary, 2, tmp_path / "found").items():
        assert np.array_equal(value, expected[name]), name


@pytest.mark.slow
def test_ten_steps_sigkill_and_ten_more_are_bitwise_twenty(tmp_path: Path) -> None:
    """Weights, optimizer, data order and (the model has dropout) random numbers: every file and every loss is equal."""
    model = tiny.make_model(tmp_path / "model")
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"attention_dropout": 0.2}))
    config = tiny.write_config(tmp_path, model, statistics__nll=True)
    straight = calibrated_run(config, tmp_path / "straight")
    killed = copy_of(straight, tmp_path / "killed")
    overrides = ["distributed.ep=2", "unlearning.apply=loss", "unlearning.steps=20", "unlearning.save_every=5"]
    overrides += ["unlearning.optimizer.schedule=cosine"]
    run_distributed(jobs.unlearn_job, 2, str(config), str(straight), overrides)
    ends = end_of_ranks(jobs.unlearn_job_killed, 2, str(config), str(killed), overrides, 15)
    assert ends[1] == -signal.SIGKILL and ends[0] != 0, ends
    assert complete_steps(killed / "checkpoints") == ([5, 10], []) and len(losses_of(killed)) == 15
    assert list((killed / "checkpoints").glob("step_000015.tmp-*/zero*model*"))
    (killed / "stop").touch()  # a stop on request in between changes nothing either
    with pytest.raises(AssertionError, match="StopRequested: stopped after step 11"):
        run_distributed(jobs.unlearn_job, 2, str(config), str(killed), overrides)
    assert complete_steps(killed / "checkpoints") == ([10, 11], []) and not (killed / "stop").exists()
    run_distributed(jobs.unlearn_job, 2, str(config), str(killed), overrides)
    assert losses_of(killed) == losses_of(straight)
    lines = [json.loads(line) for line in (killed / "logs" / "unlearn.jsonl").read_text().splitlines()]
    rates = {line["step"]: line["lr"] for line in lines if line["event"] == "step"}
    lr = load_config(str(config))[0].unlearning.optimizer.lr
    cosine = {done: lr * (1 + math.cos(math.pi * (done - 1) / 20)) / 2 for done in range(1, 21)}
    assert rates == pytest.approx(cosine, rel=1e-6)
    for schedule, different in (("cosine", 2), ("constant", 1)):  # a job that decays has a length of its own
        changes = [[*overrides, f"unlearning.optimizer.schedule={schedule}", f"unlearning.steps={n}"] for n in (20, 24)]
        loaded = [load_config(str(config), change)[0] for change in changes]
        assert len({check_unlearn(one, RunDirectory.at(killed), 2).identity for one in loaded}) == different
    manifests = [read_manifest(run / "checkpoints" / "step_000020") for run in (straight, killed)]
    assert manifests[0] == manifests[1]  # every file's hash: weights and optimizer states


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "shapes"), [(3, [(2, 2), (1, 1), (2, 1)]), (1, [(2, 2), (1, 1), (2, 2)])])
def test_resumes_on_another_number_of_ranks_and_expert_parallel_size(
    calibrated: tuple[Path, Path], tmp_path: Path, stage: int, shapes: list[tuple[int, int]]
) -> None:
    """Ranks 2 -> 1 -> 2, EP 2 -> 1 -> 2, both at once and one alone: losses and weights of an undisturbed job."""
    config, prepared_run = calibrated
    common = [*GRADIENT_LIKE, "unlearning.apply=loss", "unlearning.keep=9", f"unlearning.zero_stage={stage}"]
    straight, moved = (copy_of(prepared_run, tmp_path / name) for name in ("straight", "moved"))
    work = [(2, str(straight), [*common, f"unlearning.steps={len(shapes)}"])]
    for step, (world, ep) in enumerate(shapes, 1):
        work.append((world, str(moved), [*common, f"distributed.ep={ep}", f"unlearning.steps={step}"]))
    for world, runs in itertools.groupby(work, lambda one: one[0]):
        assert not any(map(any, run_distributed(jobs.unlearn_jobs, world, str(config), [one[1:] for one in runs])))
    for step, (world, ep) in enumerate(shapes, 1):
        manifest = read_manifest(moved / "checkpoints" / f"step_{step:06d}")
        assert (manifest.world, manifest.ep, manifest.zero_stage) == (world, ep, stage)
    # atol: the retain loss, 5e-8, is made of differences of hidden states that have hardly moved yet
    np.testing.assert_allclose(losses_of(moved), losses_of(straight), rtol=1e-6, atol=2e-13)
    expected = weights_of(straight, len(shapes), tmp_path / "expected")
    for name, value in weights_of(moved, len(shapes), tmp_path / "found").items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    assert not list((moved / "checkpoints").glob("universal*"))
    assert (
        "written by world size 2, expert-parallel size 2: converting it" in (moved / "logs/unlearn.jsonl").read_text()
    )


@pytest.mark.slow
def test_wrong_resumes_are_refused(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    config, prepared_run = calibrated
    run = copy_of(prepared_run, tmp_path / "run")

    def errors(*jobs_changes: list[str]) -> list[str]:
        return run_distributed(jobs.unlearn_jobs, 1, str(config), [(str(run), change) for change in jobs_changes])[0]

    other = "unlearning.alpha=2"
    result = errors(
        ["unlearning.resume=required"], ["unlearning.steps=2"], [other], ["unlearning.zero_stage=1"], []
    )  # the last: more steps of the same job
    assert "there is no complete checkpoint to resume from" in result[0] and "belongs to another job" in result[2]
    assert "written with ZeRO stage 3, and this job has 1: a job can change its" in result[3]
    assert result[1] == result[4] == "" and complete_steps(run / "checkpoints") == ([2, 4], [])
    assert errors([other, "unlearning.resume=never"]) == [""]
    assert complete_steps(run / "checkpoints") == ([2, 4], [])
    # killed between the rename of the last checkpoint and what follows it: the rerun makes up for it
    shutil.copytree(run / "checkpoints" / "step_000002", run / "checkpoints" / "step_000001")
    (run / "checkpoints" / "latest").write_text("step_000002\n")
    assert errors([other]) == [""]
    assert complete_steps(run / "checkpoints") == ([2, 4], [])
    assert (run / "checkpoints" / "latest").read_text() == "step_000004\n"
    # another job where its predecessor's checkpoints may go
    assert errors(["unlearning.resume=replace", "unlearning.steps=1"]) == [""]
    assert complete_steps(run / "checkpoints") == ([1], [])
    assert "step_000004 belongs to another job and was deleted" in (run / "logs" / "unlearn.jsonl").read_text()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_before_the_step(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    config, prepared_run = calibrated
    run = copy_of(prepared_run, tmp_path / "run")
    huge = ["unlearning.optimizer.lr=1e30", "unlearning.optimizer.gradient_clipping=0"]
    saving = copy_of(prepared_run, tmp_path / "saving")
    skipped = copy_of(prepared_run, tmp_path / "skipped")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"compute_grad_norm": false}}')
    without_norm = ["model.dtype=bf16", "unlearning.zero_stage=2", f"unlearning.ds_config={tmp_path / 'ds.json'}"]
    without_norm += ["unlearning.forget_loss=graddiff", "unlearning.alpha=3e38", "unlearning.gamma=0", huge[1]]
    work = [(str(run), huge), (str(saving), [*huge, "unlearning.save_every=1"])]
    work.append((str(skipped), [*without_norm, "unlearning.save_every=1"]))
    errors = run_distributed(jobs.unlearn_jobs, 2, str(config), work)[0]
    assert "NumericalFailure: the loss is not finite in step 2" in errors[0]
    assert "NumericalFailure: the model is not finite after step 1" in errors[1]  # its weights are: some 1e30
    # no norm to see it by: DeepSpeed skips the step, and would skip all the others
    assert "NumericalFailure: the gradient is not finite in step 1 (the loss is)" in errors[2]
    assert all(complete_steps(each / "checkpoints") == ([], []) for each in (run, saving, skipped))


def test_weights_and_moments_that_no_token_reaches_are_looked_at() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 2)])
    optimizer = torch.optim.AdamW(model.parameters())
    engine = SimpleNamespace(module=model, optimizer=SimpleNamespace(optimizer=optimizer))
    model[1](model[0](torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert finite_state(engine)
    for tensor in (model[1].weight.data, optimizer.state[model[0].bias]["exp_avg_sq"]):
        for value in (float("nan"), float("-inf")):
            kept = tensor.view(-1)[1].item()
            tensor.view(-1)[1] = value
            assert not finite_state(engine)
            tensor.view(-1)[1] = kept
    assert finite_state(engine)


class Payload:
    """Runs a command when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.system, (f"touch {self.mark}",)


def test_what_is_no_shard_is_refused(tmp_path: Path) -> None:
    """Code that would run when unpickled does not run; whatever else a damaged file makes torch raise is one line."""
    import pickle

    from trace_ds.checkpoints.serialization import load_shard, open_shard

    path = tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"state": torch.arange(50.0)}, path)
    open_shard(path)
    whole = path.read_bytes()
    position = whole.index(b"FloatStorage")
    for content in (
        pickle.dumps(Payload(tmp_path / "ran")),
        b"",
        whole[: len(whole) // 2],
        whole[:position] + b"FloatSt0rage" + whole[position + 12 :],
        whole.replace(b"data.pkl", b"dat0.pkl"),
    ):
        path.write_bytes(content)
        for read in (load_shard, open_shard):
            with pytest.raises(UserError, match=r"optim_states\.pt: the shard cannot be loaded safely"):
                read(path)
    assert not (tmp_path / "ran").exists()


DS_CONFIGS = sorted((Path(__file__).parents[2] / "ds_configs").glob("*.json"))


@pytest.mark.slow
def test_shipped_deepspeed_settings_train_to_the_same_losses(calibrated: tuple[Path, Path], tmp_path: Path) -> None:
    config, prepared_run = calibrated
    assert {path.stem for path in DS_CONFIGS} == {"cpu_test", "one_gpu", "one_node", "many_nodes", "cpu_offload"}
    runs = {"plain": copy_of(prepared_run, tmp_path / "plain")}
    work = [(str(runs["plain"]), ["distributed.ep=2", "unlearning.steps=2"])]
    offloaded = tmp_path / "offload_param.json"  # RMU's frozen copy follows the trained model there
    offloaded.write_text(json.dumps({"zero_optimization": {"offload_param": {"device": "cpu"}, "overlap_comm": False}}))
    assert parameter_offload(user_ds_config(str(offloaded))) == {
        "zero_optimization": {"offload_param": {"device": "cpu"}}
    }
    for path in [*DS_CONFIGS, offloaded]:
        runs[path.stem] = copy_of(prepared_run, tmp_path / path.stem)
        work.append((str(runs[path.stem]), [*work[0][1], f"unlearning.ds_config={path}"]))
    assert run_distributed(jobs.unlearn_jobs, 2, str(config), work)[0] == [""] * len(work)
    for run in runs.values():
        np.testing.assert_allclose(losses_of(run), losses_of(runs["plain"]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is damaged"),
        ('{"zero_optimization": 3}', "zero_optimization is not a JSON object"),
        ('{"zero_optimization": {"stage": 1}}', "the key 'zero_optimization.stage' is set by the run's own"),
    ],
)
def test_a_wrong_deepspeed_file_is_refused(
    calibrated: tuple[Path, Path], tmp_path: Path, content: str, message: str
) -> None:
    config, run = calibrated
    path = tmp_path / "ds.json"
    path.write_text(content)
    loaded, directory = load_config(str(config), [f"unlearning.ds_config={path}"], run)
    with pytest.raises(UserError, match=message):
        check_unlearn(loaded, RunDirectory.at(directory), 1)
