"""Asynchronous saves: a thread copies the run's state to host memory, from which another process writes it to disk.

A save that runs during training must write the state of one step, so it writes a copy. Parameters, optimizer moments
and EMA change only when a role steps or its EMA is swapped in. The saving thread copies these tensors while training
continues, and the run waits for the copy only before it changes them. Everything that may change at other moments
(buffers in a forward pass, numbers, schedulers) is small and is copied at once. The version counters of the tensors
verify that nothing changed during the copy.

Host buffers are reused from save to save. For a state on a GPU they are page-locked (`pinned.py`), and the copies run
on a separate CUDA stream. The buffers are shared with the process that writes (`writing_process.py`). The price of
asynchronous saving is this copy of the state in host memory.

Torch's DefaultStager is not used: it copies all values in its thread, including numbers that training may change
meanwhile, and a caller cannot wait for the copy later than in the call itself.
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
from titan_distill.parallelisms.pinned import SharedMemory, slabs
from titan_distill.parallelisms.tensor import local


def in_background(name: str, work: Callable[[], None]) -> Future[None]:
    """Runs `work` on a daemon thread. The returned future has its result or error.

    The threads of an executor would not do, because Python waits for them at exit. A save that hangs (a rank is lost, a
    file system does not respond) must not keep the process alive.
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
    """State of the run at one moment, from which a save writes. `copies` is complete after `finish`."""

    def __init__(self, state: dict[str, Any]) -> None:
        self.state = state
        """State for DCP to plan with: the live tensors, and copies of all other values."""
        self.copies: dict[str, Tensor] = {}
        """This rank's part of each tensor, by flat name; empty if the live tensors are written."""
        self.is_complete = threading.Event()
        """Event that is set when the run may change its state again, also if copying failed."""
        self._later: list[tuple[str, Tensor, int]] = []
        self._stream: torch.cuda.Stream | None = None
        self._began: torch.cuda.Event | None = None

    def finish(self) -> None:
        """Copies the tensors that `Stager.begin` left uncopied, in any thread. Raises RuntimeError if the run has
        changed one."""
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
    """Copies one state at a time, into the buffers of the previous copy."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}
        self.memory = SharedMemory()
        """Memory that contains all buffers."""

    @torch.no_grad()
    def begin(self, state: dict[str, Any], steady: Iterable[Tensor]) -> Stage:
        """Copies all of `state` except tensors that share memory with `steady`, which must not change before
        `is_complete` is set."""
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
        """Reuses the buffers if all of them fit, and otherwise replaces all. Shapes of a run's state seldom change."""
        wanted = {name: (source.shape, source.dtype) for name, source in sources.items()}
        if wanted == {name: (buffer.shape, buffer.dtype) for name, buffer in self._buffers.items()}:
            return
        self._buffers, self.memory = {}, SharedMemory()  # frees the old ones before the new ones are made
        on_gpu = {name: wanted[name] for name, source in sources.items() if source.is_cuda}
        on_host = {name: wanted[name] for name in wanted if name not in on_gpu}
        self._buffers = slabs(on_gpu, page_locked=True, memory=self.memory)
        self._buffers |= slabs(on_host, page_locked=False, memory=self.memory)
