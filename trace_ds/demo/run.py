"""``trace-ds demo``: real data, a model trained on the spot, and then the ordinary pipeline, nothing special.

runs/demo/corpora/            forget, retain and held-out text from pip packages
runs/demo/models/original     a small Mixtral that knows the facts and the verses
runs/demo/models/gold         the same, trained without the forget set
runs/demo/…                   a run of the recipe ``demo`` (knowledge task) with its variants
runs/demo/verbatim/…          a run of the recipe ``demo_verbatim``
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import metadata
from pathlib import Path

from trace_ds.demo.corpora import INSTALL_DEMO, PACKAGES, Regime
from trace_ds.demo.pretrain import STEPS
from trace_ds.errors import JobFailed, UserError
from trace_ds.parallel.launch import die_with_parent
from trace_ds.run import artefact
from trace_ds.run.directory import RunDirectory, locked, unwritable
from trace_ds.run.files import (
    ARTEFACT,
    DEMO_MODEL,
    remove_directory,
    remove_leftovers,
    replacing_directory,
    require_directory,
    write_json,
)
from trace_ds.run.foreign import read_object
from trace_ds.run.log import Progress, StageLog
from trace_ds.tensors.model_files import model_fingerprint
from trace_ds.terminal import quiet_libraries

MODELS = ("original", "gold")
FREE_BYTES_NEEDED = 1_500_000_000


def demo(run_dir: Path, overrides: Sequence[str], seed: int) -> int:
    """Run everything; returns the exit status. A rerun goes on where an earlier one ended."""
    from trace_ds.stages.pipeline import Request, run_verb

    began_s = time.monotonic()
    require_demo(run_dir)
    # What an earlier demo of another seed, package version or recipe left here is made anew.
    changes = [f"seed={seed}", "unlearning.resume=replace", *machine_overrides(), *overrides]
    requests = [
        Request.load("demo", changes, run_dir).with_variants("all"),
        Request.load("demo_verbatim", changes, run_dir / "verbatim").with_variants("all"),
    ]
    for request in requests:
        request.check_run_directory()
    require_inputs_ours(run_dir)
    with locked(requests[0].run):
        remove_input_leftovers(run_dir)
        prepare_inputs(run_dir, seed)
    for request in requests:
        print(f"\n{request.config.name}, in {request.run.path}:", flush=True)
        status = run_verb("run", request)
        if status:
            return status
    print_summary([request.run for request in requests], time.monotonic() - began_s)
    return 0


def print_summary(runs: Sequence[RunDirectory], took_s: float) -> None:
    """The end of the demo on the terminal: scores side by side, then what they show, and where there is more."""
    from rich import box
    from rich.columns import Columns
    from rich.console import Console
    from rich.text import Text

    from trace_ds.stages.report import report_summary

    console = Console(highlight=False, markup=False)
    tables, texts = zip(*(report_summary(run) for run in runs), strict=True)
    titles = [str(table.title) for table in tables]
    for table in tables:
        table.title, table.caption, table.box = None, None, box.SIMPLE_HEAD
        table.show_edge, table.pad_edge = False, False
    console.print("", Columns(tables, padding=(0, 2)), "", sep="\n")
    for title, text in zip(titles, texts, strict=True):
        console.print(Text.assemble((title, "bold"), f": {text.splitlines()[0]}"))
    console.print(f"{texts[-1].splitlines()[-1]}\n\nReports ({took_s / 60:.1f} minutes):")
    for run in runs:
        console.print(f"  {run.report / 'index.html'}", soft_wrap=True)


def require_demo(run_dir: Path) -> None:
    """Refuse missing packages, and a place without room, before any work is done."""
    versions = input_versions()
    missing = [name for name in PACKAGES if name not in versions]
    if missing:
        raise UserError(f"the demo's data packages are missing: {', '.join(missing)}", "", INSTALL_DEMO)
    existing = next(place for place in (run_dir.absolute(), *run_dir.absolute().parents) if place.exists())
    if not os.access(existing, os.W_OK):
        raise UserError("cannot write here", str(existing), "choose another --run-dir")
    free = shutil.disk_usage(existing).free
    if free < FREE_BYTES_NEEDED:
        problem = f"{free / 1e9:.1f} GB free, the demo needs {FREE_BYTES_NEEDED / 1e9:.1f} GB"
        raise UserError(problem, str(existing), "free space, or choose another --run-dir")


def machine_overrides() -> list[str]:
    """Overrides for a machine with one accelerator: one process a job (the recipe asks for two)."""
    from trace_ds.parallel.environment import accelerator_count

    return ["distributed.nproc=1", "distributed.ep=1"] if accelerator_count() == 1 else []


def input_versions() -> dict[str, str]:
    """The versions of the packages that the corpora are made of, as far as they are installed."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


