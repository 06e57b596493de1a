"""Saving and loading a job's state through DeepSpeed, so that no crash leaves half a checkpoint.

1. all ranks write into step_N.tmp-ID/ (DeepSpeed with save_latest=False)
2. each rank hashes what it writes and fsyncs its files
3. barrier; 4. the main process writes manifest.json, last
5. rename to step_N/ and fsync the directory; 6. replace ``latest``; 7. prune, never the newest two
"""

from __future__ import annotations

import contextlib
import os
import shutil
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
from trace_ds.run.files import fsync_directory, write_bytes
from trace_ds.run.ours import MANIFEST, checkpoint, require_directory

if TYPE_CHECKING:
    from trace_ds.parallel.world import World


def save(
    engine: Any, world: World, checkpoints: Path, manifest: Manifest, *, keep: int, keep_every: int | None
) -> None:
    """Write one checkpoint (collectively) by the protocol above and prune old ones.

    Args:
        engine: the DeepSpeed training engine.
        checkpoints: ``RUN/checkpoints``.
        manifest: everything but ``files``.
        keep: newest checkpoints kept, at least 2.
        keep_every: steps that are a multiple of it are never pruned.
    """
    name = step_name(manifest.step)
    temporary = Path(world.broadcast(str(checkpoints / f"{name}.tmp-{os.getpid()}")))
    if world.is_main:
        checkpoints.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
    world.barrier()
    engine._copy_recovery_script = lambda folder: leave_script(Path(folder), manifest)
    engine.save_checkpoint(str(checkpoints), tag=temporary.name, client_state=client_state(manifest), save_latest=False)
    root = os.path.abspath(temporary)
    mine = {os.path.relpath(path, root): facts for path, facts in engine.checkpoint_engine.take().items()}
    files: dict[str, dict[str, Any]] = {}
    for part in world.gather(mine):
        files.update(part)
    if world.is_main:  # every rank has reported, so every file is on the disk
        replace(manifest, files=files).write(temporary)
        fsync_directory(temporary)
        destination = checkpoints / name
        if destination.exists():  # left by a kill between two of these lines in an earlier attempt
            set_aside(destination)
        os.replace(temporary, destination)
        fsync_directory(checkpoints)
        settle(checkpoints, manifest.step, keep, keep_every)
    world.barrier()


