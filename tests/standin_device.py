"""A device for tests: the CPU under another name, held to the rules of CUDA that the CPU does not have.

    with Standin() as standin:
        model.to(DEVICE)(ids.pin_memory().to(DEVICE, non_blocking=True))
    standin.waits                      # Counter({("reads a value", "trace_ds/unlearning/trainer.py:254"): 6, ...})

* A tensor on the device is not on the host: ``.numpy()`` is refused.
* An operation takes tensors of one side only; CUDA's two exceptions hold (a scalar, and an index, which is copied).
* Fresh memory holds NaN, the largest integer or True, never by chance zeros.
* ``to("cpu", non_blocking=True)`` gives such memory too, until an event recorded after it (or ``synchronize``) was
  waited for. Another wait in between does not count, though on CUDA it happens to be enough: it may be gone tomorrow.
* Everything for which the host waits for the device is counted, with the line that asked for it: values read, shapes
  that depend on values, masks used as an index, and copies, unless they are asynchronous out of pinned memory.

What it is not: a model of time, of streams, of kernels' own numerics, or of NCCL (a collective runs on the host's
copy). Importing this module gives the process a device type for good, so tests use it in processes of their own.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

ROOT, SITE = Path(__file__).resolve().parent.parent, Path(torch.__file__).parent.parent
UNSEEN = (str(Path(torch.__file__).parent), str(Path(__file__).resolve()), "<frozen")  # files that are never to blame
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
ACTIVE: list[Standin] = []


class Backend:
    """What torch asks of the module of a device (``torch.standin``)."""

    class Event:
        def record(self, stream: Any = None) -> None:
            self.copies = list(ACTIVE[-1].under_way)

        def synchronize(self) -> None:
            ACTIVE[-1].arrive(self.copies)

    def synchronize(self, device: Any = None) -> None:
        ACTIVE[-1].wait("synchronize")
        ACTIVE[-1].arrive(list(ACTIVE[-1].under_way))

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        pass

    def device(self, device: Any) -> Any:
        return contextlib.nullcontext()

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = None) -> torch.Tensor:  # CUDA's lies on the host as well
        return torch.zeros(16, dtype=torch.uint8)

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


_setup_privateuseone_for_python_backend("standin", backend_module=Backend())
DEVICE = torch.device("standin", 0)


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device; ``host`` is where its numbers really are."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, host: torch.Tensor) -> OnDevice:
        with torch.inference_mode(False):  # a view of a parameter is no inference tensor
            tensor = torch.Tensor._make_wrapper_subclass(
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=DEVICE,
            )
        tensor.host = host
        return tensor

    def __repr__(self) -> str:  # torch's own would read it
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:  # torch refuses too, in other words than for a device
        raise TypeError(f"can't convert {DEVICE} device type tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return ACTIVE[-1].run(func, args, kwargs or {})


def spoil(tensor: torch.Tensor) -> torch.Tensor:
    """Fill with what nobody can take for a result."""
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)


def on_host(value: Any) -> Any:
    return value.host if isinstance(value, OnDevice) else value


def on_device(value: Any) -> Any:
    return OnDevice(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) else value


def is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


def asker() -> str:
    """Who asked for the present operation: the innermost line outside torch."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(UNSEEN):
        frame = frame.f_back
    if frame is None:
        return "a backward pass"
    file = Path(frame.f_code.co_filename)
    top = next((top for top in (SITE, ROOT) if file.is_relative_to(top)), Path())
    return f"{file.relative_to(top)}:{frame.f_lineno}"


