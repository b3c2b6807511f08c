"""A watchdog that names the rank that died or hangs, and ends the run.

When a rank is lost, collectives on the other ranks fail after their timeout, with an error that names network addresses
at best. torchrun then reports the first *surviving* rank that fails as the root cause. To name the right one, every
rank has a heartbeat: a thread that writes a counter, the step, and the current line of the main thread into
torch.distributed's key-value store. Within `timeout` seconds after a rank is lost, one of three things happens:

- *No heartbeat* (the rank is killed or stopped, or its machine is down): the other ranks notice after three quarters of
  the timeout. They name the lost rank and exit. If it belongs to the same torchrun they also kill it, because torchrun
  would wait 30 s for a stopped process. This needs no collective and is the same on gloo and NCCL.
- *A heartbeat, but the other ranks wait for the rank* (deadlock, endless loop, dead file system): only the timeout of
  the collective can distinguish this from a long step, so that timeout ends the run. gloo raises an error in the main
  thread, and `__exit__` names the ranks that have not failed. NCCL aborts the process without running Python code. A
  rank that has been in the same call for three quarters of the timeout therefore logs which ranks are not in that
  collective, and the lines they are at.
- *The rank raised an error*: it writes the error to the store before it exits, and the other ranks report that error
  instead of their own. torchrun then sends them SIGTERM, which they take for a request to stop after the current step.
  A rank that cannot finish the step exits after two beats.

torchrun's agent on the first node serves the store, so the store outlives every rank. If the agent's machine is lost,
every other rank reports that and exits. The cost is one small message per rank in every tenth of the timeout.
"""

from __future__ import annotations

import datetime
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

import torch.distributed as dist

from titan_distill.fault_tolerance.exit_codes import EXIT_FAILED
from titan_distill.fault_tolerance.failures import StepFile, leave_sentence, log_folder, report

log = logging.getLogger(__name__)

BEATS_A_TIMEOUT = 10
PATIENCE = 0.75
"""Share of the timeout after which a rank without heartbeat counts as lost. Noticing takes up to two more beats."""
BEATS_AFTER_FAILURE = 2
"""Number of beats in which a rank may notice by itself that another rank has failed."""
SECONDS_TO_BE_ENDED = 3.0
"""Seconds that a surviving rank waits for torchrun to end it, so that torchrun notices the lost rank first."""


class LostRankError(RuntimeError):
    """Another rank died, hangs or failed. The message names the rank."""


@dataclass(frozen=True)
class Beat:
    """Message that a rank writes about itself to the store."""

    host: str
    pid: int
    agent: int
    """Process id of the rank's torchrun."""
    logs: str = ""
    """Folder of the rank's output, if torchrun has made one."""
    count: int = 0
    step: int = 0
    position: str = "start"
    """Innermost line of the main thread outside of torch, at the time of the beat."""
    waits: bool = False
    """Whether that line is inside torch.distributed."""
    same_call_seconds: float = 0.0
    """Seconds that the main thread has been in the same call."""
    state: Literal["running", "failed", "done"] = "running"
    error: str = ""
    """Error of a failed rank; "" if only a collective failed, which is a consequence of another rank's failure."""


