"""Collecting when things go wrong: a kill, NaN weights, corpora at the edge, files that do not belong together."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jobs
import pytest
import tiny
from command import tree
from processes import end_of_ranks, run_distributed
from safetensors.numpy import load_file, save_file


def prepared(folder: Path, model: Path, run: Path, **changes: object) -> Path:
    config = tiny.write_config(folder, model, **changes)
    jobs.prepared_run(config, run)
    return config


@pytest.mark.slow
def test_a_stopped_and_killed_collection_continues_and_ends_byte_identical(tiny_model: Path, tmp_path: Path) -> None:
    everything = {"statistics__nll": True, "statistics__batch_rows": 2}
    config = prepared(tmp_path, tiny_model, tmp_path / "killed", **everything, statistics__save_every=3)
    prepared(tmp_path, tiny_model, tmp_path / "straight", **everything, statistics__save_every=3)
    (tmp_path / "killed" / "stop").touch()
    left = run_distributed(jobs.stopped_collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert left == ["forget: stopped on request after batch 3"] * 2
    assert not (tmp_path / "killed" / "stop").exists()
    with pytest.raises(AssertionError, match=r"rank \d (died|failed)"):
        run_distributed(jobs.killed_collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert "forget: continues after batch 3" in (tmp_path / "killed" / "logs" / "collect.jsonl").read_text()
    assert not (tmp_path / "killed" / "statistics" / "retain").exists()
    partial = tmp_path / "killed" / "statistics" / "retain.partial"
    assert any(path.name.startswith("state-00001") for path in partial.iterdir())
    with pytest.raises(AssertionError, match=r"rank \d (died|failed)"):  # when every batch is done
        run_distributed(jobs.collect_job_killed_while_hashing, 2, str(config), str(tmp_path / "killed"))
    run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "killed"), [])
    log = (tmp_path / "killed" / "logs" / "collect.jsonl").read_text()
    points = [int(number) for number in re.findall(r"retain: continues after batch (\d+) of", log)]
    assert len(points) == 2 and points[1] == 39, "the last state of 40 batches"
    run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "straight"), [])
    expected = tree(tmp_path / "straight" / "statistics")
    assert {f"retain/{name}-00001-of-00002.npy" for name in ("row_counts", "sample", "sample_positions")} <= set(
        expected
    )
    assert len(expected) == 18 and tree(tmp_path / "killed" / "statistics") == expected
    (tmp_path / "killed" / "statistics" / "retain").rename(partial)  # what a kill just before the last step leaves
    (partial / "shape.json").write_text("{}")
    (partial / "state-00001-000000039.safetensors").touch()
    run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "killed"), [])
    assert tree(tmp_path / "killed" / "statistics") == expected
    assert (tmp_path / "killed" / "logs" / "collect.jsonl").read_text().count("retain: continues after") == 2


@pytest.mark.slow
def test_storage_that_fails_on_one_rank_ends_all(tiny_model: Path, tmp_path: Path) -> None:
    """Each time all ranks leave, what was computed stays, and the collection goes on when the storage is back."""
    config = prepared(tmp_path, tiny_model, tmp_path / "run", statistics__save_every=3)
    main, other = run_distributed(jobs.collect_with_failing_storage, 2, str(config), str(tmp_path / "run"))
    assert main[0].startswith("UserError: the file: on rank 1: the weights cannot be read (Input/output error). Fix: ")
    assert main[1:4] == ["UserError: the file: on rank 1: Input/output error. Fix: check the storage there"] * 3
    assert main[4:] == [""] and other == ["AgreedError: "] * 4 + [""]
    log = (tmp_path / "run" / "logs" / "collect.jsonl").read_text()
    assert "forget: continues after batch" in log and log.count("documents counted") == 2


def test_a_pass_never_continues_another_with_other_rounding_or_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from trace_ds.config.schema import Config
    from trace_ds.parallel.world import World
    from trace_ds.routing import counter
    from trace_ds.stages.collect import CollectJob, _prepare_directory, _shape

    base: dict[str, Any] = {
        "name": "n",
        "model": {"path": "m"},
        "data": {"forget": [{"path": "f"}], "retain": [{"path": "r"}]},
    }

    def shape_of(size: int, changes: dict[str, Any]) -> dict[str, Any]:
        config = Config.model_validate(base | changes)
        job = cast(CollectJob, SimpleNamespace(config=config, info=None, identity=lambda side: side))
        return _shape(job, World(0, size, torch.device("cpu")), "forget")

    shapes: list[dict[str, Any]] = []
    for size, statistics in ((2, {}), (4, {}), (2, {"batch_rows": 5})):
        shapes.append(shape_of(size, {"statistics": statistics}))
    monkeypatch.setattr(counter, "SUMS", counter.SUMS[:-1])  # of another version, whose states lack one
    shapes.append(shape_of(2, {}))
    for other in shapes[1:]:
        for shape, kept in ((shapes[0], False), (shapes[0], True), (other, False)):
            assert _prepare_directory(tmp_path / "partial", shape) is False
            assert (tmp_path / "partial" / "state-00000-000000004.safetensors").exists() == kept
            (tmp_path / "partial" / "state-00000-000000004.safetensors").touch()


@pytest.mark.slow
def test_nan_router_weights_name_the_layer(tiny_model: Path, tmp_path: Path) -> None:
    name = next(name for name in load_file(tiny_model / "model.safetensors") if "layers.1" in name and "gate" in name)
    model = damaged(tiny_model, tmp_path / "model", name, 3e38)  # finite, but the logits are not
    config = prepared(tmp_path, model, tmp_path / "run")
    main, other = end_of_ranks(jobs.collect_job, 2, str(config), str(tmp_path / "run"), ["distributed.ep=2"])
    assert "the router of decoder layer 1 gave NaN or infinite weights" in main and "AgreedError" in other
    assert not list((tmp_path / "run" / "statistics").iterdir())


def damaged(source: Path, destination: Path, tensor: str, value: float) -> Path:
    import shutil

    shutil.copytree(source, destination)
    tensors = load_file(destination / "model.safetensors")
    tensors[tensor][:] = value
    save_file(tensors, destination / "model.safetensors", metadata={"format": "pt"})
    return destination
