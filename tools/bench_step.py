#!/usr/bin/env python3
"""What a step of NPO and of RMU takes on two CPU processes, two micro-batches each, also against other commits.

    python tools/bench_step.py
    git worktree add --detach ../before COMMIT && python tools/bench_step.py --against ../before
    python tools/bench_step.py --hidden 64 --turns 2   # small: to see that it works

A Mixtral-shaped model (random weights, fp32, RMU's layer in the middle) and random corpora are made on the spot. Every
checkout prepares, collects and calibrates for itself; then a job of each (``unlearn --nproc 2``, ZeRO-3) works in turns
of some steps, and stands still while the others do (SIGSTOP), so that what else the machine does reaches all alike.
Per checkout, the medians of the turns: a step by the clock, the CPU time and the page faults of both processes. Against
another checkout, the median (and the quartiles) of the ratios of turns that followed each other.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench_unlearn import ROOT, WORDS, make_config

COSTS = ("step_s", "cpu_s", "faults")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def command(verb: str, config: Path, run: Path, *arguments: str) -> list[Any]:
    return [sys.executable, "-m", "trace_ds", verb, config, "--run-dir", run, *arguments]


def surroundings(checkout: Path) -> dict[str, Any]:
    return {"cwd": checkout, "env": os.environ | {"PYTHONPATH": str(checkout)}, "stdout": subprocess.DEVNULL}


class Job:
    """An endless job of two processes, which stand still outside its turns."""

    def __init__(self, checkout: Path, config: Path, run: Path, loss: str) -> None:
        self.log = run / "logs" / "unlearn.jsonl"
        self.log.unlink(missing_ok=True)
        settings = {"forget_loss": loss, "steps": 10**6, "save_every": 10**6, "resume": "never", "micro_batch_rows": 2}
        changes = [item for key, value in settings.items() for item in ("--set", f"unlearning.{key}={value}")]
        arguments = command("unlearn", config, run, "--nproc", "2", *changes)
        self.process = subprocess.Popen(arguments, **surroundings(checkout))
        self.wait_for(2)  # the first step learns the order of the modules
        started = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        self.ranks = [int(pid) for pid in started.split()]
        self.send(signal.SIGSTOP)

    def ends_s(self) -> list[float]:
        """When each step so far ended, Unix time."""
        text = self.log.read_text(encoding="utf-8") if self.log.exists() else ""
        records = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [record["time_s"] for record in records if record["event"] == "step"]

    def wait_for(self, steps: int) -> list[float]:
        while len(found := self.ends_s()) < steps:
            if self.process.poll() is not None:
                raise SystemExit(f"the job ended with status {self.process.returncode}: {self.process.args}")
            time.sleep(0.003)
        return found

    def send(self, number: int) -> None:
        for pid in self.ranks:
            os.kill(pid, number)

    def used(self) -> tuple[float, int]:
        """CPU seconds and page faults of both processes since they began."""
        fields = [Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split() for pid in self.ranks]
        return sum(int(f[11]) + int(f[12]) for f in fields) * TICK_S, sum(int(f[7]) for f in fields)

    def turn(self, steps: int) -> dict[str, float]:
        """Make so many steps; what one takes. The first is not timed by the clock: it began before the pause."""
        done, (cpu_s, faults) = len(self.ends_s()), self.used()
        self.send(signal.SIGCONT)
        ends_s = self.wait_for(done + steps)
        self.send(signal.SIGSTOP)
        made, after = len(ends_s) - done, self.used()
        wall_s = (ends_s[-1] - ends_s[done]) / (made - 1)
        return dict(zip(COSTS, (wall_s, (after[0] - cpu_s) / made, (after[1] - faults) / made), strict=True))

    def end(self) -> None:
        self.process.kill()  # its ranks die with it
        self.process.wait()


def prepared(options: argparse.Namespace, work: Path) -> dict[str, tuple[Path, Path, Path]]:
    """The checkout, the configuration and the run directory, calibrated, of each checkout; what is there is kept."""
    heads = max(1, options.hidden // 64)
    shape = ("mixtral", options.hidden, 2 * options.hidden, 8, 2, heads, heads, options.layers, WORDS + 48)
    config = work / "config.yaml"
    if not config.exists():
        make_config(work, shape, options, "fp32")
    checkouts = {"here": ROOT, **{path.name: path.resolve() for path in options.against}}
    found = {name: (checkout, config, work / f"run-{name}") for name, checkout in checkouts.items()}
    for checkout, _, run in found.values():
        for verb, left in (("prepare", "data"), ("collect", "statistics/retain"), ("calibrate", "calibration")):
            if not (run / left).exists():
                subprocess.run(command(verb, config, run), check=True, **surroundings(checkout))
    return found


def measure(places: dict[str, tuple[Path, Path, Path]], loss: str, turns: int, steps: int) -> dict[str, Any]:
    jobs: dict[str, Job] = {}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in places}
    try:
        for name, place in places.items():
            jobs[name] = Job(*place, loss)
        for number in range(turns):
            for name in sorted(jobs, key=list(jobs).index, reverse=number % 2 == 1):
                found[name].append(jobs[name].turn(steps))
                print(loss, name, *(f"{value:.3f}" for value in found[name][-1].values()), file=sys.stderr)
    finally:
        for job in jobs.values():
            job.end()
    return {name: compared(found["here"], turns_of, name == "here") for name, turns_of in found.items()}


def compared(here: list[dict[str, float]], found: list[dict[str, float]], same: bool) -> dict[str, Any]:
    """Medians of the turns, and the quartiles of the ratios here / there."""
    told: dict[str, Any] = {cost: statistics.median(turn[cost] for turn in found) for cost in COSTS}
    if not same:
        for cost in COSTS[:2]:
            ratios = [ours[cost] / theirs[cost] for ours, theirs in zip(here, found, strict=True)]
            told[f"here_over_it_{cost}"] = statistics.quantiles(ratios, n=4, method="inclusive")
    return told


def print_table(loss: str, found: dict[str, Any]) -> None:
    for name, told in found.items():
        cost = f"{told['step_s']:.3f} s, CPU {told['cpu_s']:.3f} s, {told['faults']:,.0f} page faults"
        print(f"{loss}, {name}: a step takes {cost}")
        for key, what in (("step_s", "time"), ("cpu_s", "CPU time")):
            if f"here_over_it_{key}" in told:
                low, middle, high = told[f"here_over_it_{key}"]
                print(f"    here / it: {what} x {middle:.3f} ({low:.3f} to {high:.3f})")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--against", type=Path, action="append", default=[], help="another checkout; may be repeated")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8, help="forget rows and retain rows of a step")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--turn-steps", type=int, default=6)
    parser.add_argument("--losses", nargs="+", default=["npo", "rmu"])
    parser.add_argument("--work-dir", type=Path, help="what is prepared stays there; default: a temporary directory")
    parser.set_defaults(threads=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # not without ending the jobs
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        places = prepared(options, (options.work_dir or Path(folder)).resolve())
        for loss in options.losses:
            result[loss] = measure(places, loss, options.turns, options.turn_steps)
            if not options.json:
                print_table(loss, result[loss])
    if options.json:
        print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
