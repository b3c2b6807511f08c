"""One message for a failed run, whatever its number of ranks.

If one rank fails, all others fail with it: their collectives raise errors, or torchrun ends them. Their tracebacks
would hide the one that matters. Each rank therefore leaves two files in the folder that torchrun has made for its
output, and its launcher prints one paragraph from them:

- `step` holds the number of completed steps. It is written after each step, so that it is right even for a rank that
  was killed.
- `error.json`, torchrun's own file, says why the rank ended. An error that one sentence explains is stored without its
  traceback, and with a mark if it is only the consequence of another rank's failure.

Under plain torchrun, its summary shows the same sentences.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from titan_distill.fault_tolerance.files import atomic

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

STEP_FILE, ERROR_FILE = "step", "error.json"


def log_folder() -> Path | None:
    """Folder that torchrun has made for this rank's output; None without torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    return Path(error_file).parent if error_file else None


class StepFile:
    """File with the number of steps that this rank has completed. Without torchrun nothing is written."""

    def __init__(self) -> None:
        self._descriptor: int | None = None
        if folder := log_folder():
            with suppress(OSError):  # a full or missing disk of logs ends no run
                self._descriptor = os.open(folder / STEP_FILE, os.O_CREAT | os.O_WRONLY, 0o666)

    def write(self, step: int) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.pwrite(self._descriptor, f"{step}\n".encode(), 0)  # in one call; numbers only get longer


def report(error: BaseException, *, is_consequence: bool = False) -> None:
    """Tells of a failure that one sentence explains: on stderr, and to the launcher.

    A consequence of another rank's failure is left to the launcher, which prints it if it knows nothing better.
    """
    folder = log_folder()
    if not is_consequence or folder is None:
        print(f"error: {error}", file=sys.stderr)
    if folder is not None:
        leave_sentence(folder, error, is_consequence)


def leave_sentence(folder: Path, error: BaseException, is_consequence: bool = False) -> None:
    """Writes torchrun's error file of the rank whose log folder this is."""
    extra = {"py_callstack": str(error), "timestamp": str(int(time.time()))}
    message = {"message": f"{type(error).__name__}: {error}", "extraInfo": extra}
    content = {"message": message, "sentence": str(error), "is_consequence": is_consequence}
    with suppress(OSError), atomic(folder / ERROR_FILE) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")


def describe(failures: Mapping[int, ProcessFailure], logs: Path, is_shown: Callable[[int], bool]) -> str:
    """Returns the launcher's paragraph about a failed run.

    Args:
        failures: torchrun's failures by rank; those of this machine.
        logs: the launcher's log folder, which has one folder per run in it.
        is_shown: whether a local rank's stderr has been shown by the launcher.
    """
    ranks = sorted(failures, key=lambda rank: failures[rank].timestamp)
    causes = [rank for rank in ranks if not _is_consequence(failures[rank])]
    if not causes:
        return f"error: {_sentence(failures[ranks[0]]) or 'torchrun has ended all ranks'}"
    attempt = max(logs.glob("*/attempt_*"), key=lambda path: path.stat().st_mtime, default=None)
    rank = causes[0]
    failure = failures[rank]
    who = f"rank {rank} ({socket.gethostname()}, pid {failure.pid})"
    step = _last_step(attempt) if attempt else 0
    when = f"after step {step}" if step else "before the end of the first step"
    output = f"; its output is in {attempt / str(failure.local_rank)}" if attempt else ""
    if sentence := _sentence(failure):
        told = any(is_shown(failures[other].local_rank) and _sentence(failures[other]) == sentence for other in causes)
        return "" if told and failure.exitcode > 0 else f"error: {sentence}"
    if failure.exitcode < 0:
        hint = " (the kernel does this when memory runs out, and notes it in dmesg)" if failure.exitcode == -9 else ""
        return f"error: {who} was ended by {failure.signal_name()}{hint} {when}{output}"
    error, traceback = _error(failure)
    if not error:
        return f"error: {who} ended with exit code {failure.exitcode} {when}{output}"
    shown = "" if is_shown(failure.local_rank) else f"{traceback.rstrip()}\n"
    return f"{shown}error: {who} failed {when} with {error.splitlines()[0]}{output}"


def _is_consequence(failure: ProcessFailure) -> bool:
    return failure.exitcode == -signal.SIGTERM or bool(failure.error_file_data.get("is_consequence"))


def _sentence(failure: ProcessFailure) -> str:
    return failure.error_file_data.get("sentence", "")


def _error(failure: ProcessFailure) -> tuple[str, str]:
    """Returns the error and the traceback of a rank that raised; "" for a rank that did not."""
    message: Any = failure.error_file_data.get("message")
    if not isinstance(message, dict):
        return "", ""
    return message["message"], message["extraInfo"]["py_callstack"]


def _last_step(attempt: Path) -> int:
    """Returns the largest step that a rank of this machine has completed: in a step, all have completed the one before
    it."""
    steps = [path.read_text(encoding="utf-8") for path in attempt.glob(f"*/{STEP_FILE}")]
    return max((int(step) for step in steps if step.strip()), default=0)
