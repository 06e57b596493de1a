"""Routing statistics: exact against brute force on any cluster shape, refused when they do not belong to the job."""

from __future__ import annotations

import itertools
import shutil
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from processes import run_distributed

from trace_ds.config.load import load_config
from trace_ds.corpora.dataset import FlatArray, TokenDataset
from trace_ds.errors import UserError
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.routing.token_files import open_parts, require_parts, sample_places
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory


def prepared(folder: Path, model: Path, **changes: object) -> Path:
    """A configuration in ``folder`` whose data is prepared in ``folder/run``."""
    config = tiny.write_config(folder, model, **changes)
    jobs.prepared_run(config, folder / "run")
    return config


def collected(config: Path, run: Path, world: int, ep: int, *overrides: str) -> dict[str, RoutingStatistics]:
    if not (run / "data").exists():
        shutil.copytree(config.parent / "run" / "data", run / "data")
    run_distributed(jobs.collect_job, world, str(config), str(run), [f"distributed.ep={ep}", *overrides])
    return {
        side: RoutingStatistics.load(run / "statistics" / side / "statistics.safetensors")
        for side in ("forget", "retain")
    }


EXPERT_PARALLEL = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "qwen3_5_moe_text")
OTHERS = ("gpt_oss", "phimoe", "granitemoe")


@pytest.fixture(scope="module")
def families(shared_folder: None) -> dict[str, Path]:
    """A tiny model of every family; all have the same tokenizer."""
    return {family: jobs.family_model(family) for family in (*EXPERT_PARALLEL, *OTHERS)}


