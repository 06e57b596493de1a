"""What a stage tells while it works: lines for people, JSONL and TensorBoard scalars for tools, an estimate.

Logs carry times; artefacts never do. Only the main process (rank 0) logs.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from trace_ds.run.directory import RunDirectory

LINE_EVERY_S = 20.0


class StageLog:
    """The log of one stage of one run: ``RUN/logs/STAGE.jsonl`` and, for scalars, ``RUN/tb/STAGE``.

    Nothing is written before there is something to tell; ``begin`` is called then, once.
    """

    def __init__(
        self, stage: str, path: Path | None, tb: Path | None, begin: Callable[[], None] = lambda: None
    ) -> None:
        self.stage = stage
        self.enabled = path is not None
        self._path, self._tb, self._begin = path, tb, begin
        self._repeated_from: int | None = None  # the first step that a resumed job does again
        self._file: TextIO | None = None
        self._writer: Any = None

    def line(self, text: str) -> None:
        """One line for people, also kept in the JSONL log."""
        if self.enabled:
            print(f"[{self.stage}] {text}", flush=True)
            self.event("line", text=text)

    def event(self, kind: str, **values: Any) -> None:
        """One JSONL record (``time_s`` is Unix time)."""
        if self._path is None:
            return
        if self._file is None:
            self._begin()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
        self._file.write(json.dumps({"event": kind, "time_s": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def scalars(self, step: int, **values: float) -> None:
        """Numbers of a step, into the JSONL log and TensorBoard."""
        self._numbers("step", step, values)

    def evaluation(self, step: int, **values: float) -> None:
        """Numbers of an evaluation after a step, likewise."""
        self._numbers("evaluation", step, values)

    def _numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        self.event(kind, step=step, **values)
        if self._writer is None and self._tb is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tb), purge_step=self._repeated_from)
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def drop_scalars_after(self, step: int) -> None:
        """Forget the steps after ``step`` that a job which resumes there is about to repeat."""
        self._repeated_from = step + 1
        if self._path is None or not self._path.is_file():
            return
        from trace_ds.run.files import write_text

        kept = []
        for text in self._path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a torn last line of a killed job
                record = json.loads(text)
                if record.get("event") not in ("step", "evaluation") or record["step"] <= step:
                    kept.append(text + "\n")
        self._release()
        write_text(self._path, "".join(kept))

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._release()

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@contextlib.contextmanager
def stage_log(run: RunDirectory, stage: str, *, enabled: bool = True) -> Iterator[StageLog]:
    """The log of ``stage``, whose first line stores the run's configuration too; with ``enabled=False`` (other ranks)
    one that says nothing."""
    path = run.logs / f"{stage}.jsonl" if enabled else None
    log = StageLog(stage, path, run.tb / stage, run.store_config)
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
        self._enabled = log.enabled
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
