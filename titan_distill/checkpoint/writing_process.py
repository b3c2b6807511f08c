"""A process of its own that writes the files of an asynchronous save.

Writing costs more than the disk's time: hashing a gigabyte and copying it into the page cache takes about two seconds
of a core, and an operation that training runs on all cores is as slow as the slowest of them. A thread of the trainer
would also hold up training at the interpreter lock. This process has a low priority, so it takes the time that training
leaves, and the whole machine when training waits for it. The trade-off: on a machine without idle cores a save takes up
to thirty times as long.

The process maps the memory with the staged copies (`pinned.SharedMemory`), so the trainer sends the places of tensors
and no tensors. It imports neither torch nor CUDA: it starts in a tenth of a second and needs a few MiB. Torch's own
process for asynchronous saves imports torch, receives every tensor's own shared file and needs a second set of process
groups.

One process serves one save. It ends when the trainer closes the connection, or dies: a forked data worker may still
hold the connection then, so the process also watches the id of its parent. It blocks the signals that a run takes for
requests, because Ctrl-C and SLURM send them to all processes, and the run still waits for the file.
"""

from __future__ import annotations

import io
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from titan_distill.fault_tolerance.files import FileRecord, HashedFile

if TYPE_CHECKING:  # the process itself does without torch
    from titan_distill.parallelisms.pinned import SharedMemory

BLOCKED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that ask a run to stop (`signals.py`)."""
NICENESS = 15
"""Priority of the process. Against a thread of the trainer it gets 3.4 % of a core; with the lowest priority, 19, it
would get 1.4 %, and on a busy machine a save would last a minute per GB."""
PARENT_SECONDS = 0.5
"""Time after which the death of the trainer is noticed."""

Piece = bytearray | tuple[int, int]
"""Part of a file: its bytes, or where they begin and end in the shared memory."""


class WritingProcess:
    """The process, seen from the trainer; a context manager that ends it.

    Start it in the main thread: a data worker that another thread forks meanwhile would inherit the process's end of
    the connection, and its death would stay unnoticed.
    """

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory
        self._connection, theirs = Pipe()
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED_SIGNALS)  # which the process inherits
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import main; main()"]
                + [str(number) for number in (os.getpid(), theirs.fileno(), memory.descriptor)],
                env={**os.environ, "PYTHONPATH": paths, "PYTHONSAFEPATH": "1"},
                pass_fds=(theirs.fileno(), memory.descriptor),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            theirs.close()
        self.pid = self._process.pid

    def __enter__(self) -> WritingProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._connection.close()
        self._process.wait()

    def open(self, path: Path) -> DelegatedFile:
        """Returns a new file, which the process writes when `record` is called."""
        return DelegatedFile(path, self)

    def write(self, path: Path, pieces: list[Piece]) -> FileRecord:
        """Writes a file and waits until it is on disk. Raises the OSError of the process, and ChildProcessError if the
        process has died."""
        try:
            self._connection.send((path, pieces))
            result = self._connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            raise ChildProcessError(f"the process that writes {path.name} {ended}; is memory short?") from None
        if isinstance(result, Exception):
            raise result
        return result


class DelegatedFile(io.RawIOBase):
    """A new file whose content is collected in order, and written by the writing process."""

    failure: OSError | None = None
    """None, as in a `HashedFile` without failure: this one fails in `record`."""

    def __init__(self, path: Path, process: WritingProcess) -> None:
        super().__init__()
        self._path, self._process = path, process
        self._pieces: list[Piece] = []
        self._num_bytes = 0

    def writable(self) -> bool:
        """Returns True."""
        return True

    def write(self, data: Any) -> int:
        """Adds `data`, which must not change before `record` returns if it lies in the shared memory."""
        view = memoryview(data).cast("B")
        if (start := self._process.memory.offset(view)) is not None:
            self._pieces.append((start, start + len(view)))
        elif self._pieces and isinstance(last := self._pieces[-1], bytearray):
            last += view
        else:
            self._pieces.append(bytearray(view))
        self._num_bytes += len(view)
        return len(view)

    def tell(self) -> int:
        """Returns the number of bytes so far."""
        return self._num_bytes

    def record(self) -> FileRecord:
        """Has the file written, and returns its size and SHA-256. Raises the errors of `WritingProcess.write`."""
        return self._process.write(self._path, self._pieces)


def main() -> None:
    """Writes files for the trainer until it closes the connection. Arguments: the trainer's process id, and the file
    descriptors of the connection and of the memory."""
    parent, connection, memory = (int(argument) for argument in sys.argv[1:])
    os.nice(NICENESS)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    staged = memoryview(mmap.mmap(memory, 0, access=mmap.ACCESS_READ))
    with Connection(connection) as trainer, suppress(EOFError, ConnectionError):
        while True:
            path, pieces = trainer.recv()
            trainer.send(_write(path, pieces, staged))


def _write(path: Path, pieces: list[Piece], staged: memoryview) -> FileRecord | Exception:
    try:
        with HashedFile(path) as file:
            for piece in pieces:
                file.write(piece if isinstance(piece, bytearray) else staged[slice(*piece)])
            os.fsync(file.fileno())
        return file.record()
    except Exception as failure:
        return failure


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(1)
