"""Routing statistics: exact against brute force on any cluster shape, refused when they do not belong to the job."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jobs
import numpy as np
import pytest
import tiny
from distributed import run_distributed

from trace_ds.config.load import load_config
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.routing.token_files import TokenArray, open_parts
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.prepare import prepare


def prepared(folder: Path, model: Path, **changes: object) -> Path:
    """A configuration in ``folder`` whose data is prepared in ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = tiny.write_config(folder, model, **changes)
    loaded, run = load_config(str(config), [], folder / "run")
    directory = RunDirectory.at(run)
    directory.create("")
    prepare(loaded, directory)
    return config


def collected(config: Path, run: Path, world: int, ep: int, *overrides: str) -> dict[str, RoutingStatistics]:
    if not (run / "data").exists():
        shutil.copytree(config.parent / "run" / "data", run / "data")
    run_distributed(jobs.collect_job, world, str(config), str(run), [f"distributed.ep={ep}", *overrides])
    return {
        side: RoutingStatistics.load(run / "statistics" / side / "statistics.safetensors")
        for side in ("forget", "retain")
    }


FAMILIES = ("mixtral", "qwen3_moe", "olmoe")


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_counts_equal_brute_force_on_any_cluster_shape(family: str, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", family)
    config = prepared(tmp_path, model)
    expected = {
        side: jobs.brute_force_routing(model, tmp_path / "run" / "data" / f"{side}.arrow", 2)
        for side in ("forget", "retain")
    }
    shapes = [(1, 1, 4), (2, 1, 3), (2, 2, 4), (4, 2, 1), (4, 4, 5)] if family == "mixtral" else [(1, 1, 4), (2, 2, 3)]
    for world, ep, batch in shapes:
        run = tmp_path / f"run-{world}-{ep}"
        found = collected(config, run, world, ep, f"statistics.batch_rows={batch}")
        for side, brute in expected.items():
            statistics, documents = found[side], brute["documents"]
            sizes = documents[:, 0].sum(-1) // 2
            assert (statistics.counts_LE == brute["counts"]).all(), (world, ep, side)
            assert (statistics.square_LE == (documents**2).sum(0)).all()
            assert (statistics.cross_LE == (documents * sizes[:, None, None]).sum(0)).all()
            assert statistics.square_tokens == (sizes**2).sum()
            assert (statistics.tokens, statistics.documents) == (sizes.sum(), len(sizes))
            if family == "mixtral":  # the gate weights of the other presets are not all normalised
                np.testing.assert_allclose(statistics.gate_mass_LE, brute["mass"], rtol=2e-6)


@pytest.mark.slow
def test_trace_and_nll_belong_to_every_token(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    config = prepared(tmp_path, tiny_model, statistics__nll=True)
    found = collected(config, tmp_path / "two", 2, 2)
    folder = tmp_path / "two" / "statistics" / "retain"
    description = artefact.load(folder, "statistics", "")
    dataset = TokenDataset.open(tmp_path / "run" / "data" / "retain.arrow")
    trace = np.concatenate(open_parts(description, "trace"))
    nll = TokenArray(open_parts(description, "nll"))
    assert trace.dtype == np.uint8 and len(trace) == len(nll) == dataset.tokens
    counted = dataset.counted_flat()
    counts = np.stack([np.bincount(trace[counted][:, layer].reshape(-1), minlength=4) for layer in range(3)])
    assert (counts == found["retain"].counts_LE).all()
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for number in (0, 5, len(dataset) - 1):
        row, begin = dataset.row(number), int(dataset.row_offsets[number])
        for document in np.unique(row.document_ids):
            where = np.flatnonzero(row.document_ids == document)
            ids = torch.tensor(row.input_ids[where].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()
            values = nll.slice(begin + int(where[0]), begin + int(where[-1]) + 1)
            np.testing.assert_allclose(values[:-1], expected, rtol=1e-5)
            assert values[-1] == 0


@pytest.mark.slow
def test_mean_hidden_state_of_every_row(tiny_model: Path, tmp_path: Path) -> None:
    """Against plain transformers by document, and the same on another cluster shape."""
    import torch
    from transformers import AutoModelForCausalLM

    config = prepared(tmp_path, tiny_model, statistics__hidden=True)
    found = {}
    for world, ep, batch in ((1, 1, 4), (2, 2, 3)):
        run = tmp_path / f"hidden-{world}"
        collected(config, run, world, ep, f"statistics.batch_rows={batch}")
        description = artefact.load(run / "statistics" / "retain", "statistics", "")
        assert description.settings["hidden_layer"] == 1
        found[world] = np.concatenate(open_parts(description, "hidden"))
    dataset = TokenDataset.open(tmp_path / "run" / "data" / "retain.arrow")
    assert found[1].shape == (len(dataset), 32) and found[1].dtype == np.float32
    np.testing.assert_allclose(found[2], found[1], atol=1e-5)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    for number in (0, 5, len(dataset) - 1):
        row, parts = dataset.row(number), []
        for document in np.unique(row.document_ids):
            ids = torch.tensor(row.input_ids[row.document_ids == document].astype(np.int64))
            with torch.no_grad():
                parts.append(model(input_ids=ids[None], output_hidden_states=True).hidden_states[2][0, :-1])
        np.testing.assert_allclose(found[1][number], torch.cat(parts).mean(0).numpy(), atol=1e-5)


@pytest.mark.slow
def test_rerun_is_byte_identical_and_bf16_counts_agree(tiny_model: Path, tmp_path: Path) -> None:
    config = prepared(tmp_path, tiny_model)
    contents = []
    for name in ("a", "b"):
        collected(config, tmp_path / name, 2, 2)
        contents.append(
            {path.name: path.read_bytes() for path in (tmp_path / name / "statistics" / "forget").iterdir()}
        )
    assert contents[0] == contents[1]
    one = collected(config, tmp_path / "bf16-1", 1, 1, "model.dtype=bf16")
    two = collected(config, tmp_path / "bf16-2", 2, 2, "model.dtype=bf16")
    assert (one["retain"].counts_LE == two["retain"].counts_LE).all()


def test_totals_beyond_2_24_and_2_31_are_exact() -> None:
    """The counter's sums are integers: a float32 buffer would stop at 2^24."""
    import torch

    from trace_ds.models.routers import RoutingRecorder
    from trace_ds.routing.counter import RoutingCounter

    counter = RoutingCounter(1, 2, 1, torch.device("cpu"))
    counter.counts_LE[:] = torch.tensor([[2**31 - 1, 2**24]])
    recorder = RoutingRecorder(1)
    recorder.indices_TK[0] = torch.tensor([[0], [1], [0], [1]])
    recorder.scores_TK[0] = torch.ones(4, 1)
    counter.add(recorder, torch.tensor([[True, True, True, False]]), torch.zeros(1, 4, dtype=torch.int64))
    assert counter.counts_LE.tolist() == [[2**31 + 1, 2**24 + 1]]
    assert counter.tokens == 3


def test_statistics_of_another_model_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    from trace_ds.stages.collect import check_collect

    config = prepared(tmp_path, tiny_model)
    other = tiny.make_model(tmp_path / "other", seed=1)
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text().replace('"id": 2', '"id":  2'))
    loaded, run = load_config(str(config), [f"model.path={other}"], tmp_path / "run")
    with pytest.raises(UserError, match=r"data artefact was made with another tokenizer"):
        check_collect(loaded, RunDirectory.at(run), 1)


def test_damaged_data_is_named(tiny_model: Path, tmp_path: Path) -> None:
    from trace_ds.stages.collect import check_collect

    config = prepared(tmp_path, tiny_model)
    loaded, run = load_config(str(config), [], tmp_path / "run")
    path = run / "data" / "forget.arrow"
    content = bytearray(path.read_bytes())
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"forget\.arrow: the file was altered"):
        check_collect(loaded, RunDirectory.at(run), 1)
    path.write_bytes(content[:-8])
    with pytest.raises(UserError, match=r"forget\.arrow: the file has .* bytes instead of"):
        check_collect(loaded, RunDirectory.at(run), 1)
    description = json.loads((run / "data" / "artefact.json").read_text())
    description["inputs"]["tokenizer"] = "0" * 64
    (run / "data" / "artefact.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match="altered after it was written"):
        check_collect(loaded, RunDirectory.at(run), 1)
