"""The calibrate stage on really prepared data with a routing trace made for it; damaged and mismatched inputs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from calibration_world import Corpus, make_corpus
from command import tree
from safetensors.numpy import load_file
from stage_calls import calibrate, prepare
from tiny import make_model, write_config

from trace_ds.calibration import raking
from trace_ds.config.load import load_config
from trace_ds.config.schema import Config
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.corpora.tokenizer import tokenizer_fingerprint
from trace_ds.errors import UserError
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.tensors.model_files import model_fingerprint

LAYERS, EXPERTS, TOP_K = 3, 4, 2


def write_statistics(config: Config, run: RunDirectory, *, trace: bool = True, rows: bool = True) -> None:
    """Statistics artefacts as ``collect`` writes them, from synthetic routing over the prepared tokens."""
    parts = 2
    data = artefact.load_artefact(run.data, "data")
    rng = np.random.default_rng(0)
    layers, experts, top_k = LAYERS, EXPERTS, TOP_K
    logits = rng.normal(scale=0.8, size=(3, layers, experts))
    logits[1] = 0.8 * logits[0] + 0.2 * logits[1]
    for side in ("forget", "retain"):
        dataset = TokenDataset.open(data.file(f"{side}.arrow"))
        documents = dataset.document_ids_T[:]
        number = int(documents.max()) + 1
        topic_D = np.zeros(number, np.int64) if side == "forget" else 1 + (np.arange(number) % 4 > 0)
        shape = make_corpus(rng, topic_D, logits, top_k, taste=0.2)
        noisy = logits[topic_D][documents] + rng.gumbel(size=(len(documents), layers, experts))
        chosen = np.sort(np.argsort(-noisy, axis=2)[:, :, :top_k], axis=2).astype(np.uint8)
        tokens = type(shape.tokens)(dataset.row_starts_R1, documents, number)
        corpus = Corpus(chosen, tokens, topic_D)
        directory = run.statistics / side
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        statistics = corpus.statistics(experts)
        statistics.save(directory / "statistics.safetensors")
        if trace:
            for part, array in enumerate(np.array_split(chosen, parts)):
                np.save(directory / f"trace-{part:05d}-of-{parts:05d}.npy", array)
        if rows:
            for name, array in (
                ("row_counts", corpus.row_counts(experts)),
                ("sample", chosen[corpus.counted_T]),
                ("sample_positions", np.flatnonzero(corpus.counted_T)),
            ):
                for part, piece in enumerate(np.array_split(array, parts)):
                    np.save(directory / f"{name}-{part:05d}-of-{parts:05d}.npy", piece)
        inputs = {
            "model": model_fingerprint(config.model.path),
            "tokenizer": tokenizer_fingerprint(config.model.path),
            "data": data.content,
            "side": side,
        }
        summary = {
            "layers": list(range(layers)),
            "experts": experts,
            "top_k": top_k,
            "tokens": statistics.tokens,
            "documents": statistics.documents,
            "rows": len(dataset),
        }
        artefact.describe(directory, "statistics", inputs, {"trace": trace}, summary)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> tuple[Path, Path]:
    """(folder with model and config, run directory with data and statistics); copy before changing anything."""
    folder = tmp_path_factory.mktemp("calibrate")
    model = make_model(folder / "model", layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    path = write_config(folder, model)
    config, _ = load_config(str(path))
    run = RunDirectory(folder / "run")
    prepare(config, run)
    write_statistics(config, run)
    return path, run.path


@pytest.fixture
def job(prepared, tmp_path) -> Callable[..., tuple[Config, RunDirectory]]:
    def make(**changes: object) -> tuple[Config, RunDirectory]:
        config_path, run_path = prepared
        if not (tmp_path / "run").exists():
            shutil.copytree(run_path, tmp_path / "run")
        overrides = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in changes.items()]
        return load_config(str(config_path), overrides)[0], RunDirectory(tmp_path / "run")

    return make


@pytest.mark.parametrize("apply", ["loss", "sampling"])
def test_artefact_and_its_files(job, capsys, apply: str) -> None:
    config, run = job(unlearning__apply=apply)
    calibration = calibrate(config, run)
    data = artefact.load_artefact(run.data, "data")
    dataset = TokenDataset.open(data.file("retain.arrow"))
    counted = dataset.counted(0, dataset.tokens)
    weights = np.load(calibration.file("weights.npy"), allow_pickle=False)
    rows = np.load(calibration.file("row_weights.npy"), allow_pickle=False)
    assert weights.dtype == np.float32 and weights.shape == (dataset.tokens,)
    assert (weights[~counted] == 0).all() and abs(weights[counted].astype(np.float64).mean() - 1) < 1e-6
    assert rows.dtype == np.float64 and rows.shape == (len(dataset),)
    diagnosis = json.loads(calibration.file("diagnosis.json").read_text())
    assert diagnosis["rule"] == "raking" and not diagnosis["none_found"] and diagnosis["selected"]
    assert diagnosis["weights_of"] == {"loss": "tokens", "sampling": "rows"}[apply]
    assert diagnosis["ess_fraction" if apply == "loss" else "row_ess_fraction"] >= 0.5 - 1e-9
    assert 0 < diagnosis["lambda"] <= 1
    for expert in diagnosis["selected"]:
        assert abs(expert["achieved"] - expert["forget"]) < abs(expert["retain"] - expert["forget"])
        assert expert["ratio_low"] < expert["ratio"] < expert["ratio_high"]
    assert 0.05 < diagnosis["gap_closed"] < 1
    tensors = load_file(calibration.file("calibration.safetensors"))
    trace = np.concatenate([np.load(path) for path in sorted((run.statistics / "retain").glob("trace-*.npy"))])
    for layer in range(LAYERS):
        selected_NK, w = trace[counted][:, layer], weights[counted].astype(np.float64)
        achieved = np.bincount(selected_NK.ravel(), np.repeat(w, TOP_K), EXPERTS) / w.sum()
        np.testing.assert_allclose(tensors["achieved_LE"][layer], achieved, rtol=1e-6)
    shares = diagnosis["share_by_source"]
    assert {entry["source"] for entry in shares} == {"retain-0", "retain-1", "retain-2"}
    assert sum(entry["weight_share"] for entry in shares) == pytest.approx(1.0)
    near = [document["document"] % 4 == 0 for document in diagnosis["top_documents"][:8]]
    assert apply == "sampling" or all(near), "the documents of the near topic carry the weight"
    assert diagnosis["top_documents"][0]["text_start"]
    assert calibration.summary["selected"] == len(diagnosis["selected"])
    shown = capsys.readouterr().out
    assert shown.startswith("[calibrate] ") and shown.count("\n") == 1
    assert f"forget-critical experts, raking closes {diagnosis['gap_closed']:.0%} of the gap" in shown


def test_running_again_does_nothing_and_from_scratch_gives_the_same_bytes(job, tmp_path) -> None:
    config, run = job()
    calibrate(config, run)
    first, stamp = tree(run.calibration), (run.calibration / "artefact.json").stat().st_mtime_ns
    calibrate(config, run)
    assert (run.calibration / "artefact.json").stat().st_mtime_ns == stamp, "a finished stage is skipped"
    shutil.rmtree(run.calibration)
    calibrate(config, run)
    assert tree(run.calibration) == first
    assert not [p for p in run.path.iterdir() if "tmp" in p.name or "spool" in p.name]
    assert str(tmp_path) not in "".join(str(value) for name, value in first.items() if name.endswith(".json"))


@pytest.mark.parametrize(
    ("then", "experts", "uniform"),
    [("continue", "all", False), ("continue", "selected", True), ("uniform", "all", True)],
)
def test_none_found_may_go_on(job, then: str, experts: str, uniform: bool) -> None:
    changes = {"calibration__if_none_found": then, "calibration__experts": experts}
    config, run = job(calibration__detection__min_ratio=50.0, **changes)
    calibration = calibrate(config, run)
    diagnosis = json.loads(calibration.file("diagnosis.json").read_text())
    said = "weights are uniform" if uniform else "weights are calibrated on all experts"
    assert diagnosis["none_found"] and said in " ".join(diagnosis["warnings"])
    assert (set(np.unique(np.load(calibration.file("weights.npy")))) == {0.0, 1.0}) == uniform


@pytest.mark.parametrize("apply", ["loss", "sampling"])
def test_a_retain_corpus_of_one_document_is_calibrated(tmp_path, apply: str) -> None:
    """Its errors are not known: nothing is detected, and it goes on with finite weights."""
    model = make_model(tmp_path / "model", layers=LAYERS, experts=EXPERTS, top_k=TOP_K)
    path = write_config(tmp_path, model, unlearning__apply=apply)
    text = " ".join(
        json.loads(line)["text"] for line in (tmp_path / "corpora" / "retain.jsonl").read_text().splitlines()
    )
    (tmp_path / "one.jsonl").write_text(json.dumps({"text": text}) + "\n")
    keys = [f"data.retain=[{{path: {tmp_path}/one.jsonl}}]"]
    config, _ = load_config(str(path), keys)
    run = RunDirectory(tmp_path / "run")
    prepare(config, run)
    write_statistics(config, run)
    calibration = calibrate(config, run)
    weights = np.load(calibration.file("weights.npy"))
    assert np.isfinite(weights).all() and weights.max() > 1.1
    assert any("1 document(s)" in line for line in calibration.summary["warnings"])


def test_a_solver_that_ends_early_is_an_error(job, monkeypatch) -> None:
    monkeypatch.setattr(raking, "MAX_LBFGS_ITERATIONS", 2)
    monkeypatch.setattr(raking, "MAX_LAMBDAS", 2)
    config, run = job()
    with pytest.raises(UserError, match=r"the solver ended short of its targets.*calibration.experts: selected"):
        calibrate(config, run)
    assert not run.calibration.exists()


def test_the_same_text_as_forget_and_retain_is_called_that(job) -> None:
    config, run = job(calibration__if_none_found="stop")
    forget = artefact.load_artefact(run.statistics / "forget", "statistics")
    name = "statistics.safetensors"
    shutil.copy(run.statistics / "retain" / name, run.statistics / "forget" / name)
    artefact.describe(run.statistics / "forget", "statistics", forget.inputs, forget.settings, forget.summary)
    with pytest.raises(UserError, match=r"no forget-critical expert was found.*routed identically, as the same text"):
        calibrate(config, run)


@pytest.mark.parametrize(("loss", "layer", "trained"), [("rmu", 0, 1), ("rmu", None, 2), ("graddiff", 0, LAYERS)])
def test_layers_that_the_losses_do_not_train_take_no_part(job, loss: str, layer: int | None, trained: int) -> None:
    """Those above the layer where RMU's losses end; losses of logits train all."""
    losses = {"unlearning__forget_loss": loss, "unlearning__rmu__layer": layer}
    config, run = job(calibration__detection__layers="trained", **losses)
    tensors = load_file(calibrate(config, run).file("calibration.safetensors"))
    assert tensors["scope_LE"].all(axis=1).tolist() == [number < trained for number in range(LAYERS)]
    assert not tensors["selected_LE"][trained:].any() and not tensors["theta_LE"][trained:].any()
    named = job(calibration__detection__layers=list(range(trained)), **losses)[0]
    again = calibrate(named, run).file("calibration.safetensors")
    assert (load_file(again)["theta_LE"] == tensors["theta_LE"]).all()


