"""Safe file writing: atomic replacement, flushing to disk, and SHA-256 digests of files and folders."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ_BYTES = 4 << 20
_PIECE_BYTES = 8 << 20
"""Bytes per write call. A full disk is noticed after this many bytes instead of after a whole tensor."""
_OVERLAP_BYTES = 128 << 10
"""Smallest write, in bytes, that is hashed on a second thread. For smaller writes, starting the thread costs more time
than it saves."""


def parse_json(text: str) -> Any:
    """Returns the value of a JSON text. Raises ValueError for other text, and for values that are nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("its values are nested too deeply") from error


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str


def temporary_beside(path: Path) -> Path:
    """Returns a new path in the same folder, `<name>.tmp-<id>`, for an unfinished version of `path`."""
    return path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex[:8]}")


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yields a temporary path for a file or folder, and renames it to `path` when the block succeeds.

    When the block fails, the temporary file or folder is removed and `path` is unchanged.
    """
    temporary = temporary_beside(path)
    try:
        yield temporary
        temporary.replace(path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


@contextmanager
def with_umask_mode(path: Path) -> Iterator[None]:
    """Gives a file that the block writes the mode that the umask asks for.

    Some libraries write through a temporary file of mode 0600, which colleagues on a shared disk cannot read. The mode
    is taken from a file made here, because reading the umask means changing it, for all threads.
    """
    path.touch()
    mode = stat.S_IMODE(path.stat().st_mode)
    yield
    path.chmod(mode)


def is_bare(name: object) -> bool:
    """Returns whether a name that was read from a file names an entry of its folder, rather than one outside."""
    return isinstance(name, str) and name not in ("", ".", "..") and not any(letter in name for letter in "/\\\0")


def flush_folder(folder: Path) -> None:
    """Waits until the entries of a folder are on disk. Without this wait a power cut can undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def record_file(path: Path) -> FileRecord:
    """Reads a file and returns its size and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
        return FileRecord(file.tell(), digest.hexdigest())


def fingerprint(folder: Path, end_bytes: int = 1 << 20) -> str:
    """Identifies the contents of a folder: SHA-256 over the names, the sizes and both ends of its files.

    Each end is `end_bytes` long. Reading all of a teacher's tens of GB would take minutes at every start, and in
    practice would distinguish no more sets of weights.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        num_bytes = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{num_bytes}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(end_bytes))
            file.seek(max(0, num_bytes - end_bytes))
            digest.update(file.read())
    return digest.hexdigest()


def format_bytes(num_bytes: float) -> str:
    """Formats a size in the largest binary unit in which it is at least 1, such as `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


class HashedFile(io.FileIO):
    """A new file that computes its size and SHA-256 while it is written, in order and unbuffered.

    Hashing a checkpoint after it is written means reading all of it again, which on a shared disk takes as long as
    writing it. Here a second thread hashes the bytes while the first thread writes them. Both release the interpreter
    lock, so hashing costs no time if it is faster than the disk (it reaches 1.4 GB/s on one core).

    The hash covers the bytes passed to `write`, not those on disk. A disk that drops bytes is found by comparing file
    sizes; a disk that alters bytes is found when the checkpoint is read.
    """

    def __init__(self, path: Path) -> None:
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._num_bytes = 0
        self.failure: OSError | None = None
        """Error of a failed write; None while all writes have succeeded."""
        super().__init__(path, "wb")

    def write(self, data: Any) -> int:
        """Writes all of `data`, which must not change before this returns. Raises OSError."""
        view = memoryview(data).cast("B")
        if len(view) < _OVERLAP_BYTES:
            self._digest.update(view)
            self._write_all(view)
        else:
            hashing = self._hasher.submit(self._digest.update, view)
            try:
                self._write_all(view)
            finally:
                hashing.result()  # also when writing fails: the caller's buffer is only ours until then
        return len(view)

    def close(self) -> None:
        self._hasher.shutdown()
        super().close()

    def record(self) -> FileRecord:
        """Returns size and SHA-256 of the bytes written so far."""
        return FileRecord(self._num_bytes, self._digest.hexdigest())

    def _write_all(self, view: memoryview) -> None:
        try:
            while len(view):
                # The kernel may take less than it was offered, for example on a disk that is just filling up.
                num_written = super().write(view[:_PIECE_BYTES])
                assert num_written, "a blocking file takes at least one byte, or raises"
                self._num_bytes += num_written
                view = view[num_written:]
        except OSError as failure:
            self.failure = failure
            raise
