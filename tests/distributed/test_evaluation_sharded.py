"""A model that is sharded over the ranks of a job has the scores of one that each of them holds whole."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from jobs import family_model, prepared_run
from processes import run_distributed
from stage_calls import evaluate
from test_evaluation_models import SETTINGS, random_sequences
from test_evaluation_stage import Case, case, evaluate_on, with_every_kind_of_task  # noqa: F401 (case is a fixture)

from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import UserError
from trace_ds.evaluation.drift import sample_routing
from trace_ds.evaluation.language_model import LanguageModel, Sharding, open_language_model
from trace_ds.models.families import FAMILIES
from trace_ds.stages.pipeline import Request, check_early

SHARDED = {2: [Sharding(1, 3), Sharding(2, 0), Sharding(2, 3)], 4: [Sharding(4, 0), Sharding(2, 3)]}


@contextlib.contextmanager
def nothing_kept_whole() -> Iterator[None]:
    """ZeRO-3 leaves no parameter whole on every rank, however small."""
    from trace_ds.models import engine

    settings = engine.base_ds_config

    def all_partitioned(**keys: Any) -> dict[str, Any]:
        ds_config = settings(**keys)
        if keys["zero_stage"] == 3:
            ds_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return ds_config

    engine.base_ds_config = all_partitioned
    try:
        yield
    finally:
        engine.base_ds_config = settings


def measured(model: LanguageModel, dataset: str) -> dict[str, Any]:
    """Everything that metrics ask of a model, of more batches than ranks and not as many for each."""
    sequences = random_sequences(21)
    prompts = [list(sequence.ids[:8]) for sequence in sequences[:9]]
    lengths = [3 + number % 5 for number in range(9)]
    scores = model.score(sequences)
    return {
        "log_prob": np.concatenate([score.log_prob for score in scores]),
        "is_argmax": np.concatenate([score.is_argmax for score in scores]),
        "greedy": np.concatenate(model.continue_greedily(prompts, lengths)),
        "routing": np.sort(sample_routing(model, TokenDataset.open(Path(dataset)), 11, 2).indices_TLK),
    }


def sharded_measurements(world: Any, models: dict[str, str], dataset: str) -> dict[str, list[Any]]:
    from transformers import AutoTokenizer

    results: dict[str, list[Any]] = {}
    for family, path in models.items():
        for sharding in SHARDED[world.size] if family in FAMILIES else [Sharding(1, 3)]:
            tokenizer = AutoTokenizer.from_pretrained(path)
            with nothing_kept_whole(), open_language_model(path, tokenizer, SETTINGS, world, sharding) as model:
                parameters = sum(
                    p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel() for p in model.model.parameters()
                )
                results.setdefault(family, []).append((sharding, parameters, measured(model, dataset)))
    return results


@pytest.fixture(scope="module")
def models(shared_folder: None) -> dict[str, str]:
    return {family: str(family_model(family)) for family in ("mixtral", "deepseek_v3", "gpt_oss")}


@pytest.fixture(scope="module")
def dataset(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("rows")
    return str(prepared_run(tiny.write_config(folder, Path(models["mixtral"])), folder / "run") / "data/forget.arrow")


@pytest.mark.parametrize("world", [2, 4])
def test_scores_are_those_of_a_whole_model(world: int, models: dict[str, str], dataset: str) -> None:
    from transformers import AutoTokenizer

    tried = models if world == 2 else {"mixtral": models["mixtral"]}
    ranks = run_distributed(sharded_measurements, world, tried, dataset)
    for family, path in tried.items():
        with open_language_model(path, AutoTokenizer.from_pretrained(path), SETTINGS) as model:
            alone, whole = measured(model, dataset), sum(p.numel() for p in model.model.parameters())
        for sharding, parameters, result in (entry for rank in ranks for entry in rank[family]):
            where = f"{family} {sharding}"
            assert parameters < whole / (world if sharding.zero_stage == 3 else 1) * 1.1, where
            assert np.allclose(result["log_prob"], alone["log_prob"], atol=1e-5), where
            for name in ("is_argmax", "greedy", "routing"):
                assert np.array_equal(result[name], alone[name]), where


def close(result: Any, expected: Any, where: str = "") -> None:
    """Equal in everything but the last digits of numbers."""
    if isinstance(expected, dict):
        assert result.keys() == expected.keys(), where
        for key in expected:
            close(result[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(result) == len(expected), where
        for number, pair in enumerate(zip(result, expected, strict=True)):
            close(*pair, f"{where}[{number}]")
    elif isinstance(expected, float):
        assert result == pytest.approx(expected, rel=2e-4, abs=1e-5), where
    else:
        assert result == expected, where


def test_a_whole_evaluation(case: Case, tmp_path: Path) -> None:  # noqa: F811
    """Every kind of task, the drift, relearning."""
    with_every_kind_of_task(case, tmp_path)
    case.raw["evaluation"] |= {"relearning": {"steps": 2, "lr": 1e-2}}
    evaluate(case.config(), case.run)
    alone = {name: case.result(name) for name in ("original", "gold", "unlearned")}
    shutil.rmtree(case.run.evaluation)
    case.raw["evaluation"] |= {"ep": 2, "zero_stage": 3}
    assert run_distributed(evaluate_on, 2, case.raw, str(case.run.path)) == [True, False]
    for name, expected in alone.items():
        close(case.result(name), expected, name)
    assert case.result("unlearned")["drift"] and case.result("gold")["relearning"]


def most_gathered(world: Any, path: str) -> tuple[int, int, int]:
    """The most elements of whole parameters that ZeRO-3 has gathered during two forward passes; those of the largest
    layer and of the model."""
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    with nothing_kept_whole(), open_language_model(path, tokenizer, SETTINGS, world, Sharding(1, 3)) as model:
        every = list(model.model.parameters())
        seen = [0]

        def count(*_: Any) -> None:
            whole = [p.ds_numel for p in every if p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
            seen[0] = max(seen[0], sum(whole))

        for layer in model.model.model.layers:
            layer.mlp.register_forward_hook(count)
        for _ in range(2):  # the second prefetches what the first has used
            model.score(random_sequences(3))
        largest = max(sum(p.ds_numel for p in layer.parameters()) for layer in model.model.model.layers)
        return seen[0], largest, sum(p.ds_numel for p in every)


def test_a_sharded_model_is_never_gathered_whole(tmp_path: Path) -> None:
    """DeepSpeed's own limits keep all of a model below 1e9 parameters."""
    path = tiny.make_model(tmp_path / "model", layers=8)
    for most, largest, total in run_distributed(most_gathered, 2, str(path)):
        assert 0 < most <= 3 * largest < total / 2


def test_bad_shapes(case: Case) -> None:  # noqa: F811
    shutil.rmtree(case.run.model)  # nothing marks it as ours

    def refused(world_size: int | None, **evaluation: Any) -> str:
        with pytest.raises(UserError) as caught:
            check_early("evaluate", Request(case.config(**evaluation), case.run), world_size)
        return str(caught.value)

    assert "evaluation.ep: expert-parallel size 2 does not divide the world size 1" in refused(None, ep=2)
    assert "expert-parallel size 3 does not divide the 4 experts" in refused(3, ep=3)
