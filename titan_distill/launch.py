"""Launcher: torchrun that passes signals on to its ranks and returns their exit code.

`python -m titan_distill.launch` takes torchrun's arguments. torchrun itself ends its workers within 30 seconds after
SIGTERM or Ctrl-C, dies of SIGUSR1, and turns every exit code of a worker into 1 and a traceback per rank. This launcher
passes each signal on and lets the workers take the time they need. A run that was asked to stop ends with 75, an
interrupted run with 130, and a failed run with one paragraph (`fault_tolerance/failures.py`).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import FrameType

from titan_distill.fault_tolerance.exit_codes import (
    EXIT_BAD_INPUT,
    EXIT_COME_AGAIN,
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNHEALTHY,
)
from titan_distill.fault_tolerance.failures import describe
from titan_distill.fault_tolerance.signals import leave_at_once
from titan_distill.fault_tolerance.utf8 import restart_in_utf8

SECONDS_TO_LEAVE = 10
"""Seconds from Ctrl-C to a kill, because a rank that waits in a collective on a GPU does not notice the signal."""


SECONDS_TO_START = 30
"""Seconds that a worker gets to install its handlers. A stop signal that comes before is kept for it."""
SECONDS_TO_MEET = 900
"""Seconds to wait for the first node's launcher, as long as torchrun does."""
SIGNALS = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGALRM)


class Relay:
    """Passes the launcher's signals on to its workers."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self._patience = SECONDS_TO_START
        for number in SIGNALS:
            signal.signal(number, self._pass_on)

    def close(self) -> None:
        """Ignores signals from now on: Python drops its handlers before it ends, and a signal would then kill the
        launcher, whose exit code is settled."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # torchrun would report failures
        workers = _children()
        if signal.SIGINT in self.received and number in (signal.SIGINT, signal.SIGALRM):
            number = signal.SIGKILL  # a second Ctrl-C, or the time limit after the first
        elif number == signal.SIGINT:
            if not workers:
                leave_at_once(number, frame)
            self.received.add(number)
            signal.alarm(SECONDS_TO_LEAVE)
        else:
            number = min(self.received) if number == signal.SIGALRM else number
            self.received.add(number)
            if not workers or (self._patience and not all(_catches(worker, number) for worker in workers)):
                self._patience -= bool(workers)
                signal.alarm(1)  # and then again
                return
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker, number)

    def exit_code(self, workers: set[int]) -> int:
        """The launcher's exit code, from those of the workers that failed. Negative ones are signals."""
        if signal.SIGINT in self.received or EXIT_INTERRUPTED in workers:
            return EXIT_INTERRUPTED
        if EXIT_BAD_INPUT in workers:
            return EXIT_BAD_INPUT
        if EXIT_UNHEALTHY in workers:
            return EXIT_UNHEALTHY
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
            parent = int(status.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
            if parent == os.getpid():
                found.append(int(status.parent.name))
    return found


def _catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal, and will not die of it. True for a process that has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return True
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:")), "0")
    return "\nState:\tZ" in status or bool(int(caught, 16) >> (number - 1) & 1)


def main() -> int:
    """Runs torchrun on the command line's arguments. Returns the exit code."""
    restart_in_utf8()
    relay = Relay()  # before torch is imported, which takes seconds
    try:
        return launch(sys.argv[1:], relay)
    finally:
        relay.close()


def launch(argv: list[str], relay: Relay) -> int:
    """Runs torchrun. Returns the exit code."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic.multiprocessing").setLevel(logging.CRITICAL)  # of each rank that ends
    arguments = run.parse_args(["--signals-to-handle", "SIGHUP,SIGQUIT", *argv])
    if relay.received and arguments.nnodes in ("1", "1:1"):  # of several nodes one would leave the others waiting
        print("stopped as asked before the first step")
        return relay.exit_code(set())
    arguments.log_dir = arguments.log_dir or tempfile.mkdtemp(prefix="titan_distill_logs_")
    try:
        _check_number(arguments.nproc_per_node)
        if arguments.rdzv_backend == "static" and int(arguments.node_rank):
            _wait_for_store(arguments.master_addr, int(arguments.master_port))
        run.run(arguments)
    except ChildFailedError as error:
        code = relay.exit_code({failure.exitcode for failure in error.failures.values()})
        if code in (EXIT_FAILED, EXIT_BAD_INPUT):
            told = describe(error.failures, Path(arguments.log_dir), partial(_is_shown, arguments))
            print(told, end="\n" if told else "", file=sys.stderr)
        return code
    return EXIT_DONE


def _wait_for_store(host: str, port: int) -> None:
    """Waits until the first node's launcher listens, for `SECONDS_TO_MEET` at most; torchrun tells what is wrong then.

    torchrun waits as well, but a signal during its wait prints a warning with a C++ stack.
    """
    deadline = time.monotonic() + SECONDS_TO_MEET
    while time.monotonic() < deadline:
        with suppress(OSError):
            socket.create_connection((host, port), timeout=10).close()
            return
        time.sleep(0.2)


def _check_number(text: str) -> None:
    """Exits with a sentence for a number of processes that torchrun would answer with a traceback."""
    from torch.distributed import run

    try:
        if run.determine_local_world_size(text) >= 1:
            return
        reason = "must be at least 1"
    except ValueError as error:
        reason = f"is not a number of processes ({error})"
    print(f"error: --nproc-per-node = {text!r} {reason}; give a positive integer", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _is_shown(arguments: Namespace, local_rank: int) -> bool:
    """Whether torchrun shows the errors of a rank, by torchrun's arguments."""
    from torch.distributed.elastic.multiprocessing import Std

    def covers_errors(option: str) -> bool:
        of_all = Std.from_str(option)
        return bool((of_all.get(local_rank, Std.NONE) if isinstance(of_all, dict) else of_all) & Std.ERR)

    shown = arguments.local_ranks_filter
    if shown and str(local_rank) not in shown.split(","):
        return False
    return covers_errors(arguments.tee) or not covers_errors(arguments.redirects)


if __name__ == "__main__":
    sys.exit(main())
