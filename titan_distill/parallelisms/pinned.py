"""Page-locked host memory of the exact size of its tensors.

Copies between a GPU and page-locked (pinned) memory overlap with everything else; copies of other memory make the host
wait. PyTorch pins tensor by tensor and rounds each up to a power of two, so the weights of an offloaded 14B model would
take half as much again as they are large. Here all tensors of one dtype lie one behind the other in a *slab* of
ordinary pages, which CUDA then locks as they are. Locked pages stay with this process: a data worker that is forked
would otherwise be given copies of all of them at once.

Without a GPU the same code runs on pages that are not locked.
"""

from __future__ import annotations

import math
import mmap
import os
import sys
from collections import defaultdict
from collections.abc import Hashable, Mapping
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor, nn

from titan_distill.parallelisms.tensor import local

Name = TypeVar("Name", bound=Hashable)

ALIGNMENT_BYTES = 64
"""Alignment of tensors in a slab: the length of a cache line."""
_PORTABLE = 1
"""cudaHostRegisterPortable: locked for all GPUs of the process."""


def slabs(wanted: Mapping[Name, tuple[torch.Size, torch.dtype]], *, page_locked: bool) -> dict[Name, Tensor]:
    """Contiguous tensors of the wanted shapes and dtypes, zero, in one slab per dtype.

    Each has a storage of its own, so that whoever saves it or counts its changes sees nothing of the others. A slab is
    freed, and unlocked before, with the last of its tensors.
    """
    by_dtype: dict[torch.dtype, list[Name]] = defaultdict(list)
    for name, (_, dtype) in wanted.items():
        by_dtype[dtype].append(name)
    found = {}
    for dtype, names in by_dtype.items():
        num_bytes = [math.prod(wanted[name][0]) * dtype.itemsize for name in names]
        starts = [0, *accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in num_bytes)]
        pages = _Pages(-1, max(1, starts[-1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if page_locked:
            pages.lock()
        for name, start, size in zip(names, starts, num_bytes):
            shape = wanted[name][0]
            if size == 0:  # which no buffer may have
                found[name] = torch.empty(shape, dtype=dtype)
            else:
                found[name] = torch.frombuffer(pages, dtype=dtype, count=size // dtype.itemsize, offset=start).view(
                    shape
                )
    return {name: found[name] for name in wanted}


@torch.no_grad()
def materialise_on_host(module: nn.Module, *, page_locked: bool) -> None:
    """`module.to_empty(device="cpu")` for a module on the meta device, with the parameters in slabs.

    FSDP takes parameters that are page-locked as they are. Shards that it pads are its own copies; they are small.
    """
    parameters = {id(parameter): parameter for parameter in module.parameters()}
    wanted = {key: (local_storage(parameter).shape, parameter.dtype) for key, parameter in parameters.items()}
    laid_out = slabs(wanted, page_locked=page_locked)

    def materialise(tensor: Tensor) -> Tensor:
        made = torch.empty_like(tensor, device="cpu")  # of the tensor's own class; its pages are never touched
        if (place := laid_out.get(id(tensor))) is not None:
            local_storage(made).set_(place)  # type: ignore[call-overload]
        return made

    module._apply(materialise)


def local_storage(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, without the wrapper that float8 has around weights."""
    part = local(tensor)
    return getattr(part, "_tensor", part)


class _Pages(mmap.mmap):
    """Anonymous memory of this process, which CUDA has locked until it is freed.

    A `__del__`, because an mmap frees its memory before a `weakref.finalize` hears of it.
    """

    _locked_by: tuple[int, int] | None = None
    """Process and address."""

    def lock(self) -> None:
        address = torch.frombuffer(self, dtype=torch.uint8).data_ptr()
        self.madvise(mmap.MADV_DONTFORK)
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE)))
        self._locked_by = os.getpid(), address

    def __del__(self) -> None:
        # A forked process has neither the pages nor CUDA; the end of the process frees everything.
        if self._locked_by is not None and self._locked_by[0] == os.getpid() and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may still be under way
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._locked_by[1])))