def prepare_inputs(run_dir: Path, seed: int, regime: Regime = "standard", names: Sequence[str] = MODELS) -> None:
    """Make the corpora, and the models of these names, under ``run_dir`` (each skipped when it is there)."""
    from trace_ds.demo.corpora import build_corpora

    kind, directory, folder = "demo_corpora", run_dir / "corpora", run_dir / "models"
    inputs, settings = input_versions(), {"seed": seed, "regime": regime}
    if not artefact.is_done(directory, kind, artefact.identity_of(kind, inputs, settings)):
        log = StageLog("demo", run_dir / "logs" / "demo.jsonl", None)
        with contextlib.closing(log), replacing_directory(directory) as temporary:
            summary = {"documents": build_corpora(temporary, seed, regime)}
            artefact.describe(temporary, kind, inputs, settings, summary)
            log.done(f"corpora made of pip packages: {sum(summary['documents'].values()):,} documents and questions")
    made_of = {"corpora": artefact.load_artefact(directory, kind).content, "seed": seed}
    todo = [name for name in names if not _model_is_done(folder, name, made_of)]
    if todo:
        folder.mkdir(exist_ok=True)
        for name in todo:
            remove_directory(folder / name, DEMO_MODEL)
        _train(directory, folder, todo, seed)
        for name in todo:
            write_json(folder / f"{name}.json", made_of | {"fingerprint": model_fingerprint(folder / name)})


def require_inputs_ours(run_dir: Path) -> None:
    """Refuse corpora and models under ``run_dir`` that no :func:`prepare_inputs` made."""
    require_directory(run_dir / "corpora", ARTEFACT)
    for name in MODELS:
        require_directory(run_dir / "models" / name, DEMO_MODEL)


def remove_input_leftovers(run_dir: Path) -> None:
    """Delete what a killed :func:`prepare_inputs` left; nobody else may be at work there."""
    remove_leftovers(run_dir)
    remove_leftovers(run_dir / "models")


def _model_is_done(folder: Path, name: str, made_of: dict[str, object]) -> bool:
    try:
        note = read_object(folder / f"{name}.json", "the note beside the model", "")
        return note == made_of | {"fingerprint": model_fingerprint(folder / name)}
    except (OSError, UserError):
        return False


def _train(corpora: Path, folder: Path, names: Sequence[str], seed: int) -> None:
    """Train the models of these names side by side, each in a process of its own."""
    log = StageLog("demo", folder.parent / "logs" / "demo.jsonl", None)
    log.detail(f"training {' and '.join(names)}, {STEPS} steps each")
    context = multiprocessing.get_context("spawn")
    with contextlib.closing(log), ProcessPoolExecutor(len(names), context) as pool:
        trainings = {name: pool.submit(_pretrain, corpora, folder, names, name, seed) for name in names}
        try:
            ends = ", ".join(f"{name} to a loss of {each.result():.2f}" for name, each in trainings.items())
        except BrokenProcessPool:
            raise JobFailed("the training of a model was killed (out of memory?)") from None
        log.done(f"a small Mixtral trained from scratch, one CPU thread each: {ends}")


def _pretrain(corpora: Path, folder: Path, names: Sequence[str], name: str, seed: int) -> float:
    """In a process of its own: train one model and return its last loss; the first shows how far all of them are."""
    die_with_parent(multiprocessing.parent_process())
    os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    quiet_libraries()
    from trace_ds.demo.pretrain import pretrain

    log = StageLog("demo", folder.parent / "logs" / "demo.jsonl" if name == names[0] else None, None)
    progress = Progress(log, f"training {' and '.join(names)}", STEPS)
    with contextlib.closing(log), contextlib.closing(progress):
        try:
            training = pretrain(
                corpora, folder / name, gold=name == "gold", seed=seed, on_step=lambda loss: progress.advance(loss=loss)
            )
        except OSError as error:
            raise unwritable(folder / name, error) from None
    return float(training["losses"][-1])
