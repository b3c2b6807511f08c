"""A consistent copy of a run's state in host memory, made while training goes on.

A save that runs beside training must write the state of one step, so it writes a copy. Copying while the run waits
would cost what memory bandwidth costs, a tenth of writing it to a fast disk. But parameters, moments and averages only
change when a role steps or is swapped with its average; between two such moments, for most of a step, they stand still.
So they are copied by the saving thread, and the run waits for that only before it changes them. Everything that may
change at other moments (buffers in a forward pass, numbers, schedulers) is small and is copied at once.

That nobody changes them behind our back is checked by the tensors' version counters, not assumed.

Host buffers are kept from save to save, page-locked where the state is on a GPU (`pinned.py`), whose copies then run
on a stream of their own. The price of asynchronous saving is this one copy of the state in host memory.

Why not torch's DefaultStager: it copies whole values, numbers included, in its thread, where they may have changed, and
knows nothing of a wait that comes later than the call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titan_distill.checkpoint.storage import flatten
from titan_distill.parallelisms.pinned import slabs


class Stage:
    """The state of one moment. ``copies`` is complete after ``finish``, which another thread may call."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        """As it was given, with copies of everything but the tensors."""
        self.copies: dict[str, Tensor] = {}
        """This rank's part of each tensor, by flat name."""
        self.is_complete = threading.Event()
        """Set when the run may change its state again, whether copying succeeded or not."""
        self._later: list[tuple[str, Tensor, Tensor, int]] = []
        self._stream: torch.cuda.Stream | None = None
        self._began: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Copies what was left for later. Raises RuntimeError when the run changed some of it meanwhile."""
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                if self._stream is not None and self._began is not None:
                    self._stream.wait_event(self._began)
                for _, buffer, source, _ in self._later:
                    buffer.copy_(source, non_blocking=True)
                if self._stream is not None:
                    self._stream.synchronize()
            changed = [name for name, _, source, version in self._later if source._version != version]
            if changed:
                raise RuntimeError(f"{changed[0]} was changed while it was copied; this is a fault of titan_distill")
        finally:
            self._later.clear()
            self.is_complete.set()


class Stager:
    """Stages one state at a time: the buffers of the stage before are used again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, state: dict[str, Any], steady: Iterable[Tensor]) -> Stage:
        """Copies all of ``state`` but the tensors that share memory with ``steady``, which must not change before
        ``is_complete``."""
        stage = Stage(_without_references(state))
        addresses = {_local(tensor).data_ptr() for tensor in steady}
        tensors = {name: value for name, value in flatten(stage.state).items() if isinstance(value, Tensor)}
        sources = {name: _local(value) for name, value in tensors.items()}
        self._prepare_buffers(sources)
        for name, source in sources.items():
            buffer = stage.copies[name] = self._buffers[name]
            if source.data_ptr() in addresses:
                stage._later.append((name, buffer, source, source._version))
            else:
                buffer.copy_(source)
        if self._stream is not None:
            stage._stream, stage._began = self._stream, torch.cuda.Event()
            stage._began.record(torch.cuda.current_stream(self._device))
        return stage

    def _prepare_buffers(self, sources: Mapping[str, Tensor]) -> None:
        """Keeps the buffers when they fit, else makes all anew: a run's state seldom changes its shape."""
        wanted = {name: (source.shape, source.dtype) for name, source in sources.items()}
        if wanted == {name: (buffer.shape, buffer.dtype) for name, buffer in self._buffers.items()}:
            return
        self._buffers = {}  # gone before the new ones come
        on_gpu = {name: wanted[name] for name, source in sources.items() if source.is_cuda}
        on_host = {name: wanted[name] for name in wanted if name not in on_gpu}
        self._buffers = slabs(on_gpu, page_locked=True) | slabs(on_host, page_locked=False)


def _local(tensor: Tensor) -> Tensor:
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _without_references(value: Any) -> Any:
    """A copy of a nested value that shares nothing with it but its tensors."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, dict):
        copied = copy.copy(value)  # of its own type, which is saved with it
        for key, entry in value.items():
            copied[key] = _without_references(entry)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_without_references(entry) for entry in value)
    return copy.deepcopy(value)
