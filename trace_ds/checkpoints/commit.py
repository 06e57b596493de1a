"""Saving and loading a job's state through DeepSpeed, so that no crash leaves half a checkpoint.

1. all ranks copy their state to host memory, or write it at once, into step_N.tmp-ID/ (DeepSpeed, save_latest=False)
2. each rank writes what it copied, hashes what it writes and fsyncs its files
3. all ranks agree that all is written; 4. the main process writes manifest.json, last
5. rename to step_N/ and fsync the directory; 6. replace ``latest``; 7. prune, never the newest two

Training waits for 1 and 3. The rest is done by a thread of each rank, which takes part in no collective: after every
step all ranks learn whether one of them is still writing, and go on together where none is (:meth:`Saver.poll`).
"""

from __future__ import annotations

import copy
import functools
import os
import platform
import shutil
import time
from collections.abc import Callable
from concurrent import futures
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
from trace_ds.errors import JobFailed, StopRequested, UserError
from trace_ds.parallel.environment import available_memory_bytes
from trace_ds.run.files import fsync_directory
from trace_ds.run.ours import MANIFEST, require_directory

if TYPE_CHECKING:
    from trace_ds.parallel.world import World
    from trace_ds.run.log import StageLog

ASK_EVERY_S = 0.2
HOST_SHARE = 0.5  # of the free memory: torch rounds page-locked copies up to powers of two, and training goes on


