"""Parts of the GPU suite that break in the three ways that matter, each between two cases that do not.

Torch is imported where it is used: the tests are about seconds, and importing it takes some.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator

from benchmarks.gpu_suite.worker import Cases, Context, Row


def fine(context: Context) -> Cases:
    return {"before": lambda: [{"value": 1}], "after": lambda: [{"value": 2}]}


def crash(context: Context) -> Cases:
    return _between(_read_address_0)


def hang(context: Context) -> Cases:
    return _between(_wait_for_ever)


def out_of_memory(context: Context) -> Cases:
    return _between(_allocate_a_petabyte)


def unimportable(context: Context) -> Cases:
    raise ModuleNotFoundError("No module named 'no_such_module'")


def _between(broken) -> Cases:  # type: ignore[no-untyped-def]
    return {"before": lambda: [{"value": 1}], "broken": broken, "after": lambda: [{"value": 2}]}


def _read_address_0() -> Iterator[Row]:
    yield {"value": "half"}
    ctypes.string_at(0)


def _wait_for_ever() -> Iterator[Row]:
    yield {"value": "half"}
    time.sleep(3600)


def _allocate_a_petabyte() -> Iterator[Row]:
    yield {"value": "half"}
    import torch

    torch.empty(2**50, dtype=torch.int8)
