"""Stop requests: SIGTERM and SIGUSR1 end a run after the current step, with a checkpoint.

A signal reaches some ranks at some line, and ranks that act on it by themselves leave the others waiting in a
collective. So a handler only sets a flag, and the ranks agree on it where they meet anyway: the trainer adds the flag
to the sums that every update reduces, which costs nothing. A validation has no such sum; there `poll` reduces one
number over gloo before each forward pass, a fraction of a millisecond beside seconds of sampling. A step is always
finished, because half a step is no state to save; a validation is left at once, at the same pass on all ranks.

Ctrl-C (SIGINT) stops at once and saves nothing, as everywhere.
"""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequested(Exception):
    """Ends a validation when all ranks have agreed to stop."""


class Stop:
    """The stop request of a run. `with Stop() as stop:` installs the signal handlers, in the main thread only."""

    def __init__(self) -> None:
        self.is_signalled = False
        """Whether this rank has received a signal."""
        self.is_agreed = False
        """Whether some rank has received one, as all ranks know."""
        self.is_interrupted = False
        """Whether somebody pressed Ctrl-C."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Puts the old handlers back; after an agreed stop only that of Ctrl-C: launchers signal more than once, and
        that must not turn the exit code of a run that has saved into that of a killed one."""
        for number, handler in self._previous.items():
            if number == signal.SIGINT or not self.is_agreed:
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.is_signalled = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt

    def agree(self, num_signalled: float) -> None:
        """Takes the number of signalled ranks, which the caller has summed over all of them."""
        self.is_agreed = self.is_agreed or num_signalled > 0

    def poll(self) -> None:
        """Raises StopRequested on all ranks when any has received a signal. Collective until it has raised once."""
        if not self.is_agreed:
            num_signalled = torch.tensor(float(self.is_signalled))
            if dist.is_initialized():
                dist.all_reduce(num_signalled)  # on the CPU, hence over gloo: no kernel, no wait for the device
            self.agree(num_signalled.item())
        if self.is_agreed:
            raise StopRequested