class Saver:
    """Saves the states of a job's engine by the protocol above, one after the other. Every call is collective.

    As a context, it comes back with nothing in flight, also when all ranks leave together (:class:`JobFailed`,
    :class:`StopRequested`); any other error ends a rank in the middle, as a kill would.

    Args:
        log: gets an event for every complete checkpoint, with how long training stood still for it.
        keep: newest checkpoints kept, at least 2.
        background: whether training may go on while files are written.
    """

    def __init__(
        self, engine: Any, world: World, checkpoints: Path, log: StageLog, *, keep: int, background: bool = True
    ) -> None:
        self._engine, self._world, self._checkpoints = engine, world, checkpoints
        self._keep, self._background, self._log = keep, background, log
        self._files = engine.checkpoint_engine.files
        self._ranks_here = world.gather(platform.node()).count(platform.node())
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._work: futures.Future[Any] | None = None  # of the save in flight
        self._then: Callable[[Any], None]  # called with its result when every rank's work is done
        self._warned = False

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, (JobFailed, StopRequested)):
            from trace_ds.parallel.world import AgreedError

            try:
                self.finish()
            except (OSError, AgreedError) as error:
                if kind is None or not issubclass(kind, JobFailed):
                    raise
                reason = error or "another process could not"  # why the job failed is what the user must read
                self._log.line(f"WARNING the last checkpoint was not written: {reason}")
        self._thread.shutdown(wait=False)

    def save(self, manifest: Manifest, *, wait: bool = False) -> None:
        """Save the engine's state once the save before is through.

        Args:
            manifest: everything but ``files``.
            wait: nothing is copied, and the checkpoint is complete on return.
        """
        began_s = time.monotonic()
        self.finish()
        # a copy: the job goes on updating its trainer state while a thread writes this one
        manifest, copied = copy.deepcopy(manifest), self._background and not wait
        temporary = self._checkpoints / f"{step_name(manifest.step)}.tmp-{os.getpid()}"
        temporary = Path(self._world.broadcast(str(temporary)))
        self._files.begin(self._room_bytes() if copied else 0.0)
        if self._world.is_main:
            self._checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(temporary, ignore_errors=True)
        self._world.barrier()  # no rank makes copies before all have seen how much memory is free
        self._engine._copy_recovery_script = lambda folder: None  # DeepSpeed's zero_to_fp32.py, beside every one
        self._engine.save_checkpoint(
            str(self._checkpoints),
            tag=temporary.name,
            client_state={"trace_ds_step": manifest.step},
            save_latest=False,
        )
        self._submit(self._files.write, lambda written: self._gather_and_publish(manifest, temporary, written, copied))
        self._waited_s = time.monotonic() - began_s
        if not copied:
            self.finish()

    def poll(self) -> None:
        """Go on with the save in flight, if there is one and every rank has written what it had to.

        Raises:
            OSError: this rank could not write (AgreedError: another one could not); the save is given up.
        """
        if self._work is not None and not self._world.max_int(int(not self._work.done())):
            work, self._work = self._work, None
            self._then(self._world.run_on_all_ranks(work.result))

    def finish(self) -> None:
        """Wait until no save is in flight (collective); polls, so that no rank waits long in a collective."""
        while self._work is not None:
            futures.wait([self._work], ASK_EVERY_S)
            self.poll()

    def _submit(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self._work, self._then = self._thread.submit(work), then

    def _gather_and_publish(
        self, manifest: Manifest, temporary: Path, written: dict[str, dict[str, Any]], copied: bool
    ) -> None:
        """Every rank has written its files (path -> size and hash): the main process's thread does the rest."""
        root = os.path.abspath(temporary)
        relative = {os.path.relpath(path, root): entry for path, entry in written.items()}
        parts = self._world.gather((relative, self._files.uncopied_bytes))
        files = {name: entry for part, _ in parts for name, entry in part.items()}
        uncopied_bytes = max(size for _, size in parts)
        if copied and uncopied_bytes and not self._warned:
            self._warned = True
            self._log.line(
                f"training waits while checkpoints are written: for {uncopied_bytes / 1e9:.2g} GB of a rank's state "
                "there is no room in host memory"
            )

        def publish() -> None:
            replace(manifest, files=files).write(temporary)
            fsync_directory(temporary)
            destination = self._checkpoints / step_name(manifest.step)
            if destination.exists():  # left by a kill between two of these lines in an earlier attempt
                set_aside(destination)
            os.replace(temporary, destination)
            fsync_directory(self._checkpoints)
            settle(self._checkpoints, manifest.step, self._keep)

        def log_it(_: None) -> None:
            self._log.event("checkpoint", step=manifest.step, waited_s=round(self._waited_s, 3))

        self._submit(publish if self._world.is_main else lambda: None, log_it)

    def _room_bytes(self) -> float:
        """Host memory that the copies of this rank may take."""
        free = float(available_memory_bytes())
        if self._world.device.type == "cuda":  # what torch has kept page-locked since the save before
            import torch

            stats = torch.cuda.host_memory_stats()
            unused = stats.get("allocated_bytes.current", 0) - stats.get("active_bytes.current", 0)
            free += self._ranks_here * unused
        return HOST_SHARE * free / self._ranks_here


def settle(checkpoints: Path, step: int, keep: int) -> None:
    """Steps 6 and 7 for a checkpoint that is there: after the rename, or later when a kill fell in between."""
    point_latest(checkpoints, step)
    for old in complete_steps(checkpoints)[0][: -max(keep, 2)]:
        discard(checkpoints / step_name(old))


def discard(path: Path) -> None:
    """Delete a checkpoint; a kill in the middle leaves what the next start removes, not a damaged checkpoint.

    Raises:
        UserError: it has no manifest, so it may be somebody else's.
    """
    require_directory(path, MANIFEST)
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
    """Choose the checkpoint to resume from (None: start at step 0); and warnings about damaged ones (collective).

    Every file of the newest complete checkpoint is hashed and its shards are read, the ranks sharing the work. What is
    damaged is named, set aside and never deleted, and the next older one is tried. When none could be read, nothing is
    touched: a job that has saved something does not start over by itself.

    Args:
        job: identity of this job; a checkpoint of another job is refused.
        resume: ``auto``, ``required`` (no checkpoint is an error), ``never`` (existing ones are deleted) or ``replace``
            (as auto, but checkpoints of another job are deleted).
    """
    if resume == "never":
        if world.is_main:
            discard_all(checkpoints)
        return None, []
    # one listing for all ranks: shared storage may show another node an older one
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
    """Set every checkpoint after ``step`` aside; a line for each."""
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
    path, state = engine.load_checkpoint(str(folder), tag=tag)
    if path is None or state is None or state.get("trace_ds_step") != step:
        raise RuntimeError(f"DeepSpeed did not load {folder / tag}")
