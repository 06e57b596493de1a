"""The process group a job runs in: joining it under any launcher, and the few collectives the stages need.

Rank logic lives here and nowhere else. Launchers: ``torchrun`` and ``deepspeed`` (RANK and WORLD_SIZE), ``mpirun``
(DeepSpeed's mpi4py discovery), ``srun`` (SLURM_STEP_NUM_TASKS; the batch script itself also has SLURM_PROCID, so that
one does not count), and our own local processes (RANK again).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from trace_ds.errors import AgreedError, JobFailed, UserError
from trace_ds.parallel.device import to_device
from trace_ds.parallel.environment import complete_launch, free_port, launched, rank_and_size

_T = TypeVar("_T")

# How long ranks wait for the main process outside of collectives: hashing or converting a model of a terabyte takes it
# an hour or two. A main process that hangs for longer should not hold the whole job until its time limit.
PATIENCE = timedelta(hours=6)

_joined: list[bool] = []  # not empty once this process has joined a group


@dataclass(frozen=True)
class World:
    """The default process group: this process's rank, its size and the device of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        dist.barrier()

    def sum_int64(self, values: np.ndarray) -> np.ndarray:
        """All-reduce (sum) of an int64 array over all ranks."""
        return self._reduce(values, np.int64, dist.ReduceOp.SUM)

    def sum_float64(self, values: np.ndarray) -> np.ndarray:
        """All-reduce (sum) of a float64 array over all ranks."""
        return self._reduce(values, np.float64, dist.ReduceOp.SUM)

    def sum_in_place(self, tensor: torch.Tensor) -> None:
        """All-reduce (sum) of a tensor on this process's device."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def max_int(self, value: int) -> int:
        return int(self._reduce(np.array([value]), np.int64, dist.ReduceOp.MAX)[0])

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value`` on every rank, in rank order. Plain data only (numbers, text, lists, arrays)."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, value)
        return gathered

    def wait_for_main(self) -> None:
        """On the other ranks, wait until the main process comes here too, however long it works before.

        A rank that waits in a collective is ended by the group's time-out, on a GPU by NCCL's watchdog. Here it asks
        the store where the ranks met; a main process that dies takes the store along, or its launcher ends them all.
        """
        if self.size == 1:
            return
        store = dist.distributed_c10d._get_default_store()
        turn = f"trace_ds/main/{store.add(f'trace_ds/turns/{self.rank}', 1)}"
        if self.is_main:
            store.set(turn, "")
        else:
            try:
                store.wait([turn], PATIENCE)
            except dist.DistStoreError as error:  # the time-out, or a main process that ended and its store with it
                text = f"rank {self.rank}: the main process has ended, or has not come back for {PATIENCE}: {error}"
                raise JobFailed(text) from error

    def broadcast(self, value: _T) -> _T:
        """The main process's ``value`` on every rank, whenever it has it. Plain data only."""
        if self.size == 1:
            return value
        self.wait_for_main()
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def broadcast_tensors(self, tensors: Iterable[torch.Tensor]) -> None:
        """Overwrite each tensor (on this process's device) with the main process's, in place, whenever it comes."""
        self.wait_for_main()
        for tensor in tensors:
            dist.broadcast(tensor, src=0)

    def run_on_main_and_broadcast(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` on the main process alone; its result (plain data) on every rank. Its :class:`UserError` or
        OSError ends every rank with the same status."""
        return self.broadcast(self._run_on_main(work))  # type: ignore[return-value]

    def run_on_main_first(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` on the main process, then on the others; errors as in :meth:`raise_on_all_ranks`."""
        result = self._run_on_main(work)
        return self.run_on_all_ranks(lambda: result if self.is_main else work())  # type: ignore[return-value]

    def _run_on_main(self, work: Callable[[], _T]) -> _T | None:
        result, error = None, None
        if self.is_main:
            try:
                result = work()
            except (UserError, OSError) as caught:
                error = caught
        if self.broadcast(error is not None):
            raise error if error is not None else AgreedError
        return result

    def run_on_all_ranks(self, work: Callable[[], _T]) -> _T:
        """Run ``work`` on every rank. An error of the user, the operating system (a full disk) or the job on any of
        them ends every rank and is said once (see :meth:`raise_on_all_ranks`)."""
        result, error = None, None
        try:
            result = work()
        except (UserError, OSError, JobFailed) as caught:
            error = caught
        self.raise_on_all_ranks(error)
        return result  # type: ignore[return-value]

    def raise_on_all_ranks(self, error: UserError | OSError | JobFailed | None) -> None:
        """Raise where any rank has an error: the first one on the main process, AgreedError on the others."""
        if not self.max_int(int(error is not None)):
            return
        if isinstance(error, OSError):
            error = UserError(error.strerror or str(error), str(error.filename or ""), "check the storage there")
        of_rank = "" if self.is_main else f"on rank {self.rank}: "
        plain: tuple[Any, ...] | None = None  # errors themselves do not travel
        if isinstance(error, UserError):
            plain = (UserError, of_rank + error.problem, error.where, error.fix)
        elif error is not None:
            plain = (JobFailed, f"{of_rank}{error}")
        kind, *texts = next(each for each in self.gather(plain) if each)
        raise kind(*texts) if self.is_main else AgreedError

    def _reduce(self, values: np.ndarray, dtype: type, operation: Any) -> np.ndarray:
        if self.size == 1:  # perhaps without a process group
            return np.array(values, dtype=dtype)
        # np.array copies: the all-reduce works in place, and the caller keeps its values
        tensor = to_device(torch.from_numpy(np.array(values, dtype=dtype, order="C")), self.device)
        dist.all_reduce(tensor, op=operation)
        return tensor.cpu().numpy()


def join(threads: int, timeout_minutes: float, *, on_cpu: bool = False) -> World:
    """Join the job's process group (a group of one when no launcher is there) and return the world.

    Args:
        threads: CPU threads of this process; fixed, since results of matrix products depend on it bit by bit.
        timeout_minutes: how long joining, and every collective, may wait for a slow rank.
        on_cpu: join over gloo whatever GPUs there are (ranks that see none can then join those that do).
    """
    _adopt_slurm_step()
    if not launched():
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    torch.set_num_threads(threads)
    deepspeed = quiet_deepspeed()
    cuda = torch.cuda.is_available() and not on_cpu
    try:
        complete_launch(os.environ, torch.cuda.device_count() if cuda else 0)
    except UserError:
        if os.environ["RANK"] != "0":  # the main process says it
            raise AgreedError from None
        raise
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        deepspeed.init_distributed(dist_backend="nccl" if cuda else "gloo", timeout=timeout, verbose=False)
        _joined.append(True)
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda:
        torch.cuda.set_device(local_rank)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    return World(dist.get_rank(), dist.get_world_size(), device)


def is_joined() -> bool:
    """Whether this process is in a group."""
    return dist.is_initialized()


def wait_longer(timeout_minutes: float) -> None:
    """Set the timeout of every later collective of the joined (gloo) group."""
    dist.distributed_c10d._set_pg_timeout(timedelta(minutes=timeout_minutes))


def leave() -> None:
    """Close the process group (quietly, at the end of a job that went well)."""
    if dist.is_initialized():
        dist.destroy_process_group()


def end_process(status: int) -> NoReturn:
    """End this process with ``status``; a rank without Python's own tear-down.

    Gloo's threads can hold the tensors of a collective a moment longer than it takes. One that lets go of them while
    the interpreter is torn down aborts the process ("terminate called without an active exception", status 134), also
    after the group was destroyed, since DeepSpeed keeps references to it. Everything is written by now: what was
    registered for the exit runs, MPI is finalised (``mpirun`` takes anything else for a crash), and that is all.
    """
    if not _joined:
        sys.exit(status)
    atexit._run_exitfuncs()
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed pipe
            stream.flush()
    os._exit(status)


def quiet_deepspeed() -> Any:
    """Import DeepSpeed without its warnings on the terminal, and without its shared-memory collective on CPU.

    That collective is compiled at first use (25–45 s, and a C++ compiler); gloo does the same sums.
    """
    import warnings

    from trace_ds.terminal import quiet_libraries

    quiet_libraries()  # also where this is no command of ours
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*c10d::allreduce_.*")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what it would find by itself
    import deepspeed

    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _adopt_slurm_step() -> None:
    """Under ``srun``, the step's variables become the usual ones (MASTER_* come from the batch script)."""
    if "SLURM_STEP_NUM_TASKS" not in os.environ or "RANK" in os.environ or "OMPI_COMM_WORLD_SIZE" in os.environ:
        return
    rank, size = rank_and_size()
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))
