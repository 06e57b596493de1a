"""Saving and loading a job's state through DeepSpeed, so that no crash leaves half a checkpoint.

1. all ranks write their state into step_N.tmp-ID/ (DeepSpeed, save_latest=False), hash what they write and fsync it
2. all ranks agree that all is written; 3. the main process writes manifest.json, last
4. rename to step_N/ and fsync the directory; 5. replace ``latest``; 6. prune, never the newest two
"""

from __future__ import annotations

import functools
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trace_ds.checkpoints.manifest import (
    STEP,
    Manifest,
    complete_steps,
    point_latest,
    read_manifest,
    step_name,
    verify,
    wrong_latest,
)
from trace_ds.errors import JobFailed, UserError
from trace_ds.run.files import MANIFEST, fsync_directory, require_directory

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog


def save(engine: Any, world: World, checkpoints: Path, manifest: Manifest, *, keep: int, log: StageLog) -> None:
    """Save the state of a job's engine by the protocol above (collective).

    Args:
        manifest: everything but ``files``.
        keep: newest checkpoints kept, at least 2.
        log: gets an event, with how long training stood still for it.

    Raises:
        OSError: this rank could not write (AgreedError: another one could not); no checkpoint is there then.
    """
    from trace_ds.checkpoints.serialization import frozen_experts_left_out

    began_s = time.monotonic()
    temporary = Path(world.broadcast(str(checkpoints / f"{step_name(manifest.step)}.tmp-{os.getpid()}")))

    def begin() -> None:
        if world.is_main:
            checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)

    world.run_on_all_ranks(begin)
    files = engine.checkpoint_engine.files
    files.begin()
    engine._copy_recovery_script = lambda folder: None  # no zero_to_fp32.py in each checkpoint
    with frozen_experts_left_out(engine):
        engine.save_checkpoint(
            str(checkpoints),
            tag=temporary.name,
            client_state={"trace_ds_step": manifest.step},
            save_latest=False,
            exclude_frozen_parameters=True,  # they are the base model's, which every job starts from
        )
    root = os.path.abspath(temporary)
    written = {os.path.relpath(path, root): entry for path, entry in world.run_on_all_ranks(files.finish).items()}
    parts = world.gather(written)

    def publish() -> None:
        if not world.is_main:
            return
        replace(manifest, files={name: entry for part in parts for name, entry in part.items()}).write(temporary)
        fsync_directory(temporary)
        destination = checkpoints / step_name(manifest.step)
        if destination.exists():  # left by a kill between two of these lines in an earlier attempt
            set_aside(destination)
        os.replace(temporary, destination)
        fsync_directory(checkpoints)
        settle(checkpoints, manifest.step, keep)

    world.run_on_all_ranks(publish)
    log.event("checkpoint", step=manifest.step, waited_s=round(time.monotonic() - began_s, 3))


def settle(checkpoints: Path, step: int, keep: int) -> None:
    """Steps 5 and 6 for a renamed checkpoint: at once, or later if a kill came between."""
    point_latest(checkpoints, step)
    for old in complete_steps(checkpoints)[0][: -max(keep, 2)]:
        discard(checkpoints / step_name(old))


