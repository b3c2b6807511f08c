"""torchrun that passes signals on and says how its ranks ended: ``python -m titan_distill.launch``, same arguments.

torchrun answers SIGTERM and Ctrl-C by ending its workers within 30 seconds, dies of SIGUSR1 itself, and makes exit code
1 and a traceback out of whatever its workers return. Here the workers get each signal and all the time they need (who
sends it decides how long that is), and a run that was asked to stop ends with 75, one that was interrupted with 130.
Everything else is torchrun's.
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
"""After Ctrl-C; a rank that waits in a collective on a GPU does not hear it."""


class Relay:
    """Hands the launcher's signals to its workers."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        if signal.SIGINT in self.received and number in (signal.SIGINT, signal.SIGALRM):
            number = signal.SIGKILL  # Ctrl-C means now: a second one, or some seconds, are enough
        elif number == signal.SIGINT:
            signal.alarm(SECONDS_TO_LEAVE)
        self.received.add(number)
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # torchrun would report failures
        for worker in _children():
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    def exit_code(self, workers: set[int]) -> int:
        """Of the launcher, given those of the workers that failed; negative ones are signals."""
        if signal.SIGINT in self.received or EXIT_INTERRUPTED in workers:
            return EXIT_INTERRUPTED
        # Ranks that a signal ended before they had a handler for it have lost nothing.
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
