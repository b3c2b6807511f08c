"""Page-locked host memory of the exact size of its tensors.

Copies between a GPU and page-locked (pinned) memory overlap with everything else; copies of other memory make the host
wait. PyTorch pins each tensor separately and rounds its size up to a power of two, so the weights of an offloaded 14B
model would take 50 % more memory than their size. Here all tensors of one dtype lie next to each other in a *slab* of
ordinary pages, which CUDA then locks. Forked data workers do not inherit the locked pages; otherwise each worker would
at once get a copy of all of them.

Without a GPU the same code runs with unlocked pages. Slabs in `SharedMemory` are seen by other processes, too.
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

import numpy as np
import torch
from torch import Tensor, nn

from titan_distill.parallelisms.tensor import local

Name = TypeVar("Name", bound=Hashable)

ALIGNMENT_BYTES = 64
"""Alignment of the tensors in a slab, in bytes: one cache line."""
_PORTABLE = 1
"""Value of cudaHostRegisterPortable, which locks pages for all GPUs of the process."""
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS


def slabs(
    wanted: Mapping[Name, tuple[torch.Size, torch.dtype]], *, page_locked: bool, memory: SharedMemory | None = None
) -> dict[Name, Tensor]:
    """Returns contiguous tensors of zeros with the `wanted` shapes and dtypes, in one slab per dtype.

    Each tensor has its own storage object and version counter, so saving or changing one does not involve the others. A
    slab is unlocked and freed together with the last of its tensors. With `memory` the slabs are a part of it.
    """
    by_dtype: dict[torch.dtype, list[Name]] = defaultdict(list)
    for name, (_, dtype) in wanted.items():
        by_dtype[dtype].append(name)
    found = {}
    for dtype, names in by_dtype.items():
        num_bytes = [math.prod(wanted[name][0]) * dtype.itemsize for name in names]
        starts = [0, *accumulate(-(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for size in num_bytes)]
        slab_bytes = max(1, starts[-1])
        pages = _Pages(-1, slab_bytes, flags=_PRIVATE) if memory is None else memory.extend(slab_bytes)
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
    """Does `module.to_empty(device="cpu")` for a module on the meta device, and places the parameters in slabs.

    FSDP uses page-locked parameters without a copy. It copies only shards that it must pad, and these are small.
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
    """Returns this rank's part of a tensor, without the wrapper that float8 puts around weights."""
    part = local(tensor)
    return getattr(part, "_tensor", part)


class _Pages(mmap.mmap):
    """Memory that CUDA locks until it is freed.

    It unlocks in `__del__`, because an mmap frees its memory before a `weakref.finalize` runs.
    """

    _locked_by: tuple[int, int] | None = None
    """Id of the process that locked the pages, and their address. None while they are not locked."""

    def address(self) -> int:
        return torch.frombuffer(self, dtype=torch.uint8).data_ptr()

    def lock(self) -> None:
        address = self.address()
        self.madvise(mmap.MADV_DONTFORK)
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(address, len(self), _PORTABLE)))
        self._locked_by = os.getpid(), address

    def __del__(self) -> None:
        # A forked process has neither the pages nor CUDA; the end of the process frees everything.
        if self._locked_by is not None and self._locked_by[0] == os.getpid() and not sys.is_finalizing():
            torch.cuda.synchronize()  # a copy may still be under way
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._locked_by[1])))


class SharedMemory:
    """Memory for slabs that another process can map, by its file descriptor. It has no name in a file system, and is
    freed when the last process unmaps it."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("checkpoint")
        self._slabs: list[tuple[int, int, int]] = []
        """Address, length in bytes and offset in the file of each slab."""

    def extend(self, num_bytes: int) -> _Pages:
        """Returns further pages at the end."""
        offset = os.fstat(self.descriptor).st_size
        os.ftruncate(self.descriptor, offset + -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE)
        pages = _Pages(self.descriptor, num_bytes, flags=mmap.MAP_SHARED, offset=offset)
        self._slabs.append((pages.address(), num_bytes, offset))
        return pages

    def offset(self, view: memoryview) -> int | None:
        """Returns where the bytes of `view` begin in the file. None if they lie elsewhere."""
        address = np.frombuffer(view, np.uint8).ctypes.data if len(view) else 0
        for start, num_bytes, offset in self._slabs:
            if start <= address and address + len(view) <= start + num_bytes:
                return offset + address - start
        return None

    def __del__(self) -> None:
        os.close(self.descriptor)
