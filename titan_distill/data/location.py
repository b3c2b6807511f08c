"""Places of data: local paths, and URLs of the file systems that fsspec knows, such as `s3://bucket/folder`.

Local data stays with pathlib and pyarrow's own reader. `RemotePath` has the part of pathlib's interface that readers
use. It stores only the URL and asks fsspec for the file system when it needs it: fsspec keeps one connection per
process, so loader processes share none with the process that started them.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, Literal

from titan_distill.config.paths import is_url


@dataclass(frozen=True, order=True)
class RemotePath:
    """A file or folder on a file system of fsspec, for reading. Raises ValueError if fsspec or a package that it needs
    does not know the protocol; other errors are OSErrors."""

    url: str

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return posixpath.basename(self.url.rstrip("/"))

    @property
    def suffix(self) -> str:
        return Path(self.name).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(posixpath.dirname(self.url.rstrip("/")))

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def relative_to(self, root: Location) -> Path:
        """Returns the part of the path after `root`. Raises ValueError if this is not below `root`."""
        return Path(self.url).relative_to(Path(str(root)))

    def is_file(self) -> bool:
        with self._opened() as (system, path):
            return bool(system.isfile(path))

    def is_dir(self) -> bool:
        with self._opened() as (system, path):
            return bool(system.isdir(path))

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> Iterator[RemotePath]:
        """Yields the entries of a folder."""
        with self._opened() as (system, path):
            entries = system.ls(path, detail=False)
        for entry in entries:
            name = posixpath.basename(entry.rstrip("/"))
            if name:
                yield self / name

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Opens the file for reading bytes."""
        with self._opened() as (system, path):
            stream: IO[bytes] = system.open(path, "rb")
        return stream

    def read_text(self, encoding: str = "utf-8") -> str:
        """Returns the text of the file."""
        with self.open("rb") as file:
            text = file.read().decode(encoding)
        return text.replace("\r\n", "\n").replace("\r", "\n")

    def stat(self) -> SimpleNamespace:
        """Returns the size of the file, as `st_size`."""
        with self._opened() as (system, path):
            return SimpleNamespace(st_size=int(system.size(path)))

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, str]]:
        """The file system, and the path on it. Its own kinds of errors, such as an HTTP client's, become OSErrors."""
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError, TypeError) as error:  # no such protocol; no such package; parts of the URL
            raise ValueError(f"{self.url} can't be opened: {' '.join(str(error).split())}; correct the URL") from error
        try:
            yield system, path
        except (OSError, ValueError):
            raise
        except Exception as error:
            raise OSError(f"{type(error).__name__}: {' '.join(str(error).split())}") from error


Location = Path | RemotePath


def location(path: str | Location) -> Location:
    """Returns the place that a path or a URL names."""
    if isinstance(path, str):
        return RemotePath(path) if is_url(path) else Path(path)
    return path


def resolved(file: Location) -> str:
    """Returns a path without links, or a URL as it is."""
    return os.path.realpath(file) if isinstance(file, Path) else file.url


def parquet_source(file: Location) -> Any:
    """Returns what pyarrow opens to read a file: the path itself, or an open remote file, which the reader closes."""
    return file if isinstance(file, Path) else file.open("rb")