class Standin(TorchDispatchMode):
    """The device inside the block; see the module's docstring.

    Attributes:
        waits: how often the host waited, by reason and place.
        under_way: asynchronous copies to the host whose numbers have not arrived: (where to, what).
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.under_way: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._pinned: dict[int, torch.Tensor] = {}  # by address; kept, so that no address comes twice

    def __enter__(self) -> Standin:
        ACTIVE.append(self)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=DEVICE): made here, then copied by us
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *result: Any) -> None:
        super().__exit__(*result)
        ACTIVE.pop()
        torch._C._set_only_lift_cpu_tensors(bool(ACTIVE))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def wait(self, reason: str) -> None:
        self.waits[reason, asker()] += 1

    def arrive(self, copies: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for copy in copies:
            copy[0].copy_(copy[1])
        self.under_way = [pending for pending in self.under_way if all(pending is not copy for copy in copies)]

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self._pinned

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        name = func.overloadpacket.__name__
        if func._can_decompose():  # seen whole in inference mode only
            with self:
                return func.decompose(*args, **kwargs)
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        if name == "is_pinned":
            return not isinstance(args[0], OnDevice) and self.is_pinned(args[0])
        if name == "_pin_memory":
            copy = torch.empty_strided(args[0].size(), args[0].stride(), dtype=args[0].dtype).copy_(args[0])
            self._pinned[copy.untyped_storage().data_ptr()] = copy
            return copy
        if name == "_to_copy":
            return self._to(func, args[0], dict(kwargs))
        if name == "copy_" and isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            return self._copy_over(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, OnDevice)]
        if ours:
            self._check_sides(name, args, leaves)
            self._count_waits(func, name, args, kwargs)
        expected = kwargs.get("device")
        there = torch.device(expected).type == "standin" if expected is not None else bool(ours)
        args_here, kwargs_here = tree_map(on_host, (args, kwargs))
        if there and expected is not None:
            kwargs_here = {k: v for k, v in kwargs_here.items() if k != "pin_memory"} | {"device": torch.device("cpu")}
        if name == "histc" and not args_here[0].is_floating_point():  # CUDA has it for integers
            actual = func(args_here[0].double(), *args_here[1:], **kwargs_here).to(args_here[0].dtype)
        else:
            actual = func(*args_here, **kwargs_here)
        if not there:
            return actual
        if name.startswith(("empty", "new_empty")):
            spoil(actual)
        actual = tree_map(on_device, actual)
        if torch.is_inference_mode_enabled():  # where torch refuses to tie a view to what it is a view of
            return args[0] if func._schema.is_mutable and len(func._schema.returns) == 1 else actual
        return return_and_correct_aliasing(func, args, kwargs, actual) if ours else actual

    def _check_sides(self, name: str, args: Any, leaves: list[Any]) -> None:
        """RuntimeError where CUDA raises it."""
        indices = tree_leaves(args[1]) if name in INDEXING else []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not isinstance(leaf, OnDevice) and leaf.dim():
                if any(leaf is index for index in indices):
                    self.wait("copies an index")
                else:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but found {DEVICE} and cpu "
                        f"(aten::{name}, {tuple(leaf.shape)}) at {asker()}"
                    )

    def _count_waits(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        if name == "index":
            if any(is_mask(index) for index in args[1]):
                self.wait("a mask as an index")
        elif name in INDEXING:
            added = args[3] if len(args) > 3 else kwargs.get("accumulate", False)
            if any(is_mask(index) for index in args[1]) and (added or args[2].numel() != 1):  # else CUDA fills
                self.wait("a mask as an index")
        elif torch.Tag.data_dependent_output in func.tags:
            self.wait("reads a value")
        elif torch.Tag.dynamic_output_shape in func.tags and kwargs.get("output_size") is None:
            self.wait("a shape that depends on values")

    def _to(self, func: Any, source: torch.Tensor, kwargs: dict[str, Any]) -> torch.Tensor:
        asynchronous = kwargs.pop("non_blocking", False)
        expected = kwargs.pop("device", None)
        from_device = isinstance(source, OnDevice)
        to_device = from_device if expected is None else torch.device(expected).type == "standin"
        kwargs.pop("pin_memory", None)
        actual: torch.Tensor = func(on_host(source), **kwargs, device=torch.device("cpu"))
        if from_device and to_device:
            return OnDevice(actual)
        if to_device:
            if not (asynchronous and self.is_pinned(source)):
                self.wait("a copy to the device")
            return OnDevice(actual)
        if not from_device:
            return actual
        if not asynchronous:
            self.wait("a copy to the host")
            return actual
        copy = spoil(torch.empty_like(actual))
        self.under_way.append((copy, actual.clone()))
        return copy

    def _copy_over(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(source, OnDevice):
            self.wait("a copy to the host")
        elif source.dim() and not (non_blocking and self.is_pinned(source)):
            self.wait("a copy to the device")
        on_host(target).copy_(on_host(source))
        return target

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        """In place, on the host's copy, as the process group does it."""
        args_here, kwargs_here = tree_map(on_host, (args, kwargs))
        result = func(*args_here, **kwargs_here)
        back = {id(leaf.host): leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, OnDevice)}
        return tree_map(lambda leaf: back.get(id(leaf), leaf), result)