def discard(path: Path) -> None:
    """Delete a checkpoint; if killed midway, the next start removes the rest; no damaged checkpoint remains.

    Raises:
        UserError: it has no manifest, so it may be somebody else's.
    """
    require_directory(path, MANIFEST)
    doomed = path.with_name(f"{path.name}.tmp-old-{os.getpid()}")  # the new one of the step is .tmp-PID
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint so that nothing counts, prunes or replaces it; return the new path."""
    numbers = (path.with_name(f"{path.name}.unreadable-{number}") for number in range(1, 1 << 20))
    aside = next(place for place in numbers if not place.exists())
    os.replace(path, aside)
    return aside


def discard_all(checkpoints: Path) -> None:
    """Delete every checkpoint; a step without our manifest is set aside instead."""
    for path in [path for path in checkpoints.glob("step_*") if STEP.fullmatch(path.name)]:
        if (path / MANIFEST).is_file():
            discard(path)
        else:
            set_aside(path)
    (checkpoints / "latest").unlink(missing_ok=True)


def choose(
    world: World, checkpoints: Path, job: str, resume: str, section: str = "unlearning"
) -> tuple[Manifest | None, list[str]]:
    """Choose the checkpoint to resume from (None: start at step 0); and warnings about damaged ones (collective).

    Every file of the newest complete checkpoint is hashed and its shards are read, the ranks sharing the work.
    Damaged ones are reported and set aside, never deleted; the next older one is tried. When none could be read,
    nothing is touched: a job that has saved something does not start over by itself.

    Args:
        job: identity of this job; a checkpoint of another job is refused.
        resume: ``auto``, ``required`` (no checkpoint is an error), ``never`` (existing ones are deleted) or ``replace``
            (as auto, but checkpoints of another job are deleted).
    """
    if resume == "never":
        if world.is_main:
            discard_all(checkpoints)
        return None, []
    # one listing for all ranks: another node may see a stale one
    steps, problems = world.broadcast(complete_steps(checkpoints) if world.is_main else ([], []))
    chosen = _newest_undamaged(world, checkpoints, steps, problems)
    unreadable = list(problems)
    problems += world.broadcast(wrong_latest(checkpoints, steps) if world.is_main else [])
    if chosen is not None and chosen.job != job and resume == "replace":
        if world.is_main:
            discard_all(checkpoints)
        return None, [f"{checkpoints / step_name(chosen.step)} belongs to another job and was deleted; starting over"]
    world.run_on_main_and_broadcast(lambda: _check_job(checkpoints, chosen, job, resume, unreadable, section))
    if chosen is not None and problems:
        problems += world.broadcast(_set_newer_aside(checkpoints, chosen.step) if world.is_main else [])
        problems.append(f"resuming from the newest complete checkpoint, step {chosen.step}")
    return chosen, problems


def _set_newer_aside(checkpoints: Path, step: int) -> list[str]:
    """Set checkpoints after ``step`` aside; return a line for each."""
    newer = [path for path in checkpoints.glob("step_*") if (m := STEP.fullmatch(path.name)) and int(m[1]) > step]
    return [f"{path}: set aside as {set_aside(path).name}" for path in sorted(newer)]


def _check_job(
    checkpoints: Path, chosen: Manifest | None, job: str, resume: str, unreadable: list[str], section: str
) -> None:
    start_over = f"start over with --set {section}.resume=never"
    if chosen is None and resume == "required":
        reason = f" ({unreadable[0]})" if unreadable else ""
        problem = f"there is no complete checkpoint to resume from{reason}"
        raise UserError(problem, str(checkpoints), f"use {section}.resume: auto")
    if chosen is None and unreadable:
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise UserError(
            f"no checkpoint here can be read, and a job that has saved something does not start over by itself "
            f"({unreadable[0].split('. Fix:')[0]}{more})",
            str(checkpoints),
            f"restore the files, or delete these checkpoints and {start_over}",
        )
    if chosen is not None and chosen.job != job:
        problem = "this checkpoint belongs to another job (its model, data, calibration, seed or settings differ)"
        raise UserError(
            problem, str(checkpoints / step_name(chosen.step)), f"choose another --run-dir, or {start_over}"
        )


def _newest_undamaged(world: World, checkpoints: Path, steps: list[int], problems: list[str]) -> Manifest | None:
    """The newest of the complete ``steps`` in which nothing is damaged (collective); newer ones are taken off
    ``steps``, and ``problems`` gets a line for each that is damaged."""
    while steps:
        directory = checkpoints / step_name(steps[-1])
        manifest = world.run_on_main_and_broadcast(functools.partial(read_manifest, directory))
        damage = [line for line in world.gather(_damage(directory, manifest, world)) if line]
        problems += damage[:1]
        if not damage:
            return manifest
        steps.pop()
    return None


def _damage(directory: Path, manifest: Manifest, world: World) -> str:
    """The damage in this rank's share of the files, in one line (empty: none)."""
    from trace_ds.checkpoints import serialization

    try:
        verify(directory, manifest, hashes=True, part=world.rank, parts=world.size)
        for name in sorted(manifest.files)[world.rank :: world.size]:
            if name.endswith(".pt"):
                serialization.open_shard(directory / name)
    except UserError as error:
        return error.line()
    except OSError as error:
        return f"{directory}: cannot be read ({error.strerror})"
    return ""


def load_on_all_ranks(
    world: World,
    checkpoints: Path,
    chosen: Manifest,
    load: Callable[[Manifest], None],
    section: str = "unlearning",
) -> None:
    """Load a verified checkpoint into the engine (collective); all ranks learn that one of them could not.

    Raises:
        JobFailed: a rank could not load it.
    """
    if problem := next((line for line in world.gather(_failure(load, chosen)) if line), ""):
        raise JobFailed(
            f"{checkpoints / step_name(chosen.step)} could not be loaded: {problem}. Fix: move it away to go on from "
            f"the checkpoint before it, or start over with --set {section}.resume=never"
        )


def _failure(load: Callable[[Manifest], None], manifest: Manifest) -> str:
    """The error that kept this rank from loading (empty: none)."""
    try:
        load(manifest)
    except Exception as error:  # DeepSpeed raises anything on a state that is not what it expects
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def load_state(engine: Any, folder: Path, tag: str, step: int) -> None:
    """Load what a tag holds into the engine; DeepSpeed's silent (None, None) is an error."""
    frozen = any(not parameter.requires_grad for parameter in engine.module.parameters())
    # a checkpoint is without frozen parameters: the engine has the base model's
    path, state = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=not frozen)
    if path is None or state is None or state.get("trace_ds_step") != step:
        raise RuntimeError(f"DeepSpeed did not load {folder / tag}")
