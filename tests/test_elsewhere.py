"""Routing that vLLM returned is counted as what the same model decides when it is run here."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
import tiny
from distributed import run_distributed

from trace_ds.config.load import load_config
from trace_ds.corpora.dataset import TokenDataset
from trace_ds.errors import UserError
from trace_ds.routing.elsewhere import documents_in_rows, experts_of
from trace_ds.routing.statistics import RoutingStatistics
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory
from trace_ds.stages.calibrate import calibrate


@pytest.fixture(scope="module")
def collected(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(configuration, run directory) with data, rows cut wherever they end, and the statistics of a collection."""
    folder = tmp_path_factory.mktemp("collected")
    config = tiny.write_config(folder, tiny_model, data__packing="dense", statistics__trace=True)
    run = jobs.prepared_run(config, folder / "run")
    run_distributed(jobs.collect_job, 1, str(config), str(run), [])
    return config, run


def answers(model_path: Path, arrow: Path) -> list[dict[str, Any]]:
    """What vLLM says of every document of every row: its prompt's tokens and the experts of each."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    outputs, found = jobs.record_plainly(model), []
    for _, _, tokens in documents_in_rows(TokenDataset.open(arrow)):
        with torch.no_grad():
            model(input_ids=torch.tensor(tokens[None].astype(np.int64)))
        experts_NLK = torch.stack([outputs[layer][2] for layer in range(len(outputs))], 1).short().numpy()
        found.append({"prompt_token_ids": tokens.tolist(), "prompt_routed_experts": experts_NLK})
    return found


def as_lists(answer: dict[str, Any]) -> dict[str, Any]:
    """vLLM 0.21: the prompt's beside the choices, which have those of the generated tokens."""
    generated = {"text": "a", "routed_experts": [[[0, 1]] * 3]}
    return answer | {"prompt_routed_experts": answer["prompt_routed_experts"].tolist(), "choices": [generated]}


def as_file(answer: dict[str, Any]) -> dict[str, Any]:
    """Later versions: an .npy file in base64 in the choice, a generated token after the prompt's."""
    file = io.BytesIO()
    np.save(file, np.concatenate([answer["prompt_routed_experts"], np.zeros((1, 3, 2), np.int16)]))
    choice = {
        "routed_experts": base64.b64encode(file.getvalue()).decode(),
        "prompt_token_ids": answer["prompt_token_ids"],
    }
    return {"choices": [choice], "prompt_token_ids": None}


def write(path: Path, lines: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_what_vllm_returned_gives_the_statistics_of_the_model(
    world: int, collected: tuple[Path, Path], tiny_model: Path, tmp_path: Path
) -> None:
    config, here = collected
    run = tmp_path / "run"
    shutil.copytree(here / "data", run / "data")
    written = {"forget": as_lists, "retain": as_file}
    files = {
        side: write(tmp_path / f"{side}.jsonl", list(map(form, answers(tiny_model, run / "data" / f"{side}.arrow"))))
        for side, form in written.items()
    }
    overrides = [f"statistics.recorded={json.dumps(files)}", "statistics.batch_rows=3", "statistics.save_every=2"]
    run_distributed(jobs.collect_job, world, str(config), str(run), overrides)
    for side in written:
        found, expected = (artefact.load(place / "statistics" / side, "statistics") for place in (run, here))
        one, other = (RoutingStatistics.load(each.file("statistics.safetensors")) for each in (found, expected))
        for name in ("counts_LE", "square_LE", "cross_LE"):
            assert (getattr(one, name) == getattr(other, name)).all(), (side, name)
        np.testing.assert_allclose(one.gate_mass_LE, one.counts_LE / one.top_k)
        for name in ("trace", "sample", "sample_positions", *(["row_counts"] if side == "retain" else [])):
            parts = [
                np.concatenate([np.load(each.file(file)) for file in sorted(each.files) if file.startswith(f"{name}-")])
                for each in (found, expected)
            ]
            assert (parts[0] == parts[1]).all(), (side, name)
        assert found.inputs["recorded"] and "recorded" not in expected.inputs
    calibrate(load_config(str(config), overrides)[0], RunDirectory.at(run))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (lambda lines: lines[:-1], "there is no line for the document at position"),
        (lambda lines: [*lines, lines[-1]], "it has more lines than the data have documents in rows"),
    ],
)
def test_a_file_for_other_data_is_refused(
    lines: Callable[[list[Any]], list[Any]],
    problem: str,
    collected: tuple[Path, Path],
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    config, here = collected
    shutil.copytree(here / "data", tmp_path / "run" / "data")
    found = list(map(as_lists, answers(tiny_model, here / "data" / "forget.arrow")))
    files = {side: write(tmp_path / f"{side}.jsonl", lines(found)) for side in ("forget", "retain")}
    overrides = [f"statistics.recorded={json.dumps(files)}"]
    with pytest.raises(AssertionError, match=problem):
        run_distributed(jobs.collect_job, 2, str(config), str(tmp_path / "run"), overrides)
    assert not any((tmp_path / "run" / "statistics").iterdir())


TOKENS, EXPERTS = [5, 6, 7], [[[0, 1], [2, 3]], [[1, 0], [0, 3]], [[3, 1], [0, 1]]]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1", "this is no response with routed experts"),
        ("[1]", "this is no response with routed experts"),
        ({"prompt_token_ids": TOKENS, "routed_experts": "AAAA"}, "this is no response with routed experts"),
        ({"prompt_token_ids": [5, 6, 8], "routed_experts": EXPERTS}, "are not the tokens of the document"),
        ({"prompt_token_ids": TOKENS}, r"shape \[\], and \[3, 2, 2\]"),
        ({"prompt_token_ids": TOKENS, "routed_experts": EXPERTS[:2]}, r"shape \[2, 2, 2\], and \[3, 2, 2\]"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[0, 1]]] * 3}, r"shape \[3, 1, 2\], and \[3, 2, 2\]"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[0.5, 1], [2, 3]]] * 3}, "is needed"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[-1, -1], [2, 3]], *EXPERTS[1:]]}, "no 2 experts of 4"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[-1, 0], [2, 3]], *EXPERTS[1:]]}, "no 2 experts of 4"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[0, 4], [2, 3]], *EXPERTS[1:]]}, "no 2 experts of 4"),
        ({"prompt_token_ids": TOKENS, "routed_experts": [[[1, 1], [2, 3]], *EXPERTS[1:]]}, "no 2 experts of 4"),
    ],
)
def test_a_line_that_does_not_fit_is_named(line: Any, problem: str) -> None:
    text = line if isinstance(line, str) else json.dumps(line)
    with pytest.raises(UserError, match=f"file:7: .*{problem}"):
        experts_of(text.encode(), np.array(TOKENS), (2, 2), 4, "file:7")


def test_the_experts_of_a_line_are_ascending() -> None:
    found = experts_of(
        json.dumps({"prompt_token_ids": TOKENS, "routed_experts": EXPERTS}).encode(), np.array(TOKENS), (2, 2), 4, ""
    )
    assert found.tolist() == np.sort(EXPERTS).tolist()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (["statistics.recorded={forget: a}"], "statistics.recorded names a file for each of forget, retain"),
        (["statistics.recorded={forget: a, retain: b}", "statistics.nll=true"], "statistics.nll needs the model"),
        (
            ["statistics.recorded={forget: a, retain: b}", "calibration.detection.method=top_gate_mass"],
            "top_gate_mass needs the model",
        ),
    ],
)
def test_what_only_the_model_tells_is_refused(
    changes: list[str], problem: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=problem):
        load_config(str(tiny.write_config(tmp_path, tiny_model)), changes)