def test_rows_are_weighted_without_a_trace(job) -> None:
    config, run = job()
    beside_trace = tree(calibrate(config, run).path)
    write_statistics(config, run, trace=False)
    contents = tree(calibrate(config, run).path)
    for name in ("weights.npy", "row_weights.npy", "calibration.safetensors", "diagnosis.json"):
        assert contents[name] == beside_trace[name]
    shutil.rmtree(run.calibration)
    path = run.statistics / "retain" / "row_counts-00001-of-00002.npy"
    np.save(path, np.load(path)[::-1] + 1)
    alter_summary(run.statistics / "retain")
    with pytest.raises(UserError, match="selections of the rows do not add up"):
        calibrate(config, run)
    write_statistics(config, run, trace=False, rows=False)
    with pytest.raises(UserError, match="calibrate needs the selections of each row"):
        calibrate(config, run)
    assert not run.calibration.exists()


def alter_summary(directory: Path, **changes: object) -> None:
    old = artefact.load_artefact(directory, "statistics", verify=False)
    artefact.describe(directory, "statistics", old.inputs, old.settings, {**old.summary, **changes})


def alter_inputs(directory: Path, **changes: str) -> None:
    old = artefact.load_artefact(directory, "statistics", verify=False)
    artefact.describe(directory, "statistics", {**old.inputs, **changes}, old.settings, old.summary)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no statistics": (lambda run: shutil.rmtree(run / "statistics/retain"), "no statistics artefact here"),
    "altered": (lambda run: flip(run / "statistics/forget/statistics.safetensors"), "altered after it was written"),
    "another model": (lambda run: alter_inputs(run / "statistics/forget", model="0" * 64), "another model"),
    "another K": (lambda run: alter_summary(run / "statistics/forget", top_k=1), "have top_k 1, the retain"),
    "both K": (
        lambda run: [alter_summary(run / "statistics" / side, top_k=1) for side in ("forget", "retain")],
        "do not fit their own summary",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_mismatched_inputs_are_refused_by_name(job, damage: str) -> None:
    config, run = job()
    act, message = DAMAGES[damage]
    act(run.path)
    with pytest.raises(UserError, match=message) as refused:
        calibrate(config, run)
    line = refused.value.line()
    assert "\n" not in line and "Fix: " in line and str(run.path) in line
    assert not run.calibration.exists()


def test_a_trace_of_other_tokens_is_refused(job) -> None:
    """Consistent hashes, right shapes, wrong content: the counts beside it tell."""
    config, run = job(unlearning__apply="loss")
    path = run.statistics / "retain" / "trace-00000-of-00002.npy"
    np.save(path, np.load(path)[::-1, ::-1])
    alter_summary(run.statistics / "retain")
    with pytest.raises(UserError, match="does not add up to the statistics"):
        calibrate(config, run)