@pytest.fixture(scope="module")
def small_data(families: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Configurations over a few documents: rows that hold several, and rows of one document, padded, of which only the
    answer counts."""
    configs = {}
    for name in ("packed", "padded"):
        folder = tmp_path_factory.mktemp(name)
        answers = {
            "template": "{source}: {text}",
            "loss_on": "answer",
            "path": str(folder / "corpora" / "forget.jsonl"),
        }
        padded = {"data__packing": "single", "data__forget": [answers]}
        changes: dict[str, Any] = {"data__packing": "dense"} if name == "packed" else padded
        config = tiny.write_config(folder, families["mixtral"], **changes)
        for side in ("forget", "retain"):
            path = folder / "corpora" / f"{side}.jsonl"
            path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))
        jobs.prepared_run(config, folder / "run")
        configs[name] = config
    return configs


@pytest.fixture(scope="module")
def brute(families: dict[str, Path], small_data: dict[str, Path]) -> dict[tuple[str, str], dict[str, np.ndarray]]:
    """What the routers of plain transformers decide, fp32, a document at a time; by family and kind of rows."""
    arrows = {rows: config.parent / "run" / "data" / "forget.arrow" for rows, config in small_data.items()}
    return {
        (family, rows): jobs.brute_force_routing(model, arrow)
        for family, model in families.items()
        for rows, arrow in arrows.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_counts_equal_brute_force(
    world: int,
    families: dict[str, Path],
    small_data: dict[str, Path],
    brute: dict[tuple[str, str], dict[str, np.ndarray]],
    tmp_path: Path,
) -> None:
    """Every family, type, expert-parallel size, rows per batch, rows packed and padded, in one job per world size; at
    two ranks with expert parallelism, for two families also without.

    fp32: every sum, of all tokens and of each row, and the experts of the sampled tokens equal those over documents
    alone. bf16: equal to plain transformers in the same batches; with
    experts on several ranks their outputs are added in another order, so near ties may fall the other way: seen are one
    of 1,056 selections of a layer, in qwen3_moe and olmoe, and none in the others.
    """
    eps = {family: [world] for family in EXPERT_PARALLEL} | {family: [1] for family in OTHERS}
    eps |= {family: list(range(1, world + 1)) for family in ("mixtral", "deepseek_v3")}
    models = {family: str(families[family]) for family in eps}
    datasets = {rows: str(config.parent / "run" / "data" / "forget.arrow") for rows, config in small_data.items()}
    result = run_distributed(jobs.collect_matrix, world, models, datasets, eps, str(tmp_path))[0]
    padded_only = sum(len(eps.get(family, ())) for family in tiny.MIXING)
    assert len(result) == 4 * sum(map(len, eps.values())) - 2 * padded_only
    for cell, sums in result.items():
        family, dtype, ep, _, rows = cell
        documents = brute[family, rows]["documents"]
        sizes = documents[:, 0].sum(-1) // 2
        assert sums["square_tokens"] == (sizes**2).sum(), cell
        assert (sums["tokens"], sums["documents"]) == (sizes.sum(), len(sizes)), cell
        if dtype == "bf16":
            moved = np.abs(sums["counts_LE"] - sums["plain"]).sum(1) / 2
            assert moved.max() <= (0 if ep == 1 else 0.002 * 2 * sizes.sum()), (cell, moved)
            continue
        assert (sums["counts_LE"] == brute[family, rows]["counts"]).all(), cell
        assert (sums["square_LE"] == (documents**2).sum(0)).all(), cell
        assert (sums["cross_LE"] == (documents * sizes[:, None, None]).sum(0)).all(), cell
        np.testing.assert_allclose(sums["gate_mass_LE"], brute[family, rows]["mass"], rtol=5e-6, err_msg=str(cell))
        np.testing.assert_allclose(sums["row_gate_LE"], brute[family, rows]["row_gate"], rtol=5e-6, err_msg=str(cell))
        assert sums["row_counts"].dtype == np.uint8 and (sums["row_counts"] == brute[family, rows]["rows"]).all(), cell
        drawn = sample_places(len(brute[family, rows]["trace"]), 70)
        assert (sums["sample_positions"] == brute[family, rows]["positions"][drawn]).all(), cell
        assert (sums["sample"] == brute[family, rows]["trace"][drawn]).all(), cell


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.MIXING)
def test_documents_that_mix_are_refused(
    family: str, families: dict[str, Path], small_data: dict[str, Path], tmp_path: Path
) -> None:
    """gpt_oss in transformers ignores restarting positions: attention would cross the documents of a row; in linear
    attention a state does."""
    shutil.copytree(small_data["packed"].parent / "run" / "data", tmp_path / "run" / "data")
    model = f"model.path={families[family]}"
    with pytest.raises(AssertionError, match=r"mixes the documents of a packed row.*packing: single"):
        run_distributed(jobs.collect_job, 1, str(small_data["packed"]), str(tmp_path / "run"), [model])
    assert not (tmp_path / "run" / "statistics").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "experts", "ep", "context"), [("mixtral", 4, 2, 500), ("phimoe", 300, 1, 24)])
def test_trace_and_nll_belong_to_every_token(family: str, experts: int, ep: int, context: int, tmp_path: Path) -> None:
    """With expert parallelism and rows longer than a byte can count, and sharded by ZeRO-3 with more experts than a
    byte can number."""
    import torch
    from transformers import AutoModelForCausalLM

    model_path = tiny.make_model(tmp_path / "model", family, experts=experts)
    config = prepared(
        tmp_path,
        model_path,
        statistics={"nll": True, "trace": True},
        data__context_length=context,
        data__packing="dense",
    )
    actual = collected(config, tmp_path / "two", 2, ep)
    folder = tmp_path / "two" / "statistics" / "retain"
    description = artefact.load_artefact(folder, "statistics")
    dataset = TokenDataset.open(tmp_path / "run" / "data" / "retain.arrow")
    trace = np.concatenate(open_parts(description, "trace"))
    nll = FlatArray(open_parts(description, "nll"))
    assert trace.dtype == (np.uint8 if experts == 4 else np.uint16) and len(trace) == len(nll) == dataset.tokens
    counted = dataset.counted(0, dataset.tokens)
    counts = np.stack([np.bincount(trace[counted][:, layer].reshape(-1), minlength=experts) for layer in range(3)])
    assert (counts == actual["retain"].counts_LE).all() and counts[:, 256:].any() == (experts > 256)
    row_counts = np.concatenate(open_parts(description, "row_counts"))
    assert row_counts.dtype == (np.uint16 if context == 500 else np.uint8)
    for number, (begin, end) in enumerate(itertools.pairwise(dataset.row_starts_R1)):
        chosen = trace[begin:end][counted[begin:end]]
        by_hand = [np.bincount(chosen[:, layer].reshape(-1), minlength=experts) for layer in range(3)]
        assert (row_counts[number] == by_hand).all()
    assert row_counts.max() > 255 or context == 24
    assert (np.concatenate(open_parts(description, "sample_positions")) == np.flatnonzero(counted)).all()
    assert (np.concatenate(open_parts(description, "sample")) == trace[counted]).all()
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    for number in (0, 5, len(dataset) - 1):
        row, begin = dataset.row(number), int(dataset.row_starts_R1[number])
        for document in np.unique(row.document_ids):
            where = np.flatnonzero(row.document_ids == document)
            ids = torch.tensor(row.input_ids[where].astype(np.int64))
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0].double()
            expected = torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none").numpy()
            values = nll[begin + int(where[0]) : begin + int(where[-1]) + 1]
            np.testing.assert_allclose(values[:-1], expected, rtol=1e-5)
            assert values[-1] == 0


def reduce_large_sums(world: Any) -> RoutingStatistics:
    """What ranks agree on whose sums are beyond 2^31; the document 7 lies on all of them."""
    import torch

    from trace_ds.routing.counter import RoutingCounter

    big, piece = 2**31 + world.rank, 2**17
    counter = RoutingCounter(1, 2, 1, torch.device("cpu"))
    counter.restore(
        {
            "counts_LE": torch.tensor([[big, 5]]),
            "gate_mass_LE": torch.tensor([[0.5, 2.0**-40]], dtype=torch.float64),
            "row_gate_LE": torch.tensor([[0.25, 0.0]], dtype=torch.float64),
            "square_LE": torch.tensor([[2**40 + 1, 1]]),
            "cross_LE": torch.tensor([[2**41 + 1, 1]]),
            "scalars": torch.tensor([2**42 + 1, big + 5, 3]),
            "open": torch.tensor([[piece, 0]]),
            "open_scalars": torch.tensor([7, piece]),
        }
    )
    return counter.reduce(world)


def test_sums_over_ranks_beyond_2_31_are_exact() -> None:
    result = run_distributed(reduce_large_sums, 2)[0]
    assert result.counts_LE.tolist() == [[2**32 + 1, 10]] and result.tokens == 2**32 + 11
    assert result.square_LE.tolist() == [[2 * (2**40 + 1) + 2**36, 2]]
    assert result.cross_LE.tolist() == [[2 * (2**41 + 1) + 2**36, 2]]
    assert (result.square_tokens, result.documents) == (2 * (2**42 + 1) + 2**36, 7)
    assert result.gate_mass_LE.tolist() == [[1.0, 2.0**-39]]


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"unlearning__apply": "sampling"}, False),
        ({"unlearning__apply": "loss", "calibration__rule": "uniform"}, False),
        ({"unlearning__apply": "sampling", "variants": {"v": {"unlearning.apply": "loss"}}}, True),
    ],
)
def test_the_trace_is_recorded_where_it_is_needed(
    changes: dict[str, Any], needed: bool, tiny_model: Path, tmp_path: Path
) -> None:
    from trace_ds.stages.collect import recording

    config, _ = load_config(str(tiny.write_config(tmp_path, tiny_model, **changes)), [], tmp_path / "run")
    assert recording(config, "retain").trace == needed and not recording(config, "forget").trace
    off = config.model_copy(update={"statistics": config.statistics.model_copy(update={"trace": False})})
    assert not recording(off, "retain").trace
    on = config.model_copy(update={"statistics": config.statistics.model_copy(update={"trace": True})})
    assert recording(on, "forget").trace


def test_a_collection_is_repeated_only_for_what_it_lacks(tiny_model: Path, tmp_path: Path) -> None:
    from trace_ds.stages.collect import check as check_collect

    config = prepared(tmp_path, tiny_model)
    loaded, path = load_config(str(config), [], tmp_path / "run")
    run = RunDirectory.at(path)
    job = check_collect(loaded, run, 1)
    samples = 200_000
    plain = {"dtype": "fp32", "trace": False, "nll": False, "top_k": 2, "sample_tokens": samples}

    def done(settings: dict[str, Any], *overrides: str) -> bool:
        for side in ("forget", "retain"):
            shutil.rmtree(run.statistics / side, ignore_errors=True)
            (run.statistics / side).mkdir(parents=True)
            made_with = settings | {"rows": side == "retain"}
            artefact.describe(run.statistics / side, "statistics", job.inputs[side], made_with, {})
        requested = load_config(str(config), list(overrides), path)[0]
        return check_collect(requested, run, 1).done()

    assert done(plain) and done(plain | {"nll": True}) and done(plain | {"trace": True})
    assert not done(plain, "unlearning.apply=loss") and done(plain | {"trace": True}, "unlearning.apply=loss")
    assert not done(plain, "statistics.nll=true") and not done(plain, "statistics.trace=true")
    assert not done(plain | {"dtype": "bf16"}) and not done(plain | {"top_k": 1})
    assert not done(plain | {"sample_tokens": samples // 2})
    retain = artefact.load_artefact(run.statistics / "retain", "statistics")
    with pytest.raises(UserError, match=r": the rule x needs the selections of each row, not recorded") as error_info:
        require_parts(retain, "row_counts", "the rule x")
    assert error_info.value.fix == "run `trace-ds collect CONFIG` again"
