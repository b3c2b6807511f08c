"""A GPU for machines without one: CPU tensors that claim to be on cuda:0.

Two faults show on a GPU only: an operator that gets tensors of two devices, and a copy that makes the host wait until
the device has finished all queued work. Neither needs a GPU to be found. Inside of `claimed_device` a tensor made for
"cuda" is a CPU tensor with a mark on its storage: asked for its device it says cuda:0, and what is computed from it has
the mark, too. All numbers are true, because CPU operators compute them. PyTorch's own rules say what must not be mixed
and when the host waits; whatever breaks or meets them is recorded, and the run goes on.

Two modes see everything. The *function mode* sees calls of PyTorch's Python interface: questions for a device, `to`,
and factories with a `device`. The *dispatch mode* sees operators, those of a backward included.

Not seen: what Triton kernels do (their plain-torch twins run), collectives, compiled code, other threads, memory.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.device("cuda", 0)
PROJECT = ("titan_distill.", "titan_kernels.")

INDEXING = {"index", "index_put", "_index_put_impl"}
"""Operators whose indices may be on the host; they are then copied, and the host waits."""
TAKES_SCALARS = {*INDEXING, "where", "masked_fill", "fill", "_foreach_mul", "_foreach_div", "_foreach_add"}
"""Operators that take a tensor without dims from the host though PyTorch does not tag them as pointwise."""
READ_BY_HOST = {
    "_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "unique_consecutive", "masked_select", "equal",
    "is_nonzero", "repeat_interleave", "bincount", "_linalg_check_errors",
}  # fmt: skip
"""Operators whose result, or its shape, the host must know."""
FROM_PYTHON = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Factories that copy what Python holds."""


class Event(NamedTuple):
    """A fault or a wait. `place` is the project's innermost function, as `module.function`."""

    what: str
    place: str
    line: int


@dataclass
class ClaimedDevice:
    """The transfers seen so far."""

    faults: list[Event] = field(default_factory=list)
    waits: list[Event] = field(default_factory=list)
    factories_on_gpu: bool = False
    """True if an operator without tensors, called now, makes its result on the GPU."""

    def fault(self, what: str) -> None:
        self.faults.append(Event(what, *_place()))

    def wait(self, what: str) -> None:
        self.waits.append(Event(what, *_place()))

    def copy(self, source: Tensor, *, to_gpu: bool, non_blocking: bool) -> None:
        """Notes whether the host waits for a copy between host and device."""
        if not non_blocking:
            self.wait("copy to the GPU that blocks" if to_gpu else "copy to the host")
        elif to_gpu and not is_pinned(source):
            self.wait("copy to the GPU from pageable memory")

    @contextlib.contextmanager
    def making(self, on_gpu: bool) -> Iterator[None]:
        """The device of results that factories make inside of the block."""
        before, self.factories_on_gpu = self.factories_on_gpu, on_gpu
        try:
            yield
        finally:
            self.factories_on_gpu = before


@contextlib.contextmanager
def claimed_device() -> Iterator[ClaimedDevice]:
    """Lets this thread believe in a GPU inside of the block."""
    device = ClaimedDevice()
    with contextlib.ExitStack() as stack:
        for where, name, value in _replacements(device):
            stack.enter_context(patch.object(where, name, value))
        stack.enter_context(_FunctionMode(device))
        stack.enter_context(_DispatchMode(device))
        yield device


def is_on_gpu(value: Any) -> bool:
    """True if `value` is a tensor that claims to be on the GPU."""
    return isinstance(value, Tensor) and getattr(_storage(value), "claims_gpu", False)


def is_pinned(tensor: Tensor) -> bool:
    """True if a host tensor claims to lie in page-locked memory."""
    return getattr(_storage(tensor), "claims_pinned", False)


def _storage(tensor: Tensor) -> Any:
    # A storage's Python object lives as long as the storage, so a mark on it is one on the memory, views included.
    with torch._C.DisableTorchFunction():
        return None if tensor.is_meta or tensor.layout != torch.strided else tensor.untyped_storage()


