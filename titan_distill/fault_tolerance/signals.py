"""Stop requests: SIGTERM and SIGUSR1 end a run after the current step, with a checkpoint.

A signal may reach only some ranks, each at another line. A rank that stopped by itself would leave the others waiting
in a collective. The signal handler therefore only sets a flag, and the ranks agree on it in a collective. During
training the trainer adds the flag to the sums that every update reduces, at no extra cost. During validation `poll`
reduces one number over gloo before each forward pass, which takes a fraction of a millisecond. A training step is
always completed, because a partial step cannot be saved. A validation ends before the next forward pass, the same one
on all ranks.

Ctrl-C (SIGINT) stops at once and saves nothing.

Importing torch takes seconds, in which a signal would kill the process or end it with a traceback. This file therefore
imports torch only where it communicates, and entry points call `listen_early` before their other imports.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any

from titan_distill.fault_tolerance.exit_codes import EXIT_INTERRUPTED

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
MOST_RANKS = 2.0**20
"""Larger than the sum of the votes of ranks with a signal, 1 each."""
DOCTORS_VOTE = MOST_RANKS**2
"""Vote of a rank whose doctor ends the run. Sums of votes may be divided by the number of ranks that share samples."""

_early: set[int] = set()
"""Stop signals that came before a `Stop` listened."""


def listen_early() -> None:
    """Remembers stop signals for the `Stop` to come, and lets Ctrl-C end the process at once. For a process that has
    nothing to lose yet."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: _early.add(number))
    signal.signal(signal.SIGINT, leave_at_once)


def leave_at_once(number: int, frame: FrameType | None) -> None:
    """Handler of Ctrl-C that ends the process. An exception would pass through whatever is being imported."""
    os.write(2, b"interrupted before any work was done\n")  # `print` is not reentrant
    os._exit(EXIT_INTERRUPTED)


class StopRequested(Exception):
    """Raised on all ranks to end a validation after they have agreed to stop."""


class Stop:
    """Stop request of a run. `with Stop() as stop:` installs the signal handlers; use it in the main thread."""

    def __init__(self) -> None:
        self.is_signalled = False
        """Whether this rank has received a signal."""
        self.is_alarmed = False
        """Whether this rank's doctor ends the run."""
        self.is_agreed = False
        """Whether all ranks know that some rank has received a signal or an alarm."""
        self.is_doctors = False
        """Whether the doctor is a reason of the stop on which all ranks agree."""
        self.is_interrupted = False
        """Whether somebody pressed Ctrl-C."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        self._previous = {number: signal.signal(number, self._request) for number in STOP_SIGNALS}
        self._previous[signal.SIGINT] = signal.signal(signal.SIGINT, self._interrupt)
        self.is_signalled = self.is_signalled or bool(_early)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Restores the old signal handlers. After an agreed stop it restores only the handler of Ctrl-C, and ignores
        the other signals.

        Launchers may repeat SIGTERM. It would then kill a run that has already saved, and its exit code would no longer
        be 75. A handler of ours would not do, because Python drops handlers before it ends.
        """
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_IGN if self.is_agreed and number != signal.SIGINT else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.is_signalled = True

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self.is_interrupted = True
        raise KeyboardInterrupt

    @property
    def vote(self) -> float:
        """This rank's part of the sum that `agree` takes: 0 to go on."""
        return self.is_signalled + DOCTORS_VOTE * self.is_alarmed

    def agree(self, votes: float) -> None:
        """Records the agreement of all ranks, from the sum of their votes."""
        self.is_agreed = self.is_agreed or votes > 0
        self.is_doctors = self.is_doctors or votes >= MOST_RANKS

    def poll(self) -> None:
        """Raises StopRequested on all ranks if any rank has a reason to stop. Collective until it has raised once."""
        import torch
        import torch.distributed as dist

        if not self.is_agreed:
            votes = torch.tensor(float(self.vote))
            if dist.is_initialized():
                dist.all_reduce(votes)  # on the CPU, hence over gloo: no kernel, no wait for the device
            self.agree(votes.item())
        if self.is_agreed:
            raise StopRequested
