"""Files below a folder, with linked folders. Names are compared in one Unicode form.

macOS stores names in decomposed form (NFD), most tables and other systems in composed form (NFC): `é` is then two
different strings that look the same. Names are compared as NFC (`plain_name`) and opened as they are stored.
"""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Collection, Iterator
from pathlib import Path, PurePath
from typing import Any, overload

from titan_distill.data.location import Location, resolved

UNFINISHED, VIDEOS = "unfinished", "videos.jsonl"
"""Subfolder in which `titan-distill data preprocess` works until all clips are there, and the first file in it."""

logger = logging.getLogger(__name__)


@overload
def files_below(folder: Path, suffixes: Collection[str]) -> list[Path]: ...
@overload
def files_below(folder: Location, suffixes: Collection[str]) -> list[Location]: ...
def files_below(folder: Location, suffixes: Collection[str]) -> list[Any]:
    """Returns the files below a folder whose suffix (in small letters) is one of `suffixes`, sorted.

    Links to folders are followed, but each real folder is read once, so that a link to a folder above it ends, and two
    links to one folder do not double its files; the log names the link that is left out. Hidden folders, such as
    caches, are left out.
    """
    return sorted(path for path in _walk(folder, {}) if path.suffix.lower() in suffixes)


def _walk(folder: Location, visited: dict[str, Location]) -> Iterator[Location]:
    real = resolved(folder)
    if real in visited:
        logger.warning("%s is left out: it is the same folder as %s", folder, visited[real])
        return
    visited[real] = folder
    # Folders before links to folders, so that a file keeps the path that has no link in it.
    entries: list[Location] = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path))
    for entry in entries:
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _walk(entry, visited)
        else:
            yield entry


def plain_name(name: str | PurePath) -> str:
    """Returns a relative or absolute path in the form in which paths are compared: NFC, `/`, no `.` and no `./`."""
    return unicodedata.normalize("NFC", PurePath(name).as_posix())


class NameFinder:
    """Finds files by names that may be written in another Unicode form than on disk. Folders are listed once."""

    def __init__(self) -> None:
        self._listed: dict[Path, dict[str, str]] = {}

    def find(self, path: Path) -> Path | None:
        """Returns the existing file that a path names; None if there is none."""
        if os.path.isfile(path):  # pathlib raises OSError for a name that is too long
            return path
        if str(path).isascii():  # has only one form
            return None
        found = Path(path.anchor)
        for part in path.parts[1 if path.anchor else 0 :]:
            found /= part if os.path.exists(found / part) else self._entries(found).get(plain_name(part), part)
        return found if os.path.isfile(found) else None

    def _entries(self, folder: Path) -> dict[str, str]:
        if folder not in self._listed:
            names = os.listdir(folder) if folder.is_dir() else []
            self._listed[folder] = {plain_name(name): name for name in names}
        return self._listed[folder]
