"""The log of a stage: lines for people, JSONL and TensorBoard scalars for tools, progress with an estimate.

Logs carry times; artefacts never do. Only the main process (rank 0) logs.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from trace_ds.run.directory import RunDirectory
from trace_ds.terminal import duration, library_records, verbose

FIRST_LINE_S, LINE_EVERY_S = 20.0, 300.0  # of a log without a terminal: the time between lines doubles up to the second


class StageLog:
    """The log of one stage of one run: ``RUN/logs/STAGE.jsonl`` and, for scalars, ``RUN/tb/STAGE``.

    Nothing is written before there is something to tell; ``begin`` is called then, once. A stage that is done tells the
    terminal one line, what it found and how long it took; before it what a person must hear (:meth:`line`), and, when
    asked for, everything (:meth:`detail`).
    """

    def __init__(
        self, stage: str, path: Path | None, tb: Path | None, begin: Callable[[], None] = lambda: None
    ) -> None:
        self.stage = stage  # with the name of the variant
        self.enabled = path is not None
        self.last: dict[str, float] = {}  # the numbers of the last step
        self._began_s = time.time()
        self._path, self._tb, self._begin = path, tb, begin
        self._repeated_from: int | None = None  # the first step that a resumed job does again
        self._file: TextIO | None = None
        self._early: list[dict[str, str]] = []  # of libraries, before there was something to tell
        self._writer: Any = None

    def line(self, text: str) -> None:
        """One line for people, also kept in the JSONL log."""
        if self.enabled:
            _show(self.stage, text)
            self.event("line", text=text)

    def detail(self, text: str) -> None:
        """One line that the terminal shows with ``-v`` only."""
        if verbose():
            self.line(text)
        else:
            self.event("line", text=text)

    def done(self, text: str) -> None:
        """The line of a stage that is done: what it found, and how long it took."""
        self.line(f"{text} ({duration(max(time.time() - self._began_s, 0.1))})")

    def event(self, kind: str, **values: Any) -> None:
        """One JSONL record (``time_s`` is Unix time)."""
        if self._path is None:
            return
        if self._file is None:
            self._begin()
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")
            early, self._early = self._early, []
            for values_of_library in early:
                self.event("library", **values_of_library)
        self._file.write(json.dumps({"event": kind, "time_s": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def library(self, name: str, level: str, text: str) -> None:
        """What a library logs, for the JSONL log; it begins none."""
        values = {"name": name, "level": level, "text": text}
        if self._file is None:
            self._early.append(values)
        else:
            self.event("library", **values)

    def scalars(self, step: int, **values: float) -> None:
        """Numbers of a step, into the JSONL log and TensorBoard."""
        self._numbers("step", step, values)

    def evaluation(self, step: int, **values: float) -> None:
        """Numbers of an evaluation after a step, likewise."""
        self._numbers("evaluation", step, values)

    def _numbers(self, kind: str, step: int, values: dict[str, float]) -> None:
        if not self.enabled:
            return
        self.last = values if kind == "step" else self.last
        self.event(kind, step=step, **values)
        if self._writer is None and self._tb is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._tb), purge_step=self._repeated_from)
        for name, value in values.items():
            if self._writer is not None:
                self._writer.add_scalar(name, value, step)

    def hyperparameters(self, settings: Mapping[str, Any]) -> None:
        """The settings of a finished job and its last losses, for TensorBoard's table of runs.

        Args:
            settings: nested; values that are no number, text or bool are shown as JSON.
        """
        if self._writer is not None:
            results = {f"final/{name}": value for name, value in self.last.items() if "loss" in name}
            # "." keeps the table's entry in the stage's own folder: otherwise it is a run of its own, named by the time
            self._writer.add_hparams(_flat(settings), results, run_name=".")

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


class _LibraryHandler(logging.Handler):
    def __init__(self, log: StageLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.library(record.name, record.levelname, record.getMessage())
        except Exception:  # as every handler: a message must not end what is logged
            self.handleError(record)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
    return flat


@contextlib.contextmanager
def stage_log(run: RunDirectory, stage: str, *, enabled: bool = True) -> Iterator[StageLog]:
    """The log of ``stage``, with what libraries log meanwhile; its first line stores the run's configuration too. With
    ``enabled=False`` (other ranks) one that says nothing."""
    path = run.logs / f"{stage}.jsonl" if enabled else None
    log = StageLog(_named(stage, run), path, run.tb / stage, run.store_config)
    try:
        with library_records(_LibraryHandler(log)) if enabled else contextlib.nullcontext():
            yield log
    finally:
        log.close()


def already_done(stage: str, run: RunDirectory) -> None:
    """Print that a stage had nothing to do (the log of the run is left as it is)."""
    _show(_named(stage, run), "already done")


def _named(stage: str, run: RunDirectory) -> str:
    return stage if run.parent is None else f"{stage} {run.path.name}"


def _show(stage: str, text: str) -> None:
    if sys.stderr.isatty():
        from tqdm import tqdm

        tqdm.write(f"[{stage}] {text}")  # above a progress bar
    else:
        print(f"[{stage}] {text}", flush=True)


class Progress:
    """A progress bar with an estimate on a terminal; elsewhere plain lines, ever more seldom."""

    def __init__(self, log: StageLog, label: str, total: int, *, start: int = 0, unit: str = "step") -> None:
        self._log, self._label, self._total, self._unit = log, label, total, unit
        self._done = self._start = start
        self._began_s = time.monotonic()
        self._next_s = self._began_s + FIRST_LINE_S
        self._enabled = log.enabled
        self._bar: Any = None
        if self._enabled and sys.stderr.isatty():
            from tqdm import tqdm

            shown = {"desc": label, "unit": unit, "unit_scale": unit == "byte", "dynamic_ncols": True, "leave": False}
            self._bar = tqdm(total=total, initial=start, **shown)

    def advance(self, count: int = 1, **shown: float) -> None:
        """Count ``count`` more done, and show these numbers beside the progress."""
        self._done += count
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.set_postfix({name: f"{value:.4g}" for name, value in shown.items()}, refresh=False)
            self._bar.update(count)
            return
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + min(now_s - self._began_s, LINE_EVERY_S)
            rate = (self._done - self._start) / max(now_s - self._began_s, 1e-9)
            left_s = (self._total - self._done) / max(rate, 1e-9)
            speed = f"{rate:,.1f}/s" if rate >= 1 else f"{1 / max(rate, 1e-9):,.1f} s/{self._unit}"
            extra = "".join(f", {name} {value:.4g}" for name, value in shown.items())
            self._log.line(
                f"{self._label}: {self._done:,}/{self._total:,} {self._unit}s, {speed}, "
                f"about {left_s:,.0f} s left{extra}"
            )

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def byte_progress(log: StageLog) -> Callable[[int, int], None]:
    """The progress of what calls back with (bytes done, bytes of all)."""
    shown: list[Progress] = []
    before = 0

    def advance(done_bytes: int, total_bytes: int) -> None:
        nonlocal before
        if not shown:
            shown.append(Progress(log, "weights", total_bytes, unit="byte"))
        shown[0].advance(done_bytes - before)
        before = done_bytes
        if done_bytes >= total_bytes:
            shown[0].close()

    return advance