class Silence:
    """Time at which each rank's counter last changed, by this process's clock, because clocks of machines may
    differ."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, float]] = {}

    def update(self, beats: Mapping[int, Beat], now: float) -> dict[int, float]:
        """Returns the seconds since the last beat of every rank that has neither ended nor failed."""
        for rank, beat in beats.items():
            if rank not in self._last or self._last[rank][0] != beat.count:
                self._last[rank] = (beat.count, now)
        return {rank: now - self._last[rank][1] for rank, beat in beats.items() if beat.state == "running"}


class Watchdog:
    """Heartbeat of this rank, and check of the other ranks' heartbeats: `with watchdog: trainer.run()`."""

    def __init__(self, rank: int, world_size: int, timeout_seconds: float) -> None:
        """Starts the heartbeat. It needs torchrun's environment. With one rank nothing starts."""
        self._step, self._step_file = 0, StepFile()
        self._rank, self._world_size, self._timeout = rank, world_size, timeout_seconds
        self._beat = Beat(socket.gethostname(), os.getpid(), os.getppid(), str(log_folder() or ""))
        self._main_thread = threading.get_ident()
        self._call: tuple[int, int] = (0, 0)
        self._call_since = time.monotonic()
        self._has_complained = self._have_started = False
        self._beats_after_failure = 0
        self._silence = Silence()
        self._is_over = False
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        if world_size > 1:
            self._store = _connect(timeout_seconds)
            self._write()
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @property
    def step(self) -> int:
        """Number of completed steps; the trainer sets it."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        self._step = step
        self._step_file.write(step)

    def tighten(self, timeout_seconds: float) -> None:
        """Sets the timeout for the rest of the run. The timeout during start-up is longer, because loading and
        compiling take time."""
        # The others beat as rarely as before until they come here, too: their silence so far says nothing.
        self._silence = Silence()
        self._timeout = timeout_seconds
        self._wake.set()

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Marks this rank as ended or failed in the store. Raises LostRankError in place of a collective's error that
        another rank caused; a collective that failed on all ranks alike keeps its error."""
        if self._thread is None:
            return
        self._is_over = True
        self._wake.set()
        self._thread.join()
        own_fault = error is not None and not _is_from_collective(error)
        message = f"{type(error).__name__}: {error}".splitlines()[0] if own_fault else ""
        state: Literal["failed", "done"] = "done" if error is None else "failed"
        self._beat = replace(self._beat, step=self.step, state=state, error=message[:2000])
        cause = ""
        try:
            self._write()
            if error is not None and not own_fault:
                cause = self._find_cause()
        except RuntimeError as gone:  # of the store, which a node that has ended takes with it
            cause = "" if error is None or own_fault else _no_store(gone)
        if cause:
            raise LostRankError(cause) from error

    # The thread ------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._is_over:
            self._wake.wait(self._timeout / BEATS_A_TIMEOUT)
            self._wake.clear()
            try:
                self._look_at_main_thread()
                self._write()
                beats = self._read() if self._all_have_started() else {}
            except RuntimeError as error:  # of the store
                self._leave(_no_store(error))
            now = time.monotonic()
            seconds = self._silence.update(beats, now)
            if lost := {rank: beats[rank] for rank, value in seconds.items() if value >= PATIENCE * self._timeout}:
                self._leave(self._lost(lost, beats, PATIENCE * self._timeout))
            self._leave_after_failure(beats)
            if self._beat.same_call_seconds >= PATIENCE * self._timeout:
                self._complain(beats)

    def _leave_after_failure(self, beats: Mapping[int, Beat]) -> None:
        failed = any(beat.state == "failed" for beat in beats.values())
        if failed and self._beats_after_failure == BEATS_AFTER_FAILURE:
            self._leave(self._find_cause() or "all other ranks have failed; the output of each says why")
        self._beats_after_failure += failed

    def _look_at_main_thread(self) -> None:
        frame = sys._current_frames()[self._main_thread]
        call, now = (id(frame), frame.f_lasti), time.monotonic()
        if call != self._call:
            self._call, self._call_since, self._has_complained = call, now, False
        position, waits = describe_position(frame)
        seconds = now - self._call_since
        self._beat = replace(self._beat, step=self.step, position=position, waits=waits, same_call_seconds=seconds)

    def _complain(self, beats: Mapping[int, Beat]) -> None:
        elsewhere = {rank: beat for rank, beat in beats.items() if beat.position != self._beat.position}
        if elsewhere and not self._has_complained:
            self._has_complained = True
            log.warning(
                "rank %d has been at %s for %.0f s; not there: %s",
                self._rank, self._beat.position, self._beat.same_call_seconds, _list_ranks(elsewhere),
            )  # fmt: skip

    def _lost(self, lost: Mapping[int, Beat], beats: Mapping[int, Beat], seconds: float) -> str:
        """Kills the lost ranks of this rank's torchrun. Returns a sentence about all lost ranks."""
        named = _list_ranks(_up_to_date(lost, {**beats, self._rank: replace(self._beat, step=self.step)}))
        sentence = f"no sign of life for {seconds:.1f} s from {named}: killed, stopped, or its machine is down"
        # torchrun then sees the lost rank fail first and names it; SIGTERM, its own way, does not reach a stopped one.
        for beat in lost.values():
            if (beat.host, beat.agent) == (self._beat.host, self._beat.agent) and _is_alive(beat.pid):
                if beat.logs:
                    leave_sentence(Path(beat.logs), LostRankError(sentence))
                with suppress(ProcessLookupError):
                    os.kill(beat.pid, signal.SIGKILL)
        return sentence

    def _leave(self, message: str) -> NoReturn:
        report(LostRankError(message), is_consequence=True)
        time.sleep(SECONDS_TO_BE_ENDED)
        os._exit(EXIT_FAILED)  # the main thread waits in a collective, where no exception reaches it

    # The store -------------------------------------------------------------------------------------

    def _write(self) -> None:
        self._beat = replace(self._beat, count=self._beat.count + 1)
        self._store.set(f"{self._rank}", json.dumps(asdict(self._beat)))

    def _all_have_started(self) -> bool:
        # Before that there is nothing to compare with, and reading would block.
        self._have_started = self._have_started or self._store.check([f"{rank}" for rank in range(self._world_size)])
        return self._have_started

    def _read(self) -> dict[int, Beat]:
        values = self._store.multi_get([f"{rank}" for rank in range(self._world_size)])
        return {rank: Beat(**json.loads(value)) for rank, value in enumerate(values)}

    def _find_cause(self) -> str:
        """Returns a sentence that names the rank that made a collective fail: a rank that raised an error, else one
        without heartbeat, else one that has not failed and does not wait in a collective. "" if there is none."""
        interval = self._timeout / BEATS_A_TIMEOUT
        before, deadline = self._read(), time.monotonic() + 2.5 * interval
        while True:
            beats = self._read()
            if failed := {rank: beat for rank, beat in beats.items() if beat.error}:
                return "; ".join(f"rank {rank} {_where(beat)} failed: {beat.error}" for rank, beat in failed.items())
            others = {rank: beat for rank, beat in beats.items() if rank != self._rank and beat.state == "running"}
            silent = {rank: beat for rank, beat in others.items() if beat.count == before[rank].count}
            if not silent or time.monotonic() > deadline:
                break
            time.sleep(interval / 4)
        if silent:
            return self._lost(silent, beats, 2.5 * interval)
        if not others:
            return ""
        busy = {rank: beat for rank, beat in others.items() if not beat.waits}
        return f"the other ranks waited in vain for {_list_ranks(_up_to_date(busy or others, beats))}"


