"""Fixtures shared by the tests: one tiny model, one prepared and collected run."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import Server, serving

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background both would be ignored
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The files that take longest, about in this order: several run at a time; a long one that began last would run alone.
LONG_FILES = (
    "test_demo",
    "test_slurm",
    "test_cluster_page",
    "test_recipe_runs",
    "test_real_shapes",
    "test_kill",
    "test_unlearn",
    "test_convert_engines",
    "test_hub",
    "test_objective_jobs",
    "test_collect",
    "test_evaluation_sharded",
    "test_launchers",
    "test_harness",
    "test_finetune",
    "test_curve",
    "test_plan",
    "test_pretrained",
    "test_gpu_acceptance",
    "test_families",
    "test_layers_held",
    "test_evaluation_stage",
    "test_benchmark_study",
    "test_trainable",
    "test_data_by_name",
    "test_faults",
    "test_standin",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    place = {name: index for index, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    if "matrix" not in config.option.markexpr:
        left_out = pytest.mark.skip(reason="the whole matrix takes half an hour: `make matrix`")
        for item in items:
            if item.get_closest_marker("matrix"):
                item.add_marker(left_out)


@pytest.fixture(scope="session", autouse=True)
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> None:
    """SHARED_FOLDER: where several workers of this run keep what they all use (:func:`jobs.made_once`)."""
    base = tmp_path_factory.getbasetemp()
    os.environ["SHARED_FOLDER"] = str(base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """What is there already takes no part in garbage collections: a model that has been scored asks for one, and to
    look at all of torch, transformers and the tests takes longer than to score a tiny model."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_model(shared_folder: None) -> Path:
    """A random 3-layer, 4-expert, top-2 Mixtral in fp32 with its tokenizer."""
    from jobs import family_model

    return family_model("mixtral")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """The command line in forks of a process that has imported it."""
    with serving() as result:
        yield result
