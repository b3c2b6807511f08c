"""A lock on a folder, for one process at a time on any host that shares it.

`run.lock` is made by O_EXCL, which shared file systems honour, unlike file locks. Its owner writes who it is and renews
the file every ten seconds. Whoever finds the lock decides whether the owner is alive:

- on the same boot of the same host, by its process id together with the process's start time;
- in the same SLURM job, by the restart count: a requeued job takes over from its earlier life;
- else only by watching: clocks of two hosts may differ, so the challenger waits until its own clock has counted
  a minute in which the file did not change.

A stopped owner may wake up after it was replaced. So it looks for its own token before it publishes anything, and ends
with one sentence when the token is another's.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from titan_distill.fault_tolerance.files import atomic, parse_json
from titan_distill.fault_tolerance.ranks import RankFailure

NAME = "run.lock"
RENEWAL_SECONDS = 10.0
PATIENCE_SECONDS = 60.0
"""Time without a renewal after which an owner on another host counts as dead: six renewals."""
POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


class LockLostError(RankFailure):
    """Another process has taken the folder over; the message is one sentence."""


@dataclass(frozen=True)
class Owner:
    """The content of a lock file."""

    token: str
    host: str
    boot: str
    """Boot id of the host, and the namespace in which `pid` counts (containers have their own)."""
    pid: int
    started: str
    """Start time of the process in clock ticks since boot: a process id alone may belong to a later process."""
    slurm_job: str = ""
    restart: int = 0

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(
            token=uuid.uuid4().hex,
            host=socket.gethostname(),
            boot=_boot(),
            pid=os.getpid(),
            started=_start_time(os.getpid()),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            restart=int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        )

    def is_dead(self, challenger: Owner) -> bool | None:
        """None where the challenger cannot tell without watching the file."""
        if self.slurm_job and self.slurm_job == challenger.slurm_job and self.restart < challenger.restart:
            return True
        if self.boot and self.boot == challenger.boot:
            return _start_time(self.pid) != self.started
        return None

    def __str__(self) -> str:
        job = f", SLURM job {self.slurm_job}" if self.slurm_job else ""
        return f"process {self.pid} on {self.host}{job}"


class RunLock:
    """The lock of one folder; a context manager.

    Raises on entering:
        ValueError: a live process holds the lock.
    """

    def __init__(
        self,
        folder: Path,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        renewal_seconds: float = RENEWAL_SECONDS,
        remedy: str = "wait for it, stop it, or choose another folder",
    ) -> None:
        self.path, self.owner, self._remedy = folder / NAME, Owner.current(), remedy
        self._patience, self._renewal = patience_seconds, renewal_seconds
        self._released = threading.Event()
        self._thread: threading.Thread | None = None
        self._made_folder = False

    def __enter__(self) -> RunLock:
        self._made_folder = not self.path.parent.exists()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while not self._create(self.path):
            self._take_over()
            if self._is_own():
                break
        self._thread = threading.Thread(target=self._renew, name="run lock", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._released.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_own():
            self.path.unlink(missing_ok=True)
            if self._made_folder:
                with suppress(OSError):  # not empty: work was done in it
                    self.path.parent.rmdir()

    def check(self) -> None:
        """Raises LockLostError when another process has taken the folder over."""
        if not self._is_own():
            found = read_owner(self.path)
            raise LockLostError(
                f"{self.path.parent} was taken over by {found or 'somebody who removed its lock'}, because this "
                f"process did not renew {NAME} for {self._patience:.0f} s; nothing more is written here"
            )

    def _is_own(self) -> bool:
        found = read_owner(self.path)
        return found is not None and found.token == self.owner.token

    def _create(self, path: Path) -> bool:
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(json.dumps(asdict(self.owner)))
        return True

    def _take_over(self) -> None:
        """Replaces the lock of a dead owner; returns without effect where the lock has changed hands meanwhile."""
        found = wait_until_dead(self.path, self.owner, self._patience, self._remedy)
        if found is None:
            return
        # One challenger per dead owner: of two, the later one would replace the lock of the earlier one.
        claim = self.path.with_name(f"{NAME}.claim-{found.token or 'unreadable'}")
        if not self._create(claim):
            if not _changes(claim, self._patience):
                claim.unlink(missing_ok=True)  # of a challenger that died at this very place
            return
        try:
            if (current := read_owner(self.path)) is None or current.token == found.token:
                with atomic(self.path) as temporary:
                    temporary.write_text(json.dumps(asdict(self.owner)), encoding="utf-8")
                logger.warning("%s: taken over from %s, which is gone", self.path, found)
        finally:
            claim.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._released.wait(self._renewal):
            try:
                if not self._is_own():
                    return  # `check` tells the owner at its next publish
                os.utime(self.path)
            except OSError as error:  # a shared file system that is away for a moment
                logger.warning("%s could not be renewed: %s", self.path, error)


def wait_until_dead(path: Path, challenger: Owner, patience_seconds: float, remedy: str) -> Owner | None:
    """Returns the lock's dead owner, or None when there is no lock any more.

    Raises ValueError, naming the owner, when it is alive.
    """
    watched: tuple[str, int] | None = None
    since = time.monotonic()
    while True:
        owner, state = read_owner(path), _state(path)
        if state is None:
            return None
        # A file without content: its maker is between creating and writing it, or died there.
        dead = None if owner is None else owner.is_dead(challenger)
        if dead:
            return owner
        token, changed = owner.token if owner else "", state[1]
        is_renewed = watched is not None and watched[0] == token and watched[1] != changed
        if dead is False or is_renewed:
            raise _in_use(path, owner, remedy)
        if watched != (token, changed):
            logger.warning("%s is held by %s: watching for %.0f s whether it lives", path, owner, patience_seconds)
            watched, since = (token, changed), time.monotonic()
        elif time.monotonic() - since >= patience_seconds:
            return owner or Owner("", "", "", 0, "")
        time.sleep(min(POLL_SECONDS, patience_seconds / 4))


def check_free(folder: Path, remedy: str) -> None:
    """Raises ValueError, naming the owner, when a live process of this host holds the folder's lock; never waits."""
    path = folder / NAME
    if (owner := read_owner(path)) is not None and owner.is_dead(Owner.current()) is False:
        raise _in_use(path, owner, remedy)


def _in_use(path: Path, owner: Owner | None, remedy: str) -> ValueError:
    return ValueError(f"{path.parent} is in use by {owner}; {remedy}")


def read_owner(path: Path) -> Owner | None:
    """The owner that a lock file names; None for a file that is missing or incomplete."""
    try:
        return Owner(**parse_json(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _changes(path: Path, patience_seconds: float) -> bool:
    seen, until = _state(path), time.monotonic() + patience_seconds
    while time.monotonic() < until:
        time.sleep(min(POLL_SECONDS, patience_seconds / 4))
        if _state(path) != seen:
            return True
    return False


def _state(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _boot() -> str:
    """Empty where the system does not say, such as outside Linux."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which a process started; empty for a process that does not live."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
