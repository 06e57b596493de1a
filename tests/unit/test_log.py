"""The log of a stage: nothing before there is something to tell, and no step twice after a resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_what_libraries_log_is_kept_in_the_stages_log(tmp_path: Path) -> None:
    """In a process where they are new, so that they set up their loggers inside the stage; the terminal stays empty."""
    code = (
        "import logging, sys\nfrom pathlib import Path\nfrom trace_ds.run.directory import RunDirectory\n"
        "from trace_ds.run.log import stage_log\nfrom trace_ds.terminal import quiet_libraries\n"
        "quiet_libraries()\n"
        "logging.getLogger('DeepSpeed').warning('Setting accelerator to CPU')\n"
        "with stage_log(RunDirectory(Path(sys.argv[1])), 'collect') as log:\n"
        "    import datasets, transformers, huggingface_hub, deepspeed.utils\n"
        "    from transformers.utils import logging as own\n"
        "    own.get_logger('transformers.models').warning('early %d', 1)\n"
        "    logging.basicConfig()\n"
        "    assert not Path(sys.argv[1]).exists()\n"
        "    log.event('begun')\n"
        "    for name in ('datasets.builder', 'huggingface_hub.file_download', 'DeepSpeed'):\n"
        "        logging.getLogger(name).warning('late')\n"
        "        logging.getLogger(name).info('too much')\n"
        "logging.getLogger('datasets').warning('no stage')\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.endswith("_VERBOSITY")}
    environment["CI"] = "true"  # transformers passes its records on to the root logger then
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "run"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 and done.stdout + done.stderr == "", done
    records = [json.loads(line) for line in (tmp_path / "run" / "logs" / "collect.jsonl").read_text().splitlines()]
    logged = [(record["name"], record["text"]) for record in records if record["event"] == "library"]
    assert ("transformers.models", "early 1") in logged and all(record["time_s"] for record in records)
    assert [name for name, text in logged if text == "late"] == [
        *("datasets.builder", "huggingface_hub.file_download", "DeepSpeed")
    ]
    assert not {text for _, text in logged} & {"too much", "no stage"}


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
