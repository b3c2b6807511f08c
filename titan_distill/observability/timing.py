"""Phase timer, which adds up the seconds of a step by phase.

Phases may nest (a teacher inside a critic update); each second belongs to the innermost open phase only, so phases add
up to at most the whole and none is counted twice.

On a GPU the host runs ahead of the device, and a host clock would book the device's seconds on whichever phase happens
to block first. Three remedies: synchronise at every border (exact, but the device idles while the host catches up, a
few percent of a step), record CUDA events (no stall; the device stamps the time when it gets there), or live with it.
We record events: a phase then costs what the *stream* spent on it, and host work that hides behind the device counts as
nothing, which is what it costs. Reading them waits for the device once per logged line, as reading the losses does.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch

Mark = float | torch.cuda.Event


class PhaseTimer:
    """`with timer("rollout"):` adds the block's seconds to the phase `rollout`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host_seconds: dict[str, float] = defaultdict(float)
        """Seconds of all blocks of a phase so far by the host's clock, inner phases included."""
        self._open: list[str] = []
        # Each border holds a moment and the phase that begins there; None where no phase is open.
        self._borders: list[tuple[Mark, str | None]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        self._open.append(phase)
        self._borders.append((self._now(), phase))
        try:
            yield
        finally:
            self._open.pop()
            self._borders.append((self._now(), self._open[-1] if self._open else None))
            self.host_seconds[phase] += time.perf_counter() - started

    def drain(self) -> dict[str, float]:
        """Seconds by `time/<phase>` since the last call. Waits for the device when it is a GPU."""
        if self._open:
            self._borders.append((self._now(), self._open[-1]))
        borders, self._borders = self._borders, self._borders[-1:]
        if borders and isinstance(last := borders[-1][0], torch.cuda.Event):
            last.synchronize()
        seconds: dict[str, float] = defaultdict(float)
        for (start, phase), (end, _) in pairwise(borders):
            if phase is not None:
                seconds[f"time/{phase}"] += _seconds_between(start, end)
        return dict(seconds)

    def _now(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


def _seconds_between(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000