def _mark(value: Any, on_gpu: bool) -> None:
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor) and (storage := _storage(tensor)) is not None:
            storage.claims_gpu = on_gpu


def _pinned(tensor: Tensor) -> Tensor:
    _storage(tensor).claims_pinned = True
    return tensor


def _place() -> tuple[str, int]:
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(PROJECT):
            return f"{module.partition('.')[2]}.{frame.f_code.co_name}", frame.f_lineno
        frame = frame.f_back
    return "outside", 0


def _named_device(value: Any) -> str | None:
    """Type of the device that an argument names; None for other arguments."""
    if isinstance(value, Tensor):
        return "cuda" if is_on_gpu(value) else "cpu"
    return torch.device(value).type if isinstance(value, str | torch.device) else None


class _FunctionMode(TorchFunctionMode):
    """PyTorch's Python interface."""

    def __init__(self, device: ClaimedDevice) -> None:
        super().__init__()
        self.device = device
        self.answers: dict[Any, Callable[[Tensor, Any], Any]] = {
            Tensor.device.__get__: lambda tensor, real: CUDA if is_on_gpu(tensor) else real,
            Tensor.is_cuda.__get__: lambda tensor, real: is_on_gpu(tensor),
            Tensor.is_cpu.__get__: lambda tensor, real: real and not is_on_gpu(tensor),
            Tensor.get_device: lambda tensor, real: 0 if is_on_gpu(tensor) else real,
            Tensor.is_pinned: lambda tensor, real: is_pinned(tensor),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in self.answers:
            return self.answers[func](args[0], func(*args, **kwargs))
        if getattr(func, "__name__", "") in ("__get__", "__set__"):
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._move(func, args[0], args[1:], kwargs)
        if func is Tensor.pin_memory:
            return _pinned(args[0].clone())
        if func in (Tensor.tolist, Tensor.numpy, Tensor.__array__) and is_on_gpu(args[0]):
            self.device.wait(func.__name__)
            if func is not Tensor.tolist:
                self.device.fault(f"{func.__name__} of a tensor on the GPU")
        if kwargs.get("device") is not None:
            return self._make(func, args, kwargs)
        with self.device.making(any(map(is_on_gpu, tree_leaves((args, kwargs))))):
            return func(*args, **kwargs)

    def _make(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """A call that names the device of its result."""
        target, is_pinned = torch.device(kwargs["device"]).type, kwargs.pop("pin_memory", False)
        to_gpu = target == "cuda"
        if to_gpu:
            kwargs["device"] = "cpu"
        source = next((value for value in args if isinstance(value, Tensor)), None)
        with self.device.making(to_gpu):
            made = func(*args, **kwargs)
        if func in FROM_PYTHON and is_on_gpu(source) != to_gpu:
            self.device.wait(f"{func.__name__} of values on the {'host' if to_gpu else 'GPU'}")
            made = made.clone() if made is source else made
        if target != "meta":
            _mark(made, to_gpu)
        return _pinned(made) if is_pinned else made

    def _move(self, func: Any, source: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """`to`, `cuda` and `cpu`, with what they do to the mark."""
        named = {Tensor.cuda: ["cuda"], Tensor.cpu: ["cpu"]}.get(func, [*args, kwargs.get("device")])
        target = next((found for value in named if (found := _named_device(value))), None)
        non_blocking = kwargs.get("non_blocking", next((value for value in args if isinstance(value, bool)), False))
        if func is not Tensor.to:
            args = ["cpu"]
        args = ["cpu" if not isinstance(value, Tensor) and _named_device(value) == "cuda" else value for value in args]
        if kwargs.get("device") is not None and target == "cuda":
            kwargs["device"] = "cpu"
        from_gpu, to_gpu = is_on_gpu(source), target == "cuda"
        with self.device.making(from_gpu):
            moved = Tensor.to(source, *args, **kwargs)
        if target is None or moved.is_meta or from_gpu == to_gpu:
            return moved
        self.device.copy(source, to_gpu=to_gpu, non_blocking=non_blocking)
        if _storage(moved) is _storage(source):
            moved = moved.clone()
        _mark(moved, to_gpu)
        return moved


class _DispatchMode(TorchDispatchMode):
    """Operators, those of a backward included."""

    def __init__(self, device: ClaimedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What an operator of ours asks a tensor here is answered truly: it is on the CPU, where its twin runs.
        with torch._C.DisableTorchFunction():
            kwargs = kwargs or {}
            tensors = [
                value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and not value.is_meta
            ]
            on_gpu = [is_on_gpu(tensor) for tensor in tensors]
            name = func._schema.name.partition("::")[2].rstrip("_")
            if any(on_gpu):
                self._check(func, name, args, tensors, on_gpu)
            result = func(*args, **kwargs)
            if name != "copy" and (any(on_gpu) or (not tensors and self.device.factories_on_gpu)):
                _mark(result, True)
            return result

    def _check(self, func: Any, name: str, args: Any, tensors: Sequence[Tensor], on_gpu: Sequence[bool]) -> None:
        if name in READ_BY_HOST:
            self.device.wait(name)
        on_host = [tensor for tensor, is_there in zip(tensors, on_gpu, strict=True) if not is_there]
        if name == "copy":
            if on_host:
                non_blocking = len(args) > 2 and args[2]
                self.device.copy(args[1], to_gpu=is_on_gpu(args[0]), non_blocking=non_blocking)
            return
        if name in INDEXING and is_on_gpu(args[0]):
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.device.wait("mask as an index")
            if not all(map(is_on_gpu, indices)):
                self.device.wait("index on the host")
            on_host = [tensor for tensor in on_host if not any(tensor is index for index in indices)]
        takes_scalars = torch.Tag.pointwise in func.tags or name in TAKES_SCALARS
        if not all(takes_scalars and tensor.ndim == 0 for tensor in on_host):
            self.device.fault(f"{name} of tensors on the GPU and, of shape {tuple(on_host[0].shape)}, on the host")


class _Stream:
    """A stream or an event that has nothing to wait for; `device` is told who waits all the same."""

    device: ClaimedDevice

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def synchronize(self) -> None:
        self.device.wait("synchronize")

    def elapsed_time(self, end: Any) -> float:
        return 0.0


def _replacements(device: ClaimedDevice) -> Iterator[tuple[Any, str, Any]]:
    """Answers for the GPU that no tensor gives: objects, the names of their attributes, and new values."""
    stream = type("Stream", (_Stream,), {"device": device})
    for name in ("Event", "Stream", "stream", "current_stream"):
        yield torch.cuda, name, stream
    # An Ampere card: what is done for later ones only (the order of attention backends) changes the whole process.
    answers = {"is_available": True, "device_count": 1, "current_device": 0, "max_memory_allocated": 0,
               "is_bf16_supported": True, "get_device_name": "NVIDIA A100-SXM4-80GB", "get_device_capability": (8, 0),
               "get_device_properties": SimpleNamespace(total_memory=80 * 2**30),
               "is_current_stream_capturing": False, "set_device": None, "empty_cache": None}  # fmt: skip
    for name, answer in answers.items():
        yield torch.cuda, name, lambda *args, answer=answer, **kwargs: answer
    yield torch.cuda, "synchronize", lambda *args: device.wait("synchronize")
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(tensors: Any, with_indices: bool = False) -> Any:
        """Optimizers and gradient clipping ask this for devices, in C++."""
        groups = group(tensors, with_indices)
        first = next((tensor for tensor in tree_leaves(tensors) if isinstance(tensor, Tensor)), None)
        return {(CUDA if is_on_gpu(first) else real, dtype): value for (real, dtype), value in groups.items()}

    yield torch._C, "_group_tensors_by_device_and_dtype", grouped
