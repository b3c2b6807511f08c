"""A Hopper GPU that is not there: code for CUDA runs on meta tensors, and launches of Triton kernels are noted.

A kernel is compiled for what it is called with: dtypes, strides and addresses divisible by 16, numbers equal to 1,
compile-time arguments. All of it is known without numbers and without a GPU. So the project's own code (operators,
autograd, the benchmark, tests/gpu) is run as it stands, with "cuda" read as "meta", and each launch stops where Triton
would compile. Nothing is listed twice, so nothing can be forgotten.

The price is that it changes torch, Triton and `titan_kernels` for the rest of the process: use it in one of its own.
Code that asks for a number gets 0, because meta tensors hold none.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import triton
from titan_kernels import ops, tuning
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key
from triton.runtime.jit import JITFunction, get_cache_invalidating_env_vars

ARCH = 90
TARGET = GPUTarget("cuda", ARCH, 32)


@dataclass(frozen=True)
class Job:
    """One kernel to compile: `key` as Triton's cache counts, `name`, and what `triton.compile` takes."""

    key: str
    name: str
    source: ASTSource
    options: dict[str, Any]


class PretendedGpu:
    """Changes the process; `jobs` then grows by each new kernel that is launched, in order of the first launch."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        mode = _CudaIsMeta()
        triton.runtime.driver.set_active(_Driver())
        JITFunction.run = functools.partialmethod(_never_launch, JITFunction.run)
        JITFunction.create_binder = functools.partialmethod(_binder, JITFunction.create_binder, self._note)
        for name, value in _CUDA.items():
            setattr(torch.cuda, name, value)
        torch.Generator = _Generator  # type: ignore[misc]
        # Timing stands for "all candidates are launched".
        tuning._milliseconds = lambda kernel, start, candidate: start(candidate) or 0.0
        for operator in vars(ops).values():
            if isinstance(operator, torch._library.custom_ops.CustomOpDef):
                operator.register_fake(_within(mode, operator._init_fn))
        mode.__enter__()

    def _note(self, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Any:
        backend = make_backend(target)
        key = get_cache_key(source, backend, backend.parse_options(options), get_cache_invalidating_env_vars())
        digest = hashlib.sha256(key.encode()).hexdigest()
        self.jobs.setdefault(digest, Job(digest, source.name, source, options))
        return SimpleNamespace()


class _Driver:
    """The answers that Triton asks of a driver before it launches."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _never_launch(function: Any, run: Callable, *arguments: Any, grid: Any, warmup: bool = False, **others: Any) -> Any:
    return run(function, *arguments, grid=grid, warmup=True, **others)


def _binder(function: Any, create: Callable, compile_: Callable) -> Any:
    made = create(function)
    function.compile = compile_
    return made


class _Generator(torch.Generator):
    def __new__(cls, device: Any = "cpu") -> _Generator:
        return super().__new__(cls, "cpu")


_CUDA: dict[str, Callable[..., Any]] = {
    "is_available": lambda: True,
    "is_initialized": lambda: False,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "is_current_stream_capturing": lambda: False,
    "get_device_capability": lambda device=None: divmod(ARCH, 10),
    "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=132, total_memory=80 * 2**30),
    "empty_cache": lambda: None,
    "synchronize": lambda device=None: None,
}

_ANSWERS = {
    Tensor.is_cuda.__get__: True,
    Tensor.device.__get__: torch.device("cuda", 0),
    Tensor.item: 0,
    Tensor.__bool__: True,
    Tensor.__float__: 0.0,
    Tensor.__int__: 0,
    torch.equal: True,
}


class _CudaIsMeta(TorchFunctionMode):
    """Devices named "cuda" become "meta"; meta tensors say that they are on CUDA, and that they hold zeros."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if function in _ANSWERS and args[0].is_meta:
            return _ANSWERS[function]
        if function is Tensor.cuda:
            function, args = Tensor.to, (args[0], "cuda")
        args = tuple(_device(value) for value in args)
        kwargs = {name: _device(value) for name, value in kwargs.items()}
        if kwargs.get("device") == "meta":
            kwargs.pop("generator", None)
        return function(*args, **kwargs)


def _device(value: Any) -> Any:
    if isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda":
        return "meta"
    return value


def _within(mode: TorchFunctionMode, body: Callable) -> Callable:
    """An operator's body as its own stand-in for meta tensors: dispatch has left the mode by then."""

    @functools.wraps(body)
    def run(*arguments: Any) -> Any:
        with mode:
            return body(*arguments)

    return run
