"""The log of a stage: nothing before there is something to tell, and no step twice after a resume."""

from __future__ import annotations

import json
from pathlib import Path

from trace_ds.run.directory import RunDirectory
from trace_ds.run.log import stage_log


def test_nothing_is_written_before_the_first_line(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", config_text="name: a\n")
    with stage_log(run, "collect") as log:
        assert not list(tmp_path.iterdir())
        log.line("begun")
    assert run.config.read_text() == "name: a\n"
    assert json.loads((run.logs / "collect.jsonl").read_text())["text"] == "begun"
    with stage_log(RunDirectory(tmp_path / "other"), "collect", enabled=False) as log:
        log.line("said by another rank")
        log.scalars(1, loss=1.0)
    assert not (tmp_path / "other").exists()


def test_a_resumed_job_leaves_no_step_twice(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunDirectory(tmp_path)
    for resumed_after, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        with stage_log(run, "unlearn") as log:
            log.drop_scalars_after(resumed_after)
            for step in steps:
                log.scalars(step, loss=float(10 * resumed_after + step))
    expected = [(1, 1.0), (2, 2.0), (3, 23.0), (4, 24.0), (5, 25.0)]
    records = [json.loads(line) for line in (run.logs / "unlearn.jsonl").read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == expected
    events = EventAccumulator(str(run.tb / "unlearn"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == expected
