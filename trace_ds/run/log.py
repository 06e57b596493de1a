"""What a stage tells while it works: lines for people, JSONL and TensorBoard scalars for tools, an estimate.

Logs carry times; artefacts never do. Only the main process (rank 0) logs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trace_ds.run.directory import RunDirectory

LINE_EVERY_S = 20.0


class StageLog:
    """The log of one stage of one run: ``RUN/logs/STAGE.jsonl`` and, for scalars, ``RUN/tb/STAGE``."""

    def __init__(self, stage: str, path: Path | None, tb: Path | None) -> None:
        self.stage = stage
        self._path = path
        self._tb = tb
        self._writer: Any = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8") if path is not None else None

    def line(self, text: str) -> None:
        """One line for people, also kept in the JSONL log."""
        if self._file is None:
            return
        print(f"[{self.stage}] {text}", flush=True)
        self.event("line", text=text)

    def event(self, kind: str, **values: Any) -> None:
        """One JSONL record (``time_s`` is Unix time)."""
        if self._file is None:
            return
        self._file.write(json.dumps({"event": kind, "time_s": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def scalars(self, step: int, **values: float) -> None:
        """Numbers of a step, into the JSONL log and TensorBoard."""
        self._numbers("step", step, values)

    def evaluation(self, step: int, **values: float) -> None:
        """Numbers of an evaluation after a step, likewise."""
        self._numbers("evaluation", step, values)

    def _numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        if self._file is None:
            return
        self.event(kind, step=step, **values)
        if self._writer is None and self._tb is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tb))
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def drop_scalars_after(self, step: int) -> None:
        """Forget the steps after ``step`` that a job which resumes there is about to repeat."""
        if self._file is None or self._path is None:
            return
        from trace_ds.run.files import write_text

        kept = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a torn last line of a killed job
                record = json.loads(text)
                if record.get("event") not in ("step", "evaluation") or record["step"] <= step:
                    kept.append(text + "\n")
        self._file.close()
        write_text(self._path, "".join(kept))
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def stage_log(run: RunDirectory, stage: str, *, enabled: bool = True) -> Iterator[StageLog]:
    """The log of ``stage``; with ``enabled=False`` (other ranks) one that says nothing."""
    log = StageLog(stage, run.logs / f"{stage}.jsonl", run.tb / stage) if enabled else StageLog(stage, None, None)
    try:
        yield log
    finally:
        log.close()


class Progress:
    """A progress bar with an estimate on a terminal, a plain line every :data:`LINE_EVERY_S` elsewhere."""

    def __init__(self, log: StageLog, what: str, total: int, *, start: int = 0, unit: str = "step") -> None:
        self._log, self._what, self._total, self._unit = log, what, total, unit
        self._done = self._start = start
        self._began_s = self._told_s = time.monotonic()
        self._enabled = log._file is not None
        self._bar: Any = None
        if self._enabled and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, desc=what, unit=unit, dynamic_ncols=True)

    def advance(self, count: int = 1, **shown: float) -> None:
        self._done += count
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(count)
            return
        now_s = time.monotonic()
        if now_s - self._told_s >= LINE_EVERY_S:
            self._told_s = now_s
            rate = (self._done - self._start) / max(now_s - self._began_s, 1e-9)
            left_s = (self._total - self._done) / max(rate, 1e-9)
            extra = "".join(f", {name} {value:.4g}" for name, value in shown.items())
            self._log.line(
                f"{self._what}: {self._done:,}/{self._total:,} {self._unit}s, {rate:,.1f}/s, "
                f"about {left_s:,.0f} s left{extra}"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
