"""Files whose SHA-256 is known the moment they are written.

Hashing a checkpoint afterwards means reading all of it again, which on a shared disk costs as much as writing it. Here
a second thread hashes the bytes while the first hands the same bytes to the kernel: both release the interpreter lock,
so the hash is free wherever it is faster than the disk (it runs at 1.4 GB/s on one core).

What is hashed is what was meant to be written. A disk that drops bytes is found out at once, because sizes are compared
with the disk; one that alters bytes is found out when the checkpoint is read.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import FileSystem

from titan_distill.checkpoint.manifest import FileRecord

_PIECE_BYTES = 8 << 20
"""A full disk or a killed process is noticed after this much, not after a whole tensor."""
_OVERLAP_BYTES = 128 << 10
"""Below this, handing work to another thread costs more than it hides."""


class HashedFile(io.RawIOBase):
    """A new file that takes bytes in order and knows their number and SHA-256. Unbuffered."""

    def __init__(self, path: Path) -> None:
        self._file = io.FileIO(path, "wb")
        self._digest = hashlib.sha256()
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._num_bytes = 0
        self.failure: OSError | None = None
        """Why a write failed."""

    def write(self, data: Any) -> int:
        """Writes all of ``data``, which must not change before this returns. Raises OSError."""
        view = memoryview(data).cast("B")
        if len(view) < _OVERLAP_BYTES:
            self._digest.update(view)
            self._write_all(view)
        else:
            hashing = self._hasher.submit(self._digest.update, view)
            try:
                self._write_all(view)
            finally:
                hashing.result()  # also when writing fails: the caller's memory is only ours until then
        return len(view)

    def tell(self) -> int:
        return self._num_bytes

    def fileno(self) -> int:
        return self._file.fileno()

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self._hasher.shutdown()
            self._file.close()
            super().close()

    def record(self) -> FileRecord:
        """What has been handed over."""
        return FileRecord(self._num_bytes, self._digest.hexdigest())

    def _write_all(self, view: memoryview) -> None:
        try:
            while len(view):
                # The kernel may take less than it was offered, on a disk that is just filling up for example.
                num_written = self._file.write(view[:_PIECE_BYTES])
                assert num_written, "a blocking file takes at least one byte, or raises"
                self._num_bytes += num_written
                view = view[num_written:]
        except OSError as failure:
            self.failure = failure
            raise


class HashedFiles(FileSystem):
    """DCP's access to a folder, with the record of each file that goes through it."""

    def __init__(self) -> None:
        self.records: dict[str, FileRecord] = {}
        """What was written, by file name."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        assert mode == "wb", "a save does not read"
        with HashedFile(Path(path)) as file:
            try:
                yield file
            except RuntimeError as error:
                if file.failure is not None:  # torch.save loses it, and complains of positions in its archive
                    raise file.failure from error
                raise
        self.records[Path(path).name] = file.record()

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)