def record_collectives(folder: Path, init_timeout_seconds: int) -> None:
    """Sets the environment variables of NCCL's flight recorder that the user has not set. Call it before the process
    group is created.

    Each rank then records its last collectives and writes them to `folder` (created if missing) when a collective times
    out. `torchfrtrace` reads the files of all ranks and names the ranks that did not enter a collective. gloo has no
    such recorder.
    """
    settings = {
        "TORCH_FR_BUFFER_SIZE": "2000",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        "TORCH_FR_DUMP_TEMP_FILE": str(folder / "collectives_rank_"),  # torch appends the rank
        "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": str(init_timeout_seconds),  # for the case that NCCL's watchdog hangs
    }
    folder.mkdir(parents=True, exist_ok=True)  # torch makes no folder, and drops what it can't write
    for name, value in settings.items():
        if _OLD_NAMES.get(name, name) not in os.environ:  # which the new name would overrule
            os.environ.setdefault(name, value)


_OLD_NAMES = {
    "TORCH_FR_BUFFER_SIZE": "TORCH_NCCL_TRACE_BUFFER_SIZE",
    "TORCH_FR_DUMP_TEMP_FILE": "TORCH_NCCL_DEBUG_INFO_TEMP_FILE",
}
"""Deprecated names of the flight recorder's variables. torch 2.11 to 2.13 still read them, with a warning."""


def describe_position(frame: FrameType) -> tuple[str, bool]:
    """Returns the innermost line outside of torch, such as `trainer.py:113 in forward_backward`, and whether this line
    calls torch.distributed."""
    waits = frame.f_globals.get("__name__", "").startswith("torch.distributed")
    outer: FrameType | None = frame
    while outer is not None and outer.f_globals.get("__name__", "").partition(".")[0] == "torch":
        outer = outer.f_back
    shown = outer or frame
    code = shown.f_code
    return f"{os.path.basename(code.co_filename)}:{shown.f_lineno} in {code.co_name}", waits


def _connect(timeout_seconds: float) -> dist.Store:
    # A connection of its own: a main thread that waits in the default store would hold the heartbeat up.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=timeout_seconds))
    return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _is_from_collective(error: BaseException) -> bool:
    """Returns whether a collective raised the error. NCCL's errors have their own types; gloo's messages name its
    source file."""
    return isinstance(error, dist.DistError) or (type(error) is RuntimeError and "gloo/" in str(error))


def _no_store(error: RuntimeError) -> str:
    address, reason = os.environ["MASTER_ADDR"], str(error).splitlines()[0]
    return f"the store on {address} does not answer: that machine has lost a rank, or it is down ({reason})"


def _up_to_date(some: Mapping[int, Beat], beats: Mapping[int, Beat]) -> dict[int, Beat]:
    """Returns the beats of some ranks with the latest step of all ranks: when one rank is in a step, all have completed
    the step before it, and the last beat of a lost rank may be older than that."""
    latest = max(beat.step for beat in beats.values())
    return {rank: replace(beat, step=latest) for rank, beat in some.items()}


def _is_alive(pid: int) -> bool:
    """Whether a process of this machine exists and has not ended. A stopped process has not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _list_ranks(beats: Mapping[int, Beat]) -> str:
    shown = [f"rank {rank} {_where(beat)}" for rank, beat in list(beats.items())[:8]]
    return ", ".join(shown) + (f" and {len(beats) - 8} more" if len(beats) > 8 else "")


def _where(beat: Beat) -> str:
    logs = f", its output is in {beat.logs}" if beat.logs else ""
    return f"({beat.host}, pid {beat.pid}; after step {beat.step}, last seen at {beat.position}{logs})"
