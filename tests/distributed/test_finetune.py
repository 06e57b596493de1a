"""Fine-tuning: the target recites what the retrained model never saw; equal on any shape, resumable, crash-safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from forked import Server, refuse
from processes import run_distributed
from safetensors.numpy import load_file
from stage_calls import prepare

from trace_ds.config.load import load_config
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.finetune import check as check_finetune

BOTH = {"target": ["forget", "retain"], "retrained": ["retain"]}
# As in test_unlearn: equal weights mean equal gradients.
GRADIENT_LIKE = ["unlearning.optimizer.eps=0.1", "finetune.lr=0.01"]


def write_config(folder: Path, model: Path, models: Any = BOTH, **changes: Any) -> Path:
    settings = {"models": models, "steps": 4, "batch_rows": 5}
    return tiny.write_config(folder, model, **{"finetune": settings, "unlearning__save_every": 2, **changes})


@pytest.fixture(scope="module")
def prepared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory with data)."""
    folder = tmp_path_factory.mktemp("prepared")
    return (config := write_config(folder, tiny_model)), jobs.prepared_run(config, folder / "run")


def copy_of(run: Path, destination: Path) -> Path:
    return jobs.copied_run(run, destination, "data")


def losses_of(run: Path, name: str) -> list[float]:
    lines = [json.loads(line) for line in (run / f"finetune/{name}/logs/finetune.jsonl").read_text().splitlines()]
    steps = {line["step"]: line["loss"] for line in lines if line["event"] == "step"}
    return [steps[step] for step in sorted(steps)]


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


@pytest.mark.slow
def test_any_number_of_processes_gives_the_models_of_plain_torch(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    """Rows that do not divide by the processes, several documents a row, in one micro-batch or many."""
    config, source = prepared
    shapes = {"one": (1, 1, "null", 3), "two": (2, 1, "1", 1), "two_ep": (2, 2, "2", 3)}
    runs = {}
    for shape, (world, ep, micro, stage) in shapes.items():
        runs[shape] = copy_of(source, tmp_path / shape)
        overrides = [*GRADIENT_LIKE, f"distributed.ep={ep}", f"finetune.micro_batch_rows={micro}"]
        overrides.append(f"unlearning.zero_stage={stage}")
        run_distributed(jobs.finetune_job, world, str(config), str(runs[shape]), overrides)
    for name in BOTH:
        expected = jobs.reference_finetuning(str(config), str(runs["one"]), GRADIENT_LIKE, name)
        assert len(expected["losses"]) == 4
        for run in runs.values():
            np.testing.assert_allclose(losses_of(run, name), expected["losses"], rtol=1e-6)
            actual = weights_of(run / "finetune" / name / "model")
            assert actual.keys() == expected["weights"].keys()
            for tensor, value in expected["weights"].items():
                np.testing.assert_allclose(actual[tensor], value, rtol=1e-5, atol=1e-5 * np.abs(value).max())
    start = weights_of(Path(load_config(str(config), [], None)[0].model.path))
    assert not any(np.array_equal(value, start[tensor]) for tensor, value in expected["weights"].items())


def test_a_model_is_made_anew_only_when_what_it_sees_has_changed(prepared: tuple[Path, Path], tmp_path: Path) -> None:
    config, source = prepared
    run = RunDirectory.at(copy_of(source, tmp_path / "run"))

    def identities(*overrides: str) -> dict[str, str]:
        return {job.name: job.identity for job in check_finetune(load_config(str(config), overrides)[0], run, 1).models}

    before = identities()
    assert before["target"] != before["retrained"]
    assert identities("finetune.steps=9", "unlearning.save_every=1", "unlearning.zero_stage=1") == before
    assert identities("finetune.steps=null", "finetune.epochs=2") == before
    for change in ("finetune.lr=1e-4", "finetune.batch_rows=6", "seed=3", "model.dtype=bf16"):
        assert not set(identities(change).values()) & set(before.values()), change
    path = Path(load_config(str(config), [])[0].data.forget[0].path)
    other = tmp_path / "forget.jsonl"
    other.write_text(path.read_text() + '{"text": "one more document"}\n')
    moved = [f"data.forget=[{{path: {other}}}]"]
    prepare(load_config(str(config), moved)[0], run)
    after = identities(*moved)
    assert after["retrained"] == before["retrained"] and after["target"] != before["target"]


def test_epochs_are_passes_over_the_rows_that_count(prepared: tuple[Path, Path]) -> None:
    from trace_ds.corpora.dataset import TokenDataset
    from trace_ds.stages.finetune import make_finetune_batches

    config, run = prepared
    loaded, _ = load_config(str(config), ["finetune.steps=null", "finetune.epochs=3"], run)
    for job in check_finetune(loaded, RunDirectory.at(run), 1).models:
        batches = make_finetune_batches(loaded, job.sides, job.data)
        summary = job.data.summary
        tokens = sum(summary[side]["counted_tokens"] for side in job.sides)
        corpora = [TokenDataset.open(run / "data" / f"{side}.arrow") for side in job.sides]
        documents = [corpus.row(number).document_ids for corpus in corpora for number in range(len(corpus))]
        rows = sum(bool((np.diff(each) == 0).any()) for each in documents)  # two tokens of a document in a row
        assert rows < sum(map(len, corpora))
        assert job.steps == -(-3 * rows // 5)
        seen = sum(batches.at(step, 0, 1).tokens for step in range(job.steps))
        assert 3 * tokens <= seen < 3 * tokens + 5 * 24
        shares = [batches.at(1, rank, 2) for rank in range(2)]
        counted = sum(int(batch.counted_BS.sum()) for share in shares for batch in share.micro_batches)
        assert counted == shares[0].tokens == shares[1].tokens == batches.at(1, 0, 1).tokens


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("finetune.models.target=[forget, books]", "there is no corpus 'books'; data has forget, retain"),
        ("finetune.models.target=[]", "no list of different corpora"),
        ("finetune.models={retrained: [retain]}", "has no target"),
        ("finetune.models={target: [forget], original: [retain]}", "cannot be named 'original'"),
        ("finetune.models={target: [forget], a/b: [retain]}", "a name is made of letters"),
        ("evaluation.models={retrained: MODEL}", "both have a model 'retrained'"),
        ("finetune.epochs=2", "either steps or epochs"),
        ("finetune.steps=null", "either steps or epochs"),
        ("finetune.batch_size=2", "did you mean 'batch_rows'"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    prepared: tuple[Path, Path], tiny_model: Path, server: Server, tmp_path: Path, change: str, message: str
) -> None:
    change = change.replace("MODEL", str(tiny_model))
    assert message in refuse(server, tmp_path, "run", prepared[0], "--run-dir", "run", "--set", change)
