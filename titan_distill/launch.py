"""Launcher: torchrun that passes signals on to its ranks and returns their exit code.

`python -m titan_distill.launch` takes torchrun's arguments. torchrun itself ends its workers within 30 seconds after
SIGTERM or Ctrl-C, dies of SIGUSR1, and turns every exit code of a worker into 1 and a traceback. This launcher passes
each signal on and lets the workers take the time they need. A run that was asked to stop ends with 75, an interrupted
run with 130.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType

from titan_distill.fault_tolerance.exit_codes import EXIT_COME_AGAIN, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED

SECONDS_TO_LEAVE = 10
"""Seconds from Ctrl-C to a kill, because a rank that waits in a collective on a GPU does not notice the signal."""


class Relay:
    """Passes the launcher's signals on to its workers."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in self.received and number in (signal.SIGINT, signal.SIGALRM):
            number = signal.SIGKILL  # a second Ctrl-C, or the time limit after the first
        elif number == signal.SIGINT:
            signal.alarm(SECONDS_TO_LEAVE)
        self.received.add(number)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # torchrun would report failures
        for worker in _children():
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    def exit_code(self, workers: set[int]) -> int:
        """The launcher's exit code, from those of the workers that failed. Negative ones are signals."""
        if signal.SIGINT in self.received or EXIT_INTERRUPTED in workers:
            return EXIT_INTERRUPTED
        # A rank that a signal ends before it has a handler has nothing to lose.
        was_too_early = bool(self.received) and workers <= {-signal.SIGUSR1, -signal.SIGTERM}
        if EXIT_COME_AGAIN in workers or was_too_early:
            return EXIT_COME_AGAIN
        return EXIT_FAILED


def _children() -> list[int]:
    """Process ids of the workers."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found.append(int(status.parent.name))
    return found


def main() -> int:
    """Runs torchrun on the command line's arguments. Returns the exit code."""
    relay = Relay()  # before torch is imported, which takes seconds
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        run.main(["--signals-to-handle", "SIGHUP,SIGQUIT", *sys.argv[1:]])
    except ChildFailedError as error:
        code = relay.exit_code({failure.exitcode for failure in error.failures.values()})
        if code == EXIT_FAILED:
            raise  # torchrun's summary names the rank
        return code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
