"""What a person sees on the terminal: one line a stage, no library's own words, completion."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from command import environment, run
from forked import Server
from tiny import write_config

from trace_ds.run import log
from trace_ds.run.directory import RunDirectory
from trace_ds.terminal import VERBOSE


def test_a_stage_tells_one_line_and_its_log_everything(server: Server, tiny_model: Path, tmp_path: Path) -> None:
    write_config(tmp_path, tiny_model)
    command = ["prepare", "config.yaml", "--run-dir", "run"]
    first, second = (server.run(command, tmp_path) for _ in range(2))
    assert (first.returncode, first.stderr, second.stderr) == (0, "", "")
    result = r"\[prepare\] forget \d+ documents, [\d,]+ tokens; retain \d+ documents, [\d,]+ tokens \([\d.]+ s\)\n"
    assert re.fullmatch(result, first.stdout), first.stdout
    assert second.stdout == "[prepare] already done\n"
    kept = [json.loads(line)["text"] for line in (tmp_path / "run/logs/prepare.jsonl").read_text().splitlines()]
    assert len(kept) == 3 and "documents split at 24 tokens" in kept[0]  # a line a corpus, and the one that was shown
    summary = server.run([*command[:3], "other", "-v"], tmp_path).stdout.splitlines()
    assert [line.partition("] ")[2] for line in summary[:2]] == kept[:2] and len(summary) == 3


def test_variants_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VERBOSE, raising=False)
    monkeypatch.setattr(log.time, "time", lambda: 1042.0)
    for run_directory in (
        RunDirectory(tmp_path / "run" / "variants" / "even", tmp_path / "run"),
        RunDirectory(tmp_path),
    ):
        with log.stage_log(run_directory, "unlearn") as stage:
            stage.detail("world size 2")
            stage.done("100 steps")
        log.already_done("unlearn", run_directory)
    assert capsys.readouterr().out.splitlines() == [
        "[unlearn even] 100 steps (0.10 s)",
        "[unlearn even] already done",
        "[unlearn] 100 steps (0.10 s)",
        "[unlearn] already done",
    ]


def test_a_bar_on_a_terminal_gives_way_to_lines_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    stage = log.StageLog("collect", tmp_path / "collect.jsonl", None)
    progress = log.Progress(stage, "rows", 4)
    stage.line("resumed")
    assert "rows:   0%|" in terminal.getvalue() and "0/4" in terminal.getvalue()
    progress.close()
    assert terminal.getvalue().rpartition("\r")[0].rpartition("\r")[2].strip() == ""
    assert capsys.readouterr().out == "[collect] resumed\n"


@pytest.mark.parametrize(("steps", "speed"), [(100, "2.0/s"), (10, "5.0 s/step")])
def test_progress_says_seconds_a_step_where_steps_are_slow(
    steps: int, speed: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, 50.0])
    monkeypatch.setattr(log.time, "monotonic", lambda: next(times, 50.0))
    stage = log.StageLog("unlearn", tmp_path / "unlearn.jsonl", None)
    log.Progress(stage, "steps", 200).advance(steps)
    assert f"steps: {steps}/200 steps, {speed}, about " in capsys.readouterr().out


def test_completion_can_be_installed_and_completes(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("trace-ds")
    variables = environment() | {"HOME": str(tmp_path)}
    command = f"{program} --install-completion bash && true"  # from bash: the shell that it runs in is looked for
    done = run(["bash", "-c", command], variables=variables)
    assert done.returncode == 0, done.stderr
    assert "_TRACE_DS_COMPLETE=complete_bash" in (tmp_path / ".bash_completions" / "trace-ds.sh").read_text()
    requested = {"_TRACE_DS_COMPLETE": "complete_bash", "COMP_WORDS": "trace-ds co", "COMP_CWORD": "1"}
    assert run([program], variables=variables | requested).stdout.split() == ["collect", "convert"]
    (tmp_path / "tofu_mine.yaml").touch()
    for words, expected in (
        ("trace-ds run tofu_", ["tofu_forget01", "tofu_forget05", "tofu_forget10", "tofu_mine.yaml"]),
        ("trace-ds plan wmdp_bio qwen3_2", ["qwen3_235b_a22b"]),
        ("trace-ds run demo --set finetune.s", ["finetune.steps="]),
        ("trace-ds bench demo --set unlearning.optimizer.s", ["unlearning.optimizer.schedule="]),
        ("trace-ds unlearn demo --set data.ret", ["data.retain="]),
    ):
        requested = {"_TRACE_DS_COMPLETE": "complete_bash", "COMP_WORDS": words}
        requested["COMP_CWORD"] = str(len(words.split()) - 1)
        assert run([program], variables=variables | requested, cwd=tmp_path).stdout.split() == expected, words
