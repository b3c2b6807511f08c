"""Asynchronous saves: a thread that writes, and a copy of the run's state in host memory for it to write from.

A save beside training must write the state of one step, so it writes a copy. Parameters, moments and averages only
change when a role steps or is swapped with its average; for most of a step they stand still. So the saving thread
copies them, and the run waits for the copy only before it changes them. Everything that may change at other moments
(buffers in a forward pass, numbers, schedulers) is small and is copied at once. The version counters of the tensors
prove that nothing changed them too early.

Host buffers are kept from save to save, page-locked where the state is on a GPU (`pinned.py`), whose copies then run on
a stream of their own. The price of asynchronous saving is this one copy of the state in host memory.

Torch's DefaultStager is no replacement: it copies whole values, numbers included, in its thread, where they may have
changed, and offers no wait later than the call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from titan_distill.checkpoint.storage import flatten
from titan_distill.parallelisms.pinned import slabs
from titan_distill.parallelisms.tensor import local


def in_background(name: str, work: Callable[[], None]) -> Future[None]:
    """Runs `work` on a daemon thread; the future holds its failure for whoever waits.

    An executor would not do: Python waits for its threads at exit, and a save that hangs (another rank is gone, a file
    system does not answer) must not keep a process from ending.
    """
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as failure:
            future.set_exception(failure)

    threading.Thread(target=run, name=name, daemon=True).start()
    return future


class Stage:
    """The state of one moment, for a save to write from. `copies` is complete after `finish`."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        """As DCP plans it: live tensors, and copies of everything else."""
        self.copies: dict[str, Tensor] = {}
        """This rank's part of each tensor, by flat name; empty where the live tensors are written."""
        self.is_complete = threading.Event()
        """Set when the run may change its state again, whether copying succeeded or not."""
        self._later: list[tuple[str, Tensor, int]] = []
        self._stream: torch.cuda.Stream | None = None
        self._began: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Copies the tensors that were left for later, in any thread. Raises RuntimeError when the run changed one."""
        try:
            with torch.no_grad(), torch.cuda.stream(self._stream):
                if self._stream is not None and self._began is not None:
                    self._stream.wait_event(self._began)
                for name, source, _ in self._later:
                    self.copies[name].copy_(source, non_blocking=True)
                if self._stream is not None:
                    self._stream.synchronize()
            changed = [name for name, source, version in self._later if source._version != version]
            if changed:
                raise RuntimeError(f"{changed[0]} was changed while it was copied; this is a fault of titan_distill")
        finally:
            self._later.clear()
            self.is_complete.set()


class Stager:
    """Stages one state at a time, in the buffers of the stage before."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def begin(self, state: dict[str, Any], steady: Iterable[Tensor]) -> Stage:
        """Copies all of `state` but tensors that share memory with `steady`: those must not change before
        `is_complete`."""
        tensors = {name: value for name, value in flatten(state).items() if isinstance(value, Tensor)}
        sources = {name: local(tensor) for name, tensor in tensors.items()}
        stage = Stage(copy.deepcopy(state, {id(tensor): tensor for tensor in tensors.values()}))
        addresses = {local(tensor).data_ptr() for tensor in steady}
        self._prepare_buffers(sources)
        stage.copies = dict(self._buffers)
        for name, source in sources.items():
            if source.data_ptr() in addresses:
                stage._later.append((name, source, source._version))
            else:
                stage.copies[name].copy_(source)
        if self._stream is not None:
            stage._stream, stage._began = self._stream, torch.cuda.Event()
            stage._began.record(torch.cuda.current_stream(self._device))
        return stage

    def _prepare_buffers(self, sources: Mapping[str, Tensor]) -> None:
        """Reuses the buffers where they fit, and else replaces all: a run's state seldom changes its shape."""
        wanted = {name: (source.shape, source.dtype) for name, source in sources.items()}
        if wanted == {name: (buffer.shape, buffer.dtype) for name, buffer in self._buffers.items()}:
            return
        self._buffers = {}  # frees the old ones before the new ones are made
        on_gpu = {name: wanted[name] for name, source in sources.items() if source.is_cuda}
        on_host = {name: wanted[name] for name in wanted if name not in on_gpu}
        self._buffers = slabs(on_gpu, page_locked=True) | slabs(on_host, page_locked=False)