def client_state(manifest: Manifest) -> dict[str, Any]:
    """What is kept beside DeepSpeed's own state: our step, and what its converter to a universal checkpoint asks for
    (where experts are sharded DeepSpeed says that itself)."""
    from deepspeed.checkpoint import constants as theirs

    version = {theirs.UNIVERSAL_CHECKPOINT_VERSION_KEY: theirs.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    universal = {theirs.UNIVERSAL_CHECKPOINT_INFO: version} if manifest.ep == 1 else {}
    return {"trace_ds_step": manifest.step, **universal}


def leave_script(checkpoints: Path, manifest: Manifest) -> None:
    """Leave DeepSpeed's ``zero_to_fp32.py`` beside checkpoints that it can read (it joins no sharded experts:
    `trace-ds convert` reads all), in the place of nothing that is there."""
    from deepspeed.utils import zero_to_fp32

    script = Path(zero_to_fp32.__file__)
    if manifest.ep == 1 and not (checkpoints / script.name).exists():
        with contextlib.suppress(OSError):  # the checkpoint is what matters, and says so itself
            write_bytes(checkpoints / script.name, script.read_bytes())


def settle(checkpoints: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Steps 6 and 7 for a checkpoint that is there: after the rename, or later when a kill fell in between."""
    point_latest(checkpoints, step)
    prune(checkpoints, keep, keep_every)


def prune(checkpoints: Path, keep: int, keep_every: int | None) -> list[int]:
    """Delete old checkpoints; returns the steps deleted. The newest two always stay."""
    steps, _ = complete_steps(checkpoints)
    doomed = [step for step in steps[: -max(keep, 2)] if not (keep_every and step % keep_every == 0)]
    for step in doomed:
        with contextlib.suppress(UserError):  # it holds something of the user's: it stays
            discard(checkpoints / step_name(step))
    return doomed


def discard(path: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves what the next start removes, not a damaged checkpoint.

    Raises:
        UserError: it is not ours, or holds something that is not.
    """
    require_directory(path, checkpoint)
    doomed = path.with_name(f"{path.name}.tmp-old-{os.getpid()}")  # the new one of the step is .tmp-PID
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that could not be read, so that nothing counts, prunes or replaces it; its new place."""
    numbers = (path.with_name(f"{path.name}.unreadable-{number}") for number in range(1, 1 << 20))
    aside = next(place for place in numbers if not place.exists())
    os.replace(path, aside)
    return aside


def discard_all(checkpoints: Path) -> None:
    """Delete every checkpoint; a step that no manifest shows to be ours is set aside instead."""
    for path in [path for path in checkpoints.glob("step_*") if STEP.fullmatch(path.name)]:
        if (path / MANIFEST).is_file():
            discard(path)
        else:
            set_aside(path)
    (checkpoints / "latest").unlink(missing_ok=True)


def choose(
    world: World, checkpoints: Path, job: str, resume: str, section: str = "unlearning"
) -> tuple[Manifest | None, list[str]]:
    """The checkpoint to resume from (None: start at step 0) and loud lines about damaged ones (collective).

    Every file of the newest complete checkpoint is hashed, and its shards are looked through for what would not be
    loaded, the ranks sharing the work; a damaged one is named and the next older one is tried. What could not be read
    is set aside, never deleted. When nothing could be read, nothing is touched: a job that has saved something does
    not start over by itself.

    Args:
        job: identity of this job; a checkpoint of another job is refused.
        resume: ``auto``, ``required`` (no checkpoint is an error), ``never`` (existing ones are deleted) or ``replace``
            (as auto, but checkpoints of another job are deleted).
    """
    if resume == "never":
        if world.is_main:
            discard_all(checkpoints)
        return None, []
    steps, problems = world.broadcast(complete_steps(checkpoints) if world.is_main else ([], []))
    chosen = None
    while steps and chosen is None:
        manifest = _manifest_of(world, checkpoints, steps[-1])
        damage = [line for line in world.gather(_damage(checkpoints, manifest, world)) if line]
        if damage:
            problems.append(damage[0])
            steps.pop()
        else:
            chosen = manifest
    unreadable = list(problems)
    problems += world.broadcast(wrong_latest(checkpoints, steps) if world.is_main else [])
    if chosen is not None and chosen.job != job and resume == "replace":
        if world.is_main:
            discard_all(checkpoints)
        return None, [f"{checkpoints / step_name(chosen.step)} belongs to another job and was deleted; starting over"]
    world.agree(lambda: _check_job(checkpoints, chosen, job, resume, unreadable, section))
    if chosen is not None and problems:
        problems += world.broadcast(_set_newer_aside(checkpoints, chosen.step) if world.is_main else [])
        problems.append(f"resuming from the newest complete checkpoint, step {chosen.step}")
    return chosen, problems


def _set_newer_aside(checkpoints: Path, step: int) -> list[str]:
    """Set every checkpoint after ``step`` aside; a line for each."""
    newer = [path for path in checkpoints.glob("step_*") if (m := STEP.fullmatch(path.name)) and int(m[1]) > step]
    return [f"{path}: set aside as {set_aside(path).name}" for path in sorted(newer)]


def _check_job(
    checkpoints: Path, chosen: Manifest | None, job: str, resume: str, unreadable: list[str], section: str
) -> None:
    if chosen is None and unreadable and resume != "required":
        more = f", and {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        raise UserError(
            f"no checkpoint here can be read, and a job that has saved something does not start over by itself "
            f"({unreadable[0].split('. Fix:')[0]}{more})",
            str(checkpoints),
            f"restore the files, or delete these checkpoints and start over with --set {section}.resume=never",
        )
    if chosen is None and resume == "required":
        found = f" ({unreadable[0]})" if unreadable else ""
        raise UserError(
            f"there is no complete checkpoint to resume from{found}", str(checkpoints), f"use {section}.resume: auto"
        )
    if chosen is not None and chosen.job != job:
        raise UserError(
            "this checkpoint belongs to another job (its model, data, calibration, seed or settings differ)",
            str(checkpoints / step_name(chosen.step)),
            f"choose another --run-dir, or start over with --set {section}.resume=never",
        )


def _manifest_of(world: World, checkpoints: Path, step: int) -> Manifest:
    """The manifest of a complete step, read once and sent to every rank."""
    return world.broadcast_agreed(lambda: read_manifest(checkpoints / step_name(step)))


def _damage(checkpoints: Path, manifest: Manifest, world: World) -> str:
    """What is wrong with this rank's share of the files (empty: nothing)."""
    from trace_ds.checkpoints import serialization

    directory = checkpoints / step_name(manifest.step)
    try:
        verify(directory, manifest, hashes=True, part=world.rank, parts=world.size)
        for name in sorted(manifest.files)[world.rank :: world.size]:
            if name.endswith(".pt"):
                serialization.check(directory / name)
    except UserError as error:
        return error.line()
    except OSError as error:
        return f"{directory}: cannot be read ({error.strerror})"
    return ""


def load_newest(
    world: World,
    checkpoints: Path,
    chosen: Manifest,
    load_one: Callable[[Manifest], None],
    tell: Callable[[str], None],
    section: str = "unlearning",
) -> Manifest:
    """Load ``chosen``, or else the newest older checkpoint that can be loaded, into the engine (collective).

    Every rank learns that one of them could not load, so none waits for it; each failure is told before the next try.

    Args:
        load_one: loads a verified checkpoint, on every rank.

    Returns:
        The manifest of the one that was loaded.

    Raises:
        JobFailed: none could be loaded.
    """
    manifest: Manifest | None = chosen
    while manifest is not None:
        problem = next((line for line in world.gather(_failure(load_one, manifest)) if line), "")
        if not problem:
            newer = _set_newer_aside(checkpoints, manifest.step) if manifest is not chosen and world.is_main else []
            for line in world.broadcast(newer):
                tell(f"WARNING {line}")
            return manifest
        tell(f"WARNING {checkpoints / step_name(manifest.step)} could not be loaded: {problem}")
        manifest = _next_older(world, checkpoints, manifest)
    raise JobFailed(
        f"no checkpoint in {checkpoints} could be loaded (the reasons are above); "
        f"start over with --set {section}.resume=never"
    )


def _failure(load_one: Callable[[Manifest], None], manifest: Manifest) -> str:
    """What kept this rank from loading (empty: nothing did)."""
    try:
        load_one(manifest)
    except Exception as error:  # DeepSpeed raises anything on a state that is not what it expects
        return " ".join(f"{type(error).__name__}: {error}".split())
    return ""


def _next_older(world: World, checkpoints: Path, manifest: Manifest) -> Manifest | None:
    """The newest whole checkpoint of the same job before ``manifest``."""
    for step in reversed(world.broadcast(complete_steps(checkpoints)[0] if world.is_main else [])):
        if step >= manifest.step:
            continue
        older = _manifest_of(world, checkpoints, step)
        if older.job == manifest.job and not any(world.gather(_damage(checkpoints, older, world))):
            return older
    return None


def load(engine: Any, folder: Path, tag: str, step: int) -> None:
    """Load what a tag holds into the engine; DeepSpeed's silent (None, None) is an error."""
    path, state = engine.load_checkpoint(str(folder), tag=tag)
    if path is None or state is None or state.get("trace_ds_step") != step:
        raise RuntimeError(f"DeepSpeed did not load {folder / tag}")
