"""What can happen to checkpoints: ranks killed or failing while saving, full disks, damaged and foreign files.

The protocol is the real one over real processes; instead of a DeepSpeed engine a stand-in writes small shards through
the same writer, so that a save costs milliseconds and many crashes fit into a test.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import end_of_ranks, run_distributed

from trace_ds.checkpoints import commit, serialization
from trace_ds.checkpoints.manifest import Manifest, complete_steps, read_manifest, step_name, verify
from trace_ds.errors import AgreedError, JobFailed, UserError
from trace_ds.run import artefact
from trace_ds.run.files import remove_leftovers
from trace_ds.run.log import StageLog

JOB = "job"
KILLS = 8


class StandIn:
    """Saves like a ZeRO-3 engine: one model file and one optimizer file a rank; contents follow from the step."""

    has_moe_layers = False

    def __init__(self, rank: int, step: int, elements: int = 20_000) -> None:
        self.rank, self.step, self.elements = rank, step, elements
        self.checkpoint_engine = type("Files", (), {})()
        serialization.install(self)

    def save_checkpoint(
        self, folder: str, tag: str, client_state: dict[str, Any], save_latest: bool, exclude_frozen_parameters: bool
    ) -> None:
        assert save_latest is False
        target = Path(folder) / tag
        target.mkdir(parents=True, exist_ok=True)
        for kind, factor in (("model", 1), ("optim", 3)):
            state = {**client_state, "values": torch.full((factor * self.elements,), float(self.step + self.rank))}
            name = f"zero_pp_rank_{self.rank}_mp_rank_00_{kind}_states.pt"
            self.checkpoint_engine.save(state, target / name)


def manifest_of(step: int, world_size: int, job: str = JOB) -> Manifest:
    model = {"path": "m", "fingerprint": "f"}
    return Manifest(step, world_size, 1, 3, "mixtral", job, model, "c", "fp32", {"step": step, "seed": 0}, {})


def save_next(world: Any, folder: str, prepare: Callable[[Any], None] | None = None, job: str = JOB) -> int:
    """Resume from the newest complete checkpoint and save the step after it; the step saved."""
    checkpoints = Path(folder)
    if world.is_main:
        remove_leftovers(checkpoints)  # as a job does at its start, under the lock
    world.barrier()
    chosen, _ = commit.choose(world, checkpoints, job, "auto")
    step = (chosen.step if chosen else 0) + 1
    if prepare is not None:
        prepare(world)
    log, manifest = StageLog("unlearn", None, None), manifest_of(step, world.size, job)
    commit.save(StandIn(world.rank, step), world, checkpoints, manifest, keep=2, log=log)
    return step


def file_events(react: Callable[[int], None]) -> None:
    """Call ``react`` with 1, 2, … whenever this process opens, makes, renames, lists or removes files from now on."""
    seen = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree"):
            seen[0] += 1
            react(seen[0])

    sys.addaudithook(hook)


def at_event(number: int, act: Callable[[], None]) -> None:
    file_events(lambda seen: act() if seen == number else None)


def killed_save(world: Any, folder: str, victim: int, event: int, delay_s: float) -> int:
    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def prepare(world: Any) -> None:
        if world.rank == victim:
            at_event(event, kill if not delay_s else threading.Timer(delay_s, kill).start)

    return save_next(world, folder, prepare)


def counted_save(world: Any, folder: str) -> int:
    """How many file events a whole save is, on this rank."""
    seen = [0]
    save_next(world, folder, lambda world: file_events(lambda number: seen.__setitem__(0, number)))
    return seen[0]


def check_whole(checkpoints: Path) -> int:
    """Every complete checkpoint is what was saved, bit for bit; the newest step."""
    steps, _ = complete_steps(checkpoints)
    for step in steps:
        directory = checkpoints / step_name(step)
        manifest = read_manifest(directory)
        verify(directory, manifest, hashes=True)
        assert manifest.step == step and len(manifest.files) == 2 * manifest.world
        for rank in range(manifest.world):
            values = serialization.load_shard(str(directory / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"))[
                "values"
            ]
            assert (values == step + rank).all()
    return steps[-1] if steps else 0


@pytest.mark.slow
def test_sigkill_at_random_points_of_saving_loses_nothing(tmp_path: Path) -> None:
    """At a random file operation of a random rank, or some milliseconds after it; the next job goes on from there."""
    draw = random.Random(11)
    folder = tmp_path / "checkpoints"
    events = run_distributed(counted_save, 2, str(folder))
    assert min(events) >= 3 and max(events) >= 15, events
    newest, killed, between = 1, 0, 0
    for _ in range(KILLS):
        victim = draw.randrange(2)
        delay_s = draw.choice([0.0, 0.0, draw.uniform(0.0, 0.003)])
        ends = end_of_ranks(killed_save, 2, str(folder), victim, draw.randint(1, events[victim]), delay_s)
        if ends[victim] == -signal.SIGKILL:
            killed += 1
            between += ends[1 - victim] == 0
        result = check_whole(folder)
        assert newest <= result <= newest + 1
        newest = result
    assert killed >= KILLS // 2  # the others had finished before their moment
    assert between <= killed // 2  # most kills fell before the save was over, and the other rank noticed
    assert run_distributed(save_next, 2, str(folder)) == [newest + 1, newest + 1]
    assert check_whole(folder) == newest + 1
    assert not list(folder.glob("*.tmp-*"))


def failing_save(world: Any, folder: str, how: str, victim: int) -> int:
    """A save during which one rank raises or meets a full disk."""

    def prepare(world: Any) -> None:
        if world.rank != victim:
            return
        if how == "full":  # a limit on the size of files is a full disk to the code, and needs no mount
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        else:
            at_event(2, broken)

    def broken() -> None:
        raise RuntimeError("this rank is broken")

    return save_next(world, folder, prepare)


@pytest.mark.slow
@pytest.mark.parametrize(("how", "victim"), [("raises", 0), ("full", 1)])
def test_one_rank_raising_or_out_of_space(tmp_path: Path, how: str, victim: int) -> None:
    folder = tmp_path / "checkpoints"
    run_distributed(save_next, 2, str(folder))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    ends = end_of_ranks(failing_save, 2, str(folder), how, victim)
    assert all(ends), ends  # neither ended with 0, and both within a minute
    if how == "raises":
        assert "this rank is broken" in ends[victim]
    else:
        assert f"zero_pp_rank_{victim}_mp_rank_00_model_states.pt" in ends[0] and f"on rank {victim}: File" in ends[0]
        assert ends[victim].rstrip().endswith("AgreedError")
    assert check_whole(folder) == 1
    assert all(path.read_bytes() == content for path, content in before.items())
    assert run_distributed(save_next, 2, str(folder)) == [2, 2]
    assert check_whole(folder) == 2
    assert not list(folder.glob("*.tmp-*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def forge(step: Path) -> None:
    """A shard of the right size and hash that asks for a function."""
    torch.save({"values": os.getcwd}, step / SHARD)
    manifest = read_manifest(step)
    manifest.files[SHARD].update(artefact.file_entry(step / SHARD))
    manifest.write(step)


SHARD = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
LAST = step_name(3)
# name -> (what happens to the folder, whose newest checkpoint is step 3; step resumed from, part of a loud line)
DAMAGE: dict[str, tuple[Callable[[Path], object], int, str]] = {
    "nothing": (lambda folder: None, 3, ""),
    "truncated": (lambda folder: os.truncate(folder / LAST / SHARD, 99), 2, f"{LAST}/{SHARD}: the file has 99"),
    "flipped": (lambda folder: flip(folder / LAST / SHARD), 2, f"{LAST}/{SHARD}: the file was altered"),
    "no_manifest": (lambda folder: (folder / LAST / "manifest.json").unlink(), 2, "there is no manifest"),
    "latest_wrong": (lambda folder: (folder / "latest").write_text("step_000009"), 3, "latest: names 'step_000009'"),
    "half_a_save": (lambda folder: shutil.copytree(folder / LAST, folder / "step_000004.tmp-1"), 3, ""),
    "both": (lambda folder: [flip(folder / step_name(n) / SHARD) for n in (2, 3)], -1, "no checkpoint here can be"),
    "forged": (lambda folder: [forge(folder / step_name(n)) for n in (2, 3)], -1, "cannot be loaded safely"),
}


def choose_each(world: Any, root: str) -> list[tuple[int, list[str]]]:
    """What a job would resume from in each folder, and what it says."""
    results = []
    for name in DAMAGE:
        try:
            chosen, problems = commit.choose(world, Path(root) / name, JOB, "auto")
            results.append((chosen.step if chosen else 0, problems))
        except (UserError, AgreedError) as error:
            results.append((-1, [str(error)]))
    return results


def load_on_rank_0_alone(world: Any, folder: str) -> str:
    """What a rank says when rank 1 cannot load step 3."""

    def load(manifest: Manifest) -> None:
        if world.rank == 1:
            raise KeyError("optimizer_state_dict")

    with pytest.raises(JobFailed) as error:
        commit.load_on_all_ranks(world, Path(folder), read_manifest(Path(folder) / LAST), load)
    return str(error.value)


def choose_and_load(world: Any, root: str, folder: str) -> tuple[list[tuple[int, list[str]]], str]:
    return choose_each(world, root), load_on_rank_0_alone(world, folder)


def three_saves(world: Any, folder: str) -> None:
    for _ in range(3):
        save_next(world, folder)


@pytest.mark.slow
def test_damage_is_named_and_the_newest_complete_checkpoint_is_used(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    run_distributed(three_saves, 2, str(whole))
    for name, (damage, _, _) in DAMAGE.items():
        shutil.copytree(whole, tmp_path / name)
        damage(tmp_path / name)
    (chosen, failure), (chosen_there, failure_there) = run_distributed(choose_and_load, 2, str(tmp_path), str(whole))
    assert failure == failure_there and [step for step, _ in chosen] == [step for step, _ in chosen_there]
    assert f"{LAST} could not be loaded: KeyError: 'optimizer_state_dict'" in failure
    for (name, (_, expected, text)), (step, problems) in zip(DAMAGE.items(), chosen, strict=True):
        assert step == expected, name
        assert text in "\n".join(problems), (name, problems)
        assert bool(problems) == bool(text), (name, problems)
        kept = sorted(path.name.split(".")[0] for path in (tmp_path / name).glob("step_0*"))
        assert kept == sorted(path.name.split(".")[0] for path in whole.glob("step_0*")) + ["step_000004"] * (
            name == "half_a_save"
        ), f"{name}: nothing is deleted, readable or not"
    assert run_distributed(save_next, 2, str(tmp_path / "flipped")) == [3, 3]
    assert check_whole(tmp_path / "flipped") == 3 and (tmp_path / "flipped" / f"{LAST}.unreadable-1" / SHARD).is_file()
    assert [path.name for path in (tmp_path / "both").glob("step_*.*")] == []
