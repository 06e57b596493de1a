"""``trace-ds demo``: real data, a model trained on the spot, and then the ordinary pipeline, nothing special.

runs/demo/corpora/            forget, retain and held-out text from pip packages
runs/demo/models/original     a small Mixtral that knows the facts and the verses
runs/demo/models/gold         the same, trained without the forget set
runs/demo/…                   a run of the recipe ``demo`` (knowledge task) with its variants
runs/demo/verbatim/…          a run of the recipe ``demo_verbatim``
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from trace_ds.demo.corpora import Regime
from trace_ds.demo.facts import PACKAGES
from trace_ds.errors import JobFailed, UserError
from trace_ds.models.families import model_fingerprint
from trace_ds.run import artefact, ours
from trace_ds.run.directory import locked
from trace_ds.run.files import remove_directory, remove_leftovers, replacing_directory, write_json
from trace_ds.run.log import Progress, StageLog

MODELS = ("original", "gold")
FREE_BYTES_NEEDED = 1_500_000_000


def demo(run_dir: Path, overrides: Sequence[str], seed: int) -> int:
    """Run everything; returns the exit status. A rerun goes on where an earlier one ended."""
    from rich.console import Console

    from trace_ds.stages.pipeline import Request, run_verb
    from trace_ds.stages.report import summary

    began_s = time.monotonic()
    preflight(run_dir)
    # What an earlier demo of another seed, package version or recipe left here is made anew.
    changes = [f"seed={seed}", "unlearning.resume=replace", *machine_overrides(), *overrides]
    requests = [
        Request.load("demo", changes, run_dir),
        Request.load("demo_verbatim", changes, run_dir / "verbatim"),
    ]
    for request in requests:
        request.check_places()
    require_inputs_ours(run_dir)
    with locked(requests[0].run):
        remove_input_leftovers(run_dir)
        prepare_inputs(run_dir, seed)
    for request in requests:
        status = run_verb("run", request)
        if status:
            return status
    console = Console()
    for request in requests:
        console.print()
        for part in summary(request.run):
            console.print(part)
    minutes = (time.monotonic() - began_s) / 60
    console.print(f"\nReports ({minutes:.1f} minutes):")
    for request in requests:
        console.print(f"  {request.run.report / 'index.html'}", soft_wrap=True)
    return 0


def preflight(run_dir: Path) -> None:
    """Say what is missing before any work is done."""
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise UserError(
            f"the demo's data packages are missing: {', '.join(missing)}", "", f"pip install {' '.join(missing)}"
        )
    existing = run_dir.absolute()
    while not existing.exists():
        existing = existing.parent
    if not os.access(existing, os.W_OK):
        raise UserError("cannot write here", str(existing), "choose another --run-dir")
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES_NEEDED:
        raise UserError(
            f"{free / 1e9:.1f} GB free, the demo needs {FREE_BYTES_NEEDED / 1e9:.1f} GB",
            str(existing),
            "free space, or choose another --run-dir",
        )


def machine_overrides() -> list[str]:
    """On a machine with one accelerator a job has one process (the recipe asks for two)."""
    from trace_ds.parallel.environment import accelerator_count

    return ["distributed.nproc=1", "distributed.ep=1"] if accelerator_count() == 1 else []


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def input_versions() -> dict[str, str]:
    """The versions of the packages that the corpora are made of."""
    return {name: metadata.version(name) for name in PACKAGES}


def prepare_inputs(run_dir: Path, seed: int, regime: Regime = "standard", models: Sequence[str] = MODELS) -> None:
    """The corpora and ``models`` under ``run_dir`` (each skipped when it is there)."""
    corpora = prepare_corpora(run_dir, seed, regime)
    if models:
        _models(run_dir, corpora.content, seed, models)


def require_inputs_ours(run_dir: Path) -> None:
    """Refuse corpora and models under ``run_dir`` that no :func:`prepare_inputs` made."""
    ours.require_directory(run_dir / "corpora", ours.artefact("demo_corpora"))
    ours.require_folders(run_dir / "models")
    for name in MODELS:
        ours.require_directory(run_dir / "models" / name, ours.demo_model)
        ours.require_file(run_dir / "models" / f"{name}.json", ours.is_described("corpora", "seed"))


def remove_input_leftovers(run_dir: Path) -> None:
    """Delete what a killed :func:`prepare_inputs` left; nobody else may be at work there."""
    remove_leftovers(run_dir, "corpora")
    names = "|".join(MODELS)
    remove_leftovers(run_dir / "models", rf"{names}|(?:{names})\.json")


def prepare_corpora(run_dir: Path, seed: int, regime: Regime = "standard") -> artefact.Artefact:
    """The corpora of a seed in ``RUN/corpora`` (skipped when they are there)."""
    from trace_ds.demo.corpora import build_corpora

    directory = run_dir / "corpora"
    inputs = input_versions()
    settings = {"seed": seed, "regime": regime}
    if not artefact.is_done(directory, "demo_corpora", artefact.identity_of("demo_corpora", inputs, settings)):
        print("[demo] building corpora from the data of pip packages", flush=True)
        with replacing_directory(directory, ours.artefact("demo_corpora")) as temporary:
            summary = build_corpora(temporary, seed, regime)
            artefact.describe(temporary, "demo_corpora", inputs, settings, {"documents": summary.documents})
    return artefact.load(directory, "demo_corpora", "demo")


def _models(run_dir: Path, corpora: str, seed: int, names: Sequence[str]) -> None:
    """Train the original and the gold model (those of ``names``) side by side, one thread each."""
    folder = run_dir / "models"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = {name: {"corpora": corpora, "seed": seed, "fingerprint": ""} for name in names}
    todo = [name for name in names if not _model_is_done(folder, name, wanted[name])]
    if not todo:
        return
    for name in todo:
        remove_directory(folder / name, ours.demo_model)
    print(f"[demo] training {' and '.join(todo)}: a small Mixtral, from scratch, one CPU thread each", flush=True)
    _train(run_dir / "corpora", folder, todo, seed)
    for name in todo:
        write_json(folder / f"{name}.json", wanted[name] | {"fingerprint": model_fingerprint(folder / name)})


def _model_is_done(folder: Path, name: str, wanted: dict[str, object]) -> bool:
    try:
        found = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        return found == wanted | {"fingerprint": model_fingerprint(folder / name)}
    except (OSError, ValueError, UserError):
        return False


def _train(corpora: Path, folder: Path, names: list[str], seed: int) -> None:
    from trace_ds.parallel.launch import die_with_parent

    children: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in names:
            command = [sys.executable, "-m", "trace_ds.demo.pretrain", str(corpora), str(folder / name)]
            command += ["--seed", str(seed)] + (["--gold"] if name == "gold" else [])
            children[name] = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                preexec_fn=die_with_parent,
            )
        errors: dict[str, UserError] = {}
        threads = []
        for name, child in children.items():
            log = StageLog("demo", folder.parent / "logs" / f"pretrain_{name}.jsonl", None)
            threads.append(threading.Thread(target=_follow, args=(name, child, log, errors)))
            threads[-1].start()
        for thread in threads:
            thread.join()
        for name, child in children.items():
            if child.wait() and name in errors:
                raise errors[name]
            if child.returncode:  # it has shown a traceback, or was killed
                raise JobFailed(f"training the {name} model ended with exit status {child.returncode}")
    finally:
        for child in children.values():
            if child.poll() is None:
                child.kill()
            child.wait()


def _follow(name: str, child: subprocess.Popen[str], log: StageLog, errors: dict[str, UserError]) -> None:
    """Show how far the training of a model is until it closes its output; what ended it early goes into ``errors``."""
    progress: Progress | None = None
    for line in child.stdout or ():
        try:
            state = json.loads(line)
        except ValueError:
            continue
        if "error" in state:
            errors[name] = UserError(*state["error"])
            break
        progress = progress or Progress(log, name, state["of"])
        progress.advance(loss=state["loss"])
    if progress is not None:
        progress.close()
    log.close()
